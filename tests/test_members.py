"""What caps and keep-probabilities leave of an epoch, and that nothing is lost for good."""

from collections import Counter

import numpy as np
import pytest

from biomedclip.stream.members import Caps, Members, uniform_hash

GROUPS = np.array([0] * 10 + [1] * 7 + [-1] * 5, dtype=np.int32)


def test_a_cap_takes_its_number_each_epoch_and_every_row_equally_often():
    members = Members("a", 22, seed=1, caps=Caps(GROUPS, np.array([4, 7])), keep=None)
    seen: Counter[int] = Counter()
    for epoch in range(5):
        rows = members.rows(epoch)
        assert sorted(rows) == list(rows)
        assert Counter(GROUPS[rows].tolist()) == {0: 4, 1: 7, -1: 5}
        seen.update(rows.tolist())
    assert all(seen[row] == 2 for row in range(10))  # 5 epochs x 4 of 10
    assert all(seen[row] == 5 for row in range(10, 22))
    assert members.before(3) == 48
    assert members.locate(47) == (2, 15)
    other = Members("a", 22, seed=2, caps=Caps(GROUPS, np.array([4, 7])), keep=None)
    assert other.rows(0).tolist() != members.rows(0).tolist()


def test_a_keep_probability_is_drawn_anew_each_epoch():
    keep = np.where(np.arange(2000) < 1000, 0.25, 1.0)
    members = Members("a", 2000, seed=3, caps=None, keep=keep)
    epochs = [members.rows(epoch) for epoch in range(40)]
    assert all(set(range(1000, 2000)) <= set(rows.tolist()) for rows in epochs)
    rare = Counter(row for rows in epochs for row in rows.tolist() if row < 1000)
    assert 0.24 < sum(rare.values()) / 40_000 < 0.26
    assert len(rare) == 1000
    sizes = [len(rows) for rows in epochs]
    assert members.before(7) == sum(sizes[:7])
    assert members.locate(sum(sizes[:7])) == (7, 0)
    assert members.locate(sum(sizes[:7]) - 1) == (6, sizes[6] - 1)
    fresh = Members("a", 2000, seed=3, caps=None, keep=keep)
    assert fresh.locate(sum(sizes[:9]) + 1) == (9, 1)


def test_an_epoch_that_keeps_nothing_is_passed_over():
    keep = np.full(2, 0.5)
    members = Members("a", 2, seed=0, caps=None, keep=keep)
    sizes = [len(members.rows(epoch)) for epoch in range(12)]
    assert 0 in sizes
    found = [members.locate(n) for n in range(sum(sizes))]
    assert found == [(epoch, place) for epoch, size in enumerate(sizes) for place in range(size)]


def test_the_hash_is_uniform_and_depends_on_every_fact():
    rows = np.arange(20_000)
    one, other = uniform_hash(rows, 1, 2), uniform_hash(rows, 2, 1)
    for values in (one, other, uniform_hash(rows, 1, 3)):
        assert np.histogram(values, bins=10, range=(0, 1))[0] == pytest.approx(np.full(10, 2000), rel=0.1)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.03
