"""Image bytes in, checked facts or RGB uint8 out.

`check_image` is what builders call: it decodes the whole stream (a header alone proves nothing), refuses
decompression bombs before allocating, and returns width, height, sha256 and a 64-bit perceptual hash together with
bytes a shard can store: the original bytes where they are already JPEG, PNG or WebP that every reader shows alike,
else a lossless PNG. `read_rgb` is what everything after shards calls.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from biomedclip.errors import DataError

MAX_PIXELS = 80_000_000
"""Larger pictures are refused before they are decoded; a 9000 x 8800 poster still passes."""

_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_READABLE = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP")
# What Pillow's decoders were seen to raise for damaged files, in 24,000 of which bytes were changed at random.
_DECODER_ERRORS = (
    OSError, ValueError, SyntaxError, TypeError, LookupError, EOFError, MemoryError, OverflowError, ArithmeticError,
    AttributeError, struct.error,
)  # fmt: skip
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "F")


class BadImage(ValueError):
    """An image that cannot become a sample; `reason` is the ledger's word for it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedImage:
    """Bytes a shard can store, and the facts its index row holds."""

    data: bytes
    format: str
    width: int
    height: int
    sha256: str
    phash: int
    flags: tuple[str, ...] = ()


def check_image(data: bytes, *, min_side_px: int = 1, max_aspect: float | None = None) -> CheckedImage:
    """A fully decoded, storable image and its facts.

    Raises BadImage with reason `empty_file`, `not_an_image`, `image_bomb`, `broken_image`, `deep_image`,
    `image_too_small` or `image_too_elongated`.
    """
    if not data:
        raise BadImage("empty_file")
    with _open(data) as image:
        width, height = image.size
        if min(width, height) < min_side_px:
            raise BadImage("image_too_small", f"{width}x{height}")
        if max_aspect is not None and max(width, height) > max_aspect * min(width, height):
            raise BadImage("image_too_elongated", f"{width}x{height}")
        if image.mode in _DEEP_MODES:
            # More than 8 bits need a window, which is a decision; squeezing them silently would invent contrast.
            raise BadImage("deep_image", f"mode {image.mode}")
        with decoding():
            flags = _flags(image)
            storable = image.format in _FORMATS and not flags
            if storable and image.format in ("JPEG", "MPO"):
                # Validates the whole entropy-coded stream at about half the cost: libjpeg scales while it decodes.
                image.draft("L", (64, 64))
            image.load()
        if storable:
            return CheckedImage(
                data=data, format=_FORMATS[image.format or ""], width=width, height=height,
                sha256=hashlib.sha256(data).hexdigest(), phash=perceptual_hash(image),
            )  # fmt: skip
        rgb = _to_rgb(image)
    buffer = io.BytesIO()
    rgb.save(buffer, "PNG", icc_profile=None)  # a CMYK profile would be untrue of RGB bytes
    encoded = buffer.getvalue()
    return CheckedImage(
        data=encoded, format="png", width=rgb.width, height=rgb.height,
        sha256=hashlib.sha256(encoded).hexdigest(), phash=perceptual_hash(rgb), flags=(*flags, "reencoded"),
    )  # fmt: skip


def store_picture(picture: Image.Image) -> CheckedImage:
    """A picture that has no encoding of its own (a row of an array) as PNG, with its facts.

    `check_image` of those bytes says the same and takes longer. Raises BadImage as that does.
    """
    data = encode_png(picture)
    if picture.mode not in ("L", "RGB"):
        return check_image(data)
    return CheckedImage(
        data=data, format="png", width=picture.width, height=picture.height,
        sha256=hashlib.sha256(data).hexdigest(), phash=perceptual_hash(picture),
    )  # fmt: skip


