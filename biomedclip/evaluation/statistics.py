"""Intervals: how far a number would move had other patients, slides or articles been drawn.

Reads statistics as functions of (R, N) sample counts (metrics.py) together with the labels and group ids of the
samples; yields percentile or BCa intervals and paired differences. Three choices to question. Samples of one group
(patient, slide, article) are resampled together whenever groups are known, because they are not independent; else
each class is resampled by itself, which keeps its size as the test set fixed it. A resample that lacks a class the
data has is drawn again and counted: it has no balanced accuracy of the same kind. Blocks of resamples have their own
random numbers and are worked on by several threads, so everything is a function of the seed, whatever the number of
cores. Tests of one model against another are in comparisons.py, sums for very large sets in influence.py.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[["NDArray[np.float64] | None"], Any]
"""`statistic(None)` is the value on the data, `statistic((R, N) counts)` the (R,) values on R resamples."""
Method = Literal["percentile", "bca"]

_BLOCK_CELLS = 4_000_000
"""Counts held at once by a thread, 32 MB: more gains no speed and would grow with the test set."""
_MAX_REDRAWS_PER_RESAMPLE = 20
_NEVER_MISSED = 60
"""A class in so many units is missed by a resample once in e^60."""
_MAX_JACKKNIFE = 1000


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


@dataclass(frozen=True, slots=True)
class UnitSums:
    """A statistic that depends on a resample only through sums over its units; a Statistic where units are samples.

    `columns` (U, K) hold what each unit adds, `finish` maps (R, K) sums to (R,) values. `approximate` names what was
    left out where the statistic itself is no such function.
    """

    columns: Floats
    finish: Callable[[Floats], Floats]
    approximate: str | None = None

    def __call__(self, counts: NDArray[np.float64] | None) -> Any:
        """The value on the data, or (R,) values under (R, U) counts of units."""
        if counts is None:
            return float(self.finish(self.columns.sum(0, keepdims=True))[0])
        return self.finish(counts @ self.columns)


class Resampler:
    """Draws counts of bootstrap resamples, in blocks; the same seed draws the same ones, however often asked.

    `y` (N,) gives the strata, or None for one stratum; `groups` (N,) resamples whole groups instead.
    """

    def __init__(
        self, size: int, *, y: ArrayLike | None = None, groups: Sequence[str] | None = None,
        resamples: int = 2000, seed: int = 0,
    ) -> None:  # fmt: skip
        self.size, self.resamples, self.seed, self.redrawn = size, resamples, seed, 0
        strata = np.zeros(size, dtype=np.int64) if y is None else np.unique(np.asarray(y), return_inverse=True)[1]
        self.by_group = groups is not None
        self.unit_of: NDArray[np.int64] | None = None
        """(N,) unit of each sample, units of one stratum side by side; None where sample i is unit i."""
        self.num_units = size
        if groups is not None:
            names, index = np.unique(np.asarray(groups), return_inverse=True)
            self.num_units = len(names)
            self.unit_of = index if len(names) < size else None
        stratified = not self.by_group and len(np.unique(strata)) > 1
        self.method = "group" if self.by_group else ("stratified" if stratified else "")
        self._ends = np.asarray([self.num_units])
        if stratified:
            # Scattering counts over a million samples costs more than drawing them, so a stratum is a slice of units.
            self.unit_of = np.empty(size, dtype=np.int64)
            self.unit_of[np.argsort(strata, kind="stable")] = np.arange(size)
            self._ends = np.cumsum(np.bincount(strata))
        self._rare = self._find_rare(strata) if self.by_group else []
        self._block = max(1, min(resamples, _BLOCK_CELLS // max(1, size)))
        self.num_blocks = -(-resamples // self._block)

    def name(self, method: Method = "percentile") -> str:
        """How a result calls the interval, such as `bootstrap-percentile-group`."""
        return "-".join(part for part in ("bootstrap", method, self.method) if part)

    def draw(self) -> Iterator[Floats]:
        """Blocks of (R, N) counts, `resamples` rows in all. Raises ValueError where classes keep going missing."""
        self.redrawn = 0
        for number in range(self.num_blocks):
            counts, redrawn = self.draw_units(number)
            self.redrawn += redrawn
            yield self.expand(counts)

    def draw_units(self, block: int) -> tuple[Floats, int]:
        """(R, U) counts of units of one block, and how many rows were drawn again. Raises ValueError as `draw`."""
        rng = np.random.default_rng([self.seed, block])
        wanted = min(self._block, self.resamples - block * self._block)
        parts, left, redrawn = [], wanted, 0
        while left:
            counts = self._draw_rows(rng, left)
            if self._rare:
                complete = np.all([counts[:, units].any(1) for units in self._rare], axis=0)
                counts = counts[complete]
            redrawn += left - len(counts)
            if redrawn > _MAX_REDRAWS_PER_RESAMPLE * wanted:
                raise ValueError("a class is in so few groups that almost every resample lacks it")
            left -= len(counts)
            parts.append(counts)
        return parts[0] if len(parts) == 1 else np.concatenate(parts), redrawn

    def expand(self, counts: Floats) -> Floats:
        """(R, N) counts of samples from (R, U) counts of units."""
        return counts if self.unit_of is None else counts[:, self.unit_of]

    def strata(self) -> list[NDArray[np.int64]]:
        """Units that are resampled among themselves."""
        return np.split(np.arange(self.num_units), self._ends[:-1])

    def _find_rare(self, strata: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Units of each class that a resample can miss; nothing where there is one class."""
        unit = np.arange(self.size) if self.unit_of is None else self.unit_of
        holders = [np.unique(unit[strata == value]) for value in np.unique(strata)]
        return [units for units in holders if len(units) <= _NEVER_MISSED] if len(holders) > 1 else []

    def _draw_rows(self, rng: np.random.Generator, rows: int) -> Floats:
        counts = np.empty((rows, self.num_units))
        for start, end in itertools.pairwise([0, *self._ends.tolist()]):
            counts[:, start:end] = _count_draws(rng, rows, end - start)
        return counts


