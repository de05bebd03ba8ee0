"""`csv`: a table with one row an image, as csv, tsv, json, json lines or xlsx.

Labels are one column, one column a class (CheXpert's way: 1, 0, -1, empty), several in one cell, or several columns
that each say something else (organ, finding, stain). Rows become `Columns.read`'s facts, which other layouts join to
their own pictures by a key; here the key is the path of the image.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from biomedclip.errors import ConfigError, DataError
from biomedclip.layouts.cells import parse_list, read_cells
from biomedclip.layouts.manifest import check_path, compile_pattern, hash_id, make_manifest, name_split
from biomedclip.layouts.scan import index_names
from biomedclip.schema import Drop, ImageRef, LabelKind, LabelledImage, Manifest

State = Literal["positive", "negative", "uncertain", "unmentioned"]

DEFAULT_VALUES: dict[str, State] = {
    "1": "positive", "1.0": "positive", "0": "negative", "0.0": "negative",
    "-1": "uncertain", "-1.0": "uncertain", "": "unmentioned",
}  # fmt: skip
"""What a cell of a class column says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What the columns of a table mean; the options of the same names in `read_table`."""

    label: str | None = None
    label_columns: Sequence[str] = ()
    label_fields: Sequence[str] = ()
    label_separator: str | None = None
    label_list: bool = False
    values: Mapping[str, State] = field(default_factory=lambda: DEFAULT_VALUES)
    names: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    splits: Mapping[str, str] | None = None
    group: str | None = None
    text: str | None = None
    attributes: Sequence[str] = ()
    filter: Mapping[str, str | Sequence[str]] = field(default_factory=dict)

    def check(self, cells: Mapping[str, str], where: str, *further: str) -> None:
        """Raise DataError where a named column is not there."""
        named = (*further, self.label, self.split, self.group, self.text, *self.label_columns, *self.label_fields,
                 *self.attributes, *self.filter)  # fmt: skip
        for column in named:
            if column and column not in cells:
                raise DataError(where, f"has no column '{column}'", found=", ".join(cells), todo="name a column it has")

    def keeps(self, cells: Mapping[str, str]) -> bool:
        """Whether `filter` keeps the row."""
        wanted = {column: [value] if isinstance(value, str) else value for column, value in self.filter.items()}
        return all(cells[column].strip() in values for column, values in wanted.items())

    def read(self, cells: Mapping[str, str], where: str) -> dict[str, Any]:
        """`labels`, `negatives`, `uncertain`, `split`, `group_id`, `attributes` and `text` of a LabelledImage."""
        return {
            **self._labels(cells, where),
            "split": name_split(cells[self.split], where, self.splits) if self.split else None,
            "group_id": cells[self.group].strip() or None if self.group else None,
            "attributes": {column: cells[column] for column in (*self.label_fields, *self.attributes)},
            "text": cells[self.text] if self.text else None,
        }

    @property
    def kind(self) -> LabelKind:
        """What the label options amount to."""
        if self.label_columns or self.label_separator or self.label_list or self.label_fields:
            return "multi"
        return "single" if self.label else "caption"

    def _labels(self, cells: Mapping[str, str], where: str) -> dict[str, tuple[str, ...]]:
        states: dict[State, list[str]] = {"positive": [], "negative": [], "uncertain": [], "unmentioned": []}
        for column in self.label_columns:
            state = self.values.get(cells[column].strip())
            if state is None:
                known = f"known: {', '.join(map(repr, self.values))}"
                raise DataError(where, f"column '{column}' holds a value that values does not explain",
                                found=repr(cells[column]), todo=known)  # fmt: skip
            states[state].append(self.names.get(column, column))
        for column in self.label_fields:
            # The field is part of the label: `normal` of an organ and of a finding are two things.
            if word := cells[column].strip():
                states["positive"].append(self.names.get(f"{column}={word}", f"{column}={word}"))
        if self.label:
            said = [word for word in self._words(cells[self.label], where) if word]
            states["positive"] += dict.fromkeys(self.names.get(word, word) for word in said)
            if self.kind == "single" and not states["positive"]:
                raise DataError(where, f"has no label in column '{self.label}'", todo="fill it in or remove the row")
        return {
            "labels": tuple(states["positive"]),
            "negatives": tuple(states["negative"]),
            "uncertain": tuple(states["uncertain"]),
        }

    def _words(self, cell: str, where: str) -> Sequence[str]:
        if self.label_list:
            return parse_list(cell, f"{where}, column '{self.label}'")
        return [word.strip() for word in (cell.split(self.label_separator) if self.label_separator else [cell])]


def read_table(
    root: Path,
    name: str,
    *,
    table: str | Mapping[str, str],
    image: str,
    label: str | None = None,
    label_columns: Sequence[str] = (),
    label_fields: Sequence[str] = (),
    label_separator: str | None = None,
    label_list: bool = False,
    values: Mapping[str, State] | None = None,
    names: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    kind: LabelKind | None = None,
    split: str | None = None,
    splits: dict[str, str] | None = None,
    split_lists: Mapping[str, str] | None = None,
    group: str | None = None,
    group_pattern: str | None = None,
    hash_group: bool = False,
    text: str | None = None,
    attributes: Sequence[str] = (),
    folder: str | Mapping[str, str] = "",
    prefix: str = "",
    suffix: str = "",
    find_by_name: bool = False,
    filter: Mapping[str, str | Sequence[str]] | None = None,
    duplicates: Literal["refuse", "drop"] = "refuse",
    columns: Sequence[str] = (),
    encoding: str = "utf-8",
    delimiter: str | None = None,
    sheet: str | None = None,
) -> Manifest:
    """The manifest of a table.

    `table` is the file, or one for each split (`{train: a.csv, test: b.csv}`), and so is `folder`. `image`, `label`,
    `split`, `group`, `text` and `attributes` name columns. Labels are one of: `label`, a column with one label, or
    several of them divided by `label_separator` or written as a list (`label_list`: `['a', 'b']`); `label_columns`,
    one a class, whose cells `values` explains as positive, negative, uncertain or unmentioned (with `kind: single`, a
    row without exactly one positive is dropped); `label_fields`, columns that each say something else, with labels
    `<column>=<cell>`. `names` renames labels (`0` -> normal).
    `folder`, `suffix` complete the image path, `prefix` is taken off it; `find_by_name` looks for the file name in all
    folders below. `group_pattern` is a regular expression whose first group, matched in the group's cell or else the
    path, is the group id; `hash_group` replaces ids of patients by 16 digits. `split_lists` are text files that list
    the images of a split. `filter` keeps rows whose columns hold the given text, or one of several. `duplicates: drop`
    counts further rows of an image that say the same (RSNA: one a box); ones that differ are always an error.
    `columns` names the columns of a table without a header.
    Raises DataError with file and row for a missing column, an unknown value or split, and text in another encoding.
    """
    meaning = Columns(
        label=label, label_columns=label_columns, label_fields=label_fields, label_separator=label_separator,
        label_list=label_list, values=values or DEFAULT_VALUES, names=names or {}, split=split, splits=splits,
        group=group, text=text, attributes=attributes, filter=filter or {},
    )  # fmt: skip
    kind = kind or meaning.kind
    tables = {None: table} if isinstance(table, str) else dict(table)
    places = _Places(root, folder, prefix, suffix, find_by_name)
    listed = _read_lists(root, split_lists or {})
    pattern = compile_pattern(group_pattern, "group_pattern") if group_pattern else None
    rows: dict[str, LabelledImage] = {}
    drops: list[Drop] = []
    sizes: dict[str, int] = {}
    for part, file in tables.items():
        path = root / check_path(file, "layout.table")
        for number, cells in read_cells(path, encoding=encoding, columns=columns, delimiter=delimiter, sheet=sheet):
            where = f"{path}: row {number}"
            meaning.check(cells, where, image)
            if not meaning.keeps(cells):
                continue
            if not cells[image].strip():
                drops.append(Drop(source=name, item=f"{file} row {number}", reason="no_image_named"))
                continue
            relative = places.find(cells[image].strip(), part, where)
            size = file_size(root / relative)
            if size is None:
                drops.append(Drop(source=name, item=relative, reason="missing_file", detail=f"row {number}"))
                continue
            sizes[relative] = size
            facts = meaning.read(cells, where)
            if part is not None:
                facts["split"] = name_split(part, where, splits)
            elif split_lists:
                facts["split"] = listed.get(relative, listed.get(os.path.basename(relative)))
            facts["group_id"] = _group(facts["group_id"], relative, pattern, name, hash_group)
            row = LabelledImage(sample_id=relative, image=ImageRef(path=relative), **facts)
            if kind in ("single", "ordinal") and len(row.labels) != 1:
                drops.append(Drop(source=name, item=relative, reason="not_one_label", detail=f"row {number}"))
            elif relative in rows:
                drops.append(_drop_repeated(name, row, rows[relative], duplicates, where))
            else:
                rows[relative] = row
    if not rows and drops and all(drop.reason in ("missing_file", "no_image_named") for drop in drops):
        raise DataError(root / check_path(next(iter(tables.values())), "layout.table"),
                        f"none of its {len(drops)} images is there", found=f"no {drops[0].item}",
                        todo="check the folder, or the layout's folder and suffix")  # fmt: skip
    return make_manifest(name, root, rows.values(), kind=kind, classes=classes, drops=drops,
                         content=[size for _, size in sorted(sizes.items())])  # fmt: skip


def file_size(path: Path) -> int | None:
    """Bytes of a file; None where there is none, or none can be of that name."""
    try:
        return path.stat().st_size if path.is_file() else None
    except (OSError, ValueError):
        return None


def _drop_repeated(name: str, row: LabelledImage, first: LabelledImage, duplicates: str, where: str) -> Drop:
    if row != first:
        found = f"{', '.join(row.labels)} and {', '.join(first.labels)}"
        raise DataError(where, f"says something else of {row.sample_id} than an earlier row", found=found,
                        todo="remove one of them")  # fmt: skip
    if duplicates == "refuse":
        raise DataError(where, f"lists {row.sample_id} twice", todo="remove the row, or say duplicates: drop")
    return Drop(source=name, item=row.sample_id, reason="duplicate_row", detail=where.rpartition(": ")[2])


def _group(said: str | None, relative: str, pattern: re.Pattern[str] | None, name: str, hashed: bool) -> str | None:
    if pattern:
        found = pattern.search(said if said is not None else relative)
        said = found.group(1) if found else None
    return hash_id(name, said) if hashed and said else said


def _read_lists(root: Path, lists: Mapping[str, str]) -> dict[str, str]:
    """Image -> split, of text files with one image a line."""
    homes: dict[str, str] = {}
    for word, file in lists.items():
        split = name_split(word, "layout.split_lists")
        for number, cells in read_cells(root / check_path(file, "layout.split_lists"), columns=["image"]):
            image = cells["image"].strip()
            if homes.setdefault(image, split) != split:
                raise DataError(f"{root / file}: row {number}", "is in two splits", found=image)
    return homes


class _Places:
    """Where the image of a row lies."""

    def __init__(
        self, root: Path, folder: str | Mapping[str, str], prefix: str, suffix: str, find_by_name: bool
    ) -> None:
        self.folder, self.prefix, self.suffix = folder, prefix, suffix
        self.names: dict[str, list[str]] | None = None
        if find_by_name:
            if not isinstance(folder, str):
                raise ConfigError("layout.folder", "is one a split; find_by_name looks in one")
            self.names = {}
            start = f"{folder.strip('/')}/" if folder else ""
            for base, path in index_names(root / folder):
                self.names.setdefault(base, []).append(start + path)

    def find(self, image: str, part: str | None, where: str) -> str:
        """The path relative to the root, whether or not a file is there."""
        relative = check_path(image.removeprefix(self.prefix) + self.suffix, where)
        if self.names is not None:
            found = self.names.get(os.path.basename(relative), [])
            if len(found) > 1:
                raise DataError(where, "names a file that is in several folders", found=", ".join(found[:3]),
                                todo="write its path, without find_by_name")  # fmt: skip
            return found[0] if found else relative
        folder = self.folder if isinstance(self.folder, str) else self.folder.get(part or "", "")
        return check_path(f"{folder}/{relative}", where) if folder else relative


def read_rows(
    root: Path, table: str, key: str, meaning: Columns, **options: Any
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(where, key's cell, facts) of the rows of a table that other layouts join to their pictures.

    `options` are those of `read_cells`. Raises DataError as `read_table` does.
    """
    path = root / check_path(table, "layout.table")
    for number, cells in read_cells(path, **options):
        where = f"{path}: row {number}"
        meaning.check(cells, where, key)
        if meaning.keeps(cells):
            yield where, cells[key].strip(), meaning.read(cells, where)
