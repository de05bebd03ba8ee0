"""`medmnist_npz`: one .npz with `<split>_images` and `<split>_labels`, as MedMNIST publishes its sets.

Never unpickles: an object array is refused, because loading one runs code. Labels are class indices, so the class
names have to be given in index order (BreastMNIST's 0 is malignant: order is a fact, not a guess). The 3-D sets are
cubes, of which `slices` says how many pictures each gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from biomedclip.errors import ConfigError, DataError
from biomedclip.layouts.manifest import make_manifest
from biomedclip.layouts.npz import MAX_LOADED_BYTES, Header, check_archive, read_array, read_header, read_row
from biomedclip.schema import SPLITS, ImageRef, LabelKind, LabelledImage, Manifest


def read_medmnist(
    root: Path,
    name: str,
    *,
    classes: Sequence[str],
    file: str | None = None,
    kind: LabelKind = "single",
    splits: Sequence[str] = SPLITS,
    slices: int | None = None,
    axis: int = 0,
) -> Manifest:
    """The manifest of a MedMNIST file.

    `root` is the file, or its folder with `file` as its name (default `<name>.npz`, else the only .npz there is).
    `classes` are names in index order; `kind` multi reads the label rows as one bit a class. Sets of cubes need
    `slices`, the number of evenly spaced ones to take along `axis` (0, 1 or 2; 1 takes the middle); the slices of a
    cube are one group. Raises DataError for a corrupt file, missing arrays, pickled arrays, and labels outside the
    classes.
    """
    if (slices is not None and slices < 1) or axis not in (0, 1, 2):
        raise ConfigError("layout.slices", "or axis is out of range", found=f"{slices}, {axis}",
                          todo="slices from 1, axis 0, 1 or 2")  # fmt: skip
    path = find_file(root, name, file)
    content = check_archive(path)
    rows: list[LabelledImage] = []
    for split in splits:
        images, labels = _open_images(str(path), split), read_array(str(path), f"{split}_labels")
        cuts = _cut(images, slices, axis, f"{path}: {split}")
        if labels.dtype.kind not in "iub":
            raise DataError(f"{path}: {split}", "has labels that are no integers", found=str(labels.dtype),
                            todo="write class indices")  # fmt: skip
        if images.shape[0] != len(labels):
            raise DataError(f"{path}: {split}", "has other numbers of images and labels",
                            found=f"{images.shape[0]} and {len(labels)}", todo="download the file again")  # fmt: skip
        for number, label in enumerate(np.asarray(labels).reshape(len(labels), -1)):
            said, denied = _read_label(label, classes, kind, f"{path}: {split} row {number}")
            for cut in cuts:
                rows.append(
                    LabelledImage(
                        sample_id=f"{split}/{number:06d}" + (f"/{cut:03d}" if cut is not None else ""),
                        image=ImageRef(path=path.name, part=f"npz:{split}_images/{number}"
                                       + (f"/{axis}/{cut}" if cut is not None else "")),
                        labels=said, negatives=denied, split=split,
                        group_id=f"{split}/{number:06d}" if cut is not None else None,
                    )
                )  # fmt: skip
    return make_manifest(name, path.parent, rows, kind=kind, classes=classes, content=content)


def find_file(root: Path, name: str, file: str | None) -> Path:
    """The .npz that is meant. Raises DataError where there is none, or more than one to choose from."""
    if root.is_file():
        return root
    candidates = [root / (file or f"{name}.npz")]
    if not candidates[0].is_file() and file is None:
        candidates = sorted(root.glob("*.npz"))
    if len(candidates) != 1 or not candidates[0].is_file():
        raise DataError(root, f"holds no {file or name + '.npz'}", found=f"{len(candidates)} other .npz files"
                        if file is None else None, todo="name the file with layout.file")  # fmt: skip
    return candidates[0]


def read_npz_picture(path: Path, rest: str, where: str) -> Image.Image:
    """The picture `<array>/<row>` or `<array>/<row>/<axis>/<cut>` of an .npz. Raises DataError."""
    key, number, *cut = rest.split("/")
    picture = read_row(str(path), key, int(number))
    if cut:
        picture = np.take(picture, int(cut[1]), axis=int(cut[0]))
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
        raise DataError(where, "is not an 8-bit picture", found=f"{picture.dtype} {picture.shape}")
    return Image.fromarray(np.ascontiguousarray(picture))


def _read_label(
    label: np.ndarray, classes: Sequence[str], kind: LabelKind, where: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Classes that hold, and classes stated not to hold, of one label row."""
    if kind == "multi":
        if len(label) != len(classes):
            raise DataError(where, f"has not one bit for each of {len(classes)} classes", found=str(len(label)))
        bits = list(zip(classes, label, strict=True))
        return tuple(name for name, bit in bits if bit), tuple(name for name, bit in bits if not bit)
    if len(label) != 1 or not 0 <= int(label[0]) < len(classes):
        raise DataError(where, f"is no index into {len(classes)} classes", found=str(label.tolist()),
                        todo="give all class names, in index order")  # fmt: skip
    return (classes[int(label[0])],), ()


def _open_images(path: str, split: str) -> Header:
    """What the images are; those that fit are read now, so that a damaged file says so before anything is built."""
    header = read_header(path, f"{split}_images")
    if math.prod(header.shape) * header.dtype.itemsize <= MAX_LOADED_BYTES:
        read_array(path, f"{split}_images")
    return header


def _cut(images: Header, slices: int | None, axis: int, where: str) -> Sequence[int | None]:
    """Which cuts of each row are pictures; None stands for the row itself."""
    shape = images.shape
    is_picture = len(shape) == 3 or (len(shape) == 4 and shape[-1] in (3, 4))
    if images.dtype != np.uint8 or len(shape) not in (3, 4):
        raise DataError(where, "has images that are not 8-bit grey, RGB or RGBA pictures",
                        found=f"{images.dtype} {shape}", todo="check that this is a MedMNIST file")  # fmt: skip
    if is_picture and slices is None:
        return [None]
    if is_picture or slices is None:
        wrong = "has pictures, and no volumes to slice" if is_picture else "has volumes, which are no pictures"
        todo = "leave out layout.slices" if is_picture else "say how many of each with layout.slices"
        raise DataError(where, wrong, found=f"{images.dtype} {shape}", todo=todo)
    length = shape[1 + axis]
    return sorted({(2 * i + 1) * length // (2 * slices) for i in range(slices)})
