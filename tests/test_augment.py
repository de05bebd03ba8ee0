"""Random pixels depend on (seed, source, key, epoch) alone; presets are physical; formulas are their sources'."""

import math

import numpy as np
import pytest
from PIL import Image
from test_decode import encoded, picture

from biomedclip.config import check_config
from biomedclip.errors import ConfigError
from biomedclip.stream.augment import STAINS, augment, bias_field, jitter_stains
from biomedclip.stream.decode import Geometry, decode_exact
from biomedclip.stream.presets import (
    PRESETS,
    Augmentation,
    augmentation_for,
    find_preset,
    names_height,
    names_side,
    preset_for,
    resolve_setting,
)

MODES = ("shortest", "longest", "squash")


def draw(facts, change, image=None, mode="squash", caption="", size_px=32):
    pixels = np.asarray(image if image is not None else picture(60, 40))
    return augment(pixels, Geometry(size_px=size_px, resize_mode=mode), change, facts=facts, caption=caption)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mode", MODES)
def test_augmented_pixels_depend_on_the_facts_alone(preset, mode):
    change = find_preset(preset)
    first = draw((0, "source", "key", 1), change, mode=mode)
    draw((5, "source", "other", 2), change, mode=mode)
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    assert first.flags.c_contiguous
    assert np.array_equal(draw((0, "source", "key", 1), change, mode=mode), first)
    if preset != "none":
        for facts in ((0, "source", "key", 2), (1, "source", "key", 1), (0, "other", "key", 1)):
            assert not np.array_equal(draw(facts, change, mode=mode), first)


def test_switching_one_setting_on_leaves_the_others_as_they_were():
    base = Augmentation(area=(0.5, 1.0))
    for extra in ({"mirror": True}, {"turn_deg": 9.0}, {"noise": 0.1}, {"gamma": (0.5, 2.0)}, {"blur_px": 2.0}):
        more = base.model_copy(update=extra)
        same = [
            np.array_equal(draw((0, "k", epoch), base), draw((0, "k", epoch), more))
            or np.array_equal(draw((0, "k", epoch), base)[:, ::-1], draw((0, "k", epoch), more))
            for epoch in range(40)
        ]
        assert any(same) or "gamma" in extra, extra


def test_without_augmentation_training_pixels_are_the_exact_ones():
    image = picture(60, 40)
    for mode in MODES:
        exact = decode_exact(encoded(image, "PNG"), Geometry(size_px=32, resize_mode=mode))
        assert np.array_equal(draw((0, "k", 0), Augmentation(), image, mode), exact)
        # Through the other path, too, a whole view is the picture: what is cut and resized here is what is shown there.
        nearly = draw((0, "k", 0), Augmentation(brightness=1e-6), image, "squash" if mode == "shortest" else mode)
        wanted = decode_exact(encoded(image, "PNG"), Geometry(size_px=32, resize_mode=mode if mode != "shortest" else
                                                              "squash"))  # fmt: skip
        assert np.abs(nearly.astype(int) - wanted).mean() < 3


def test_contrast_and_brightness_are_the_same_with_and_without_a_table():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    straight = Augmentation(contrast=(0.5, 1.8), brightness=0.3)
    by_table = straight.model_copy(update={"tint": 1e-9})
    for epoch in range(30):
        found, expected = (draw((0, "k", epoch), change, noise).astype(int) for change in (straight, by_table))
        assert np.abs(found - expected).max() <= 1
        assert found.std() > 5


def test_whole_pictures_lie_in_the_middle_of_what_is_trained_on():
    # With crops alone, evaluation's whole pictures look farther away than anything seen in training.
    for name in PRESETS:
        change = find_preset(name)
        assert change.area[0] <= 1 <= change.area[1], name
        if name != "none":
            assert change.area[1] - 1 >= 0.5 * (1 - change.area[0]), name


