"""Pixels: exact ones equal open_clip's, random ones depend on (seed, key, epoch) alone."""

import io

import numpy as np
import pytest
from PIL import Image

from biomedclip.errors import ConfigError, DataError
from biomedclip.stream.decode import (
    PRESETS,
    Augmentation,
    Geometry,
    augment,
    decode_exact,
    find_preset,
    names_side,
    preset_for,
    read_reduced,
)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [128 + 100 * np.sin(rows / 9 + k) * np.cos(columns / (7 + k)) for k in range(3)]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(64, 64), (101, 57), (57, 101), (20, 33)])
def test_exact_pixels_are_those_of_open_clips_transform(mode, size):
    from open_clip.transform import image_transform

    geometry = Geometry(size_px=48, resize_mode=mode)
    transform = image_transform(48, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode)
    for pixels in ("RGB", "L"):
        image = picture(*size, pixels)
        expected = (transform(image).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        found = decode_exact(encoded(image, "PNG"), geometry)
        assert np.array_equal(found, expected), (pixels, size)


def test_bytes_that_are_no_picture_are_named():
    with pytest.raises(DataError, match="sample-7"):
        decode_exact(b"not a picture", Geometry(size_px=8), "sample-7")
    whole = encoded(picture(80, 80), "JPEG")
    for kind, data in (("jpg", b"not a picture"), ("png", whole[:300]), ("jpg", b"")):
        with pytest.raises(DataError, match="sample-7"):
            read_reduced(data, kind, 32, "sample-7")


def test_a_cut_off_jpeg_is_an_error_and_not_a_grey_half():
    whole = encoded(picture(200, 200), "JPEG")
    with pytest.raises(DataError, match="sample-7"):
        read_reduced(whole[: len(whole) // 2], "jpg", 32, "sample-7")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_large_picture_is_reduced_but_never_below_twice_the_model_size(kind):
    image = picture(900, 500)
    reduced = read_reduced(encoded(image, kind), {"JPEG": "jpg"}.get(kind, kind.lower()), 64)
    assert reduced.mode == "RGB"
    assert 128 <= min(reduced.size) < 256
    assert abs(reduced.width / reduced.height - 1.8) < 0.03
    small = np.asarray(reduced.resize((45, 25)), dtype=float)
    assert np.abs(small - np.asarray(image.resize((45, 25)), dtype=float)).mean() < 6


def test_a_small_picture_keeps_its_pixels():
    image = picture(28, 28, "L")
    reduced = read_reduced(encoded(image, "PNG"), "png", 64)
    assert np.array_equal(np.asarray(reduced), np.asarray(image.convert("RGB")))


def test_a_turned_or_cmyk_jpeg_is_shown_as_pillow_shows_it():
    from biomedclip.images import read_rgb

    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (encoded(picture(90, 60), "JPEG", exif=exif), encoded(picture(90, 60, "CMYK"), "JPEG")):
        assert np.array_equal(np.asarray(read_reduced(data, "jpg", 64)), np.asarray(read_rgb(data)))


def draw(facts, change, image=None, mode="squash", may_mirror=True, size_px=32):
    image = image or picture(60, 40)
    geometry = Geometry(size_px=size_px, resize_mode=mode)
    return augment(image, geometry, change, facts=facts, may_mirror=may_mirror)


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_augmented_pixels_depend_on_the_facts_alone(preset, mode):
    change = PRESETS[preset]
    first = draw((0, "key", 1), change, mode=mode)
    draw((5, "other", 2), change, mode=mode)
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(draw((0, "key", 1), change, mode=mode), first)
    if preset != "none":
        assert not np.array_equal(draw((0, "key", 2), change, mode=mode), first)
        assert not np.array_equal(draw((1, "key", 1), change, mode=mode), first)


def test_without_augmentation_training_pixels_are_the_exact_ones():
    image = picture(60, 40)
    for mode in ("squash", "longest"):
        exact = decode_exact(encoded(image, "PNG"), Geometry(size_px=32, resize_mode=mode))
        assert np.array_equal(draw((0, "k", 0), Augmentation(), image, mode), exact)


def test_whole_pictures_lie_in_the_middle_of_what_is_trained_on():
    # With crops alone, evaluation's whole pictures look farther away than anything seen in training.
    for name, change in PRESETS.items():
        assert change.area[0] <= 1 <= change.area[1], name
        if name != "none":
            assert change.area[1] - 1 >= 0.5 * (1 - change.area[0]), name


def test_a_view_beyond_the_picture_shows_its_edge_and_no_black():
    bright = Image.new("RGB", (30, 30), (200, 180, 160))
    for turn in (0.0, 15.0):
        change = Augmentation(area=(1.5, 1.6), turn_deg=turn)
        for epoch in range(20):
            pixels = draw((0, "k", epoch), change, bright)
            assert np.abs(pixels.astype(int) - [200, 180, 160]).max() <= 1


def test_nothing_is_mirrored_where_it_may_not_be():
    change = Augmentation(mirror=True)
    image = picture(32, 32)
    original, mirrored = np.asarray(image), np.asarray(image)[:, ::-1]
    seen = [draw((0, "k", epoch), change, image) for epoch in range(40)]
    assert all(np.array_equal(pixels, original) or np.array_equal(pixels, mirrored) for pixels in seen)
    assert 10 <= sum(np.array_equal(pixels, mirrored) for pixels in seen) <= 30
    for epoch in range(40):
        assert np.array_equal(draw((0, "k", epoch), change, image, may_mirror=False), original)
    assert not PRESETS["radiology"].mirror
    assert not PRESETS["radiology"].any_orientation
    assert not PRESETS["figure"].mirror


@pytest.mark.parametrize(
    "caption", ["Opacity in the LEFT lower lobe.", "Right-sided effusion", "L, lateral view", "OD fundus"]
)
def test_captions_that_name_a_side_are_recognised(caption):
    assert names_side(caption)


@pytest.mark.parametrize("caption", ["A lymphocyte in blood.", "Bright field copyright", "chest X-ray, clear lungs"])
def test_captions_that_name_no_side_are_left_alone(caption):
    assert not names_side(caption)


@pytest.mark.parametrize(
    ("modality", "preset"),
    [
        ("chest X-ray", "radiology"),
        ("CT", "radiology"),
        ("brain MRI", "radiology"),
        ("blood smear microscopy", "microscopy"),
        ("histopathology, H&E", "microscopy"),
        ("dermatoscopy", "photograph"),
        ("fundus photograph", "photograph"),
        ("chart", "figure"),
        (None, "figure"),
    ],
)
def test_a_modality_finds_its_preset(modality, preset):
    assert preset_for(modality) == preset


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match="radiology"):
        find_preset("radiolgy")
