"""A table file to rows of text: csv, tsv, json lines, json and xlsx, gzipped or not.

Yields `(row number as an editor shows it, column -> text)`. Every value is text: `1.0` is not `1`, and `NA` is not
missing. A table is read strictly, because one that is read leniently swallows rows: an unclosed quote, a row that is a
cell short or a byte of another encoding is an error with its row.
"""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from biomedclip.errors import ConfigError, DataError, MissingExtra

MAX_TABLE_BYTES = 1 << 30
"""Larger tables, or ones that decompress to more, are refused: the largest of a public set is near 100 MB."""

_TABLES = (".csv", ".tsv", ".txt", ".jsonl", ".json", ".xlsx")


def read_cells(
    path: Path,
    *,
    encoding: str = "utf-8",
    columns: Sequence[str] = (),
    delimiter: str | None = None,
    sheet: str | None = None,
) -> Iterator[tuple[int, dict[str, str]]]:
    """(row number, column -> text) of each row of a table.

    `columns` names the columns of a table without a header; `delimiter` replaces the comma or tab that the suffix
    says; `sheet` is the sheet of an xlsx (default: its only one). Raises DataError with file and row, ConfigError for
    a file of another kind.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if packed else suffixes)[-1:]
    if not suffix or suffix[0] not in _TABLES:
        raise ConfigError("layout.table", f"is none of {', '.join(_TABLES)}", found=path.name)
    if not path.is_file():
        raise DataError(path, "there is no such table", todo="check the layout's `table`")
    if suffix == [".xlsx"]:
        yield from _read_sheet(path, columns, sheet)
        return
    text = _decode(_read_file(path, packed), path, encoding)
    if suffix == [".jsonl"]:
        yield from _read_json_lines(text, path)
    elif suffix == [".json"]:
        yield from _read_json(text, path)
    else:
        yield from _read_csv(text, path, columns, delimiter or ("\t" if suffix == [".tsv"] else ","))


def parse_list(text: str, where: str) -> tuple[str, ...]:
    """The words of a list that was written into a cell as Python or JSON writes it; an empty cell is an empty list.

    Nothing is run: only literals are understood. Raises DataError for anything but a flat list of words or numbers.
    """
    if not text.strip():
        return ()
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list | tuple) or not all(isinstance(word, str | int | float) for word in found):
        raise DataError(where, "is not a list of words", found=repr(text[:60]), todo="write ['a', 'b']")
    return tuple(str(word).strip() for word in found)


def _read_file(path: Path, packed: bool) -> bytes:
    try:
        if not packed:
            if path.stat().st_size > MAX_TABLE_BYTES:
                raise DataError(path, f"is a table of more than {MAX_TABLE_BYTES >> 20} MiB", todo="split it")
            return path.read_bytes()
        with gzip.open(path) as file:
            data = file.read(MAX_TABLE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(path, "cannot be read", found=str(error)[:80], todo="get the file again") from None
    if len(data) > MAX_TABLE_BYTES:
        raise DataError(path, f"unpacks to more than {MAX_TABLE_BYTES >> 20} MiB", todo="check that it is a table")
    return data


def _decode(data: bytes, path: Path, encoding: str) -> str:
    plain = encoding.lower() in ("utf-8", "utf8")
    try:
        return data.decode("utf-8-sig" if plain else encoding)  # Excel begins its UTF-8 with a mark
    except LookupError:
        raise ConfigError("layout.encoding", "is no encoding", found=repr(encoding), todo="such as cp1252") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        name = "UTF-8" if plain else encoding
        todo = f"save the table as {name}, or say `encoding` (cp1252 is Excel's in Europe)"
        found = f"byte {data[error.start]:#x}"
        raise DataError(f"{path}: row {line}", f"is not {name}", found=found, todo=todo) from None


def _read_csv(text: str, path: Path, columns: Sequence[str], delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    if len(delimiter) != 1:
        raise ConfigError("layout.delimiter", "is not one character", found=repr(delimiter))
    lines = io.StringIO(text, newline="")
    reader = csv.DictReader(lines, list(columns) or None, delimiter=delimiter, strict=True)
    try:
        _check_names(reader.fieldnames or [], path)
        for cells in reader:
            if any("\0" in cell for cell in cells.values() if isinstance(cell, str)):
                raise DataError(f"{path}: row {reader.line_num}", "holds a NUL byte", todo="save the table as text")
            if None in cells or None in cells.values():
                raise DataError(f"{path}: row {reader.line_num}", f"has not {len(reader.fieldnames or [])} cells",
                                todo="mend the row")  # fmt: skip
            yield reader.line_num, cells
    except csv.Error as error:
        # Strict: an unclosed quote would otherwise swallow the rest of the table into one cell.
        raise DataError(f"{path}: row {reader.line_num}", f"is not csv: {error}", todo="mend the row") from None


def _check_names(columns: Sequence[str], path: Path) -> None:
    named = [column for column in columns if column.strip()]  # spreadsheets leave columns without name or content
    if len(set(named)) < len(named):
        raise DataError(path, "names a column twice", found=", ".join(columns), todo="rename one of them")


def _read_json_lines(text: str, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON text may hold U+2028 as it is
        if line.strip():
            yield number, _texts(load_json(line, f"{path}: row {number}"), f"{path}: row {number}")


def _read_json(text: str, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """A list of records, or records by number or by image (then in column `key`)."""
    found = load_json(text, str(path))
    if isinstance(found, dict):
        found = [{"key": key, **value} if isinstance(value, dict) else None for key, value in found.items()]
    if not isinstance(found, list):
        raise DataError(path, "is no list of records", found=type(found).__name__)
    for number, record in enumerate(found, 1):
        yield number, _texts(record, f"{path}: record {number}")


def load_json(text: str | bytes, where: str) -> Any:
    """A JSON value. Raises DataError for what is none, or is nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(where, f"is not JSON: {error}", todo="mend it") from None


