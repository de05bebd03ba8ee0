"""Exact image-text retrieval: the rank of each query's best positive, both ways, without an N x M matrix.

Reads unit embeddings of images (N, D) and captions (N, D) and a caption id per pair; yields ranks (N,), one per
query. Captions that read the same (panels of one figure, class templates) are all right answers to each other's
images, or a model would be punished for not telling equal sentences apart; the strict variant, where only a query's
own partner is right, is one argument away. Ties count half, because a collapsed model, all embeddings equal, must
score like chance and not like a winner.
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


@dataclass(frozen=True, slots=True)
class Ranks:
    """Ranks (N,) from 1, tied competitors counting half, and the best candidate (N,) of each query."""

    ranks: NDArray[np.float64]
    top: NDArray[np.int64]


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

    Candidate j is a positive of query i where their ids are equal; a query without one has rank NaN. Products are
    summed in float64 and rounded to float32, so that equal embeddings tie exactly whichever block they are in.
    """
    query_ids, candidate_ids = np.asarray(query_ids), np.asarray(candidate_ids)
    order = np.argsort(candidate_ids, kind="stable")
    ordered = candidate_ids[order]
    transposed = np.asarray(candidates, dtype=np.float64).T
    ranks = np.full(len(queries), np.nan)
    top = np.zeros(len(queries), dtype=np.int64)
    block = max(1, BLOCK_BYTES // (12 * max(1, len(candidates))))  # a float64 product and its float32 copy
    for start in range(0, len(queries), block):
        rows = slice(start, min(start + block, len(queries)))
        scores = (np.asarray(queries[rows], dtype=np.float64) @ transposed).astype(np.float32)
        top[rows] = scores.argmax(1)
        first = np.searchsorted(ordered, query_ids[rows], "left")
        last = np.searchsorted(ordered, query_ids[rows], "right")
        for i, (low, high) in enumerate(zip(first, last, strict=True)):
            if low == high:
                continue
            positives = order[low:high]
            best = scores[i, positives].max()
            tied = int((scores[i] == best).sum()) - int((scores[i, positives] == best).sum())
            ranks[start + i] = 1 + int((scores[i] > best).sum()) + tied / 2
    return Ranks(ranks, top)


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
