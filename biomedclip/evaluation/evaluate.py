"""One model on a list of tasks: manifests in, one result file and one score file per task out.

Everything that can be wrong without a model (tasks, folders, splits, classes, counts, prompts) is checked for all
tasks before the weights are loaded; then each task is embedded, scored and written before the next begins, so a
failure keeps what is finished. Nothing is tuned anywhere in here: the split that is scored is the one the task names,
and thresholds, temperatures or prompt sets are never chosen by looking at it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.errors import ConfigError
from biomedclip.evaluation.answer_kinds import (
    pool_slides,
    score_label_sets,
    score_option_sets,
)
from biomedclip.evaluation.answer_scores import LabelScores
from biomedclip.evaluation.beyond import Scored, measure_beyond
from biomedclip.evaluation.config import EvaluateConfig
from biomedclip.evaluation.embed import (
    ImageEmbeddings,
    choose_device,
    describe_preprocess,
    embed_images,
    embed_texts,
    fingerprint,
    logit_scale_of,
)
from biomedclip.evaluation.leakage import read_leakage
from biomedclip.evaluation.prompts import check_distinct, compile_prompts, list_warnings
from biomedclip.evaluation.results import TaskResult, write_result
from biomedclip.evaluation.retrieval import caption_ids, rank_candidates
from biomedclip.evaluation.scores import ClassScores, RankScores, Scores, hash_scores, measure, statistics_of
from biomedclip.evaluation.splits import check_counts, read_other_split, read_split
from biomedclip.evaluation.tasks import Task, find_task
from biomedclip.evaluation.zero_shot import score_classes
from biomedclip.progress import Progress, silent
from biomedclip.runs import git_commit, versions
from biomedclip.schema import LabelledImage, Manifest

if TYPE_CHECKING:
    import torch

_NUM_EXAMPLES = 12
_LISTED_EXCLUSIONS = 50


@dataclass(frozen=True)
class Encoder:
    """A loaded model with what a result must say about it."""

    name: str
    model: torch.nn.Module
    preprocess: Callable[[Any], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]
    device: str

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights."""
        return fingerprint(self.model)

    @cached_property
    def logit_scale(self) -> float:
        """Exponentiated."""
        return logit_scale_of(self.model)


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
    return [_run(plan, plans, encoder, config, out, progress or silent) for plan in plans]


def check_sections(config: EvaluateConfig) -> None:
    """Raise ConfigError for a section that names a task which the run does not have."""
    outside = (*config.ood.near, *config.ood.far) if config.ood else ()
    named = [("ood", outside), ("subgroups", config.subgroups), ("prompt_sets", config.prompt_sets),
             ("leakage", config.leakage)]  # fmt: skip
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


