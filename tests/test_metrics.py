"""Metrics against scikit-learn, scipy and brute force, with ties, missing classes and single samples."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import logsumexp
from scipy.stats import mannwhitneyu
from sklearn import metrics as sk

from biomedclip.evaluation import calibration, metrics

FEW = settings(max_examples=60, deadline=None, derandomize=True)
labels_and_scores = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        arrays(np.int64, n, elements=st.integers(0, 3)),
        # A handful of distinct values, so that most scores tie.
        arrays(np.float64, (n, 4), elements=st.sampled_from([-0.5, -0.25, 0.0, 0.25, 0.5])),
    )
)


def present_classes(y):
    return np.unique(y)


@FEW
@given(labels_and_scores)
def test_confusion_metrics_agree_with_sklearn(case):
    y, scores = case
    guess = scores.argmax(1)
    table = metrics.confusion(y, guess, 4)
    assert (table == sk.confusion_matrix(y, guess, labels=range(4))).all()
    assert metrics.accuracy(y, guess) == pytest.approx(sk.accuracy_score(y, guess))
    recalls = sk.recall_score(y, guess, labels=present_classes(y), average=None, zero_division=0)
    assert metrics.balanced_accuracy(table) == pytest.approx(recalls.mean())
    f1 = sk.f1_score(y, guess, labels=present_classes(y), average="macro", zero_division=0)
    assert metrics.macro_f1(table) == pytest.approx(f1)
    if len(set(y)) > 1 and len(set(guess)) > 1:
        assert metrics.mcc(table) == pytest.approx(sk.matthews_corrcoef(y, guess))
        for weights, name in (("none", None), ("linear", "linear"), ("quadratic", "quadratic")):
            expected = sk.cohen_kappa_score(y, guess, labels=range(4), weights=name)
            assert metrics.kappa(table, weights) == pytest.approx(expected)
    else:
        assert math.isnan(metrics.mcc(table))


@FEW
@given(labels_and_scores)
def test_ranking_metrics_agree_with_sklearn_and_scipy_under_ties(case):
    y, scores = case
    positive, column = y == 1, scores[:, 0]
    assume(positive.any() and not positive.all())
    area = metrics.auroc(positive, column)
    assert area == pytest.approx(sk.roc_auc_score(positive, column))
    u = mannwhitneyu(column[positive], column[~positive]).statistic
    assert area == pytest.approx(u / positive.sum() / (~positive).sum())
    assert metrics.average_precision(positive, column) == pytest.approx(sk.average_precision_score(positive, column))


def test_auroc_equals_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    y, s = rng.random(50) < 0.3, rng.integers(0, 6, 50)
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(s[y], s[~y])]
    assert metrics.auroc(y, s) == pytest.approx(np.mean(pairs))


def test_macro_auroc_is_the_mean_over_defined_classes_and_names_nothing_zero():
    rng = np.random.default_rng(1)
    y, scores = rng.integers(0, 3, 60), rng.normal(size=(60, 3))
    expected = np.mean([sk.roc_auc_score(y == c, scores[:, c]) for c in range(3)])
    assert metrics.macro_auroc(y, scores) == pytest.approx(expected)
    wider = np.hstack([scores, rng.normal(size=(60, 1))])  # a class that y never has
    assert metrics.macro_auroc(y, wider) == pytest.approx(expected)
    assert math.isnan(metrics.auroc_per_class(y, wider)[3])


def test_two_class_auroc_ranks_by_the_difference_of_the_scores():
    rng = np.random.default_rng(2)
    y = rng.integers(0, 2, 80)
    # Both cosines share an offset per image that says nothing about the class.
    scores = rng.normal(size=(80, 1)) * 10 + np.stack([np.zeros(80), y + rng.normal(size=80) * 0.1], axis=1)
    assert metrics.macro_auroc(y, scores) == pytest.approx(sk.roc_auc_score(y, scores[:, 1] - scores[:, 0]))
    assert metrics.macro_auroc(y, scores) > 0.99 > metrics.auroc(y == 1, scores[:, 1])


@pytest.mark.parametrize("y", [[], [0], [1], [0, 0, 0]])
def test_what_is_undefined_is_nan_with_a_reason(y):
    y, scores = np.asarray(y, dtype=int), np.zeros((len(y), 2))
    assert math.isnan(metrics.macro_auroc(y, scores))
    assert math.isnan(metrics.mcc(metrics.confusion(y, scores.argmax(1), 2)))
    assert metrics.explain_undefined(y, 2) is not None
    assert math.isnan(metrics.accuracy(y, y)) == (len(y) == 0)
    assert math.isnan(metrics.balanced_accuracy(metrics.confusion(y, y, 2))) == (len(y) == 0)


def test_no_samples_are_undefined_for_every_metric():
    none, scores = np.zeros(0, int), np.zeros((0, 3))
    for value in (
        calibration.calibration_error(none, scores), calibration.brier(none, scores), metrics.recall_at(none, 1),
        calibration.negative_log_likelihood(none, scores), metrics.median_rank(none),
        metrics.mean_reciprocal_rank(none),
        metrics.macro_f1(metrics.confusion(none, none, 3)), metrics.macro_average_precision(none, scores),
        metrics.kappa(metrics.confusion(none, none, 3)),
    ):  # fmt: skip
        assert math.isnan(value)


def test_calibration_agrees_with_a_loop_over_right_closed_bins_and_with_sklearn():
    rng = np.random.default_rng(3)
    logits, y = rng.normal(size=(200, 3)) * 2, rng.integers(0, 3, 200)
    p = metrics.softmax(logits)
    top, right = p.max(1), p.argmax(1) == y
    expected = 0.0
    for low in np.arange(15) / 15:
        members = (top > low) & (top <= low + 1 / 15)
        if members.any():
            expected += members.mean() * abs(right[members].mean() - top[members].mean())
    assert calibration.calibration_error(y, p) == pytest.approx(expected)
    assert calibration.negative_log_likelihood(y, logits) == pytest.approx(sk.log_loss(y, p))
    two = metrics.softmax(logits[:, :2])
    assert calibration.brier(y % 2, two) == pytest.approx(2 * sk.brier_score_loss(y % 2, two[:, 1]))


def test_a_certain_mistake_has_a_finite_likelihood():
    assert calibration.negative_log_likelihood([0], [[-2000.0, 2000.0]]) == pytest.approx(4000)
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(5, 3)) * 300
    expected = np.mean(logsumexp(logits, axis=1) - logits[:, 0])
    assert calibration.negative_log_likelihood(np.zeros(5, int), logits) == pytest.approx(expected)


@FEW
@given(labels_and_scores, st.integers(0, 2**32 - 1))
def test_order_of_samples_and_scale_of_scores_change_nothing(case, seed):
    y, scores = case
    order = np.random.default_rng(seed).permutation(len(y))
    for metric in (metrics.macro_auroc, metrics.macro_average_precision):
        value = metric(y, scores)
        assert metric(y[order], scores[order]) == pytest.approx(value, nan_ok=True)
        assert metric(y, scores * 8) == pytest.approx(value, nan_ok=True)
    # Classes renamed together with their columns.
    rename = np.random.default_rng(seed).permutation(4)
    back = np.argsort(rename)
    assert metrics.macro_auroc(rename[y], scores[:, back]) == pytest.approx(metrics.macro_auroc(y, scores), nan_ok=True)


ALL_WEIGHTED = {
    "accuracy": lambda y, s, w: metrics.accuracy(y, s.argmax(1), w),
    "balanced": lambda y, s, w: metrics.balanced_accuracy(metrics.confusion(y, s.argmax(1), 4, w)),
    "f1": lambda y, s, w: metrics.macro_f1(metrics.confusion(y, s.argmax(1), 4, w)),
    "mcc": lambda y, s, w: metrics.mcc(metrics.confusion(y, s.argmax(1), 4, w)),
    "kappa": lambda y, s, w: metrics.kappa(metrics.confusion(y, s.argmax(1), 4, w), "quadratic"),
    "auroc": lambda y, s, w: metrics.macro_auroc(y, s, w),
    "auprc": lambda y, s, w: metrics.macro_average_precision(y, s, w),
    "ece": lambda y, s, w: calibration.calibration_error(y, metrics.softmax(s), w),
    "brier": lambda y, s, w: calibration.brier(y, metrics.softmax(s), w),
    "nll": lambda y, s, w: calibration.negative_log_likelihood(y, s, w),
    "recall": lambda y, s, w: metrics.recall_at(y + 1, 2, w),
    "mrr": lambda y, s, w: metrics.mean_reciprocal_rank(y + 1, w),
    "median": lambda y, s, w: metrics.median_rank(y + 1.5, w),
}


@pytest.mark.parametrize("name", ALL_WEIGHTED)
@FEW
@given(labels_and_scores, st.integers(0, 2**32 - 1))
def test_counts_give_what_repeated_samples_give(name, case, seed):
    (y, scores), metric = case, ALL_WEIGHTED[name]
    counts = np.random.default_rng(seed).integers(0, 3, (3, len(y)))
    weighted = metric(y, scores, counts)
    assert weighted.shape == (3,)
    for row, value in zip(counts, weighted, strict=True):
        if row.sum():
            again = np.repeat(np.arange(len(y)), row)
            assert value == pytest.approx(metric(y[again], scores[again], None), nan_ok=True, abs=1e-12)


def test_median_rank_agrees_with_numpy():
    for n in (1, 2, 5, 8):
        ranks = np.random.default_rng(n).integers(1, 20, n) + 0.5
        assert metrics.median_rank(ranks) == np.median(ranks)


def test_a_rank_shared_with_one_other_is_no_hit_at_one():
    assert metrics.recall_at([1, 1.5, 2, 7], 1) == 0.25
    assert metrics.recall_at([1, 1.5, 2, 7], 2) == 0.75
    assert metrics.mean_reciprocal_rank([1, 2, 4]) == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)


def test_weights_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"weights must be \(R, 2\)"):
        metrics.accuracy([0, 1], [0, 1], np.ones(2))


@FEW
@given(labels_and_scores)
def test_precision_and_weighted_f1_agree_with_sklearn(case):
    y, scores = case
    guess = scores.argmax(1)
    table = metrics.confusion(y, guess, 4)
    assert metrics.weighted_f1(table) == pytest.approx(sk.f1_score(y, guess, average="weighted", zero_division=0))
    expected = sk.precision_score(y, guess, labels=range(4), average=None, zero_division=np.nan)
    assert metrics.precision_per_class(table) == pytest.approx(expected, nan_ok=True)


def test_pitfall_06_three_auroc_definitions_are_three_names_and_agree_with_sklearn():
    rng = np.random.default_rng(8)
    y = rng.integers(0, 4, 120)
    p = metrics.softmax(rng.normal(size=(120, 4)) + np.eye(4)[y])
    assert metrics.macro_auroc(y, p) == pytest.approx(sk.roc_auc_score(y, p, multi_class="ovr"))
    assert metrics.pairwise_auroc(y, p) == pytest.approx(sk.roc_auc_score(y, p, multi_class="ovo"))
    assert metrics.micro_auroc(y, p) == pytest.approx(sk.roc_auc_score(np.eye(4)[y].ravel(), p.ravel()))
    assert len({round(f(y, p), 6) for f in (metrics.macro_auroc, metrics.pairwise_auroc, metrics.micro_auroc)}) == 3


def test_metrics_agree_with_torchmetrics():
    torch = pytest.importorskip("torch")
    from torchmetrics.functional import classification as tm

    rng = np.random.default_rng(9)
    y = rng.integers(0, 3, 90)
    p = metrics.softmax(rng.normal(size=(90, 3)) + np.eye(3)[y])
    probabilities, labels = torch.tensor(p), torch.tensor(y)
    table = metrics.confusion(y, p.argmax(1), 3)
    for ours, theirs in (
        (metrics.macro_auroc(y, p), tm.multiclass_auroc(probabilities, labels, 3)),
        (metrics.balanced_accuracy(table), tm.multiclass_accuracy(probabilities, labels, 3)),
        (metrics.mcc(table), tm.multiclass_matthews_corrcoef(probabilities, labels, 3)),
        (metrics.kappa(table, "quadratic"), tm.multiclass_cohen_kappa(probabilities, labels, 3, weights="quadratic")),
        (metrics.macro_average_precision(y, p), tm.multiclass_average_precision(probabilities, labels, 3)),
        (calibration.calibration_error(y, p), tm.multiclass_calibration_error(probabilities, labels, 3)),
        (calibration.calibration_error(y, p, norm="max"),
         tm.multiclass_calibration_error(probabilities, labels, 3, norm="max")),
    ):  # fmt: skip
        assert ours == pytest.approx(float(theirs), abs=1e-6)


@FEW
@given(labels_and_scores, st.sampled_from([0.5, 0.8, 0.9, 0.95]))
def test_operating_points_are_the_best_of_sklearns_curve(case, wanted):
    y, scores = case
    positive = y == 1
    assume(positive.any() and not positive.all())
    false_rate, true_rate, thresholds = sk.roc_curve(positive, scores[:, 0], drop_intermediate=False)
    ours = metrics.roc_curve(positive, scores[:, 0])
    for a, b in zip(ours, (false_rate, true_rate, thresholds), strict=True):
        assert a == pytest.approx(b)
    assert metrics.sensitivity_at(positive, scores[:, 0], wanted) == true_rate[1 - false_rate >= wanted - 1e-12].max()
    assert metrics.specificity_at(positive, scores[:, 0], wanted) == pytest.approx(
        1 - false_rate[true_rate >= wanted - 1e-12].min()
    )
    cut = metrics.youden_threshold(positive, scores[:, 0])
    gain = (scores[positive, 0] >= cut).mean() - (scores[~positive, 0] >= cut).mean()
    assert gain == pytest.approx((true_rate - false_rate).max())


def test_operating_points_without_a_kind_are_undefined():
    assert math.isnan(metrics.sensitivity_at([True, True], [1.0, 2.0], 0.9))
    assert math.isnan(metrics.specificity_at([False], [1.0], 0.9))
    assert math.isnan(metrics.youden_threshold([False], [1.0]))


def test_pitfall_12_nan_scores_are_refused_with_their_rows():
    with pytest.raises(ValueError, match=r"NaN in rows \[1\]"):
        metrics.auroc([True, False], [1.0, np.nan])


def test_pitfall_08_a_majority_guess_has_the_balanced_accuracy_of_chance():
    y = np.r_[np.zeros(941, int), np.ones(59, int)]  # TCGA-TIL: 5.9 % positive
    assert metrics.accuracy(y, np.zeros(1000, int)) == pytest.approx(0.941)
    assert metrics.balanced_accuracy(metrics.confusion(y, np.zeros(1000, int), 2)) == 0.5