def _count_draws(rng: np.random.Generator, rows: int, size: int) -> NDArray[np.int64]:
    """(rows, size) how often each of `size` units is drawn in `size` draws with replacement."""
    draws = rng.integers(0, size, (rows, size), dtype=np.int64)
    draws += np.arange(rows)[:, None] * size
    return np.bincount(draws.ravel(), minlength=rows * size).reshape(rows, size)


def bootstrap(
    statistics: Mapping[str, Statistic], resampler: Resampler, *, level: float = 0.95,
    method: Method = "percentile", threads: int | None = None,
) -> dict[str, Interval]:  # fmt: skip
    """An interval for each statistic, all from the same resamples.

    `percentile`: quantiles (1 - level) / 2 and (1 + level) / 2 by linear interpolation. `bca`: bias-corrected and
    accelerated (Efron 1987), with a jackknife over units, or over 1,000 blocks of them where there are more. A
    statistic that is NaN on the data or on a resample, or a data set of fewer than two independent units, has an
    interval of NaN with the reason.
    """
    facts = {"method": resampler.name(method), "level": level, "resamples": resampler.resamples}
    missing = float("nan")

    def refuse(reason: str) -> Interval:
        return Interval(low=missing, high=missing, reason=reason, redrawn=resampler.redrawn, **facts)  # type: ignore[arg-type]

    if resampler.num_units < 2:
        return {name: refuse(f"{resampler.num_units} independent unit(s)") for name in statistics}
    try:
        values = resample(statistics, resampler, threads=threads)
    except ValueError as error:
        return {name: refuse(str(error)) for name in statistics}
    intervals = {}
    for name, drawn in values.items():
        if np.isnan(drawn).any():
            intervals[name] = refuse(f"undefined on {int(np.isnan(drawn).sum())} of {drawn.size} resamples")
            continue
        tails = (1 - level) / 2, (1 + level) / 2
        if method == "bca":
            tails = _correct_tails(statistics[name], drawn, resampler, tails)
        low, high = np.quantile(drawn, tails)
        approximate = getattr(statistics[name], "approximate", None)
        own = facts | ({"method": f"{facts['method']}-{approximate}"} if approximate else {})
        intervals[name] = Interval(low=float(low), high=float(high), redrawn=resampler.redrawn, **own)  # type: ignore[arg-type]
    return intervals


