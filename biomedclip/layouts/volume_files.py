"""The volumes of a folder, by their headers: NIfTI files and folders of one DICOM series.

Says what each is called, its shape in L-P-S order and why it may not be used; nothing is decoded and nothing of torch
is imported. A series has to be whole: what is missing between two slices would be a jump in every other plane.
"""

from __future__ import annotations

import math
import os
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from biomedclip.dicom import read_facts, read_header
from biomedclip.errors import DataError, MissingExtra
from biomedclip.images import BadImage
from biomedclip.layouts.manifest import hash_id
from biomedclip.layouts.scan import MASK_MARKS, Found, refuse_file, walk_files
from biomedclip.schema import Drop
from biomedclip.windows import Grey

MAX_VOXELS = 1 << 29
"""Larger volumes are refused before they are read; a CT of the whole body has 4e8."""


class Volume(NamedTuple):
    """One volume that was found, by its headers."""

    path: str
    """Of the NIfTI file, or the folder of the series."""
    item: str
    """What it is called in sample ids: a hash for DICOM, whose folders are called like patients."""
    stem: str
    size: int
    shape: tuple[int, int, int]
    """In L-P-S order."""
    ids: Mapping[str, str]
    """Series, study and patient id of a series; they are for joining and grouping, hashed."""
    refused: str | None


def find_volumes(start: Path, name: str, exclude: Sequence[str], grey: Grey) -> Iterator[Volume | Drop]:
    """NIfTI files and folders of DICOM files, in order; every other file is a drop."""
    others = []
    for found in walk_files(start):
        if not found.path.lower().endswith((".nii", ".nii.gz")):
            others.append(found)
        elif reason := refuse_file(found, exclude, None):
            yield Drop(source=name, item=found.path, reason=reason)
        else:
            yield _read_nifti(start, found)
    for parent, files in groupby(sorted(others, key=lambda f: (os.path.dirname(f.path), f.path)),
                                 key=lambda f: os.path.dirname(f.path)):  # fmt: skip
        yield from _read_series(start, parent, list(files), name, exclude, grey)


def _read_nifti(start: Path, found: Found) -> Volume:
    stem = re.sub(r"\.nii(\.gz)?$", "", found.path, flags=re.IGNORECASE)
    for mark in MASK_MARKS:
        if stem.lower().endswith(mark):
            raise DataError(f"{start}: {found.path}", "seems to be a segmentation", found=f"'{mark}' in its name",
                            todo=f"exclude: ['*{mark}.nii*']")  # fmt: skip
    shape, refused = read_nifti_shape(start / found.path)
    return Volume(found.path, stem, os.path.basename(stem), found.size, shape, {}, refused)


def read_nifti_shape(path: Path) -> tuple[tuple[int, int, int], str | None]:
    """Shape in L-P-S order by a NIfTI file's header, and why it may not be used: `not_three_dimensional`, `not_grey`,
    `volume_bomb` or `broken_volume`."""
    try:
        with reading(str(path)):
            import nibabel

            image: Any = nibabel.load(path)
            dims = tuple(int(side) for side in image.shape)
            while len(dims) > 3 and dims[-1] == 1:
                dims = dims[:-1]
            if len(dims) != 3 or image.get_data_dtype().fields:
                return (0, 0, 0), "not_three_dimensional" if len(dims) != 3 else "not_grey"
            if math.prod(dims) > MAX_VOXELS or min(dims) < 1:
                return (0, 0, 0), "volume_bomb"
            return _turn_shape(dims, image.affine), None
    except DataError:
        return (0, 0, 0), "broken_volume"


