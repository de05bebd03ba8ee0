"""Saving a run while it trains: when, where, and what is kept.

A checkpoint is a folder `checkpoints/step-NNNNNNNN` holding `trainer.ckpt` (everything needed to continue) and the
model in open_clip's format (everything needed to use it). It is filled under a temporary name and renamed, so a kill
at any moment leaves complete checkpoints only. In several processes all decide alike and take part, one writes;
nothing in a checkpoint depends on how many they were.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from biomedclip.errors import CheckpointError, ConfigError
from biomedclip.files import TEMPORARY_PREFIX, sync_folder, write_json
from biomedclip.runs import Run
from biomedclip.training.config import CheckpointConfig

TRAINER_FILE = "trainer.ckpt"
BEST_FILE = "best.json"


class SaveCheckpoints(Callback):
    """Saves every N steps and minutes, at SIGTERM, at a best validation and at the last step.

    The newest `keep_last` stay, and the best. SIGTERM ends the run after the step under way, saved.
    """

    def __init__(self, run: Run, settings: CheckpointConfig, export: Callable[[Path], object]) -> None:
        self.run, self.settings, self.export = run, settings, export
        self.stopped = False
        """Whether SIGTERM ended the run."""
        self._saved_at = time.monotonic()
        self._saved_step = -1
        self._term = False
        self._before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over SIGTERM: Lightning's own handler broadcasts from within, which several processes never survive."""
        self._saved_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note_term)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives SIGTERM back."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives SIGTERM back."""
        self.on_train_end(trainer, pl_module)

    def _note_term(self, number: int, frame: Any) -> None:
        self._term = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves where it is time."""
        steps, minutes = self.settings.every_steps, self.settings.every_minutes
        by_steps = bool(steps) and trainer.global_step % steps == 0
        by_time = bool(minutes) and time.monotonic() - self._saved_at >= 60 * minutes
        term, by_time = _any_process(trainer, pl_module.device, self._term, by_time)
        last = trainer.global_step == trainer.max_steps
        if by_steps or by_time or last or term:
            self.save(trainer)
        if term and not last:
            self.stopped = trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the best checkpoint by the validation's number that the config names."""
        wanted = self.settings.best
        if not wanted:
            return
        latest: Any = pl_module.latest
        name = wanted.removeprefix("-")
        if name not in latest:
            known = ", ".join(sorted(key for key in latest if key.startswith("val_")))
            raise ConfigError("checkpoints.best", f"no validation measures '{name}'", todo=f"name one of: {known}")
        value = float(latest[name])
        before = self._best()
        better = before is None or (value < before["value"] if wanted.startswith("-") else value > before["value"])
        if not better:
            return
        self.save(trainer)
        if trainer.is_global_zero:
            facts = {"checkpoint": _folder_name(trainer.global_step), "metric": name, "value": value}
            write_json(self.run.folder / "checkpoints" / BEST_FILE, facts)
            self._thin_out()
        trainer.strategy.barrier()

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint of the current step. Raises CheckpointError where the disk is full or not writable."""
        if self._saved_step == trainer.global_step:
            return
        folder = self.run.folder / "checkpoints" / _folder_name(trainer.global_step)
        temporary = folder.parent / f"{TEMPORARY_PREFIX}{folder.name}"
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(temporary / TRAINER_FILE, weights_only=False)
            self.export(temporary)
            if trainer.is_global_zero:
                _sync_file(temporary / TRAINER_FILE)
                sync_folder(temporary)
                _remove_folder(folder)
                temporary.rename(folder)
                sync_folder(folder.parent)
                self._thin_out()
        except OSError as error:
            raise CheckpointError(
                folder, "cannot be written", found=error.strerror or str(error),
                todo=f"free disk space, then resume; {_last_good(self.run.folder)}",
            ) from error  # fmt: skip
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        self.run.log(f"saved {folder.name}")

    def _best(self) -> dict[str, Any] | None:
        path = self.run.folder / "checkpoints" / BEST_FILE
        return dict(json.loads(path.read_bytes())) if path.exists() else None

    def _thin_out(self) -> None:
        best = (self._best() or {}).get("checkpoint")
        for old in list_checkpoints(self.run.folder)[: -self.settings.keep_last]:
            if old.name != best:
                _remove_folder(old)


def list_checkpoints(run_folder: str | Path) -> list[Path]:
    """Complete checkpoint folders of a run, oldest first."""
    found = (Path(run_folder) / "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name) and _is_complete(path))


def remove_unfinished(run_folder: str | Path) -> None:
    """Delete what an interrupted save or clean-up left behind."""
    for path in (Path(run_folder) / "checkpoints").glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def forget_later_best(run_folder: str | Path) -> None:
    """Delete the note of a best checkpoint that is not there: it was measured after the step the run resumes from."""
    path = Path(run_folder) / "checkpoints" / BEST_FILE
    if path.exists() and not _is_complete(path.parent / json.loads(path.read_bytes())["checkpoint"]):
        path.unlink()


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _last_good(run_folder: Path) -> str:
    saved = list_checkpoints(run_folder)
    return f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"


def _any_process(trainer: Trainer, device: torch.device, *wishes: bool) -> tuple[bool, ...]:
    """For each wish whether any process has it: clocks and signals differ between processes, decisions must not."""
    if trainer.world_size == 1:
        return wishes
    flags = torch.tensor(wishes, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return tuple(bool(flag) for flag in flags.tolist())


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
