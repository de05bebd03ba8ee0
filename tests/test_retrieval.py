"""Ranks against a plain sort, with ties, repeated captions and blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomedclip.evaluation import metrics, retrieval
from biomedclip.evaluation.retrieval import (
    caption_ids,
    chance_recall,
    chance_reciprocal_rank,
    rank_candidates,
    recall_all,
)


def unit(rng, *shape):
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def brute_force(queries, candidates, query_ids, candidate_ids):
    ranks = []
    for query, own in zip(queries, query_ids, strict=True):
        scores = [np.float32(np.dot(query.astype(np.float64), c.astype(np.float64))) for c in candidates]
        best = max(s for s, i in zip(scores, candidate_ids, strict=True) if i == own)
        better = sum(s > best for s in scores)
        equal = sum(s == best and i != own for s, i in zip(scores, candidate_ids, strict=True))
        ranks.append(1 + better + equal / 2)
    return ranks


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_ranks_equal_those_of_a_loop_with_ties_and_several_positives(n, kinds, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, kinds, n)
    # Few distinct vectors: most candidates tie with another.
    pool = unit(rng, 3, 4)
    queries, candidates = pool[rng.integers(0, 3, n)], pool[rng.integers(0, 3, n)]
    found = rank_candidates(queries, candidates, ids, ids)
    assert found.ranks.tolist() == brute_force(queries, candidates, ids, ids)


def test_blocks_do_not_change_ranks(monkeypatch):
    rng = np.random.default_rng(0)
    images, texts, ids = unit(rng, 50, 8), unit(rng, 50, 8), np.arange(50)
    whole = rank_candidates(images, texts, ids, ids)
    monkeypatch.setattr(retrieval, "BLOCK_BYTES", 12 * 50 * 7)  # seven queries at a time
    parts = rank_candidates(images, texts, ids, ids)
    assert (whole.ranks == parts.ranks).all()
    assert (whole.top == parts.top).all()


def test_a_perfect_model_ranks_first_and_a_collapsed_one_like_chance():
    rng = np.random.default_rng(1)
    vectors, ids = unit(rng, 20, 8), np.arange(20)
    assert (rank_candidates(vectors, vectors, ids, ids).ranks == 1).all()
    collapsed = np.repeat(vectors[:1], 20, axis=0)
    ranks = rank_candidates(collapsed, collapsed, ids, ids).ranks
    assert (ranks == 1 + 19 / 2).all()
    assert metrics.recall_at(ranks, 5) == 0
    assert metrics.median_rank(ranks) == (20 + 1) / 2


def test_order_of_the_candidates_changes_nothing():
    rng = np.random.default_rng(2)
    images, texts, ids = unit(rng, 30, 6), unit(rng, 30, 6), np.arange(30)
    order = rng.permutation(30)
    assert (
        rank_candidates(images, texts, ids, ids).ranks == rank_candidates(images, texts[order], ids, ids[order]).ranks
    ).all()


def test_captions_that_read_the_same_are_right_answers_to_each_other():
    ids = caption_ids(["A  cell.", "a cell.", "A nucleus", "ａ cell."])
    assert ids.tolist() == [0, 0, 1, 0]
    eye = np.eye(4, dtype=np.float32)
    swapped = eye[[1, 0, 2, 3]]  # each of the first two images looks most like the other's caption
    assert rank_candidates(eye, swapped, ids, ids).ranks.tolist() == [1, 1, 1, 1]
    strict = np.arange(4)
    assert rank_candidates(eye, swapped, strict, strict).ranks[0] > 1


def test_a_query_without_a_positive_has_no_rank():
    eye = np.eye(2, dtype=np.float32)
    ranks = rank_candidates(eye, eye, [0, 7], [0, 1]).ranks
    assert ranks[0] == 1
    assert np.isnan(ranks[1])


def test_chance_is_what_random_rankings_give():
    rng = np.random.default_rng(3)
    hits, inverse = [], []
    for _ in range(4000):
        order = rng.permutation(9)  # candidates 0 and 1 are positives of one query, 2 of another
        hits.append((min(np.flatnonzero(np.isin(order, [0, 1]))) < 3, np.flatnonzero(order == 2)[0] < 3))
        inverse.append(1 / (1 + np.flatnonzero(order == 2)[0]))
    assert chance_recall(9, [2, 1], 3) == pytest.approx(np.mean(hits), abs=0.02)
    assert chance_reciprocal_rank(9) == pytest.approx(np.mean(inverse), abs=0.02)
    assert chance_recall(4, [1, 1], 10) == 1


def in_float64(queries, candidates, query_ids, candidate_ids):
    scores = (queries.astype(np.float64) @ candidates.astype(np.float64).T).astype(np.float32)
    ranks, tied = [], []
    for row, own in zip(scores, query_ids, strict=True):
        positive = candidate_ids == own
        best = row[positive].max()
        tied.append(((row == best) & ~positive).sum())
        ranks.append(1 + (row > best).sum() + tied[-1] / 2)
    return np.asarray(ranks), np.asarray(tied), scores.argmax(1)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6, 0.0])
def test_close_similarities_are_ranked_as_in_float64(spread, monkeypatch):
    rng = np.random.default_rng(5)
    # From spread to collapsed: more and more products differ by less than float32 can tell apart.
    base = rng.normal(size=(1, 64)) + spread * rng.normal(size=(1500, 64))
    images = (base / np.linalg.norm(base, axis=1, keepdims=True)).astype(np.float32)
    texts = images[rng.permutation(1500)]
    ids = rng.integers(0, 700, 1500)
    monkeypatch.setattr(retrieval, "BLOCK_BYTES", 4 * 1500 * 128)
    found = rank_candidates(images, texts, ids, ids)
    ranks, tied, top = in_float64(images, texts, ids, ids)
    assert (found.ranks == ranks).all()
    assert (found.tied == tied).all()
    assert (found.top == top).all()


def test_pitfall_11_half_precision_ties_help_nobody():
    rng = np.random.default_rng(6)
    images, texts = unit(rng, 400, 8), unit(rng, 400, 8)
    coarse = [np.round(v, 1) for v in (images, texts)]  # many exact ties
    ids = np.arange(400)
    found = rank_candidates(*coarse, ids, ids)
    assert found.tied.sum() > 0
    order = rng.permutation(400)
    moved = rank_candidates(coarse[0], coarse[1][order], ids, ids[order])
    assert (found.ranks == moved.ranks).all()  # no first index wins
    assert (found.ranks - found.tied / 2 >= 1).all()


def test_pitfall_14_strict_and_relaxed_are_both_there_and_relaxed_is_never_worse():
    rng = np.random.default_rng(7)
    images, ids = unit(rng, 60, 8), rng.integers(0, 20, 60)
    texts = unit(rng, 20, 8)[ids]  # equal captions have equal embeddings
    relaxed = rank_candidates(images, texts, ids, ids).ranks
    strict = rank_candidates(images, texts, np.arange(60), np.arange(60)).ranks
    assert (relaxed <= strict).all()
    assert (relaxed < strict).any()


def test_pitfall_12_embeddings_that_are_not_finite_are_refused():
    eye = np.eye(3, dtype=np.float32)
    broken = np.where(eye == 1, np.nan, eye).astype(np.float32)
    with pytest.raises(ValueError, match="not finite"):
        rank_candidates(broken, eye, np.arange(3), np.arange(3))


def test_no_candidates_and_no_queries_have_no_ranks():
    eye, none = np.eye(3, dtype=np.float32), np.zeros((0, 3), np.float32)
    assert np.isnan(rank_candidates(eye, none, np.arange(3), np.zeros(0)).ranks).all()
    assert rank_candidates(none, eye, np.zeros(0), np.arange(3)).ranks.shape == (0,)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_recall_of_all_positives_is_that_of_a_loop_and_at_most_that_of_any(n, kinds, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, kinds, n)
    pool = unit(rng, 4, 4)
    queries, candidates = pool[rng.integers(0, 4, n)], pool[rng.integers(0, 4, n)]
    found = recall_all(queries, candidates, ids, ids, ks=(1, 3))
    for i, query in enumerate(queries):
        scores = [np.float32(np.dot(query.astype(np.float64), c.astype(np.float64))) for c in candidates]
        own = [j for j in range(n) if ids[j] == ids[i]]
        ranks = [1 + sum(s > scores[j] for s in scores) + (sum(s == scores[j] for s in scores) - 1) / 2 for j in own]
        assert found[i].tolist() == [np.mean([rank <= k for rank in ranks]) for k in (1, 3)]
    if n == kinds == 1:
        any_of = rank_candidates(queries, candidates, ids, ids).ranks
        assert (found[:, 0] == (any_of <= 1)).all()


def test_full_recall_in_a_case_counted_by_hand_and_any_recall_beside_it():
    """Three right answers of four within the first three: any is 1, all is 2/3 at three and 1/3 at one."""
    query = np.array([[1, 0]], dtype=np.float32)
    angles = np.array([0.0, 0.1, 0.2, 0.3])
    candidates = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    own = np.array([7, 1, 7, 7])
    assert recall_all(query, candidates, [7], own, ks=(1, 3, 4))[0] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rank_candidates(query, candidates, [7], own).ranks[0] == 1
    assert np.isnan(recall_all(query, candidates, [9], own)).all()
    collapsed = np.repeat(candidates[:1], 4, axis=0)
    assert recall_all(query, collapsed, [7], own, ks=(1, 2, 3))[0].tolist() == [0, 0, 1]  # all tie at rank 2.5
