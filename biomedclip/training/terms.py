"""What every loss of a step is computed from, and what a term added to the objective looks like.

A step embeds its batch once, by student and (where a term asks for one) teacher, and hands `StepTensors` to the
objective and to each term; what is gathered from other processes is gathered once and shared. Under gradient caching
`image` and `text` are leaves that stand for the whole batch of this process, so a term cannot tell the difference: a
term on embeddings sends its gradient through them, a term on weights (L2-SP, EWC) reads `model` and is added once a
step, and a term may also run `model` on inputs of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor, nn

from biomedclip.training.gather import gather_rows, rank


@dataclass(frozen=True, kw_only=True)
class StepTensors:
    """The embeddings of one step, unit vectors in float32 (or float64 as given); b rows here, B over all processes."""

    image: Tensor
    """(b, D) of the student, with gradient."""
    text: Tensor
    """(b, D) of the student, with gradient."""
    second_text: Tensor | None = None
    """(b, D) of the samples' second captions, where the objective asks for them."""
    logit_scale: Tensor
    """Scalar factor of the cosines (exponentiated), with gradient."""
    logit_bias: Tensor | None = None
    teacher_image: Tensor | None = None
    """(b, D') of the teacher, without gradient; None where no term needs a teacher."""
    teacher_text: Tensor | None = None
    batch: Mapping[str, Any]
    """The batch as the loader gave it (uint8 images, token ids, keys), on the device."""
    model: nn.Module
    """The student, an open_clip model: `encode_image(pixels, normalize=True)` and so on."""
    normalise: Callable[[Tensor], Tensor]
    """uint8 pixels (N, 3, H, W) to what the model's image tower takes."""
    step: int
    """Steps taken before this one."""

    @cached_property
    def all_image(self) -> Tensor:
        """(B, D) image embeddings of all processes, with gradient; `image` itself in one process."""
        return gather_rows(self.image)

    @cached_property
    def all_text(self) -> Tensor:
        """(B, D) text embeddings of all processes, with gradient."""
        return gather_rows(self.text)

    @cached_property
    def all_teacher_image(self) -> Tensor | None:
        """(B, D') of the teacher."""
        return None if self.teacher_image is None else gather_rows(self.teacher_image)

    @cached_property
    def all_teacher_text(self) -> Tensor | None:
        """(B, D') of the teacher."""
        return None if self.teacher_text is None else gather_rows(self.teacher_text)

    @property
    def first_row(self) -> int:
        """Row of the gathered tensors at which this process's rows begin."""
        return rank() * len(self.image)


class Term(Protocol):
    """A number added to the objective, such as a regularizer against forgetting.

    Called once a step, whatever the number of micro-batches. In several processes the mean over them of what is
    returned must be the term's value on the global batch: either each computes it from the gathered tensors, or each
    computes the mean over its own rows against the gathered columns.
    """

    name: str
    """Name in metrics and configs, such as `modx`."""
    weight: float
    """Factor of the term in the loss."""
    needs_teacher: bool
    """Whether the teacher must embed the batch for it."""

    def __call__(self, step: StepTensors) -> Tensor:
        """The term's value, not yet weighted: a scalar with gradient."""
        ...


class Teacher(Protocol):
    """A frozen model beside the student, held outside of parameters, optimizer, EMA and checkpoints."""

    def embed(self, pixels: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings (b, D') of normalised pixels and token ids, without gradient, on their device.

        Both come as the student takes them; a teacher with other mean and std undoes the student's itself.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Continual:
    """What continual pretraining adds to a run: its terms, and the teacher where one of them needs it.

    `train` makes it by `biomedclip.training.continual.terms.build_continual(config, folder=..., model=...,
    tokenizer=..., data=...)` once the run's `start/` is written and before the model is wrapped or compiled; `data` is
    the run's StreamData and `tokenizer` open_clip's.
    """

    terms: tuple[Term, ...] = ()
    teacher: Teacher | None = None
