"""A picture cut along its gutters into a wanted number of regions: the best such partition, found exactly.

Reads ink masks and running sums, so that the ink of any row or column of any region costs one subtraction. A gutter is
a run of rows (or columns) of background through a whole region; thin strokes across it, or a gutter of another colour
between photographs, count for less. The score of a partition adds up its gutters (wide and long is good) and its
regions (slivers are bad; one printed panel letter in the top left corner is good). The number of partitions is
exponential, but a region's best score for 1, 2, … panels does not depend on how it was reached, so each region is
solved once; only the few best gutters of a region are tried, which bounds the work and was no worse in accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_builders.pmc.panel_labels import PanelLabel

Region = tuple[int, int, int, int]
"""left, top, right, bottom in the working copy."""

MIN_SIDE_SHARE = 0.06
"""A panel is at least this share of the figure's longer side, in both directions."""

_WORK_SIDE = 1400
_INK = 28
_EDGE = 10
_CROSSED = 0.02
_UNEVEN = 0.01
_MAX_CUTS = 4
_MAX_REGIONS = 3000


def ink_mask(rgb: np.ndarray) -> tuple[np.ndarray, int]:
    """What is not background, reduced so that no stroke is lost, and the factor of the reduction.

    The background is the commonest colour of the outermost pixels, or white where that colour is rare.
    """
    stride = -(-max(rgb.shape[:2]) // _WORK_SIDE)
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]]).astype(np.int32)
    coarse = (border >> 4) @ np.array([256, 16, 1])
    values, counts = np.unique(coarse, return_counts=True)
    commonest = int(counts.argmax())
    white = np.array([255, 255, 255])
    background = (
        np.median(border[coarse == values[commonest]], axis=0) if counts[commonest] > len(border) / 3 else white
    )
    if np.abs(background - white).max() < 40:
        background = white
    difference = np.abs(rgb.astype(np.int16) - background.astype(np.int16)).max(axis=2)
    return _reduce(np.greater(difference, _INK), stride), stride


