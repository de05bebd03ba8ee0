"""Questions asked of the model while it trains: what it gains, what it keeps, and what lies between start and now.

Reads the probes of a config (tasks of the evaluator on a budget of images, always the same ones) and writes one line a
validation to `validation.jsonl` in the run folder: every probe's value, the share of the value at step 0 that is left
where something must be kept, the values of the moving averages, and the WiSE-FT curve between the starting weights and
the present ones. Step 0 is asked too, because every one of these numbers is a comparison with it. Nothing is chosen by
these numbers here; whoever chooses by them must score on another split.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from biomedclip.errors import ConfigError
from biomedclip.evaluation.embed import embed_images
from biomedclip.evaluation.prompts import compile_prompts
from biomedclip.evaluation.scores import Scores, statistics_of
from biomedclip.evaluation.scoring import Encoder, score_options_of, score_retrieval, score_zero_shot
from biomedclip.evaluation.splits import read_split
from biomedclip.evaluation.tasks import Task, find_task
from biomedclip.files import write_text
from biomedclip.models.interpolate import carrying, interpolate
from biomedclip.runs import Run
from biomedclip.schema import LabelledImage, Manifest
from biomedclip.training.continual.config import ProbeConfig
from biomedclip.training.ema import AverageWeights
from biomedclip.training.exports import read_weights
from biomedclip.training.forgetting import VALIDATION_FILE, read_validation, retention
from biomedclip.training.gather import rank, world_size

_SCORES: dict[str, Callable[..., Scores]] = {
    "zero_shot": score_zero_shot, "options": score_options_of, "retrieval": score_retrieval,
}  # fmt: skip
PICTURE_BYTES = 1_000_000_000
"""Preprocessed pictures of all probes kept in memory between validations; beyond it they are read again."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A task with the images of its budget."""

    name: str
    role: str
    task: Task
    manifest: Manifest
    prompts: Mapping[str, list[str]]
    pictures: dict[str, Tensor] = field(default_factory=dict)
    """Preprocessed pictures by sample id, filled at the first validation."""

    @property
    def metric(self) -> str:
        """The task's headline metric."""
        return self.task.metrics.primary

    def scores(self, encoder: Encoder) -> Scores:
        """What the model says about the probe's images."""
        images = embed_images(
            encoder.model, _unchanged, self.manifest, read=self._reader(encoder.preprocess),
            device=encoder.device,
        )  # fmt: skip
        readable = set(images.sample_ids)
        rows = [row for row in self.manifest.rows if row.sample_id in readable]
        return _SCORES[self.task.kind](self, rows, images.vectors, encoder)

    def value(self, encoder: Encoder) -> float:
        """The task's headline metric."""
        return float(statistics_of(self.scores(encoder), (self.metric,))[self.metric](None))

    def _reader(self, preprocess: Callable[[Any], Tensor]) -> Any:
        from biomedclip.layouts import read_rgb

        def read(manifest: Manifest, row: LabelledImage) -> Any:
            known = self.pictures.get(row.sample_id)
            if known is not None:
                return known
            picture = preprocess(read_rgb(manifest, row))
            if (len(self.pictures) + 1) * picture.nbytes <= PICTURE_BYTES:
                self.pictures[row.sample_id] = picture
            return picture

        return read


def open_probes(settings: Sequence[ProbeConfig]) -> list[Probe]:
    """The probes of a config, their data checked before anything is trained.

    Raises ConfigError for an unknown task, missing data or two probes of one name, DataError for data that is not what
    the task expects.
    """
    probes: list[Probe] = []
    for one in settings:
        task = find_task(one.task)
        root = Path(one.data)
        if not root.exists():
            raise ConfigError(f"validation.probes: {one.task}", "there is no such file or folder", found=one.data)
        name = one.task
        if one.split is not None:
            # A layout that was told to read the task's own split alone must read this one.
            layout = task.layout | ({"splits": [one.split]} if "splits" in task.layout else {})
            task = task.model_copy(update={"split": one.split, "select_split": None, "layout": layout})
            name = f"{one.task}/{one.split}"
        if any(probe.name == name for probe in probes):
            raise ConfigError(f"validation.probes: {name}", "is named twice", todo="remove one")
        manifest = choose_rows(read_split(task, root), one.max_samples)
        prompts = compile_prompts(task) if task.kind == "zero_shot" else {}
        probes.append(Probe(name=name, role=one.role, task=task, manifest=manifest, prompts=prompts))
    return probes


