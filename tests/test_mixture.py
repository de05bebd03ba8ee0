"""Weights over steps: exact shares, ramps, and counts far ahead without walking there."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from biomedclip.errors import ConfigError
from biomedclip.stream.mixture import PATTERN, RAMP_PIECES, Mixture, cut_segments, deal_slots, mixing_weights


def test_shares_are_exact_after_a_whole_pattern():
    assert Counter(deal_slots([1, 1, 2]).tolist()) == {0: PATTERN // 4, 1: PATTERN // 4, 2: PATTERN // 2}
    assert len(deal_slots([1e-9, 1.0])) == PATTERN
    assert 0 in deal_slots([1e-9, 1.0])
    assert set(deal_slots([0.0, 1.0]).tolist()) == {1}
    many = deal_slots([1.0] * 1000)
    assert min(Counter(many.tolist()).values()) >= 16


def test_a_ramp_moves_the_share_from_one_source_to_the_other():
    mixture = Mixture({"a": {0: 1, 100: 0}, "b": {0: 0, 100: 1}}, batch_size=20)
    counts = [Counter(mixture.deal(step)[0].tolist()) for step in range(140)]
    assert counts[0][0] >= 19
    assert 9 <= counts[50][0] <= 11
    assert all(count == {1: 20} for count in counts[100:])
    falling = [count[0] for count in counts]
    assert all(later <= earlier + 1 for earlier, later in pairwise(falling))


def test_counts_before_a_step_are_those_of_walking_there():
    mixture = Mixture({"a": {0: 1, 7: 1, 8: 3, 50: 0.5}, "b": 1, "c": {20: 0, 30: 2}}, batch_size=7, first_step=3)
    given = np.zeros(3, dtype=np.int64)
    for step in range(3, 80):
        assert mixture.before(step).tolist() == given.tolist()
        sources, ordinals = mixture.deal(step)
        for source, ordinal in zip(sources.tolist(), ordinals.tolist(), strict=True):
            assert ordinal == given[source]
            assert mixture.step_of(source, ordinal, 80) == step
            given[source] += 1
    assert mixture.step_of(0, int(given[0]), 80) is None
    fresh = Mixture({"a": {0: 1, 7: 1, 8: 3, 50: 0.5}, "b": 1, "c": {20: 0, 30: 2}}, batch_size=7, first_step=3)
    assert fresh.before(79).tolist() == mixture.before(79).tolist()
    assert fresh.before(10**9).sum() == (10**9 - 3) * 7


def test_a_jump_is_two_points_next_to_each_other_and_a_ramp_has_few_pieces():
    jump = cut_segments([{0: 1, 9: 1, 10: 5}, 1.0])
    assert [(s.first, s.weights) for s in jump] == [(0, (1, 1)), (9, (1, 1)), (10, (5, 1))]
    assert len(cut_segments([{0: 1, 100_000: 2}])) == RAMP_PIECES + 1
    late = cut_segments([{0: 0, 100: 1}, 1.0], first_step=60)
    assert late[0].first == 60
    assert late[0].weights[0] == pytest.approx(0.6, abs=0.02)


def test_sizes_scale_every_point_of_a_weight():
    assert mixing_weights([{0: 1, 5: 2}, 3.0], [4, 9], 0.5) == [{0: 2, 5: 4}, 9]


def test_a_step_without_any_weight_is_refused():
    with pytest.raises(ConfigError, match="above 0 from step 10"):
        Mixture({"a": {0: 1, 9: 1, 10: 0}}, batch_size=4)
