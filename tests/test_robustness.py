"""Corruptions, prompt draws and foils: deterministic by sample, true to their kind."""

import numpy as np
import pytest
from PIL import Image

from biomedclip.errors import ConfigError
from biomedclip.evaluation import composition, metrics, robustness, sensitivity
from biomedclip.evaluation.tasks import Ensemble
from biomedclip.evaluation.zero_shot import score_classes

rng = np.random.default_rng(0)
SMOOTH = np.asarray(Image.fromarray(rng.integers(40, 210, (16, 16, 3), dtype=np.uint8)).resize((64, 48)))


@pytest.mark.parametrize("name", robustness.CORRUPTIONS)
def test_a_corruption_is_a_function_of_the_sample_and_grows_with_severity(name):
    made = [robustness.corrupt(SMOOTH, name, s, sample_id="a") for s in robustness.SEVERITIES]
    for picture in made:
        assert picture.shape == SMOOTH.shape
        assert picture.dtype == np.uint8
    again = robustness.corrupt(SMOOTH, name, 3, sample_id="a")
    assert (again == made[2]).all()
    # Averaged over samples, since some corruptions draw a direction.
    change = [np.mean([np.abs(robustness.corrupt(SMOOTH, name, s, sample_id=str(k)).astype(float) - SMOOTH).mean()
                       for k in range(12)]) for s in (1, 3, 5)]  # fmt: skip
    assert 0 < change[0] < change[1] < change[2]


def test_random_corruptions_differ_between_samples_and_seeds():
    for name in ("gaussian_noise", "shot_noise", "stain", "occlusion", "bias_field"):
        one = robustness.corrupt(SMOOTH, name, 3, sample_id="a")
        assert (one != robustness.corrupt(SMOOTH, name, 3, sample_id="b")).any()
        assert (one != robustness.corrupt(SMOOTH, name, 3, sample_id="a", seed=1)).any()


def test_unknown_corruptions_and_severities_are_refused():
    with pytest.raises(ConfigError, match="is not known"):
        robustness.corrupt(SMOOTH, "fog", 1, sample_id="a")
    with pytest.raises(ConfigError, match="1 to 5"):
        robustness.corrupt(SMOOTH, "blur", 0, sample_id="a")


def test_what_is_kept_is_measured_from_chance():
    found = robustness.summarise_corruptions(0.9, {"blur": {1: 0.8, 5: 0.6}, "jpeg": {1: 0.9, 5: 0.9}}, chance=0.5)
    assert found["by_corruption"] == pytest.approx({"blur": 0.7, "jpeg": 0.9})
    assert found["kept"] == pytest.approx((0.8 - 0.5) / 0.4)
    assert found["worst"] == "blur"
    assert np.isnan(robustness.summarise_corruptions(0.4, {"blur": {1: 0.4}}, chance=0.5)["kept"])


def test_a_background_is_replaced_outside_of_the_mask_only():
    mask = np.zeros(SMOOTH.shape[:2], dtype=bool)
    mask[10:20, 10:20] = True
    made = robustness.replace_background(SMOOTH, mask, np.zeros((5, 5, 3), np.uint8))
    assert (made[mask] == SMOOTH[mask]).all()
    assert (made[~mask] == 0).all()
    with pytest.raises(ValueError, match="does not fit"):
        robustness.replace_background(SMOOTH, mask.T, SMOOTH)


