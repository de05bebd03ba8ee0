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
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from biomedclip.errors import ConfigError, DataError, MissingExtra
from biomedclip.images import MAX_PIXELS
from biomedclip.layouts.joined import JoinedLabels
from biomedclip.layouts.manifest import check_path, compile_pattern, hash_id, make_manifest
from biomedclip.layouts.tables import DEFAULT_VALUES, Columns, State
from biomedclip.layouts.volume_files import find_volumes, reading, turn_to_lps
from biomedclip.schema import Drop, ImageRef, LabelKind, LabelledImage, Manifest
from biomedclip.windows import Grey, apply_window, parse_grey, read_grey, scale, write_grey

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Which axis of an L-P-S array a slice goes across."""


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
    for found in find_volumes(start, name, exclude, grey):
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
    with reading(where):
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
    turn = turn_to_lps(affine)
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
    shown = apply_window(plane, *grey.window) if grey.window else scale(plane, *ends)
    picture = Image.fromarray(np.ascontiguousarray(shown))
    smallest = min(column_mm, row_mm)
    if not smallest > 0 or max(column_mm, row_mm) / smallest < 1.01:
        return picture
    size = (round(picture.width * column_mm / smallest), round(picture.height * row_mm / smallest))
    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(where, "has a spacing that makes no picture", found=f"{column_mm:g} x {row_mm:g} mm")
    return picture.resize(size, Image.Resampling.BILINEAR)
