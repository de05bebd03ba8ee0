"""One model on a list of tasks: manifests in, one result file and one score file per task out.

Everything that can be wrong without a model (tasks, folders, splits, classes, counts, prompts) is checked for all
tasks before the weights are loaded; then each task is embedded, scored and written before the next begins, so a
failure keeps what is finished. Nothing is tuned anywhere in here: the split that is scored is the one the task names,
and thresholds, temperatures or prompt sets are never chosen by looking at it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.errors import ConfigError
from biomedclip.evaluation.beyond import measure_beyond
from biomedclip.evaluation.config import EvaluateConfig
from biomedclip.evaluation.embed import ImageEmbeddings, choose_device, describe_preprocess, embed_images, embed_texts
from biomedclip.evaluation.leakage import read_leakage
from biomedclip.evaluation.prompts import check_distinct, compile_prompts, list_warnings
from biomedclip.evaluation.record import choose_examples, describe_run
from biomedclip.evaluation.reproduce import MODEL_TOLERANCE, judge, names_of
from biomedclip.evaluation.results import TaskResult, write_result
from biomedclip.evaluation.scored import Scored
from biomedclip.evaluation.scores import RankScores, Scores, hash_scores, measure
from biomedclip.evaluation.scoring import (
    Encoder,
    embed_prompts,
    group_ids,
    measure_strict,
    score_options_of,
    score_retrieval,
    score_zero_shot,
)
from biomedclip.evaluation.splits import check_counts, read_other_split, read_split
from biomedclip.evaluation.tasks import Task, find_task
from biomedclip.progress import Progress, silent
from biomedclip.schema import Manifest


@dataclass(frozen=True, slots=True)
class _Plan:
    """A task with its data checked and its prompts written out."""

    task: Task
    manifest: Manifest
    prompt_set: str
    prompts: dict[str, list[str]]
    warnings: list[str]


def evaluate(
    config: EvaluateConfig,
    out: str | Path,
    *,
    model: tuple[Any, Any, Any] | None = None,
    progress: Progress | None = None,
    tasks: Mapping[str, Task] | None = None,
) -> list[TaskResult]:
    """Results in the order of `config.tasks`, each also written under `out`.

    `model` is `(model, preprocess, tokenizer)` where it is loaded already, else `config.model` is loaded. `tasks` are
    tasks of the caller's own beside the shipped ones. Raises
    ConfigError for an unknown task or prompt set or a missing data folder, DataError for data that is not what the
    task expects.
    """
    check_sections(config)
    plans = [plan_task(name, config, tasks or {}) for name in config.tasks]
    encoder = _load(config, model)
    for plan in plans:
        if plan.prompts:
            check_distinct(plan.prompts, encoder.tokenizer, f"task {plan.task.name}")
    start = cache(lambda: _start_weights(config))
    return [_run(plan, plans, encoder, config, out, progress or silent, start) for plan in plans]


def check_sections(config: EvaluateConfig) -> None:
    """Raise ConfigError for a section that names a task which the run does not have."""
    outside = (*config.ood.near, *config.ood.far) if config.ood else ()
    named = [("ood", outside), ("subgroups", config.subgroups), ("prompt_sets", config.prompt_sets),
             ("leakage", config.leakage), ("backgrounds", config.backgrounds),
             ("perception", config.perception)]  # fmt: skip
    for where, names in named:
        for name in names:
            if name not in config.tasks:
                raise ConfigError(f"{where}.{name}", "is not among the tasks of this run", todo="add it to tasks")


def plan_task(name: str, config: EvaluateConfig, tasks: Mapping[str, Task]) -> _Plan:
    """The task with data and prompts, checked without a model."""
    task = tasks[name] if name in tasks else find_task(name)
    if name not in config.data:
        raise ConfigError(f"data.{name}", "is missing", todo=f"say where its data lies: --set data.{name}=FOLDER")
    root = Path(config.data[name])
    if not root.exists():
        raise ConfigError(f"data.{name}", "there is no such file or folder", found=config.data[name])
    manifest = read_split(task, root)
    warnings = check_counts(task, manifest)
    prompt_set = config.prompt_sets.get(name, "default")
    prompts = compile_prompts(task, prompt_set) if task.kind == "zero_shot" else {}
    return _Plan(task, manifest, prompt_set, prompts, warnings + list_warnings(prompts))


def _load(config: EvaluateConfig, model: tuple[Any, Any, Any] | None) -> Encoder:
    if model is None:
        from biomedclip.models.load import load

        model = load(config.model)
    device = choose_device(config.device)
    net, preprocess, tokenizer = model
    return Encoder(config.model_name or config.model, net.to(device), preprocess, tokenizer, device)


def _start_weights(config: EvaluateConfig) -> Mapping[str, Any]:
    """Weights of the model that the one of the run was trained from."""
    from biomedclip.models.load import load

    if config.wise is None:
        raise ConfigError("wise.start", "is missing", todo="name the model before training")
    device = choose_device(config.device)
    return load(config.wise.start)[0].to(device).state_dict()  # type: ignore[no-any-return]


def _run(
    plan: _Plan, plans: Sequence[_Plan], encoder: Encoder, config: EvaluateConfig, out: str | Path, progress: Progress,
    start_weights: Callable[[], Mapping[str, Any]],
) -> TaskResult:  # fmt: skip
    task = plan.task

    def embed(manifest: Manifest, read: Any = None, fresh: bool = False) -> ImageEmbeddings:
        return embed_images(
            encoder.model, encoder.preprocess, manifest, read=read, batch_size=config.batch_size,
            workers=config.workers, device=encoder.device, precision=config.precision,
            processes=config.processes if read is None else 1, max_excluded=config.max_excluded,
            # Corrupted pictures share ids and files with clean ones, and a model that carries other weights its
            # fingerprint with itself: neither may share a cache.
            cache=config.cache if read is None and not fresh else None, model_hash=encoder.fingerprint,
            progress=progress,
        )  # fmt: skip

    images = embed(plan.manifest)
    readable = dict(zip(images.sample_ids, images.vectors, strict=True))
    rows = [row for row in plan.manifest.rows if row.sample_id in readable]
    score: Any = {"zero_shot": score_zero_shot, "options": score_options_of, "retrieval": score_retrieval}[task.kind]
    scores: Scores = score(plan, rows, images.vectors, encoder)
    with progress(f"scoring {task.name}", None):
        facts = measure(
            scores, task.metrics.names, by=task.bootstrap.by, resamples=config.bootstrap.n,
            level=config.bootstrap.level, seed=config.seed,
        )  # fmt: skip
    model = {"name": encoder.name, "fingerprint": encoder.fingerprint, "logit_scale": encoder.logit_scale,
             "preprocess": describe_preprocess(encoder.preprocess), "precision": config.precision}  # fmt: skip
    record = describe_run(
        task, model=model, labels=[row.labels for row in rows], groups=group_ids(rows),
        manifest_sha256=plan.manifest.sha256, drops=[*plan.manifest.drops, *images.drops],
        prompt_set=plan.prompt_set, prompts=plan.prompts, warnings=plan.warnings, seed=config.seed,
    )  # fmt: skip
    record |= facts | {"scores_sha256": hash_scores(scores)}
    found = judge(
        task.published, names_of(config.published_as, config.model_name, config.model), facts["metrics"],
        n=len(scores.sample_ids),
        prompt_set=record["prompt_set"], per_class=facts.get("per_class", ()),
        tolerance=MODEL_TOLERANCE if config.tolerance is None else config.tolerance,
    )  # fmt: skip
    if found:
        record["reproduction"] = found
    if isinstance(scores, RankScores):
        record["examples"] = choose_examples(scores, rows)
        record["strict"] = measure_strict(rows, images.vectors, encoder, task.metrics.names)
    record["dataset"]["leakage"] = read_leakage(config.leakage.get(task.name))

    def outside(name: str) -> NDArray[np.float32]:
        return embed(next(other for other in plans if other.task.name == name).manifest).vectors

    scored = Scored(
        task=task, manifest=plan.manifest, rows=rows, images=images.vectors, scores=scores,
        sentences=plan.prompts, encoder=encoder,
        embed_prompts=cache(lambda: embed_prompts(plan.prompts, encoder)), embed=embed,
        score=lambda some, vectors: score(plan, some, vectors, encoder), start_weights=start_weights,
        embed_texts=lambda texts: embed_texts(encoder.model, encoder.tokenizer, texts, device=encoder.device),
        read_split=lambda split: read_other_split(task, config.data[task.name], split), outside=outside,
    )  # fmt: skip
    if beyond := measure_beyond(scored, config):
        record["beyond"] = beyond
    return write_result(out, record, scores)
