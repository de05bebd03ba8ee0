"""Several labels, grades and options per image, against scikit-learn, scipy and loops."""

import math

import numpy as np
import pytest
from scipy.stats import kendalltau
from sklearn import metrics as sk

from biomedclip.evaluation import metrics, multilabel, options, ordinal

rng = np.random.default_rng(0)


def test_labels_that_are_not_stated_take_no_part():
    truth, scores = rng.integers(0, 2, (60, 3)), rng.normal(size=(60, 3))
    hidden = rng.random((60, 3)) < 0.3
    partly = np.where(hidden, multilabel.UNSTATED, truth)
    for c, found in enumerate(multilabel.per_label(partly, scores, "abc")):
        rows = ~hidden[:, c]
        assert found.auroc == pytest.approx(sk.roc_auc_score(truth[rows, c], scores[rows, c]))
        assert found.auprc == pytest.approx(sk.average_precision_score(truth[rows, c], scores[rows, c]))
        assert found.positives + found.negatives == rows.sum()
    expected = sk.roc_auc_score(truth, scores, average="macro")
    assert multilabel.macro(truth, scores, metrics.auroc) == pytest.approx(expected)
    f1 = sk.f1_score(truth, scores > 0, average="macro")
    assert multilabel.macro_f1(truth, scores, 0.0) == pytest.approx(f1)


def test_counts_weigh_labels_as_repetition_does():
    truth, scores = rng.integers(-1, 2, (40, 2)), rng.normal(size=(40, 2))
    counts = rng.integers(0, 3, (2, 40))
    for metric in (metrics.auroc, metrics.average_precision):
        weighted = multilabel.macro(truth, scores, metric, counts)
        for row, value in zip(counts, weighted, strict=True):
            again = np.repeat(np.arange(40), row)
            assert value == pytest.approx(multilabel.macro(truth[again], scores[again], metric))


def test_a_label_without_negatives_is_undefined_with_a_reason_and_left_out_of_the_mean():
    truth, scores = np.c_[np.ones(4, int), [0, 1, 1, 0]], rng.normal(size=(4, 2))
    first, second = multilabel.per_label(truth, scores, ["all", "some"])
    assert math.isnan(first.auroc)
    assert first.reason == "no negative sample"
    assert second.reason is None
    assert multilabel.macro(truth, scores, metrics.auroc) == pytest.approx(second.auroc)


def test_rows_become_truth_with_uncertain_and_unmentioned_apart():
    rows = dict(labels=[["a"], [], ["b"]], negatives=[["b"], [], []], uncertain=[[], ["a"], []], classes=["a", "b"])
    assert multilabel.read_labels(**rows, closed=False).tolist() == [[1, 0], [-1, -1], [-1, 1]]
    assert multilabel.read_labels(**rows, closed=True).tolist() == [[1, 0], [-1, 0], [0, 1]]


def test_thresholds_are_the_youden_points_of_each_label():
    truth, scores = rng.integers(0, 2, (50, 2)), rng.normal(size=(50, 2))
    found = multilabel.choose_thresholds(truth, scores)
    for c in range(2):
        gains = [(scores[truth[:, c] == 1, c] >= t).mean() - (scores[truth[:, c] == 0, c] >= t).mean()
                 for t in scores[:, c]]  # fmt: skip
        at = (scores[truth[:, c] == 1, c] >= found[c]).mean() - (scores[truth[:, c] == 0, c] >= found[c]).mean()
        assert at == pytest.approx(max(gains))


def test_pitfall_27_grades_know_how_far_off_a_guess_is():
    y = np.array([0, 1, 2, 3, 4] * 6)
    near, far = np.clip(y + 1, 0, 4), np.where(y == 4, 4, (y + 3) % 5)
    assert metrics.accuracy(y, near) == metrics.accuracy(y, far)  # plain accuracy cannot tell them apart
    assert ordinal.quadratic_kappa(y, near, 5) > 0.6 > ordinal.quadratic_kappa(y, far, 5)
    assert ordinal.quadratic_kappa(y, near, 5) == pytest.approx(sk.cohen_kappa_score(y, near, weights="quadratic"))
    assert ordinal.mean_absolute_error(y, near) == pytest.approx(sk.mean_absolute_error(y, near))
    assert ordinal.within_one(y, near) == 1 > ordinal.within_one(y, far)


def test_the_expected_grade_is_the_mean_and_halves_go_up():
    p = np.array([[0.5, 0.5, 0], [0, 0.5, 0.5], [0.25, 0.5, 0.25]])
    assert ordinal.expected_grade(p) == pytest.approx([0.5, 1.5, 1.0])
    assert ordinal.round_grade(ordinal.expected_grade(p), 3).tolist() == [1, 2, 1]
    y, e = [0, 1, 2, 1], [0.1, 0.9, 1.2, 1.2]
    assert ordinal.rank_correlation(y, e) == pytest.approx(kendalltau(y, e).statistic)
    assert math.isnan(ordinal.rank_correlation([1, 1], [0.2, 0.3]))


def test_options_are_compared_within_their_image_and_ties_share_the_credit():
    cosines, sizes = [0.1, 0.3, 0.2, 0.5, 0.5, 0.4, 0.4, 0.4], [3, 2, 3]
    assert options.chosen(cosines, sizes).tolist() == [1, 0, 0]
    credit = options.credit(cosines, sizes, [1, 1, 2])
    assert credit == pytest.approx([1, 1 / 2, 1 / 3])
    assert options.credit(cosines, sizes, [0, 0, 0]) == pytest.approx([0, 1 / 2, 1 / 3])


def test_pitfall_10_guessing_has_no_accuracy_over_chance_and_no_metric_reads_indices():
    sizes = rng.integers(2, 7, 4000)
    answers = np.asarray([rng.integers(0, m) for m in sizes])
    guess = options.credit(rng.normal(size=sizes.sum()), sizes, answers)
    assert options.over_chance(guess, sizes) == pytest.approx(0, abs=0.03)
    assert options.over_chance(np.ones(4000), sizes) == 1
    collapsed = options.credit(np.zeros(sizes.sum()), sizes, answers)
    assert options.over_chance(collapsed, sizes) == pytest.approx(0, abs=1e-12)
    assert not hasattr(options, "macro_f1")


def test_pitfall_30_pooled_and_macro_are_two_numbers():
    credits, sets = [1, 1, 1, 0], ["big", "big", "big", "small"]
    assert options.pooled_and_macro(credits, sets) == {"pooled": 0.75, "macro_over_sets": 0.5}
    assert options.macro_accuracy([1, 0, 1], ["cell", "cell", "none"]) == 0.75


def test_cosines_that_are_no_options_are_refused():
    with pytest.raises(ValueError, match="do not make"):
        options.chosen([0.1, 0.2], [3])
    with pytest.raises(ValueError, match="NaN"):
        options.chosen([0.1, np.nan], [2])
    assert options.chosen([], []).tolist() == []
