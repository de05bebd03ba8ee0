"""The ensemble formulas against their definitions."""

import numpy as np
import pytest

from biomedclip.errors import ConfigError
from biomedclip.evaluation.metrics import softmax
from biomedclip.evaluation.tasks import Ensemble
from biomedclip.evaluation.zero_shot import (
    class_weights,
    correct_prior,
    nested_weights,
    pool_patches,
    score_classes,
    score_labels,
    score_options,
)

rng = np.random.default_rng(0)


def unit(*shape):
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


IMAGES, PROMPTS = unit(7, 5), [unit(3, 5), unit(3, 5)]


def test_weights_are_unit_means_unless_asked_otherwise():
    weights = class_weights(PROMPTS)
    assert np.linalg.norm(weights, axis=1) == pytest.approx(1, abs=1e-6)
    loose = class_weights(PROMPTS, renorm=False)
    assert loose == pytest.approx(np.stack([p.mean(0) for p in PROMPTS]), abs=1e-6)
    assert (np.linalg.norm(loose, axis=1) < 1).all()


def test_embed_is_the_cosine_with_the_mean_prompt():
    scores = score_classes(IMAGES, PROMPTS, Ensemble(), 10)
    means = [p.mean(0) for p in PROMPTS]
    expected = np.stack([IMAGES @ m / np.linalg.norm(m) for m in means], axis=1)
    assert scores == pytest.approx(expected, abs=1e-6)
    assert scores.dtype == np.float32
    assert (np.abs(scores) <= 1 + 1e-6).all()


def test_the_mean_of_logits_is_embed_without_renormalising():
    logit = score_classes(IMAGES, PROMPTS, Ensemble(mode="logit"), 10)
    assert logit == pytest.approx(score_classes(IMAGES, PROMPTS, Ensemble(renorm=False), 10), abs=1e-6)


def test_max_and_prob_follow_their_formulas():
    cosines = np.stack([IMAGES @ p.T for p in PROMPTS], axis=1)  # (N, C, K)
    assert score_classes(IMAGES, PROMPTS, Ensemble(mode="max"), 10) == pytest.approx(cosines.max(2), abs=1e-6)
    expected = np.mean([softmax(10 * cosines[:, :, k]) for k in range(3)], axis=0)
    assert softmax(10 * score_classes(IMAGES, PROMPTS, Ensemble(mode="prob"), 10)) == pytest.approx(expected, abs=1e-5)


def test_modes_that_do_not_fit_the_prompts_are_refused():
    uneven = [unit(2, 5), unit(3, 5)]
    with pytest.raises(ConfigError, match="one prompt per class"):
        score_classes(IMAGES, uneven, Ensemble(mode="none"), 10)
    with pytest.raises(ConfigError, match="equally many"):
        score_classes(IMAGES, uneven, Ensemble(mode="prob"), 10)
    single = [unit(1, 5), unit(1, 5)]
    assert score_classes(IMAGES, single, Ensemble(mode="none"), 10) == pytest.approx(
        np.concatenate([IMAGES @ p.T for p in single], axis=1), abs=1e-6
    )


def test_equal_images_get_equal_scores_wherever_they_stand():
    many = np.concatenate([IMAGES[:1], unit(501, 5), IMAGES[:1]])
    scores = score_classes(many, PROMPTS, Ensemble(), 10)
    assert (scores[0] == scores[-1]).all()


def test_lse_lies_between_the_mean_and_the_largest_and_is_scipys():
    from scipy.special import logsumexp

    cosines = np.stack([IMAGES @ p.T for p in PROMPTS], axis=1)
    found = score_classes(IMAGES, PROMPTS, Ensemble(mode="lse"), 10)
    assert found == pytest.approx((logsumexp(10 * cosines, axis=2) - np.log(3)) / 10, abs=1e-6)
    for scale, mode in ((1e-3, "logit"), (1e5, "max")):
        limit = score_classes(IMAGES, PROMPTS, Ensemble(mode=mode), 1)
        assert score_classes(IMAGES, PROMPTS, Ensemble(mode="lse"), scale) == pytest.approx(limit, abs=1e-3)


