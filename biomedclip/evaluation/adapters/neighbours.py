"""k nearest neighbours and nearest class mean: what the geometry of the embeddings gives without any training.

k-NN votes by cosine, each neighbour with weight 1 or exp(cosine / T) (Wu et al. 2018, section 3.4, T = 0.07); equal
votes go to the class whose neighbours are nearer. The nearest mean is SimpleShot (Wang et al. 2019): embeddings are
centred on the support's mean and brought back to length 1 before class means are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.evaluation.adapters.features import Adapted, Choice, Features, Logits, Params, Selection, Vectors

GRID = (1, 3, 5, 10, 20, 50)
_CELLS = 8_000_000


def fit_neighbours(
    support: Features, selection: Selection, *, grid: tuple[int, ...] = GRID, temperature: float | None = None,
    **_: Any,
) -> Adapted:  # fmt: skip
    """Logits: log of each class's share of the votes of the k nearest; k of `grid` is chosen."""

    def candidates(train: Features, held_out: Features) -> Iterator[tuple[Params, Logits]]:
        near, cosines = find_nearest(held_out.vectors, train.vectors, max(grid))
        for k in sorted({min(k, len(train.y)) for k in grid}):
            yield {"k": k}, _vote(near[:, :k], cosines[:, :k], train, temperature)

    choice = selection.choose(support, candidates)

    def logits(vectors: Vectors) -> Logits:
        near, cosines = find_nearest(vectors, support.vectors, choice.hparams["k"])
        return _vote(near, cosines, support, temperature)

    return Adapted(method="knn", logits=logits, choice=choice)


def find_nearest(queries: Vectors, keys: Vectors, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows (N, k) of the nearest keys, nearest first and the earlier row first among equals, and their cosines."""
    k = min(k, len(keys))
    rows, values = np.empty((len(queries), k), dtype=np.int64), np.empty((len(queries), k))
    wide = np.asarray(keys, dtype=np.float64).T
    step = max(1, _CELLS // max(1, len(keys)))
    for start in range(0, len(queries), step):
        cosines = np.asarray(queries[start : start + step], dtype=np.float64) @ wide
        # Rounded to float32, so that equal embeddings tie and the order of keys decides, not the last bit.
        order = np.argsort(-cosines.astype(np.float32), axis=1, kind="stable")[:, :k]
        rows[start : start + step] = order
        values[start : start + step] = np.take_along_axis(cosines, order, axis=1)
    return rows, values


def _vote(
    near: NDArray[np.int64], cosines: NDArray[np.float64], support: Features, temperature: float | None
) -> Logits:
    weight = np.ones_like(cosines) if temperature is None else np.exp((cosines - 1) / temperature)
    votes = np.zeros((len(near), support.num_classes))
    nearness = np.zeros_like(votes)
    rows = np.repeat(np.arange(len(near)), near.shape[1])
    np.add.at(votes, (rows, support.y[near].ravel()), weight.ravel())
    np.add.at(nearness, (rows, support.y[near].ravel()), cosines.ravel())
    shares = votes / votes.sum(1, keepdims=True)
    # A millionth of a vote for being near: decides ties, and nothing else while k is below 10^5.
    return np.log(np.maximum(shares + 1e-6 * nearness / near.shape[1], 1e-12))


def fit_nearest_mean(support: Features, selection: Selection | None = None, *, logit_scale: float = 100.0,
                     centre: bool = True, **_: Any) -> Adapted:  # fmt: skip
    """Logits -s |f - mean_c|^2 / 2 of centred embeddings (SimpleShot's CL2N); nothing to choose."""
    middle = np.asarray(support.vectors, dtype=np.float64).mean(0) if centre else 0.0

    def centred(vectors: Vectors) -> NDArray[np.float64]:
        moved = np.asarray(vectors, dtype=np.float64) - middle
        return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)

    sums = support.one_hot().astype(np.float64).T @ centred(support.vectors)
    support.class_means()  # refuses a class without samples
    means = sums / np.bincount(support.y, minlength=support.num_classes)[:, None]

    def logits(vectors: Vectors) -> Logits:
        moved = centred(vectors)
        distances = (moved**2).sum(1)[:, None] - 2 * moved @ means.T + (means**2).sum(1)
        return -logit_scale / 2 * distances

    return Adapted(method="nearest_mean", logits=logits, choice=Choice())