def _read_series(
    start: Path, parent: str, files: Sequence[Found], name: str, exclude: Sequence[str], grey: Grey
) -> Iterator[Volume | Drop]:
    item, slices, facts = hash_id(name, parent), [], []
    for found in files:
        reason = refuse_file(found, exclude, None)
        try:
            if reason is None:
                # A volume's window is asked for, so that a slice without one of its own is no reason to refuse it.
                facts.append(read_facts(start / found.path, Grey(window=grey.window, percentile=(0, 100))))
                slices.append(read_header(start / found.path)[0])
        except BadImage as error:
            reason = error.reason
        if reason:
            yield Drop(source=name, item=hash_id(name, found.path), reason=reason)
    if not slices:
        return
    refused = next((fact.refused for fact in facts if fact.refused), None)
    if len({fact.series_uid for fact in facts}) > 1:
        refused = "several_series"
    shape = (0, 0, 0)
    if refused is None:
        refused, shape = _check_series(slices)
    ids = {"series": facts[0].series_uid, "study": facts[0].study_uid, "patient": facts[0].patient_id}
    size = sum(found.size for found in files)
    yield Volume(parent or ".", item, os.path.basename(parent), size, shape, ids, refused)


def _check_series(slices: Sequence[Any]) -> tuple[str | None, tuple[int, int, int]]:
    """Why the slices make no volume, and its shape. MONAI stacks them by instance number; that this is their order in
    space, evenly spaced, is checked here, because a missing slice would be a jump in the picture."""
    try:
        ordered = sorted(slices, key=lambda ds: int(ds.InstanceNumber))
        cosines = np.array([[float(v) for v in ds.ImageOrientationPatient] for ds in ordered])
        positions = np.array([[float(v) for v in ds.ImagePositionPatient] for ds in ordered])
        sides = {(int(ds.Rows), int(ds.Columns), *(float(v) for v in ds.PixelSpacing)) for ds in ordered}
    except (AttributeError, TypeError, ValueError):
        return "no_geometry", (0, 0, 0)
    if len(ordered) < 2:
        return "single_slice", (0, 0, 0)
    if len(sides) > 1 or cosines.shape[1:] != (6,) or np.abs(cosines - cosines[0]).max() > 1e-3:
        return "uneven_slices", (0, 0, 0)
    normal = np.cross(cosines[0][:3], cosines[0][3:])
    gaps = np.diff(positions @ normal)
    if np.abs(gaps).min() < 1e-3 or np.abs(gaps - np.median(gaps)).max() > max(0.1 * abs(float(np.median(gaps))), 0.05):
        return "missing_slices", (0, 0, 0)
    rows, columns = next(iter(sides))[:2]
    dims = (int(columns), int(rows), len(ordered))
    if math.prod(dims) > MAX_VOXELS:
        return "volume_bomb", (0, 0, 0)
    # DICOM's axes are L, P, S; the columns of the affine are the directions of the array's axes in R, A, S.
    affine = np.eye(4)
    affine[:3, :3] = np.stack([cosines[0][:3], cosines[0][3:], normal * np.sign(gaps[0])], 1) * [[-1], [-1], [1]]
    return None, _turn_shape(dims, affine)


def _turn_shape(dims: Sequence[int], affine: np.ndarray) -> tuple[int, int, int]:
    turn = turn_to_lps(affine)
    sides = [0, 0, 0]
    for side, (to, _) in zip(dims, turn, strict=True):
        sides[int(to)] = side
    return sides[0], sides[1], sides[2]


def turn_to_lps(affine: np.ndarray) -> np.ndarray:
    """How an array's axes become L, P, S. Raises ValueError for an affine that says no directions."""
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    if not np.isfinite(affine).all():
        raise ValueError("the affine is not finite")
    directions = io_orientation(affine)
    if np.isnan(directions).any():
        raise ValueError("the affine drops an axis")
    return np.asarray(ornt_transform(directions, axcodes2ornt("LPS")))


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what nibabel, MONAI and pydicom raise for a damaged volume into one DataError, warnings kept quiet."""
    try:
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
    except ImportError:
        raise MissingExtra("train", "nibabel") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (OSError, ValueError, TypeError, LookupError, AttributeError, EOFError, MemoryError, ArithmeticError,
            RuntimeError, zlib.error, ImageFileError, HeaderDataError) as error:  # fmt: skip
        raise DataError(where, "cannot be read as a volume", found=str(error).split("\n")[0][:80],
                        todo="get the file again") from None  # fmt: skip
