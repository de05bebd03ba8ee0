"""The calibration of a model from validation splits: temperature, threshold of the sure answers, scope.

Reads a loaded model, labelled tasks with their data, and dataset folders; yields what `biomedclip.models.calibration`
stores. Only validation splits are scored and only training splits give references. A task whose only split is the one
that is scored later is refused, because a temperature fitted there would make its reported error look small. Each task
and each domain counts alike, however many images it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.errors import ConfigError, DataError
from biomedclip.evaluation import calibration, metrics
from biomedclip.evaluation.embed import ImageEmbeddings, choose_device, embed_images, embed_texts, logit_scale_of
from biomedclip.evaluation.prompts import compile_prompts
from biomedclip.evaluation.splits import read_other_split
from biomedclip.evaluation.tasks import Task, find_task
from biomedclip.evaluation.zero_shot import score_classes
from biomedclip.files import sha256_json
from biomedclip.layouts import read_manifest
from biomedclip.models.calibration import (
    Calibration,
    CalibrationFacts,
    Confidence,
    Domain,
    Floats,
    Scope,
    TaskFit,
    kth_distance,
    write_calibration,
)
from biomedclip.progress import Progress, silent
from biomedclip.schema import LabelledImage, Manifest

Embed = Callable[[Manifest], ImageEmbeddings]
VALIDATION, TRAINING = "val", "train"
MIN_COVERAGE = 0.5
"""Share of answers that stays sure whatever accuracy is asked for: a flag on every answer says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """What may be chosen about a calibration."""

    accuracy: float = 0.98
    """Share of right answers wanted among those that are not called uncertain."""
    quantile: float = 0.99
    """Share of each domain's validation images that lie inside of the scope."""
    k: int = 5
    references: int = 800
    """Stored embeddings of training images, shared out evenly over the domains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answers:
    """A task's validation split as the model answers it."""

    task: str
    split: str
    manifest_sha256: str
    y: NDArray[np.int64]
    logits: NDArray[np.float64]


def fit_calibration(
    model: tuple[Any, Any, Any], out: str | Path, *, tasks: Mapping[str, str | Path], data: Sequence[str | Path],
    weights_sha256: str, options: FitOptions | None = None, batch_size: int = 64, progress: Progress = silent,
) -> Calibration:  # fmt: skip
    """Fit on validation splits, write `calibration.json` and `scope.safetensors` into `out`, return the calibration.

    `tasks` maps names of classification tasks to their data: they give temperature and threshold. `data` are dataset
    folders, one domain each, which give the scope. Raises ConfigError for a task without a validation split and
    DataError for data without one.
    """
    chosen = options or FitOptions()
    if not tasks:
        raise ConfigError("--task", "is missing: a temperature needs labelled images", todo="give NAME=FOLDER")
    if not data:
        raise ConfigError("--data", "is missing: a scope needs images of the training domains", todo="give a folder")
    checked = [(_check_task(name), root) for name, root in tasks.items()]
    net, preprocess, tokenizer = model
    device = choose_device("auto")
    net = net.to(device)
    scale = logit_scale_of(net)

    def embed(manifest: Manifest) -> ImageEmbeddings:
        return embed_images(net, preprocess, manifest, batch_size=batch_size, device=device, progress=progress)

    def embed_prompts(prompts: Mapping[str, Sequence[str]]) -> list[Floats]:
        return [embed_texts(net, tokenizer, sentences, device=device) for sentences in prompts.values()]

    answers = [_answer(task, root, scale, embed, embed_prompts) for task, root in checked]
    temperature = calibration.fit_shared_temperature([(part.y, part.logits) for part in answers])
    if not 1e-3 < temperature < 1e3:
        raise DataError(", ".join(tasks), "give no temperature: all answers are right, or none means anything",
                        found=f"{temperature:.3g}", todo="give harder or more validation images")  # fmt: skip
    threshold, confidence = choose_threshold(
        [(part.y, metrics.softmax(part.logits / temperature)) for part in answers], chosen.accuracy
    )
    domains, references, domain_of, yardsticks = _fit_scope(data, embed, chosen)
    facts = CalibrationFacts(
        weights_sha256=weights_sha256, temperature=temperature, uncertain_below=threshold, confidence=confidence,
        tasks=tuple(_describe(part, temperature) for part in answers),
        scope=Scope(sha256="", k=chosen.k, quantile=chosen.quantile, domains=domains),
    )  # fmt: skip
    return write_calibration(out, facts, references=references, domain_of=domain_of, yardsticks=yardsticks)


