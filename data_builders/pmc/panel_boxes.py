"""A file of panel boxes that a learned detector found in, figure -> boxes out.

A detector runs where a GPU is, once, and leaves a table; a build reads the table and needs no detector. Whatever the
file's form, a row is one box in pixels of the figure's picture. A figure is named by its sample key, or by article and
figure id, which a detector that ran before any build knows better. All of it is held in memory, about 0.5 kB a box, so
a file for the whole of PMC is best cut along the units that are built.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from biomedclip.errors import DataError
from biomedclip.schema import KEY_PATTERN
from data_builders.pmc.panels import PanelBox

_COLUMNS = "key (or article_id and figure_id), x0, y0, x1, y1, and if known score and letter"
_SIDES = ("x0", "y0", "x1", "y1")


def read_boxes(path: str | Path) -> dict[str, list[PanelBox]]:
    """Figure -> boxes, of a `.jsonl`, `.csv` or `.parquet` file; a figure is named by its key or by `figure_name`.

    Columns are `key`, or `article_id` and `figure_id`; `x0`, `y0`, `x1`, `y1` in pixels, right and bottom exclusive;
    `score`, which is 1 where it lacks; and `letter`, as the caption names the panel. A line of JSON may also hold all
    boxes of its figure, and none where the detector found none:

        {"key": "pmc-123-v1-f1-p0", "boxes": [{"box": [0, 0, 400, 300], "letter": "A", "score": 0.93}]}

    Raises DataError, naming the row, for anything else, and where two such lines name one figure.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(path, "is no file of panel boxes", found=path.suffix or "no extension",
                        todo="write .parquet, .csv or .jsonl")  # fmt: skip
    figures: dict[str, list[PanelBox]] = {}
    listed: set[str] = set()
    try:
        for number, row in readers[path.suffix](path):
            try:
                name, boxes = _read_row(row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                found = f"{type(error).__name__}: {error}"
                todo = f"write the columns {_COLUMNS}"
                raise DataError(f"{path}:{number}", "is no row of panel boxes", found=found, todo=todo) from None
            if "boxes" in row:
                if name in listed:
                    raise DataError(f"{path}:{number}", "is the second line of its figure", found=name)
                listed.add(name)
            figures.setdefault(name, []).extend(boxes)
    except FileNotFoundError:
        raise DataError(path, "there is no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(path, "cannot be read", found=str(error)[:200]) from None
    return figures


def figure_name(article_id: str | None, figure_id: str | None) -> str:
    """The name of a figure in a file that knows no sample keys."""
    return f"{article_id}/{figure_id}"


def _read_jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}", "is no JSON", found=str(error)) from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}", "is no JSON object", found=line.strip()[:80])
            yield number, row


def _read_csv(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        for row in rows:
            yield rows.line_num, {key: value for key, value in row.items() if value not in ("", None)}


def _read_parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(10_000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {key: value for key, value in row.items() if value is not None}
    except pa.ArrowInvalid as error:
        raise DataError(path, "is no parquet file", found=str(error)[:200]) from None


def _read_row(row: Mapping[str, Any]) -> tuple[str, list[PanelBox]]:
    """The figure a row names and its boxes. Raises ValueError, KeyError or TypeError."""
    if "key" in row:
        name = row["key"]
        if not isinstance(name, str) or not KEY_PATTERN.fullmatch(name):
            raise ValueError(f"{name!r:.100} is no sample key")
    else:
        name = figure_name(row["article_id"], row["figure_id"])
    if "boxes" in row:
        return name, [_read_box(box["box"], box) for box in row["boxes"]]
    return name, [_read_box([row[side] for side in _SIDES], row)]


def _read_box(sides: list[Any], facts: Mapping[str, Any]) -> PanelBox:
    left, top, right, bottom = (round(float(side)) for side in sides)
    score, letter = float(facts.get("score", facts.get("confidence", 1.0))), facts.get("letter")
    if not (0 <= left < right and 0 <= top < bottom):
        raise ValueError(f"box {sides} is empty or negative")
    if not 0 <= score <= 1:
        raise ValueError(f"score {score} is not between 0 and 1")
    if letter is not None and not (isinstance(letter, str) and letter.isalpha()):
        raise ValueError(f"letter {letter!r}")
    if letter is not None:
        letter = letter.upper() if len(letter) == 1 else letter.lower()
    return PanelBox(left, top, right, bottom, score, letter)
