"""The shuffle and the cuts between shards; and what the shuffle is for: no batch full of one article's figures."""

from __future__ import annotations

import numpy as np
import pytest

from data_builders.order import cut_shards, shuffle_rank, shuffle_ranks


def test_the_order_of_two_samples_depends_on_nothing_but_them_and_the_seed() -> None:
    keys = [f"pmc-{number}" for number in range(500)]
    by_bytes = sorted(keys, key=lambda key: shuffle_rank(key, 3))
    ranks = shuffle_ranks(keys, 3)
    by_numbers = [keys[i] for i in np.lexsort((ranks[:, 1], ranks[:, 0]))]
    assert by_bytes == by_numbers != sorted(keys)
    assert [key for key in by_bytes if key in keys[:100]] == sorted(keys[:100], key=lambda key: shuffle_rank(key, 3))
    assert by_bytes != sorted(keys, key=lambda key: shuffle_rank(key, 4))
    assert shuffle_ranks([], 0).shape == (0, 2)


@pytest.mark.parametrize("seed", range(5))
def test_shards_are_cut_as_by_going_through_the_rows(seed: int) -> None:
    random = np.random.default_rng(seed)
    groups = np.sort(random.integers(0, 3, 300))
    sizes = random.integers(1, 100, 300)
    max_samples, max_bytes = int(random.integers(1, 40)), int(random.integers(50, 1500))
    expected, rows, size = [], [], 0
    for row in range(300):
        if rows and groups[row] != groups[row - 1]:
            expected.append(rows)
            rows, size = [], 0
        rows.append(row)
        size += sizes[row]
        if len(rows) >= max_samples or size >= max_bytes:
            expected.append(rows)
            rows, size = [], 0
    if rows:
        expected.append(rows)
    found = list(cut_shards(groups, sizes, max_samples, max_bytes))
    assert [list(range(shard.start, shard.stop)) for shard in found] == expected
    assert [shard.number for shard in found] == list(range(len(expected)))
    assert all((groups[shard.start : shard.stop] == shard.group).all() for shard in found)


def test_no_rows_are_no_shards() -> None:
    assert not list(cut_shards(np.zeros(0, np.int8), np.zeros(0, np.int64), 10, 10))


def same_article_share(articles: np.ndarray, batch: int) -> float:
    """Of all pairs of samples within a batch, those of one article."""
    blocks = articles[: len(articles) // batch * batch].reshape(-1, batch)
    same = (blocks[:, :, None] == blocks[:, None, :]).sum() - blocks.size
    return float(same / (blocks.size * (batch - 1)))


def test_the_shuffle_brings_false_negatives_down_to_chance() -> None:
    random = np.random.default_rng(0)
    counts = random.geometric(1 / 8, 3000)
    articles = np.repeat(np.arange(len(counts)), counts)
    keys = [f"pmc-{article}-v1-f{row}-p0" for row, article in enumerate(articles)]
    ranks = shuffle_ranks(keys, 0)
    shuffled = articles[np.lexsort((ranks[:, 1], ranks[:, 0]))]
    total = len(articles)
    chance = float((counts * (counts - 1)).sum() / (total * (total - 1)))
    in_order, after = same_article_share(articles, 64), same_article_share(shuffled, 64)
    # Figures of one article are 15 % of the pairs of a batch in article order, and 0.06 % by chance.
    assert in_order > 100 * chance
    # Their number is nearly Poisson: five standard deviations.
    expected = chance * (total // 64) * 64 * 63 / 2
    assert abs(after / chance - 1) < 5 / expected**0.5
