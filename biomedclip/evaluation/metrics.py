"""Metrics as pure numpy functions of labels, scores and, optionally, sample weights.

Reads labels y (N,), predictions or scores, and weights (R, N); yields one float, or R of them. The weights are what a
reader would question: a bootstrap resample is a vector of counts, so taking (R, N) counts lets statistics.py evaluate
thousands of resamples in a few array operations, with the same code, and therefore the same definition, that gives
the point value. Without weights every sample counts once. A metric that is undefined is NaN, never 0 or 0.5;
`explain_undefined` says why. Ties are exact: mid-ranks in AUROC, one threshold per distinct score in AUPRC, half a
place for each tied competitor in retrieval.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def confusion(y: ArrayLike, predicted: ArrayLike, num_classes: int, weights: ArrayLike | None = None) -> Floats:
    """(C, C) counts, row true class and column predicted class; (R, C, C) for (R, N) weights."""
    cell = np.asarray(y, dtype=np.int64) * num_classes + np.asarray(predicted, dtype=np.int64)
    w, single = _weights(weights, cell.size)
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
    return _mean_where(_divide(np.diagonal(table, axis1=-2, axis2=-1), support), support > 0)


def recall_per_class(table: ArrayLike) -> Floats:
    """(..., C) recall of each class; NaN where y has none of it."""
    table = np.asarray(table, dtype=np.float64)
    return _divide(np.diagonal(table, axis1=-2, axis2=-1), table.sum(-1))


def macro_f1(table: ArrayLike) -> Any:
    """Mean F1 over the classes present in y; a class that is never predicted counts 0 (zero_division=0)."""
    table = np.asarray(table, dtype=np.float64)
    support, hits = table.sum(-1), np.diagonal(table, axis1=-2, axis2=-1)
    return _mean_where(_divide(2 * hits, support + table.sum(-2)), support > 0)


def mcc(table: ArrayLike) -> Any:
    """Matthews correlation of C classes (Gorodkin 2004, eq. 8); NaN where y or the predictions have one class only."""
    table = np.asarray(table, dtype=np.float64)
    true, guessed = table.sum(-1), table.sum(-2)
    total, hits = true.sum(-1), np.trace(table, axis1=-2, axis2=-1)
    covariance = hits * total - (true * guessed).sum(-1)
    spread = (total**2 - (true**2).sum(-1)) * (total**2 - (guessed**2).sum(-1))
    return _scalar(_divide(covariance, np.sqrt(np.maximum(spread, 0))))


def kappa(table: ArrayLike, disagreement: Literal["none", "linear", "quadratic"] = "none") -> Any:
    """Cohen's kappa, 1 - sum(w O) / sum(w E); w is 0/1, |i-j| or (i-j)^2; NaN where chance agreement is certain."""
    table = np.asarray(table, dtype=np.float64)
    distance = np.abs(np.subtract.outer(np.arange(table.shape[-1]), np.arange(table.shape[-1]))).astype(np.float64)
    power = {"none": np.sign(distance), "linear": distance, "quadratic": distance**2}[disagreement]
    total = table.sum((-2, -1), keepdims=True)
    expected = _divide(table.sum(-1, keepdims=True) * table.sum(-2, keepdims=True), total)
    return _scalar(1 - _divide((power * table).sum((-2, -1)), (power * expected).sum((-2, -1))))


