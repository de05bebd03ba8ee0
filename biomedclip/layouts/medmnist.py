"""`medmnist_npz`: one .npz with `<split>_images` and `<split>_labels`, as MedMNIST publishes its sets.

Never unpickles: an object array is refused, because loading one runs code. Labels are class indices, so the class
names have to be given in index order (BreastMNIST's 0 is malignant: order is a fact, not a guess).
"""

from __future__ import annotations

import struct
import tokenize
import warnings
import zipfile
import zlib
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
    content = check_archive(path)
    rows: list[LabelledImage] = []
    for split in splits:
        images, labels = (read_array(str(path), f"{split}_{part}") for part in ("images", "labels"))
        _check_arrays(images, labels, f"{path}: {split}")
        if len(images) != len(labels):
            raise DataError(f"{path}: {split}", "has other numbers of images and labels",
                            found=f"{len(images)} and {len(labels)}", todo="download the file again")  # fmt: skip
        for number, label in enumerate(np.asarray(labels).reshape(len(labels), -1)):
            said, denied = _read_label(label, classes, kind, f"{path}: {split} row {number}")
            image = ImageRef(path=path.name, part=f"{split}/{number}")
            sample_id = f"{split}/{number:06d}"
            rows.append(LabelledImage(sample_id=sample_id, image=image, labels=said, negatives=denied, split=split))
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


def check_archive(path: Path) -> list[list[object]]:
    """Name, size and CRC-32 of every array, from the archive's list. Raises DataError for a file that is no .npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [[info.filename, info.file_size, info.CRC] for info in archive.infolist()]
    except (OSError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile) as error:
        raise DataError(path, "cannot be read as .npz", found=str(error)[:80], todo="download it again") from None


def _check_arrays(images: np.ndarray, labels: np.ndarray, where: str) -> None:
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (3, 4))):
        raise DataError(where, "has images that are not 8-bit grey, RGB or RGBA pictures",
                        found=f"{images.dtype} {images.shape}", todo="volumes need the volume layout")  # fmt: skip
    if labels.dtype.kind not in "iub":
        raise DataError(where, "has labels that are no integers", found=str(labels.dtype), todo="write class indices")


def read_array(path: str, key: str) -> np.ndarray:
    """One array of an .npz, kept in memory. Raises DataError where it is missing, corrupt or pickled."""
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from None
    return _load_array(path, key, (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=8)
def _load_array(path: str, key: str, stamp: tuple[int, int]) -> np.ndarray:
    """The array; `stamp` makes a file that was replaced a different one."""
    member = f"{key}.npy"
    try:
        with zipfile.ZipFile(path) as archive:
            if member not in archive.namelist():
                names = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
                raise DataError(path, f"has no array '{key}'", found=names,
                                todo="check that this is a MedMNIST file")  # fmt: skip
            with archive.open(member) as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numpy warns of headers it has to mend; the checksum decides
                array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
                file.read()  # to the end, because that is where zipfile compares the checksum
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        # RuntimeError: encrypted, or compressed in a way zipfile does not know.
        raise DataError(f"{path}: {key}", "cannot be read", found=str(error)[:80], todo="download it again") from None
    except (ValueError, SyntaxError, tokenize.TokenError) as error:
        raise DataError(f"{path}: {key}", "is not a plain array", found=str(error)[:60],
                        todo="a pickled array is never loaded; save it as numbers") from None  # fmt: skip
    except MemoryError as error:
        raise DataError(f"{path}: {key}", "does not fit into memory", found=str(error)[:80],
                        todo="if the size is absurd, the file is damaged: download it again") from None  # fmt: skip
    array.setflags(write=False)
    return array
