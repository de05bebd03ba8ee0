"""Corruptions an image meets on its way from a scanner to a model, and how much of a score survives them.

Reads uint8 pictures (H, W, 3); yields pictures of the same shape. Every corruption is a function of (picture, severity,
seed, sample id): the same sample is corrupted the same way whatever batch, process or order it comes in, so cached
embeddings of corrupted sets are as good as fresh ones. Five severities; the scales are of this project, in the manner
of ImageNet-C and MedMNIST-C, and calibrated against neither.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from biomedclip.errors import ConfigError

Picture = NDArray[np.uint8]
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(picture: Picture, name: str, severity: int, *, sample_id: str, seed: int = 0) -> Picture:
    """The picture (H, W, 3) corrupted. Raises ConfigError for an unknown corruption or severity."""
    if name not in CORRUPTIONS:
        raise ConfigError(f"corruption {name}", "is not known", todo=f"one of {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ConfigError(f"corruption {name}", "has severities 1 to 5", found=severity)
    digest = hashlib.sha256(f"{seed}\n{name}\n{severity}\n{sample_id}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return _as_picture(CORRUPTIONS[name](picture, severity - 1, rng))


def corruption_reader(
    read: Callable[[Any, Any], Image.Image], name: str, severity: int, *, seed: int = 0
) -> Callable[[Any, Any], Image.Image]:
    """A reader of manifest rows (`read(manifest, row)`) whose pictures are corrupted, for `embed_images`."""

    def corrupted(manifest: Any, row: Any) -> Image.Image:
        picture = np.asarray(read(manifest, row).convert("RGB"))
        return Image.fromarray(corrupt(picture, name, severity, sample_id=row.sample_id, seed=seed))

    return corrupted


def summarise_corruptions(
    clean: float, values: Mapping[str, Mapping[int, float]], chance: float = 0.0
) -> dict[str, Any]:
    """Mean over severities of each corruption, and what share of the score above chance is kept.

    `values` {corruption: {severity: score}}. `kept` = (mean corrupted - chance) / (clean - chance); NaN where the
    clean score is no better than chance, as there is nothing to keep.
    """
    means = {name: float(np.mean(list(by.values()))) for name, by in values.items()}
    overall = float(np.mean(list(means.values()))) if means else float("nan")
    kept = (overall - chance) / (clean - chance) if clean > chance else float("nan")
    worst = min(means, key=means.__getitem__, default=None)
    return {"clean": clean, "mean": overall, "kept": kept, "worst": worst, "by_corruption": means}


def replace_background(picture: Picture, mask: NDArray[np.bool_], background: Picture) -> Picture:
    """The picture where the mask is true, the background elsewhere, brought to its size: is it the object or its
    surroundings that decide (fairness.background_gap)."""
    height, width = picture.shape[:2]
    if mask.shape != (height, width):
        raise ValueError(f"mask {mask.shape} does not fit picture {picture.shape[:2]}")
    behind = np.asarray(Image.fromarray(background).resize((width, height), Image.Resampling.BICUBIC))
    return np.where(mask[:, :, None], picture, behind).astype(np.uint8)


def _as_picture(values: NDArray[Any]) -> Picture:
    return np.clip(np.round(np.asarray(values, dtype=np.float64)), 0, 255).astype(np.uint8)


def _gaussian_noise(picture: Picture, level: int, rng: np.random.Generator) -> NDArray[Any]:
    return picture + rng.normal(0, (6, 12, 20, 32, 48)[level], picture.shape)


def _shot_noise(picture: Picture, level: int, rng: np.random.Generator) -> NDArray[Any]:
    photons = (120, 60, 25, 12, 6)[level]
    return rng.poisson(picture / 255 * photons) / photons * 255


def _blur(picture: Picture, level: int, rng: np.random.Generator) -> NDArray[Any]:
    del rng
    # Of the shorter side: a blur of two pixels is nothing at 2,000 px and everything at 28.
    radius = max(0.3 * (level + 1), (0.004, 0.008, 0.013, 0.02, 0.03)[level] * min(picture.shape[:2]))
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def _pixelate(picture: Picture, level: int, rng: np.random.Generator) -> NDArray[Any]:
    del rng
    share = (0.6, 0.45, 0.33, 0.22, 0.14)[level]
    size = picture.shape[1], picture.shape[0]
    small = Image.fromarray(picture).resize([max(1, round(s * share)) for s in size], Image.Resampling.BOX)
    return np.asarray(small.resize(size, Image.Resampling.NEAREST))


def _jpeg(picture: Picture, level: int, rng: np.random.Generator) -> NDArray[Any]:
    del rng
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=(40, 25, 16, 10, 6)[level])
    with Image.open(buffer) as decoded:
        return np.asarray(decoded.convert("RGB"))


def _brightness(picture: Picture, level: int, rng: np.random.Generator) -> NDArray[Any]:
    sign = 1 if rng.random() < 0.5 else -1
    return picture + sign * 255 * (0.08, 0.15, 0.22, 0.3, 0.4)[level]


def _contrast(picture: Picture, level: int, rng: np.random.Generator) -> NDArray[Any]:
    del rng
    mean = picture.mean()
    return mean + (picture - mean) * (0.75, 0.6, 0.45, 0.3, 0.2)[level]


def _gamma(picture: Picture, level: int, rng: np.random.Generator) -> NDArray[Any]:
    power = (1.2, 1.4, 1.7, 2.1, 2.6)[level]
    return 255 * (picture / 255) ** (power if rng.random() < 0.5 else 1 / power)


def _bias_field(picture: Picture, level: int, rng: np.random.Generator) -> NDArray[Any]:
    """A smooth multiplicative field, as of an MR coil or a microscope's lamp."""
    strength = (0.15, 0.3, 0.45, 0.6, 0.8)[level]
    corners = rng.uniform(-1, 1, (3, 3)).astype(np.float32)
    field = Image.fromarray(corners).resize((picture.shape[1], picture.shape[0]), Image.Resampling.BICUBIC)
    return picture * np.exp(strength * np.asarray(field))[:, :, None]


