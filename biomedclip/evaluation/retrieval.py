"""Exact image-text retrieval: the rank of each query's best positive, both ways, without an N x M matrix.

Reads unit embeddings of images (N, D) and captions (N, D) and a caption id per pair; yields ranks (N,), one per
query. Captions that read the same (panels of one figure, class templates) are all right answers to each other's
images, or a model would be punished for not telling equal sentences apart; the strict variant, where only a query's
own partner is right, is one argument away. Ties count half, because a collapsed model, all embeddings equal, must
score like chance and not like a winner. Products are taken in float32, and those too close to the best positive to be
told apart in it once more in float64: ranks are as exact as in float64 throughout, in half the time and memory.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

BLOCK_BYTES = 64_000_000
"""Similarities held at once: memory is O(block x M), whatever N is."""
KS = (1, 5, 10)
_CLOSE_SHARE = 0.02
"""Share of a block's products beyond which all of it is taken in float64, not the close ones one by one."""
_MANY_CLOSE = 1000
_HALF_ULP = 2.0**-24


@dataclass(frozen=True, slots=True)
class Ranks:
    """Ranks (N,) from 1, tied competitors counting half, and the best candidate (N,) of each query."""

    ranks: NDArray[np.float64]
    top: NDArray[np.int64]
    tied: NDArray[np.int64]
    """(N,) competitors exactly as good as the best positive; rank - tied / 2 is the optimistic rank."""


def caption_ids(captions: Sequence[str]) -> NDArray[np.int64]:
    """(N,) equal numbers for captions that read the same: case, width of characters and spacing do not matter."""
    numbers: dict[bytes, int] = {}
    ids = []
    for caption in captions:
        normal = " ".join(unicodedata.normalize("NFKC", caption).casefold().split())
        digest = hashlib.sha256(normal.encode()).digest()
        ids.append(numbers.setdefault(digest, len(numbers)))
    return np.asarray(ids, dtype=np.int64)


