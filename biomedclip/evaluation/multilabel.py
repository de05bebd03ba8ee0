"""Several labels at once: each label is a question of its own, answered by a positive and a negative prompt.

Reads truth (N, L) with 1 present, 0 absent and -1 not stated, and scores (N, L), f . (w+ - w-) of zero_shot.py; yields
numbers per label and their means over the labels where they are defined. A cell that is not stated takes no part in
its label, because reading silence as absence is how uncertain findings become errors of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biomedclip.evaluation import metrics

UNSTATED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelResult:
    """One label; a value that is undefined is NaN and `reason` says why."""

    label: str
    positives: int
    negatives: int
    auroc: float
    auprc: float
    reason: str | None = None


def read_labels(
    labels: Sequence[Sequence[str]], negatives: Sequence[Sequence[str]], uncertain: Sequence[Sequence[str]],
    classes: Sequence[str], *, closed: bool,
) -> NDArray[np.int8]:  # fmt: skip
    """Truth (N, L) from the labels of manifest rows.

    `closed` says that the set lists all that holds, so that what is not named is absent; else only what `negatives`
    names is. Uncertain labels are not stated either way.
    """
    truth = np.full((len(labels), len(classes)), 0 if closed else UNSTATED, dtype=np.int8)
    column = {name: c for c, name in enumerate(classes)}
    for value, rows in ((0, negatives), (UNSTATED, uncertain), (1, labels)):
        for i, names in enumerate(rows):
            for name in names:
                if name in column:
                    truth[i, column[name]] = value
    return truth


def per_label(truth: ArrayLike, scores: ArrayLike, names: Sequence[str]) -> list[LabelResult]:
    """AUROC and AUPRC of each label, over the samples that state it."""
    truth, scores = np.asarray(truth), np.asarray(scores)
    results = []
    for c, name in enumerate(names):
        rows = truth[:, c] != UNSTATED
        positive, s = truth[rows, c] == 1, scores[rows, c]
        plus, minus = int(positive.sum()), int((~positive).sum())
        reason = None if plus and minus else f"no {'positive' if not plus else 'negative'} sample"
        results.append(
            LabelResult(label=name, positives=plus, negatives=minus, auroc=metrics.auroc(positive, s),
                        auprc=metrics.average_precision(positive, s), reason=reason)
        )  # fmt: skip
    return results


def macro(truth: ArrayLike, scores: ArrayLike, metric: Any, weights: ArrayLike | None = None) -> Any:
    """Mean over labels of `metric(positive, scores, weights)`, where it is defined; (R,) under (R, N) weights."""
    truth, scores = np.asarray(truth), np.asarray(scores)
    values = []
    for c in range(truth.shape[1]):
        rows = np.flatnonzero(truth[:, c] != UNSTATED)
        w = None if weights is None else np.asarray(weights)[:, rows]
        values.append(metric(truth[rows, c] == 1, scores[rows, c], w))
    table = np.stack(values, axis=-1)
    return metrics.mean_where(table, ~np.isnan(table))


def macro_f1(truth: ArrayLike, scores: ArrayLike, thresholds: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean F1 over the labels that have a positive, a sample being called positive from the threshold on.

    `thresholds` (L,), or one number for all; chosen on a validation split (`choose_thresholds`) or 0, where both
    prompts are equally near.
    """

    def f1(positive: NDArray[np.bool_], margin: NDArray[Any], w: ArrayLike | None) -> Any:
        table = metrics.confusion(positive, margin >= 0, 2, w)
        value = metrics.f1_per_class(table)[..., 1]
        return metrics.unwrap(np.where(table.sum(-1)[..., 1] > 0, value, np.nan))

    return macro(truth, np.asarray(scores) - np.asarray(thresholds), f1, weights)


def choose_thresholds(truth: ArrayLike, scores: ArrayLike) -> NDArray[np.float64]:
    """(L,) thresholds of the largest Youden index on a validation split; NaN where a label has one kind only."""
    truth, scores = np.asarray(truth), np.asarray(scores)
    stated = truth != UNSTATED
    return np.asarray([
        metrics.youden_threshold(truth[stated[:, c], c] == 1, scores[stated[:, c], c]) for c in range(truth.shape[1])
    ])  # fmt: skip
