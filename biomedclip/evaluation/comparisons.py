"""Is one model better than another: tests on the same samples, and ranks over several data sets.

Reads what two models said about the same samples, or a table of models and data sets; yields differences, p values
and groups of models that cannot be told apart. Tests are paired, because two models that see the same images err
together. Many comparisons are adjusted by Holm's step-down rule, and several data sets are compared by ranks (Demsar
2006): a mean over sets of unlike metrics would mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biomedclip.evaluation.metrics import auroc
from biomedclip.evaluation.statistics import Difference


def mcnemar(a_correct: ArrayLike, b_correct: ArrayLike) -> float:
    """Two-sided mid-p value of McNemar's exact test on the samples that exactly one of two models gets right.

    Fagerland et al. 2013: 2 P(X <= min(b, c)) - P(X = min(b, c)) for X ~ Binomial(b + c, 1/2); 1 where b = c.
    """
    a, b = np.asarray(a_correct, dtype=bool), np.asarray(b_correct, dtype=bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    total, smaller = only_a + only_b, min(only_a, only_b)
    if only_a == only_b:
        return 1.0
    log_terms = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(smaller + 1)
    ]
    terms = [math.exp(term) for term in log_terms]
    return min(1.0, 2 * math.fsum(terms) - terms[-1])


def delong(positive: ArrayLike, a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Difference:
    """Difference AUROC(b) - AUROC(a) of two scores of the same samples, with DeLong's interval and p value.

    DeLong et al. 1988, with placements from mid-ranks (Sun and Xu 2014): O(N log N). Raises ValueError without at
    least two positives and two negatives, where the variance is undefined.
    """
    positive = np.asarray(positive, dtype=bool)
    if positive.sum() < 2 or (~positive).sum() < 2:
        raise ValueError("DeLong's variance needs two positives and two negatives")
    over_negatives, over_positives = zip(*(_placements(positive, np.asarray(s)) for s in (a, b)), strict=True)
    spread = np.cov(over_negatives) / positive.sum() + np.cov(over_positives) / (~positive).sum()
    value = auroc(positive, b) - auroc(positive, a)
    error = math.sqrt(max(0.0, float(spread[0, 0] + spread[1, 1] - 2 * spread[0, 1])))
    if error == 0:
        return Difference(value=value, low=value, high=value, p=1.0 if value == 0 else 0.0, method="delong")
    width = NormalDist().inv_cdf((1 + level) / 2) * error
    p = math.erfc(abs(value) / error / math.sqrt(2))
    return Difference(value=value, low=value - width, high=value + width, p=p, method="delong")


def _placements(positive: NDArray[np.bool_], scores: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """For each positive the share of negatives below it, for each negative the share of positives above it."""
    high, low = np.sort(scores[positive]), np.sort(scores[~positive])
    below = _midpoint(low, scores[positive]) / low.size
    above = 1 - _midpoint(high, scores[~positive]) / high.size
    return below, above


def _midpoint(ordered: NDArray[Any], values: NDArray[Any]) -> NDArray[np.float64]:
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / 2


def paired_permutation(
    metric: Callable[[NDArray[Any]], float], a: ArrayLike, b: ArrayLike, *,
    groups: Sequence[str] | None = None, permutations: int = 10_000, seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """metric(b) - metric(a) and its two-sided p value, when which model said what is swapped at random.

    `a` and `b` (N, ...) are scores or predictions of the same samples in one order. A swap concerns a whole group
    where groups are given: its samples are not independent. p = (#{|d*| >= |d|} + 1) / (permutations + 1); all 2^G
    swaps are tried, and nothing added, where there are no more of them than that.
    """
    first, second = np.asarray(a), np.asarray(b)
    unit = np.unique(np.asarray(groups), return_inverse=True)[1] if groups is not None else np.arange(len(first))
    num_units = int(unit.max(initial=-1)) + 1
    observed = metric(second) - metric(first)
    if math.isnan(observed):
        return observed, float("nan")
    exhaustive = num_units < 30 and 2**num_units <= permutations
    rounds = 2**num_units if exhaustive else permutations
    rng = np.random.default_rng(seed)
    hits = 0
    for number in range(rounds):
        swap = (number >> np.arange(num_units)) & 1 if exhaustive else rng.integers(0, 2, num_units)
        mask = swap[unit].astype(bool).reshape(-1, *[1] * (first.ndim - 1))
        drawn = metric(np.where(mask, first, second)) - metric(np.where(mask, second, first))
        # A rounding apart is equal: sums in another order differ in the last digit.
        hits += abs(drawn) >= abs(observed) - 1e-12
    return observed, hits / rounds if exhaustive else (hits + 1) / (rounds + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given; NaN stays NaN and counts as no test."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, running = [float("nan")] * len(p_values), 0.0
    for position, i in enumerate(order):
        running = max(running, min(1.0, p_values[i] * (len(order) - position)))
        adjusted[i] = running
    return adjusted


@dataclass(frozen=True, slots=True, kw_only=True)
class RankComparison:
    """Models over data sets: mean ranks (1 is best), Friedman's test and Nemenyi's critical difference."""

    mean_ranks: dict[str, float]
    num_sets: int
    statistic: float
    p: float
    critical_difference: float
    alike: tuple[tuple[str, ...], ...]
    """Largest groups of models whose mean ranks lie within the critical difference, best first."""
    reason: str | None = None


def compare_ranks(values: ArrayLike, models: Sequence[str], *, alpha: float = 0.05) -> RankComparison:
    """Ranks of models over data sets; `values` (sets, models), higher is better, one metric in each row.

    Rows with a missing value are left out, as a rank among fewer is another thing. Friedman's chi-square with ties
    (Conover 1999) and Nemenyi's CD = q sqrt(k (k + 1) / 6 n) with q of the studentised range over sqrt 2 (Demsar
    2006, section 3.2.2). NaN with a reason for fewer than two models or two sets.
    """
    from scipy.stats import chi2, rankdata, studentized_range

    table = np.asarray(values, dtype=np.float64)
    table = table[~np.isnan(table).any(axis=1)]
    n, k = table.shape[0], len(models)
    ranks = rankdata(-table, axis=1) if n else np.zeros((0, k))
    means = ranks.mean(0) if n else np.full(k, np.nan)
    named = {model: float(mean) for model, mean in zip(models, means, strict=True)}
    if n < 2 or k < 2:
        missing, reason = float("nan"), f"{k} models on {n} sets have no ranks to test"
        return RankComparison(mean_ranks=named, num_sets=n, statistic=missing, p=missing,
                              critical_difference=missing, alike=(), reason=reason)  # fmt: skip
    spread = float((ranks**2).sum()) - n * k * (k + 1) ** 2 / 4
    between = float(((ranks.sum(0) - n * (k + 1) / 2) ** 2).sum())
    statistic = (k - 1) * between / spread if spread > 0 else 0.0
    width = float(studentized_range.ppf(1 - alpha, k, np.inf)) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * n))
    return RankComparison(
        mean_ranks=named, num_sets=n, statistic=statistic, p=float(chi2.sf(statistic, k - 1)),
        critical_difference=width, alike=_find_alike(named, width),
    )  # fmt: skip


def _find_alike(ranks: dict[str, float], width: float) -> tuple[tuple[str, ...], ...]:
    """Maximal runs of the ordered models that span no more than `width`."""
    names = sorted(ranks, key=ranks.__getitem__)
    runs: list[tuple[str, ...]] = []
    for start, first in enumerate(names):
        run = tuple(name for name in names[start:] if ranks[name] - ranks[first] <= width)
        if len(run) > 1 and not (runs and set(run) <= set(runs[-1])):
            runs.append(run)
    return tuple(runs)