def rank_candidates(
    queries: NDArray[np.float32], candidates: NDArray[np.float32], query_ids: ArrayLike, candidate_ids: ArrayLike
) -> Ranks:
    """Rank of each query's best positive among all candidates: 1 + #{better} + #{equal, not positive} / 2.

    Candidate j is a positive of query i where their ids are equal; a query without one has rank NaN. Strict retrieval,
    where only a query's own partner is right, has `arange` for both ids. Similarities are products summed in float64
    and rounded to float32, so that equal embeddings tie exactly whichever block they are in. Raises ValueError for
    embeddings that are not finite.
    """
    queries, candidates = np.asarray(queries, np.float32), np.asarray(candidates, np.float32)
    query_ids, candidate_ids = np.asarray(query_ids), np.asarray(candidate_ids)
    margin = _rounding(queries, candidates)
    if not len(candidates):
        return Ranks(np.full(len(queries), np.nan), np.full(len(queries), -1), np.zeros(len(queries), dtype=np.int64))
    order = np.argsort(candidate_ids, kind="stable")
    first = np.searchsorted(candidate_ids[order], query_ids, "left")
    last = np.searchsorted(candidate_ids[order], query_ids, "right")
    found = Ranks(
        np.full(len(queries), np.nan), np.zeros(len(queries), dtype=np.int64), np.zeros(len(queries), dtype=np.int64)
    )
    block = max(1, BLOCK_BYTES // (4 * max(1, len(candidates))))
    for start in range(0, len(queries), block):
        rows = range(start, min(start + block, len(queries)))
        positives = [order[first[i] : last[i]] for i in rows]
        _rank_block(queries[start : rows.stop], candidates, positives, margin, found, start)
    return found


def _rank_block(
    queries: NDArray[np.float32], candidates: NDArray[np.float32], positives: list[NDArray[np.int64]],
    margin: float, found: Ranks, start: int,
) -> None:  # fmt: skip
    """Fill `found` from row `start` on. Scores more than two margins apart are in their true order."""
    scores, exact = queries @ candidates.T, margin == 0
    tops = scores.max(axis=1)
    for i, own in enumerate(positives):
        best = scores[i, own].max() if own.size else tops[i]
        near = np.flatnonzero(np.abs(scores[i] - best) <= 2 * margin)
        if not exact and near.size > max(_MANY_CLOSE, _CLOSE_SHARE * len(candidates)):
            # A collapsed model: nearly everything is close, and a product of matrices is faster than of rows.
            scores, exact, margin = _products(queries, candidates), True, 0.0
            tops = scores.max(axis=1)
            best = scores[i, own].max() if own.size else tops[i]
            near = np.flatnonzero(scores[i] == best)
        front = np.flatnonzero(scores[i] >= tops[i] - 2 * margin)
        if front.size > 1 and not exact:
            front = front[_products(queries[i : i + 1], candidates[front])[0].argmax() :]
        found.top[start + i] = front[0]
        if not own.size:
            continue
        values = scores[i, near] if exact else _products(queries[i : i + 1], candidates[near])[0]
        is_own = np.isin(near, own, assume_unique=True)
        goal = values[is_own].max()
        found.tied[start + i] = ((values == goal) & ~is_own).sum()
        better = int((scores[i] > best + 2 * margin).sum()) + int((values > goal).sum())
        found.ranks[start + i] = 1 + better + found.tied[start + i] / 2


def _products(queries: NDArray[np.float32], candidates: NDArray[np.float32]) -> NDArray[np.float32]:
    """(B, M) products summed in float64 and rounded once; candidates are widened a part at a time."""
    out = np.empty((len(queries), len(candidates)), dtype=np.float32)
    wide = queries.astype(np.float64)
    step = max(1, BLOCK_BYTES // (8 * max(1, candidates.shape[1])))
    for start in range(0, len(candidates), step):
        out[:, start : start + step] = wide @ candidates[start : start + step].astype(np.float64).T
    return out


def _rounding(queries: NDArray[np.float32], candidates: NDArray[np.float32]) -> float:
    """How far a float32 product can be from the float64 one: (D + 2) u |q| |c| (Higham 2002, section 3.1)."""
    if not len(queries) or not len(candidates):
        return 0.0
    lengths = [float(np.sqrt(np.einsum("nd,nd->n", v, v).max())) for v in (queries, candidates)]
    if not np.isfinite(lengths).all():
        raise ValueError("embeddings are not finite")
    return 1.01 * (queries.shape[1] + 2) * _HALF_ULP * lengths[0] * lengths[1]


def recall_all(
    queries: NDArray[np.float32], candidates: NDArray[np.float32], query_ids: ArrayLike, candidate_ids: ArrayLike,
    ks: Sequence[int] = KS,
) -> NDArray[np.float64]:  # fmt: skip
    """(N, K) share of all of a query's positives within its first k, where `rank_candidates` asks for any of them.

    |top k and P| / |P|: with more positives than k it cannot reach 1. Each positive has its own rank among all
    candidates, the other positives among them, ties counting half. NaN for a query without positives.
    """
    queries, candidates = np.asarray(queries, np.float32), np.asarray(candidates, np.float32)
    query_ids, candidate_ids = np.asarray(query_ids), np.asarray(candidate_ids)
    shares = np.full((len(queries), len(ks)), np.nan)
    order = np.argsort(candidate_ids, kind="stable")
    first = np.searchsorted(candidate_ids[order], query_ids, "left")
    last = np.searchsorted(candidate_ids[order], query_ids, "right")
    block = max(1, BLOCK_BYTES // (4 * max(1, len(candidates))))
    for start in range(0, len(queries), block):
        scores = _products(queries[start : start + block], candidates)
        for i, row in enumerate(scores, start):
            own = order[first[i] : last[i]]
            if own.size:
                ordered, values = np.sort(row), row[own]
                better = len(row) - np.searchsorted(ordered, values, "right")
                tied = np.searchsorted(ordered, values, "right") - np.searchsorted(ordered, values, "left") - 1
                shares[i] = [(1 + better + tied / 2 <= k).mean() for k in ks]
    return shares


def chance_recall(num_candidates: int, num_positives: ArrayLike, k: int) -> float:
    """Expected recall@k of random rankings: mean over queries of 1 - C(M - P, k) / C(M, k)."""
    positives = np.asarray(num_positives, dtype=np.int64)
    miss = np.ones(positives.shape)
    for i in range(min(k, num_candidates)):
        miss *= np.clip(num_candidates - positives - i, 0, None) / (num_candidates - i)
    return float(np.mean(1 - miss)) if positives.size else float("nan")


def chance_reciprocal_rank(num_candidates: int) -> float:
    """Expected reciprocal rank of one positive in a random ranking: H_M / M."""
    return float(np.mean(1 / np.arange(1, num_candidates + 1))) if num_candidates else float("nan")
