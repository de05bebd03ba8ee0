"""ROC and precision-recall curves of more than two classes: one against the rest, averaged over the classes.

Reads one (positive, score) pair a class or label; yields points of the mean curve, which is taken vertically: mean
sensitivity at each false positive rate, mean precision at each sensitivity. The areas under the mean curves are then
the very macro AUROC and macro average precision that are reported, whatever the sizes of the classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biomedclip.evaluation import metrics
from biomedclip.evaluation.answer_scores import LabelScores
from biomedclip.evaluation.multilabel import UNSTATED
from biomedclip.evaluation.scores import ClassScores

Floats = NDArray[np.float64]
Pair = tuple[NDArray[np.bool_], NDArray[Any]]


def pairs_of(scores: ClassScores | LabelScores) -> list[Pair]:
    """(positive, score) of every class or label that has both kinds; of two classes the second over the first."""
    if isinstance(scores, ClassScores) and len(scores.classes) == 2:
        found: Iterator[Pair] = iter([(scores.y == 1, metrics.difference(scores.cosines))])
    elif isinstance(scores, ClassScores):
        found = ((scores.y == c, scores.cosines[:, c]) for c in range(len(scores.classes)))
    else:
        stated = scores.truth != UNSTATED
        found = ((scores.truth[stated[:, c], c] == 1, scores.cosines[stated[:, c], c])
                 for c in range(len(scores.labels)))  # fmt: skip
    return [(positive, values) for positive, values in found if positive.any() and not positive.all()]


def mean_roc(pairs: Sequence[Pair]) -> tuple[Floats, Floats]:
    """False positive rates and mean true positive rates from (0, 0) to (1, 1); a jump is two points of one rate."""
    curves = [metrics.roc_curve(positive, values)[:2] for positive, values in pairs]
    grid = np.unique(np.concatenate([rates for rates, _ in curves]))
    sides = np.mean([_both_sides(false_rate, true_rate, grid) for false_rate, true_rate in curves], axis=0)
    return np.repeat(grid, 2), sides.T.ravel()


def mean_precision(pairs: Sequence[Pair]) -> tuple[Floats, Floats]:
    """Sensitivities, rising, and the mean precision up to each from the one before it: a step function."""
    steps = [_precision_steps(positive, values) for positive, values in pairs]
    grid = np.unique(np.concatenate([recall for recall, _ in steps]))
    # Up to recall r counts the precision of the first threshold that reaches it.
    return grid, np.mean([precision[np.searchsorted(recall, grid)] for recall, precision in steps], axis=0)


def _both_sides(x: Floats, y: Floats, grid: Floats) -> Floats:
    """(2, G) values of the line through the points just before and just after each grid value."""
    at, first = np.unique(x, return_index=True)
    last = np.r_[first[1:], len(x)] - 1
    low, high = y[first], y[last]
    i = np.clip(np.searchsorted(at, grid, "right") - 1, 0, len(at) - 1)
    j = np.minimum(i + 1, len(at) - 1)
    share = np.where(j > i, (grid - at[i]) / np.where(j > i, at[j] - at[i], 1), 0)
    between = high[i] + share * (low[j] - high[i])
    exact = at[i] == grid
    return np.stack([np.where(exact, low[i], between), np.where(exact, high[i], between)])


def _precision_steps(positive: ArrayLike, values: ArrayLike) -> tuple[Floats, Floats]:
    """Sensitivities above 0 that thresholds reach, rising, and the precision at the first threshold of each."""
    truth = np.asarray(positive, dtype=bool)
    false_rate, true_rate, _ = metrics.roc_curve(truth, values)
    hits, alarms = true_rate * truth.sum(), false_rate * (~truth).sum()
    recall, first = np.unique(true_rate[1:], return_index=True)
    precision = (hits[1:] / (hits[1:] + alarms[1:]))[first]
    keep = recall > 0
    return recall[keep], precision[keep]
