"""Intervals and tests against theory, scipy and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta
from scipy.stats import bootstrap as scipy_bootstrap

from biomedclip.evaluation import influence, metrics, statistics
from biomedclip.evaluation.influence import balanced_accuracy_sums, choose_auroc, first_order_auroc
from biomedclip.evaluation.statistics import Resampler, bootstrap, bound_flawless, paired_bootstrap, resample


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


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_sums_over_units_are_the_naive_loop_over_resamples(seed, grouped, tied):
    rng = np.random.default_rng(seed)
    n, classes = 60, 3
    y, scores = rng.integers(0, classes, n), rng.normal(size=(n, classes))
    scores = np.round(scores, 1) if tied else scores
    groups = [f"g{k}" for k in rng.integers(0, 25, n)] if grouped else None
    resampler = Resampler(n, y=y, groups=groups, resamples=12, seed=seed % 7)
    guess = scores.argmax(1)
    values = resample(
        {"sums": balanced_accuracy_sums(y, guess, classes, resampler), "area": choose_auroc(y, scores, resampler)},
        resampler,
    )
    for row, counts in enumerate(np.vstack(list(resampler.draw())).astype(int)):
        again = np.repeat(np.arange(n), counts)
        table = metrics.confusion(y[again], guess[again], classes)
        assert values["sums"][row] == pytest.approx(metrics.balanced_accuracy(table))
        assert values["area"][row] == pytest.approx(metrics.macro_auroc(y[again], scores[again]))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("classes", [2, 4])
def test_first_order_auroc_is_exact_on_the_data_and_close_on_resamples(grouped, classes):
    rng = np.random.default_rng(classes)
    n = 3000
    y = rng.integers(0, classes, n)
    scores = np.round(rng.normal(size=(n, classes)) + np.eye(classes)[y], 2)
    groups = [f"g{k}" for k in rng.integers(0, 600, n)] if grouped else None
    resampler = Resampler(n, y=y, groups=groups, resamples=150)
    near = first_order_auroc(y, scores, resampler)
    assert near(None) == pytest.approx(metrics.macro_auroc(y, scores), abs=1e-12)
    values = resample({"near": near, "exact": lambda w: metrics.macro_auroc(y, scores, w)}, resampler)
    gap = values["near"] - values["exact"]
    assert gap.std() < 0.06 * values["exact"].std()
    # The bound of influence.py: 1 / (2 sqrt(W V)), for one class of many.
    if not grouped:
        assert gap.std() < 0.5 / math.sqrt(n / classes * n * (1 - 1 / classes))
    interval = bootstrap({"a": near}, resampler)["a"]
    assert interval.method.endswith("-first-order")


def test_exact_auroc_is_chosen_while_it_is_affordable(monkeypatch):
    y, scores = np.arange(40) % 2, np.random.default_rng(0).normal(size=(40, 2))
    resampler = Resampler(40, y=y, resamples=100)
    assert not hasattr(choose_auroc(y, scores, resampler), "approximate")
    monkeypatch.setattr(influence, "EXACT_CELLS", 40 * 2 * 100 - 1)
    assert choose_auroc(y, scores, resampler).approximate == "first-order"


def test_resamples_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(statistics, "_BLOCK_CELLS", 20 * 7)
    values = np.random.default_rng(0).normal(size=20)
    runs = [resample({"m": mean_of(values)}, Resampler(20, resamples=50), threads=t)["m"] for t in (1, 4)]
    assert (runs[0] == runs[1]).all()
    assert len(np.unique(runs[0])) > 40  # blocks have random numbers of their own


def test_bca_is_scipys():
    rng = np.random.default_rng(3)
    values = rng.exponential(size=50)
    ours = bootstrap({"m": mean_of(values)}, Resampler(50, resamples=9999), method="bca")["m"]
    theirs = scipy_bootstrap((values,), np.mean, n_resamples=9999, method="BCa", rng=rng).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    plain = bootstrap({"m": mean_of(values)}, Resampler(50, resamples=9999))["m"]
    assert ours.low > plain.low  # a skewed sample: BCa moves to the right
    assert ours.high > plain.high
    assert ours.method == "bootstrap-bca"


def test_bca_of_strata_is_scipys_of_several_samples():
    rng = np.random.default_rng(4)
    y = np.repeat([0, 1], [25, 40])
    scores = rng.exponential(size=65) + y * 0.7
    ours = bootstrap({"a": lambda w: metrics.auroc(y == 1, scores, w)}, Resampler(65, y=y, resamples=5000),
                     method="bca")["a"]  # fmt: skip

    def area(plus, minus):
        return float(np.mean([(p > minus).mean() + (p == minus).mean() / 2 for p in plus]))

    theirs = scipy_bootstrap((scores[y == 1], scores[y == 0]), area, n_resamples=1500, method="BCa", vectorized=False,
                             rng=rng).confidence_interval  # fmt: skip
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert ours.method == "bootstrap-bca-stratified"


def test_pitfall_22_groups_are_resampled_together_by_default_where_they_are_known():
    y = np.arange(12) % 2
    assert Resampler(12, y=y, groups=[str(i // 3) for i in range(12)]).name() == "bootstrap-percentile-group"
    assert Resampler(12, y=y).name() == "bootstrap-percentile-stratified"


def test_pitfall_23_quantiles_are_numpys_and_resamples_differ_from_each_other():
    values = np.random.default_rng(1).normal(size=30)
    resampler = Resampler(30, resamples=1000)
    drawn = resample({"m": mean_of(values)}, resampler)["m"]
    interval = bootstrap({"m": mean_of(values)}, resampler)["m"]
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    assert len(np.unique(drawn)) == 1000


@pytest.mark.slow
def test_intervals_of_rare_classes_and_groups_cover_about_95_times_in_100():
    rng = np.random.default_rng(7)
    rounds, hits = 400, {"percentile": 0, "bca": 0, "group": 0}
    for seed in range(rounds):
        y = np.repeat([0, 1], [170, 30])
        scores = rng.normal(size=200) + y
        statistic = {"a": lambda w, y=y, s=scores: metrics.auroc(y == 1, s, w)}
        for method in ("percentile", "bca"):
            found = bootstrap(statistic, Resampler(200, y=y, resamples=600, seed=seed), method=method)["a"]
            hits[method] += found.low <= 0.7602499389 <= found.high
        effects = rng.normal(size=60)
        values = np.repeat(effects, 5) + rng.normal(size=300) * 0.3
        groups = [str(g) for g in np.repeat(np.arange(60), 5)]
        found = bootstrap({"m": mean_of(values)}, Resampler(300, groups=groups, resamples=600, seed=seed))["m"]
        hits["group"] += found.low <= 0 <= found.high
    for name, count in hits.items():
        assert 0.91 <= count / rounds <= 0.98, name
