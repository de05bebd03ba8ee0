"""What a run of ranking may say: questions and the models that answer them. Imports no torch.

An evaluate config whose first key is `task: medvqa` is read with this model.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from biomedclip.config import Config
from biomedclip.evaluation.vqa.datasets import Layout


class VqaEvaluateConfig(Config):
    """One table: every model answers the same questions without training, beside what needs no picture."""

    task: Literal["medvqa"]
    models: Annotated[tuple[str, ...], Field(min_length=1)]
    """Whatever `biomedclip.load` takes; `random:ARCHITECTURE` for random weights."""
    root: str
    layout: Layout
    language: str | None = None
    """Only questions of this language, such as `en` of SLAKE."""
    split: str = "test"
    phrase_type: str | None = None
    """Only questions worded so, such as `freeform` of VQA-RAD."""
    resamples: Annotated[int, Field(ge=100)] = 2000
