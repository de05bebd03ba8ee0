"""The plan: shares, coverage, purity, kin kept apart, and its inverse."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_plans import plan_source as source

from biomedclip.errors import ConfigError
from biomedclip.stream import order as order_module
from biomedclip.stream.members import Caps
from biomedclip.stream.mixture import PATTERN
from biomedclip.stream.plan import Pick, Plan, draw_int


def by_article(rows: int, per_article: int) -> np.ndarray:
    return np.arange(rows) // per_article


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(order_module, "WINDOW_ROWS", 400)
    monkeypatch.setattr(order_module, "WINDOW_SHARDS", 3)


def shared_pct(plan: Plan, ids: np.ndarray, steps: range) -> float:
    """Percent of the samples of source 0 that share their id with another sample of their batch."""
    shared = total = 0
    for step in steps:
        found = ids[[pick.row for pick in plan.batch(step) if pick.source == 0]]
        _, counts = np.unique(found, return_counts=True)
        shared += int(counts[counts > 1].sum())
        total += len(found)
    return 100 * shared / total


def test_a_batch_depends_on_the_step_alone(small_windows):
    sources = [source("a", 2000, 2, articles=by_article(2000, 5), shards=20), source("b", 31, 1)]
    forward = Plan(sources, batch_size=8, seed=3)
    ahead = [forward.batch(step) for step in range(460)]
    fresh = Plan(sources, batch_size=8, seed=3)
    assert [fresh.batch(step) for step in reversed(range(460))] == ahead[::-1]
    assert Plan(sources, batch_size=8, seed=4).batch(0) != ahead[0]
    picks = forward.picks(7)
    assert tuple(picks) == ahead[7]
    assert len(picks) == 8


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
        assert counts[number] <= plan.mixture.most_per_batch(number)


def test_every_epoch_visits_every_row_once(small_windows):
    plan = Plan(
        [source("a", 1700, 3, articles=by_article(1700, 4), shards=13), source("b", 7, 1)], batch_size=16, seed=0
    )
    seen: dict[tuple[int, int], list[int]] = {}
    for step in range(290):
        for pick in plan.batch(step):
            seen.setdefault((pick.source, pick.epoch), []).append(pick.row)
    assert sorted(seen[0, 0]) == sorted(seen[0, 1]) == list(range(1700))
    assert seen[0, 0] != seen[0, 1]
    assert all(sorted(seen[1, epoch]) == list(range(7)) for epoch in range(100))


def test_a_window_comes_from_a_bounded_set_of_shards(small_windows):
    plan = Plan([source("a", 4000, shards=40)], batch_size=50, seed=0)
    # 40 shards of 100 rows: ten windows of 4 shards, 8 batches each.
    shards = [{pick.row // 100 for step in range(8 * w, 8 * w + 8) for pick in plan.batch(step)} for w in range(10)]
    assert [len(window) for window in shards] == [4] * 10
    assert set().union(*shards) == set(range(40))
    again = {pick.row // 100 for step in range(80, 88) for pick in plan.batch(step)}
    assert again not in shards


@pytest.mark.parametrize("per_article", [3, 7])
def test_rows_of_an_article_and_copies_of_a_caption_are_never_in_one_batch(small_windows, per_article):
    articles = by_article(6000, per_article)
    captions = np.random.default_rng(0).permutation(6000) // 4  # each caption four times, anywhere
    plan = Plan([source("a", 6000, 3, articles=articles, captions=captions, shards=60), source("b", 50)],
                batch_size=40, seed=1)  # fmt: skip
    steps = range(420)  # two epochs and the border between them
    assert shared_pct(plan, articles, steps) <= 0.05
    assert shared_pct(plan, captions, steps) <= 1
    assert shared_pct(plan, np.arange(6000), steps) == 0
    blind = Plan([source("a", 6000, 3, shards=60), source("b", 50)], batch_size=40, seed=1)
    assert shared_pct(blind, articles, steps) > 5


def test_an_article_that_is_too_frequent_is_spread_and_the_others_stay_apart():
    articles = np.concatenate([np.zeros(300, dtype=np.int64), 1 + by_article(700, 2)])
    plan = Plan([source("a", 1000, articles=articles)], batch_size=20, seed=0)
    most = [Counter(articles[[pick.row for pick in plan.batch(step)]].tolist()) for step in range(50)]
    assert max(count[0] for count in most) <= 9  # 6 of 20 on average
    assert all(n == 1 for count in most for article, n in count.items() if article)


def test_a_caption_that_everybody_shares_changes_nothing():
    plain = Plan([source("a", 300)], batch_size=20, seed=0)
    shared = Plan([source("a", 300, captions=np.zeros(300, dtype=np.int64))], batch_size=20, seed=0)
    assert [plain.batch(step) for step in range(15)] == [shared.batch(step) for step in range(15)]


def test_the_steps_that_see_a_row_are_those_whose_batch_holds_it(small_windows):
    caps = Caps(np.where(np.arange(1700) < 900, 0, -1).astype(np.int32), np.array([200]))
    sources = [source("a", 1700, {0: 1, 60: 3}, articles=by_article(1700, 4), shards=13, caps=caps), source("b", 7)]
    plan = Plan(sources, batch_size=16, seed=0, first_step=20)
    seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for step in range(20, 300):
        for pick in plan.batch(step):
            seen.setdefault((pick.source, pick.row), []).append((step, pick.epoch))
    for number, row in ((0, 3), (0, 899), (0, 900), (0, 1699), (1, 0), (1, 6)):
        assert plan.steps_of(number, row, 300) == seen.get((number, row), [])
        assert plan.steps_of(number, row, 20) == []
    assert plan.epochs_before(20, 0) == 0
    assert plan.epochs_before(300, 1) == pytest.approx(sum(len(s) for (n, _), s in seen.items() if n == 1) / 7)


def test_a_plan_that_takes_over_begins_new_epochs_at_its_step(small_windows):
    plan = Plan([source("a", 900, shards=9), source("b", 50)], batch_size=10, seed=0)
    later = plan.restarted(33)
    assert later.sha256 != plan.sha256
    assert {pick.epoch for pick in later.batch(33)} == {0}
    assert later.batch(33) != plan.batch(0)
    rows = sorted(pick.row for step in range(33, 213) for pick in later.batch(step) if pick.source == 0)
    assert rows == list(range(900))
    with pytest.raises(ValueError, match="first step"):
        later.batch(32)


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
    caps = Caps(np.zeros(10, dtype=np.int32), np.array([5]))
    others = [
        Plan([source("a", 11)], batch_size=4, seed=0),
        Plan([source("a", 10)], batch_size=5, seed=0),
        Plan([source("a", 10)], batch_size=4, seed=1),
        Plan([source("b", 10)], batch_size=4, seed=0),
        Plan([source("a", 10, 2.0)], batch_size=4, seed=0),
        Plan([source("a", 10, {0: 1, 9: 2})], batch_size=4, seed=0),
        Plan([source("a", 10, shards=2)], batch_size=4, seed=0),
        Plan([source("a", 10, articles=range(10))], batch_size=4, seed=0),
        Plan([source("a", 10, caps=caps)], batch_size=4, seed=0),
        Plan([source("a", 10, keep=np.full(10, 0.5))], batch_size=4, seed=0),
    ]
    assert len({one.sha256, *(other.sha256 for other in others)}) == 11


def test_the_draws_of_the_plan_are_pinned(small_windows):
    # A change here changes the samples of every run that is resumed: raise the plan's version with it.
    plan = Plan([source("a", 6, 1, articles=[0, 0, 1, 1, 2, 2]), source("b", 5, 2)], batch_size=6, seed=7)
    assert draw_int("augment", 0, "key", 1) == 12409646247270809622
    assert [(p.source, p.row, p.epoch) for p in plan.batch(1)] == PINNED
    large = Plan([source("a", 3000, articles=by_article(3000, 5), shards=30)], batch_size=6, seed=7)
    assert [pick.row for pick in large.batch(731)] == PINNED_LARGE
    assert plan.substitute(Pick(0, 3, 1), 2).row == 4


PINNED = [(1, 2, 0), (0, 2, 0), (1, 1, 1), (1, 3, 1), (0, 5, 0), (1, 2, 1)]
PINNED_LARGE = [1644, 2782, 2162, 2120, 1546, 2140]


@pytest.mark.parametrize(
    ("sources", "batch_size", "word"),
    [
        ([], 4, "no source"),
        ([source("a", 0)], 4, "no samples"),
        ([source("a", 3, 0.0)], 4, "weight"),
        ([source("a", 3, float("nan"))], 4, "weight"),
        ([source("a", 3, {})], 4, "weight"),
        ([source("a", 3, {0: 0, 5: 0})], 4, "weight"),
        ([source("a", 3, {0: 0, 5: 1})], 4, "no source has a weight above 0 from step 0"),
        ([source("a", 3)], 0, "batch_size"),
        ([source("a", 3, keep=np.full(3, 0.1))], 2, "less than one sample"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(sources, batch_size, word):
    with pytest.raises(ConfigError, match=word):
        Plan(sources, batch_size=batch_size, seed=0)