def edge_masks(rgb: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the picture changes along x, and along y: a gutter of any colour has no change along itself."""
    grey = rgb.mean(axis=2, dtype=np.float32)
    masks = []
    for axis in (1, 0):
        step = np.abs(np.diff(grey, axis=axis, append=grey[:, -1:] if axis else grey[-1:])) > _EDGE
        masks.append(_reduce(step, stride))
    return masks[0], masks[1]


def _reduce(mask: np.ndarray, stride: int) -> np.ndarray:
    """A mask at a `stride`th of the size, true where any pixel of the block is."""
    if stride == 1:
        return mask
    rows, columns = (-(-side // stride) * stride for side in mask.shape)
    padded = np.zeros((rows, columns), dtype=bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    reduced: np.ndarray = padded.reshape(rows // stride, stride, columns // stride, stride).max(axis=(1, 3))
    return reduced


@dataclass(frozen=True, slots=True)
class Anchor:
    """A printed letter in the working copy."""

    letter: str
    box: Region
    x: float
    y: float


def scale_label(label: PanelLabel, stride: int) -> Anchor:
    """A printed letter's place in a working copy reduced by `stride`."""
    box = (label.left // stride, label.top // stride, -(-label.right // stride), -(-label.bottom // stride))
    return Anchor(label.letter, box, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2)


@dataclass(frozen=True, slots=True)
class _Cut:
    score: float
    first: Region
    second: Region
    gap: float
    """Width of the gutter as a share of the figure's longer side."""


@dataclass(frozen=True, slots=True)
class _Plan:
    cut: _Cut
    first: int
    second: int


def _region(values: Sequence[int]) -> Region:
    left, top, right, bottom = values
    return left, top, right, bottom


_Sums = tuple[np.ndarray, np.ndarray]


def _sums(for_rows: np.ndarray, for_columns: np.ndarray) -> _Sums:
    """Running sums along x, from which row profiles are had, and along y, for column profiles."""
    height, width = for_rows.shape
    along_x = np.zeros((height, width + 1), dtype=np.int32)
    np.cumsum(for_rows, axis=1, out=along_x[:, 1:])
    along_y = np.zeros((height + 1, width), dtype=np.int32)
    np.cumsum(for_columns, axis=0, out=along_y[1:])
    return along_x, along_y


class Cutter:
    """The cut tree of one picture; remembers each region it has solved."""

    def __init__(self, ink: np.ndarray, edges: tuple[np.ndarray, np.ndarray], labels: Sequence[Anchor] = ()) -> None:
        self.labels = labels
        self.height, self.width = ink.shape
        self.side = max(ink.shape)
        self.min_side = max(8.0, MIN_SIDE_SHARE * self.side)
        self._ink = _sums(ink, ink)
        self._edges = _sums(*edges)
        self.whole = self._trim((0, 0, self.width, self.height))
        self._solved: dict[Region, list[tuple[float, _Plan | None]]] = {}
        self._cuts: dict[Region, list[_Cut]] = {}

    def _profile(self, region: Region, axis: int, sums: _Sums | None = None) -> np.ndarray:
        """Ink in each column (axis 0) or row (axis 1) of a region."""
        left, top, right, bottom = region
        along_x, along_y = sums or self._ink
        if axis == 0:
            return along_y[bottom, left:right] - along_y[top, left:right]
        return along_x[top:bottom, right] - along_x[top:bottom, left]

    def _trim(self, region: Region) -> Region | None:
        columns, rows = np.flatnonzero(self._profile(region, 0)), np.flatnonzero(self._profile(region, 1))
        if not len(columns):
            return None
        left, top = region[0], region[1]
        return int(left + columns[0]), int(top + rows[0]), int(left + columns[-1] + 1), int(top + rows[-1] + 1)

    def cuts(self, region: Region) -> list[_Cut]:
        """The widest gutters of a region, both directions; those that would leave a sliver are left out."""
        if region not in self._cuts:
            found = [cut for axis in (0, 1) for cut in self._gutters(region, axis)]
            found += self._label_cuts(region)
            found.sort(key=lambda cut: -cut.score)
            distinct: dict[tuple[Region, Region], _Cut] = {}
            for cut in found:
                distinct.setdefault((cut.first, cut.second), cut)
            self._cuts[region] = list(distinct.values())[: 2 * _MAX_CUTS]
        return self._cuts[region]

    def _gutters(self, region: Region, axis: int) -> list[_Cut]:
        """Gutters of background, then those a thin stroke crosses, then those of any one colour between photographs."""
        length = (region[3] - region[1]) if axis == 0 else (region[2] - region[0])
        ink = self._profile(region, axis)
        gutters = self._runs(region, axis, ink == 0, 1.0)
        if len(gutters) < _MAX_CUTS:
            gutters += self._runs(region, axis, ink <= _CROSSED * length, 0.45)
            edges = self._profile(region, axis, self._edges)
            gutters += self._runs(region, axis, edges <= _UNEVEN * length, 0.35)
        gutters.sort(key=lambda cut: -cut.score)
        return gutters[:_MAX_CUTS]

    def _runs(self, region: Region, axis: int, empty: np.ndarray, trust: float) -> list[_Cut]:
        edges = np.flatnonzero(np.diff(empty.astype(np.int8), prepend=0, append=0))
        length = (region[3] - region[1]) if axis == 0 else (region[2] - region[0])
        across = self.height if axis == 0 else self.width
        cuts = []
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            before, after = start, len(empty) - stop
            if min(before, after) < self.min_side or stop - start < 1.5:
                continue
            score = float(np.log2(1 + (stop - start) / (0.006 * self.side)) * (0.35 + 0.65 * length / across))
            halves = self._halves(region, axis, start, stop)
            if halves is not None:
                cuts.append(_Cut(trust * score, *halves, trust * (stop - start) / self.side))
        return cuts

    def _halves(self, region: Region, axis: int, start: int, stop: int) -> tuple[Region, Region] | None:
        base = region[axis]
        first, second = list(region), list(region)
        first[axis + 2], second[axis] = base + start, base + stop
        before, after = self._trim(_region(first)), self._trim(_region(second))
        return (before, after) if before and after else None

    def _label_cuts(self, region: Region) -> list[_Cut]:
        """Cuts just left of and just above each label of a region, also where a little ink crosses them."""
        inside = self._labels_in(region)
        if len(inside) < 2:
            return []
        cuts = []
        for axis in (0, 1):
            profile = self._profile(region, axis)
            length = (region[3] - region[1]) if axis == 0 else (region[2] - region[0])
            base = region[axis]
            for label in inside:
                edge = label.box[axis] - base
                size = label.box[3] - label.box[1]
                window = profile[max(0, edge - size) : edge]
                if not len(window):
                    continue
                cut = max(0, edge - size) + len(window) - 1 - int(window[::-1].argmin())
                crossed = float(profile[cut]) / length
                if min(cut, len(profile) - cut) < self.min_side or crossed > 0.12:
                    continue
                halves = self._halves(region, axis, cut, cut)
                if halves is not None:
                    cuts.append(_Cut(0.3 - 14 * crossed, *halves, 0.006 * (1 - 8 * crossed)))
        cuts.sort(key=lambda cut: -cut.score)
        return cuts[:_MAX_CUTS]

    def _labels_in(self, region: Region) -> list[Anchor]:
        left, top, right, bottom = region
        return [label for label in self.labels if left <= label.x < right and top <= label.y < bottom]

    def _label_score(self, region: Region, count: int) -> float:
        """What the printed letters say of a region: best is one letter, near the region's top left corner."""
        if not self.labels:
            return 0.0
        inside = self._labels_in(region)
        known = len(self.labels) / count
        if not inside:
            return -1.5 * known * known
        if len(inside) > 1:
            return -3.0 * (len(inside) - 1)
        left, top, right, bottom = region
        near = inside[0].x - left < 0.45 * (right - left) and inside[0].y - top < 0.35 * (bottom - top)
        return 1.0 if near else -0.5

    def _leaf_score(self, region: Region, count: int) -> float:
        """0 for a region that may be one of `count` panels, negative for slivers and scraps."""
        width, height = region[2] - region[0], region[3] - region[1]
        area = width * height / (self.height * self.width)
        score = self._label_score(region, count)
        if min(width, height) < self.min_side:
            score -= 3.0
        share = area * count
        if share < 0.35:
            score -= 1.5 * float(np.log2(0.35 / max(share, 1e-4)))
        aspect = max(width, height) / max(1, min(width, height))
        if aspect > 4:
            score -= 0.8 * (aspect - 4) / 4
        return score

    def best_partition(self, count: int) -> list[tuple[Region, float]]:
        """The `count` regions of the best partition with their confidence; fewer than two where there is none."""
        if self.whole is None:
            return []
        table = self._solve(self.whole, count)
        if len(table) < count or table[count - 1][1] is None:
            return []
        leaves: list[tuple[Region, float]] = []
        self._collect(self.whole, count, count, 1.0, leaves)
        return leaves

    def _solve(self, region: Region, count: int) -> list[tuple[float, _Plan | None]]:
        """Best score, and the cut that yields it, for 1, 2, … panels in a region, as many as may fit into it."""
        known = self._solved.get(region)
        if known is not None:
            return known
        capacity = int((region[2] - region[0]) // self.min_side * ((region[3] - region[1]) // self.min_side))
        most = max(1, min(count, capacity))
        table: list[tuple[float, _Plan | None]] = [(-np.inf, None)] * most
        table[0] = self._leaf_score(region, count), None
        self._solved[region] = table
        if most > 1 and len(self._solved) < _MAX_REGIONS:
            for cut in self.cuts(region):
                first, second = self._solve(cut.first, count), self._solve(cut.second, count)
                for i, (score_first, _) in enumerate(first[: most - 1]):
                    for j, (score_second, _) in enumerate(second[: most - 1 - i]):
                        total = cut.score + score_first + score_second
                        if total > table[i + j + 1][0]:
                            table[i + j + 1] = total, _Plan(cut, i + 1, j + 1)
        return table

    def _collect(
        self, region: Region, number: int, count: int, confidence: float, leaves: list[tuple[Region, float]]
    ) -> None:
        _, plan = self._solved[region][number - 1]
        if plan is None:
            leaves.append((region, confidence))
            return
        confidence = min(confidence, plan.cut.gap / (plan.cut.gap + 0.006) * 1.1)
        self._collect(plan.cut.first, plan.first, count, confidence, leaves)
        self._collect(plan.cut.second, plan.second, count, confidence, leaves)

    def cut_freely(self, min_gap: float = 0.02) -> list[tuple[Region, float]]:
        """Regions between all gutters wider than `min_gap` of the longer side, for a picture of unknown count."""
        leaves: list[tuple[Region, float]] = []
        pending = [(self.whole, 1.0)] if self.whole else []
        while pending:
            region, confidence = pending.pop()
            cut = next((cut for cut in self.cuts(region) if cut.gap >= min_gap), None)
            if cut is None:
                leaves.append((region, confidence))
                continue
            confidence = min(confidence, cut.gap / (cut.gap + 0.02))
            pending += [(cut.first, confidence), (cut.second, confidence)]
        return leaves
