"""Averages of the weights over the steps of a run: a moving one (EMA) and ZSCL's ensemble.

Reads the student after a step; keeps one float32 copy of what training changes (trained parameters and the buffers
that have fractions), and nothing else: what is frozen, the teacher and the optimizer have no part in it. Its state is
in the run's checkpoints; at the end the average is written beside the trained weights, in open_clip's format.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from biomedclip.models.interpolate import carrying
from biomedclip.training.continual.config import EmaConfig, EnsembleConfig


class WeightAverage:
    """A float32 average of the changing tensors of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: tensor.detach().float().clone() for name, tensor in changing_tensors(model).items()}
        self.count = 1

    def move(self, model: nn.Module, share: float) -> None:
        """average ← (1 - share) average + share weights."""
        with torch.no_grad():
            for name, tensor in changing_tensors(model).items():
                self.tensors[name].lerp_(tensor.detach().float(), share)
        self.count += 1

    def carried_by(self, model: nn.Module) -> AbstractContextManager[None]:
        """A block in which the model carries the average."""
        return carrying(model, self.tensors)


def changing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and buffers with fractions (batch norm's), by their name in the model's state."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    stored = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored and buffer.is_floating_point()}
    return {**trained, **buffers}


def ema_decay(step: int, settings: EmaConfig) -> float:
    """Decay of step `step` (from 1): min(decay, (1 + t) / (10 + t)) while warming up, as TensorFlow's EMA does."""
    return min(settings.decay, (1 + step) / (10 + step)) if settings.warmup else settings.decay


class AverageWeights(Callback):
    """Keeps an average while the run goes and writes it at the end as `<name>/` in the run folder.

    `ema`: share 1 - decay of every step. `ensemble`: the plain mean of the start and of every `every_steps`-th step
    (ZSCL, Zheng et al. 2023, arXiv 2303.06628, section 3.3, equation 6).
    """

    def __init__(self, settings: EmaConfig | EnsembleConfig, folder: Path, export: Callable[[Path], object]) -> None:
        self.settings, self.folder, self.export = settings, folder, export
        self.name = "ema" if isinstance(settings, EmaConfig) else "ensemble"
        self.average: WeightAverage | None = None
        self._loaded: dict[str, Any] | None = None
        self._step = 0

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint."""
        return f"AverageWeights[{self.name}]"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins with the weights as they are, or goes on with a checkpoint's average."""
        self.average = WeightAverage(_model(pl_module))
        self._step = trainer.global_step
        if self._loaded is not None:
            for name, tensor in self.average.tensors.items():
                tensor.copy_(self._loaded["tensors"][name])
            self.average.count = self._loaded["count"]
            self._loaded = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes the step's weights in."""
        step = trainer.global_step
        if step == self._step or self.average is None:
            return
        self._step = step
        if isinstance(self.settings, EmaConfig):
            self.average.move(_model(pl_module), 1 - ema_decay(step, self.settings))
        elif step % self.settings.every_steps == 0:
            self.average.move(_model(pl_module), 1 / (self.average.count + 1))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the average where the run is at its end."""
        if self.average is not None and trainer.is_global_zero and trainer.global_step >= trainer.max_steps:
            with self.average.carried_by(_model(pl_module)):
                self.export(self.folder / self.name)

    def state_dict(self) -> dict[str, Any]:
        """The average, for a checkpoint."""
        if self.average is None:
            return {}
        return {"tensors": {name: t.cpu() for name, t in self.average.tensors.items()}, "count": self.average.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a checkpoint's average until training starts."""
        self._loaded = state_dict or None


def _model(module: LightningModule) -> nn.Module:
    model: Any = module.model
    compiled: nn.Module = getattr(model, "_orig_mod", model)
    return compiled
