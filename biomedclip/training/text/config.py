"""What a run of `task: text` may say: the tower, its teacher, the sentences. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from biomedclip.config import Config
from biomedclip.training.config import OptimConfig, ScheduleConfig


class TextLossConfig(Config):
    """Two views of the same wish: each sentence where the teacher has it, and neighbours as the teacher has them."""

    cosine: Annotated[float, Field(ge=0)] = 1.0
    relations: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the divergence between the teacher's and the tower's similarities within a batch (Park et al. 2019 and
    Fang et al. 2021 distil relations in this way)."""
    temperature: Annotated[float, Field(gt=0)] = 0.05
    """Of the similarities."""


class TextTrainConfig(Config):
    """One run. The teacher's vectors are made once and kept in the run's folder."""

    task: Literal["text"]
    model: str
    """The architecture whose text tower learns, from random weights."""
    teacher: str
    """The folder of a BERT-family sentence encoder in transformers' format that averages its tokens (MiniLM, MPNet)."""
    sentences: Annotated[tuple[str, ...], Field(min_length=1)]
    """Text files, one sentence a line: what `biomedclip data sentences` writes."""
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    teacher_tokens: Annotated[int, Field(ge=8, le=512)] = 128
    """More are cut off."""
    batch_size: Annotated[int, Field(ge=8)] = 512
    epochs: Annotated[int, Field(ge=1)] = 8
    optim: OptimConfig = OptimConfig(lr=2e-3, weight_decay=0.05)
    schedule: ScheduleConfig = ScheduleConfig(warmup_steps=100)
    loss: TextLossConfig = TextLossConfig()
    seed: Annotated[int, Field(ge=0)] = 0
