"""Encoded image bytes to RGB pixels, in two ways.

`decode_exact` is what evaluation sees: Pillow, the model's own resize rule, no randomness; equal to open_clip's
transform up to its last step, the normalisation, which runs on the device. `read_reduced` is what training cuts its
views from: JPEG is scaled while it is decoded, because a 224 px view of a 600 x 450 figure needs a quarter of its
pixels; everything simplejpeg does not show as Pillow does (CMYK, turned by EXIF, damaged) goes through Pillow. More
than 8 bits of grey are refused and never cut off: which window to show them in is a decision of the builder.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from biomedclip.images import MAX_PIXELS, read_rgb
from biomedclip.stream.presets import Augmentation

# Threads of OpenCV deadlock in forked workers and only fight over the cores that the workers share.
cv2.setNumThreads(1)

ResizeMode = Literal["shortest", "longest", "squash"]

MAX_ENLARGED = 1.25
"""The smallest view an augmentation may draw is enlarged by at most this: what scaled decoding may take away."""

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How a picture becomes the model's square input: open_clip's preprocess_cfg without the normalisation."""

    size_px: int
    resize_mode: ResizeMode = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


def decode_exact(data: bytes, geometry: Geometry, where: str = "image") -> np.ndarray:
    """(H, W, 3) uint8, exactly the pixels evaluation uses. Raises DataError, naming `where`, for undecodable bytes."""
    return np.asarray(fit(read_rgb(data, where), geometry))


def fit(image: Image.Image, geometry: Geometry) -> Image.Image:
    """The picture as a square of `size_px`, by open_clip's three resize rules.

    `shortest` scales the shorter side and cuts the middle out, `longest` scales the longer side and pads with black,
    `squash` scales both.
    """
    size, resampling = geometry.size_px, _RESAMPLING[geometry.interpolation]
    if geometry.resize_mode == "squash" or image.width == image.height:
        return image.resize((size, size), resampling)
    if geometry.resize_mode == "shortest":
        short = min(image.size)
        width, height = (size if side == short else int(size * side / short) for side in image.size)
        scaled = image.resize((width, height), resampling)
        left, top = round((width - size) / 2.0), round((height - size) / 2.0)
        return scaled.crop((left, top, left + size, top + size))
    scale = size / max(image.size)
    scaled = image.resize((round(image.width * scale), round(image.height * scale)), resampling)
    square = Image.new("RGB", (size, size))
    square.paste(scaled, ((size - scaled.width) // 2, (size - scaled.height) // 2))
    return square


def read_reduced(
    data: bytes, image_format: str, geometry: Geometry, change: Augmentation, where: str = "image"
) -> np.ndarray:
    """(H, W, 3) uint8 of the whole picture, reduced as far as any view that `change` draws of it allows.

    A pure function of the bytes and the settings, so its result may be cached. Where `change` changes nothing the
    picture is not reduced. Raises DataError for bytes that do not decode.
    """
    if change.is_none:
        return np.asarray(read_rgb(data, where))
    pixels = _read_jpeg(data, geometry, change) if image_format == "jpg" else None
    if pixels is None:
        pixels = np.asarray(read_rgb(data, where))
    height, width = pixels.shape[:2]
    divisor = int(_reducible(width, height, geometry, change))
    if divisor > 1:
        size = (math.ceil(width / divisor), math.ceil(height / divisor))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return pixels


def _has_app1(data: bytes) -> bool:
    """Whether a segment before the first scan may hold EXIF or XMP, which Pillow takes long to find missing."""
    place = 2
    while data[place : place + 1] == b"\xff" and (marker := data[place + 1 : place + 2]) != b"\xda":
        if marker == b"\xe1":
            return True
        # A marker may be padded by any number of bytes 0xff.
        place += 1 if marker == b"\xff" else 2 + int.from_bytes(data[place + 2 : place + 4])
    return False


def _reducible(width: int, height: int, geometry: Geometry, change: Augmentation) -> float:
    """How many times smaller a picture may become before the smallest view of it is enlarged too much."""
    side = max(width, height) if geometry.resize_mode == "longest" else min(width, height)
    return side * math.sqrt(min(change.area[0], 1.0)) * MAX_ENLARGED / geometry.size_px


def _read_jpeg(data: bytes, geometry: Geometry, change: Augmentation) -> np.ndarray | None:
    """The picture, scaled while decoding; None where the fast decoder cannot show it, so that Pillow decides."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours == "CMYK" or width * height > MAX_PIXELS:
            return None
        if _has_app1(data) and Image.open(io.BytesIO(data), formats=("JPEG",)).getexif().get(0x0112, 1) != 1:
            return None
        # libjpeg's other scales, such as 5/8, take longer than decoding the whole picture.
        allowed = _reducible(width, height, geometry, change)
        divisor = next(divisor for divisor in (8, 4, 2, 1) if divisor <= max(allowed, 1))
        return simplejpeg.decode_jpeg(
            data, "RGB", min_height=math.ceil(height / divisor), min_width=math.ceil(width / divisor)
        )
    except (ValueError, OSError, SyntaxError):
        return None
