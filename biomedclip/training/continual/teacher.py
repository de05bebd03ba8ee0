"""The frozen model that a run is held to: one pass over each batch, whatever number of methods reads it.

Reads the name of a model (by default the weights the run started from) and yields unit embeddings without gradient.
It is loaded at the first batch, onto that batch's device, and is deliberately no `nn.Module`: whatever walks the
modules of a run (optimizer, moving averages, checkpoints, DDP) cannot find it, so it costs one copy of the weights and
none of their optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biomedclip.errors import CheckpointError
from biomedclip.training.towers import encode_text


class FrozenTeacher:
    """Embeds what the student sees; see `biomedclip.training.terms.Teacher`.

    `build` loads the model at first use. `student` is looked at for its preprocessing and its vocabulary only.
    """

    def __init__(self, build: Callable[[], nn.Module], student: nn.Module, *, name: str, precision: str) -> None:
        self.name, self.precision = name, precision
        self._build = build
        self._model: nn.Module | None = None
        visual: Any = student.visual
        self._student_facts = dict(visual.preprocess_cfg)
        self._vocabulary = vocabulary_of(student)

    @classmethod
    def load(cls, name: str | Path, student: nn.Module, *, precision: str = "fp32") -> FrozenTeacher:
        """A teacher that `biomedclip.load` finds under `name`."""

        def build() -> nn.Module:
            from biomedclip.models.load import load

            return load(name)[0]

        return cls(build, student, name=str(name), precision=precision)

    def embed(self, pixels: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings (b, D') in float32 of pixels as the student takes them and of token ids."""
        return self.embed_images(pixels), self.embed_texts(texts)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """(b, D') of normalised pixels."""
        model: Any = self._model_on(pixels.device)
        with torch.no_grad(), self._cast(pixels.device):
            return _unit(model.encode_image(self._renormalise(pixels), normalize=True))

    def embed_texts(self, texts: Tensor) -> Tensor:
        """(b, D') of token ids; equal rows are embedded once."""
        model: Any = self._model_on(texts.device)
        distinct, place = torch.unique(texts, dim=0, return_inverse=True)
        with torch.no_grad(), self._cast(texts.device):
            return _unit(encode_text(model, distinct))[place]

    def logit_scale(self, device: torch.device) -> float:
        """Exponentiated."""
        model: Any = self._model_on(device)
        return float(model.logit_scale.detach().exp())

    def _model_on(self, device: torch.device) -> nn.Module:
        if self._model is None:
            model = self._build().to(device).eval().requires_grad_(False)
            self._check(model)
            self._model = model
        return self._model

    def _check(self, model: nn.Module) -> None:
        visual: Any = model.visual
        facts, ours = visual.preprocess_cfg, self._student_facts
        if facts["size"] != ours["size"]:
            raise CheckpointError(f"teacher {self.name}", f"takes images of {facts['size']}, the student of "
                                  f"{ours['size']}", todo="name a teacher with the student's image size")  # fmt: skip
        if (found := vocabulary_of(model)) != self._vocabulary:
            raise CheckpointError(
                f"teacher {self.name}", f"reads other tokens than the student ({self._vocabulary})", found=found,
                todo="name a teacher with the student's tokenizer and context length",
            )  # fmt: skip

    def _renormalise(self, pixels: Tensor) -> Tensor:
        visual: Any = self._model.visual  # type: ignore[union-attr]
        facts = visual.preprocess_cfg
        if all(tuple(facts[key]) == tuple(self._student_facts[key]) for key in ("mean", "std")):
            return pixels
        mean, std, ours_mean, ours_std = (
            pixels.new_tensor(source[key]).view(-1, 1, 1)
            for source in (facts, self._student_facts)
            for key in ("mean", "std")
        )
        return (pixels * ours_std + ours_mean - mean) / std

    def _cast(self, device: torch.device) -> Any:
        half = self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")
        return torch.autocast(device.type, torch.bfloat16) if half else nullcontext()


def vocabulary_of(model: nn.Module) -> tuple[int, int | None]:
    """(size of the vocabulary, positions of the text tower or None where it takes any length up to its table's)."""
    text: Any = getattr(model, "text", model)
    if hasattr(text, "token_embedding") and hasattr(text, "positional_embedding"):
        return int(text.token_embedding.num_embeddings), int(text.positional_embedding.shape[0])
    return int(getattr(text, "config", text).vocab_size), None


def _unit(embeddings: Tensor) -> Tensor:
    """Length 1 in float32: bfloat16 leaves lengths off by 1e-2."""
    return nn.functional.normalize(embeddings.float(), dim=1)
