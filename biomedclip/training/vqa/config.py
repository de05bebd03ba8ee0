"""What a run of answering heads may say: data, encoders, head, seeds. Imports no torch.

A train config whose first key is `task: medvqa` is read with this model. Nothing here can put the test split into the
vocabulary or into the choice of the epoch; fewer than three seeds need `allow_few_seeds`, and the table says so.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from biomedclip.config import Config
from biomedclip.evaluation.vqa.datasets import Layout


class VqaDataConfig(Config):
    """Where the questions are."""

    root: str
    layout: Layout
    language: str | None = None
    """Only questions of this language, such as `en` of SLAKE."""
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.15
    """Images held out of the training split, with all their questions, where the data has no validation split."""


class VqaEncoderConfig(Config):
    """One row of the table."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    model: str
    """Whatever `biomedclip.load` takes."""
    init: Literal["weights", "random"] = "weights"
    checkpoint: str | None = None
    """A weights file of the named model that lies elsewhere."""
    tower: Literal["frozen", "fine_tuned"] = "frozen"


class VqaHeadConfig(Config):
    """The head between image, question and answer."""

    name: Literal["concat", "qcr", "transformer"] = "qcr"
    width: Annotated[int, Field(ge=8)] = 256
    glimpses: Annotated[int, Field(ge=1)] = 4
    """Of bilinear attention (qcr). PubMedCLIP has 10 at a width of 1,024."""
    layers: Annotated[int, Field(ge=1)] = 2
    """Of the transformer."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
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
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    allow_few_seeds: bool = False
    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 64
    lr: Annotated[float, Field(gt=0)] = 2e-3
    tower_lr: Annotated[float, Field(gt=0)] = 1e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip_norm: Annotated[float, Field(gt=0)] = 0.25
    max_words: Annotated[int, Field(ge=4)] = 20
    """Words of a question that are read; the rest is cut off and counted."""
    embed_batch_size: Annotated[int, Field(ge=1)] = 64
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
        return self
