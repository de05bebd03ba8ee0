"""What happens around a training step: numbers to metrics.csv, progress, checkpoints, and a stop at the first NaN.

A checkpoint is a folder `checkpoints/step-NNNNNNNN` holding `trainer.ckpt` (everything needed to continue) and the
model in open_clip's format (everything needed to use it). It is filled under a temporary name and renamed, so a kill
at any moment leaves complete checkpoints only.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from biomedclip.errors import CheckpointError, ConfigError
from biomedclip.files import TEMPORARY_PREFIX, sync_folder
from biomedclip.progress import Advance
from biomedclip.runs import MetricsFile, Run
from biomedclip.training.config import CheckpointConfig, TrainConfig
from biomedclip.training.module import ContrastiveModule

COLUMNS = (
    "step", "loss", "lr", "samples_s", "logit_scale", "grad_norm", "data_wait", "seconds",
    "val_loss", "val_image_to_text/recall@1", "val_text_to_image/recall@1",
)  # fmt: skip
"""Columns of a training run's metrics.csv. `loss` is the mean since the last row, `data_wait` the share of the time
spent waiting for batches, `seconds` the time since this process began training."""

TRAINER_FILE = "trainer.ckpt"


class LogSteps(Callback):
    """Writes a row to metrics.csv every `every_steps` steps and moves the progress bar on."""

    def __init__(self, run: Run, config: TrainConfig, advance: Advance, *, after_step: int) -> None:
        self.file = MetricsFile(run.folder, COLUMNS, after_step=after_step)
        self.config, self.advance = config, advance
        self.last_row: dict[str, Any] = {}
        self._losses: list[torch.Tensor] = []
        self._began = self._row_began = self._waited = self._batch_ended = self._rate = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clocks."""
        self._began = self._row_began = self._batch_ended = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes how long the step waited for its batch, and its learning rate."""
        self._waited += time.monotonic() - self._batch_ended
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collects the loss; writes a row at the logging interval and at the last step."""
        module = _contrastive(pl_module)
        loss = module.latest["loss"]
        self._losses.append(torch.as_tensor(loss))
        self._batch_ended = time.monotonic()
        step = trainer.global_step
        note = ""
        if step % self.config.log_every_steps == 0 or step == self.config.max_steps:
            row = self._row(step, module)
            self.file.add(row)
            self.last_row = row
            note = f"loss {row['loss']:.3f}  {row['samples_s']:.0f} samples/s"
        self.advance(1, note)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the validation's numbers as a row of their own."""
        numbers = {k: float(v) for k, v in _contrastive(pl_module).latest.items() if k.startswith("val_")}
        self.file.add({"step": trainer.global_step, "seconds": round(time.monotonic() - self._began, 1), **numbers})

    def _row(self, step: int, module: ContrastiveModule) -> dict[str, Any]:
        spent = max(self._batch_ended - self._row_began, 1e-9)
        row = {
            "step": step,
            "loss": float(torch.stack(self._losses).mean()),
            "lr": self._rate,
            "samples_s": len(self._losses) * self.config.batch_size / spent,
            "logit_scale": float(module.latest["logit_scale"]),
            "grad_norm": float(module.latest["grad_norm"]),
            "data_wait": self._waited / spent,
            "seconds": round(self._batch_ended - self._began, 1),
        }
        self._losses.clear()
        self._waited, self._row_began = 0.0, self._batch_ended
        return row


class StopAtNaN(Callback):
    """Ends the run before a loss that is not finite reaches the weights."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Raises ConfigError where the loss is NaN or infinite."""
        if torch.isfinite(loss):
            return
        saved = list_checkpoints(self.run.folder)
        good = f"; the last good checkpoint is {saved[-1]}" if saved else ""
        raise ConfigError(
            f"{self.run.folder}: step {trainer.global_step}", f"the loss is {loss.item()}",
            found=f"lr {trainer.optimizers[0].param_groups[0]['lr']:.3g}",
            todo=f"lower optim.lr, raise schedule.warmup_steps or set optim.clip_norm{good}",
        )  # fmt: skip


class SaveCheckpoints(Callback):
    """Saves every N steps and minutes, at SIGTERM and at the last step; keeps the newest `keep_last`."""

    def __init__(self, run: Run, settings: CheckpointConfig, export: Callable[[Path], object]) -> None:
        self.run, self.settings, self.export = run, settings, export
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves where it is time."""
        steps, minutes = self.settings.every_steps, self.settings.every_minutes
        by_steps = bool(steps) and trainer.global_step % steps == 0
        by_time = bool(minutes) and time.monotonic() - self._saved_at >= 60 * minutes
        last = trainer.global_step == trainer.max_steps
        if by_steps or by_time or last or trainer.received_sigterm:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint of the current step. Raises CheckpointError where the disk is full or not writable."""
        folder = self.run.folder / "checkpoints" / f"step-{trainer.global_step:08d}"
        temporary = folder.parent / f"{TEMPORARY_PREFIX}{folder.name}"
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(temporary / TRAINER_FILE)
            self.export(temporary)
            _sync_file(temporary / TRAINER_FILE)
            sync_folder(temporary)
            _remove_folder(folder)
            temporary.rename(folder)
            sync_folder(folder.parent)
            for old in list_checkpoints(self.run.folder)[: -self.settings.keep_last]:
                _remove_folder(old)
        except OSError as error:
            raise CheckpointError(
                folder, "cannot be written", found=error.strerror or str(error),
                todo="free disk space, then resume; earlier checkpoints are intact",
            ) from error  # fmt: skip
        self._saved_at = time.monotonic()
        self.run.log(f"saved {folder.name}")


def list_checkpoints(run_folder: str | Path) -> list[Path]:
    """Complete checkpoint folders of a run, oldest first."""
    found = (Path(run_folder) / "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name) and _is_complete(path))


def remove_unfinished(run_folder: str | Path) -> None:
    """Delete what an interrupted save or clean-up left behind."""
    for path in (Path(run_folder) / "checkpoints").glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path)


def _is_complete(folder: Path) -> bool:
    return (folder / TRAINER_FILE).is_file()


def _remove_folder(folder: Path) -> None:
    """Delete a folder; a kill in between leaves it under a temporary name."""
    if folder.exists():
        doomed = folder.parent / f"{TEMPORARY_PREFIX}old-{folder.name}"
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _contrastive(module: LightningModule) -> ContrastiveModule:
    if not isinstance(module, ContrastiveModule):
        raise TypeError(f"these callbacks serve ContrastiveModule, not {type(module).__name__}")
    return module
