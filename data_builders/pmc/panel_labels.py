"""The panel letters printed in a figure, found by shape: pixels and the expected letters in, their places out.

Not an OCR: the caption says which letters to expect, so it is enough to find glyphs that stand alone, are all of one
height and look more like the expected letter than like any other. Blobs of ink (connected runs of dark, or of light
pixels on dark) are compared with letters drawn from Pillow's own font. What is found guides the cuts in `panels`; a
figure whose letters are not found, or are part of a photograph, is cut by its gutters alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_builders.components import label_components

_WORK_SIDE = 1600
_GRID = 16
_MIN_SCORE = 0.62
_MAX_BLOBS = 4000
_SHORT = frozenset("acegmnopqrsuvwxyz")
_BELOW = frozenset("gpqy")


@dataclass(frozen=True, slots=True)
class PanelLabel:
    """A letter printed in the figure: its box in pixels, and how much it looks like the letter (0 to 1)."""

    letter: str
    left: int
    top: int
    right: int
    bottom: int
    score: float


def find_labels(rgb: np.ndarray, letters: Sequence[str]) -> list[PanelLabel]:
    """Where `letters` (`A`, `B`, …) stand in a picture (H, W, 3 uint8); at most one place for each, some may lack.

    Empty where no more than half of the letters are found in one size, or not in a reading order.
    """
    if len(letters) < 2 or any(len(letter) != 1 for letter in letters):
        return []
    stride = -(-max(rgb.shape[:2]) // _WORK_SIDE)
    grey = np.asarray(Image.fromarray(rgb).convert("L").reduce(stride))
    best: tuple[float, list[PanelLabel]] = (0.0, [])
    for mask in (grey < 110, grey < 165, grey > 190):
        blobs = _blobs(mask)
        lone = _lone_blobs(blobs, max(grey.shape))
        for capital in (True, False):
            found = _match_letters(mask, lone, letters, capital=capital)
            total = sum(label.score for label in found)
            if total > best[0]:
                best = total, found
    if len(best[1]) <= max(1, len(letters) / 2) or not _are_in_order(best[1]):
        return []
    return [
        PanelLabel(x.letter, x.left * stride, x.top * stride, x.right * stride, x.bottom * stride, x.score)
        for x in best[1]
    ]


def _are_in_order(labels: Sequence[PanelLabel]) -> bool:
    """Whether hardly any letter stands above and left of one that comes before it in the alphabet."""
    ordered = sorted(labels, key=lambda label: label.letter)
    pairs = [(first, second) for i, first in enumerate(ordered) for second in ordered[i + 1 :]]
    wrong = sum(
        (second.bottom <= first.top and second.left < first.left - 2)
        or (second.right <= first.left and second.top < first.top - 2)
        for first, second in pairs
    )
    return wrong <= 0.12 * len(pairs)


def _blobs(mask: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) of connected ink: left, top, right, bottom; 8-neighbourhood."""
    height, width = mask.shape
    padded = np.zeros((height, width + 2), dtype=np.int8)
    padded[:, 1:-1] = mask
    change = np.diff(padded, axis=1)
    rows, starts = np.nonzero(change == 1)
    _, stops = np.nonzero(change == -1)
    if not len(rows):
        return np.zeros((0, 4), dtype=np.int64)
    # Runs of the row above that touch a run form a contiguous range, because runs are sorted within their row.
    stride = width + 2
    start_keys, stop_keys = rows * stride + starts, rows * stride + stops
    first = np.searchsorted(stop_keys, start_keys - stride, side="left")
    last = np.searchsorted(start_keys, stop_keys - stride, side="right")
    counts = np.maximum(last - first, 0)
    right = np.repeat(np.arange(len(rows)), counts)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    labels = label_components(len(rows), np.repeat(first, counts) + offsets, right)
    roots, inverse = np.unique(labels, return_inverse=True)
    boxes = np.empty((len(roots), 4), dtype=np.int64)
    boxes[:, :2], boxes[:, 2:] = np.iinfo(np.int64).max, 0
    np.minimum.at(boxes[:, 0], inverse, starts)
    np.minimum.at(boxes[:, 1], inverse, rows)
    np.maximum.at(boxes[:, 2], inverse, stops)
    np.maximum.at(boxes[:, 3], inverse, rows + 1)
    return boxes


