"""A train config to a run folder: starting weights, training, trained weights.

Reads the dataset folders and the model that the config names; writes what `biomedclip.runs` describes, and

    start/        the model before the first step, in open_clip's format
    checkpoints/  step-NNNNNNNN/: trainer.ckpt and the model in open_clip's format; best.json names the best one
    final/        the trained model, in open_clip's format

The starting weights are stored because every number of a continual run is a comparison with them, and a random start
is gone otherwise. A run that was interrupted continues from its last checkpoint with the sample that was next, on as
many devices as there are then. Of several processes each builds the same model and plan; the first one writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.config import load_config
from biomedclip.errors import CheckpointError, ConfigError, MissingExtra
from biomedclip.files import write_text
from biomedclip.progress import Progress, silent
from biomedclip.runs import CONFIG, DONE, Run, dump_config, is_done, open_run, read_facts, read_metrics
from biomedclip.schema import LEDGER_COLUMNS
from biomedclip.shards import write_table
from biomedclip.training.config import TrainConfig
from biomedclip.training.plans import DATA_KEYS

if TYPE_CHECKING:
    from torch import nn

    from biomedclip.training.callbacks import LogSteps
    from biomedclip.training.exports import ModelForm

_MAY_CHANGE: dict[str, Any] = {
    **dict.fromkeys(
        (
            "device",
            "devices",
            "num_nodes",
            "strategy",
            "threads",
            "micro_batch_size",
            "log_every_steps",
            "loggers",
            "checkpoints",
            "validation",
        ),
        True,
    ),
    "towers": {"gradient_checkpointing", "compile", "text_buckets"},
    "data": {"fetch"},
}
"""Parts of a config that a resumed run may change: they do not touch what is learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a training run left behind."""

    folder: Path
    start: Path
    """Starting weights, in open_clip's format."""
    final: Path
    """Trained weights, in open_clip's format."""
    steps: int
    loss: float
    """Mean loss over the last logged steps."""
    samples_s: float
    """Median samples per second over the logged steps."""
    seconds: float
    """Wall clock of the process that finished the run."""


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    allow_plan_change: bool = False,
    progress: Progress = silent,
) -> TrainResult:
    """Train as the config says into the run folder `out`, and return where the weights are.

    With `resume`, an interrupted run continues from its last checkpoint (from the start where it has none) and a
    finished one is returned as it is; with `allow_plan_change` also over other data, from a new epoch on. Raises
    ConfigError where `out` holds another run or the loss is not finite, DataError for datasets that cannot be read,
    CheckpointError for weights that cannot be read or written.
    """
    out = Path(out)
    if resume and is_done(out):
        return read_result(out)
    if resume and read_facts(out):
        _check_same_run(out, config, allow_plan_change)
    _check_installed()
    from biomedclip.training.trainer import is_first_process

    if is_first_process():
        run = open_run(out, kind="train", config=config, seed=config.seed, resume=resume)
    else:
        run = _OtherProcess(out, "train", resumed=resume)
    with _threads(config.threads, config.devices):
        log = _fit(config, run, progress if is_first_process() else silent, allow_plan_change)
    if not is_first_process():
        return TrainResult(folder=out, start=out / "start", final=out / "final", steps=config.max_steps,
                           loss=log["loss"], samples_s=log["samples_s"], seconds=run.seconds)  # fmt: skip
    rates = sorted(row["samples_s"] for row in read_metrics(out) if row["samples_s"])
    summary = {
        "steps": config.max_steps,
        "loss": log["loss"],
        "samples_s": round(rates[len(rates) // 2] or 0.0, 1),
        "unreadable_samples": log["unreadable_samples"],
    }
    run.finish(summary)
    return read_result(out)


class _OtherProcess(Run):
    """The run as all processes but the first see it: they write nothing."""

    def log(self, line: str) -> None:
        """Nothing: the first process logs."""


def read_result(folder: str | Path) -> TrainResult:
    """The result of a finished training run, from its folder. Raises ConfigError where it is not finished."""
    import json

    folder = Path(folder)
    if not is_done(folder):
        raise ConfigError(folder, "holds no finished run", todo="resume it or start one")
    done = json.loads((folder / DONE).read_bytes())
    return TrainResult(
        folder=folder, start=folder / "start", final=folder / "final", steps=done["steps"], loss=done["loss"],
        samples_s=done["samples_s"], seconds=done["seconds"],
    )  # fmt: skip


def _fit(config: TrainConfig, run: Run, progress: Progress, allow_plan_change: bool) -> dict[str, Any]:
    """Build model and data, train to the last step, export; returns the last logged row."""
    import torch

    from biomedclip.training.checkpoints import forget_later_best, list_checkpoints, remove_unfinished
    from biomedclip.training.module import ContrastiveModule
    from biomedclip.training.plans import settle_plan
    from biomedclip.training.throughput import sample_flops
    from biomedclip.training.trainer import is_first_process

    first_process = is_first_process()
    if first_process:
        remove_unfinished(run.folder)
        forget_later_best(run.folder)
    saved = list_checkpoints(run.folder)
    torch.manual_seed(config.seed)
    model, form, tokenizer, data = _build(config)
    loader = data.train_loader
    first = int(saved[-1].name.removeprefix("step-")) if saved else 0
    plan, continued = settle_plan(
        run.folder, config, loader.samples.plan, loader.samples.rows, step=first, allow_change=allow_plan_change,
        write=first_process,
    )  # fmt: skip
    loader.follow(plan, continued)
    if first_process and plan.first_step == first > 0:
        write_text(run.folder / CONFIG, dump_config(config))
        run.log(f"another plan from step {first} on: {plan.sha256[:16]}")
    data.run_folder = run.folder
    for notice in loader.notices:
        run.log(notice)
    loader.on_notice = run.log
    if first_process and (left_out := loader.samples.ledger):
        write_table(run.folder / "stream_ledger.parquet", left_out, LEDGER_COLUMNS)
    export = _exporter(config, model, form)
    if first_process and not saved:
        form.write(model, run.folder / "start")
        run.log(f"starts from {config.model.name} ({config.model.init})")
    continual = None
    if config.continual:
        from biomedclip.training.continual.terms import build_continual

        continual = build_continual(config, folder=run.folder, model=model, tokenizer=tokenizer, data=data)
    module = ContrastiveModule(model, config, continual)
    flops = sample_flops(model, data.geometry.size_px)
    with progress("training", config.max_steps) as advance:
        if first:
            run.log(f"continues after step {first}")
            advance(first)
        log = _train_loop(config, run, module, data, export, advance, saved[-1] if saved else None, flops)
    export(run.folder / "final")
    row = log.last_row or read_metrics(run.folder)[-1]
    return {**row, "unreadable_samples": dict(loader.bad)}


def _exporter(config: TrainConfig, model: nn.Module, form: ModelForm) -> Callable[[Path], object]:
    """A function that writes the model to a folder; all processes call it, the first one writes."""
    from biomedclip.training.trainer import is_first_process

    def export(folder: Path) -> None:
        state = None
        if config.strategy == "fsdp":
            from biomedclip.training.sharding import whole_state

            state = whole_state(model)
        if is_first_process():
            form.write(model, folder, state)

    return export


def _train_loop(
    config: TrainConfig, run: Run, module: Any, data: Any, export: Any, advance: Any, checkpoint: Path | None,
    flops: float,
) -> LogSteps:  # fmt: skip
    from biomedclip.training.callbacks import LogSteps, StopAtNaN
    from biomedclip.training.checkpoints import TRAINER_FILE, SaveCheckpoints
    from biomedclip.training.continual.callbacks import continual_callbacks
    from biomedclip.training.failures import explain_failures
    from biomedclip.training.trainer import is_first_process, make_trainer, quiet_lightning

    first = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
    log = LogSteps(
        run, config, advance, after_step=first, flops=flops, terms=module.term_names, writes=is_first_process()
    )
    saver = SaveCheckpoints(run, config.checkpoints, export)
    watching = continual_callbacks(config, run, data.tokenise, export, after_step=first)
    path = checkpoint / TRAINER_FILE if checkpoint else None
    # torch raises for a lost reading process wherever its signal lands, be it while leaving the inner context.
    with explain_failures(config, run.folder), quiet_lightning():
        callbacks = [StopAtNaN(run), log, *watching, saver]
        trainer = make_trainer(config, run.folder, callbacks, validates=bool(data.val_dataloader()))
        trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    if trainer.global_step < config.max_steps:
        why = "SIGTERM stopped the run, saved, after" if saver.stopped else "training ended at"
        raise CheckpointError(
            run.folder, f"{why} step {trainer.global_step} of {config.max_steps}", todo="resume the run"
        )
    return log


def _build(config: TrainConfig) -> tuple[nn.Module, ModelForm, Any, Any]:
    """The model in training mode, what it is written as, its tokenizer, and the data module for them."""
    import math

    import torch

    from biomedclip.models.backbones import fill_image_tower, fill_text_tower
    from biomedclip.models.load import load
    from biomedclip.stream.decode import Geometry
    from biomedclip.stream.text import fast_tokenise
    from biomedclip.training.data import StreamData
    from biomedclip.training.exports import ModelForm, find_form
    from biomedclip.training.failures import check_tokens
    from biomedclip.training.long_text import set_context_length

    random_init = config.model.init == "random"
    changes = config.model.preprocess.model_dump(exclude_none=True)
    form = find_form(config.model)
    if form.parts is not None and config.strategy == "fsdp":
        raise ConfigError(
            "strategy", "fsdp needs towers that open_clip builds", found=config.model.name, todo="take ddp"
        )
    model, _, tokenizer = load(config.model.name, random_init=random_init, preprocess=changes or None)
    if config.model.image_weights:
        fill_image_tower(model, config.model.image_weights)
    if config.model.text_tower:
        fill_text_tower(model, config.model.text_tower)
    if config.model.context_length:
        form = ModelForm(set_context_length(model, form.model_cfg or {}, config.model.context_length))
        tokenizer.context_length = config.model.context_length  # type: ignore[attr-defined]
    if config.model.init_logit_scale:
        with torch.no_grad():
            scale: Any = model.logit_scale
            scale.fill_(math.log(config.model.init_logit_scale))
    visual: Any = model.visual
    facts = visual.preprocess_cfg
    sizes = {facts["size"]} if isinstance(facts["size"], int) else set(facts["size"])
    if len(sizes) != 1:
        raise ConfigError(config.model.name, "does not take square images", found=facts["size"])
    tokenise = fast_tokenise(tokenizer)
    check_tokens(tokenise, model, config.model.name)
    geometry = Geometry(size_px=sizes.pop(), resize_mode=facts["resize_mode"], interpolation=facts["interpolation"])
    return model.train(), form, tokenizer, StreamData(config, geometry, tokenise)


def _check_same_run(out: Path, config: TrainConfig, allow_plan_change: bool) -> None:
    """Raise ConfigError where a resumed run would learn something else than the interrupted one."""
    old = load_config(out / CONFIG, TrainConfig).model_dump(exclude=_MAY_CHANGE)
    new = config.model_dump(exclude=_MAY_CHANGE)
    differ = [key for key in old if old[key] != new[key] and not (allow_plan_change and key in DATA_KEYS)]
    if differ:
        other = " or add --allow-plan-change" if set(differ) <= set(DATA_KEYS) else ""
        raise ConfigError(
            out, f"was started with another config: {', '.join(differ)} differ",
            todo=f"resume with {out / CONFIG}, start in another folder{other}",
        )  # fmt: skip


def _check_installed() -> None:
    for package in ("lightning", "open_clip", "simplejpeg"):
        try:
            __import__(package)
        except ImportError:
            raise MissingExtra("train", package) from None


@contextmanager
def _threads(wanted: int, processes: int) -> Iterator[None]:
    """Let torch use this process's share of the cores it may use: it counts the machine's, not the container's."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(wanted or max(len(os.sched_getaffinity(0)) // processes, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
