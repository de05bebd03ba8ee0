"""What an evaluation run may say: which model, which tasks, where their data lies. Imports no torch.

A task's own file (suites/*.yaml) fixes everything that makes numbers comparable: split, prompts, metrics, ensemble.
A run can name another prompt set, and the result says so; it cannot change the split that is scored or choose
anything on it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from biomedclip.config import Config


class BootstrapConfig(Config):
    """Resamples and level of the intervals."""

    n: Annotated[int, Field(ge=100, le=100_000)] = 2000
    level: Annotated[float, Field(gt=0.5, lt=1)] = 0.95


AdapterName = Literal["linear_probe", "knn", "nearest_mean", "gda", "tip", "tip_f", "lp++"]


class FewShotConfig(Config):
    """Adapters at K images a class; draws are nested, and validation is as small."""

    shots: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 2, 4, 8, 16)
    seeds: Annotated[int, Field(ge=1)] = 5
    methods: Annotated[tuple[AdapterName, ...], Field(min_length=1)] = ("linear_probe", "gda", "tip")


class OutsideConfig(Config):
    """Tasks whose images belong to no class of the others: near ones of the same kind, far ones of another."""

    near: tuple[str, ...] = ()
    far: tuple[str, ...] = ()


class SensitivityConfig(Config):
    """Draws of one random prompt a class."""

    k: Annotated[int, Field(ge=2, le=10_000)] = 20


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
    corruptions: bool = False
    """Score corrupted copies of the scored images: every corruption at severities 1, 3 and 5."""
    prompt_sensitivity: SensitivityConfig | None = None
    calibration: bool = False
    """Calibration of the model's own probabilities, and after a temperature fitted on the validation split."""
    composition: bool = False
    """Retrieval tasks: captions against foils with side, negation or finding changed."""
    subgroups: dict[str, str] = Field(default_factory=dict)
    """Task name -> attribute of its manifest by which the primary metric is shown apart."""
    allow_test_selection: bool = False
    """Choose hyper-parameters on the split that is scored where a task has no other; such results are tagged."""
    leakage: dict[str, str] = Field(default_factory=dict)
    """Task name -> `leakage.json` of the training data (or the folder it is in), to be shown beside the number."""