def _lone_blobs(boxes: np.ndarray, side: int) -> np.ndarray:
    """Blobs of a letter's size with nothing beside them; brackets and a full stop may stand beside."""
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    sized = (height >= 5) & (height <= max(12, 0.06 * side)) & (width <= 1.5 * height) & (width >= 2)
    candidates = boxes[sized]
    if not len(candidates) or len(boxes) > 40 * _MAX_BLOBS:
        return boxes[:0]
    order = np.argsort(boxes[:, 0], kind="stable")
    by_left = boxes[order]
    lone = []
    for box in candidates[: 4 * _MAX_BLOBS]:
        left, top, right, bottom = box.tolist()
        tall = bottom - top
        near = by_left[
            np.searchsorted(by_left[:, 0], left - 3 * tall) : np.searchsorted(by_left[:, 0], right + 0.45 * tall)
        ]
        beside = near[
            (near[:, 3] > top + 0.2 * tall) & (near[:, 1] < bottom - 0.2 * tall) & (near[:, 2] > left - 0.45 * tall)
        ]
        # Narrow neighbours may be brackets; the blob itself is among the rows.
        wide = beside[(beside[:, 2] - beside[:, 0]) > 0.42 * tall]
        if len(wide) <= 1 and len(beside) <= 3:
            lone.append((left, top, right, bottom))
    return np.array(lone[:_MAX_BLOBS], dtype=np.int64).reshape(-1, 4)


@lru_cache(maxsize=1)
def _templates() -> dict[str, tuple[np.ndarray, float]]:
    """Each letter's shape in a unit grid, centred and scaled to length 1, and its width over its height."""
    try:
        font = ImageFont.load_default(64)
    except (ImportError, OSError):  # Pillow built without FreeType draws no letters of this size
        return {}
    shapes = {}
    for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+*":
        for weight in (0, 3):
            image = Image.new("L", (160, 160))
            ImageDraw.Draw(image).text((40, 40), letter, fill=255, font=font, stroke_width=weight)
            box = image.getbbox()
            if box is not None:
                shapes[f"{letter}{weight}"] = (_unit_shape(image.crop(box)), (box[2] - box[0]) / (box[3] - box[1]))
    return shapes


def _unit_shape(image: Image.Image) -> np.ndarray:
    values = np.asarray(image.resize((_GRID, _GRID), Image.Resampling.BOX), dtype=np.float32).ravel()
    values = values - values.mean()
    length = float(np.linalg.norm(values))
    return values / length if length else values


def _label(letter: str, box: np.ndarray, score: float) -> PanelLabel:
    left, top, right, bottom = (int(side) for side in box)
    return PanelLabel(letter, left, top, right, bottom, round(score, 3))


def _match_letters(mask: np.ndarray, boxes: np.ndarray, letters: Sequence[str], *, capital: bool) -> list[PanelLabel]:
    """The best place for each letter among blobs of one size."""
    templates = _templates()
    if not len(boxes) or not templates:
        return []
    names = list(templates)
    shapes = np.stack([templates[name][0] for name in names])
    aspects = np.array([templates[name][1] for name in names])
    crops = np.stack([
        _unit_shape(Image.fromarray(mask[top:bottom, left:right].astype(np.uint8) * 255))
        for left, top, right, bottom in boxes.tolist()
    ])  # fmt: skip
    widths, heights = boxes[:, 2] - boxes[:, 0], (boxes[:, 3] - boxes[:, 1]).astype(np.float64)
    scores = crops @ shapes.T - 0.35 * np.abs(np.log((widths / heights)[:, None] / aspects[None]))
    rivals = scores.max(axis=1)
    wanted = {letter: letter if capital else letter.lower() for letter in letters}
    columns = {letter: [i for i, name in enumerate(names) if name[:-1] == shape] for letter, shape in wanted.items()}
    table = np.stack([scores[:, columns[letter]].max(axis=1) for letter in letters], axis=1)
    # A blob that looks more like another sign is not this letter.
    table = np.where((table >= _MIN_SCORE) & (table >= rivals[:, None] - 0.06), table, 0.0)
    ratio = np.array([0.74 if shape in _SHORT and shape not in _BELOW else 1.0 for shape in wanted.values()])
    sizes = heights[:, None] / ratio[None]
    best: tuple[float, list[PanelLabel]] = (0.0, [])
    for size in np.unique(np.round(sizes[table > 0], 1)):
        fitting = np.where(np.abs(np.log(sizes / size)) < 0.16, table, 0.0)
        top = fitting.max(axis=0)
        total = float(top.sum())
        if total > best[0]:
            rows = fitting.argmax(axis=0)
            labels = [
                _label(letter, boxes[row], float(score))
                for letter, row, score in zip(letters, rows, top, strict=True)
                if score > 0
            ]
            best = total, labels
    return best[1]
