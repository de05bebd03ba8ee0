"""Tests between models against scipy, all pairs and exhaustive swaps."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, friedmanchisquare, permutation_test

from biomedclip.evaluation import metrics
from biomedclip.evaluation.comparisons import compare_ranks, delong, holm, mcnemar, paired_permutation
from biomedclip.evaluation.statistics import Resampler, paired_bootstrap


def test_mcnemar_is_the_mid_p_of_the_binomial():
    a = np.array([1] * 9 + [0] * 3 + [1] * 20, dtype=bool)
    b = np.array([0] * 9 + [1] * 3 + [1] * 20, dtype=bool)
    assert mcnemar(a, b) == pytest.approx(2 * binom.cdf(3, 12, 0.5) - binom.pmf(3, 12, 0.5))
    assert mcnemar(b, a) == mcnemar(a, b)
    assert mcnemar(a, a) == 1.0


def test_delong_agrees_with_the_variance_from_all_pairs():
    rng = np.random.default_rng(5)
    y = rng.random(60) < 0.4
    a, b = rng.integers(0, 9, 60) + y, rng.integers(0, 9, 60) + 3 * y  # with ties
    found = delong(y, a, b)
    kernels = [(s[y][:, None] > s[~y]) + (s[y][:, None] == s[~y]) / 2 for s in (a, b)]
    d = kernels[1] - kernels[0]
    variance = d.mean(1).var(ddof=1) / y.sum() + d.mean(0).var(ddof=1) / (~y).sum()
    assert found.value == pytest.approx(d.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-5)
    resampled = paired_bootstrap(
        lambda w: metrics.auroc(y, a, w), lambda w: metrics.auroc(y, b, w), Resampler(60, y=y, resamples=4000)
    )
    assert found.high - found.low == pytest.approx(resampled.high - resampled.low, rel=0.15)
    assert delong(y, a, a).p == 1.0
    with pytest.raises(ValueError, match="two positives"):
        delong(np.array([True, False, False]), [1, 2, 3], [1, 2, 3])


def test_holm_is_the_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.01, math.nan, 0.04]) == pytest.approx([0.02, math.nan, 0.04], nan_ok=True)


def test_every_swap_is_tried_where_there_are_few_and_gives_scipys_p():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=8), rng.normal(size=8) + 0.8
    value, p = paired_permutation(np.mean, a, b)
    expected = permutation_test((b, a), lambda x, y: np.mean(x) - np.mean(y), permutation_type="samples",
                                n_resamples=np.inf, vectorized=False).pvalue  # fmt: skip
    assert value == pytest.approx(b.mean() - a.mean())
    assert p == pytest.approx(expected)


def test_groups_swap_whole():
    rng = np.random.default_rng(1)
    a, b, groups = rng.normal(size=9), rng.normal(size=9) + 1, list("aaabbbccc")
    signs = np.asarray(list(itertools.product([1, -1], repeat=3)))
    sums = (signs[:, [0, 0, 0, 1, 1, 1, 2, 2, 2]] * (b - a)).mean(1)
    _, p = paired_permutation(np.mean, a, b, groups=groups)
    assert p == (np.abs(sums) >= abs((b - a).mean()) - 1e-12).mean()


def test_random_swaps_keep_their_level_and_see_a_difference():
    rng = np.random.default_rng(2)
    y = rng.integers(0, 2, 120)
    area = lambda s: metrics.auroc(y == 1, s)  # noqa: E731
    ps = [paired_permutation(area, rng.normal(size=120) + y, rng.normal(size=120) + y, permutations=99, seed=s)[1]
          for s in range(60)]  # fmt: skip
    assert np.mean(np.asarray(ps) <= 0.2) == pytest.approx(0.2, abs=0.16)
    assert paired_permutation(area, rng.normal(size=120), rng.normal(size=120) + 2 * y, permutations=999)[1] == 0.001


def test_friedman_is_scipys_with_ties_and_the_critical_difference_is_demsars():
    rng = np.random.default_rng(3)
    table = rng.integers(0, 6, (12, 4)).astype(float)
    found = compare_ranks(table, "abcd")
    expected = friedmanchisquare(*table.T)
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue)
    # Demsar 2006, table 5a: q.05 is 2.569 for four and 2.728 for five classifiers.
    assert found.critical_difference == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 12)), abs=2e-3)
    five = compare_ranks(rng.normal(size=(14, 5)), "abcde")
    assert five.critical_difference == pytest.approx(2.728 * math.sqrt(5 * 6 / (6 * 14)), abs=2e-3)


def test_models_within_the_critical_difference_are_named_together():
    table = np.array([[9, 8, 1], [9, 8.5, 2], [8, 9, 1], [7, 6, 2], [9, 8, 3], [8, 9, 0]] * 4, dtype=float)
    found = compare_ranks(table, ["a", "b", "c"])
    assert found.alike == (("a", "b"),)
    assert found.mean_ranks["a"] < found.mean_ranks["b"] < found.mean_ranks["c"] == 3
    assert found.p < 1e-6


def test_ranks_of_too_few_are_undefined_with_a_reason_and_missing_rows_are_left_out():
    assert math.isnan(compare_ranks([[1.0, 2.0]], "ab").p)
    assert "2 models on 1 sets" in compare_ranks([[1.0, 2.0]], "ab").reason
    assert compare_ranks([[1.0, 2.0], [2.0, math.nan], [1.0, 3.0]], "ab").num_sets == 2
    same = compare_ranks([[1.0, 1.0]] * 5, "ab")
    assert (same.statistic, same.p) == (0, 1)
