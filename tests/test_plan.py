"""The plan: shares, coverage, purity, articles kept apart."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomedclip.errors import ConfigError
from biomedclip.stream.plan import PATTERN, Plan, PlanSource, deal_slots, draw_int, spread_rows


def source(name: str, rows: int, weight: float = 1.0, per_article: int = 0) -> PlanSource:
    groups = tuple(f"{name}-{i // per_article}" if per_article else None for i in range(rows))
    return PlanSource(name=name, weight=weight, groups=groups)


def test_a_batch_depends_on_the_step_alone():
    sources = [source("a", 50, 2), source("b", 31, 1)]
    forward = Plan(sources, batch_size=8, seed=3)
    ahead = [forward.batch(step) for step in range(60)]
    fresh = Plan(sources, batch_size=8, seed=3)
    assert [fresh.batch(step) for step in reversed(range(60))] == ahead[::-1]
    assert Plan(sources, batch_size=8, seed=4).batch(0) != ahead[0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=6), st.integers(1, 70), st.integers(0, 400))
def test_every_batch_gives_each_source_its_share_within_one_sample(weights, batch_size, step):
    plan = Plan([source(f"s{i}", 40, w) for i, w in enumerate(weights)], batch_size=batch_size, seed=0)
    counts = Counter(pick.source for pick in plan.batch(step))
    assert sum(counts.values()) == batch_size
    total = (step + 1) * batch_size
    for number, weight in enumerate(weights):
        exact = weight / sum(weights)
        # The rounding of the weights adds at most half a part in PATTERN a slot, on top of the one of the deal.
        assert abs(plan.given(total)[number] - total * exact) <= 1.5 + total * 1.5 / PATTERN
        assert abs(counts[number] - batch_size * exact) <= 2.5


def test_shares_are_exact_after_a_whole_pattern():
    assert Counter(deal_slots([1, 1, 2]).tolist()) == {0: PATTERN // 4, 1: PATTERN // 4, 2: PATTERN // 2}
    assert len(deal_slots([1e-9, 1.0])) == PATTERN
    assert 0 in deal_slots([1e-9, 1.0])


def test_every_epoch_visits_every_row_once():
    plan = Plan([source("a", 30, 1, per_article=4), source("b", 7, 1)], batch_size=10, seed=0)
    seen: dict[tuple[int, int], list[int]] = {}
    for step in range(42):
        for pick in plan.batch(step):
            seen.setdefault((pick.source, pick.epoch), []).append(pick.row)
    assert sorted(seen[0, 0]) == list(range(30))
    assert all(sorted(seen[1, epoch]) == list(range(7)) for epoch in range(29))
    assert seen[1, 0] != seen[1, 1]


def test_rows_of_an_article_are_apart_where_a_blind_shuffle_puts_them_together():
    groups = [f"article-{i // 5}" for i in range(2000)]
    order = spread_rows(groups, seed=1)
    assert sorted(order.tolist()) == list(range(2000))
    collisions = 0
    for first in range(0, 2000, 50):
        batch = [groups[row] for row in order[first : first + 50]]
        collisions += len(batch) - len(set(batch))
    assert collisions == 0
    assert not (spread_rows(groups, seed=2) == order).all()


def test_a_substitute_is_another_row_of_the_same_source_and_always_the_same():
    plan = Plan([source("a", 10), source("b", 5)], batch_size=4, seed=0)
    for pick in plan.batch(0):
        found = [plan.substitute(pick, attempt) for attempt in range(20)]
        assert all(other.source == pick.source and other.row != pick.row for other in found)
        assert len({other.row for other in found}) > 1
        assert found == [plan.substitute(pick, attempt) for attempt in range(20)]


def test_the_plan_of_other_data_has_another_identity():
    one = Plan([source("a", 10)], batch_size=4, seed=0)
    assert one.sha256 == Plan([source("a", 10)], batch_size=4, seed=0).sha256
    others = [
        Plan([source("a", 11)], batch_size=4, seed=0),
        Plan([source("a", 10)], batch_size=5, seed=0),
        Plan([source("a", 10)], batch_size=4, seed=1),
        Plan([source("b", 10)], batch_size=4, seed=0),
    ]
    assert len({one.sha256, *(other.sha256 for other in others)}) == 5


def test_the_draws_of_the_plan_are_pinned():
    # A change here changes the samples of every run that is resumed.
    plan = Plan([source("a", 6, 1, per_article=2), source("b", 5, 2)], batch_size=6, seed=7)
    assert draw_int("augment", 0, "key", 1) == 12409646247270809622
    assert [(p.source, p.row, p.epoch) for p in plan.batch(1)] == PINNED


PINNED = [(1, 4, 0), (0, 4, 0), (1, 1, 1), (1, 2, 1), (0, 3, 0), (1, 4, 1)]


@pytest.mark.parametrize(
    ("sources", "batch_size", "word"),
    [
        ([], 4, "no source"),
        ([source("a", 0)], 4, "no samples"),
        ([source("a", 3, 0.0)], 4, "weight"),
        ([source("a", 3, float("nan"))], 4, "weight"),
        ([source("a", 3)], 0, "batch_size"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(sources, batch_size, word):
    with pytest.raises(ConfigError, match=word):
        Plan(sources, batch_size=batch_size, seed=0)
