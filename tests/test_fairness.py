"""Subgroup numbers against loops, and the groups too small to have one."""

import math

import numpy as np
import pytest
from sklearn import metrics as sk

from biomedclip.evaluation import fairness, metrics

rng = np.random.default_rng(0)
Y, SCORES = rng.integers(0, 2, 300), rng.normal(size=300)
SCORES = SCORES + Y
SEX = rng.choice(["F", "M"], 300)


def area(rows, weights=None):
    return metrics.auroc(Y[rows] == 1, SCORES[rows], weights)


def test_each_group_has_its_own_value_and_the_summary_follows_the_formulas():
    found = fairness.measure_subgroups(area, list(SEX))
    values = {g: sk.roc_auc_score(Y[g == SEX], SCORES[g == SEX]) for g in "FM"}
    assert found.measured == pytest.approx(values)
    overall = sk.roc_auc_score(Y, SCORES)
    assert found.overall == pytest.approx(overall)
    assert found.gap == pytest.approx(abs(values["F"] - values["M"]))
    assert found.worst[1] == pytest.approx(min(values.values()))
    assert found.equity_scaled == pytest.approx(overall / (1 + sum(abs(overall - v) for v in values.values())))


def test_small_groups_are_listed_and_not_measured_and_missing_ones_counted():
    ages = ["old"] * 150 + ["young"] * 145 + ["child"] * 3 + [None] * 2
    found = fairness.measure_subgroups(area, ages)
    child = next(g for g in found.groups if g.name == "child")
    assert math.isnan(child.value)
    assert child.reason == "fewer than 20 samples"
    assert set(found.measured) == {"old", "young"}
    assert found.missing == 2
    empty = fairness.measure_subgroups(area, [None] * 300)
    assert empty.worst is None
    assert math.isnan(empty.gap)
    assert math.isnan(empty.equity_scaled)


def test_a_group_of_one_class_is_undefined_with_a_reason():
    halves = np.where(Y == 1, "sick", "well")
    found = fairness.measure_subgroups(area, list(halves))
    assert all(g.reason == "undefined for this subgroup" for g in found.groups)


def test_intervals_are_of_the_subgroup_alone():
    found = fairness.measure_subgroups(area, list(SEX), y=Y, resamples=200)
    for group in found.groups:
        assert group.interval.low < group.value < group.interval.high
        assert group.interval.method == "bootstrap-percentile-stratified"
    small = fairness.measure_subgroups(area, ["a"] * 30 + ["b"] * 270, y=Y, resamples=200)
    width = {g.name: g.interval.high - g.interval.low for g in small.groups}
    assert width["a"] > 2 * width["b"]


def test_parity_and_odds_are_the_largest_differences_of_rates():
    guess = SCORES > 0.5
    shares = [guess[g == SEX].mean() for g in "FM"]
    assert fairness.parity_difference(guess, list(SEX)) == pytest.approx(abs(shares[0] - shares[1]))
    odds = fairness.equalised_odds(Y, guess, list(SEX))
    for kind, key in ((1, "tpr_gap"), (0, "fpr_gap")):
        rates = [guess[(g == SEX) & (kind == Y)].mean() for g in "FM"]
        assert odds[key] == pytest.approx(abs(rates[0] - rates[1]))
    assert odds["equalised_odds"] == max(odds["tpr_gap"], odds["fpr_gap"])
    assert math.isnan(fairness.parity_difference(guess, ["x"] * 300))


def test_intersections_need_all_their_parts():
    assert fairness.cross(["F", None, "M"], ["old", "old", "young"]) == ["F/old", None, "M/young"]


def test_a_model_that_looks_at_the_background_has_a_gap():
    y = np.arange(400) % 2
    background = np.where(rng.random(400) < 0.8, y, 1 - y)  # mostly with its class
    names = [("water", "land")[b] for b in background]
    cheat = fairness.background_gap(background == y, y, names)
    assert cheat["worst"] == 0
    assert cheat["mean"] == pytest.approx(0.5)
    assert cheat["gap"] == pytest.approx(0.5)
    assert fairness.background_gap(np.ones(400), y, names)["gap"] == 0