def _texts(record: Any, where: str) -> dict[str, str]:
    if not isinstance(record, dict):
        raise DataError(where, "is not an object", found=type(record).__name__)
    return {str(key): "" if value is None else str(value) for key, value in record.items()}


def _read_sheet(path: Path, columns: Sequence[str], sheet: str | None) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        import openpyxl
    except ImportError:
        raise MissingExtra("build", "openpyxl") from None
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > MAX_TABLE_BYTES:
            raise DataError(path, f"unpacks to more than {MAX_TABLE_BYTES >> 20} MiB", todo="check that it is a table")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of styles and extensions, which say nothing of cells
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            try:
                rows = [[_text(cell) for cell in row] for row in _sheet(book, path, sheet).iter_rows(values_only=True)]
            finally:
                book.close()
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, SyntaxError, zlib.error,
            zipfile.BadZipFile, EOFError) as error:  # fmt: skip
        raise DataError(
            path, "cannot be read as xlsx", found=str(error)[:80], todo="save it again, or as csv"
        ) from None
    header = list(columns) or (rows[0] if rows else [])
    while header and not header[-1]:
        header.pop()
    _check_names(header, path)
    for number, row in enumerate(rows[0 if columns else 1 :], 1 if columns else 2):
        cells = row[: len(header)] + [""] * (len(header) - len(row))
        if any(row[len(header) :]):
            raise DataError(f"{path}: row {number}", f"has not {len(header)} cells", todo="name every column")
        if any(cells):
            yield number, dict(zip(header, cells, strict=True))


def _sheet(book: Any, path: Path, sheet: str | None) -> Any:
    names = book.sheetnames
    if (sheet is None and len(names) != 1) or (sheet is not None and sheet not in names):
        wrong = "has several sheets" if sheet is None else f"has no sheet '{sheet}'"
        raise DataError(path, wrong, found=", ".join(names), todo="name one with layout.sheet")
    found = book[sheet or names[0]]
    found.reset_dimensions()  # the size that a file states of itself is wrong often enough
    return found


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))  # Excel has no integers: what it shows as 1 may be stored as 1.0
    return cell.strip() if isinstance(cell, str) else str(cell)
