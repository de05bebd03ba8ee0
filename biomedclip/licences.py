"""Licence codes, the classes they fall into, and what each class allows.

A code is one of the spellings of the PMC metadata (`CC BY`, `CC BY-NC-ND`, ...) plus the software licences of the
labelled sets (`MIT`, `Apache-2.0`). Everything fails closed: an unknown or absent code belongs to no preset.
"""

from __future__ import annotations

from biomedclip.errors import ConfigError

LICENCE_CLASSES: dict[str, tuple[str, ...]] = {
    "commercial-derivatives": ("CC0", "CC BY", "CC BY-SA", "MIT", "Apache-2.0", "BSD-3-Clause", "PDDL"),
    "commercial": ("CC BY-ND",),
    "noncommercial": ("CC BY-NC", "CC BY-NC-SA", "CC BY-NC-ND"),
}
"""Class -> codes that belong to it and to no narrower one. Cutting a figure into panels makes a derivative, so
no-derivatives licences are a class of their own."""

PRESETS: dict[str, tuple[str, ...]] = {
    "commercial-derivatives": ("commercial-derivatives",),
    "commercial": ("commercial-derivatives", "commercial"),
    "noncommercial": ("commercial-derivatives", "commercial", "noncommercial"),
    "all": ("commercial-derivatives", "commercial", "noncommercial", "other"),
}
"""Preset -> classes it admits. `all` still needs a stated licence: it is the reader who vouches for `other`."""


def licence_class(code: str | None) -> str:
    """The class of a licence code; `other` for one we do not know, `none` where there is none."""
    if not code:
        return "none"
    return next((name for name, codes in LICENCE_CLASSES.items() if code in codes), "other")


def is_allowed(code: str | None, preset: str) -> bool:
    """Whether a preset admits a licence code. Raises ConfigError for an unknown preset."""
    if preset not in PRESETS:
        raise ConfigError("licence", "is no preset", found=repr(preset), todo=f"use one of {', '.join(PRESETS)}")
    return licence_class(code) in PRESETS[preset]