def unit(*shape):
    vectors = rng.normal(size=shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def test_pitfall_03_the_spread_over_single_prompts_is_reported():
    images, prompts, y = unit(60, 6), [unit(4, 6), unit(5, 6)], np.arange(60) % 2

    def score(cosines):
        return metrics.balanced_accuracy(metrics.confusion(y, cosines.argmax(1), 2))

    found = sensitivity.prompt_sensitivity(images, prompts, score, draws=12)
    assert found.values.shape == (12,)
    for value, (a, b) in zip(found.values, found.picks, strict=True):
        single = score_classes(images, [prompts[0][[a]], prompts[1][[b]]], Ensemble(mode="none"), 1)
        assert value == score(single)
    summary = found.summarise()
    assert summary["min"] <= summary["q1"] <= summary["median"] <= summary["q3"] <= summary["max"]
    assert summary["iqr"] == pytest.approx(summary["q3"] - summary["q1"])
    again = sensitivity.prompt_sensitivity(images, prompts, score, draws=12)
    assert (again.picks == found.picks).all()


def test_few_combinations_are_all_taken_once_and_aligned_draws_share_their_template():
    assert sensitivity.draw_prompts([2, 3], 50).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    aligned = sensitivity.draw_prompts([40, 40, 40], 20, aligned=True)
    assert aligned.shape == (20, 3)
    assert (aligned == aligned[:, :1]).all()
    with pytest.raises(ConfigError, match="equally many"):
        sensitivity.draw_prompts([2, 3], 5, aligned=True)
    nothing = sensitivity.Sensitivity(values=np.array([np.nan]), picks=np.zeros((1, 2), int))
    assert nothing.summarise()["undefined"] == 1
    assert np.isnan(nothing.summarise()["median"])


@pytest.mark.parametrize(
    ("caption", "foil"),
    [
        ("Nodule in the left upper lobe.", "Nodule in the right upper lobe."),
        ("Left lung: effusion; right lung clear.", "Right lung: effusion; left lung clear."),
        ("LEFT kidney", "RIGHT kidney"),
        ("A hyperintense lesion", "A hypointense lesion"),
        ("Left and right lungs are clear.", None),
        ("A leftover specimen", None),
        ("Chest X-ray.", None),
    ],
)
def test_sides_are_swapped_consistently_or_not_at_all(caption, foil):
    assert composition.swap_side(caption) == foil


@pytest.mark.parametrize(
    ("caption", "foil"),
    [
        ("No evidence of pneumothorax.", "Pneumothorax."),
        ("Chest X-ray without effusion.", "Chest X-ray with effusion."),
        ("Chest X-ray with a nodule.", "Chest X-ray without nodule."),
        ("CT shows an abscess.", "CT shows no abscess."),
        ("Presence of tumour cells.", "Absence of tumour cells."),
        ("Axial CT.", None),
        ("The specimen is normal.", None),
    ],
)
def test_negation_is_turned_and_turning_it_is_no_double_negation(caption, foil):
    assert composition.turn_negation(caption) == foil


def test_a_finding_is_replaced_by_one_the_caption_does_not_name():
    names = ["pneumonia", "effusion", "lobar pneumonia", "atelectasis"]
    foil = composition.swap_finding("X-ray showing a lobar pneumonia.", ["lobar pneumonia", "pneumonia", "effusion"])
    assert foil == "X-ray showing an effusion."
    for k in range(6):
        made = composition.swap_finding("Effusion seen.", names, seed=k)
        assert made != "Effusion seen."
        assert made[0].isupper()
    assert composition.swap_finding("Effusion.", names, 3) == composition.swap_finding("Effusion.", names, 3)
    assert composition.swap_finding("A bone.", names) is None
    assert composition.swap_finding("Effusion.", ["effusion"]) is None
    assert composition.swap_finding("Effusion.", []) is None


def test_a_model_that_does_not_read_scores_like_chance():
    same = rng.normal(size=50)
    assert composition.pair_credit(same, same).mean() == 0.5
    assert composition.pair_credit([0.3, 0.1], [0.2, 0.2]).tolist() == [1, 0]
    table = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.9, 0.1], [0.95, 0.99]], [[0.5, 0.5], [0.5, 0.5]]])
    assert composition.group_scores(table) == pytest.approx({"text": 2 / 3, "image": 1 / 3, "group": 1 / 3})
    random = composition.group_scores(rng.normal(size=(20_000, 2, 2)))
    assert random == pytest.approx({"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}, abs=0.02)
