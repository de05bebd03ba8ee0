"""What may happen to a training picture, as presets by modality that anyone can read and change.

Reads the YAML files of `augmentations/`, a user's own file or an inline mapping; yields frozen `Augmentation`s and
says which preset a modality gets and what a caption forbids. Imports no torch, because run configs are checked with it.
The presets are mild and physical: a chest film keeps its orientation, a smear has none, a figure with text is not
mirrored. `biomedclip.stream.augment` turns them into pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from biomedclip.config import Config, check_config, parse_yaml, read_yaml
from biomedclip.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Range = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]

PRESETS = (
    "none", "pathology", "ultrasound", "fundus", "endoscopy", "dermatoscopy", "microscopy", "radiology", "photograph",
    "figure",
)  # fmt: skip
"""Names of the project's presets, in the order in which a modality is asked for them."""


class Augmentation(Config):
    """What may happen to a training picture. Ranges are drawn uniformly; a zero or a [1, 1] switches one off.

    Turns, blur, stain, bias field, speckle, noise, resolution and texture touch half of the pictures, so that every
    epoch also shows pictures without them.
    """

    like: str | None = None
    """A preset whose settings hold where this one says nothing."""
    modalities: tuple[str, ...] = ()
    """Regular expressions; a sample whose modality one of them finds gets this preset under `auto`."""

    area: Range = (1.0, 1.0)
    """Area that is seen, as a share of the picture's. Ranges centred on 1 keep whole pictures, which is what
    evaluation shows, in the middle of what was trained on; with crops alone they lie at its far end."""
    beyond: Literal["edge", "mirror"] = "edge"
    """What a view shows that reaches beyond the picture: its edge drawn out, or its mirror image, for tissue."""
    aspect: Annotated[float, Field(ge=1)] = 1.0
    """The seen part is up to this much wider or taller than the picture."""
    turn_deg: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Turned by up to this angle to either side."""
    any_orientation: bool = False
    """Right-angle turns and mirror images are as likely as the original: there is no up in a smear. Not where the
    caption names a side or speaks of up and down."""
    mirror: bool = False
    """Left and right are swapped in half of the pictures, except where the caption names a side."""

    blur_px: NotNegative = 0.0
    """Gaussian blur of at most this standard deviation, in pixels of a 224 px picture."""
    stain: Share = 0.0
    """Haematoxylin, eosin and DAB are each made stronger or weaker by at most this share, and each absorbance is
    moved by at most as much: the HED jitter of Tellez et al. 2018, over the vectors of Ruifrok and Johnston 2001."""

    brightness: Share = 0.0
    """Added to pixels in [0, 1], at most."""
    contrast: Range = (1.0, 1.0)
    gamma: Range = (1.0, 1.0)
    tint: Share = 0.0
    """Red, green and blue are each scaled by up to this share: the white balance of cameras and lamps."""
    saturation: Range = (1.0, 1.0)

    bias_field: NotNegative = 0.0
    """Largest coefficient of a smooth field that multiplies the picture: MONAI's RandBiasField, of degree 3."""
    speckle: Share = 0.0
    """Noise that grows with brightness, of at most this share as standard deviation: ultrasound's."""
    noise: Share = 0.0
    """Grey Gaussian noise of at most this standard deviation on pixels in [0, 1]."""

    resolution: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The picture is made smaller by at least this share of its side and larger again, as pictures that others have
    shrunk before."""
    texture: Share = 0.0
    """Grey texture of several sizes, of at most this standard deviation: the detail that a small training picture has
    lost and a large picture at hand has."""

    monai: tuple[dict[str, dict[str, Any]], ...] = ()
    """Further random array transforms of MONAI, such as `[{RandGibbsNoise: {prob: 0.3}}]`, applied last to pixels in
    [0, 1]. They are seeded like everything here, and slow: milliseconds a picture where the rest takes one."""

    @field_validator("area", "contrast", "gamma", "saturation")
    @classmethod
    def _rising(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("is a range from high to low; write the lower end first")
        return value

    @field_validator("modalities")
    @classmethod
    def _patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
        return value

    @property
    def is_none(self) -> bool:
        """Whether nothing may happen, so that training sees the pixels of evaluation."""
        return all(
            getattr(self, name) == field.default
            for name, field in type(self).model_fields.items()
            if name not in ("like", "modalities")
        )


def find_preset(name: str) -> Augmentation:
    """The preset of that name, or of that YAML file where the name is a path. Raises ConfigError for neither."""
    if name in PRESETS:
        return _shipped(name)
    if name.endswith((".yaml", ".yml")):
        values = read_yaml(name)
        if not isinstance(values, dict):
            raise ConfigError(name, "must hold `key: value` lines", found=type(values).__name__)
        return complete(check_config(values, Augmentation, name))
    raise ConfigError("augmentation", "is no preset", found=repr(name),
                      todo=f"use auto, a .yaml file or one of {', '.join(sorted(PRESETS))}")  # fmt: skip


def complete(change: Augmentation) -> Augmentation:
    """The augmentation with what it takes over from the preset that it is `like`."""
    if change.like is None:
        return change
    own = {name: getattr(change, name) for name in change.model_fields_set if name != "like"}
    return find_preset(change.like).model_copy(update=own)


def resolve_setting(setting: str | Augmentation) -> str | Augmentation:
    """`auto`, a preset's name, or the whole augmentation that a file or mapping says, as a run records it."""
    if isinstance(setting, Augmentation):
        return complete(setting)
    if setting == "auto":
        return setting
    found = find_preset(setting)
    return setting if setting in PRESETS else found


