"""Where the pixels of a model's input lie in the picture that they came from.

Reads the steps of an image transform and a picture's size, yields a `Placement`: one scale and one shift for each axis,
because every step that moves pixels (resize, crop, pad) does so along the axes. It is what a map over the input needs
to be drawn on the user's picture. Pixels count from their edges: the first one covers 0 to 1, its centre is 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from biomedclip.models.preprocess import ImageTransform, target_size
from biomedclip.models.zoo import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Each axis of a model's input in its picture: `picture = scale * input + shift`, in pixels; rows first."""

    input_size: tuple[int, int]
    """Height and width of the model's input."""
    picture_size: tuple[int, int]
    """Height and width of the picture."""
    scale: tuple[float, float]
    shift: tuple[float, float]

    def seen_box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what the model sees, in pixels of the picture; a crop leaves the rest out."""
        top, left = (max(0.0, shift) for shift in self.shift)
        bottom, right = (
            min(float(length), scale * size + shift)
            for length, scale, size, shift in zip(
                self.picture_size, self.scale, self.input_size, self.shift, strict=True
            )
        )
        return left, top, right, bottom

    def seen_share(self) -> float:
        """The part of the picture's area that the model sees, 0 to 1."""
        left, top, right, bottom = self.seen_box()
        height, width = self.picture_size
        return max(0.0, right - left) * max(0.0, bottom - top) / (height * width)

    def to_picture(self, values: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
        """`values` (h, w) over the input as float32 (H, W) over the picture, bilinear; 0 where the model saw nothing.

        `size` is another height and width for the same picture, to draw a large one small.
        """
        down, across = (self._weights(axis, (size or self.picture_size)[axis]) for axis in (0, 1))
        before, after, share, seen = down
        rows = values[before] * (1 - share[:, None]) + values[after] * share[:, None]
        rows[~seen] = 0
        before, after, share, seen = across
        whole = rows[:, before] * (1 - share) + rows[:, after] * share
        whole[:, ~seen] = 0
        return whole.astype(np.float32)

    def _weights(self, axis: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For `count` places along an axis of the picture: two input pixels, the share of the second, and if seen."""
        centres = (np.arange(count) + 0.5) * self.picture_size[axis] / count
        inside = (centres - self.shift[axis]) / self.scale[axis]
        last = self.input_size[axis] - 1
        pixel = np.clip(inside - 0.5, 0, last)
        before = np.floor(pixel).astype(np.intp)
        share = (pixel - before).astype(np.float32)
        return before, np.minimum(before + 1, last), share, (inside >= 0) & (inside <= last + 1)


def place_input(transform: ImageTransform, height: int, width: int) -> Placement:
    """Where the input that `transform` makes of a picture of this size lies in it."""
    size, scale, shift = (height, width), (1.0, 1.0), (0.0, 0.0)
    on_picture = True
    for step in transform.steps:
        if step.resize is not None:
            new = target_size(step, *size)
            scale = (scale[0] * size[0] / new[0], scale[1] * size[1] / new[1])
        elif step.pad is not None or step.crop is not None:
            new, corner = (_pad if step.pad is not None else _crop)(step, size, on_picture=on_picture)
            shift = (shift[0] + scale[0] * corner[0], shift[1] + scale[1] * corner[1])
        else:
            new = size
        size = new
        on_picture = on_picture and step.tensor is None
    return Placement(input_size=size, picture_size=(height, width), scale=scale, shift=shift)


def _pad(step: Step, size: tuple[int, int], *, on_picture: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size after a pad step, and where its first pixel lies before it."""
    if step.pad == "square":
        # `size` widens a square of pictures only, as the transform has it.
        side = max(*size, step.size if on_picture and isinstance(step.size, int) else 0)
        return (side, side), (-((side - size[0]) // 2), -((side - size[1]) // 2))
    return _pair(step), (0, 0)


def _crop(step: Step, size: tuple[int, int], *, on_picture: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size after a crop step, and where its first pixel lies before it; smaller pictures are padded first."""
    wanted = _pair(step)
    corner = []
    for length, kept in zip(size, wanted, strict=True):
        padded = max(kept - length, 0) // 2
        spare = max(length, kept) - kept
        corner.append((spare // 2 if step.rounding == "floor" else round(spare / 2)) - padded)
    return wanted, (corner[0], corner[1])


def _pair(step: Step) -> tuple[int, int]:
    size = step.size or (0, 0)
    return (size, size) if isinstance(size, int) else size
