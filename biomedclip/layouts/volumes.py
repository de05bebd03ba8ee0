"""`volumes`: CT and MR volumes (NIfTI files, folders of one DICOM series) to slices or montages of slices.

Scanning reads headers alone; MONAI, and torch with it, is imported when the first volume is read. Volumes are turned to
L-P-S order and shown as radiology does: patient's right on the left of the picture, front or head up, and pixels square
by the spacing the file states. Grey becomes 8 bits by the window in HU or by percentiles of the whole volume, one of
which must be asked for, because a NIfTI file carries no window. The reference says all of it
(`volume:axial/40;window=40,400`), so that equal rows are equal pixels.
"""

from __future__ import annotations

import math
import os
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from biomedclip.dicom import Grey, apply_window, parse_grey, read_facts, read_header
from biomedclip.errors import ConfigError, DataError, MissingExtra
from biomedclip.images import MAX_PIXELS, BadImage
from biomedclip.layouts.dicoms import read_grey, write_grey
from biomedclip.layouts.joined import JoinedLabels
from biomedclip.layouts.manifest import check_path, compile_pattern, hash_id, make_manifest
from biomedclip.layouts.scan import MASK_MARKS, Found, refuse_file, walk_files
from biomedclip.layouts.tables import DEFAULT_VALUES, Columns, State
from biomedclip.schema import Drop, ImageRef, LabelKind, LabelledImage, Manifest

