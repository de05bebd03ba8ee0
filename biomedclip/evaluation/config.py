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


class EvaluateConfig(Config):
    """One evaluation run."""

    model: str
    """A run folder, a checkpoint folder or an open_clip name: whatever `biomedclip.load` takes."""
    model_name: str | None = None
    """How results call the model; by default as `model` does."""
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