def test_a_view_beyond_the_picture_shows_its_edge_and_no_black():
    bright = Image.new("RGB", (30, 30), (200, 180, 160))
    for size_px in (16, 32, 224):
        for turn in (0.0, 15.0):
            change = Augmentation(area=(1.5, 1.6), turn_deg=turn)
            for epoch in range(12):
                pixels = draw((0, "k", epoch), change, bright, size_px=size_px)
                assert np.abs(pixels.astype(int) - [200, 180, 160]).max() <= 1


def test_beyond_tissue_there_is_more_tissue():
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for size_px in (30, 200):
        for turn in (0.0, 10.0):
            flat = {}
            for beyond in ("edge", "mirror"):
                change = Augmentation(area=(1.6, 1.6), turn_deg=turn, beyond=beyond)
                views = [draw((0, "k", epoch), change, noise, size_px=size_px).astype(float) for epoch in range(8)]
                # Edges that are drawn out make lines: of the pixels next to each other many are nearly equal.
                flat[beyond] = min(np.mean(np.abs(np.diff(view, axis=1)) < 0.5) for view in views)
            assert flat["mirror"] < flat["edge"], (size_px, turn)


def test_a_view_is_where_its_box_says():
    # A picture whose red is its column and green its row tells where each pixel of a view came from.
    rows, columns = np.mgrid[0:200, 0:200]
    image = np.stack([columns, rows, np.zeros_like(rows)], axis=2).astype(np.uint8)
    for size_px in (50, 150, 400):
        for turn in (0.0, 30.0):
            seen = draw((0, "k", 3), Augmentation(area=(0.5, 0.5), turn_deg=turn), image, size_px=size_px).astype(float)
            side = 200 * math.sqrt(0.5)
            across = seen[size_px // 2, -1, :2] - seen[size_px // 2, 0, :2]
            down = seen[-1, size_px // 2, :2] - seen[0, size_px // 2, :2]
            # The view's sides are as long as the box's, and at right angles, turned or not.
            assert np.hypot(*across) == pytest.approx(side, rel=0.06)
            assert np.hypot(*down) == pytest.approx(side, rel=0.06)
            assert abs(across @ down) < 0.05 * side * side
            middle = seen[size_px // 2, size_px // 2, :2]
            assert (middle >= side / 2 - 4).all()
            assert (middle <= 200 - side / 2 + 4).all()


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (7, 5)])
@pytest.mark.parametrize("mode", MODES)
def test_the_smallest_and_the_longest_pictures_have_a_view(size, mode):
    for epoch in range(6):
        for preset in ("radiology", "pathology"):
            assert draw((0, "k", epoch), find_preset(preset), picture(*size), mode).shape == (32, 32, 3)


def test_nothing_is_mirrored_where_it_may_not_be():
    change, image = Augmentation(mirror=True), picture(32, 32)
    original, mirrored = np.asarray(image), np.asarray(image)[:, ::-1]
    seen = [draw((0, "k", epoch), change, image) for epoch in range(40)]
    assert all(np.array_equal(pixels, original) or np.array_equal(pixels, mirrored) for pixels in seen)
    assert 10 <= sum(np.array_equal(pixels, mirrored) for pixels in seen) <= 30
    for epoch in range(40):
        assert np.array_equal(draw((0, "k", epoch), change, image, caption="The left eye."), original)
    for name in ("radiology", "ultrasound", "figure", "none"):
        assert not find_preset(name).mirror
        assert not find_preset(name).any_orientation


def test_a_picture_without_orientation_is_seen_in_all_eight_unless_its_caption_has_one():
    change, image = Augmentation(any_orientation=True), picture(32, 32)
    pixels = np.asarray(image)
    eight = [np.rot90(side, k) for side in (pixels, pixels[:, ::-1]) for k in range(4)]
    seen = [draw((0, "k", epoch), change, image) for epoch in range(120)]
    found = {next(i for i, one in enumerate(eight) if np.array_equal(one, view)) for view in seen}
    assert found == set(range(8))
    upright = [draw((0, "k", epoch), change, image, caption="Top: stroma.") for epoch in range(40)]
    assert {next(i for i, one in enumerate(eight) if np.array_equal(one, view)) for view in upright} == {0, 4}
    for epoch in range(40):
        assert np.array_equal(draw((0, "k", epoch), change, image, caption="Upper left: tumour"), pixels)


@pytest.mark.parametrize(
    "caption",
    ["Opacity in the LEFT lower lobe.", "Right-sided effusion", "L, lateral view", "OD fundus", "linke Lunge",
     "poumon gauche", "pulmón izquierdo", "右肺"],
)  # fmt: skip
def test_captions_that_name_a_side_are_recognised(caption):
    assert names_side(caption)


@pytest.mark.parametrize("caption", ["A lymphocyte in blood.", "Bright field copyright", "chest X-ray, clear lungs"])
def test_captions_that_name_no_side_are_left_alone(caption):
    assert not names_side(caption)
    assert not names_height(caption)


@pytest.mark.parametrize(
    ("modality", "preset"),
    [
        ("chest X-ray", "radiology"), ("CT", "radiology"), ("brain MRI", "radiology"), ("PET", "radiology"),
        ("optical coherence tomography", "radiology"), ("x-ray angiography", "radiology"),
        ("ultrasound", "ultrasound"), ("echocardiogram", "ultrasound"),
        ("blood smear microscopy", "microscopy"), ("fluorescence microscopy", "microscopy"),
        ("histopathology, H&E", "pathology"), ("dermatopathology", "pathology"),
        ("dermatoscopy", "dermatoscopy"), ("dermoscopy", "dermatoscopy"), ("endoscopy", "endoscopy"),
        ("fundus photograph", "fundus"), ("fundus_angiography", "fundus"),
        ("clinical photograph", "photograph"), ("slit lamp photograph", "photograph"),
        ("chart", "figure"), ("flow cytometry", "figure"), ("", "figure"), (None, "figure"),
    ],
)  # fmt: skip
def test_a_modality_finds_its_preset(modality, preset):
    assert preset_for(modality) == preset


def test_every_preset_says_why_and_changes_something():
    from importlib import resources

    folder = resources.files("biomedclip.stream") / "augmentations"
    assert {path.name for path in folder.iterdir() if path.name.endswith(".yaml")} == {f"{n}.yaml" for n in PRESETS}
    for name in PRESETS:
        lines = (folder / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        assert sum(line.startswith("# ") for line in lines) >= 2, name
        assert find_preset(name).is_none == (name == "none")


def test_an_own_preset_comes_from_a_file_or_stands_in_the_config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("like: radiology\nturn_deg: 3\n")
    mine = find_preset(str(path))
    assert (mine.turn_deg, mine.gamma) == (3, find_preset("radiology").gamma)
    recorded = resolve_setting(str(path))
    assert recorded == mine, "a run keeps what the file said"
    assert augmentation_for(recorded, "fundus") is recorded
    assert resolve_setting(Augmentation(like="radiology", turn_deg=3)) == mine
    assert resolve_setting("auto") == "auto"
    assert augmentation_for("auto", "CT") == find_preset("radiology")


def test_a_run_config_takes_names_files_and_settings(tmp_path):
    from biomedclip.training.config import SourceConfig

    path = tmp_path / "mine.yaml"
    path.write_text("turn_deg: 3\n")
    given = {"name": "a", "path": "b"}
    for setting, turn in (("radiology", None), (str(path), 3), ({"like": "radiology", "turn_deg": 4}, 4)):
        source = check_config({**given, "augmentation": setting}, SourceConfig, "run.yaml")
        assert getattr(source.augmentation, "turn_deg", None) == turn
        again = check_config(source.model_dump(mode="json"), SourceConfig, "run.yaml")
        assert again == source
    with pytest.raises(ConfigError, match="radiology"):
        check_config({**given, "augmentation": "radiolgy"}, SourceConfig, "run.yaml")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("turn_dog: 3", "did you mean 'turn_deg'"),
        ("area: [1.2, 0.8]", "high to low"),
        ("noise: 3", "less than or equal to 1"),
        ("like: radiolgy", "is no preset"),
        ("modalities: ['(']", "no regular expression"),
        ("- 3", "key: value"),
    ],
)
def test_a_wrong_preset_is_refused_with_the_reason(tmp_path, text, match):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match):
        find_preset(str(path))


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match="radiology"):
        find_preset("radiolgy")