MAX_VOXELS = 1 << 29
"""Larger volumes are refused before they are read; a CT of the whole body has 4e8."""

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Which axis of an L-P-S array a slice goes across."""


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


def read_volumes(
    root: Path,
    name: str,
    *,
    folder: str = "",
    exclude: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    kind: LabelKind | None = None,
    pattern: str | None = None,
    table: str | None = None,
    key: str | None = None,
    match: Literal["path", "stem", "series", "study", "patient"] = "stem",
    label: str | None = None,
    label_columns: Sequence[str] = (),
    label_fields: Sequence[str] = (),
    label_separator: str | None = None,
    label_list: bool = False,
    values: Mapping[str, State] | None = None,
    names: Mapping[str, str] | None = None,
    split: str | None = None,
    splits: dict[str, str] | None = None,
    text: str | None = None,
    attributes: Sequence[str] = (),
    filter: Mapping[str, str | Sequence[str]] | None = None,
    duplicates: Literal["refuse", "drop"] = "refuse",
    encoding: str = "utf-8",
    window_hu: str | Sequence[float] | None = None,
    percentile: Sequence[float] | None = None,
    axis: Literal["axial", "coronal", "sagittal"] = "axial",
    slices: int | None = None,
    step: int | None = None,
    range: Sequence[float] = (0.0, 1.0),
    montage: Sequence[int] | None = None,
    group_pattern: str | None = None,
) -> Manifest:
    """The manifest of volumes, one row a slice, or one a volume with `montage`.

    Labels come from `pattern` (over the path) or from `table` and `key`, as in layout `dicom_folder`; `stem` is the
    name without `.nii.gz`, or that of the series' folder. One of `window_hu` (a preset or [centre, width]; the values
    must be HU, which of a DICOM series is checked) and `percentile` is needed. Of the slices across `axis`, within
    `range` (fractions of its length), `slices` evenly spaced ones are taken, or each `step`-th, or all; `montage`
    [rows, columns] puts that many evenly spaced ones into one picture. The slices of a volume are one group, or those
    of a patient where the DICOM file or `group_pattern` (first group, in the path; hashed) names one. Segmentations
    have to be excluded; several series in a folder, missing slices, volumes over time and volumes too large are
    counted as drops. Raises DataError and ConfigError as layout `dicom_folder` does.
    """
    grey = _check_options(window_hu, percentile, slices, step, range, montage)
    meaning = Columns(
        label=label, label_columns=label_columns, label_fields=label_fields, label_separator=label_separator,
        label_list=label_list, values=values or DEFAULT_VALUES, names=names or {}, split=split, splits=splits,
        text=text, attributes=attributes, filter=filter or {},
    )  # fmt: skip
    start = root / check_path(folder, "layout.folder") if folder else root
    labels = JoinedLabels(root, name, meaning, pattern=pattern, table=table, key=key, duplicates=duplicates,
                          encoding=encoding)  # fmt: skip
    owners = compile_pattern(group_pattern, "group_pattern") if group_pattern else None
    drops: list[Drop] = []
    rows: list[LabelledImage] = []
    sizes: list[int] = []
    for found in _find_volumes(start, name, exclude, grey):
        if isinstance(found, Drop):
            drops.append(found)
            continue
        said = labels.find(found.path, {"path": found.path, "stem": found.stem, **found.ids}.get(match, ""))
        if found.refused or said is None:
            drops.append(Drop(source=name, item=found.item, reason=found.refused or labels.reason))
            continue
        group = owners.search(found.path) if owners else None
        owner = (
            group.group(1) if group else f"patient {found.ids['patient']}" if found.ids.get("patient") else found.item
        )
        length = found.shape[AXES[axis]]
        pictures = _choose(length, slices, step, range, montage)
        for cuts in pictures:
            tag = "montage" if montage else f"{cuts[0]:04d}"
            grid = f"@{montage[0]}x{montage[1]}" if montage else ""
            rows.append(
                LabelledImage(
                    **{**said, "group_id": hash_id(name, owner)},
                    sample_id=f"{found.item}/{axis}/{tag}",
                    image=ImageRef(
                        path=found.path,
                        part=f"volume:{axis}/{','.join(map(str, cuts))}{grid}{write_grey(grey)}",
                    ),
                )
            )
        sizes.append(found.size)
    return make_manifest(name, start, rows, kind=kind or labels.kind, classes=classes, drops=[*drops, *labels.drops()],
                         content=sizes)  # fmt: skip


def read_volume_picture(path: Path, rest: str, where: str) -> Image.Image:
    """The slice `<axis>/<number>` of a volume, or the montage `<axis>/<numbers>@<rows>x<columns>`, as 8-bit grey.

    Raises DataError, and MissingExtra where MONAI is not installed.
    """
    spec, *options = rest.split(";")
    axis, _, said = spec.partition("/")
    numbers, _, grid = said.partition("@")
    grey = read_grey(options)
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.is_file())
    try:
        stamp = tuple((p.stat().st_mtime_ns, p.stat().st_size) for p in files)
    except OSError as error:
        raise DataError(where, f"cannot be read: {error.strerror}") from None
    if not files:
        raise DataError(where, "cannot be read: there is no such volume")
    with _reading(where):
        values, spacing, ends = _load_volume(str(path), stamp, grey.percentile)
        cuts = [_cut(values, spacing, axis, int(number), grey, ends, where) for number in numbers.split(",")]
    if not grid:
        return cuts[0]
    rows, columns = map(int, grid.split("x"))
    width, height = cuts[0].size
    sheet = Image.new("L", (width * columns, height * rows))
    for number, cut in enumerate(cuts):
        sheet.paste(cut, (number % columns * width, number // columns * height))
    return sheet


def _check_options(
    window_hu: str | Sequence[float] | None,
    percentile: Sequence[float] | None,
    slices: int | None,
    step: int | None,
    span: Sequence[float],
    montage: Sequence[int] | None,
) -> Grey:
    grey = parse_grey(window_hu, percentile)
    if (grey.window is None) == (grey.percentile is None):
        raise ConfigError("layout.window_hu", "or else percentile says how a volume becomes 8 bits",
                          todo="window_hu: abdomen for CT, percentile: [0.5, 99.5] for MR")  # fmt: skip
    if len(span) != 2 or not 0 <= span[0] < span[1] <= 1:
        raise ConfigError("layout.range", "is no part of an axis", found=str(list(span)), todo="[0.2, 0.8]")
    if sum(option is not None for option in (slices, step, montage)) > 1:
        raise ConfigError("layout.slices", "step and montage exclude each other", todo="give one of them")
    wanted = (slices, step, *(montage or ()))
    if any(number is not None and number < 1 for number in wanted) or (montage and len(montage) != 2):
        raise ConfigError("layout.slices", "step or montage is out of range", found=str(wanted), todo="from 1")
    return grey


def _choose(
    length: int, slices: int | None, step: int | None, span: Sequence[float], montage: Sequence[int] | None
) -> list[list[int]]:
    """The slices of each picture."""
    first, last = math.floor(span[0] * length), max(math.ceil(span[1] * length), math.floor(span[0] * length) + 1)
    count = montage[0] * montage[1] if montage else slices
    if count is None:
        return [[number] for number in range(first, last, step or 1)]
    spread = [first + (2 * i + 1) * (last - first) // (2 * count) for i in range(count)]
    return [spread] if montage else [[number] for number in dict.fromkeys(spread)]


def _find_volumes(start: Path, name: str, exclude: Sequence[str], grey: Grey) -> Iterator[Volume | Drop]:
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
    refused, shape = None, (0, 0, 0)
    try:
        with _reading(found.path):
            import nibabel

            image: Any = nibabel.load(start / found.path)
            dims = tuple(int(side) for side in image.shape)
            while len(dims) > 3 and dims[-1] == 1:
                dims = dims[:-1]
            if len(dims) != 3 or image.get_data_dtype().fields:
                refused = "not_three_dimensional" if len(dims) != 3 else "not_grey"
            elif math.prod(dims) > MAX_VOXELS or min(dims) < 1:
                refused = "volume_bomb"
            else:
                shape = _turn_shape(dims, image.affine)
    except DataError:
        refused = "broken_volume"
    return Volume(found.path, stem, os.path.basename(stem), found.size, shape, {}, refused)


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
    turn = _turn(affine)
    sides = [0, 0, 0]
    for side, (to, _) in zip(dims, turn, strict=True):
        sides[int(to)] = side
    return sides[0], sides[1], sides[2]


def _turn(affine: np.ndarray) -> np.ndarray:
    """How an array's axes become L, P, S. Raises ValueError for an affine that says no directions."""
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    if not np.isfinite(affine).all():
        raise ValueError("the affine is not finite")
    directions = io_orientation(affine)
    if np.isnan(directions).any():
        raise ValueError("the affine drops an axis")
    return np.asarray(ornt_transform(directions, axcodes2ornt("LPS")))


