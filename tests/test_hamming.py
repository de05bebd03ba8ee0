"""Near hashes beside brute force, on random hashes and crowds of alike ones, and at a size brute force cannot do."""

from __future__ import annotations

import time
import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from synthetic_hashes import near_hashes

from data_builders import hamming
from data_builders.hamming import MAX_DISTANCE, distance, near_matches, near_pairs

RANDOM = np.random.default_rng(7)


def test_distance_counts_differing_bits() -> None:
    left, right = RANDOM.integers(0, 2**64, (2, 500), dtype=np.uint64)
    assert distance(left, right).tolist() == [(int(a) ^ int(b)).bit_count() for a, b in zip(left, right, strict=True)]
    assert distance(np.array([0], np.uint64), np.array([2**64 - 1], np.uint64)).tolist() == [64]


@pytest.mark.parametrize("max_distance", range(8))
@pytest.mark.parametrize("spread", [16, 2])
def test_near_pairs_are_those_of_brute_force(max_distance: int, spread: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # So few candidates count as a crowd that the bands are divided further, as they are for millions of rows.
    monkeypatch.setattr("data_builders.hamming._CHUNK", 64)
    hashes = near_hashes(RANDOM, 300, alike=150, spread=spread)
    found = {(i, j) for left, right in near_pairs(hashes, max_distance) for i, j in zip(left, right, strict=True)}
    true = {
        (i, j) for i, j in combinations(range(300), 2) if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= max_distance
    }
    assert found == true
    assert true


def test_near_matches_of_two_sets_are_those_of_brute_force() -> None:
    left, right = near_hashes(RANDOM, 200, alike=10), near_hashes(RANDOM, 150, alike=10)
    right[:40] = left[:40] ^ np.uint64(0b101)
    found = {(i, j) for a, b in near_matches(left, right, 2) for i, j in zip(a, b, strict=True)}
    true = {(i, j) for i in range(200) for j in range(150) if (int(left[i]) ^ int(right[j])).bit_count() <= 2}
    assert found == true >= {(i, i) for i in range(40)}
    with pytest.raises(ValueError, match="0 to 7"):
        list(near_matches(left, right, 8))


@pytest.mark.parametrize("num_shared", [1, 2, 3])
@pytest.mark.parametrize("max_distance", [0, 1, 3, 4])
def test_any_number_of_blocks_finds_the_same(num_shared: int, max_distance: int) -> None:
    hashes = near_hashes(RANDOM, 150, alike=100)
    masks = hamming._masks(list(range(64)), num_shared, max_distance + num_shared)
    pairs = [(i, j) for i, j in combinations(range(150), 2) if (int(hashes[i] ^ hashes[j])).bit_count() <= max_distance]
    assert pairs or max_distance == 0
    for i, j in pairs:
        assert any(hashes[i] & mask == hashes[j] & mask for mask in masks)


@pytest.mark.parametrize(
    "hashes",
    [
        np.zeros(0, np.uint64),
        np.array([5], np.uint64),
        np.array([0, 2**64 - 1], np.uint64),
        np.array([7, 7, 7], np.uint64),
        np.uint64(1) << np.arange(64, dtype=np.uint64),
        np.arange(500, dtype=np.uint64),
        np.arange(300, dtype=np.uint64) << np.uint64(55),
        ~np.arange(100, dtype=np.uint64),
    ],
    ids=["none", "one", "opposites", "equal", "single bits", "low bits only", "high bits only", "mostly ones"],
)
@pytest.mark.parametrize("max_distance", [0, 2, MAX_DISTANCE])
def test_hashes_that_are_not_spread_evenly_are_compared_all_the_same(hashes: np.ndarray, max_distance: int) -> None:
    found = {(i, j) for a, b in near_pairs(hashes, max_distance) for i, j in zip(a, b, strict=True)}
    near = distance(hashes[:, None], hashes[None, :]) <= max_distance
    assert found == {(i, j) for i, j in combinations(range(len(hashes)), 2) if near[i, j]}


@pytest.mark.parametrize("crowd", ["spread", "crowded"])
def test_two_hundred_thousand_hashes_take_seconds_and_little_memory(crowd: str) -> None:
    random = np.random.default_rng(3)
    hashes = random.integers(0, 2**64, 200_000, dtype=np.uint64)
    if crowd == "crowded":
        # Some are blank pages: all within a few bits of one hash, which would be 12 million pairs in most tables.
        noise = np.bitwise_or.reduce(np.uint64(1) << random.integers(0, 64, (5, 5_000), dtype=np.uint64), axis=0)
        hashes[:5_000] = np.uint64(0x8180C08000044480) ^ noise
    hashes[-100:] = hashes[1000:1100] ^ np.uint64(0b101 << 30)
    tracemalloc.start()
    start = time.process_time()
    found = {(int(i), int(j)) for a, b in near_pairs(hashes, 4) for i, j in zip(a, b, strict=True) if j >= 199_900}
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert {(1000 + n, 199_900 + n) for n in range(100)} <= found
    # Measured 0.5 s and 0.8 s on one core; the bounds leave room for a busy machine.
    assert seconds < 8
    assert peak < 400e6
