"""What a run of answering heads may say: data, encoders, head, seeds. Imports no torch.

A train config whose first key is `task: medvqa` is read with this model. Nothing here can put the test split into the
vocabulary or into the choice of the epoch; fewer than three seeds need `allow_few_seeds`, and the table says so.
`scored: validation` is for choosing settings: the test questions are then neither answered nor scored.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from biomedclip.config import Config
from biomedclip.evaluation.vqa.datasets import Layout

TIMM = "timm/"
"""Before an architecture of timm: a bare image network, whose weights are the file that `checkpoint` names."""


class VqaDataConfig(Config):
    """Where the questions are."""

    root: str
    layout: Layout
    language: str | None = None
    """Only questions of this language, such as `en` of SLAKE."""
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.15
    """Images held out of the training split, with all their questions, where the data has no validation split."""
    validation_fold: Annotated[int, Field(ge=0)] = 0
    """Which of the disjoint shares is held out: 0 to 1 / validation_share - 1 together hold out every image once."""


class VqaEncoderConfig(Config):
    """One row of the table."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    model: str
    """Whatever `biomedclip.load` takes, or `timm/ARCHITECTURE`."""
    init: Literal["weights", "random"] = "weights"
    checkpoint: str | None = None
    """A weights file of the named model that lies elsewhere; an architecture of timm or open_clip needs one."""
    tower: Literal["frozen", "fine_tuned"] = "frozen"
    size_px: Annotated[int | None, Field(ge=32)] = None
    """Side of the square that a bare network sees; null is that of its weights. Other models have their own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.init == "random" and self.checkpoint is not None:
            raise ValueError("checkpoint: goes with init: weights, and random weights were asked for")
        if self.model.startswith(TIMM) and self.init == "weights" and self.checkpoint is None:
            raise ValueError("checkpoint: name the file of the architecture's weights, nothing is downloaded")
        if self.size_px is not None and not self.model.startswith(TIMM):
            raise ValueError("size_px: goes with timm/ARCHITECTURE, other models bring their preprocessing")
        return self


class VqaHeadConfig(Config):
    """The head between image, question and answer."""

    name: Literal["concat", "qcr", "transformer"] = "qcr"
    width: Annotated[int, Field(ge=8)] = 256
    glimpses: Annotated[int, Field(ge=1)] = 4
    """Of bilinear attention (qcr). PubMedCLIP has 10 at a width of 1,024."""
    layers: Annotated[int, Field(ge=1)] = 2
    """Of the transformer."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    words_first: bool = True
    """The head adds to answers from the question's words alone (words.py), the blind head as well."""
    autoencoder: bool = False
    """MEVF's denoising auto-encoder of the picture beside the encoder (64 features)."""
    autoencoder_px: Annotated[int, Field(ge=16, multiple_of=8)] = 64
    autoencoder_weight: Annotated[float, Field(ge=0)] = 0.001


class VqaTrainConfig(Config):
    """One run: every encoder with every seed, and the same head without a picture."""

    task: Literal["medvqa"]
    data: VqaDataConfig
    encoders: Annotated[tuple[VqaEncoderConfig, ...], Field(min_length=1)]
    head: VqaHeadConfig = VqaHeadConfig()
    regions: Annotated[int, Field(ge=1, le=4)] = 1
    """1: the whole picture; K: also its K x K tiles, each encoded by itself at the encoder's resolution."""
    answer_type: Literal["guessed", "told"] = "guessed"
    """Whether a head answers within the data's open or closed type, or tells the type from the question's words."""
    scored: Literal["test", "validation"] = "test"
    """`validation` chooses settings: the table is about the held-out questions, which also chose the epoch."""
    refit: bool = False
    """Train again on training and held-out images, for as many epochs as validation chose."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    allow_few_seeds: bool = False
    epochs: Annotated[int, Field(ge=1)] = 20
    patience: Annotated[int | None, Field(ge=1)] = None
    """Epochs without a better validation accuracy after which a fit ends; null trains all."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    lr: Annotated[float, Field(gt=0)] = 2e-3
    tower_lr: Annotated[float, Field(gt=0)] = 1e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip_norm: Annotated[float, Field(gt=0)] = 0.25
    max_words: Annotated[int, Field(ge=4)] = 20
    """Words of a question that are read; the rest is cut off and counted."""
    embed_batch_size: Annotated[int, Field(ge=1)] = 64
    features: str | None = None
    """Folder that keeps frozen encoders' features for other runs; null: a folder of this run."""
    pixels_mb: Annotated[int, Field(ge=0)] = 1024
    """Memory for the pictures of a fine-tuned tower; those beyond it are read again in every epoch."""
    workers: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resamples: Annotated[int, Field(ge=100)] = 2000

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.seeds)) < 3 and not self.allow_few_seeds:
            raise ValueError("seeds: name three or more, or set allow_few_seeds: true")
        names = [encoder.name for encoder in self.encoders]
        if len(set(names)) < len(names) or "question_only" in names:
            raise ValueError("encoders: names must differ, and question_only is the run's own")
        if self.refit and self.scored == "validation":
            raise ValueError("refit: would train on the held-out images that scored: validation scores")
        return self