def _stain(picture: Picture, level: int, rng: np.random.Generator) -> NDArray[Any]:
    """Haematoxylin, eosin and residue each scaled and shifted in optical density (Tellez et al. 2018; the stain
    vectors of Ruifrok and Johnston 2001)."""
    spread = (0.05, 0.1, 0.17, 0.25, 0.35)[level]
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    density = -np.log((picture.astype(np.float64) + 1) / 256)
    amounts = density @ np.linalg.inv(stains)
    amounts = amounts * rng.uniform(1 - spread, 1 + spread, 3) + rng.uniform(-spread, spread, 3) * 0.1
    return 256 * np.exp(-amounts @ stains) - 1


def _occlusion(picture: Picture, level: int, rng: np.random.Generator) -> NDArray[Any]:
    """A black box over part of the picture, as of a burnt-in label."""
    share = (0.1, 0.17, 0.25, 0.33, 0.42)[level]
    height, width = (max(1, round(side * share)) for side in picture.shape[:2])
    top, left = (int(rng.integers(0, side - part + 1)) for side, part in
                 zip(picture.shape[:2], (height, width), strict=True))  # fmt: skip
    covered = picture.copy()
    covered[top : top + height, left : left + width] = 0
    return covered


CORRUPTIONS: Mapping[str, Callable[[Picture, int, np.random.Generator], NDArray[Any]]] = {
    "gaussian_noise": _gaussian_noise, "shot_noise": _shot_noise, "blur": _blur, "pixelate": _pixelate, "jpeg": _jpeg,
    "brightness": _brightness, "contrast": _contrast, "gamma": _gamma, "bias_field": _bias_field, "stain": _stain,
    "occlusion": _occlusion,
}  # fmt: skip
"""Name -> function of picture, level 0 to 4 and random numbers."""
