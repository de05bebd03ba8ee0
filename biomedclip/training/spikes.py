"""A guard against loss spikes: a step whose loss stands far above the last ones does not reach the weights.

Reads the loss of each step before the optimizer acts; yields a skipped step, or with `rewind` the weights and the
optimizer of the last good snapshot. The data goes on either way, so the batch that made the spike is left behind. Every
event is counted and written to the run's log; too many in a row end the run with the remedy.
"""

from __future__ import annotations

import copy
from collections import deque
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from biomedclip.errors import ConfigError
from biomedclip.runs import Run
from biomedclip.training.continual.config import GuardConfig


class GuardSpikes(Callback):
    """Skips or rewinds steps whose loss is above `factor` times the median of the last `window` losses."""

    def __init__(self, run: Run, settings: GuardConfig) -> None:
        self.run, self.settings = run, settings
        self.losses: deque[float] = deque(maxlen=settings.window)
        self.skipped = 0
        """Spikes met so far."""
        self._in_a_row = 0
        self._snapshot: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._good = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Takes the gradients away where the loss is a spike: an optimizer passes over parameters without one."""
        loss = self._loss(trainer, pl_module)
        if not self.is_spike(loss):
            self.losses.append(loss)
            self._in_a_row = 0
            self._keep(pl_module, optimizer)
            return
        self.skipped += 1
        self._in_a_row += 1
        self.run.log(f"step {trainer.global_step}: loss {loss:.4g} is a spike, {self.settings.action} ({self.skipped})")
        if self._in_a_row > self.settings.max_in_a_row:
            raise ConfigError(
                f"{self.run.folder}: step {trainer.global_step}", f"{self._in_a_row} losses in a row are spikes",
                found=f"{loss:.4g}, usually {median(self.losses):.4g}",
                todo="lower optim.lr or raise guard.factor, and resume from the last checkpoint",
            )  # fmt: skip
        if self.settings.action == "rewind" and self._snapshot is not None:
            pl_module.load_state_dict(self._snapshot[0])
            # A copy: the optimizer takes the tensors it is given for its own and goes on changing them.
            optimizer.load_state_dict(copy.deepcopy(self._snapshot[1]))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def is_spike(self, loss: float) -> bool:
        """Whether a loss stands out; never before half a window of losses is known."""
        if len(self.losses) < self.settings.window / 2:
            return False
        return not loss <= self.settings.factor * median(self.losses)

    def _loss(self, trainer: Trainer, pl_module: LightningModule) -> float:
        latest: Any = pl_module.latest
        loss = torch.as_tensor(latest["loss"], device=pl_module.device).float()
        # All processes must decide alike, or their weights part ways.
        return float(trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean"))

    def _keep(self, pl_module: LightningModule, optimizer: Any) -> None:
        if self.settings.action != "rewind":
            return
        if self._good % self.settings.snapshot_every_steps == 0:
            # Taken before the step, so that it holds nothing of a batch that may turn out to be bad.
            self._snapshot = (copy.deepcopy(pl_module.state_dict()), copy.deepcopy(optimizer.state_dict()))
        self._good += 1

    def state_dict(self) -> dict[str, Any]:
        """Losses and counts, for a checkpoint."""
        return {"losses": list(self.losses), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with a checkpoint's losses and counts."""
        self.losses.extend(state_dict["losses"])
        self.skipped = state_dict["skipped"]
