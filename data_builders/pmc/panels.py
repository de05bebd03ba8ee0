"""A figure's pixels in, the boxes of its panels out, and a figure's pair in, a pair for each panel out.

Where to stop cutting is the whole difficulty: a plot has as many gutters between its axes and titles as a figure has
between its panels. So the caption decides how many boxes there are (`panel_captions`), the letters printed in the
picture say where they begin (`panel_labels`), and `panel_cuts` finds the best partition. `match_panels` names boxes
only where counts agree, and a figure whose least certain box is below `MIN_CONFIDENCE` stays whole: a wrong pair costs
more than a missing one. Boxes of a learned detector (`panel_boxes`) can take the place of `split_image`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from PIL import Image

from biomedclip.errors import DataError
from biomedclip.images import BadImage, check_image
from biomedclip.licences import licence_class
from biomedclip.schema import Pair
from data_builders.pmc.panel_captions import compose_panel_caption, split_caption
from data_builders.pmc.panel_cuts import Cutter, edge_masks, ink_mask, scale_label
from data_builders.pmc.panel_labels import PanelLabel, find_labels

MIN_CONFIDENCE = 0.4
"""Below, a figure stays whole. Holds for its least certain box and for its caption alike."""

_MAX_KEY = 80
_POSITIONS = {"left": 0, "right": 0, "middle": None, "top": 1, "bottom": 1}
_POSITION_ORDER = {"left": 0, "top": 0, "middle": 1, "right": 2, "bottom": 2}


@dataclass(frozen=True, slots=True)
class PanelBox:
    """A panel's place in the figure, in pixels of the figure, right and bottom exclusive."""

    left: int
    top: int
    right: int
    bottom: int
    confidence: float = 1.0
    letter: str | None = None
    """As the caption names it: `A`, or `left`."""

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def holds(self, label: PanelLabel) -> bool:
        """Whether the middle of a printed letter lies in the box."""
        x, y = (label.left + label.right) / 2, (label.top + label.bottom) / 2
        return self.left <= x < self.right and self.top <= y < self.bottom


