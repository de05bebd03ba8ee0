"""Balanced accuracy and macro AUROC as sums over units, so that a million samples can be resampled in seconds.

Reads labels, predictions and scores once; yields `UnitSums` (statistics.py). Balanced accuracy is exactly such a sum.
AUROC is not: a resample of positives and negatives weighs pairs, A* = sum w_i v_j psi_ij / (W V). Here it is taken to
first order, each sample's weight times its placement (the share of the other kind it beats), with W and V as drawn;
that is the expansion behind DeLong's variance. What is left out has mean zero under resampling within classes and a
standard deviation below 1 / (2 sqrt(W V)), some thousandth of the interval where a class has ten thousand samples and
the others a million, but not where both kinds are few. `choose_auroc` therefore stays exact while exactness is
affordable, and the method of the interval says `first-order` where it is not.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biomedclip.evaluation.metrics import difference, divide, macro_auroc, mean_where
from biomedclip.evaluation.statistics import Floats, Resampler, Statistic, UnitSums

EXACT_CELLS = 10_000_000_000
"""Samples x classes x resamples up to which AUROC is resampled exactly: about a minute of two cores."""


def balanced_accuracy_sums(y: ArrayLike, predicted: ArrayLike, num_classes: int, resampler: Resampler) -> UnitSums:
    """Balanced accuracy: mean recall over the classes present. Exact.

    Where classes are resampled by themselves their sizes stand still, and one column of 1 / (n_c C) is enough.
    """
    labels = np.asarray(y, dtype=np.int64)
    right = (labels == np.asarray(predicted)).astype(np.float64)
    sizes = np.bincount(labels, minlength=num_classes)
    if resampler.method == "stratified":
        column = right / sizes[labels] / (sizes > 0).sum()
        return UnitSums(_by_unit(column, resampler), lambda sums: sums[:, 0])
    unit = _units(resampler)

    def finish(sums: Floats) -> Floats:
        hits, support = sums[:, :num_classes], sums[:, num_classes:]
        return np.asarray(mean_where(divide(hits, support), support > 0))

    per_class = [_add_up(unit, labels, values, num_classes, resampler.num_units) for values in (right, None)]
    return UnitSums(np.hstack(per_class), finish)


def choose_auroc(y: ArrayLike, scores: ArrayLike, resampler: Resampler) -> Statistic:
    """Macro AUROC as a statistic: exact, or to first order where exact resampling would take minutes."""
    scores = np.asarray(scores)
    if scores.size * resampler.resamples <= EXACT_CELLS:
        return lambda weights: macro_auroc(y, scores, weights)
    return first_order_auroc(y, scores, resampler)


def first_order_auroc(y: ArrayLike, scores: ArrayLike, resampler: Resampler) -> UnitSums:
    """Macro one-vs-rest AUROC to first order in the counts; on the data itself it is exact.

    Two classes are one ranking by the difference of their scores, as in `macro_auroc`. Classes that are absent or
    alone take no part.
    """
    labels, scores = np.asarray(y, dtype=np.int64), np.asarray(scores)
    num_classes = scores.shape[1]
    classes = [1] if num_classes == 2 else list(range(num_classes))
    columns = [difference(scores)] if num_classes == 2 else [scores[:, c] for c in classes]
    sizes = np.bincount(labels, minlength=num_classes)
    used = [(c, column) for c, column in zip(classes, columns, strict=True) if 0 < sizes[c] < labels.size]
    if resampler.method == "stratified":
        return _fixed_sizes(labels, used, resampler)
    return _drawn_sizes(labels, used, resampler)


def _fixed_sizes(labels: NDArray[np.int64], used: list[tuple[int, NDArray[Any]]], resampler: Resampler) -> UnitSums:
    """One column: the sum of a sample's placements over classes, each over the size of its kind."""
    size, threads = labels.size, _threads()
    columns, areas = np.zeros((threads, size)), np.zeros(len(used))

    def work(thread: int) -> None:
        for k in range(thread, len(used), threads):
            c, scores = used[k]
            positive = labels == c
            placed = placements(positive, scores)
            own = np.flatnonzero(positive)
            areas[k] = placed[own].mean()
            placed[own] *= (size - own.size) / own.size
            placed /= size - own.size
            columns[thread] += placed

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    column = columns.sum(0) / len(used) if used else np.full(size, np.nan)
    middle = areas.mean() if used else np.nan
    return UnitSums(_by_unit(column, resampler), lambda sums: sums[:, 0] - middle, "first-order")