def auroc(positive: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Area under the ROC curve (Mann-Whitney with mid-ranks): P(score+ > score-) + P(equal) / 2.

    `positive` (N,) bool, `scores` (N,) higher means positive. NaN without a positive or without a negative.
    """
    plus, minus, single = _tie_groups(positive, scores, weights)
    below = np.cumsum(minus, axis=1) - minus / 2
    area = _divide((plus * below).sum(1), plus.sum(1) * minus.sum(1))
    return _scalar(area[0] if single else area)


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
    return _mean_where(per_class, ~np.isnan(per_class))


def average_precision(positive: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """AUPRC as sum over distinct thresholds of (R_n - R_{n-1}) P_n, without interpolation; NaN without a positive."""
    plus, minus, single = _tie_groups(positive, scores, weights)
    plus, minus = plus[:, ::-1], minus[:, ::-1]
    hits, taken = np.cumsum(plus, axis=1), np.cumsum(plus + minus, axis=1)
    precision = np.divide(hits, taken, out=np.zeros_like(hits), where=taken > 0)
    area = _divide((plus * precision).sum(1), plus.sum(1))
    return _scalar(area[0] if single else area)


def macro_average_precision(y: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean one-vs-rest AUPRC over the classes present; for two classes that of class 1 by score 1 - score 0."""
    y, scores = np.asarray(y), np.asarray(scores)
    if scores.shape[1] == 2:
        return average_precision(y == 1, difference(scores), weights)
    columns = [average_precision(y == c, scores[:, c], weights) for c in range(scores.shape[1])]
    per_class = np.stack(columns, axis=-1)
    return _mean_where(per_class, ~np.isnan(per_class))


def difference(scores: ArrayLike) -> Floats:
    """(N,) score of class 1 minus score of class 0 in float64, where two float32 cosines differ exactly."""
    wide = np.asarray(scores, dtype=np.float64)
    return wide[:, 1] - wide[:, 0]


def softmax(logits: ArrayLike) -> Floats:
    """Rows (N, C) as probabilities; the largest logit is taken off first, so nothing overflows."""
    wide = np.asarray(logits, dtype=np.float64)
    raised = np.exp(wide - wide.max(axis=1, keepdims=True, initial=-np.inf))
    return raised / raised.sum(axis=1, keepdims=True)


def calibration_error(
    y: ArrayLike, probabilities: ArrayLike, weights: ArrayLike | None = None, *, bins: int = 15
) -> Any:
    """Expected calibration error: sum over bins of (n_b / N) |accuracy_b - confidence_b|.

    Equal-width bins of the top probability, closed on the right (Guo et al. 2017, section 2).
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    w, single = _weights(weights, len(probabilities))
    if not len(probabilities):
        return float("nan")
    top = probabilities.max(1)
    gap = (probabilities.argmax(1) == np.asarray(y)) - top
    bin_of = np.clip(np.ceil(top * bins).astype(int) - 1, 0, bins - 1)
    sums = np.stack([(w * (gap * (bin_of == b))).sum(1) for b in np.unique(bin_of)], axis=-1)
    error = _divide(np.abs(sums).sum(-1), w.sum(1))
    return _scalar(error[0] if single else error)


def brier(y: ArrayLike, probabilities: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Brier score, mean over samples of sum over classes of (p - 1[y = c])^2: 0 to 2."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    truth = np.asarray(y)[:, None] == np.arange(probabilities.shape[1])
    return weighted_mean(((probabilities - truth) ** 2).sum(1), weights)


def negative_log_likelihood(y: ArrayLike, logits: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean of -log softmax(logits)[y], in nats, from logits so that a certain mistake stays finite."""
    wide = np.asarray(logits, dtype=np.float64)
    if not len(wide):
        return float("nan")
    top = wide.max(1)
    log_sum = top + np.log(np.exp(wide - top[:, None]).sum(1))
    return weighted_mean(log_sum - wide[np.arange(len(wide)), np.asarray(y)], weights)


def recall_at(ranks: ArrayLike, k: int, weights: ArrayLike | None = None) -> Any:
    """Share of queries whose best positive has rank <= k; a rank counts tied competitors half (retrieval.py)."""
    return weighted_mean(np.asarray(ranks) <= k, weights)


def mean_reciprocal_rank(ranks: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean of 1 / rank of the best positive."""
    return weighted_mean(1 / np.asarray(ranks, dtype=np.float64), weights)


def median_rank(ranks: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Median rank of the best positive; the mean of the two middle ones for an even number of queries."""
    ranks = np.asarray(ranks, dtype=np.float64)
    w, single = _weights(weights, ranks.size)
    if not ranks.size:
        return float("nan")
    order = np.argsort(ranks, kind="stable")
    mass = np.cumsum(w[:, order], axis=1)
    half = mass[:, -1:] / 2
    lower = np.argmax(mass >= half, axis=1)
    upper = np.argmax(mass > half, axis=1)
    middle = (ranks[order][lower] + ranks[order][upper]) / 2
    return _scalar(middle[0] if single else middle)


def weighted_mean(values: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean of (N,) values: a float, or (R,) means under (R, N) weights; NaN without samples."""
    values = np.asarray(values, dtype=np.float64)
    w, single = _weights(weights, values.size)
    mean = _divide(w @ values, w.sum(1))
    return _scalar(mean[0] if single else mean)


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


def _weights(weights: ArrayLike | None, size: int) -> tuple[Floats, bool]:
    if weights is None:
        return np.ones((1, size)), True
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 2 or w.shape[1] != size:
        raise ValueError(f"weights must be (R, {size}), not {w.shape}")
    return w, False


def _tie_groups(positive: ArrayLike, scores: ArrayLike, weights: ArrayLike | None) -> tuple[Floats, Floats, bool]:
    """Weight of positives and of negatives at each distinct score, ascending: two (R, T)."""
    positive, scores = np.asarray(positive, dtype=bool), np.asarray(scores)
    w, single = _weights(weights, scores.size)
    if not scores.size:
        return np.zeros((len(w), 0)), np.zeros((len(w), 0)), single
    order = np.argsort(scores, kind="stable")
    _, starts = np.unique(scores[order], return_index=True)
    w, is_positive = w[:, order], positive[order]
    plus = np.add.reduceat(w * is_positive, starts, axis=1)
    minus = np.add.reduceat(w * ~is_positive, starts, axis=1)
    return plus, minus, single


def _divide(numerator: ArrayLike, denominator: ArrayLike) -> Floats:
    """numerator / denominator with NaN, without a warning, where the denominator is 0."""
    top, bottom = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)


def _mean_where(values: Floats, valid: NDArray[np.bool_]) -> Any:
    """Mean over the last axis of the valid entries; NaN where none is."""
    return _scalar(_divide(np.where(valid, values, 0).sum(-1), valid.sum(-1)))


def _scalar(value: Any) -> Any:
    return float(value) if np.ndim(value) == 0 else value
