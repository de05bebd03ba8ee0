"""Ranks against a plain sort, with ties, repeated captions and blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomedclip.evaluation import metrics, retrieval
from biomedclip.evaluation.retrieval import caption_ids, chance_recall, chance_reciprocal_rank, rank_candidates


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