def test_pitfall_01_the_order_of_an_ensemble_changes_scores_and_has_a_name():
    alike = [np.repeat(unit(1, 5), 3, axis=0), unit(3, 5)]  # one class with prompts that are all the same
    scores = {
        mode: score_classes(IMAGES, alike, Ensemble(mode=mode), 10) for mode in ("embed", "logit", "max", "lse", "prob")
    }
    scores["no renorm"] = score_classes(IMAGES, alike, Ensemble(renorm=False), 10)
    distinct = {value.tobytes() for value in scores.values()}
    assert len(distinct) >= 5
    # Without renormalising the class of alike prompts is scaled by 1, the other by the length of its mean.
    assert np.abs(scores["no renorm"][:, 1]).sum() < np.abs(scores["embed"][:, 1]).sum()
    assert scores["no renorm"][:, 0] == pytest.approx(scores["embed"][:, 0], abs=1e-6)


def test_nested_counts_names_and_flat_counts_prompts():
    one, many = unit(1, 5), unit(6, 5)
    nested, flat = nested_weights([[one, many]]), class_weights([np.concatenate([one, many])])
    mean = many.mean(0) / np.linalg.norm(many.mean(0))
    expected = (one[0] + mean) / np.linalg.norm(one[0] + mean)
    assert nested[0] == pytest.approx(expected, abs=1e-6)
    assert not np.allclose(nested, flat)


def test_labels_are_scored_by_the_difference_of_their_two_sides():
    yes, no = [unit(2, 5), unit(1, 5)], [unit(3, 5), unit(2, 5)]
    scores = score_labels(IMAGES, yes, no)
    p = 1 / (1 + np.exp(-10 * scores))
    for c in range(2):
        pair = np.stack([IMAGES @ class_weights([side[c]])[0] for side in (no, yes)], axis=1)
        assert p[:, c] == pytest.approx(softmax(10 * pair)[:, 1], abs=1e-5)
    with pytest.raises(ConfigError, match="label 0 has equal"):
        score_labels(IMAGES, yes, [yes[0], no[1]])


def test_options_meet_their_own_image_only():
    options, sizes = unit(6, 5), [1, 3, 2]
    scores = score_options(IMAGES[:3], options, sizes)
    whole = IMAGES[:3] @ options.T
    assert scores == pytest.approx([whole[0, 0], *whole[1, 1:4], *whole[2, 4:]], abs=1e-6)
    with pytest.raises(ValueError, match="6 options for 4 places"):
        score_options(IMAGES[:2], options, [2, 2])


def test_slides_are_means_of_their_best_patches():
    scores = np.array([[0.1, 0.9], [0.5, 0.2], [0.3, 0.4], [0.7, 0.0]])
    names, pooled = pool_patches(scores, ["s2", "s1", "s2", "s2"], 2)
    assert names == ("s2", "s1")
    assert pooled == pytest.approx(np.array([[0.5, 0.65], [0.5, 0.2]]))
    assert pool_patches(scores, ["s"] * 4, 100)[1] == pytest.approx(scores.mean(0)[None])
    with pytest.raises(ConfigError, match="1 or more"):
        pool_patches(scores, ["s"] * 4, 0)


def test_a_corrected_prior_leaves_equal_shares_as_they_were():
    scores = score_classes(IMAGES, PROMPTS, Ensemble(), 10)
    same = correct_prior(scores, [0.5, 0.5], 10)
    assert softmax(10 * same) == pytest.approx(softmax(10 * scores), abs=1e-5)
    odds = softmax(10 * correct_prior(scores, [0.8, 0.2], 10))
    expected = softmax(10 * scores) / [0.8, 0.2]
    assert odds == pytest.approx(expected / expected.sum(1, keepdims=True), abs=1e-5)
