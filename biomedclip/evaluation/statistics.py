"""Intervals and tests: how far a number would move had other patients, slides or articles been drawn.

Reads statistics as functions of (R, N) sample counts (metrics.py) together with the labels and group ids of the
samples; yields percentile intervals, paired differences and p values. Two choices to question. Samples of one group
(patient, slide, article) are resampled together whenever groups are known, because they are not independent; else
each class is resampled by itself, which keeps its size as the test set fixed it. A resample that lacks a class the
data has is drawn again and counted: it has no balanced accuracy of the same kind. Everything is a function of the
seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biomedclip.evaluation.metrics import auroc

Statistic = Callable[["NDArray[np.float64] | None"], Any]
"""`statistic(None)` is the value on the data, `statistic((R, N) counts)` the (R,) values on R resamples."""

_BLOCK_CELLS = 4_000_000
"""Counts held at once, 32 MB: more gains no speed and would grow with the test set."""
_MAX_REDRAWS_PER_RESAMPLE = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A confidence interval; `low` and `high` are NaN where `reason` says why there is none."""

    low: float
    high: float
    method: str
    level: float
    resamples: int
    redrawn: int = 0
    """Resamples thrown away because they lacked a class."""
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A paired difference b - a with its interval and two-sided p value."""

    value: float
    low: float
    high: float
    p: float
    method: str
    redrawn: int = 0


class Resampler:
    """Draws (R, N) counts of bootstrap resamples, in blocks; the same seed draws the same ones, however often asked.

    `y` (N,) gives the strata, or None for one stratum; `groups` (N,) resamples whole groups instead.
    """

    def __init__(
        self, size: int, *, y: ArrayLike | None = None, groups: Sequence[str] | None = None,
        resamples: int = 2000, seed: int = 0,
    ) -> None:  # fmt: skip
        self.size, self.resamples, self.seed, self.redrawn = size, resamples, seed, 0
        strata = np.zeros(size, dtype=np.int64) if y is None else np.asarray(y)
        self._strata = [np.flatnonzero(strata == value) for value in np.unique(strata)]
        names, index = np.unique(np.asarray(groups if groups is not None else []), return_inverse=True)
        self._group_of = index if groups is not None and len(names) < size else None
        self.num_units = len(names) if groups is not None else size
        if groups is not None:
            self.method = "bootstrap-percentile-group"
        else:
            self.method = "bootstrap-percentile" + ("-stratified" if len(self._strata) > 1 else "")
        self._by_group = groups is not None

    def draw(self) -> Iterator[NDArray[np.float64]]:
        """Blocks of (R, N) counts, `resamples` rows in all. Raises ValueError where classes keep going missing."""
        rng = np.random.default_rng(self.seed)
        self.redrawn, left = 0, self.resamples
        block = max(1, min(self.resamples, _BLOCK_CELLS // max(1, self.size)))
        while left:
            counts = self._draw_block(rng, min(block, left))
            complete = np.all([counts[:, rows].sum(1) > 0 for rows in self._strata], axis=0)
            self.redrawn += int((~complete).sum())
            if self.redrawn > _MAX_REDRAWS_PER_RESAMPLE * self.resamples:
                raise ValueError("a class is in so few groups that almost every resample lacks it")
            left -= int(complete.sum())
            if complete.any():
                yield counts[complete]

    def _draw_block(self, rng: np.random.Generator, rows: int) -> NDArray[np.float64]:
        if self._by_group:
            counts = _count_draws(rng, rows, self.num_units)
            return counts if self._group_of is None else counts[:, self._group_of]
        counts = np.zeros((rows, self.size))
        for stratum in self._strata:
            counts[:, stratum] = _count_draws(rng, rows, stratum.size)
        return counts


def _count_draws(rng: np.random.Generator, rows: int, size: int) -> NDArray[np.float64]:
    """(rows, size) how often each of `size` units is drawn in `size` draws with replacement."""
    draws = rng.integers(0, size, (rows, size), dtype=np.int64) + np.arange(rows)[:, None] * size
    return np.bincount(draws.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)


def bootstrap(statistics: Mapping[str, Statistic], resampler: Resampler, *, level: float = 0.95) -> dict[str, Interval]:
    """A percentile interval for each statistic, all from the same resamples.

    Quantiles (1 - level) / 2 and (1 + level) / 2 by linear interpolation. A statistic that is NaN on the data, or a
    data set of fewer than two independent units, has an interval of NaN with the reason.
    """
    facts = {"method": resampler.method, "level": level, "resamples": resampler.resamples}
    missing = float("nan")

    def refuse(reason: str) -> Interval:
        return Interval(low=missing, high=missing, reason=reason, redrawn=resampler.redrawn, **facts)  # type: ignore[arg-type]

    if resampler.num_units < 2:
        return {name: refuse(f"{resampler.num_units} independent unit(s)") for name in statistics}
    values: dict[str, list[NDArray[np.float64]]] = {name: [] for name in statistics}
    try:
        for counts in resampler.draw():
            for name, statistic in statistics.items():
                values[name].append(statistic(counts))
    except ValueError as error:
        return {name: refuse(str(error)) for name in statistics}
    intervals = {}
    for name, parts in values.items():
        drawn = np.concatenate(parts)
        if np.isnan(drawn).any():
            intervals[name] = refuse(f"undefined on {int(np.isnan(drawn).sum())} of {drawn.size} resamples")
            continue
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        intervals[name] = Interval(low=float(low), high=float(high), redrawn=resampler.redrawn, **facts)  # type: ignore[arg-type]
    return intervals


def bound_flawless(sizes: Sequence[int], level: float = 0.95) -> float:
    """Lower confidence bound of the mean of C recalls when every one of sizes[c] independent trials succeeded.

    The bootstrap of a flawless result is a single point, which reads like certainty. This is the smallest mean of
    p_c with prod p_c^n_c >= (1 - level) / 2; for one class that is Clopper and Pearson's (1934) bound. The mirror
    image, 1 - bound, is the upper bound when every trial failed.
    """
    counts = np.asarray(sizes, dtype=np.float64)
    budget = -math.log((1 - level) / 2)
    # Lagrange: p_c = min(1, scale * n_c), with the scale that spends the budget, found by bisection on a falling sum.
    low, high = 1e-12 / counts.max(), 1 / counts.min()
    for _ in range(200):
        scale = math.sqrt(low * high)
        spent = float((counts * -np.log(np.minimum(1, scale * counts))).sum())
        low, high = (scale, high) if spent > budget else (low, scale)
    return float(np.minimum(1, high * counts).mean())


def paired_bootstrap(a: Statistic, b: Statistic, resampler: Resampler, *, level: float = 0.95) -> Difference:
    """b - a on the same samples: value, percentile interval and p = 2 min(#{d <= 0} + 1, #{d >= 0} + 1) / (R + 1).

    Both models are evaluated on the same draws, so what they share cancels.
    """
    drawn = np.concatenate([b(counts) - a(counts) for counts in resampler.draw()])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum())) + 1
    return Difference(
        value=float(b(None) - a(None)), low=float(low), high=float(high), p=min(1.0, 2 * tail / (drawn.size + 1)),
        method=resampler.method.replace("bootstrap", "paired-bootstrap"), redrawn=resampler.redrawn,
    )  # fmt: skip


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
    width = _normal_quantile((1 + level) / 2) * error
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


def _normal_quantile(probability: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(probability)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for position, i in enumerate(order):
        running = max(running, min(1.0, p_values[i] * (len(p_values) - position)))
        adjusted[i] = running
    return adjusted
