"""What is measured around a training step: rows of metrics.csv, progress, and a stop at the first NaN."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from biomedclip.errors import ConfigError
from biomedclip.progress import Advance
from biomedclip.runs import MetricsFile, Run
from biomedclip.training.checkpoints import list_checkpoints
from biomedclip.training.config import TrainConfig
from biomedclip.training.module import ContrastiveModule
from biomedclip.training.throughput import peak_flops

_FIRST = ("step", "loss", "lr", "samples_s", "logit_scale", "grad_norm", "data_wait", "mfu", "seconds")
_LAST = ("val_loss", "val_image_to_text/recall@1", "val_text_to_image/recall@1")


def columns(config: TrainConfig, terms: Sequence[str] = ()) -> tuple[str, ...]:
    """Columns of a run's metrics.csv.

    `loss` is the mean since the last row, `loss/NAME` that of a term (not weighted), `source/NAME` the objective's mean
    over the samples of a source; `samples_s` is over all processes, `data_wait` the share of the time spent waiting for
    batches, `mfu` the share of the device's peak (empty where that is unknown), `seconds` the time since this process
    began training.
    """
    sources = config.data.sources if len(config.data.sources) > 1 else ()
    return (*_FIRST, *(f"loss/{name}" for name in terms), *(f"source/{source.name}" for source in sources), *_LAST)


class LogSteps(Callback):
    """Writes a row to metrics.csv (and the loggers) every `log_every_steps` steps and moves the progress bar on."""

    def __init__(
        self, run: Run, config: TrainConfig, advance: Advance, *, after_step: int, flops: float = 0.0,
        terms: Sequence[str] = (), writes: bool = True,
    ) -> None:  # fmt: skip
        self.columns = columns(config, terms)
        self.file = MetricsFile(run.folder, self.columns, after_step=after_step) if writes else None
        self.config, self.advance, self.flops = config, advance, flops
        self.last_row: dict[str, Any] = {}
        self._parts = [f"loss/{name}" for name in terms]
        self._sources = {source.name: number for number, source in enumerate(config.data.sources)}
        self._sums: torch.Tensor | None = None
        self._steps = 0
        self._began = self._row_began = self._waited = self._batch_ended = self._rate = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tells the loggers what is run, before Lightning has them write that nothing was told."""
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config.model_dump(mode="json"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clocks."""
        self._began = self._row_began = self._batch_ended = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes how long the step waited for its batch, and its learning rate."""
        self._waited += time.monotonic() - self._batch_ended
        self._rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collects the losses; writes a row at the logging interval and at the last step."""
        module = _contrastive(pl_module)
        self._collect(module.latest)
        self._batch_ended = time.monotonic()
        step = trainer.global_step
        note = ""
        if step % self.config.log_every_steps == 0 or step == self.config.max_steps:
            row = self._row(step, trainer, module)
            self._write(trainer, row)
            self.last_row = row
            note = f"loss {row['loss']:.3f}  {row['samples_s']:.0f} samples/s"
        self.advance(1, note)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the validation's numbers as a row of their own."""
        numbers = {k: float(v) for k, v in _contrastive(pl_module).latest.items() if k.startswith("val_")}
        if numbers:
            seconds = round(time.monotonic() - self._began, 1)
            self._write(trainer, {"step": trainer.global_step, "seconds": seconds, **numbers})

    def _write(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.add(row)
        numbers = {name: value for name, value in row.items() if name != "step" and value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=row["step"])

    def _collect(self, latest: dict[str, Any]) -> None:
        """Adds up, without waiting for the device: loss, terms, then sum and count of each source's samples."""
        losses = [torch.as_tensor(latest[name]).double().reshape(()) for name in ("loss", *self._parts)]
        samples = latest["sample_losses"].double()
        places = torch.tensor([self._sources[name] for name in latest["sources"]], device=samples.device)
        by_source = samples.new_zeros(2, len(self._sources))
        if len(places) == len(samples):
            by_source[0].index_add_(0, places, samples)
            by_source[1].index_add_(0, places, torch.ones_like(samples))
        sums = torch.cat([torch.stack([loss.to(samples.device) for loss in losses]), by_source.flatten()])
        self._sums = sums if self._sums is None else self._sums + sums
        self._steps += 1

    def _row(self, step: int, trainer: Trainer, module: ContrastiveModule) -> dict[str, Any]:
        spent = max(self._batch_ended - self._row_began, 1e-9)
        sums = self._sums if self._sums is not None else torch.zeros(0)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        totals, parts = sums.tolist(), 1 + len(self._parts)
        steps, sources = self._steps * trainer.world_size, len(self._sources)
        rate = self._steps * self.config.batch_size / spent
        peak = peak_flops(module.device, self.config.precision)
        row: dict[str, Any] = {
            "step": step,
            "loss": totals[0] / steps,
            "lr": self._rate,
            "samples_s": rate,
            "logit_scale": float(module.latest["logit_scale"]),
            "grad_norm": float(module.latest["grad_norm"]),
            "data_wait": self._waited / spent,
            "mfu": rate * self.flops / (peak * trainer.world_size) if peak and self.flops else None,
            "seconds": round(self._batch_ended - self._began, 1),
        }
        row |= {name: total / steps for name, total in zip(self._parts, totals[1:parts], strict=True)}
        for name, place in self._sources.items():
            count = totals[parts + sources + place]
            if sources > 1 and count:
                row[f"source/{name}"] = totals[parts + place] / count
        self._sums, self._steps = None, 0
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


def _contrastive(module: LightningModule) -> ContrastiveModule:
    if not isinstance(module, ContrastiveModule):
        raise TypeError(f"these callbacks serve ContrastiveModule, not {type(module).__name__}")
    return module