def _drawn_sizes(labels: NDArray[np.int64], used: list[tuple[int, NDArray[Any]]], resampler: Resampler) -> UnitSums:
    """Per class: placements of its own, placements of the others, and its size, summed over each unit."""
    unit, count = _units(resampler), len(used)
    columns, areas = np.zeros((resampler.num_units, 3 * count + 1)), np.zeros(count)

    def work(k: int) -> None:
        c, scores = used[k]
        positive = labels == c
        placed = placements(positive, scores)
        areas[k] = placed[positive].mean()
        for offset, values in enumerate((placed * positive, placed * ~positive, positive)):
            columns[:, offset * count + k] = np.bincount(unit, values, minlength=resampler.num_units)

    with ThreadPoolExecutor(_threads()) as pool:
        list(pool.map(work, range(count)))
    columns[:, -1] = np.bincount(unit, minlength=resampler.num_units)

    def finish(sums: Floats) -> Floats:
        own, other, size = (sums[:, i * count : (i + 1) * count] for i in range(3))
        areas_drawn = divide(own, size) + divide(other, sums[:, -1:] - size) - areas
        return np.asarray(mean_where(areas_drawn, ~np.isnan(areas_drawn)))

    return UnitSums(columns, finish, "first-order")


def placements(positive: NDArray[np.bool_], scores: NDArray[Any]) -> Floats:
    """(N,) for a positive the share of negatives below it, for a negative the share of positives above it; equal
    scores count half. The mean over either kind is the AUROC."""
    scores = np.ascontiguousarray(scores)  # a column of a table is spread over all of it
    order = np.argsort(scores)
    ordered, is_positive = scores[order], positive[order]
    distinct = ordered[1:] != ordered[:-1]
    plus = np.cumsum(is_positive, dtype=np.int64)
    where = np.flatnonzero(is_positive)
    num_positive, num_negative = where.size, plus.size - where.size
    if distinct.all():
        below_plus, below_minus = plus, where - np.arange(num_positive)
    else:
        # The middle of each run of equal scores: what is below it and half of what is in it.
        starts = np.flatnonzero(np.r_[True, distinct])
        ends = np.r_[starts[1:], plus.size]
        upto = np.r_[0, plus]
        half = (upto[starts] + upto[ends]) / 2
        below_plus = np.repeat(half, ends - starts)
        below_minus = np.repeat((starts + ends) / 2 - half, ends - starts)[where]
    share = 1 - below_plus * (1 / max(1, num_positive))
    share[where] = below_minus / max(1, num_negative)
    placed = np.empty(plus.size)
    placed[order] = share
    return placed


def _by_unit(column: Floats, resampler: Resampler) -> Floats:
    """(U, 1) of (N,) in the order of units, where every sample is one."""
    placed = np.empty((resampler.num_units, 1))
    placed[_units(resampler), 0] = column
    return placed


def _units(resampler: Resampler) -> NDArray[np.int64]:
    return np.arange(resampler.size) if resampler.unit_of is None else resampler.unit_of


def _add_up(
    unit: NDArray[np.int64], labels: NDArray[np.int64], values: Floats | None, num_classes: int, num_units: int
) -> Floats:
    """(U, C) sums of values (ones where None) over the samples of each unit and class."""
    cells = np.bincount(unit * num_classes + labels, values, minlength=num_units * num_classes)
    return cells.reshape(num_units, num_classes).astype(np.float64)


def _threads() -> int:
    return min(os.cpu_count() or 1, 8)
