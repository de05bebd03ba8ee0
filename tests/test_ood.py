"""Scores of images that do not belong, against formulas, torchmetrics and scikit-learn."""

import math

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis as scipy_mahalanobis
from scipy.special import logsumexp
from scipy.special import softmax as scipy_softmax
from scipy.stats import entropy
from sklearn import metrics as sk

from biomedclip.errors import DataError
from biomedclip.evaluation import ood

rng = np.random.default_rng(0)


def unit(values):
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


TRAIN_Y = np.arange(90) % 3
CENTRES = unit(rng.normal(size=(3, 8)))
TRAIN = unit(CENTRES[TRAIN_Y] + 0.2 * rng.normal(size=(90, 8)))
INSIDE = unit(CENTRES[np.arange(60) % 3] + 0.2 * rng.normal(size=(60, 8)))
FAR = unit(rng.normal(size=(40, 8)))
TEXT = CENTRES


def test_scores_of_logits_are_scipys():
    cosines = INSIDE @ TEXT.T
    p = scipy_softmax(20.0 * cosines.astype(float), axis=1)
    assert ood.msp(cosines, 20) == pytest.approx(p.max(1))
    assert ood.max_logit(cosines) == pytest.approx(cosines.max(1))
    assert ood.energy(cosines, 20) == pytest.approx(logsumexp(20.0 * cosines.astype(float), axis=1))
    assert ood.mcm(cosines) == pytest.approx(scipy_softmax(cosines.astype(float), axis=1).max(1))
    assert ood.negative_entropy(cosines, 20) == pytest.approx(-entropy(p, axis=1))
    assert np.isfinite(ood.energy(cosines, 1e6)).all()


def test_scores_of_embeddings_are_their_formulas():
    distances = np.sort(np.linalg.norm(INSIDE[:, None].astype(float) - TRAIN, axis=2), axis=1)
    assert ood.nearest_distance(INSIDE, TRAIN, 5) == pytest.approx(-distances[:, 4], abs=1e-5)
    means = np.stack([TRAIN[c == TRAIN_Y].mean(0) for c in range(3)])
    centred = (TRAIN - means[TRAIN_Y]).astype(float)
    precision = np.linalg.inv(centred.T @ centred / 90)
    expected = [-min(scipy_mahalanobis(f, m, precision) ** 2 for m in means) for f in INSIDE]
    assert ood.mahalanobis(INSIDE, TRAIN, TRAIN_Y) == pytest.approx(expected, rel=1e-4)


def test_vim_is_the_probability_of_the_virtual_class():
    cosines, train_cosines = INSIDE @ TEXT.T, TRAIN @ TEXT.T
    score = ood.vim(INSIDE, cosines, TRAIN, train_cosines, 20, dimensions=5)
    _, _, directions = np.linalg.svd(TRAIN.astype(float))
    rest = directions[5:].T
    alpha = (20 * train_cosines.max(1)).mean() / np.linalg.norm(TRAIN @ rest, axis=1).mean()
    virtual = alpha * np.linalg.norm(INSIDE @ rest, axis=1)
    p = scipy_softmax(np.c_[20 * cosines, virtual], axis=1)[:, -1]
    # The paper's score is that probability; ours is a decreasing function of it.
    assert 1 / (1 + np.exp(score)) == pytest.approx(p, rel=1e-3)
    with pytest.raises(DataError, match="main dimensions"):
        ood.vim(INSIDE, cosines, TRAIN, train_cosines, 20, dimensions=8)


def test_no_prompts_follow_clipn():
    cosines, no = INSIDE @ TEXT.T, INSIDE @ unit(-TEXT + rng.normal(size=TEXT.shape)).T
    found = ood.no_prompts(cosines, no, 10)
    p = scipy_softmax(10 * cosines, axis=1)
    yes = np.asarray([[scipy_softmax([10 * c, 10 * n])[0] for c, n in zip(*row, strict=True)]
                      for row in zip(cosines, no, strict=True)])  # fmt: skip
    assert found["ctw"] == pytest.approx(yes[np.arange(60), p.argmax(1)], rel=1e-4)
    assert found["atd"] == pytest.approx((p * yes).sum(1), rel=1e-4)


@pytest.mark.parametrize("digits", [8, 1])
def test_separation_is_scikit_learns_and_fpr95_a_loop_over_thresholds(digits):
    a, b = np.round(rng.normal(size=80) + 1, digits), np.round(rng.normal(size=50), digits)
    found = ood.separate(a, b)
    belongs = np.r_[np.ones(80), np.zeros(50)]
    scores = np.r_[a, b]
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(belongs, scores))
    assert found["aupr_in"] == pytest.approx(sk.average_precision_score(belongs, scores))
    assert found["aupr_out"] == pytest.approx(sk.average_precision_score(1 - belongs, -scores))
    assert found["fpr95"] == pytest.approx(min((b >= t).mean() for t in scores if (a >= t).mean() >= 0.95))


def test_sides_exchanged_mirror_the_auroc_and_an_empty_side_is_undefined():
    a, b = rng.normal(size=30), rng.normal(size=20)
    assert ood.separate(a, b)["auroc"] == pytest.approx(1 - ood.separate(b, a)["auroc"])
    assert all(math.isnan(ood.separate(a, [])[k]) for k in ("auroc", "fpr95"))


def test_near_and_far_are_reported_apart():
    near = unit(CENTRES[np.arange(40) % 3] + 0.45 * rng.normal(size=(40, 8)))
    sets = {"home": INSIDE, "near": near, "far": FAR}
    table = ood.near_and_far(lambda n: ood.mahalanobis(sets[n], TRAIN, TRAIN_Y), "home",
                             {"near": ["near"], "far": ["far", "near"]})  # fmt: skip
    assert table["near"]["mean"]["auroc"] == table["far"]["sets"]["near"]["auroc"]
    values = [row["auroc"] for row in table["far"]["sets"].values()]
    assert table["far"]["mean"]["auroc"] == pytest.approx(np.mean(values))
    assert table["far"]["sets"]["far"]["auroc"] > 0.9