def split_image(rgb: np.ndarray, count: int | None = None, labels: Sequence[PanelLabel] = ()) -> list[PanelBox]:
    """The panels of a picture (H, W, 3 uint8) in reading order; one box, the whole picture, where it has no gutters.

    With `count`, exactly so many boxes or, where the gutters do not yield them, the whole picture with confidence 0.
    `labels` are the panel letters printed in the picture, as far as known. Raises ValueError for an array of another
    shape or type.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"expected an array (H, W, 3) of uint8, found {rgb.shape} of {rgb.dtype}")
    height, width = rgb.shape[:2]
    whole = PanelBox(0, 0, width, height)
    if count is not None and count < 2:
        return [whole]
    ink, stride = ink_mask(rgb)
    cutter = Cutter(ink, edge_masks(rgb, stride), [scale_label(label, stride) for label in labels])
    found = cutter.best_partition(count) if count is not None else cutter.cut_freely()
    if len(found) < 2:
        return [whole if count is None else replace(whole, confidence=0.0)]
    margin = max(2, round(0.004 * max(height, width)))
    boxes = [
        PanelBox(
            max(0, left * stride - margin), max(0, top * stride - margin),
            min(width, right * stride + margin), min(height, bottom * stride + margin), round(min(confidence, 1.0), 3),
        )
        for (left, top, right, bottom), confidence in found
    ]  # fmt: skip
    return sort_reading_order(boxes)


def sort_reading_order(boxes: Sequence[PanelBox], *, by_columns: bool = False) -> list[PanelBox]:
    """Boxes row by row, left to right; or column by column, top to bottom.

    A box belongs to the row of the first box that it overlaps by half of the smaller height.
    """
    lines: list[list[PanelBox]] = []
    for box in sorted(boxes, key=lambda box: _start(box, by_columns)):
        begin, end = _extent(box, by_columns)
        for line in lines:
            head_begin, head_end = _extent(line[0], by_columns)
            overlap = min(end, head_end) - max(begin, head_begin)
            if overlap > 0.5 * min(end - begin, head_end - head_begin) and begin < (head_begin + head_end) / 2:
                line.append(box)
                break
        else:
            lines.append([box])
    return [box for line in lines for box in sorted(line, key=lambda box: _start(box, not by_columns))]


def _start(box: PanelBox, by_columns: bool) -> tuple[int, int]:
    return (box.left, box.top) if by_columns else (box.top, box.left)


def _extent(box: PanelBox, by_columns: bool) -> tuple[int, int]:
    return (box.left, box.right) if by_columns else (box.top, box.bottom)


def match_panels(
    boxes: Sequence[PanelBox], letters: Sequence[str], labels: Sequence[PanelLabel] = ()
) -> list[PanelBox]:
    """The boxes with their letters, in the order of `letters`; empty where it is not plain which is which.

    Boxes that carry letters already (of a detector) keep them, the surest of one letter; those the caption does not
    name are left out.
    Otherwise counts must agree. A box that holds one printed letter gets it; the rest follow in reading order, by rows
    or by columns, whichever the printed letters confirm. A box gains confidence by its printed letter, and loses where
    other boxes have theirs and it has none.
    """
    carried = {box.letter: box for box in sorted(boxes, key=lambda box: box.confidence) if box.letter is not None}
    if carried:
        return [carried[letter] for letter in letters if letter in carried]
    if len(boxes) != len(letters) or len(boxes) < 2:
        return []
    if all(letter in _POSITIONS for letter in letters):
        return _match_positions(boxes, letters)
    orders = [sort_reading_order(boxes, by_columns=by_columns) for by_columns in (False, True)]
    printed = {box: held[0] for box in boxes if len(held := [x.letter for x in labels if box.holds(x)]) == 1}
    agreement = [
        sum(printed.get(box) == letter for box, letter in zip(order, letters, strict=True)) for order in orders
    ]
    order = orders[agreement[1] > agreement[0]]
    unsure = 0.6 if not printed and orders[0] != orders[1] and _is_grid(boxes) else 1.0
    free = iter([letter for letter in letters if letter not in set(printed.values())])
    named: dict[str, PanelBox] = {}
    for box in order:
        letter = printed.get(box) or next(free, None)
        if letter is None or letter in named:
            return []
        confidence = box.confidence * unsure
        if box in printed:
            confidence += (1 - confidence) * 0.6
        elif printed:
            confidence *= 0.75
        named[letter] = replace(box, letter=letter, confidence=round(confidence, 3))
    return [named[letter] for letter in letters]


def _is_grid(boxes: Sequence[PanelBox]) -> bool:
    """Whether some boxes stand side by side and some above others, so that two reading orders are possible."""
    pairs = list(combinations(boxes, 2))
    beside = any(first.right <= second.left or second.right <= first.left for first, second in pairs)
    return beside and any(first.bottom <= second.top or second.bottom <= first.top for first, second in pairs)


def _match_positions(boxes: Sequence[PanelBox], names: Sequence[str]) -> list[PanelBox]:
    axis = next(axis for name in names if (axis := _POSITIONS[name]) is not None)
    ordered = sorted(boxes, key=lambda box: _extent(box, axis == 0))
    starts_and_ends = [_extent(box, axis == 0) for box in ordered]
    if any(second[0] < first[1] - 4 for first, second in pairwise(starts_and_ends)):
        return []
    wanted = sorted(names, key=lambda name: _POSITION_ORDER[name])
    named = {name: replace(box, letter=name) for name, box in zip(wanted, ordered, strict=True)}
    return [named[name] for name in names]


def find_panels(rgb: np.ndarray, letters: Sequence[str]) -> list[PanelBox]:
    """The panels that a caption names, found in its picture and named; empty where they are not found."""
    if len(letters) < 2:
        return []
    labels = find_labels(rgb, letters)
    return match_panels(split_image(rgb, len(letters), labels), letters, labels)


def split_figure_pair(
    pair: Pair, rgb: np.ndarray, *, boxes: Sequence[PanelBox] | None = None, min_confidence: float = MIN_CONFIDENCE
) -> list[Pair]:
    """A pair for each panel of a figure's pair; empty where the figure stays whole.

    `rgb` (H, W, 3 uint8) is the pair's picture. It stays whole where its licence forbids derivatives or is unknown,
    where the figure is one of several that share a caption, where caption or boxes are uncertain, and where they do
    not agree; a panel without words of its own gets no pair. `boxes` of a detector, in pixels of the picture, replace
    those found here. The new pairs are lossless PNG crops; their sidecar holds the parent's key and the box. Raises
    DataError for boxes outside of the picture.
    """
    if pair.panel is not None or not may_be_cut(pair.licence):
        return []
    captions = split_caption(pair.caption)
    if len(captions.letters) < 2 or captions.confidence < min_confidence:
        return []
    height, width = rgb.shape[:2]
    for box in boxes or ():
        if not (0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height):
            found = f"{box.left},{box.top},{box.right},{box.bottom} in {width}x{height}"
            raise DataError(pair.key, "has a panel box outside of its picture", found=found)
    panels = find_panels(rgb, captions.letters) if boxes is None else match_panels(boxes, captions.letters)
    if len(panels) < 2 or min(box.confidence for box in panels) < min_confidence:
        return []
    return [
        _panel_pair(pair, rgb, box, box.letter, compose_panel_caption(captions, box.letter))
        for box in panels
        if box.letter is not None and captions.panels[box.letter]
    ]


def may_be_cut(licence: str) -> bool:
    """Whether a licence allows a part of a figure to be given on: a panel is a derivative."""
    return licence_class(licence) in ("commercial-derivatives", "noncommercial") and "ND" not in licence


def _panel_pair(pair: Pair, rgb: np.ndarray, box: PanelBox, letter: str, caption: str) -> Pair:
    buffer = io.BytesIO()
    Image.fromarray(rgb[box.top : box.bottom, box.left : box.right]).save(buffer, "PNG")
    try:
        image = check_image(buffer.getvalue())
    except BadImage as error:
        raise DataError(pair.key, f"panel {letter} cannot be stored", found=str(error)) from None
    return replace(
        pair,
        key=panel_key(pair.key, letter),
        image=image.data,
        image_format=image.format,
        width=image.width,
        height=image.height,
        sha256=image.sha256,
        phash=image.phash,
        caption=caption,
        captions=(),
        panel=letter,
        concepts=(),
        modality=None,
        flags=tuple(dict.fromkeys((*pair.flags, "panel"))),
        sidecar=_panel_sidecar(pair, box, letter),
    )


def panel_key(key: str, letter: str) -> str:
    """The key of a panel: the figure's, a hyphen and the letter; a key that grows too long ends in a hash instead."""
    name = f"{key}-{letter.lower()}"
    if len(name) > _MAX_KEY:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{key[: _MAX_KEY - len(letter) - 10]}-{digest}-{letter.lower()}"
    return name


def _panel_sidecar(pair: Pair, box: PanelBox, letter: str) -> dict[str, Any]:
    """The parent's sidecar with the link to it, and of its mentions those that name this panel."""
    sidecar: dict[str, Any] = dict(pair.sidecar)
    mentions = [mention for mention in sidecar.pop("mentions", ()) if letter in mention.get("panels", ())]
    sidecar["parent"] = pair.key
    sidecar["panel_box"] = [box.left, box.top, box.right, box.bottom]
    sidecar["panel_confidence"] = box.confidence
    return {**sidecar, "mentions": mentions} if mentions else sidecar
