"""Grades: classes with an order, where a near miss is less wrong than a far one.

Reads grades y (N,) from 0 and probabilities (N, C) in the order of the grades; yields the expected grade and metrics
that know distance. Plain accuracy calls "moderate" for "severe" as wrong as for "none"; quadratic kappa, the mean
absolute error and the share at most one grade off do not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biomedclip.evaluation import metrics


def expected_grade(probabilities: ArrayLike) -> NDArray[np.float64]:
    """(N,) sum over grades of grade x probability, between 0 and C - 1."""
    wide = np.asarray(probabilities, dtype=np.float64)
    return wide @ np.arange(wide.shape[1])


def round_grade(expected: ArrayLike, num_grades: int) -> NDArray[np.int64]:
    """(N,) the nearest grade; halves go up, as nobody wants them to go to the even one."""
    return np.clip(np.floor(np.asarray(expected, dtype=np.float64) + 0.5), 0, num_grades - 1).astype(np.int64)


def quadratic_kappa(y: ArrayLike, grades: ArrayLike, num_grades: int, weights: ArrayLike | None = None) -> Any:
    """Cohen's kappa with weights (i - j)^2; NaN where chance agreement is certain."""
    return metrics.kappa(metrics.confusion(y, grades, num_grades, weights), "quadratic")


def mean_absolute_error(y: ArrayLike, grades: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean distance in grades; `grades` may be expected grades."""
    return metrics.weighted_mean(np.abs(np.asarray(grades, dtype=np.float64) - np.asarray(y)), weights)


def within_one(y: ArrayLike, grades: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Share of samples at most one grade off."""
    return metrics.weighted_mean(np.abs(np.asarray(grades) - np.asarray(y)) <= 1, weights)


def rank_correlation(y: ArrayLike, expected: ArrayLike) -> float:
    """Kendall's tau-b of grade and expected grade; NaN where either is constant."""
    from scipy.stats import kendalltau

    if len(np.unique(y)) < 2 or len(np.unique(expected)) < 2:
        return float("nan")
    return float(kendalltau(y, expected).statistic)
