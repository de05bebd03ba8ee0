"""Which sample stands where: the seeded shuffle of a dataset, and where one shard ends and the next begins.

Sources give their pairs article by article. Shards in that order would put figures of one article, which are each
other's false negatives, into one batch, so samples are written in the order of a seeded hash of their keys. The order
of two samples does not depend on which others there are: new pairs never reorder old ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


def shuffle_rank(key: str, seed: int) -> bytes:
    """What samples are sorted by: 32 bytes of hash."""
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()


def shuffle_ranks(keys: Iterable[str], seed: int) -> np.ndarray:
    """(N, 2) uint64: the first 16 bytes of each key's rank, which are enough to tell any two keys apart."""
    digests = b"".join(shuffle_rank(key, seed)[:16] for key in keys)
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(-1, 2)


@dataclass(frozen=True, slots=True)
class ShardRows:
    """The rows of one shard, as positions in the order."""

    number: int
    group: int
    start: int
    stop: int


def cut_shards(groups: np.ndarray, sizes: np.ndarray, max_samples: int, max_bytes: int) -> Iterator[ShardRows]:
    """Runs of equal group, cut after the sample with which a shard has `max_samples` or reaches `max_bytes`."""
    ends = np.cumsum(sizes, dtype=np.int64)
    edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)] if len(groups) else [0]
    number = 0
    for begin, end in pairwise(edges):
        start = begin
        while start < end:
            base = int(ends[start - 1]) if start else 0
            full = int(np.searchsorted(ends, base + max_bytes, side="left")) + 1
            stop = min(end, start + max_samples, max(full, start + 1))
            yield ShardRows(number, int(groups[start]), start, stop)
            number, start = number + 1, stop
