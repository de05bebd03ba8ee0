"""Evaluation sets as files of hashes, and the rows of an index that show one of their pictures.

`write_hashes` turns an evaluation set into a small table that holds no picture and can be given away: for each sample
the sha256 of its bytes, the sha256 of its pixels (which survives a change of container) and its perceptual hash (which
survives scaling and JPEG). `contamination` looks every row of an index up in any number of such files. Near matches
have the same shape, as in `dedup`, except beside a square picture of an evaluation set: sets are often squeezed into
squares. Dropping is the caller's decision, because a near match of line art can be a false one.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biomedclip.errors import DataError
from biomedclip.files import write_text
from biomedclip.images import BadImage, check_image, read_rgb
from biomedclip.layouts import read_bytes
from biomedclip.schema import Manifest
from biomedclip.shards import DatasetFolder, arrow_schema, write_table
from data_builders.dedup import _arrow
from data_builders.hamming import DEFAULT_DISTANCE, near_matches

if TYPE_CHECKING:
    import pyarrow as pa

HASH_COLUMNS: dict[str, str] = {
    "set": "string", "sample": "string", "sha256": "string", "pixels_sha256": "string", "phash": "uint64",
    "width": "int32", "height": "int32",
}  # fmt: skip
"""Columns of a hash file and their types; `set` and one of the three hashes are needed."""


def write_hashes(source: Manifest | str | Path, path: str | Path, *, name: str | None = None) -> int:
    """Write the hash file of an evaluation set, a Manifest or a dataset folder, to `path`; returns its rows.

    `name` is what the set is called, by default its own name. The file is parquet, or csv where `path` ends in it.
    Raises DataError for a sample that cannot be decoded.
    """
    rows = list(_manifest_rows(source, name) if isinstance(source, Manifest) else _folder_rows(source, name))
    if Path(path).suffix != ".csv":
        write_table(Path(path), rows, HASH_COLUMNS)
        return len(rows)
    text = io.StringIO()
    table = csv.DictWriter(text, HASH_COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())
    return len(rows)


def _manifest_rows(manifest: Manifest, name: str | None) -> Iterator[dict[str, Any]]:
    for row in manifest.rows:
        yield _hash_row(name or manifest.name, row.sample_id, read_bytes(manifest, row))


def _folder_rows(path: str | Path, name: str | None) -> Iterator[dict[str, Any]]:
    folder = DatasetFolder(path)
    for sample in folder.samples():
        yield _hash_row(name or str(folder.manifest["name"]), sample.key, sample.image)


def _hash_row(name: str, sample: str, data: bytes) -> dict[str, Any]:
    try:
        image = check_image(data)
    except BadImage as error:
        raise DataError(f"{name}: {sample}", "is not a picture", found=str(error)) from None
    return {
        "set": name, "sample": sample, "sha256": hashlib.sha256(data).hexdigest(),
        "pixels_sha256": hash_pixels(np.asarray(read_rgb(data, sample))), "phash": image.phash,
        "width": image.width, "height": image.height,
    }  # fmt: skip


def hash_pixels(rgb: np.ndarray) -> str:
    """Hex sha256 of a picture's shape (three little-endian uint32) and its bytes, row by row."""
    shape = np.array(rgb.shape, dtype="<u4").tobytes()
    return hashlib.sha256(shape + np.ascontiguousarray(rgb, dtype=np.uint8).tobytes()).hexdigest()


def read_hashes(path: str | Path) -> pa.Table:
    """A hash file, parquet or csv, with all of HASH_COLUMNS (null where the file lacks one).

    Raises DataError where it is neither, lacks the set's name or all hashes, or holds a hash that is none.
    """
    pa, pq = _arrow()
    path = Path(path)
    if not path.is_file():
        raise DataError(path, "there is no such hash file")
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                table = pa.Table.from_pylist(list(csv.DictReader(file)))
        else:
            table = pq.read_table(path)
    except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error) as error:
        raise DataError(path, "is neither parquet nor csv", found=str(error)[:100]) from None
    known = [column for column in HASH_COLUMNS if column in table.column_names]
    if "set" not in known or not {"sha256", "pixels_sha256", "phash"} & set(known):
        raise DataError(path, "is no hash file", found=f"columns {', '.join(table.column_names)}",
                        todo=f"expected {', '.join(HASH_COLUMNS)}")  # fmt: skip
    return pa.table({column: _column(table, column, path) for column in HASH_COLUMNS})


