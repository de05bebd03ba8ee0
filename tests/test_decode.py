"""Bytes to pixels: exact ones equal open_clip's, reduced ones show every encoding as Pillow does."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from biomedclip.errors import DataError
from biomedclip.images import read_rgb
from biomedclip.stream.decode import MAX_ENLARGED, Geometry, decode_exact, read_reduced
from biomedclip.stream.presets import PRESETS, Augmentation, find_preset

SQUARE = Geometry(size_px=64)
SOME = Augmentation(brightness=0.1)


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
            read_reduced(data, kind, SQUARE, SOME, "sample-7")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_a_cut_off_file_is_an_error_and_not_a_grey_half(kind, keep):
    whole = encoded(picture(200, 200), kind)
    cut = whole[: int(len(whole) * keep)]
    for change in (SOME, Augmentation()):
        with pytest.raises(DataError, match="sample-7"):
            read_reduced(cut, "jpg" if kind == "JPEG" else kind.lower(), SQUARE, change, "sample-7")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_large_picture_is_reduced_but_never_below_what_a_view_needs(kind):
    image, change = picture(900, 500), Augmentation(area=(0.5, 1.2))
    reduced = read_reduced(encoded(image, kind), {"JPEG": "jpg"}.get(kind, kind.lower()), SQUARE, change)
    height, width = reduced.shape[:2]
    needed = 64 / 0.5**0.5 / MAX_ENLARGED
    assert needed <= min(height, width) < 2 * needed + 1
    assert abs(width / height - 1.8) < 0.05
    small = np.asarray(Image.fromarray(reduced).resize((45, 25)), dtype=float)
    assert np.abs(small - np.asarray(image.resize((45, 25)), dtype=float)).mean() < 6


@pytest.mark.parametrize("side", [30, 71, 72, 143, 144, 290, 1000])
def test_a_reduction_is_the_largest_that_leaves_enough(side):
    data = encoded(picture(side + 40, side), "JPEG")
    reduced = read_reduced(data, "jpg", SQUARE, Augmentation(area=(0.5, 1.0)))
    needed = 64 / 0.5**0.5 / MAX_ENLARGED
    assert min(reduced.shape[:2]) >= min(side, needed)
    assert min(reduced.shape[:2]) < max(side + 1 if side < needed else 0, 2 * needed + 1)


def test_a_small_picture_keeps_its_pixels():
    image = picture(28, 28, "L")
    reduced = read_reduced(encoded(image, "PNG"), "png", SQUARE, SOME)
    assert np.array_equal(reduced, np.asarray(image.convert("RGB")))


def test_without_augmentation_a_picture_is_read_whole_and_exactly():
    for kind in ("JPEG", "PNG"):
        data = encoded(picture(300, 200), kind)
        reduced = read_reduced(data, "jpg" if kind == "JPEG" else "png", SQUARE, find_preset("none"))
        assert np.array_equal(reduced, np.asarray(read_rgb(data)))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_png(values: np.ndarray, colour: int) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values.reshape(len(values), -1))
    return png(values.shape[1], values.shape[0], 16, colour, rows)


def exif_turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(90, 60), "JPEG", exif=exif)


def translucent(mode: str) -> Image.Image:
    image = picture(40, 30).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((40, 30)))
    return image.convert(mode)


ENCODINGS = {
    "cmyk jpeg": (lambda: encoded(picture(90, 60, "CMYK"), "JPEG"), "jpg"),
    "grey jpeg": (lambda: encoded(picture(90, 60, "L"), "JPEG"), "jpg"),
    "turned jpeg": (exif_turned, "jpg"),
    "progressive jpeg": (lambda: encoded(picture(90, 60), "JPEG", progressive=True), "jpg"),
    "jpeg without subsampling": (lambda: encoded(picture(90, 60), "JPEG", subsampling=0), "jpg"),
    "png named jpg": (lambda: encoded(picture(90, 60), "PNG"), "jpg"),
    "jpeg named png": (lambda: encoded(picture(90, 60), "JPEG"), "png"),
    "palette png": (lambda: encoded(picture(90, 60).quantize(64), "PNG"), "png"),
    "palette with a transparent colour": (lambda: encoded(picture(90, 60).quantize(8), "PNG", transparency=3), "png"),
    "one bit png": (lambda: encoded(picture(90, 60, "1"), "PNG"), "png"),
    "rgba png": (lambda: encoded(translucent("RGBA"), "PNG"), "png"),
    "grey and alpha png": (lambda: encoded(translucent("LA"), "PNG"), "png"),
    "rgba webp": (lambda: encoded(translucent("RGBA"), "WEBP"), "webp"),
    "lossless webp": (lambda: encoded(picture(90, 60), "WEBP", lossless=True), "webp"),
    "lzw tiff": (lambda: encoded(picture(90, 60), "TIFF", compression="tiff_lzw"), "tiff"),
    "cmyk tiff": (lambda: encoded(picture(90, 60, "CMYK"), "TIFF"), "tiff"),
    "first page of a tiff": (
        lambda: encoded(picture(90, 60), "TIFF", save_all=True, append_images=[picture(50, 50)]), "tiff",
    ),
    "first frame of a gif": (
        lambda: encoded(picture(90, 60), "GIF", save_all=True, append_images=[picture(90, 60, "L")]), "gif",
    ),
    "bmp": (lambda: encoded(picture(90, 60), "BMP"), "bmp"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_is_shown_as_pillow_shows_it(name):
    make, kind = ENCODINGS[name]
    data = make()
    whole = np.asarray(read_rgb(data))
    reduced = read_reduced(data, kind, SQUARE, SOME)
    assert reduced.shape == whole.shape
    assert reduced.dtype == np.uint8
    # Two JPEG decoders of one family may differ by rounding; every other reader is the same one.
    assert np.abs(reduced.astype(int) - whole).max() <= (2 if "jpeg" in name else 0)
    if "turned" in name:
        assert reduced.shape == (90, 60, 3)
    if name == "rgba png":
        assert whole[0, 0].min() > 250, "what is transparent is white"


def test_sixteen_bit_grey_is_refused_and_not_saturated():
    values = np.linspace(0, 65535, 40 * 30).reshape(30, 40)
    tiff = encoded(Image.fromarray(values.astype(np.uint16)), "TIFF")
    floats = encoded(Image.fromarray((values / 65535).astype(np.float32)), "TIFF")
    for data, kind in ((deep_png(values, 0), "png"), (tiff, "tiff"), (floats, "tiff")):
        for change in (SOME, Augmentation()):
            with pytest.raises(DataError, match=r"sample-7: is not a picture .*deep_image"):
                read_reduced(data, kind, SQUARE, change, "sample-7")
        with pytest.raises(DataError, match="deep_image"):
            decode_exact(data, SQUARE)


def test_sixteen_bit_colour_is_shown_by_its_upper_eight_bits():
    values = np.linspace(0, 65535, 30 * 40 * 3).reshape(30, 40, 3).astype(np.uint16)
    reduced = read_reduced(deep_png(values, 2), "png", SQUARE, SOME)
    assert np.array_equal(reduced, (values >> 8).astype(np.uint8))


def test_a_bomb_is_refused_before_it_is_unpacked():
    huge = png(30_000, 30_000, 8, 2, b"")
    with pytest.raises(DataError, match="image_bomb"):
        read_reduced(huge, "png", SQUARE, SOME)
    small = bytearray(encoded(picture(16, 16), "JPEG"))
    start = small.find(b"\xff\xc0") + 5
    small[start : start + 4] = struct.pack(">HH", 30_000, 30_000)
    with pytest.raises(DataError, match="image_bomb"):
        read_reduced(bytes(small), "jpg", SQUARE, SOME)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_view_of_any_preset_is_enlarged_no_more_than_promised(preset):
    change = find_preset(preset)
    reduced = read_reduced(encoded(picture(700, 500), "JPEG"), "jpg", Geometry(size_px=224), change)
    smallest = min(reduced.shape[:2]) * min(change.area[0], 1) ** 0.5
    assert smallest * MAX_ENLARGED >= 224
