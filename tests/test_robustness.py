"""Corruptions, prompt draws and foils: deterministic by sample, true to their kind."""

import hashlib
import io

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


def change(name, severity, picture=SMOOTH, sample="a", seed=0):
    return robustness.corrupt(picture, name, severity, sample_id=sample, seed=seed)


def draws(name, severity, sample="a", seed=0):
    """The random numbers of a corruption, made again from what its name, severity, seed and sample say."""
    digest = hashlib.sha256(f"{seed}\n{name}\n{severity}\n{sample}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_light_and_contrast_are_their_formulas(severity):
    wide = SMOOTH.astype(float)
    shift = 255 * {1: 0.08, 3: 0.22, 5: 0.4}[severity]
    up = draws("brightness", severity).random() < 0.5
    assert (change("brightness", severity) == np.clip(np.round(wide + (shift if up else -shift)), 0, 255)).all()
    share = {1: 0.75, 3: 0.45, 5: 0.2}[severity]
    assert (change("contrast", severity) == np.round(wide.mean() + (wide - wide.mean()) * share)).all()
    power = {1: 1.2, 3: 1.7, 5: 2.6}[severity]
    power = power if draws("gamma", severity).random() < 0.5 else 1 / power
    assert (change("gamma", severity) == np.round(255 * (wide / 255) ** power)).all()


def test_noise_has_the_spread_it_says():
    grey = np.full((200, 200, 3), 120, np.uint8)
    for severity, spread in ((1, 6), (3, 20)):
        noise = change("gaussian_noise", severity, grey).astype(float) - 120
        assert noise.mean() == pytest.approx(0, abs=0.3)
        assert noise.std() == pytest.approx(spread, rel=0.03)
    for severity, photons in ((1, 120), (3, 25)):
        counts = change("shot_noise", severity, grey).astype(float)
        # Poisson: the variance of the counts is their mean.
        assert counts.mean() == pytest.approx(120, rel=0.01)
        assert counts.std() == pytest.approx(255 / photons * np.sqrt(120 / 255 * photons), rel=0.04)


def test_blur_pixelation_and_jpeg_are_those_of_other_implementations():
    from scipy.ndimage import gaussian_filter

    # Radius .013 of the shorter side of 48 is below the least, 0.3 x 3.
    expected = gaussian_filter(SMOOTH.astype(float), (0.9, 0.9, 0), mode="nearest")
    inner = np.abs(change("blur", 3).astype(float) - expected)[4:-4, 4:-4]
    assert inner.mean() < 1.0  # Pillow's filter is three box filters
    square = np.asarray(Image.fromarray(SMOOTH).resize((50, 50)))
    found = change("pixelate", 4, square)  # .22 of 50 is 11 blocks a side
    edges = np.round(np.arange(12) * 50 / 11).astype(int)
    assert len(np.unique(found.reshape(-1, 3), axis=0)) <= 121
    block = square[edges[5] + 1 : edges[6] - 1, edges[5] + 1 : edges[6] - 1].reshape(-1, 3).mean(0)
    assert np.abs(found[25, 25].astype(float) - block).max() < 6
    buffer = io.BytesIO()
    Image.fromarray(SMOOTH).save(buffer, "JPEG", quality=16)
    with Image.open(buffer) as decoded:
        assert (change("jpeg", 3) == np.asarray(decoded.convert("RGB"))).all()


def test_occlusion_blackens_a_box_of_its_share_and_nothing_else():
    light = np.full((100, 200, 3), 90, np.uint8)
    for severity, share in ((1, 0.1), (5, 0.42)):
        dark = (change("occlusion", severity, light) == 0).all(2)
        assert dark.sum() == round(100 * share) * round(200 * share)
        rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
        assert dark[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


def test_a_bias_field_is_smooth_positive_and_the_same_for_all_colours():
    grey = np.full((60, 60, 3), 100, np.uint8)
    ratio = np.log(change("bias_field", 3, grey).astype(float) / 100)
    assert np.abs(ratio - ratio[:, :, :1]).max() == 0
    assert np.abs(np.diff(ratio[:, :, 0], axis=0)).max() < 0.1
    # Bicubic weights add up to at most 1.25 in size along each side; a grey is half a level off.
    assert np.abs(ratio).max() < 0.45 * 1.25**2 + 0.02


def test_stain_changes_each_stains_amount_by_one_line_for_the_whole_picture():
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    amounts = rng.uniform(0.1, 0.5, (400, 3))
    picture = (256 * np.exp(-amounts @ stains) - 1).round().astype(np.uint8).reshape(20, 20, 3)
    before, after = (-np.log((p.reshape(-1, 3).astype(float) + 1) / 256) @ np.linalg.inv(stains)
                     for p in (picture, change("stain", 3, picture)))  # fmt: skip
    for c in range(3):
        slope, shift = np.polyfit(before[:, c], after[:, c], 1)
        assert abs(slope - 1) < 0.17 + 0.05
        assert abs(shift) < 0.017 + 0.02
        assert np.abs(after[:, c] - slope * before[:, c] - shift).max() < 0.06  # rounding to 256 greys


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
