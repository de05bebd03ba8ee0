"""`hdf5`: pictures and labels as rows of HDF5 arrays, in one file or in two (PatchCamelyon's `_x.h5` and `_y.h5`).

Only rows that are asked for are read. A file may point to other files (external links, raw external storage, virtual
arrays); such an array is refused, because it would read what lies outside the data folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from biomedclip.errors import ConfigError, DataError, MissingExtra
from biomedclip.images import MAX_PIXELS
from biomedclip.layouts.cells import read_cells
from biomedclip.layouts.manifest import check_path, hash_id, make_manifest, name_split
from biomedclip.schema import ImageRef, LabelKind, LabelledImage, Manifest

MAX_ROWS = 100_000_000
"""An array without data can state any length."""

_DAMAGED = (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError)


def read_hdf5(
    root: Path,
    name: str,
    *,
    classes: Sequence[str],
    images: str | Mapping[str, str],
    labels: str | Mapping[str, str] | None = None,
    image_key: str = "x",
    label_key: str = "y",
    kind: LabelKind = "single",
    splits: dict[str, str] | None = None,
    groups: str | Mapping[str, str] | None = None,
    group_column: str | None = None,
    hash_group: bool = False,
) -> Manifest:
    """The manifest of HDF5 files.

    `images` is the file with array `image_key` (N, H, W) or (N, H, W, C) of 8 bits, or one for each split; `labels`
    likewise with array `label_key`, class indices of any shape that has one number a row, or one bit a class with
    `kind: multi` (default: the file of the images). `groups` are tables with a row a picture in the same order, whose
    `group_column` is the group id (PatchCamelyon's `_meta.csv`, `wsi`). Raises DataError for missing arrays, other
    numbers of rows, labels outside `classes`, and arrays that live in other files.
    """
    if (groups is None) != (group_column is None):
        raise ConfigError("layout.group_column", "and groups belong together", todo="give both or none")
    rows: list[LabelledImage] = []
    content: list[Any] = []
    for part, file in _by_split(images).items():
        path = root / check_path(file, "layout.images")
        label_file = (_by_split(labels).get(part) if labels else None) or file
        shape, count = _check_images(path, image_key), 0
        split = name_split(part, path, splits) if part else None
        targets = _read_labels(root / check_path(label_file, "layout.labels"), label_key, shape[0], kind)
        owners = _read_groups(root, _by_split(groups).get(part) if groups else None, group_column, shape[0])
        content.append([check_path(file, "layout.images"), path.stat().st_size, list(shape)])
        for count, target in enumerate(targets):
            positive, negative = _name(target, classes, kind, f"{path}: row {count}")
            group = owners[count] if owners else None
            rows.append(
                LabelledImage(
                    sample_id=f"{split or path.stem}/{count:07d}",
                    image=ImageRef(path=check_path(file, "layout.images"), part=f"hdf5:{image_key}/{count}"),
                    labels=positive, negatives=negative, split=split,
                    group_id=hash_id(name, group) if group and hash_group else group,
                )
            )  # fmt: skip
    return make_manifest(name, root, rows, kind=kind, classes=classes, content=content)


def read_hdf5_picture(path: Path, rest: str, where: str) -> Image.Image:
    """The picture `<array>/<row>` of an HDF5 file. Raises DataError."""
    key, _, number = rest.rpartition("/")
    array = _array(path, key)
    try:
        picture = np.asarray(array[int(number)])
    except (*_DAMAGED, IndexError) as error:
        raise DataError(where, "cannot be read", found=str(error)[:80], todo="download the file again") from None
    return Image.fromarray(np.squeeze(picture, -1) if picture.shape[-1] == 1 else picture)


def _by_split(files: str | Mapping[str, str] | None) -> Mapping[str | None, str]:
    return {None: files} if isinstance(files, str) else {split: file for split, file in (files or {}).items()}


def _check_images(path: Path, key: str) -> tuple[int, ...]:
    array = _array(path, key)
    shape: tuple[int, ...] = array.shape
    if array.dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[-1] in (1, 3, 4))):
        raise DataError(f"{path}: {key}", "holds no 8-bit grey, RGB or RGBA pictures", found=f"{array.dtype} {shape}",
                        todo="name the right array with layout.image_key")  # fmt: skip
    if shape[0] > MAX_ROWS or shape[1] * shape[2] > MAX_PIXELS:
        raise DataError(f"{path}: {key}", "states a size that no data set has", found=str(shape),
                        todo="download the file again")  # fmt: skip
    return shape


def _read_labels(path: Path, key: str, count: int, kind: LabelKind) -> np.ndarray:
    array = _array(path, key)
    if not array.shape or array.shape[0] != count:
        raise DataError(f"{path}: {key}", f"has not one label for each of {count} pictures", found=str(array.shape),
                        todo="check that labels and images belong together")  # fmt: skip
    if array.dtype.kind not in "iub":
        raise DataError(f"{path}: {key}", "has labels that are no integers", found=str(array.dtype))
    if kind != "multi" and array.size != count:
        raise DataError(f"{path}: {key}", "has several numbers a picture", found=str(array.shape), todo="kind: multi?")
    try:
        return np.asarray(array[()]).reshape(count, -1)
    except _DAMAGED as error:
        raise DataError(f"{path}: {key}", "cannot be read", found=str(error)[:80], todo="download it again") from None


def _read_groups(root: Path, table: str | None, column: str | None, count: int) -> list[str] | None:
    if table is None or column is None:
        return None
    path = root / check_path(table, "layout.groups")
    found = []
    for number, cells in read_cells(path):
        if column not in cells:
            raise DataError(f"{path}: row {number}", f"has no column '{column}'", found=", ".join(cells))
        found.append(cells[column])
    if len(found) != count:
        raise DataError(path, f"has not one row for each of {count} pictures", found=str(len(found)))
    return found


def _name(
    target: np.ndarray, classes: Sequence[str], kind: LabelKind, where: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if kind == "multi":
        if len(target) != len(classes):
            raise DataError(where, f"has not one bit for each of {len(classes)} classes", found=str(len(target)))
        said = list(zip(classes, target, strict=True))
        return tuple(word for word, bit in said if bit), tuple(word for word, bit in said if not bit)
    if not 0 <= int(target[0]) < len(classes):
        raise DataError(where, f"is no index into {len(classes)} classes", found=str(int(target[0])),
                        todo="give all class names, in index order")  # fmt: skip
    return (classes[int(target[0])],), ()


def _array(path: Path, key: str) -> Any:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}", todo="check the layout's files") from None
    return _open_array(str(path), key, (stat.st_mtime_ns, stat.st_size), os.getpid())


@lru_cache(maxsize=8)
def _open_array(path: str, key: str, stamp: tuple[int, int], process: int) -> Any:
    """The array, unread; `process` because HDF5's own state does not survive a fork."""
    try:
        import h5py
    except ImportError:
        raise MissingExtra("build", "h5py") from None
    try:
        file = h5py.File(path, "r", locking=False)  # read only, and some network drives cannot lock
        where = f"{path}: {key}"
        if key not in file:
            raise DataError(path, f"has no array '{key}'", found=", ".join(list(file)[:9]), todo="name one it has")
        if not isinstance(file.get(key, getlink=True), h5py.HardLink):
            raise DataError(where, "is a link to somewhere else", todo="copy the array into the file")
        array = file[key]
        if not isinstance(array, h5py.Dataset):
            raise DataError(where, "is no array", todo="name an array")
        if array.is_virtual or array.external:
            raise DataError(where, "is stored in other files", todo="copy the array into the file")
    except _DAMAGED as error:
        raise DataError(path, "cannot be read as HDF5", found=str(error)[:80], todo="download it again") from None
    return array