def describe_fit(found: Calibration) -> str:
    """A calibration in lines a person reads."""
    facts, sure = found.facts, found.facts.confidence
    lines = [f"temperature {facts.temperature:.3f}"]
    lines += [
        f"  {fit.task} ({fit.split}, n = {fit.n:,}): accuracy {fit.accuracy:.3f},"
        f" nll {fit.nll[0]:.3f} -> {fit.nll[1]:.3f}, ece {fit.ece[0]:.3f} -> {fit.ece[1]:.3f}"
        for fit in facts.tasks
    ]
    lines.append(
        f"uncertain below {facts.uncertain_below:.3f}: {sure.accuracy:.3f} of the surer answers are right (asked:"
        f" {sure.target:.3f}), {sure.coverage:.3f} of all answers are surer"
    )
    if facts.scope is not None and found.yardsticks is not None:
        lines.append(f"scope: distance to neighbour {facts.scope.k}, {facts.scope.quantile:.2%} of validation inside")
        lines += [
            f"  {domain.name}: {domain.references:,} references, {domain.validation:,} validation images,"
            f" yardstick {y:.3f}"
            for domain, y in zip(facts.scope.domains, found.yardsticks, strict=True)
        ]
    return "\n".join(lines)


def choose_threshold(
    sets: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]], accuracy: float
) -> tuple[float, Confidence]:
    """The lowest top probability from which on answers are right as often as asked for, over sets of (y, p (N, C)).

    Where the accuracy is not reached with half of the answers, the threshold that keeps half of them. Where all
    answers together reach it, the lowest top probability of all: only what is less sure than anything seen is below.
    """
    tops = [p.max(1) for _, p in sets]
    top = np.concatenate(tops)
    right = np.concatenate([p.argmax(1) == y for y, p in sets]).astype(np.float64)
    weight = np.concatenate([np.full(len(t), 1 / (len(sets) * len(t))) for t in tops])
    values, group = np.unique(-top, return_inverse=True)  # surest first; equal probabilities stand or fall together
    kept = np.cumsum(np.bincount(group, weight))
    good = np.cumsum(np.bincount(group, weight * right)) / kept
    allowed = kept >= MIN_COVERAGE
    fits = np.flatnonzero(allowed & (good >= accuracy))
    place = int(fits[-1]) if len(fits) else int(np.flatnonzero(allowed)[0])
    found = Confidence(
        target=accuracy, accuracy=float(good[place]), coverage=float(kept[place]), n=len(top), reached=bool(len(fits))
    )
    return float(-values[place]), found


def _check_task(name: str) -> Task:
    task = find_task(name)
    if task.kind != "zero_shot" or task.labels != "single" or task.pool:
        raise ConfigError(f"--task {name}", "is no task with one class an image", todo="name a classification task")
    if task.select_split is None or task.select_split == task.split:
        raise ConfigError(
            f"--task {name}", f"has no split but '{task.split}', which is scored: nothing is fitted on it",
            todo="name a task with a validation split",
        )  # fmt: skip
    return task


