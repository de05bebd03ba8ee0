"""64-bit hashes in, all pairs within a few bits of each other out: exact, in numpy, without comparing all with all.

The 64 bits are dealt to blocks. Hashes that differ in at most `d` bits agree in all but at most `d` blocks, so of
`d + k` blocks there are `k` in which they agree entirely: one table for each choice of `k` blocks, sorted by the bits
of these, brings every near pair together at least once, and what it brings together is compared in full. More blocks
mean more tables and fewer false candidates. Real hashes are not spread evenly (blank pictures, charts): bits are
therefore dealt in the order of how evenly they divide the hashes, so that no block has only bits that are the same
nearly everywhere, and the number of blocks is the one that a sample of the hashes says takes least.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import comb

import numpy as np

MAX_DISTANCE = 7
"""Above, the tables become so many or their keys so short that comparing all with all is no slower."""

DEFAULT_DISTANCE = 4
"""Finds 97 to 99 % of pictures that were saved anew as JPEG at half or a third of their size (2: 84 to 92 %)."""

_CHUNK = 1 << 21
"""Candidates compared at a time: 50 MB of intermediate arrays."""
_MAX_TABLES = 500
_SAMPLE = 10_000
_SORT_COST = 8.0
"""Sorting a hash into a table takes about as long as comparing so many candidates."""

Pairs = tuple[np.ndarray, np.ndarray]


def distance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Number of differing bits of uint64 arrays, element by element (uint8)."""
    bits = left ^ right
    # The classic sum of neighbouring bit groups; numpy.bitwise_count needs numpy 2.
    bits = bits - ((bits >> np.uint64(1)) & np.uint64(0x5555555555555555))
    bits = (bits & np.uint64(0x3333333333333333)) + ((bits >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((bits * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint8)


def near_pairs(hashes: np.ndarray, max_distance: int) -> Iterator[Pairs]:
    """Positions (i, j), i < j, of all pairs of a uint64 array within `max_distance` bits, in chunks; some come twice.

    Raises ValueError for a distance outside of 0 to 7. Equal hashes should be collapsed before: n of them have n²/2
    pairs.
    """
    hashes = np.asarray(hashes, dtype=np.uint64)
    for mask in _tables(hashes, hashes, max_distance):
        keys = hashes & mask
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        # Beside each hash stand those after it that share its key; within one key the sort keeps i < j.
        stops = np.searchsorted(ordered, ordered, side="right")
        places = np.arange(len(hashes))
        yield from _near(hashes, hashes, order, order, places + 1, stops - places - 1, max_distance)


def near_matches(left: np.ndarray, right: np.ndarray, max_distance: int) -> Iterator[Pairs]:
    """Positions (i in `left`, j in `right`) of all pairs within `max_distance` bits, in chunks; some come twice.

    Raises ValueError for a distance outside of 0 to 7.
    """
    left, right = np.asarray(left, dtype=np.uint64), np.asarray(right, dtype=np.uint64)
    rows = np.arange(len(left))
    for mask in _tables(left, right, max_distance):
        keys = right & mask
        order = np.argsort(keys, kind="stable")
        ordered, wanted = keys[order], left & mask
        first = np.searchsorted(ordered, wanted, side="left")
        counts = np.searchsorted(ordered, wanted, side="right") - first
        yield from _near(left, right, rows, order, first, counts, max_distance)


def _tables(left: np.ndarray, right: np.ndarray, max_distance: int) -> list[np.uint64]:
    """The bits that the hashes of a table must share, one mask a table: the set that takes least time."""
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"max_distance must be 0 to {MAX_DISTANCE}, found {max_distance}")
    sample = np.concatenate([side[:: 1 + len(side) // _SAMPLE] for side in (left, right)])
    bits = _bits_by_balance(sample)
    num_shared = range(1, 65 - max_distance)
    choices = [_masks(bits, k, max_distance + k) for k in num_shared if comb(max_distance + k, k) <= _MAX_TABLES]

    def cost(masks: list[np.uint64]) -> float:
        collisions = np.mean([_collision_rate(sample & mask) for mask in masks[:: 1 + len(masks) // 4]])
        return len(masks) * (_SORT_COST * (len(left) + len(right)) + float(collisions) * len(left) * len(right))

    return min(choices, key=cost)


def _masks(bits: list[int], num_shared: int, num_blocks: int) -> list[np.uint64]:
    """Every choice of `num_shared` of the blocks to which `bits` are dealt."""
    blocks = np.zeros(num_blocks, dtype=np.uint64)
    for turn, bit in enumerate(bits):
        blocks[turn % num_blocks] |= np.uint64(1 << bit)
    return [np.bitwise_or.reduce(chosen) for chosen in combinations(blocks, num_shared)]


def _collision_rate(keys: np.ndarray) -> float:
    """The share of pairs of two different rows that have the same key."""
    counts = np.unique(keys, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1)).sum()) / max(1, len(keys) * (len(keys) - 1))


def _bits_by_balance(hashes: np.ndarray) -> list[int]:
    """Bit numbers, first those that are set in half of the hashes, last those that are the same in all."""
    skew = [abs(2 * int(np.count_nonzero(hashes & np.uint64(1 << bit))) - len(hashes)) for bit in range(64)]
    return sorted(range(64), key=lambda bit: (skew[bit], bit))


def _near(
    left: np.ndarray, right: np.ndarray, rows: np.ndarray, columns: np.ndarray, first: np.ndarray, counts: np.ndarray,
    max_distance: int,
) -> Iterator[Pairs]:  # fmt: skip
    """Of each row with its run of `columns`, those within the distance; a chunk at a time."""
    for i, j in _expand(rows, columns, first, counts):
        close = distance(left[i], right[j]) <= max_distance
        if close.any():
            yield i[close], j[close]


def _expand(rows: np.ndarray, columns: np.ndarray, first: np.ndarray, counts: np.ndarray) -> Iterator[Pairs]:
    """Each row with its run of columns, at most `_CHUNK` pairs at a time where single runs allow it."""
    some = counts > 0
    rows, first, counts = rows[some], first[some], counts[some]
    ends = np.cumsum(counts)
    start = 0
    while start < len(rows):
        base = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, base + _CHUNK, side="right")))
        size = counts[start:stop]
        offsets = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        yield np.repeat(rows[start:stop], size), columns[np.repeat(first[start:stop], size) + offsets]
        start = stop