def choose_rows(manifest: Manifest, count: int) -> Manifest:
    """At most `count` rows: the same share of every class, at least one, by a hash of the sample's id."""
    from dataclasses import replace

    if len(manifest.rows) <= count:
        return manifest
    classes: dict[tuple[str, ...], list[LabelledImage]] = {}
    for row in sorted(manifest.rows, key=lambda row: hashlib.sha256(row.sample_id.encode()).digest()):
        classes.setdefault(tuple(row.labels), []).append(row)
    share = count / len(manifest.rows)
    kept = {row.sample_id for rows in classes.values() for row in rows[: max(1, math.floor(share * len(rows)))]}
    return replace(manifest, rows=tuple(row for row in manifest.rows if row.sample_id in kept))


class AskProbes(Callback):
    """Asks the probes at step 0, every `every_steps` steps and at the last step."""

    def __init__(
        self,
        run: Run,
        probes: Sequence[Probe],
        tokenise: Callable[[Sequence[str]], Tensor],
        *,
        every_steps: int,
        alphas: Sequence[float] = (),
        averages: Sequence[AverageWeights] = (),
        after_step: int = 0,
    ) -> None:
        self.run, self.probes, self.tokenise = run, tuple(probes), tokenise
        self.every_steps, self.alphas, self.averages = every_steps, tuple(alphas), tuple(averages)
        # A resumed run writes again what it is going to measure again.
        self.rows = [row for row in read_validation(run.folder) if row["step"] <= after_step]
        self._start: dict[str, Tensor] | None = None
        self._asked = self.rows[-1]["step"] if self.rows else -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks before the first step."""
        if trainer.global_step == 0:
            self._ask(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks where it is time."""
        step = trainer.global_step
        due = self.every_steps and step % self.every_steps == 0
        if due or step == trainer.max_steps:
            self._ask(trainer, pl_module)

    def _ask(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if not self.probes or step == self._asked:
            return
        self._asked = step
        began = time.monotonic()
        wrapped: Any = pl_module.model
        model: nn.Module = getattr(wrapped, "_orig_mod", wrapped)
        row: dict[str, Any] = {
            "step": step,
            "values": self._values(model, pl_module.device),
            "roles": {probe.name: probe.role for probe in self.probes},
            "metrics": {probe.name: probe.metric for probe in self.probes},
            "n": {probe.name: len(probe.manifest.rows) for probe in self.probes},
        }
        row |= self._kept(row["values"])
        for average in self.averages:
            if average.average is not None and step:
                with average.average.carried_by(model):
                    row[average.name] = self._values(model, pl_module.device)
        if self.alphas and step:
            row["wise"] = [
                {"alpha": alpha, "values": self._between(model, alpha, pl_module.device)} for alpha in self.alphas
            ]
        row["seconds"] = round(time.monotonic() - began, 2)
        self.rows.append(row)
        if rank() == 0:
            lines = (json.dumps(_finite(line), allow_nan=False) + "\n" for line in self.rows)
            write_text(self.run.folder / VALIDATION_FILE, "".join(lines))

    def _values(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Every probe's value; in several processes each asks some of them."""
        encoder = Encoder("", model, _transform(model), self.tokenise, str(device))
        mine = {
            probe.name: probe.value(encoder)
            for number, probe in enumerate(self.probes)
            if number % world_size() == rank()
        }
        if world_size() == 1:
            return mine
        parts: list[Any] = [None] * world_size()
        torch.distributed.all_gather_object(parts, mine)
        merged = {name: value for part in parts for name, value in part.items()}
        return {probe.name: merged[probe.name] for probe in self.probes}

    def _kept(self, values: Mapping[str, float]) -> dict[str, Any]:
        """What is left of the starting values where something must be kept."""
        start = self.rows[0]["values"] if self.rows else values
        names = [probe.name for probe in self.probes if probe.role == "retention"]
        if not names:
            return {}
        shares = retention({name: values[name] for name in names}, start)
        return {
            "retention": shares,
            "mean_retention": sum(shares.values()) / len(shares),
            # Phase i ended where this run began: R[i, i] is the value at step 0.
            "backward_transfer": sum(values[name] - start[name] for name in names) / len(names),
        }

    def _between(self, model: nn.Module, alpha: float, device: torch.device) -> dict[str, float]:
        with self._interpolated(model, alpha):
            return self._values(model, device)

    def _interpolated(self, model: nn.Module, alpha: float) -> AbstractContextManager[None]:
        if self._start is None:
            self._start = read_weights(self.run.folder / "start")
        now = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        start = {name: self._start[name].to(tensor.device) for name, tensor in now.items()}
        return carrying(model, interpolate(start, now, alpha))


def _unchanged(picture: Any) -> Any:
    """The picture, which the reader has preprocessed."""
    return picture


def _transform(model: nn.Module) -> Callable[[Any], Tensor]:
    """The model's exact preprocessing."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    visual: Any = model.visual
    transform: Callable[[Any], Tensor] = image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=False)
    return transform


def _finite(value: Any) -> Any:
    """NaN as null, which is what JSON has for a value that is not defined."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
