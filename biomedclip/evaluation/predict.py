"""Embedding by several processes: Lightning's predict loop deals the rows out, each process writes its own parts.

Reads the rows that are left of a job; yields parts in its folder (embedding_parts.py), which the caller joins. Nothing
is gathered over the network, so a process that dies loses its last part only. Lightning's sampler for predictions does
not repeat samples to even out the processes, as torch's does; and as every part carries its row numbers, a sample that
came twice would be seen and not counted.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, Subset

from biomedclip.evaluation.embed import Precision, Rows, embed_batch
from biomedclip.evaluation.embedding_parts import PART_ROWS, Part, join_parts, write_part


def predict_rows(
    model: torch.nn.Module, rows: Rows, left: Sequence[int], folder: Path, *, batch_size: int, workers: int,
    device: str, precision: Precision, processes: int,
) -> None:  # fmt: skip
    """Embed the rows `left` by `processes` processes on this machine, into parts in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    mine: Subset[Any] = Subset(rows, list(left))  # type: ignore[arg-type]
    loader: DataLoader[Any] = DataLoader(mine, batch_size=batch_size, num_workers=workers, collate_fn=_Held)
    with _quiet():
        trainer = lightning.Trainer(
            accelerator="gpu" if device.startswith("cuda") else "cpu", devices=min(processes, len(left)),
            strategy="ddp_spawn", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[_PartWriter(folder)],
        )  # fmt: skip
        trainer.predict(_Embedder(model, precision), loader, return_predictions=False)


class _Held:
    """A batch that Lightning does not look into: pictures that could not be read are no tensors."""

    def __init__(self, samples: list[tuple[int, Any]]) -> None:
        self.samples = samples


class _Embedder(lightning.LightningModule):
    def __init__(self, model: torch.nn.Module, precision: Precision) -> None:
        super().__init__()
        self.model, self.embedding_precision = model, precision

    def predict_step(self, batch: _Held, batch_idx: int) -> Part:
        del batch_idx
        return embed_batch(self.model, batch.samples, str(self.device), self.embedding_precision)


class _PartWriter(lightning.Callback):
    """Writes what a process has embedded, every `PART_ROWS` rows and at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.waiting: list[Part] = []

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        del trainer, pl_module
        self.waiting.append(outputs)
        if sum(len(part.rows) for part in self.waiting) >= PART_ROWS:
            self._write()

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        del trainer, pl_module
        if self.waiting:
            self._write()

    def _write(self) -> None:
        write_part(self.folder, join_parts(self.waiting))
        self.waiting = []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's advice is about training runs."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
