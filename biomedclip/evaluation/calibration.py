"""Calibration: does a probability of 0.8 come true eight times in ten, and the temperature that makes it so.

Reads labels y (N,) and probabilities or logits (N, C), sample weights (R, N) as in metrics.py; yields errors, curves
and a temperature. A cosine is no probability: softmax of raw cosines lies between 0.4 and 0.64 for two classes, and
softmax at the model's own scale is overconfident on medical sets. So probabilities are always softmax(s z) with s
named: the model's logit scale, or divided by a temperature that `fit_temperature` finds on a validation split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biomedclip.evaluation.metrics import Floats, divide, read_weights, softmax, unwrap, weighted_mean

Bins = Literal["width", "mass"]
"""`width`: bins of equal width, closed on the right (Guo et al. 2017, section 2); `mass`: of equally many samples."""


@dataclass(frozen=True, slots=True)
class Reliability:
    """What a reliability diagram draws, one entry a bin that has samples."""

    confidence: Floats
    accuracy: Floats
    count: NDArray[np.int64]


def calibration_error(
    y: ArrayLike, probabilities: ArrayLike, weights: ArrayLike | None = None, *, bins: int = 15,
    by: Bins = "width", norm: Literal["l1", "max"] = "l1",
) -> Any:  # fmt: skip
    """Expected calibration error of the top probability: sum over bins of (n_b / N) |accuracy_b - confidence_b|.

    `by="mass"` is the adaptive error, `norm="max"` the largest gap of a bin (MCE). NaN without samples.
    """
    top, right = _top(y, probabilities)
    w, single = read_weights(weights, top.size)
    if not top.size:
        return float("nan")
    bin_of = _assign(top, bins, by)
    members = bin_of == np.unique(bin_of)[:, None]
    gaps = np.abs(np.stack([(w * ((right - top) * rows)).sum(1) for rows in members], axis=-1))
    if norm == "max":
        mass = np.stack([(w * rows).sum(1) for rows in members], axis=-1)
        error = np.where(mass > 0, divide(gaps, mass), 0).max(1)
        error = np.where(w.sum(1) > 0, error, np.nan)
    else:
        error = divide(gaps.sum(-1), w.sum(1))
    return unwrap(error[0] if single else error)


def classwise_calibration_error(y: ArrayLike, probabilities: ArrayLike, *, bins: int = 15, by: Bins = "width") -> float:
    """Mean over classes of the calibration error of that class's probability (Kull et al. 2019, eq. 3)."""
    p, labels = np.asarray(probabilities, dtype=np.float64), np.asarray(y)
    if not len(p):
        return float("nan")
    errors = []
    for c in range(p.shape[1]):
        bin_of = _assign(p[:, c], bins, by)
        gap = (labels == c) - p[:, c]
        errors.append(np.abs(np.bincount(bin_of, gap)).sum() / len(p))
    return float(np.mean(errors))


def reliability(y: ArrayLike, probabilities: ArrayLike, *, bins: int = 15, by: Bins = "width") -> Reliability:
    """Mean confidence, accuracy and number of samples of each bin of the top probability."""
    top, right = _top(y, probabilities)
    used, bin_of, count = np.unique(_assign(top, bins, by), return_inverse=True, return_counts=True)
    sums = [np.bincount(bin_of, values, minlength=len(used)) for values in (top, right.astype(np.float64))]
    return Reliability(sums[0] / np.maximum(count, 1), sums[1] / np.maximum(count, 1), count)


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


def fit_temperature(y: ArrayLike, logits: ArrayLike) -> float:
    """T that minimises the likelihood of softmax(logits / T) on a validation split (Guo et al. 2017, section 4.2).

    The likelihood is convex in 1 / T; searched over log T between 1e-4 and 1e4. Logits that put every sample right
    would have T towards 0, and a useless model T towards infinity: then the end of that range comes back. Raises
    ValueError without samples.
    """
    return fit_shared_temperature([(y, logits)])


def fit_shared_temperature(sets: Sequence[tuple[ArrayLike, ArrayLike]]) -> float:
    """One T for several sets of (y, logits), of whatever numbers of classes: the mean of their likelihoods decides, so
    that a large set counts no more than a small one. See `fit_temperature`."""
    from scipy.optimize import minimize_scalar

    wide = [(y, np.asarray(logits, dtype=np.float64)) for y, logits in sets]
    if not wide or not all(len(logits) for _, logits in wide):
        raise ValueError("a temperature needs samples")
    found = minimize_scalar(
        lambda log_t: np.mean([negative_log_likelihood(y, logits / np.exp(log_t)) for y, logits in wide]),
        bounds=(np.log(1e-4), np.log(1e4)), method="bounded", options={"xatol": 1e-8},
    )  # fmt: skip
    return float(np.exp(found.x))


def calibrate(y: ArrayLike, logits: ArrayLike, temperature: float = 1.0, *, bins: int = 15) -> dict[str, float]:
    """Every calibration number of softmax(logits / temperature): ece, ace, classwise_ece, mce, brier, nll, aurc."""
    wide = np.asarray(logits, dtype=np.float64) / temperature
    p = softmax(wide)
    return {
        "ece": calibration_error(y, p, bins=bins),
        "ace": calibration_error(y, p, bins=bins, by="mass"),
        "classwise_ece": classwise_calibration_error(y, p, bins=bins),
        "mce": calibration_error(y, p, bins=bins, norm="max"),
        "brier": brier(y, p),
        "nll": negative_log_likelihood(y, wide),
        "aurc": area_under_risk_coverage(np.asarray(y) == p.argmax(1), p.max(1)),
    }


def area_under_risk_coverage(right: ArrayLike, confidence: ArrayLike) -> float:
    """Mean error of the k most confident samples over k = 1..N (Geifman et al. 2019); samples of equal confidence
    count as their mean, so that the order of the file does not matter."""
    wrong, sure = 1 - np.asarray(right, dtype=np.float64), np.asarray(confidence)
    if not wrong.size:
        return float("nan")
    _, group, count = np.unique(-sure, return_inverse=True, return_counts=True)
    mean = np.bincount(group, wrong) / count
    risk = np.cumsum(np.repeat(mean, count)) / np.arange(1, wrong.size + 1)
    return float(risk.mean())


def _top(y: ArrayLike, probabilities: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    p = np.asarray(probabilities, dtype=np.float64)
    if not len(p):
        return np.zeros(0), np.zeros(0, dtype=bool)
    return p.max(1), p.argmax(1) == np.asarray(y)


def _assign(values: Floats, bins: int, by: Bins) -> NDArray[np.int64]:
    """Bin of each value. Equal values share a bin also by mass, whatever their order in the file."""
    if by == "width":
        return np.clip(np.ceil(values * bins).astype(np.int64) - 1, 0, bins - 1)
    first = np.searchsorted(np.sort(values), values, "left")
    return (first * bins // max(1, values.size)).astype(np.int64)
