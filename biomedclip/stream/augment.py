"""A reduced picture to the model's square of training pixels, by what its preset allows.

Reads uint8 pixels and an `Augmentation`; yields uint8 pixels of the model's size. All random numbers of a picture come
from one generator keyed by (seed, source, sample key, epoch), and are drawn whether a setting uses them or not: the
pixels depend neither on the worker, the rank nor on what was decoded before, and switching one setting on leaves the
others as they were. Everything here is OpenCV and tables, because this is the inner loop of training: MONAI's bias
field, noise, gamma and affine take 4 to 5 ms a picture together, the same formulas here half a millisecond.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image

from biomedclip.stream.augment_monai import monai_transforms
from biomedclip.stream.decode import Geometry, ResizeMode, fit
from biomedclip.stream.plan import draw_int
from biomedclip.stream.presets import Augmentation, names_height, names_side

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; may reach beyond the picture."""

_DRAWS = 64
_ALIASES_FROM = 1.5
"""Views this many times larger than the square are shrunk by area before they are turned."""
_SHRINKS_FROM = 1.3
"""Views this many times larger than the square are shrunk by area, smaller ones between pixels: four times faster."""
_SMALL = 0.7
"""Smaller views than this share of the square are cut between pixels: a 28 px picture has few whole ones to choose."""
_BEYOND = {"edge": cv2.BORDER_REPLICATE, "mirror": cv2.BORDER_REFLECT}
_DEGREE = 3
_GRAIN_ROOM_PX = 128

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Absorbance of red, green and blue by haematoxylin, eosin and DAB (Ruifrok and Johnston 2001)."""
_UNMIX = np.linalg.inv(STAINS)
_ABSORBANCE = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)


def augment(
    picture: np.ndarray, geometry: Geometry, change: Augmentation, *, facts: tuple[object, ...], caption: str = ""
) -> np.ndarray:
    """(S, S, 3) uint8 training pixels of an (H, W, 3) picture; `facts` decide every random choice.

    `facts` are the seed, the source, the sample's key and the epoch. What `caption` says of left and right, up and
    down, is not made untrue.
    """
    if change.is_none:
        return np.asarray(fit(Image.fromarray(picture), geometry))
    random = np.random.Generator(np.random.Philox(key=draw_int("augment", *facts)))
    draws = iter(random.random(_DRAWS).tolist())
    view = _view(picture.shape[1], picture.shape[0], geometry.resize_mode, change, draws)
    turn = _signed(change.turn_deg, draws) * (next(draws) < 0.5)
    quarter, flipped, mirrored = int(next(draws) * 4), next(draws) < 0.5, next(draws) < 0.5
    pixels = _see(picture, view, turn, geometry, _BEYOND[change.beyond])
    pixels = _stain(pixels, change, draws)
    pixels = _recolour(pixels, change, draws)
    pixels = _degrade(pixels, change, draws)
    pixels = _resample(pixels, change, draws)
    if (change.mirror or change.any_orientation) and not names_side(caption):
        if change.any_orientation and not names_height(caption):
            pixels = np.rot90(pixels, quarter)
            pixels = pixels[:, ::-1] if flipped else pixels
        elif mirrored:
            pixels = pixels[:, ::-1]
    if change.monai:
        pixels = _apply_monai(pixels, change, draw_int("monai", *facts))
    return np.ascontiguousarray(pixels)


def _between(low: float, high: float, draws: Iterator[float]) -> float:
    return low + (high - low) * next(draws)


def _signed(limit: float, draws: Iterator[float]) -> float:
    return limit * (2 * next(draws) - 1)


def _sometimes(limit: float, draws: Iterator[float]) -> float:
    """A number up to the limit for half of the pictures, zero for the others."""
    strength, touched = next(draws), next(draws) < 0.5
    return limit * strength * touched


def _view(width: int, height: int, mode: ResizeMode, change: Augmentation, draws: Iterator[float]) -> Box:
    """What the model sees of a picture, as left, top, right, bottom in its pixels; may reach beyond the picture.

    Under `shortest`, which shows evaluation a square, the view is a square too, anywhere along the longer side.
    """
    wide, high = (min(width, height),) * 2 if mode == "shortest" else (width, height)
    area, stretch = _between(*change.area, draws), change.aspect ** _signed(1, draws)
    seen_wide, seen_high = wide * (area * stretch) ** 0.5, high * (area / stretch) ** 0.5
    left, top = next(draws) * (width - seen_wide), next(draws) * (height - seen_high)
    return left, top, left + seen_wide, top + seen_high


def _see(picture: np.ndarray, view: Box, turn: float, geometry: Geometry, beyond: int) -> np.ndarray:
    """The view as the model's square; beyond the picture its edge or its mirror image goes on.

    Black there would tell the model that this is a training picture. `longest` keeps the view's proportions and pads
    with black, as it does for whole pictures; the other two modes squash it.
    """
    size = geometry.size_px
    wide, high = view[2] - view[0], view[3] - view[1]
    out = (size, size)
    if geometry.resize_mode == "longest":
        out = (max(round(size * wide / max(wide, high)), 1), max(round(size * high / max(wide, high)), 1))
    if turn or max(wide / out[0], high / out[1]) < _SMALL:
        pixels = _warp(picture, view, turn, out, geometry, beyond)
    else:
        pixels = _cut(picture, view, out, geometry, beyond)
    if out == (size, size):
        return pixels
    left, top = (size - out[0]) // 2, (size - out[1]) // 2
    return cv2.copyMakeBorder(pixels, top, size - out[1] - top, left, size - out[0] - left, cv2.BORDER_CONSTANT)


def _cut(picture: np.ndarray, view: Box, out: tuple[int, int], geometry: Geometry, beyond: int) -> np.ndarray:
    """The view, its edges on whole pixels, as (out[1], out[0], 3)."""
    (rows, above, below), (columns, before, after) = (
        _clip(view[1], view[3], picture.shape[0], out[1]),
        _clip(view[0], view[2], picture.shape[1], out[0]),
    )
    inside = picture[rows, columns]
    size = (out[0] - before - after, out[1] - above - below)
    scale_x, scale_y = inside.shape[1] / size[0], inside.shape[0] / size[1]
    shrinking = cv2.INTER_AREA if max(scale_x, scale_y) > _SHRINKS_FROM else cv2.INTER_LINEAR
    how = shrinking if min(scale_x, scale_y) >= 1 else _enlarging(geometry)
    pixels = cv2.resize(inside, size, interpolation=how)
    if above or below or before or after:
        return cv2.copyMakeBorder(pixels, above, below, before, after, beyond)
    return pixels


def _clip(start: float, stop: float, length: int, out: int) -> tuple[slice, int, int]:
    """The pixels of a line of `length` that a view covers, and the pixels of `out` that lie before and after them."""
    first, last = max(round(start), 0), min(round(stop), length)
    first = min(first, length - 1)
    last = max(last, first + 1)
    scale = out / (stop - start)
    before, after = max(round(-start * scale), 0), max(round((stop - length) * scale), 0)
    if before + after >= out:
        before, after = 0, 0
    return slice(first, last), before, after


def _warp(
    picture: np.ndarray, view: Box, turn: float, out: tuple[int, int], geometry: Geometry, beyond: int
) -> np.ndarray:
    """The view turned by `turn` degrees around its middle, between pixels, as (out[1], out[0], 3)."""
    left, top, right, bottom = view
    scale_x, scale_y = (right - left) / out[0], (bottom - top) / out[1]
    if max(scale_x, scale_y) > _ALIASES_FROM:
        width, height = picture.shape[1], picture.shape[0]
        smaller = (math.ceil(width / max(scale_x, 1)), math.ceil(height / max(scale_y, 1)))
        picture = cv2.resize(picture, smaller, interpolation=cv2.INTER_AREA)
        left, right = left * smaller[0] / width, right * smaller[0] / width
        top, bottom = top * smaller[1] / height, bottom * smaller[1] / height
        scale_x, scale_y = (right - left) / out[0], (bottom - top) / out[1]
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    # From the middles of the square's pixels to those of the picture's: turned first, then stretched.
    matrix = np.array([[scale_x * cos, -scale_x * sin, 0.0], [scale_y * sin, scale_y * cos, 0.0]])
    middle = np.array([out[0] / 2 - 0.5, out[1] / 2 - 0.5])
    matrix[:, 2] = [(left + right) / 2 - 0.5, (top + bottom) / 2 - 0.5] - matrix[:, :2] @ middle
    how = _enlarging(geometry) if max(scale_x, scale_y) < 1 else cv2.INTER_LINEAR
    return cv2.warpAffine(picture, matrix, out, flags=how | cv2.WARP_INVERSE_MAP, borderMode=beyond)


def _enlarging(geometry: Geometry) -> int:
    return cv2.INTER_CUBIC if geometry.interpolation == "bicubic" else cv2.INTER_LINEAR


def _stain(pixels: np.ndarray, change: Augmentation, draws: Iterator[float]) -> np.ndarray:
    strengths = [1 + _signed(change.stain, draws) for _ in range(3)]
    shifts = [_signed(change.stain, draws) for _ in range(3)]
    if next(draws) < 0.5 or not change.stain:
        return pixels
    return jitter_stains(pixels, strengths, shifts)


def jitter_stains(pixels: np.ndarray, strengths: list[float], shifts: list[float]) -> np.ndarray:
    """(H, W, 3) uint8 with each stain's amount times its strength plus its shift, in absorbance (natural logarithm).

    HED jitter: Tellez et al. 2018, section III-C, with amounts a = A U for absorbances A and the inverse U of `STAINS`.
    It is one linear map of absorbances, so stains are never computed one by one.
    """
    linear = _UNMIX @ np.diag(strengths) @ STAINS
    shift = np.array(shifts) @ STAINS
    absorbance = cv2.transform(cv2.LUT(pixels, _ABSORBANCE), np.hstack([linear.T, shift[:, None]]))
    light = cv2.exp(absorbance * np.float32(-1)) * np.float32(256)
    jittered: np.ndarray = cv2.add(light, np.array([-1.0, -1.0, -1.0, 0.0]), dtype=cv2.CV_8U)
    return jittered


def _recolour(pixels: np.ndarray, change: Augmentation, draws: Iterator[float]) -> np.ndarray:
    """Gamma, then contrast around the mean, brightness and tint, as one table; then saturation."""
    gamma, contrast = _between(*change.gamma, draws), _between(*change.contrast, draws)
    brightness, saturation = _signed(change.brightness, draws), _between(*change.saturation, draws)
    tints = np.array([1 + _signed(change.tint, draws) for _ in range(3)])
    mean = int(sum(cv2.mean(pixels)[:3]) / 3)
    if gamma == 1 and not change.tint:
        # The same straight line without a table, in half the time.
        pixels = cv2.addWeighted(pixels, contrast, pixels, 0, mean * (1 - contrast) + 255 * brightness)
    else:
        levels = (np.arange(256) / 255.0) ** gamma
        middle = float(levels[mean])
        levels = (levels - middle) * contrast + middle + brightness
        table = levels[:, None] * tints if change.tint else levels[:, None]
        pixels = cv2.LUT(pixels, (table.clip(0, 1) * 255 + 0.5).astype(np.uint8)[None])
    if saturation != 1:
        pixels = cv2.transform(pixels, saturation * np.eye(3) + (1 - saturation) / 3)
    return pixels


def _degrade(pixels: np.ndarray, change: Augmentation, draws: Iterator[float]) -> np.ndarray:
    """Blur, then what multiplies the picture (bias field, speckle), then what is added to it (noise)."""
    size = pixels.shape[0]
    sigma = _sometimes(change.blur_px, draws) * size / 224
    has_field = next(draws) < 0.5
    field = [_signed(change.bias_field, draws) for _ in range(10)]
    speckle, noise = _sometimes(change.speckle, draws), _sometimes(change.noise, draws)
    grain = _grain(size)[_window(size, draws)] if speckle or noise else None
    if sigma > 0.2:
        pixels = cv2.GaussianBlur(pixels, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    gain = bias_field(size, field) if change.bias_field and has_field else None
    if grain is not None and speckle:
        swing = 1 + grain * np.float32(speckle)
        gain = swing if gain is None else gain * swing
    if gain is not None:
        pixels = cv2.multiply(pixels, cv2.merge([gain] * 3), dtype=cv2.CV_8U)
    if grain is not None and noise:
        # One grey grain for all channels: sensor noise of grey modalities, harmless in colour ones. Turned by half, so
        # that it is not the speckle's.
        added = (grain[::-1, ::-1] * np.float32(noise * 255)).astype(np.int16)
        pixels = cv2.add(pixels, cv2.merge([added] * 3), dtype=cv2.CV_8U)
    return pixels


def _resample(pixels: np.ndarray, change: Augmentation, draws: Iterator[float]) -> np.ndarray:
    """Detail taken away as by an earlier shrinking, then texture added in octaves of 1, 2 and 4 pixels."""
    size = pixels.shape[0]
    side, shrunk = round(size * _between(change.resolution, 1, draws)), next(draws) < 0.5
    strength = _sometimes(change.texture, draws)
    shares = np.array([next(draws) for _ in range(3)])
    windows = [_window(size // step, draws) for step in (1, 2, 4)]
    if shrunk and side < size:
        pixels = cv2.resize(cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA), (size, size))
    if strength:
        octaves = [
            share * cv2.resize(_grain(size)[window], (size, size), interpolation=cv2.INTER_CUBIC)
            for share, window in zip(shares, windows, strict=True)
        ]
        texture = np.add.reduce(octaves)
        added = (texture * np.float32(strength * 255 / max(float(texture.std()), 1e-6))).astype(np.int16)
        pixels = cv2.add(pixels, cv2.merge([added] * 3), dtype=cv2.CV_8U)
    return pixels


def bias_field(size: int, coefficients: list[float]) -> np.ndarray:
    """(S, S) float32 factors: the exponential of a polynomial of ten Legendre terms over [-1, 1] squared.

    The coefficients stand in the lower triangle of a 4 x 4 matrix, row by row, as in MONAI's RandBiasField.
    """
    matrix = np.zeros((_DEGREE + 1, _DEGREE + 1), dtype=np.float32)
    matrix[np.tril_indices(_DEGREE + 1)] = coefficients
    basis = _legendre(size)
    return np.exp(basis @ matrix @ basis.T)


@lru_cache(maxsize=8)
def _legendre(size: int) -> np.ndarray:
    return np.polynomial.legendre.legvander(np.linspace(-1, 1, size), _DEGREE).astype(np.float32)


@lru_cache(maxsize=4)
def _grain(size: int) -> np.ndarray:
    """Standard normal numbers to cut windows out of: drawing 50,000 new ones takes as long as decoding the picture."""
    side = size + _GRAIN_ROOM_PX
    return np.random.Generator(np.random.Philox(key=0)).standard_normal((side, side), dtype=np.float32)


def _window(size: int, draws: Iterator[float]) -> tuple[slice, slice]:
    top, left = int(next(draws) * _GRAIN_ROOM_PX), int(next(draws) * _GRAIN_ROOM_PX)
    return slice(top, top + size), slice(left, left + size)


def _apply_monai(pixels: np.ndarray, change: Augmentation, seed: int) -> np.ndarray:
    """The pixels after the preset's own MONAI transforms, each seeded by its place."""
    import torch

    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)) / 255
    for place, transform in enumerate(monai_transforms(json.dumps(change.monai))):
        transform.set_random_state(seed=(seed + place) % 2**32)
        image = transform(image)
    values = np.asarray(image).transpose(1, 2, 0)
    return (values.clip(0, 1) * 255 + 0.5).astype(np.uint8)
