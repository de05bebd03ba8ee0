"""`csv`: a table with one row an image, as csv, tsv or json lines.

Labels are one column, one column a class (CheXpert's way: 1, 0, -1, empty), or several in one cell. Every value is read
as text: a label `1.0` is not `1`, and `NA` is not missing unless `values` says so.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from biomedclip.errors import ConfigError, DataError
from biomedclip.layouts.manifest import check_path, make_manifest, name_split
from biomedclip.schema import Drop, ImageRef, LabelKind, LabelledImage, Manifest

State = Literal["positive", "negative", "uncertain", "unmentioned"]

DEFAULT_VALUES: dict[str, State] = {
    "1": "positive", "1.0": "positive", "0": "negative", "0.0": "negative",
    "-1": "uncertain", "-1.0": "uncertain", "": "unmentioned",
}  # fmt: skip
"""What a cell of a class column says."""


def read_table(
    root: Path,
    name: str,
    *,
    table: str,
    image: str,
    label: str | None = None,
    label_columns: Sequence[str] = (),
    label_separator: str | None = None,
    values: Mapping[str, State] | None = None,
    names: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    kind: LabelKind | None = None,
    split: str | None = None,
    splits: dict[str, str] | None = None,
    group: str | None = None,
    text: str | None = None,
    attributes: Sequence[str] = (),
    folder: str = "",
    suffix: str = "",
    filter: Mapping[str, str] | None = None,
) -> Manifest:
    """The manifest of a table.

    `image`, `label`, `split`, `group`, `text` and `attributes` name columns. `label_columns` are one column a class,
    read through `values`; `label_separator` splits several labels in one cell; `names` renames labels (`0` -> normal).
    `folder` and `suffix` complete the image path. `filter` keeps rows whose columns hold the given text. Raises
    DataError with file and row for a missing column, an unknown value or split, and text that is not UTF-8.
    """
    rows: list[LabelledImage] = []
    drops: list[Drop] = []
    sizes: dict[str, int] = {}
    path = root / check_path(table, "layout.table")
    wanted = [column for column in (image, label, split, group, text, *label_columns, *attributes, *(filter or {}))
              if column]  # fmt: skip
    for number, cells in _read_cells(path):
        where = f"{path}: row {number}"
        if missing := [column for column in wanted if column not in cells]:
            raise DataError(where, f"has no column '{missing[0]}'", found=", ".join(cells), todo="name a column it has")
        if any(cells[column] != value for column, value in (filter or {}).items()):
            continue
        if not cells[image].strip():
            drops.append(Drop(source=name, item=f"{table} row {number}", reason="no_image_named"))
            continue
        relative = check_path(f"{folder}/{cells[image]}{suffix}" if folder else f"{cells[image]}{suffix}", where)
        try:
            sizes[relative] = (root / relative).stat().st_size
        except (OSError, ValueError):
            drops.append(Drop(source=name, item=relative, reason="missing_file", detail=f"row {number}"))
            continue
        said = _read_labels(cells, label, label_columns, label_separator, values or DEFAULT_VALUES, names or {}, where)
        rows.append(
            LabelledImage(
                sample_id=relative, image=ImageRef(path=relative), **said,
                split=name_split(cells[split], where, splits) if split else None,
                group_id=cells[group] or None if group else None,
                attributes={column: cells[column] for column in attributes},
                text=cells[text] if text else None,
            )
        )  # fmt: skip
    if not rows and drops:
        raise DataError(path, f"none of its {len(drops)} images is there", found=f"no {drops[0].item}",
                        todo="check the folder, or the layout's folder and suffix")  # fmt: skip
    many = bool(label_columns or label_separator)
    inferred: LabelKind = "multi" if many else ("single" if label else "caption")
    return make_manifest(name, root, rows, kind=kind or inferred, classes=classes, drops=drops,
                         content=[size for _, size in sorted(sizes.items())])  # fmt: skip


def _read_labels(
    cells: Mapping[str, str],
    label: str | None,
    columns: Sequence[str],
    separator: str | None,
    values: Mapping[str, State],
    names: Mapping[str, str],
    where: str,
) -> dict[str, tuple[str, ...]]:
    """`labels`, `negatives` and `uncertain` of one row."""
    states: dict[State, list[str]] = {"positive": [], "negative": [], "uncertain": [], "unmentioned": []}
    for column in columns:
        state = values.get(cells[column].strip())
        if state is None:
            raise DataError(where, f"column '{column}' holds a value that values does not explain",
                            found=repr(cells[column]), todo=f"known: {', '.join(map(repr, values))}")  # fmt: skip
        states[state].append(names.get(column, column))
    if label:
        spoken = cells[label].split(separator) if separator else [cells[label]]
        states["positive"] += [names.get(word.strip(), word.strip()) for word in spoken if word.strip()]
        if not separator and not states["positive"]:
            raise DataError(where, f"has no label in column '{label}'", todo="fill it in or remove the row")
    return {
        "labels": tuple(states["positive"]),
        "negatives": tuple(states["negative"]),
        "uncertain": tuple(states["uncertain"]),
    }


def _read_cells(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(row number as an editor shows it, column -> text) of a csv, tsv or jsonl file."""
    try:
        data = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(path, "there is no such table", todo="check the layout's `table`") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: row {line}", "is not UTF-8", found=f"byte {error.object[error.start]:#x}",
                        todo="save the table as UTF-8") from None  # fmt: skip
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        yield from _read_jsonl(data, path)
        return
    if suffix not in (".csv", ".tsv", ".txt"):
        raise ConfigError("layout.table", "is not csv, tsv or jsonl", found=path.name)
    reader = csv.DictReader(io.StringIO(data, newline=""), delimiter="\t" if suffix == ".tsv" else ",", strict=True)
    try:
        yield from _check_cells(reader, path)
    except csv.Error as error:
        # Strict: an unclosed quote would otherwise swallow the rest of the table into one cell.
        raise DataError(f"{path}: row {reader.line_num}", f"is not csv: {error}", todo="mend the row") from None


def _check_cells(reader: csv.DictReader[str], path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    columns = reader.fieldnames or []
    if len(set(columns)) < len(columns):
        raise DataError(path, "names a column twice", found=", ".join(columns), todo="rename one of them")
    for cells in reader:
        if any("\0" in text for text in cells.values() if isinstance(text, str)):
            raise DataError(f"{path}: row {reader.line_num}", "holds a NUL byte", todo="save the table as text")
        if None in cells or None in cells.values():
            raise DataError(f"{path}: row {reader.line_num}", f"has not {len(columns)} cells", todo="mend the row")
        yield reader.line_num, cells


def _read_jsonl(data: str, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(data.split("\n"), 1):  # not splitlines: JSON text may hold U+2028 as it is
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: row {number}", f"is not JSON: {error}", todo="mend the row") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}: row {number}", "is not an object", found=type(record).__name__)
        yield number, {str(key): "" if value is None else str(value) for key, value in record.items()}