def test_the_bias_field_is_monais():
    from monai.transforms import RandBiasField

    theirs = RandBiasField(prob=1, degree=3, coeff_range=(-0.2, 0.2)).set_random_state(seed=3)
    field = np.asarray(theirs(np.ones((1, 40, 40), dtype=np.float32)))[0]
    assert field.std() > 0.05
    assert np.allclose(bias_field(40, list(theirs._coeff)), field, rtol=1e-5)


def test_stains_are_jittered_as_their_definition_says():
    tissue = np.random.default_rng(0).integers(40, 250, (20, 20, 3)).astype(np.uint8)
    strengths, shifts = [1.2, 0.9, 1.0], [0.02, 0.0, -0.01]
    absorbance = -np.log((tissue.astype(float) + 1) / 256)
    amounts = absorbance @ np.linalg.inv(STAINS)
    wanted = 256 * np.exp(-((amounts * strengths + shifts) @ STAINS)) - 1
    found = jitter_stains(tissue, strengths, shifts)
    assert np.abs(found - wanted.clip(0, 255)).max() <= 0.51
    assert np.abs(jitter_stains(tissue, [1, 1, 1], [0, 0, 0]).astype(int) - tissue).max() <= 0
    # More haematoxylin makes what it stains bluer and darker and leaves white glass white.
    nucleus = (256 * np.exp(-STAINS[0]) - 1).astype(np.uint8)[None, None]
    darker = jitter_stains(nucleus, [1.5, 1, 1], [0, 0, 0]).astype(int)
    assert (darker < nucleus).all()
    assert (darker[..., 2] > darker[..., 0]).all()
    assert jitter_stains(np.full((1, 1, 3), 255, np.uint8), [1.5, 1.5, 1.5], [0, 0, 0]).min() == 255