def encode_png(picture: Image.Image) -> bytes:
    """The picture as PNG. Level 1 is a third of the time of the default for a tenth more bytes, on 28 pixels."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def read_rgb(data: bytes, where: str = "image") -> Image.Image:
    """The picture as 8-bit RGB: orientation applied, alpha laid on white, CMYK and palettes converted.

    Raises DataError, naming `where`, for bytes that do not decode and for more than 8 bits a channel, which need a
    window first.
    """
    try:
        return decode_rgb(data)
    except BadImage as error:
        raise DataError(where, "is not a picture this project can show", found=str(error)) from None


def decode_rgb(data: bytes, *, at_least_px: int | None = None) -> Image.Image:
    """The picture as `read_rgb` has it, and the reason where there is none.

    With `at_least_px` a JPEG is scaled while it is decoded, to the smallest half, quarter or eighth whose shorter side
    still has that many pixels; its full size then does not count against MAX_PIXELS. Raises BadImage with a reason of
    `check_image`.
    """
    with _open(data, at_least_px) as image:
        if image.mode in _DEEP_MODES:
            raise BadImage("deep_image", f"mode {image.mode}")
        return _to_rgb(image)


def decode_deep(data: bytes) -> np.ndarray:
    """(H, W) values of a grey picture of more than 8 bits, as stored. Raises BadImage as `decode_rgb` does, and with
    reason `not_deep` for any other picture."""
    with _open(data) as image:
        if image.mode not in _DEEP_MODES:
            raise BadImage("not_deep", f"mode {image.mode}")
        with decoding():
            image.seek(0)
            image.load()
            turned = ImageOps.exif_transpose(image) or image
        return np.asarray(turned)


def has_several_frames(data: bytes) -> bool:
    """Whether a picture that decodes has others behind it: an animation, pages. False where the second is broken."""
    if data[:2] == b"\xff\xd8":
        return False
    try:
        with _open(data) as image, decoding():
            return bool(getattr(image, "is_animated", False))
    except BadImage:
        return False


def perceptual_hash(image: Image.Image) -> int:
    """64-bit hash of the 8 x 8 lowest DCT frequencies of a 32 x 32 grey copy; near-duplicates differ in a few bits.

    Bit i is set where coefficient i (row-major, the mean term left out of the median) exceeds the median: the pHash
    of Zauner (2010).
    """
    flat_grey = image if image.mode == "L" else image.convert("L")
    grey = np.asarray(flat_grey.resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float32)
    low = _DCT @ grey @ _DCT.T
    flat = low.ravel()
    # Of 63 numbers the median is the 32nd; partition finds it in a tenth of the time of numpy.median.
    bits = flat > np.partition(flat[1:], 31)[31]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _dct_matrix(rows: int = 8, size: int = 32) -> np.ndarray:
    k, n = np.arange(rows)[:, None], np.arange(size)[None, :]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * size)).astype(np.float32)


_DCT = _dct_matrix()


def _open(data: bytes, at_least_px: int | None = None) -> Image.Image:
    with decoding():
        try:
            image = Image.open(io.BytesIO(data), formats=_READABLE)
        except UnidentifiedImageError:
            raise BadImage("not_an_image", f"begins with {data[:12]!r}") from None
        except Image.DecompressionBombError as error:
            # Pillow's own limit does not know that a JPEG can be decoded at an eighth of its size.
            if at_least_px is None or data[:2] != b"\xff\xd8":
                raise BadImage("image_bomb", str(error)) from None
            image = JpegImageFile(io.BytesIO(data))
        if at_least_px is not None and _scales_in_little_memory(image):
            short = min(image.size)
            wide, high = (max(1, at_least_px * side // short) for side in image.size)
            image.draft(None, (wide, high))
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("image_bomb", f"{image.width}x{image.height}")
    return image


def _scales_in_little_memory(image: Image.Image) -> bool:
    """Whether a decoder scales the picture without holding all of it, as libjpeg must for progressive files."""
    if image.format not in ("JPEG", "MPO"):
        return False
    return not image.info.get("progressive") or image.width * image.height <= MAX_PIXELS


@contextmanager
def decoding() -> Iterator[None]:
    """Turn what a decoder raises for a damaged file into BadImage `broken_image`, and keep its warnings quiet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, which MAX_PIXELS decides, and of damaged metadata
            yield
    except BadImage:
        raise
    except _DECODER_ERRORS as error:
        raise BadImage("broken_image", str(error)) from None


def _flags(image: Image.Image) -> tuple[str, ...]:
    """What keeps the original bytes from being stored, because readers would show them differently."""
    flags = []
    if image.mode == "CMYK":
        flags.append("cmyk")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        flags.append("first_frame")
    if "transparency" in image.info or (image.mode in ("RGBA", "LA", "PA") and not _is_opaque(image)):
        flags.append("alpha")
    if image.format in _FORMATS and image.getexif().get(0x0112, 1) != 1:
        flags.append("rotated")
    return tuple(flags)


def _is_opaque(image: Image.Image) -> bool:
    """Whether an alpha channel hides nothing, as in most screenshots: then every reader shows the picture alike."""
    return image.mode != "PA" and image.getchannel("A").getextrema() == (255, 255)


def _to_rgb(image: Image.Image) -> Image.Image:
    with decoding():
        image.seek(0)
        image.load()
        turned = ImageOps.exif_transpose(image) or image
    if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
        picture = turned.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return turned.convert("RGB")