def augmentation_for(setting: str | Augmentation, modality: str | None) -> Augmentation:
    """The augmentation of a sample of that modality, under a source's setting: auto, a name or an augmentation."""
    if isinstance(setting, Augmentation):
        return setting
    return _shipped(preset_for(modality)) if setting == "auto" else find_preset(setting)


@cache
def preset_for(modality: str | None) -> str:
    """The augmentation preset for a modality as shards name it; `figure`, the most careful one, for an unknown one."""
    text = (modality or "").lower().replace("_", " ")
    for name in PRESETS:
        if any(re.search(pattern, text) for pattern in _shipped(name).modalities):
            return name
    return "figure"


@cache
def _shipped(name: str) -> Augmentation:
    text = (resources.files("biomedclip.stream") / "augmentations" / f"{name}.yaml").read_text(encoding="utf-8")
    return complete(check_config(parse_yaml(text, f"{name}.yaml") or {}, Augmentation, f"{name}.yaml"))


_SIDES = re.compile(
    r"\b(left|right|sinistr\w*|dextr\w*|laterali\w*|l|r|os|od|oculus|gauche|droite?|links?|linke\w?|rechts?|rechte\w?|"
    r"izquierd\w+|derech\w+|sinistra|destr[ao]|esquerd\w|direit\w)\b|[左右]",
    re.IGNORECASE,
)
_HEIGHTS = re.compile(
    r"\b(upper|lower|top|bottom|above|below|upwards?|downwards?|vertical\w*|horizontal\w*|clockwise|"
    r"counterclockwise)\b|[上下]",
    re.IGNORECASE,
)


def names_side(caption: str) -> bool:
    """Whether a caption speaks of left or right, so that its picture must not be mirrored."""
    return _SIDES.search(caption) is not None


def names_height(caption: str) -> bool:
    """Whether a caption speaks of up or down, so that its picture must not be turned by right angles."""
    return _HEIGHTS.search(caption) is not None


def describe_preset(name: str) -> Mapping[str, Any]:
    """What a preset changes: settings that differ from doing nothing."""
    values = find_preset(name).model_dump(exclude_defaults=True)
    return {key: value for key, value in values.items() if key not in ("like", "modalities")}
