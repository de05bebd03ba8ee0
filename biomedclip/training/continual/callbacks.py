"""What happens around a step against forgetting: averages, the guard against spikes, and the probes that watch.

Reads the run's config; yields Lightning callbacks in the order in which they must act: averages take a step's weights
in before the probes ask them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from biomedclip.runs import Run
from biomedclip.training.config import TrainConfig
from biomedclip.training.ema import AverageWeights
from biomedclip.training.spikes import GuardSpikes
from biomedclip.training.validation import AskProbes, open_probes


def continual_callbacks(
    config: TrainConfig,
    run: Run,
    tokenise: Callable[[Sequence[str]], Tensor],
    export: Callable[[Path], object],
    *,
    after_step: int,
) -> list[Callback]:
    """The callbacks that the config asks for; none for a run without. Raises what `open_probes` raises."""
    settings = config.continual
    sections = (settings.ema, settings.ensemble) if settings else ()
    averages = [AverageWeights(section, run.folder, export) for section in sections if section]
    callbacks: list[Callback] = [*averages]
    if settings and settings.freeze_batch_norm:
        callbacks.append(FreezeBatchNorm())
    if config.guard:
        callbacks.append(GuardSpikes(run, config.guard))
    validation = config.validation
    if validation.probes:
        callbacks.append(
            AskProbes(
                run, open_probes(validation.probes), tokenise, every_steps=validation.every_steps,
                alphas=validation.wise_alphas, averages=averages, after_step=after_step,
            )
        )  # fmt: skip
    return callbacks


class FreezeBatchNorm(Callback):
    """Keeps batch norm in evaluation mode while everything else trains: its statistics stay those of the start."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before each step, because whatever validates puts the whole model back into training mode."""
        for module in pl_module.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
