"""An explanation as one picture: the original, the map laid over its grey copy, a colour bar, and the check's result.

Reads an `Explanation`, yields a PIL picture. The map is drawn in viridis, whose lightness rises evenly, so that it is
read the same by colour-blind people and in black and white; the colours of a stained tissue would mix with it, so the
map lies over a grey copy. The line runs round the hottest tenth, which is what the deletion check hides. What a crop
keeps from the model is darkened.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from biomedclip.errors import MissingExtra

if TYPE_CHECKING:
    from biomedclip.app.explain import Explanation

HIDDEN_SHARE = 0.1
"""Part of the model's input that the check hides, and the line surrounds."""
MAX_SIDE = 900
"""Pixels; larger pictures are drawn at this size."""
_STRENGTH = 0.65
_DPI = 110


def draw_explanation(explanation: Explanation) -> Image.Image:
    """RGB picture with the two panels. Raises MissingExtra without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("app", "matplotlib") from None
    picture = explanation.picture.convert("RGB")
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    heat = explanation.placement.to_picture(explanation.input_heat, (picture.height, picture.width))
    tall = min(max(picture.height / picture.width, 0.45), 1.8)
    lines = [part for line in explanation.describe() for part in textwrap.wrap(line, 150)]
    figure = Figure(figsize=(10.4, 4.6 * tall + 0.55 + 0.21 * len(lines)), dpi=_DPI, layout="constrained")
    panels, words = figure.subfigures(  # type: ignore[misc]
        2, 1, height_ratios=[4.6 * tall + 0.45, 0.1 + 0.21 * len(lines)]
    )
    left, right = panels.subplots(1, 2)
    left.imshow(picture)
    left.set_title("picture", fontsize=11)
    shown = _lay_over(right, picture, heat, float(np.quantile(explanation.input_heat, 1 - HIDDEN_SHARE)))
    _dim_unseen(right, explanation, picture)
    title = f"evidence for “{explanation.label}”"
    title += f"\nrather than “{explanation.against}”" if explanation.against is not None else ""
    right.set_title(_wrap(title, 44), fontsize=11, parse_math=False)
    bar = panels.colorbar(shown, ax=right, fraction=0.046, pad=0.03, ticks=[0, 0.5, 1])
    bar.set_label("evidence, strongest place = 1", fontsize=9)
    for panel in (left, right):
        panel.set_axis_off()
    words.text(0.02, 0.98, "\n".join(lines), va="top", ha="left", fontsize=9, parse_math=False)
    return _render(figure)


def _lay_over(panel: Any, picture: Image.Image, heat: np.ndarray, level: float) -> Any:
    """Draw the map over the grey picture, stronger evidence more opaque, with a line round what lies above `level`.

    Returns what a colour bar needs.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    panel.imshow(picture.convert("L"), cmap="gray", vmin=0, vmax=255)
    colours = ScalarMappable(Normalize(0, 1), "viridis")
    panel.imshow(colours.to_rgba(heat, alpha=_STRENGTH * np.clip(heat * 2, 0, 1)))
    if 0 < level < heat.max():
        panel.contour(heat, levels=[level], colors=["white"], linewidths=1.2)
    return colours


def _dim_unseen(panel: Any, explanation: Explanation, picture: Image.Image) -> None:
    """Darken what a crop keeps from the model."""
    placement = explanation.placement
    if not explanation.is_cropped:
        return
    ratio = picture.width / placement.picture_size[1]
    left, top, right, bottom = (round(edge * ratio) for edge in placement.seen_box())
    shade = np.zeros((picture.height, picture.width, 4), dtype=np.float32)
    shade[..., 3] = 0.55
    shade[top:bottom, left:right, 3] = 0
    panel.imshow(shade)


def _wrap(text: str, width: int) -> str:
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, width, max_lines=3))


def _render(figure: Any) -> Image.Image:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The bundled font lacks some scripts; a box in a title is no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")
