"""Encoded image bytes to RGB pixels of the model's size, in two ways.

`decode_exact` is what evaluation sees: Pillow, the model's own resize rule, no randomness; equal to open_clip's
transform up to its last step, the normalisation, which runs on the device. `decode_training` is fast and random: JPEG
is scaled while it is decoded, and the augmentation draws from a generator keyed by (seed, sample key, epoch), so the
pixels do not depend on the worker, the rank or what was decoded before.

The augmentations are a table by modality (`PRESETS`), to be read and changed. They are mild and physical: a chest
film keeps its orientation, a smear has none, a figure with text is not mirrored.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

from biomedclip.errors import ConfigError
from biomedclip.images import MAX_PIXELS, read_rgb
from biomedclip.stream.plan import draw_int

ResizeMode = Literal["shortest", "longest", "squash"]

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; may reach beyond the picture."""

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How a picture becomes the model's square input: open_clip's preprocess_cfg without the normalisation."""

    size_px: int
    resize_mode: ResizeMode = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """What may happen to a training picture. Ranges are drawn uniformly; a zero or a (1, 1) switches one off."""

    area: tuple[float, float] = (1.0, 1.0)
    """Area that is seen, as a share of the picture's. Ranges centred on 1 keep whole pictures, which is what
    evaluation shows, in the middle of what was trained on; with crops alone they lie at its far end."""
    aspect: float = 1.0
    """The seen part is up to this much wider or taller than the picture."""
    turn_deg: float = 0.0
    """Half of the pictures are turned by up to this angle to either side."""
    any_orientation: bool = False
    """Right-angle turns and mirror images are as likely as the original: there is no up in a smear."""
    mirror: bool = False
    """Left and right are swapped in half of the pictures, except where the caption names a side."""
    brightness: float = 0.0
    """Added to pixels in [0, 1], at most."""
    contrast: tuple[float, float] = (1.0, 1.0)
    gamma: tuple[float, float] = (1.0, 1.0)
    saturation: tuple[float, float] = (1.0, 1.0)
    noise: float = 0.0
    """Half of the pictures get Gaussian noise of at most this standard deviation on pixels in [0, 1]."""


PRESETS: dict[str, Augmentation] = {
    "none": Augmentation(),
    "figure": Augmentation(area=(0.8, 1.2), aspect=1.1, brightness=0.08, contrast=(0.85, 1.15)),
    "radiology": Augmentation(
        area=(0.75, 1.3), aspect=1.2, turn_deg=8, brightness=0.1, contrast=(0.7, 1.4), gamma=(0.7, 1.4), noise=0.02
    ),
    "microscopy": Augmentation(
        area=(0.75, 1.3), aspect=1.15, any_orientation=True, brightness=0.1, contrast=(0.8, 1.2), saturation=(0.7, 1.3)
    ),
    "photograph": Augmentation(
        area=(0.75, 1.3), aspect=1.2, mirror=True, turn_deg=10, brightness=0.1, contrast=(0.8, 1.2),
        saturation=(0.7, 1.3),
    ),
}  # fmt: skip
"""Preset -> augmentation. A photograph is dermatoscopy, fundus, endoscopy or the like."""

_MODALITIES = (
    ("radiology", r"x-?ray|radiogra|\bcr\b|\bct\b|tomogra|\bmri?\b|magnetic|ultraso|mammogra|\bpet\b|echo"),
    ("microscopy", r"microscop|histo|patholog|cytolog|smear|stain|\bh&e\b|blood|cell"),
    ("photograph", r"derm|fundus|retin|endoscop|photo|ophthalm|colonoscop"),
)

_SIDES = re.compile(r"\b(left|right|sinistr\w*|dextr\w*|laterali\w*|l|r|os|od)\b", re.IGNORECASE)


def preset_for(modality: str | None) -> str:
    """The augmentation preset for a modality as shards name it; `figure`, the most careful one, for an unknown one."""
    text = (modality or "").lower().replace("_", " ")
    return next((preset for preset, pattern in _MODALITIES if re.search(pattern, text)), "figure")


def find_preset(name: str) -> Augmentation:
    """The augmentation of that name. Raises ConfigError for an unknown one."""
    if name not in PRESETS:
        raise ConfigError("augmentation", "is no preset", found=repr(name), todo=f"use one of {', '.join(PRESETS)}")
    return PRESETS[name]


def names_side(caption: str) -> bool:
    """Whether a caption speaks of left or right, so that its picture must not be mirrored."""
    return _SIDES.search(caption) is not None


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


def read_reduced(data: bytes, image_format: str, size_px: int, where: str = "image") -> Image.Image:
    """The picture in RGB, its shorter side reduced towards twice `size_px` where it is longer: enough for any crop.

    A pure function of the bytes, so its result may be cached. Raises DataError for bytes that do not decode.
    """
    image = _read_jpeg(data, 2 * size_px) if image_format == "jpg" else None
    if image is None:
        image = read_rgb(data, where)
    factor = min(image.size) // (2 * size_px)
    return image.reduce(factor) if factor > 1 else image


def _read_jpeg(data: bytes, min_side_px: int) -> Image.Image | None:
    """The picture, scaled while decoding; None where the fast decoder cannot show it, so that Pillow decides."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours == "CMYK" or width * height > MAX_PIXELS:
            return None
        if Image.open(io.BytesIO(data), formats=("JPEG",)).getexif().get(0x0112, 1) != 1:
            return None
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=min_side_px, min_width=min_side_px)
    except (ValueError, OSError, SyntaxError):
        return None
    return Image.fromarray(pixels)