def _column(table: pa.Table, name: str, path: Path) -> Any:
    """A column as its type of HASH_COLUMNS: numbers may be text (0x1f is one), and hex digits upper case."""
    pa, _ = _arrow()
    kind = arrow_schema({name: HASH_COLUMNS[name]}).field(name).type
    if name not in table.column_names:
        return pa.nulls(table.num_rows, kind)
    values = table[name].to_pylist() if pa.types.is_string(table[name].type) else None
    try:
        if values is None:
            return table[name].cast(kind)
        present = [value.strip() or None if value else None for value in values]
        if pa.types.is_integer(kind):
            return pa.array([None if value is None else int(value, 0) for value in present], type=kind)
        lower = name not in ("set", "sample")
        return pa.array([value.lower() if value and lower else value for value in present], type=kind)
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise DataError(path, f"has a {name} that is none", found=str(error)[:100]) from None


def contamination(
    index: pa.Table,
    hash_files: Sequence[str | Path],
    *,
    max_distance: int = DEFAULT_DISTANCE,
    max_aspect_change: float = 0.05,
) -> pa.Table:
    """The rows of an index that match a sample of an evaluation set: `row`, `key`, `sets`, `samples`, `reasons`.

    `row` is the position in the index; the last three are lists of equal length. A reason is `sha256`, `pixels` (only
    where the index has a column `pixels_sha256`) or `phash` (within `max_distance` bits, 0 to 7, and of the same width
    over height but for `max_aspect_change` where both are known and the sample is not square); the strictest one is
    given for each sample. Raises DataError for a file that is no hash file.
    """
    pa, _ = _arrow()
    found: dict[int, dict[tuple[str, str], str]] = defaultdict(dict)
    for path in hash_files:
        table = read_hashes(path)
        sets, samples = table["set"].to_pylist(), [sample or "" for sample in table["sample"].to_pylist()]
        for reason, rows, hits in _matches(index, table, max_distance, max_aspect_change):
            for row, hit in zip(rows.tolist(), hits.tolist(), strict=True):
                found[row].setdefault((sets[hit], samples[hit]), reason)
    rows_found = sorted(found)
    matches = [sorted(found[row].items()) for row in rows_found]
    texts = pa.list_(pa.string())
    return pa.table(
        {
            "row": pa.array(rows_found, type=pa.int64()),
            "key": index["key"].take(pa.array(rows_found, type=pa.int64())),
            "sets": pa.array([[name for (name, _), _ in match] for match in matches], type=texts),
            "samples": pa.array([[sample for (_, sample), _ in match] for match in matches], type=texts),
            "reasons": pa.array([[reason for _, reason in match] for match in matches], type=texts),
        }
    )


def _matches(
    index: pa.Table, table: pa.Table, max_distance: int, max_aspect_change: float
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Positions in the index and in the hash file that agree, strictest rule first."""
    for reason, column in (("sha256", "sha256"), ("pixels", "pixels_sha256")):
        if column in index.column_names:
            yield reason, *_equal_rows(index[column], table[column])
    if "phash" in index.column_names:
        ours, theirs = index["phash"], table["phash"]
        left = np.flatnonzero(ours.is_valid().to_numpy())
        right = np.flatnonzero(theirs.is_valid().to_numpy())
        hashes = [side.drop_null().to_numpy().astype(np.uint64) for side in (ours, theirs)]
        shapes = _shapes(index), _shapes(table)
        step = np.log1p(max_aspect_change) + 1e-9
        for i, j in near_matches(hashes[0], hashes[1], max_distance):
            rows, hits = left[i], right[j]
            # A square (0), and a shape that is not known (NaN), agree with all.
            apart = (np.abs(shapes[0][rows] - shapes[1][hits]) > step) & (shapes[1][hits] != 0)
            yield "phash", rows[~apart], hits[~apart]


def _shapes(table: pa.Table) -> np.ndarray:
    """The logarithm of width over height, NaN where one is not known."""
    if not {"width", "height"} <= set(table.column_names):
        return np.full(table.num_rows, np.nan)
    sides = [np.asarray(table[name].to_numpy(), dtype=np.float64) for name in ("width", "height")]
    return np.log(np.maximum(sides[0], 1)) - np.log(np.maximum(sides[1], 1))


def _equal_rows(ours: pa.ChunkedArray, theirs: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of equal, present values in two text columns."""
    import pyarrow.compute as pc

    places: dict[str, list[int]] = defaultdict(list)
    for position, value in enumerate(theirs.to_pylist()):
        if value is not None:
            places[value].append(position)
    hits = np.flatnonzero(pc.is_in(ours, value_set=theirs.combine_chunks(), skip_nulls=True).to_numpy())
    pairs = [(row, at) for row, value in zip(hits, ours.take(hits).to_pylist(), strict=True) for at in places[value]]
    array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]
