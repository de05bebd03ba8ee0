"""Deep grey to 8 bits: windows in HU with their presets, percentiles, and how a reference says which was used.

DICOM files and volumes share this, so that the same values are the same pixels whatever they came in. Nothing here
chooses a window: that is the recipe's, or the file's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from biomedclip.errors import ConfigError, MissingExtra

WINDOWS: dict[str, tuple[float, float]] = {
    "abdomen": (50, 400), "angio": (300, 600), "bone": (400, 1800), "brain": (40, 80), "liver": (30, 150),
    "lung": (-600, 1500), "mediastinum": (50, 350), "spine": (50, 250), "stroke": (40, 40), "subdural": (75, 215),
    "temporal_bone": (600, 2800),
}  # fmt: skip
"""Centre and width in HU, as radiology teaches them (Radiopaedia, Windowing (CT))."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grey:
    """How deep grey becomes 8 bits; without either, only by what the file itself says."""

    window: tuple[float, float] | None = None
    """Centre and width in HU, instead of the file's."""
    percentile: tuple[float, float] | None = None
    """For grey of more than 8 bits that carries no window: percentiles of the frame that become black and white."""


def parse_grey(window_hu: str | Sequence[float] | None, percentile: Sequence[float] | None) -> Grey:
    """The Grey that a layout's options say. Raises ConfigError for an unknown preset or numbers that make no window."""
    window: tuple[float, float] | None = None
    if isinstance(window_hu, str):
        if window_hu not in WINDOWS:
            raise ConfigError(
                "layout.window_hu", "is no window", found=repr(window_hu), todo=f"use one of {', '.join(WINDOWS)}"
            )
        window = WINDOWS[window_hu]
    elif window_hu is not None:
        if len(window_hu) != 2 or not window_hu[1] >= 1 or not np.isfinite(window_hu).all():
            raise ConfigError(
                "layout.window_hu", "is no [centre, width]", found=str(list(window_hu)), todo="width from 1"
            )
        window = (float(window_hu[0]), float(window_hu[1]))
    if percentile is not None and (len(percentile) != 2 or not 0 <= percentile[0] < percentile[1] <= 100):
        raise ConfigError(
            "layout.percentile", "is no pair of percentiles", found=str(list(percentile)), todo="[0.5, 99.5]"
        )
    return Grey(window=window, percentile=(float(percentile[0]), float(percentile[1])) if percentile else None)


def write_grey(grey: Grey) -> str:
    """The part of a reference that says how grey becomes 8 bits."""
    said = {"window": grey.window, "percentile": grey.percentile}
    return "".join(f";{key}={pair[0]:.9g},{pair[1]:.9g}" for key, pair in said.items() if pair)


def read_grey(options: Sequence[str]) -> Grey:
    """What `write_grey` wrote."""
    said = dict(option.split("=") for option in options)
    pairs = {key: tuple(map(float, value.split(","))) for key, value in said.items() if key in ("window", "percentile")}
    return Grey(**pairs)  # type: ignore[arg-type]


def apply_window(values: np.ndarray, centre: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """Values under a window as 8 bits: PS3.3 C.11.2.1.2.1 (C.11.2.1.3 for LINEAR_EXACT and SIGMOID).

    Raises ValueError for a width the function cannot have.
    """
    try:
        from pydicom import Dataset
        from pydicom.pixels import apply_windowing
    except ImportError:
        raise MissingExtra("build", "pydicom") from None
    said = Dataset()
    said.PhotometricInterpretation, said.PixelRepresentation, said.BitsStored = "MONOCHROME2", 0, 8
    said.WindowCenter, said.WindowWidth, said.VOILUTFunction = f"{centre:.9g}", f"{width:.9g}", function
    with np.errstate(over="ignore"):
        return np.rint(apply_windowing(np.nan_to_num(values), said)).astype(np.uint8)


def scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values from `low` (black) to `high` (white) as 8 bits, those outside cut, NaN as 0 is."""
    span = high - low if high > low else 1.0
    return np.rint(np.clip((np.nan_to_num(values.astype(np.float64)) - low) / span, 0, 1) * 255).astype(np.uint8)
