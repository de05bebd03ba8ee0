"""Scores of one model on one task: what is stored per sample, and every number computed from it.

`ClassScores` and `RankScores` hold what the model said about each sample: raw float32 cosines, or retrieval ranks,
with sample and group ids. They are written to one npz a task, and `measure` turns them into metrics with intervals,
baselines and tables, without the model: a new metric, another interval or a plot needs no second inference.
Two-class probabilities use the model's own logit scale, so calibration here is the model's, not a fitted one.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biomedclip.errors import DataError
from biomedclip.evaluation import calibration, metrics, ordinal
from biomedclip.evaluation.answer_scores import (
    LabelScores,
    OptionScores,
    label_statistics,
    label_tables,
    option_statistics,
    option_tables,
)
from biomedclip.evaluation.influence import EXACT_CELLS, balanced_accuracy_sums, choose_auroc
from biomedclip.evaluation.retrieval import KS, chance_recall, chance_reciprocal_rank
from biomedclip.evaluation.statistics import Interval, Resampler, Statistic, bootstrap, bound_flawless
from biomedclip.files import write_atomic

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScores:
    """Scores of a single-label classification task."""

    sample_ids: tuple[str, ...]
    group_ids: tuple[str, ...] | None
    classes: tuple[str, ...]
    y: NDArray[np.int64]
    """(N,) index into classes."""
    cosines: NDArray[np.float32]
    """(N, C), before any temperature."""
    logit_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankScores:
    """Ranks of an image-text retrieval task, one pair a row; both directions."""

    sample_ids: tuple[str, ...]
    group_ids: tuple[str, ...] | None
    caption_ids: NDArray[np.int64]
    """(N,) equal where captions read the same, which makes each other's images right answers."""
    image_to_text: NDArray[np.float64]
    text_to_image: NDArray[np.float64]
    image_to_text_top: NDArray[np.int64]
    """(N,) row whose caption came first."""
    text_to_image_top: NDArray[np.int64]
    cosines: NDArray[np.float32]
    """(N,) of each image with its own caption."""
    logit_scale: float
    image_to_text_full: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, len(KS))))
    text_to_image_full: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, len(KS))))
    """(N, K) share of all right answers within the first 1, 5 and 10; empty in files from before these were kept."""


Scores = ClassScores | RankScores | LabelScores | OptionScores


def write_scores(path: str | Path, scores: Scores) -> str:
    """Write the npz, whole or not at all; returns the content's hash (see `hash_scores`)."""
    with write_atomic(path) as file:
        np.savez_compressed(file, **_arrays(scores))  # type: ignore[arg-type]
    return hash_scores(scores)


def read_scores(path: str | Path) -> Scores:
    """Scores written by `write_scores`. Raises DataError for anything else."""
    try:
        # Opened here, because np.load leaves a file of its own open where the zip is broken.
        with Path(path).open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if int(arrays["format"]) != FORMAT_VERSION:
            raise DataError(path, f"is not of format {FORMAT_VERSION}", found=int(arrays["format"]))
        groups = arrays["group_ids"]
        facts: dict[str, Any] = {
            "sample_ids": tuple(arrays["sample_ids"].tolist()),
            "group_ids": tuple(groups.tolist()) if groups.size else None,
            "logit_scale": float(arrays["logit_scale"]),
            "cosines": arrays["cosines"],
        }
        if "classes" in arrays:
            return ClassScores(classes=tuple(arrays["classes"].tolist()), y=arrays["y"], **facts)
        if "labels" in arrays:
            return LabelScores(labels=tuple(arrays["labels"].tolist()), truth=arrays["truth"], **facts)
        if "answer_texts" in arrays:
            texts: dict[str, Any] = {key: tuple(arrays[key].tolist()) for key in ("answer_texts", "sets")}
            return OptionScores(sizes=arrays["sizes"], answers=arrays["answers"], **texts, **facts)
        names = ("caption_ids", "image_to_text", "text_to_image", "image_to_text_top", "text_to_image_top")
        full = {name: arrays[name] for name in ("image_to_text_full", "text_to_image_full") if name in arrays}
        return RankScores(**{name: arrays[name] for name in names}, **full, **facts)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(path, "holds no scores", found=str(error)[:80], todo="evaluate the task again") from None


