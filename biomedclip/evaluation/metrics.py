"""Metrics as pure numpy functions of labels, scores and, optionally, sample weights.

Reads labels y (N,), predictions or scores, and weights (R, N); yields one float, or R of them. The weights are what a
reader would question: a bootstrap resample is a vector of counts, so taking (R, N) counts lets statistics.py evaluate
thousands of resamples in a few array operations, with the same code, and therefore the same definition, that gives
the point value. Without weights every sample counts once. A metric that is undefined is NaN, never 0 or 0.5;
`explain_undefined` says why. Ties are exact: mid-ranks in AUROC, one threshold per distinct score in AUPRC, half a
place for each tied competitor in retrieval. A NaN score is refused: it compares false to everything, and would rank
first or last without a word. Calibration is in calibration.py, other kinds of answers (several labels, grades, options)
in multilabel.py, ordinal.py and options.py.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
_ROUNDING = 1e-12
"""Rates are quotients: 0.9 asked for must find 9/10."""


def confusion(y: ArrayLike, predicted: ArrayLike, num_classes: int, weights: ArrayLike | None = None) -> Floats:
    """(C, C) counts, row true class and column predicted class; (R, C, C) for (R, N) weights."""
    cell = np.asarray(y, dtype=np.int64) * num_classes + np.asarray(predicted, dtype=np.int64)
    w, single = read_weights(weights, cell.size)
    table = np.zeros((len(w), num_classes * num_classes))
    if cell.size:
        order = np.argsort(cell, kind="stable")
        cells, starts = np.unique(cell[order], return_index=True)
        table[:, cells] = np.add.reduceat(w[:, order], starts, axis=1)
    tables = table.reshape(-1, num_classes, num_classes)
    return tables[0] if single else tables


def accuracy(y: ArrayLike, predicted: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Share of samples whose prediction is the label."""
    return weighted_mean(np.asarray(y) == np.asarray(predicted), weights)


def balanced_accuracy(table: ArrayLike) -> Any:
    """Mean recall over the classes present in y, from a confusion table (..., C, C)."""
    table = np.asarray(table, dtype=np.float64)
    support = table.sum(-1)
    return mean_where(divide(np.diagonal(table, axis1=-2, axis2=-1), support), support > 0)


def recall_per_class(table: ArrayLike) -> Floats:
    """(..., C) recall of each class; NaN where y has none of it."""
    table = np.asarray(table, dtype=np.float64)
    return divide(np.diagonal(table, axis1=-2, axis2=-1), table.sum(-1))


def precision_per_class(table: ArrayLike) -> Floats:
    """(..., C) precision of each class; NaN where it is never predicted."""
    table = np.asarray(table, dtype=np.float64)
    return divide(np.diagonal(table, axis1=-2, axis2=-1), table.sum(-2))


def f1_per_class(table: ArrayLike) -> Floats:
    """(..., C) F1 of each class; 0 for one that is there and never predicted, NaN for one that is neither."""
    table = np.asarray(table, dtype=np.float64)
    return divide(2 * np.diagonal(table, axis1=-2, axis2=-1), table.sum(-1) + table.sum(-2))


def macro_f1(table: ArrayLike) -> Any:
    """Mean F1 over the classes present in y; a class that is never predicted counts 0 (zero_division=0)."""
    return mean_where(f1_per_class(table), np.asarray(table).sum(-1) > 0)


def weighted_f1(table: ArrayLike) -> Any:
    """Mean F1 weighted by how often y has each class."""
    support = np.asarray(table, dtype=np.float64).sum(-1)
    return unwrap(divide((np.where(support > 0, f1_per_class(table), 0) * support).sum(-1), support.sum(-1)))


def mcc(table: ArrayLike) -> Any:
    """Matthews correlation of C classes (Gorodkin 2004, eq. 8); NaN where y or the predictions have one class only."""
    table = np.asarray(table, dtype=np.float64)
    true, guessed = table.sum(-1), table.sum(-2)
    total, hits = true.sum(-1), np.trace(table, axis1=-2, axis2=-1)
    covariance = hits * total - (true * guessed).sum(-1)
    spread = (total**2 - (true**2).sum(-1)) * (total**2 - (guessed**2).sum(-1))
    return unwrap(divide(covariance, np.sqrt(np.maximum(spread, 0))))


