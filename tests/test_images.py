"""Pictures in every mode and every kind of damage, made here; pixels are compared with Pillow's own or worked out."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from biomedclip.errors import DataError
from biomedclip.images import MAX_PIXELS, BadImage, check_image, perceptual_hash, read_rgb

RNG = np.random.default_rng(0)
SMOOTH = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((96, 64), Image.Resampling.BICUBIC)
)


def encode(picture: Image.Image | np.ndarray, format: str, **options: Any) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def smooth(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(SMOOTH).convert(mode)


def reason(data: bytes, **limits: Any) -> str:
    with pytest.raises(BadImage) as caught:
        check_image(data, **limits)
    return caught.value.reason


@pytest.mark.parametrize(
    ("data", "format"),
    [
        (encode(smooth(), "JPEG"), "jpg"),
        (encode(smooth(), "JPEG", progressive=True), "jpg"),
        (encode(smooth("L"), "JPEG"), "jpg"),
        (encode(smooth(), "MPO", save_all=True, append_images=[smooth()]), "jpg"),
        (encode(smooth(), "PNG"), "png"),
        (encode(smooth("L"), "PNG"), "png"),
        (encode(smooth("P"), "PNG"), "png"),
        (encode(smooth("1"), "PNG"), "png"),
        (encode(smooth(), "WEBP"), "webp"),
        (encode(smooth(), "WEBP", lossless=True), "webp"),
        (encode(smooth("RGBA"), "PNG"), "png"),
        (encode(smooth("LA"), "PNG"), "png"),
    ],
)
def test_what_readers_show_alike_keeps_its_bytes(data: bytes, format: str) -> None:
    checked = check_image(data)
    assert (checked.data, checked.format, checked.flags) == (data, format, ())
    assert (checked.width, checked.height) == (96, 64)
    assert checked.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("data", "flag"),
    [
        (encode(smooth(), "TIFF"), None),
        (encode(smooth(), "TIFF", compression="tiff_lzw"), None),
        (encode(smooth("1"), "TIFF", compression="group4"), None),
        (encode(smooth(), "GIF"), None),
        (encode(smooth(), "BMP"), None),
        (encode(smooth("CMYK"), "JPEG"), "cmyk"),
        (encode(smooth("CMYK"), "TIFF"), "cmyk"),
        (encode(np.dstack([SMOOTH, SMOOTH[..., 0]]), "PNG"), "alpha"),
        (encode(Image.merge("LA", (smooth("L"), smooth("L"))), "PNG"), "alpha"),
        (encode(smooth("P"), "PNG", transparency=0), "alpha"),
        (encode(np.dstack([SMOOTH, SMOOTH[..., 0]]), "WEBP", lossless=True, exact=True), "alpha"),
        (encode(smooth(), "GIF", save_all=True, append_images=[smooth("L")]), "first_frame"),
        (encode(smooth(), "PNG", save_all=True, append_images=[smooth("L").convert("RGB")]), "first_frame"),
        (encode(smooth(), "TIFF", save_all=True, append_images=[smooth()]), "first_frame"),
    ],
)
def test_everything_else_becomes_a_lossless_png_of_the_same_picture(data: bytes, flag: str | None) -> None:
    checked = check_image(data)
    assert checked.format == "png"
    assert checked.flags == ((flag, "reencoded") if flag else ("reencoded",))
    assert checked.sha256 == hashlib.sha256(checked.data).hexdigest()
    with Image.open(io.BytesIO(checked.data)) as stored:
        assert (stored.format, stored.mode, stored.size) == ("PNG", "RGB", (96, 64))
        assert np.array_equal(np.asarray(stored), np.asarray(read_rgb(data)))


@pytest.mark.parametrize(
    "data",
    [
        encode(smooth(), "JPEG"), encode(smooth("L"), "JPEG"), encode(smooth("CMYK"), "JPEG"),
        encode(smooth(), "PNG"), encode(smooth("P"), "PNG"), encode(smooth("1"), "PNG"), encode(smooth(), "WEBP"),
        encode(smooth(), "TIFF", compression="tiff_deflate"), encode(smooth(), "GIF"), encode(smooth(), "BMP"),
    ],
)  # fmt: skip
def test_read_rgb_gives_pillows_own_pixels(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    picture = read_rgb(data)
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), expected)


def test_alpha_is_laid_on_white() -> None:
    alpha = RNG.integers(0, 256, (64, 96), dtype=np.uint8)
    data = encode(np.dstack([SMOOTH, alpha]), "PNG")
    weight = alpha[..., None] / 255
    expected = SMOOTH * weight + 255 * (1 - weight)
    assert np.abs(np.asarray(read_rgb(data)) - expected).max() <= 1


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_orientation_is_applied_and_rotated_files_are_stored_upright(orientation: int, turn: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(smooth(), "PNG", exif=exif)
    assert np.array_equal(np.asarray(read_rgb(data)), turn(SMOOTH))
    checked = check_image(data)
    assert checked.flags == ("rotated", "reencoded")
    assert (checked.height, checked.width) == turn(SMOOTH).shape[:2]
    with Image.open(io.BytesIO(checked.data)) as stored:
        assert stored.getexif().get(0x0112, 1) == 1
        assert np.array_equal(np.asarray(stored), turn(SMOOTH))


def test_an_upright_orientation_tag_changes_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    data = encode(smooth(), "JPEG", exif=exif)
    assert check_image(data).data == data


def test_a_cmyk_profile_is_not_written_into_an_rgb_file() -> None:
    checked = check_image(encode(smooth("CMYK"), "JPEG", icc_profile=b"profile of inks"))
    with Image.open(io.BytesIO(checked.data)) as stored:
        assert "icc_profile" not in stored.info


def png_of_declared_size(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = encode(smooth(), "PNG")
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def test_each_reason_has_its_file() -> None:
    jpeg, png = encode(smooth(), "JPEG"), encode(smooth(), "PNG")
    deep = np.linspace(0, 65535, 64 * 96).reshape(64, 96)
    assert reason(b"") == "empty_file"
    assert reason(b"I am not a figure") == "not_an_image"
    assert reason(b"%PDF-1.5 ...") == "not_an_image"
    assert reason(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "not_an_image"
    assert reason(jpeg[: len(jpeg) // 2]) == "broken_image"
    assert reason(png[: len(png) // 2]) == "broken_image"
    assert reason(png[:60] + bytes([png[60] ^ 1]) + png[61:]) == "broken_image"
    assert reason(png_of_declared_size(90_000, 90_000)) == "image_bomb"
    assert reason(encode(deep.astype(np.uint16), "PNG")) == "deep_image"
    assert reason(encode(deep.astype(np.uint16), "TIFF")) == "deep_image"
    assert reason(encode(deep.astype(np.float32), "TIFF")) == "deep_image"
    assert reason(jpeg, min_side_px=65) == "image_too_small"
    assert reason(jpeg, max_aspect=1.4) == "image_too_elongated"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 95, "subsampling": 0}, {"optimize": True}])
def test_a_jpeg_is_judged_as_a_decode_at_full_size_would(options: dict[str, Any]) -> None:
    """The check scales while it decodes, which must still read every byte of the entropy-coded stream."""

    def full_size(data: bytes) -> str:
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        except OSError:
            return "broken"
        return "ok"

    def checked(data: bytes) -> str:
        try:
            check_image(data)
        except BadImage:
            return "broken"
        return "ok"

    whole = encode(smooth().resize((640, 480)), "JPEG", **options)
    cuts = [*(len(whole) - cut for cut in (0, 1, 2, 3, 10, 50)), *(len(whole) * n // 20 for n in range(1, 20))]
    verdicts = [(full_size(whole[:cut]), checked(whole[:cut])) for cut in cuts]
    assert {full == quick for full, quick in verdicts} == {True}
    assert verdicts[0] == ("ok", "ok")
    assert ("broken", "broken") in verdicts


def test_limits_admit_their_own_value() -> None:
    check_image(encode(smooth(), "JPEG"), min_side_px=64, max_aspect=1.5)


def test_a_bomb_is_refused_by_its_header_alone() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(BadImage) as caught:
        check_image(png_of_declared_size(side, side))
    assert caught.value.detail == f"{side}x{side}"


def test_random_damage_is_always_a_bad_image_or_a_picture_that_reads() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "turned"
    whole = [
        encode(smooth(), "JPEG", exif=exif), encode(smooth("P"), "PNG"), encode(smooth("RGBA"), "PNG", exif=exif),
        encode(smooth(), "GIF", save_all=True, append_images=[smooth("L")]), encode(smooth(), "WEBP", exif=exif),
        encode(smooth(), "TIFF", save_all=True, append_images=[smooth()]), encode(smooth(), "BMP"),
        encode(smooth(), "MPO", save_all=True, append_images=[smooth()]),
    ]  # fmt: skip
    dice = random.Random(0)
    outcomes = set()
    for data in whole:
        for _ in range(120):
            damaged = bytearray(data[: dice.randrange(1, len(data))] if dice.random() < 0.3 else data)
            for _ in range(dice.randint(1, 6)):
                damaged[dice.randrange(min(len(damaged), dice.choice((60, 400, 10_000))))] = dice.randrange(256)
            try:
                checked = check_image(bytes(damaged))
            except BadImage as error:
                outcomes.add(error.reason)
            else:
                outcomes.add("ok")
                assert read_rgb(checked.data).mode == "RGB"
    assert {"ok", "broken_image", "not_an_image"} <= outcomes


def test_read_rgb_names_the_file_and_what_it_found() -> None:
    with pytest.raises(DataError, match=r"^f1\.jpg: is not a picture .* \(found not_an_image"):
        read_rgb(b"text", "f1.jpg")
    with pytest.raises(DataError, match=r"deep_image: mode I;16"):
        read_rgb(encode(np.zeros((4, 4), dtype=np.uint16), "PNG"))


def test_the_perceptual_hash_is_the_sign_of_low_dct_frequencies_against_their_median() -> None:
    from scipy.fft import dctn

    for picture in (smooth(), Image.fromarray(RNG.integers(0, 256, (50, 40), dtype=np.uint8))):
        grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float64)
        low = dctn(grey, type=2)[:8, :8].ravel()
        bits = "".join("1" if value > np.median(low[1:]) else "0" for value in low)
        assert perceptual_hash(picture) == int(bits, 2)


def test_the_perceptual_hash_survives_encoding_and_scaling_and_tells_pictures_apart() -> None:
    def distance(a: bytes, b: bytes) -> int:
        return (check_image(a).phash ^ check_image(b).phash).bit_count()

    original = encode(smooth(), "PNG")
    assert distance(original, encode(smooth(), "JPEG", quality=60)) <= 4
    assert distance(original, encode(smooth().resize((192, 128)), "PNG")) <= 4
    assert distance(original, encode(RNG.integers(0, 256, (64, 96, 3), dtype=np.uint8), "PNG")) >= 16
