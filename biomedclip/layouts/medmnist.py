"""`medmnist_npz`: one .npz with `<split>_images` and `<split>_labels`, as MedMNIST publishes its sets.

Never unpickles: an object array is refused, because loading one runs code. Labels are class indices, so the class
names have to be given in index order (BreastMNIST's 0 is malignant: order is a fact, not a guess).
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from biomedclip.errors import DataError
from biomedclip.layouts.manifest import make_manifest
from biomedclip.schema import SPLITS, ImageRef, LabelKind, LabelledImage, Manifest


def read_medmnist(
    root: Path,
    name: str,
    *,
    classes: Sequence[str],
    file: str | None = None,
    kind: LabelKind = "single",
    splits: Sequence[str] = SPLITS,
) -> Manifest:
    """The manifest of a MedMNIST file.

    `root` is the file, or its folder with `file` as its name (default `<name>.npz`, else the only .npz there is).
    `classes` are names in index order; `kind` multi reads the label rows as one bit a class. Raises DataError for a
    corrupt file, missing arrays, pickled arrays, and labels outside the classes.
    """
    path = find_file(root, name, file)
    rows: list[LabelledImage] = []
    for split in splits:
        images, labels = (read_array(str(path), f"{split}_{part}") for part in ("images", "labels"))
        if len(images) != len(labels):
            raise DataError(f"{path}: {split}", "has other numbers of images and labels",
                            found=f"{len(images)} and {len(labels)}", todo="download the file again")  # fmt: skip
        for number, label in enumerate(np.asarray(labels).reshape(len(labels), -1)):
            said, denied = _read_label(label, classes, kind, f"{path}: {split} row {number}")
            image = ImageRef(path=path.name, part=f"{split}/{number}")
            sample_id = f"{split}/{number:06d}"
            rows.append(LabelledImage(sample_id=sample_id, image=image, labels=said, negatives=denied, split=split))
    return make_manifest(name, path.parent, rows, kind=kind, classes=classes)


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


@lru_cache(maxsize=8)
def read_array(path: str, key: str) -> np.ndarray:
    """One array of an .npz, kept in memory. Raises DataError where it is missing, corrupt or pickled."""
    try:
        # np.load leaks the file where the zip is broken, unless the file is ours.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            if key not in archive.files:
                raise DataError(path, f"has no array '{key}'", found=", ".join(archive.files),
                                todo="check that this is a MedMNIST file")  # fmt: skip
            array: np.ndarray = archive[key]
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(path, "cannot be read as .npz", found=str(error)[:80], todo="download it again") from None
    except ValueError as error:
        raise DataError(f"{path}: {key}", "is not a plain array", found=str(error)[:60],
                        todo="a pickled array is never loaded; save it as numbers") from None  # fmt: skip
    array.setflags(write=False)
    return array
