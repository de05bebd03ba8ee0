"""Questions whose options differ from image to image, as in u-Bench and every multiple-choice set.

Reads cosines of all (image, option) pairs in one flat array with the number of options of each image, so that three
options here and seven there need no padding; yields choices and accuracies. The index of an option means nothing once
options are shuffled, so no metric over indices exists here: accuracy, accuracy over chance, and the macro mean over the
text of the right answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biomedclip.evaluation import metrics


def chosen(cosines: ArrayLike, sizes: ArrayLike) -> NDArray[np.int64]:
    """(N,) index within each image's own options of the largest of the flat `cosines` (sum of sizes,)."""
    return np.asarray([int(part.argmax()) for part in _split(cosines, sizes)], dtype=np.int64)


def credit(cosines: ArrayLike, sizes: ArrayLike, answers: ArrayLike) -> NDArray[np.float64]:
    """(N,) 1 where the answer is alone at the top, 1/k where it shares the top with k - 1 others, else 0.

    Options that read the same have the same cosine: the expected credit of a guess among them is what counts.
    """
    parts = _split(cosines, sizes)
    return np.asarray([
        float(part[answer] == part.max()) / int((part == part.max()).sum())
        for part, answer in zip(parts, np.asarray(answers), strict=True)
    ])  # fmt: skip


def accuracy(credits: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """Mean credit."""
    return metrics.weighted_mean(credits, weights)


def over_chance(credits: ArrayLike, sizes: ArrayLike, weights: ArrayLike | None = None) -> Any:
    """(accuracy - mean 1/m) / (1 - mean 1/m): 0 for guessing, 1 for all right; NaN where every image has one option."""
    chance = metrics.weighted_mean(1 / np.asarray(sizes, dtype=np.float64), weights)
    return metrics.unwrap(metrics.divide(accuracy(credits, weights) - chance, 1 - np.asarray(chance)))


def macro_accuracy(credits: ArrayLike, answer_texts: Sequence[str]) -> float:
    """Mean over the distinct right answers of the accuracy on their images."""
    _, group, count = np.unique(np.asarray(answer_texts), return_inverse=True, return_counts=True)
    return float((np.bincount(group, np.asarray(credits)) / count).mean()) if count.size else float("nan")


def pooled_and_macro(credits: ArrayLike, sets: Sequence[str]) -> dict[str, float]:
    """Accuracy over all questions and mean over their sets: published "macro" figures are often the former."""
    return {"pooled": float(accuracy(credits)), "macro_over_sets": macro_accuracy(credits, sets)}


def _split(cosines: ArrayLike, sizes: ArrayLike) -> list[NDArray[Any]]:
    flat, counts = np.asarray(cosines), np.asarray(sizes, dtype=np.int64)
    if counts.sum() != flat.size or (counts < 1).any():
        raise ValueError(f"{flat.size} cosines do not make {counts.sum()} options of {counts.size} images")
    if np.isnan(flat).any():
        raise ValueError("cosines hold NaN")
    return np.split(flat, np.cumsum(counts)[:-1]) if counts.size else []
