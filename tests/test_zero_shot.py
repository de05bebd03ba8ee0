"""The ensemble formulas against their definitions."""

import numpy as np
import pytest

from biomedclip.errors import ConfigError
from biomedclip.evaluation.metrics import softmax
from biomedclip.evaluation.tasks import Ensemble
from biomedclip.evaluation.zero_shot import class_weights, score_classes

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