def hash_scores(scores: Scores) -> str:
    """Hex sha256 of names, shapes and bytes of the arrays: equal scores, equal hash, whatever the zip says."""
    digest = hashlib.sha256()
    for name, value in sorted(_arrays(scores).items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _arrays(scores: Scores) -> dict[str, NDArray[Any]]:
    values: dict[str, Any] = {name: getattr(scores, name) for name in type(scores).__dataclass_fields__}
    values["group_ids"] = scores.group_ids or ()
    text = ("sample_ids", "group_ids", "classes", "labels", "answer_texts", "sets")
    arrays = {k: np.asarray(v, dtype=np.str_ if k in text else None) for k, v in values.items()}
    return {"format": np.asarray(FORMAT_VERSION), **arrays}


def statistics_of(scores: Scores, names: tuple[str, ...], resampler: Resampler | None = None) -> dict[str, Statistic]:
    """Each metric as a function of sample counts (statistics.py), in the order asked for.

    With the resampler at hand, sets too large for exact resampling get sums over units instead (influence.py).
    """
    if isinstance(scores, RankScores):
        table = _rank_statistics(scores)
    elif isinstance(scores, LabelScores):
        table = label_statistics(scores)
    elif isinstance(scores, OptionScores):
        table = option_statistics(scores)
    else:
        table = _class_statistics(scores)
        if resampler is not None and scores.cosines.size * resampler.resamples > EXACT_CELLS:
            num_classes = len(scores.classes)
            if "balanced_accuracy" in names:
                table["balanced_accuracy"] = balanced_accuracy_sums(scores.y, predict(scores), num_classes, resampler)
            if "auroc" in names:
                table["auroc"] = choose_auroc(scores.y, scores.cosines, resampler)
    if missing := [name for name in names if name not in table]:
        raise DataError("scores", f"do not hold what {', '.join(missing)} needs", todo="evaluate the task again")
    return {name: table[name] for name in names}


def _class_statistics(scores: ClassScores) -> dict[str, Statistic]:
    y, cosines, num_classes = scores.y, scores.cosines, len(scores.classes)
    predicted = predict(scores)
    logits = scores.logit_scale * cosines.astype(np.float64)
    probabilities = metrics.softmax(logits)

    def of_table(metric: Callable[[ArrayLike], Any]) -> Statistic:
        return lambda w: metric(metrics.confusion(y, predicted, num_classes, w))

    return {
        "accuracy": lambda w: metrics.accuracy(y, predicted, w),
        "balanced_accuracy": of_table(metrics.balanced_accuracy),
        "macro_f1": of_table(metrics.macro_f1),
        "mcc": of_table(metrics.mcc),
        "weighted_f1": of_table(metrics.weighted_f1),
        "kappa": of_table(metrics.kappa),
        "quadratic_kappa": of_table(lambda table: metrics.kappa(table, "quadratic")),
        "mean_absolute_error": lambda w: ordinal.mean_absolute_error(y, predicted, w),
        "within_one": lambda w: ordinal.within_one(y, predicted, w),
        "auroc": lambda w: metrics.macro_auroc(y, cosines, w),
        "auroc_pairs": lambda w: metrics.pairwise_auroc(y, cosines, w),
        "auroc_micro": lambda w: metrics.micro_auroc(y, cosines, w),
        "auprc": lambda w: metrics.macro_average_precision(y, cosines, w),
        "ece": lambda w: calibration.calibration_error(y, probabilities, w),
        "ace": lambda w: calibration.calibration_error(y, probabilities, w, by="mass"),
        "brier": lambda w: calibration.brier(y, probabilities, w),
        "nll": lambda w: calibration.negative_log_likelihood(y, logits, w),
    }


def _rank_statistics(scores: RankScores) -> dict[str, Statistic]:
    table: dict[str, Statistic] = {}
    for direction in ("image_to_text", "text_to_image"):
        ranks = getattr(scores, direction)
        full = getattr(scores, f"{direction}_full")
        for k in KS:
            table[f"{direction}/recall@{k}"] = lambda w, r=ranks, k=k: metrics.recall_at(r, k, w)  # type: ignore[misc]
            if len(full):
                table[f"{direction}/full_recall@{k}"] = partial(metrics.weighted_mean, full[:, KS.index(k)])
        table[f"{direction}/mrr"] = lambda w, r=ranks: metrics.mean_reciprocal_rank(r, w)  # type: ignore[misc]
        table[f"{direction}/median_rank"] = lambda w, r=ranks: metrics.median_rank(r, w)  # type: ignore[misc]
    return table


def predict(scores: ClassScores) -> NDArray[np.int64]:
    """(N,) class of the largest cosine; the first class wins an exact tie, and `measure` counts the ties."""
    return scores.cosines.argmax(1).astype(np.int64)


def measure(
    scores: Scores,
    names: tuple[str, ...],
    *,
    by: str = "group",
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """The part of a result that follows from scores alone, ready for JSON.

    `metrics.<name>`: value, ci_low, ci_high, ci_method, n, n_boot, redrawn, and `reason` where one of them is null
    because it is undefined. `baselines`: what a random and a majority guess would get. Classification adds
    `confusion`, `per_class` and `ties`. `by` is `group`, `class` or `sample`; without group ids `group` becomes
    `class`.
    """
    groups = scores.group_ids if by == "group" else None
    y = scores.y if isinstance(scores, ClassScores) and by != "sample" else None
    resampler = Resampler(len(scores.sample_ids), y=y, groups=groups, resamples=resamples, seed=seed)
    statistics = statistics_of(scores, names, resampler)
    intervals = bootstrap(statistics, resampler, level=level)
    num_classes = len(scores.classes) if isinstance(scores, ClassScores) else 0
    undefined = "no label has both kinds" if isinstance(scores, LabelScores) else "no samples"
    if isinstance(scores, ClassScores):
        undefined = metrics.explain_undefined(scores.y, num_classes) or "undefined"
    facts: dict[str, Any] = {
        "metrics": {
            name: _entry(
                value := float(statistic(None)),
                _widen(name, value, intervals[name], scores, groups),
                len(scores.sample_ids),
                undefined,
            )
            for name, statistic in statistics.items()
        }
    }
    if isinstance(scores, ClassScores):
        return facts | _class_tables(scores)
    if isinstance(scores, LabelScores):
        return facts | label_tables(scores)
    if isinstance(scores, OptionScores):
        return facts | option_tables(scores)
    return facts | {"baselines": {"random": _random_ranks(scores, names)}}


def _widen(name: str, value: float, interval: Interval, scores: Scores, groups: tuple[str, ...] | None) -> Interval:
    """The exact interval in place of a bootstrap that has shrunk to a point, for shares that are all or nothing.

    Other metrics keep the point and say so: all resamples of a perfect ranking are perfect, which is not certainty.
    """
    if interval.reason or interval.low != interval.high:
        return interval
    kind = name.rsplit("/", 1)[-1].split("@")[0]
    if value not in (0.0, 1.0) or kind not in ("accuracy", "balanced_accuracy", "recall"):
        return replace(interval, method=f"{interval.method}-degenerate")
    units = np.asarray(groups if groups is not None else scores.sample_ids)
    per_class = isinstance(scores, ClassScores) and kind == "balanced_accuracy"
    strata = scores.y if isinstance(scores, ClassScores) and per_class else np.zeros(len(units), dtype=np.int64)
    bound = bound_flawless([len(np.unique(units[strata == c])) for c in np.unique(strata)], interval.level)
    low, high = (bound, 1.0) if value == 1 else (0.0, 1 - bound)
    return replace(interval, low=low, high=high, method="exact-" + ("all-right" if value == 1 else "all-wrong"))


def _entry(value: float, interval: Interval, n: int, undefined: str | None) -> dict[str, Any]:
    reason = (undefined or "undefined") if np.isnan(value) else interval.reason
    return {
        "value": _number(value),
        "ci_low": _number(interval.low),
        "ci_high": _number(interval.high),
        "ci_level": interval.level,
        "ci_method": interval.method,
        "n": n,
        "n_boot": interval.resamples,
        "redrawn": interval.redrawn,
        **({"reason": reason} if reason else {}),
    }


def _class_tables(scores: ClassScores) -> dict[str, Any]:
    num_classes = len(scores.classes)
    table = metrics.confusion(scores.y, predict(scores), num_classes)
    support = table.sum(1)
    present = int((support > 0).sum())
    share = support / max(1.0, support.sum())
    recalls, precisions, f1 = (
        of(table) for of in (metrics.recall_per_class, metrics.precision_per_class, metrics.f1_per_class)
    )
    areas = metrics.auroc_per_class(scores.y, scores.cosines)
    best = np.sort(scores.cosines, axis=1)
    majority = float(share.max(initial=0))
    return {
        "confusion": table.astype(int).tolist(),
        "per_class": [
            {"class": name, "support": int(support[c]), "recall": _number(recalls[c]), "auroc": _number(areas[c]),
             "precision": _number(precisions[c]), "f1": _number(f1[c])}
            for c, name in enumerate(scores.classes)
        ],
        "ties": int((best[:, -1] == best[:, -2]).sum()) if len(best) else 0,
        "baselines": {
            "random": {"accuracy": 1 / num_classes, "balanced_accuracy": 1 / num_classes, "auroc": 0.5},
            "majority": {
                "accuracy": majority, "balanced_accuracy": 1 / present if present else None, "auroc": 0.5,
            },
        },
    }  # fmt: skip


def _random_ranks(scores: RankScores, names: tuple[str, ...]) -> dict[str, float | None]:
    total = len(scores.sample_ids)
    _, inverse, counts = np.unique(scores.caption_ids, return_inverse=True, return_counts=True)
    baselines: dict[str, float | None] = {}
    for name in names:
        metric = name.split("/")[1]
        if metric.startswith("recall@"):
            baselines[name] = _number(chance_recall(total, counts[inverse], int(metric.removeprefix("recall@"))))
        elif metric.startswith("full_recall@"):
            baselines[name] = _number(min(1.0, int(metric.removeprefix("full_recall@")) / total))
        elif metric == "mrr" and len(counts) == total:
            baselines[name] = _number(chance_reciprocal_rank(total))
        elif metric == "median_rank" and len(counts) == total:
            baselines[name] = (total + 1) / 2
    return baselines


def _number(value: float) -> float | None:
    """A JSON number; None where it is undefined."""
    return None if np.isnan(value) else float(value)
