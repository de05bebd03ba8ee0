"""What an evaluation run may say: which model, which tasks, where their data lies. Imports no torch.

A task's own file (suites/*.yaml) fixes everything that makes numbers comparable: split, prompts, metrics, ensemble.
A run can name another prompt set, and the result says so; it cannot change the split that is scored or choose
anything on it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from biomedclip.config import Config
from biomedclip.evaluation.composition import FINDINGS


class BootstrapConfig(Config):
    """Resamples and level of the intervals."""

    n: Annotated[int, Field(ge=100, le=100_000)] = 2000
    level: Annotated[float, Field(gt=0.5, lt=1)] = 0.95


AdapterName = Literal["linear_probe", "knn", "nearest_mean", "gda", "tip", "tip_f", "lp++", "caps", "coop", "upl"]
FewShotName = Literal["linear_probe", "knn", "nearest_mean", "gda", "tip", "tip_f", "lp++", "coop"]


class FewShotConfig(Config):
    """Adapters at K images a class; draws are nested, and validation is as small."""

    shots: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 2, 4, 8, 16)
    seeds: Annotated[int, Field(ge=1)] = 5
    methods: Annotated[tuple[FewShotName, ...], Field(min_length=1)] = ("linear_probe", "gda", "tip")


class OutsideConfig(Config):
    """Tasks whose images belong to no class of the others: near ones of the same kind, far ones of another."""

    near: tuple[str, ...] = ()
    far: tuple[str, ...] = ()
    no_templates: tuple[str, ...] = ("an image without {}", "{} is not present in the image")
    """What is said of an image that does not show a class (CLIPN's rules without its trained tower)."""


class SensitivityConfig(Config):
    """Draws of one random prompt a class."""

    k: Annotated[int, Field(ge=2, le=10_000)] = 20


class PromptLearningConfig(Config):
    """CoOp (`coop`) and UPL's pseudo labels (`upl`): context vectors that start as words."""

    context: str = "a photo of a"
    epochs: Annotated[int, Field(ge=0)] = 50
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    batch_size: Annotated[int, Field(ge=1)] = 32
    per_class: Annotated[int, Field(ge=1)] = 16
    """Images a class that are learnt from: drawn for `coop`, the most confident ones for `upl`."""


class PerceptionConfig(Config):
    """PerceptionCLIP: values of an attribute of how the images were made, such as stains or views."""

    values: Annotated[tuple[str, ...], Field(min_length=2)]
    join: str = "{prompt}, {value}"
    """How a value is said with a class prompt."""
    alone: str = "an image, {}"
    """How a value is said without a class, where it is inferred from that (`pure`)."""
    infer: Literal["class", "pure"] = "class"
    temperature: Annotated[float, Field(gt=0)] = 5.0

    def joined(self, prompt: str, value: str) -> str:
        """A class prompt with the value, its full stop at the end."""
        stem = prompt.removesuffix(".")
        return self.join.replace("{prompt}", stem).replace("{value}", value) + ("." if stem != prompt else "")


class WiseConfig(Config):
    """The points between the model before training and the model of the run."""

    start: str
    """The model before training: whatever `biomedclip.load` takes."""
    alphas: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=2)] = tuple(
        k / 10 for k in range(11)
    )


class EvaluateConfig(Config):
    """One evaluation run."""

    model: str
    """A run folder, a checkpoint folder or an open_clip name: whatever `biomedclip.load` takes."""
    model_name: str | None = None
    """How results call the model; by default as `model` does."""
    published_as: str | None = None
    """Name under which the tasks list published figures of this model, where its own name or title is another."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Largest difference at which a published figure counts as reproduced (reproduce.py has the defaults)."""
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    data: dict[str, str] = Field(default_factory=dict)
    """Task name -> file or folder of its data set, in the layout the task names."""
    prompt_sets: dict[str, str] = Field(default_factory=dict)
    """Task name -> prompt set, where not `default`."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read images; 0 reads in the main process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the image tower computes in; published numbers are float32, and half precision ties close scores."""
    processes: Annotated[int, Field(ge=1)] = 1
    """Processes that share the images, one GPU each on cuda."""
    cache: str | None = None
    """Folder of image embeddings kept between runs; none by default."""
    max_excluded: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Largest share of unreadable images before a task is refused."""
    bootstrap: BootstrapConfig = BootstrapConfig()
    seed: int = 0
    adapters: tuple[AdapterName, ...] = ()
    """Classifiers learnt on the training split of each task, chosen on its validation split or by folds."""
    few_shot: FewShotConfig | None = None
    ood: OutsideConfig | None = None
    corruptions: bool | tuple[str, ...] = False
    """Score corrupted copies of the scored images at severities 1, 3 and 5: all corruptions, or those named."""
    prompt_sensitivity: SensitivityConfig | None = None
    calibration: bool = False
    """Calibration of the model's own probabilities, and after a temperature fitted on the validation split."""
    composition: bool = False
    """Retrieval tasks: captions against foils with side, negation or finding changed."""
    findings: tuple[str, ...] = FINDINGS
    """Findings that stand in for each other in a foil."""
    prior_correction: bool = False
    """The model's fondness for classes, seen on unlabelled images of the selection split, taken out of its scores."""
    perception: dict[str, PerceptionConfig] = Field(default_factory=dict)
    """Task name -> attribute values that its prompts are conditioned on."""
    prompt_learning: PromptLearningConfig = PromptLearningConfig()
    wise: WiseConfig | None = None
    backgrounds: dict[str, str] = Field(default_factory=dict)
    """Task name -> attribute that names each image's background: accuracy of every class on every background."""
    subgroups: dict[str, str] = Field(default_factory=dict)
    """Task name -> attribute of its manifest by which the primary metric is shown apart."""
    allow_test_selection: bool = False
    """Choose hyper-parameters on the split that is scored where a task has no other; such results are tagged."""
    leakage: dict[str, str] = Field(default_factory=dict)
    """Task name -> `leakage.json` of the training data (or the folder it is in), to be shown beside the number."""