def _run(
    plan: _Plan, plans: Sequence[_Plan], encoder: Encoder, config: EvaluateConfig, out: str | Path, progress: Progress
) -> TaskResult:
    task = plan.task

    def embed(manifest: Manifest, read: Any = None) -> ImageEmbeddings:
        return embed_images(
            encoder.model, encoder.preprocess, manifest, read=read, batch_size=config.batch_size,
            workers=config.workers, device=encoder.device, precision=config.precision,
            processes=config.processes if read is None else 1, max_excluded=config.max_excluded,
            # Corrupted pictures share ids and files with clean ones, so they must not share a cache.
            cache=config.cache if read is None else None, model_hash=encoder.fingerprint, progress=progress,
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
    record = _describe(plan, images, rows, encoder, config) | facts | {"scores_sha256": hash_scores(scores)}
    if isinstance(scores, RankScores):
        record["examples"] = _examples(scores, rows)
        record["strict"] = measure_strict(rows, images.vectors, encoder, task.metrics.names)
    record["dataset"]["leakage"] = read_leakage(config.leakage.get(task.name))

    def outside(name: str) -> NDArray[np.float32]:
        return embed(next(other for other in plans if other.task.name == name).manifest).vectors

    scored = Scored(
        task=task, manifest=plan.manifest, rows=rows, images=images.vectors, scores=scores,
        prompts=_embed_prompts(plan.prompts, encoder), logit_scale=encoder.logit_scale, embed=embed,
        embed_texts=lambda texts: embed_texts(encoder.model, encoder.tokenizer, texts, device=encoder.device),
        read_split=lambda split: read_other_split(task, config.data[task.name], split), outside=outside,
    )  # fmt: skip
    if beyond := measure_beyond(scored, config):
        record["beyond"] = beyond
    return write_result(out, record, scores)


def _embed_prompts(prompts: dict[str, list[str]], encoder: Encoder) -> list[NDArray[np.float32]]:
    if not prompts:
        return []
    flat = [sentence for sentences in prompts.values() for sentence in sentences]
    vectors = embed_texts(encoder.model, encoder.tokenizer, flat, device=encoder.device)
    return np.split(vectors, np.cumsum([len(sentences) for sentences in prompts.values()])[:-1])


def score_options_of(
    plan: _Plan, rows: Sequence[LabelledImage], images: NDArray[np.float32], encoder: Encoder
) -> Scores:
    """Cosines of every image with its own options."""
    return score_option_sets(plan.task, rows, images, encoder, group_ids(rows))


def score_zero_shot(
    plan: Any, rows: Sequence[LabelledImage], images: NDArray[np.float32], encoder: Encoder
) -> ClassScores | LabelScores:
    """Cosines of every image with every class; of slides where the task pools patches.

    `plan` has a task, its prompts and, where it is not `default`, the prompt set.
    """
    if plan.task.labels == "multi":
        prompt_set = getattr(plan, "prompt_set", "default")
        return score_label_sets(plan.task, plan.prompts, prompt_set, rows, images, encoder, group_ids(rows))
    labels = list(plan.prompts)
    parts = _embed_prompts(plan.prompts, encoder)
    scores = ClassScores(
        sample_ids=tuple(row.sample_id for row in rows),
        group_ids=group_ids(rows),
        classes=tuple(labels),
        y=np.asarray([labels.index(row.labels[0]) for row in rows], dtype=np.int64),
        cosines=score_classes(images, parts, plan.task.ensemble, encoder.logit_scale),
        logit_scale=encoder.logit_scale,
    )
    return pool_slides(scores, plan.task.pool) if plan.task.pool else scores


def score_retrieval(
    plan: _Plan, rows: Sequence[LabelledImage], images: NDArray[np.float32], encoder: Encoder
) -> RankScores:
    """Ranks in both directions; captions that read the same are right answers to each other's images."""
    captions = [str(row.text) for row in rows]
    ids = caption_ids(captions)
    # Equal captions are embedded once: the same words in another batch may differ in the last bit, and then not tie.
    _, first = np.unique(ids, return_index=True)
    unique = [captions[position] for position in first]
    texts = embed_texts(encoder.model, encoder.tokenizer, unique, device=encoder.device)[ids]
    to_text = rank_candidates(images, texts, ids, ids)
    to_image = rank_candidates(texts, images, ids, ids)
    return RankScores(
        sample_ids=tuple(row.sample_id for row in rows),
        group_ids=group_ids(rows),
        caption_ids=ids,
        image_to_text=to_text.ranks,
        text_to_image=to_image.ranks,
        image_to_text_top=to_text.top,
        text_to_image_top=to_image.top,
        cosines=np.einsum("nd,nd->n", images, texts).astype(np.float32),
        logit_scale=encoder.logit_scale,
    )


def measure_strict(
    rows: Sequence[LabelledImage], images: NDArray[np.float32], encoder: Encoder, names: tuple[str, ...]
) -> dict[str, float]:
    """The same metrics where only a query's own partner is right: what a single-positive protocol reports."""
    captions = [str(row.text) for row in rows]
    unique = list(dict.fromkeys(captions))
    place = {caption: i for i, caption in enumerate(unique)}
    texts = embed_texts(encoder.model, encoder.tokenizer, unique, device=encoder.device)
    texts = texts[[place[caption] for caption in captions]]
    own = np.arange(len(rows))
    to_text, to_image = rank_candidates(images, texts, own, own), rank_candidates(texts, images, own, own)
    scores = RankScores(
        sample_ids=tuple(row.sample_id for row in rows), group_ids=None, caption_ids=own, image_to_text=to_text.ranks,
        text_to_image=to_image.ranks, image_to_text_top=to_text.top, text_to_image_top=to_image.top,
        cosines=np.zeros(len(rows), dtype=np.float32), logit_scale=encoder.logit_scale,
    )  # fmt: skip
    return {name: float(statistic(None)) for name, statistic in statistics_of(scores, names).items()}


def group_ids(rows: Sequence[LabelledImage]) -> tuple[str, ...] | None:
    """Group of each row, its own id where it has none; None where no row has one."""
    if all(row.group_id is None for row in rows):
        return None
    return tuple(row.group_id if row.group_id is not None else f"sample:{row.sample_id}" for row in rows)


def _describe(
    plan: _Plan, images: ImageEmbeddings, rows: Sequence[LabelledImage], encoder: Encoder, config: EvaluateConfig
) -> dict[str, Any]:
    """The part of the record that says what was measured, on what and with what."""
    task, groups = plan.task, group_ids(rows)
    drops = [*plan.manifest.drops, *images.drops]
    counts = Counter(label for row in rows for label in row.labels) if task.classes else Counter()
    return {
        "task": task.name,
        "suite": task.suite,
        "title": task.title,
        "kind": task.kind,
        "primary": task.metrics.primary,
        "model": {
            "name": encoder.name,
            "fingerprint": encoder.fingerprint,
            "preprocess": describe_preprocess(encoder.preprocess),
            "logit_scale": encoder.logit_scale,
            "precision": config.precision,
        },
        "dataset": {
            "split": task.split,
            "n": len(rows),
            "classes": [entry.label for entry in task.classes],
            "class_counts": [counts[entry.label] for entry in task.classes],
            "n_groups": len(set(groups)) if groups else None,
            "group": task.group,
            "manifest_sha256": plan.manifest.sha256,
            "licence": task.licence,
            "citation": task.citation,
            "contamination": task.contamination,
            "verified": task.verified,
            "excluded": {
                "n": len(drops),
                "by_reason": dict(sorted(Counter(drop.reason for drop in drops).items())),
                "listed": [asdict(drop) for drop in drops[:_LISTED_EXCLUSIONS]],
            },
        },
        "prompt_set": plan.prompt_set if plan.prompts else None,
        "prompt_source": task.prompt_sets[plan.prompt_set].source if plan.prompts else None,
        "prompts": plan.prompts,
        "ensemble": task.ensemble.model_dump() if plan.prompts else None,
        "selection": {"split": task.select_split, "hparams": {}},
        "seed": config.seed,
        "published": [entry.model_dump() for entry in task.published],
        "warnings": plan.warnings,
        "code": {"git": git_commit()},
        "versions": versions(),
    }


def _examples(scores: RankScores, rows: Sequence[LabelledImage]) -> list[dict[str, Any]]:
    """Queries spread evenly over the set, not picked: image, its caption, the caption the model put first."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(_NUM_EXAMPLES, len(rows))).round().astype(int))
    return [
        {
            "sample_id": rows[i].sample_id,
            "caption": rows[i].text,
            "top_sample_id": rows[scores.image_to_text_top[i]].sample_id,
            "top_caption": rows[scores.image_to_text_top[i]].text,
            "hit": bool(scores.caption_ids[scores.image_to_text_top[i]] == scores.caption_ids[i]),
            "rank": float(scores.image_to_text[i]),
        }
        for i in chosen
    ]