def _answer(
    task: Task, root: str | Path, scale: float, embed: Embed,
    embed_prompts: Callable[[Mapping[str, Sequence[str]]], list[Floats]],
) -> _Answers:  # fmt: skip
    manifest = read_other_split(task, root, str(task.select_split))
    prompts = compile_prompts(task)
    labels = list(prompts)
    label_of = {row.sample_id: row.labels[0] for row in manifest.rows}
    images = embed(manifest)
    cosines = score_classes(images.vectors, embed_prompts(prompts), task.ensemble, scale)
    return _Answers(
        task=task.name, split=str(task.select_split), manifest_sha256=manifest.sha256,
        y=np.asarray([labels.index(label_of[i]) for i in images.sample_ids], dtype=np.int64),
        logits=scale * cosines.astype(np.float64),
    )  # fmt: skip


def _describe(part: _Answers, temperature: float) -> TaskFit:
    own, after = (calibration.calibrate(part.y, part.logits, t) for t in (1.0, temperature))
    accuracy = float((part.logits.argmax(1) == part.y).mean())
    return TaskFit(
        task=part.task, split=part.split, n=len(part.y), manifest_sha256=part.manifest_sha256,
        nll=(own["nll"], after["nll"]), ece=(own["ece"], after["ece"]), accuracy=accuracy,
    )  # fmt: skip


def _fit_scope(
    data: Sequence[str | Path], embed: Embed, options: FitOptions
) -> tuple[tuple[Domain, ...], Floats, NDArray[np.int32], Floats]:
    """Domains, their reference embeddings (R, D), which domain each is of (R,), and each domain's yardstick (S,)."""
    domains, references, yardsticks = [], [], []
    for folder in data:
        whole = read_manifest("dataset_folder", folder)
        stored = embed(_spread(_of_split(whole, TRAINING), options.references // len(data))).vectors
        near = stored.astype(np.float16).astype(np.float32)  # as they will be read again
        near /= np.linalg.norm(near, axis=1, keepdims=True)
        held = embed(_of_split(whole, VALIDATION)).vectors
        yardsticks.append(max(float(np.quantile(kth_distance(held, near, options.k), options.quantile)), 1e-6))
        references.append(near)
        domains.append(Domain(name=whole.name, references=len(near), validation=len(held)))
    domain_of = np.repeat(np.arange(len(domains)), [len(part) for part in references]).astype(np.int32)
    return tuple(domains), np.concatenate(references), domain_of, np.asarray(yardsticks, dtype=np.float32)


def _of_split(manifest: Manifest, split: str) -> Manifest:
    rows = tuple(row for row in manifest.rows if row.split == split)
    if not rows:
        found = ", ".join(sorted({str(row.split) for row in manifest.rows}))
        raise DataError(manifest.root, f"has nothing in split '{split}'", found=found,
                        todo="build it with training and validation splits; a test split is never used")  # fmt: skip
    return replace(manifest, rows=rows, sha256=sha256_json([manifest.sha256, split]))


def _spread(manifest: Manifest, count: int) -> Manifest:
    """At most `count` rows: label after label in turn, each label's rows evenly over the order of their ids."""
    by_label: dict[tuple[str, ...], list[LabelledImage]] = {}
    for row in manifest.rows:
        by_label.setdefault(row.labels, []).append(row)
    # Halving steps visit a list evenly at any length: 0, 1/2, 1/4, 3/4, 1/8, ...
    ordered = [[rows[place] for place in _halvings(len(rows))] for rows in by_label.values()]
    turns = [row for turn in zip_longest(*ordered) for row in turn if row is not None]
    rows = tuple(sorted(turns[:count], key=lambda row: row.sample_id))
    return replace(manifest, rows=rows, sha256=sha256_json([manifest.sha256, count]))


def _halvings(size: int) -> list[int]:
    """0 to size - 1, each once, so that every beginning is spread over the whole."""
    bits = max(size - 1, 0).bit_length()
    turned = (int(format(number, f"0{bits}b")[::-1], 2) if bits else 0 for number in range(1 << bits))
    return [place for place in turned if place < size]
