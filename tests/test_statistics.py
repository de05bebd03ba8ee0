"""Intervals and tests against theory, scipy and simulation."""

import math

import numpy as np
import pytest
from scipy.stats import beta, binom

from biomedclip.evaluation import metrics
from biomedclip.evaluation.statistics import (
    Resampler,
    bootstrap,
    bound_flawless,
    delong,
    holm,
    mcnemar,
    paired_bootstrap,
)


def mean_of(values):
    return lambda weights: metrics.weighted_mean(values, weights)


def test_the_same_seed_draws_the_same_resamples_and_another_seed_others():
    draws = [np.vstack(list(Resampler(20, resamples=50, seed=s).draw())) for s in (1, 1, 2)]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()
    assert draws[0].shape == (50, 20)
    assert (draws[0].sum(1) == 20).all()


def test_strata_keep_their_size_in_every_resample():
    y = np.array([0] * 5 + [1] * 12)
    counts = np.vstack(list(Resampler(17, y=y, resamples=40).draw()))
    assert (counts[:, :5].sum(1) == 5).all()
    assert (counts[:, 5:].sum(1) == 12).all()


def test_samples_of_a_group_are_drawn_together():
    groups = list("aabbbcdd")
    counts = np.vstack(list(Resampler(8, groups=groups, resamples=60).draw()))
    for members in ([0, 1], [2, 3, 4], [6, 7]):
        assert (counts[:, members] == counts[:, members[:1]]).all()
    assert len(np.unique(counts.sum(1))) > 1  # groups differ in size, so do the resamples


def test_resamples_without_a_class_are_drawn_again_and_counted():
    y, groups = np.array([0, 0, 0, 1]), list("abcd")
    resampler = Resampler(4, y=y, groups=groups, resamples=500, seed=3)
    counts = np.vstack(list(resampler.draw()))
    assert (counts[:, y == 1].sum(1) > 0).all()
    assert (counts[:, y == 0].sum(1) > 0).all()
    assert len(counts) == 500
    # (3/4)^4 + (1/4)^4 of all draws are degenerate.
    share = resampler.redrawn / (500 + resampler.redrawn)
    assert share == pytest.approx(0.32, abs=0.06)


def test_a_class_that_keeps_going_missing_gives_no_interval_but_a_reason():
    y = np.array([0] * 3 + [1] * 3)
    groups = ["only"] * 3 + ["other"] * 3
    # Two groups, one a class: half of all draws are degenerate, which is still drawn through.
    fine = bootstrap({"m": mean_of(y)}, Resampler(6, y=y, groups=groups, resamples=100))["m"]
    assert fine.reason is None
    many = np.arange(40)  # forty classes in forty groups: practically no draw has them all
    interval = bootstrap({"m": mean_of(many)}, Resampler(40, y=many, groups=list(map(str, many)), resamples=100))["m"]
    assert math.isnan(interval.low)
    assert "lacks" in interval.reason


def test_one_sample_has_no_interval():
    interval = bootstrap({"m": mean_of([1.0])}, Resampler(1))["m"]
    assert math.isnan(interval.low)
    assert "1 independent" in interval.reason


def test_the_interval_of_a_mean_is_the_one_of_the_normal_approximation():
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    interval = bootstrap({"m": mean_of(values)}, Resampler(400, resamples=4000))["m"]
    error = values.std() / 20
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert interval.method == "bootstrap-percentile"


def test_intervals_cover_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = {"accuracy": 0, "auroc": 0}
    truth = {"accuracy": 0.8, "auroc": 0.7602499389}  # auroc of two normals one apart: Phi(1 / sqrt 2)
    rounds = 300
    for seed in range(rounds):
        right = (rng.random(120) < 0.8).astype(float)
        y = np.repeat([0, 1], 60)
        scores = rng.normal(size=120) + y
        statistics = {"accuracy": mean_of(right), "auroc": lambda w, y=y, s=scores: metrics.auroc(y == 1, s, w)}
        for name, interval in bootstrap(statistics, Resampler(120, y=y, resamples=400, seed=seed)).items():
            hits[name] += interval.low <= truth[name] <= interval.high
    for name, count in hits.items():
        # Three standard errors of a binomial share around .95, and a little more room below: n is small.
        assert 0.91 <= count / rounds <= 0.985, name


def test_ignoring_groups_would_cover_far_too_rarely():
    rng = np.random.default_rng(1)
    hits = {True: 0, False: 0}
    for seed in range(150):
        effects = rng.normal(size=30)
        values = np.repeat(effects, 8) + rng.normal(size=240) * 0.2
        groups = [str(g) for g in np.repeat(np.arange(30), 8)]
        for grouped in hits:
            resampler = Resampler(240, groups=groups if grouped else None, resamples=300, seed=seed)
            interval = bootstrap({"m": mean_of(values)}, resampler)["m"]
            hits[grouped] += interval.low <= 0 <= interval.high
    assert hits[True] / 150 > 0.88
    assert hits[False] / 150 < 0.65


def test_the_bound_of_a_flawless_result_is_clopper_pearsons_and_holds_for_several_classes():
    for n in (1, 5, 176):
        assert bound_flawless([n]) == pytest.approx(beta.ppf(0.025, n, 1))
    grid = np.linspace(1e-6, 1, 2001)
    for n, m in ((5, 9), (1, 30), (7, 7)):
        likely = n * np.log(grid)[:, None] + m * np.log(grid)[None] >= np.log(0.025)
        smallest = ((grid[:, None] + grid[None]) / 2)[likely].min()
        assert bound_flawless([n, m]) == pytest.approx(smallest, abs=1e-3)


def test_a_paired_difference_is_sharper_than_two_intervals_suggest():
    rng = np.random.default_rng(2)
    a = (rng.random(300) < 0.7).astype(float)
    b = np.where(rng.random(300) < 0.1, 1.0, a)  # b fixes some mistakes of a and makes none
    difference = paired_bootstrap(mean_of(a), mean_of(b), Resampler(300, resamples=2000))
    assert difference.value == pytest.approx(b.mean() - a.mean())
    assert 0 < difference.low < difference.value < difference.high
    assert difference.p < 0.01
    same = paired_bootstrap(mean_of(a), mean_of(a), Resampler(300, resamples=200))
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1.0)


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