def augment(
    image: Image.Image, geometry: Geometry, change: Augmentation, *, facts: tuple[object, ...], may_mirror: bool
) -> np.ndarray:
    """(H, W, 3) uint8 training pixels; `facts` (seed, sample key, epoch) decide every random choice."""
    random = np.random.Generator(np.random.Philox(key=draw_int("augment", *facts)))
    view = _view(image.size, geometry.resize_mode, change, random)
    turn = random.uniform(-change.turn_deg, change.turn_deg) * (random.random() < 0.5)
    size = geometry.size_px
    # A turned view needs corners from outside of it: a square `wider` times as large holds it.
    wider = abs(math.cos(math.radians(turn))) + abs(math.sin(math.radians(turn)))
    seen = _cut(image, _scale_box(view, wider), math.ceil(size * wider), geometry)
    if turn:
        # Turned at the model's size and not before: at 28 px a turn blurs, and blur is a finding in a chest film.
        edge = (seen.width - size) // 2
        seen = seen.rotate(turn, Image.Resampling.BICUBIC).crop((edge, edge, edge + size, edge + size))
    pixels = _recolour(np.asarray(seen), change, random)
    if change.any_orientation:
        pixels = np.rot90(pixels, int(random.integers(4)))
    if (change.any_orientation or change.mirror) and may_mirror and random.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _cut(image: Image.Image, box: Box, size_px: int, geometry: Geometry) -> Image.Image:
    """The box of the picture as a square of `size_px`; beyond the picture its edge goes on.

    Black there would tell the model that this is a training picture. `longest` keeps the box's proportions, as it
    does for whole pictures; the other two modes squash it.
    """
    left, top, right, bottom = box
    margin = math.ceil(max(-left, -top, right - image.width, bottom - image.height, 0))
    if margin:
        image = Image.fromarray(np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)), mode="edge"))
        left, top, right, bottom = left + margin, top + margin, right + margin, bottom + margin
    if geometry.resize_mode == "longest":
        return fit(
            image.crop((round(left), round(top), round(right), round(bottom))),
            dataclasses.replace(geometry, size_px=size_px),
        )
    return image.resize((size_px, size_px), _RESAMPLING[geometry.interpolation], box=(left, top, right, bottom))


def _scale_box(box: Box, factor: float) -> Box:
    """A box grown by `factor` around its centre."""
    left, top, right, bottom = box
    extra_x, extra_y = (right - left) * (factor - 1) / 2, (bottom - top) * (factor - 1) / 2
    return left - extra_x, top - extra_y, right + extra_x, bottom + extra_y


def _view(size: tuple[int, int], mode: ResizeMode, change: Augmentation, random: np.random.Generator) -> Box:
    """What the model sees of a picture, as left, top, right, bottom in its pixels; may reach beyond the picture.

    Under `shortest`, which shows evaluation a square, the view is a square too, anywhere along the longer side.
    """
    width, height = (min(size), min(size)) if mode == "shortest" else size
    area, stretch = random.uniform(*change.area), change.aspect ** random.uniform(-1, 1)
    wide, high = width * (area * stretch) ** 0.5, height * (area / stretch) ** 0.5
    left, top = random.random() * (size[0] - wide), random.random() * (size[1] - high)
    return left, top, left + wide, top + high


def _recolour(pixels: np.ndarray, change: Augmentation, random: np.random.Generator) -> np.ndarray:
    gamma, contrast = random.uniform(*change.gamma), random.uniform(*change.contrast)
    brightness, saturation = random.uniform(-change.brightness, change.brightness), random.uniform(*change.saturation)
    noise = random.uniform(0, change.noise) * (random.random() < 0.5)
    levels = (np.arange(256) / 255.0) ** gamma
    middle = float(levels[int(pixels.mean())])
    levels = (levels - middle) * contrast + middle + brightness
    if saturation == 1 and noise == 0:
        return (levels.clip(0, 1) * 255 + 0.5).astype(np.uint8)[pixels]
    values = levels.astype(np.float32)[pixels]
    if saturation != 1:
        grey = values.mean(axis=2, keepdims=True)
        values = grey + (values - grey) * np.float32(saturation)
    if noise:
        # One grey grain for all channels: sensor noise of grey modalities, harmless in colour ones.
        values = values + random.standard_normal(values.shape[:2], dtype=np.float32)[..., None] * np.float32(noise)
    return (values.clip(0, 1) * 255 + 0.5).astype(np.uint8)
