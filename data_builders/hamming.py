"""64-bit hashes in, all pairs within a few bits of each other out: exact, in numpy, without comparing all with all.

Two hashes that differ in at most 3 bits agree in at least one of four 16-bit bands, so it is enough to compare hashes
that share a band; up to 7 bits, they agree in one band but for at most one bit, which costs 17 look-ups instead of one.
Real hashes are not spread evenly (blank pictures, charts): a band value that very many share is divided again by the
remaining bits in the same way, which the same argument allows. Every candidate is then compared in full.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

MAX_DISTANCE = 7
_CHUNK = 1 << 21
_CROWDED = 2048
"""Candidates of one hash, above which a band is divided further."""
_MIN_WIDTH = 5
_BANDS = ((0, 16), (16, 16), (32, 16), (48, 16))

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
    for left, right in near_matches(hashes, hashes, max_distance):
        ordered = left < right
        if ordered.any():
            yield left[ordered], right[ordered]


def near_matches(left: np.ndarray, right: np.ndarray, max_distance: int) -> Iterator[Pairs]:
    """Positions (i in `left`, j in `right`) of all pairs within `max_distance` bits, in chunks; some come twice."""
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"max_distance must be 0 to {MAX_DISTANCE}, found {max_distance}")
    left, right = np.asarray(left, dtype=np.uint64), np.asarray(right, dtype=np.uint64)
    rows, columns = np.arange(len(left)), np.arange(len(right))
    for i, j in _candidates(left, right, rows, columns, _BANDS, max_distance > 3):
        close = distance(left[i], right[j]) <= max_distance
        if close.any():
            yield i[close], j[close]


def _candidates(
    left: np.ndarray, right: np.ndarray, rows: np.ndarray, columns: np.ndarray, bands: tuple[tuple[int, int], ...],
    probe: bool,
) -> Iterator[Pairs]:  # fmt: skip
    """Pairs of `rows` and `columns` that agree in a band, or but for one bit of it where `probe` is set."""
    for band in bands:
        shift, width = band
        mask = np.uint64((1 << width) - 1)
        row_keys = (left[rows] >> np.uint64(shift)) & mask
        column_keys = (right[columns] >> np.uint64(shift)) & mask
        order = np.argsort(column_keys, kind="stable")
        ordered, sorted_columns = column_keys[order], columns[order]
        for flip in (0, *(1 << bit for bit in range(width))) if probe else (0,):
            wanted = row_keys ^ np.uint64(flip)
            first = np.searchsorted(ordered, wanted, side="left")
            counts = np.searchsorted(ordered, wanted, side="right") - first
            rest = _other_bits(bands, band)
            crowded = (counts > _CROWDED) if rest else np.zeros(len(counts), dtype=bool)
            yield from _expand(rows[~crowded], sorted_columns, first[~crowded], counts[~crowded])
            for value in np.unique(wanted[crowded]):
                start, stop = (
                    np.searchsorted(ordered, value, side="left"),
                    np.searchsorted(ordered, value, side="right"),
                )
                inside = rows[wanted == value]
                yield from _candidates(left, right, inside, sorted_columns[start:stop], rest, probe)


def _other_bits(bands: tuple[tuple[int, int], ...], used: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """The other bands cut in half; empty where the halves would be too narrow to tell hashes apart.

    Six halves of the three other bands: up to 3 differing bits leave at least three of them equal, up to 7 leave at
    least one with no more than one, which keeps the search complete.
    """
    halves = []
    for shift, width in bands:
        if (shift, width) == used:
            continue
        half = width // 2
        if half < _MIN_WIDTH:
            return ()
        halves += [(shift, half), (shift + half, width - half)]
    return tuple(halves)


def _expand(rows: np.ndarray, columns: np.ndarray, first: np.ndarray, counts: np.ndarray) -> Iterator[Pairs]:
    """Each row with its run of columns, at most `_CHUNK` pairs at a time where single runs allow it."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(rows):
        base = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, base + _CHUNK, side="right")))
        size = counts[start:stop]
        total = int(size.sum())
        if total:
            offsets = np.arange(total) - np.repeat(np.cumsum(size) - size, size)
            yield np.repeat(rows[start:stop], size), columns[np.repeat(first[start:stop], size) + offsets]
        start = stop