def resample(
    statistics: Mapping[str, Statistic], resampler: Resampler, *, threads: int | None = None
) -> dict[str, Floats]:
    """(R,) values of each statistic on the resamples, in their order. Raises ValueError as `Resampler.draw`."""

    def work(block: int) -> tuple[int, list[Floats]]:
        counts, redrawn = resampler.draw_units(block)
        plain = [s for s in statistics.values() if not isinstance(s, UnitSums)]
        expanded = resampler.expand(counts) if plain else counts
        return redrawn, [s(counts if isinstance(s, UnitSums) else expanded) for s in statistics.values()]

    with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 8)) as pool:
        done = list(pool.map(work, range(resampler.num_blocks)))
    resampler.redrawn = sum(redrawn for redrawn, _ in done)
    return {name: np.concatenate([parts[i] for _, parts in done]) for i, name in enumerate(statistics)}


def _correct_tails(
    statistic: Statistic, drawn: Floats, resampler: Resampler, tails: tuple[float, float]
) -> tuple[float, float]:
    """BCa levels (Efron 1987, section 4; several strata as in Davison and Hinkley 1997, section 5.3)."""
    normal = NormalDist()
    value = statistic(None)
    share = float(((drawn < value).sum() + (drawn == value).sum() / 2) / drawn.size)
    if not 0 < share < 1:
        return tails
    bias, acceleration = normal.inv_cdf(share), _acceleration(statistic, resampler)

    def correct(tail: float) -> float:
        z = bias + normal.inv_cdf(tail)
        return normal.cdf(bias + z / (1 - acceleration * z))

    return correct(tails[0]), correct(tails[1])


def _acceleration(statistic: Statistic, resampler: Resampler) -> float:
    """From leaving out one unit, or one of at most 1,000 blocks of units, at a time."""
    cubes = squares = 0.0
    rng = np.random.default_rng(resampler.seed)
    for stratum in resampler.strata():
        blocks = np.array_split(rng.permutation(stratum), min(len(stratum), _MAX_JACKKNIFE))
        if len(blocks) < 2:
            continue
        without = np.asarray([_leave_out(statistic, resampler, block) for block in blocks])
        if np.isnan(without).any():
            return 0.0
        push = (len(blocks) - 1) * (without.mean() - without)
        cubes += float((push**3).sum()) / len(blocks) ** 3
        squares += float((push**2).sum()) / len(blocks) ** 2
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0


def _leave_out(statistic: Statistic, resampler: Resampler, units: NDArray[np.int64]) -> float:
    counts = np.ones((1, resampler.num_units))
    counts[0, units] = 0
    return float(statistic(counts if isinstance(statistic, UnitSums) else resampler.expand(counts))[0])


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

    Both models are evaluated on the same draws, so what they share cancels. Raises ValueError where resamples keep
    lacking a class, or where a difference is undefined.
    """
    values = resample({"a": a, "b": b}, resampler)
    drawn = values["b"] - values["a"]
    if np.isnan(drawn).any():
        raise ValueError(f"the difference is undefined on {int(np.isnan(drawn).sum())} of {drawn.size} resamples")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum())) + 1
    return Difference(
        value=float(b(None) - a(None)), low=float(low), high=float(high), p=min(1.0, 2 * tail / (drawn.size + 1)),
        method=f"paired-{resampler.name()}", redrawn=resampler.redrawn,
    )  # fmt: skip
