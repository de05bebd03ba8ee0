"""What a run may do against forgetting, as data. Imports no torch.

Every method is a section with a `weight`; a section that is absent costs nothing. All methods of a run share one
teacher, which embeds each batch once however many methods ask for it. Defaults are the authors' numbers where they
published some; the page docs/training.md says which to take.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from biomedclip.config import Config

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class ModXConfig(Config):
    """Keeps the batch's off-diagonal similarities where the teacher is right (Ni et al. 2023)."""

    weight: Positive = 20.0
    """The authors' alpha, for their batches of `rows`."""
    rows: Count = 280
    """Rows of the authors' batch, whose sum their alpha multiplies: 70 on each of 4 GPUs [unverified: their number of
    GPUs]. The mean over rows is multiplied by this, so the weight means the same at every batch size."""


class VocabularyConfig(Config):
    """VR-LwF (Ding et al. 2022): keeps the batch's images where they were among sentences of random words."""

    weight: Positive = 1.0
    temperature: Positive = 2.0
    num_texts: Count = 1000
    num_words: Count = 10


class ReferenceConfig(Config):
    """ZSCL (Zheng et al. 2023): keeps images of reference sources where they were among the sources' captions."""

    weight: Positive = 1.0
    temperature: Positive = 2.0
    path: str
    """A dataset folder of general images with captions, here or at a URL; they need not belong together."""
    split: Literal["train", "val", "test"] = "train"
    batch_size: Count = 64
    """Reference images of a step, over all processes."""
    num_texts: Count = 1000
    """Captions taken as anchors, spread over the folder; fewer where it has fewer."""


class TemperedConfig(Config):
    """A divergence at a temperature."""

    weight: Positive = 1.0
    temperature: Positive = 0.07


class WeightedConfig(Config):
    """A term with a weight."""

    weight: Positive = 1.0


class EwcConfig(Config):
    """EWC (Kirkpatrick et al. 2017): penalises leaving weights that mattered for the data of a source."""

    weight: Positive
    """Depends on model, data and batch size: F is small. Try 1e2 to 1e6 and watch the term beside the loss."""
    path: str | None = None
    """Dataset folder that stands for what must be kept; None takes the training mixture itself."""
    batches: Count = 32
    """Batches of the run's batch size that the Fisher information is estimated on."""


class StoredConfig(Config):
    """MobileCLIP's stored teacher: embeddings written by `biomedclip teach`, read by sample, no teacher pass."""

    weight: Positive = 1.0
    names: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names the embeddings were stored under; several teachers are averaged after the softmax."""
    folder: str | None = None
    """Where they lie: `SOURCE/SHARD.teacher-NAME.parquet` in it; None: beside the shards of each source."""


class EmaConfig(Config):
    """A moving average of the weights, exported beside them as `ema/`."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    warmup: bool = True
    """Step t averages with min(decay, (1 + t) / (10 + t)), so that a short run does not keep its random start."""


class EnsembleConfig(Config):
    """ZSCL's weight ensemble: the mean of the weights at the start and after every `every_steps` steps, exported as
    `ensemble/`."""

    every_steps: Count = 100


class ContinualConfig(Config):
    """Methods against forgetting; each absent one costs nothing."""

    teacher: str = "start"
    """`start`: the weights this run begins with; or any name that `biomedclip.load` takes."""
    teacher_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    modx: ModXConfig | None = None
    vr_lwf: VocabularyConfig | None = None
    zscl: ReferenceConfig | None = None
    ctp: TemperedConfig | None = None
    lwf: TemperedConfig | None = None
    features: WeightedConfig | None = None
    similarity: WeightedConfig | None = None
    stored: StoredConfig | None = None
    l2_sp: WeightedConfig | None = None
    ewc: EwcConfig | None = None
    ema: EmaConfig | None = None
    ensemble: EnsembleConfig | None = None
    freeze_batch_norm: bool = False
    """Batch norm keeps the statistics it starts with and normalises by them: in a convolutional tower they follow the
    new pictures within a few dozen steps, and the old ones are lost with them. Its weights are trained all the same."""

    @property
    def needs_whole_weights(self) -> bool:
        """Whether a method reads all weights of the model, which sharded training spreads over processes."""
        return any((self.l2_sp, self.ewc, self.ema, self.ensemble))

    @model_validator(mode="after")
    def _teacher_is_used(self) -> ContinualConfig:
        users = (self.modx, self.vr_lwf, self.zscl, self.ctp, self.lwf, self.features, self.similarity)
        if self.teacher != "start" and not any(users):
            raise ValueError(f"teacher {self.teacher!r} is named, and no method that needs a teacher is")
        return self


class ProbeConfig(Config):
    """One question asked of the model while it trains: a task of the evaluator, on a budget of images."""

    task: str
    """A task of `biomedclip evaluate`, its metric and prompts included."""
    data: str
    """Where its data lies."""
    role: Literal["gain", "retention"] = "gain"
    """`gain`: what this run is to learn. `retention`: what it must not lose, reported as value / value at step 0."""
    max_samples: Count = 500
    """Images of a validation, spread evenly over the classes; always the same ones."""
    split: str | None = None
    """Another split than the task's, such as `val`: whatever is chosen by these numbers must not be scored on them."""


class GuardConfig(Config):
    """What happens to a step whose loss is a spike."""

    action: Literal["skip", "rewind"] = "skip"
    """`skip` leaves the weights as they are; `rewind` takes those of the last snapshot."""
    factor: Annotated[float, Field(gt=1)] = 3.0
    """A spike is above this many times the median of the last losses."""
    window: Annotated[int, Field(ge=2)] = 100
    snapshot_every_steps: Count = 100
    """rewind: good steps between snapshots, which take as much memory as weights and optimizer."""
    max_in_a_row: Count = 10
    """Spikes in a row that end the run."""