@lru_cache(maxsize=2)
def _load_volume(
    path: str, stamp: tuple[tuple[int, int], ...], percentile: tuple[float, float] | None
) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Values in L-P-S order, spacing in mm, and the values that become black and white; the slices of a volume are
    read one after another, so two volumes are enough to keep."""
    try:
        from monai.data.image_reader import NibabelReader, PydicomReader
    except ImportError:
        raise MissingExtra("train", "monai") from None
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import apply_orientation, inv_ornt_aff

    reader = PydicomReader() if os.path.isdir(path) else NibabelReader()
    values, facts = reader.get_data(reader.read(path))
    values, affine = np.asarray(values), np.asarray(facts["affine"], dtype=np.float64)
    values = values.reshape(values.shape[:3])
    if values.dtype.itemsize > 4:
        values = values.astype(np.float32)
    turn = _turn(affine)
    spacing = voxel_sizes(affine @ inv_ornt_aff(turn, values.shape))
    turned = np.nan_to_num(apply_orientation(values, turn), copy=False)
    low, high = 0.0, 0.0
    if percentile:
        sampled = turned.reshape(-1)[:: max(1, turned.size // 2_000_000)]
        low, high = (float(value) for value in np.percentile(sampled, percentile))
    return turned, spacing, (low, high)


def _cut(
    values: np.ndarray, spacing: np.ndarray, axis: str, number: int, grey: Grey, ends: tuple[float, float], where: str
) -> Image.Image:
    across = AXES[axis]
    if not 0 <= number < values.shape[across]:
        raise DataError(where, f"has no slice {number}", found=f"{values.shape[across]} slices", todo="scan it again")
    plane = np.take(values, number, axis=across).T
    column_mm, row_mm = np.delete(spacing, across)
    if axis != "axial":
        plane = plane[::-1]  # S grows upwards, rows downwards
    if grey.window:
        shown = apply_window(plane, *grey.window)
    else:
        low, high = ends
        span = high - low if high > low else 1.0
        shown = np.rint(np.clip((plane.astype(np.float64) - low) / span, 0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(shown))
    smallest = min(column_mm, row_mm)
    if not smallest > 0 or max(column_mm, row_mm) / smallest < 1.01:
        return picture
    size = (round(picture.width * column_mm / smallest), round(picture.height * row_mm / smallest))
    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(where, "has a spacing that makes no picture", found=f"{column_mm:g} x {row_mm:g} mm")
    return picture.resize(size, Image.Resampling.BILINEAR)


@contextmanager
def _reading(where: str) -> Iterator[None]:
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