def test_grey_pictures_stay_grey_and_degrade_as_much_as_asked():
    grey = np.full((64, 64, 3), 128, dtype=np.uint8)
    for name in ("radiology", "ultrasound"):
        for epoch in range(8):
            pixels = draw((0, "k", epoch), find_preset(name), grey, size_px=64)
            assert (pixels == pixels[..., :1]).all(), "no tint of its own"
    noisy = [draw((0, "k", e), Augmentation(noise=0.1), grey, size_px=64).astype(float) for e in range(60)]
    spread = [pixels[..., 0].std() / 255 for pixels in noisy]
    assert max(spread) == pytest.approx(0.1, abs=0.02)
    assert 15 <= sum(s == 0 for s in spread) <= 45, "half of the pictures are left alone"
    assert max(abs(pixels.mean() - 128) for pixels in noisy) < 2


def test_monai_transforms_by_name_are_seeded_and_checked():
    change = Augmentation(monai=({"RandGaussianSmooth": {"prob": 1.0}}, {"RandGibbsNoise": {"prob": 0.5}}))
    first = draw((0, "k", 1), change)
    draw((0, "k", 2), change)
    assert np.array_equal(draw((0, "k", 1), change), first)
    assert len({draw((0, "k", epoch), change).tobytes() for epoch in range(6)}) == 6
    for wrong in ({"RandGaussianSmoothd": {"keys": "a"}}, {"Resize": {}}, {"RandGibbsNoise": {"probe": 1}}):
        with pytest.raises(ConfigError, match=r"augmentation\.monai"):
            draw((0, "k", 1), Augmentation(monai=(wrong,)))