def kappa(table: ArrayLike, disagreement: Literal["none", "linear", "quadratic"] = "none") -> Any:
    """Cohen's kappa, 1 - sum(w O) / sum(w E); w is 0/1, |i-j| or (i-j)^2; NaN where chance agreement is certain."""
    table = np.asarray(table, dtype=np.float64)
    distance = np.abs(np.subtract.outer(np.arange(table.shape[-1]), np.arange(table.shape[-1]))).astype(np.float64)
    power = {"none": np.sign(distance), "linear": distance, "quadratic": distance**2}[disagreement]
    total = table.sum((-2, -1), keepdims=True)
    expected = divide(table.sum(-1, keepdims=True) * table.sum(-2, keepdims=True), total)
    return unwrap(1 - divide((power * table).sum((-2, -1)), (power * expected).sum((-2, -1))))


def auroc(positive: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Area under the ROC curve (Mann-Whitney with mid-ranks): P(score+ > score-) + P(equal) / 2.

    `positive` (N,) bool, `scores` (N,) higher means positive. NaN without a positive or without a negative. Raises
    ValueError for NaN scores.
    """
    plus, minus, single = _tie_groups(positive, scores, weights, merge=True)
    below = np.cumsum(minus, axis=1) - minus / 2
    area = divide((plus * below).sum(1), plus.sum(1) * minus.sum(1))
    return unwrap(area[0] if single else area)


def auroc_per_class(y: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """One-vs-rest AUROC of each column of `scores` (N, C): (C,), or (R, C) for (R, N) weights."""
    y, scores = np.asarray(y), np.asarray(scores)
    return np.stack([auroc(y == c, scores[:, c], weights) for c in range(scores.shape[1])], axis=-1)


def macro_auroc(y: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean one-vs-rest AUROC over the classes for which it is defined; for two classes AUROC of score 1 - score 0.

    A two-class zero-shot score is the difference of two cosines: either column alone would rank images by how much
    they resemble any prompt at all.
    """
    scores = np.asarray(scores)
    if scores.shape[1] == 2:
        return auroc(np.asarray(y) == 1, difference(scores), weights)
    per_class = auroc_per_class(y, scores, weights)
    return mean_where(per_class, ~np.isnan(per_class))


def micro_auroc(y: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """AUROC of all (sample, class) cells in one ranking. Large wherever classes are many, so never a headline."""
    y, scores = np.asarray(y), np.asarray(scores)
    cells = y[:, None] == np.arange(scores.shape[1])
    repeated = None if weights is None else np.repeat(np.asarray(weights), scores.shape[1], axis=1)
    return auroc(cells.ravel(), scores.ravel(), repeated)


def pairwise_auroc(y: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean over pairs of classes of (A(i|j) + A(j|i)) / 2 (Hand and Till 2001, eq. 7), over pairs that y has."""
    y, scores = np.asarray(y), np.asarray(scores)
    areas = []
    for i, j in itertools.combinations(range(scores.shape[1]), 2):
        rows = np.flatnonzero((y == i) | (y == j))
        w = None if weights is None else np.asarray(weights)[:, rows]
        areas += [auroc(y[rows] == i, scores[rows, i], w), auroc(y[rows] == j, scores[rows, j], w)]
    table = np.stack(areas, axis=-1)
    return mean_where(table, ~np.isnan(table))


def sensitivity_at(positive: ArrayLike, scores: ArrayLike, specificity: float, weights: ArrayLike | None = None) -> Any:
    """Largest sensitivity at a threshold whose specificity is at least `specificity`; no interpolation between them."""
    true_rate, false_rate, single = _rates(positive, scores, weights)
    best = np.where(1 - false_rate >= specificity - _ROUNDING, true_rate, 0).max(1)
    best = np.where(np.isnan(true_rate[:, -1] + false_rate[:, -1]), np.nan, best)
    return unwrap(best[0] if single else best)


def specificity_at(positive: ArrayLike, scores: ArrayLike, sensitivity: float, weights: ArrayLike | None = None) -> Any:
    """Largest specificity at a threshold whose sensitivity is at least `sensitivity`."""
    true_rate, false_rate, single = _rates(positive, scores, weights)
    best = np.where(true_rate >= sensitivity - _ROUNDING, 1 - false_rate, 0).max(1)
    best = np.where(np.isnan(true_rate[:, -1] + false_rate[:, -1]), np.nan, best)
    return unwrap(best[0] if single else best)


def roc_curve(positive: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """False positive rate, true positive rate and threshold (T,), from "nothing is positive" (infinity) downwards."""
    true_rate, false_rate, _ = _rates(positive, scores, None)
    return false_rate[0], true_rate[0], np.r_[np.inf, np.unique(np.asarray(scores, dtype=np.float64))[::-1]]


def youden_threshold(positive: ArrayLike, scores: ArrayLike) -> float:
    """The score from which on a sample is called positive so that sensitivity + specificity is largest; NaN where
    one of them is undefined. A choice, so it is made on a validation split, never on the one that is scored."""
    false_rate, true_rate, thresholds = roc_curve(positive, scores)
    if np.isnan(false_rate[-1] + true_rate[-1]):
        return float("nan")
    return float(thresholds[np.argmax(true_rate - false_rate)])


def _rates(positive: ArrayLike, scores: ArrayLike, weights: ArrayLike | None) -> tuple[Floats, Floats, bool]:
    """(R, T + 1) true and false positive rates at each threshold, none first; NaN where there is none of a kind."""
    plus, minus, single = _tie_groups(positive, scores, weights)
    start = np.zeros((len(plus), 1))
    hits, alarms = (np.hstack([start, np.cumsum(part[:, ::-1], axis=1)]) for part in (plus, minus))
    return divide(hits, hits[:, -1:]), divide(alarms, alarms[:, -1:]), single


def average_precision(positive: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """AUPRC as sum over distinct thresholds of (R_n - R_{n-1}) P_n, without interpolation; NaN without a positive."""
    plus, minus, single = _tie_groups(positive, scores, weights)
    plus, minus = plus[:, ::-1], minus[:, ::-1]
    hits, taken = np.cumsum(plus, axis=1), np.cumsum(plus + minus, axis=1)
    precision = np.divide(hits, taken, out=np.zeros_like(hits), where=taken > 0)
    area = divide((plus * precision).sum(1), plus.sum(1))
    return unwrap(area[0] if single else area)


def macro_average_precision(y: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean one-vs-rest AUPRC over the classes present; for two classes that of class 1 by score 1 - score 0."""
    y, scores = np.asarray(y), np.asarray(scores)
    if scores.shape[1] == 2:
        return average_precision(y == 1, difference(scores), weights)
    columns = [average_precision(y == c, scores[:, c], weights) for c in range(scores.shape[1])]
    per_class = np.stack(columns, axis=-1)
    return mean_where(per_class, ~np.isnan(per_class))


def difference(scores: ArrayLike) -> Floats:
    """(N,) score of class 1 minus score of class 0 in float64, where two float32 cosines differ exactly."""
    wide = np.asarray(scores, dtype=np.float64)
    return wide[:, 1] - wide[:, 0]


def softmax(logits: ArrayLike) -> Floats:
    """Rows (N, C) as probabilities; the largest logit is taken off first, so nothing overflows."""
    wide = np.asarray(logits, dtype=np.float64)
    raised = np.exp(wide - wide.max(axis=1, keepdims=True, initial=-np.inf))
    return raised / raised.sum(axis=1, keepdims=True)


def recall_at(ranks: ArrayLike, k: int, weights: ArrayLike | None = None) -> Any:
    """Share of queries whose best positive has rank <= k; a rank counts tied competitors half (retrieval.py)."""
    return weighted_mean(np.asarray(ranks) <= k, weights)


def mean_reciprocal_rank(ranks: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean of 1 / rank of the best positive."""
    return weighted_mean(1 / np.asarray(ranks, dtype=np.float64), weights)


def median_rank(ranks: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Median rank of the best positive; the mean of the two middle ones for an even number of queries."""
    ranks = np.asarray(ranks, dtype=np.float64)
    w, single = read_weights(weights, ranks.size)
    if not ranks.size:
        return float("nan")
    order = np.argsort(ranks, kind="stable")
    mass = np.cumsum(w[:, order], axis=1)
    half = mass[:, -1:] / 2
    lower = np.argmax(mass >= half, axis=1)
    upper = np.argmax(mass > half, axis=1)
    middle = (ranks[order][lower] + ranks[order][upper]) / 2
    return unwrap(middle[0] if single else middle)


def weighted_mean(values: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean of (N,) values: a float, or (R,) means under (R, N) weights; NaN without samples."""
    values = np.asarray(values, dtype=np.float64)
    w, single = read_weights(weights, values.size)
    mean = divide(w @ values, w.sum(1))
    return unwrap(mean[0] if single else mean)


def explain_undefined(y: ArrayLike, num_classes: int) -> str | None:
    """Why a metric of y may be NaN: `no samples`, or which classes y lacks; None where y has every class."""
    counts = np.bincount(np.asarray(y, dtype=np.int64), minlength=num_classes)
    if not counts.sum():
        return "no samples"
    present = np.flatnonzero(counts)
    if len(present) == 1:
        return f"all samples are of class {present[0]}"
    absent = np.flatnonzero(counts == 0)
    return f"no sample of class {', '.join(map(str, absent))}" if absent.size else None


def read_weights(weights: ArrayLike | None, size: int) -> tuple[Floats, bool]:
    """(R, N) weights in float64, and whether there were none (then they are one row of ones)."""
    if weights is None:
        return np.ones((1, size)), True
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 2 or w.shape[1] != size:
        raise ValueError(f"weights must be (R, {size}), not {w.shape}")
    return w, False


def _tie_groups(
    positive: ArrayLike, scores: ArrayLike, weights: ArrayLike | None, *, merge: bool = False
) -> tuple[Floats, Floats, bool]:
    """Weight of positives and of negatives at each distinct score, ascending: two (R, T).

    `merge` joins neighbouring scores that have none of the rarer kind. That changes no count of ordered pairs, and
    shrinks T from N to about twice the rarer kind: what makes thousands of resamples of many classes affordable.
    """
    positive, scores = np.asarray(positive, dtype=bool), np.asarray(scores)
    w, single = read_weights(weights, scores.size)
    if not scores.size:
        return np.zeros((len(w), 0)), np.zeros((len(w), 0)), single
    if np.isnan(scores).any():
        raise ValueError(f"scores are NaN in rows {np.flatnonzero(np.isnan(scores))[:5].tolist()}")
    order = np.argsort(scores, kind="stable")
    ordered, is_positive = scores[order], positive[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    rare = is_positive if 2 * int(is_positive.sum()) <= is_positive.size else ~is_positive
    if merge:
        has_rare = np.logical_or.reduceat(rare, starts)
        starts = starts[has_rare | np.r_[True, has_rare[:-1]]]
    w = w[:, order]
    total, part = np.add.reduceat(w, starts, axis=1), np.zeros((len(w), len(starts)))
    where = np.flatnonzero(rare)
    if where.size:
        groups, first = np.unique(np.searchsorted(starts, where, "right") - 1, return_index=True)
        part[:, groups] = np.add.reduceat(w[:, where], first, axis=1)
    return (part, total - part, single) if rare is is_positive else (total - part, part, single)


def divide(numerator: ArrayLike, denominator: ArrayLike) -> Floats:
    """numerator / denominator with NaN, without a warning, where the denominator is 0."""
    top, bottom = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)


def mean_where(values: Floats, valid: NDArray[np.bool_]) -> Any:
    """Mean over the last axis of the valid entries; NaN where none is."""
    return unwrap(divide(np.where(valid, values, 0).sum(-1), valid.sum(-1)))


def unwrap(value: Any) -> Any:
    """A float in place of an array without axes."""
    return float(value) if np.ndim(value) == 0 else value
