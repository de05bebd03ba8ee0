"""The index of a source, read shard by shard when asked for: 24 million rows start as fast as 24 thousand.

Reads the parquet beside each shard of a dataset folder, or slices of the one table that the header scan of foreign
tars made, and yields columns by row number over all of them. What was read last stays in memory, up to about a window
of the plan, so that the samples of a window cost one reading of its indexes.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biomedclip.errors import DataError
from biomedclip.files import sha256_json
from biomedclip.schema import ANNOTATION_COLUMNS, INDEX_COLUMNS
from biomedclip.shards import DatasetFolder, arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa

HELD_ROWS = 800_000
"""Rows whose columns stay in memory; a window of the plan has 320,000, and at most twice that."""

READ_COLUMNS = ("key", "shard", "image_offset", "image_size", "image_format", "image_crc32", "text_offset",
                "text_size", "json_offset", "json_size", "num_captions", "modality", "labels",
                "article_id")  # fmt: skip
"""What reading a sample takes; of foreign tars, all that is known."""


@dataclass(frozen=True, slots=True)
class IndexPart:
    """The index rows of one shard: where they are."""

    shard: str
    rows: int
    file: Path | None = None
    table: pa.Table | None = None


class ShardIndex:
    """Rows of all shards of a source, numbered in shard order."""

    def __init__(self, parts: Sequence[IndexPart], sha256: str, annotations: pa.Table | None = None) -> None:
        self.parts, self.sha256 = tuple(parts), sha256
        self.bounds = np.concatenate([[0], np.cumsum([part.rows for part in parts], dtype=np.int64)]).astype(np.int64)
        """(S + 1,) the first row of each shard, and the number of rows."""
        self._bounds = self.bounds.tolist()
        self._annotations = annotations
        self._held: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._kin: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    @classmethod
    def of_folder(cls, dataset: DatasetFolder) -> ShardIndex:
        """The index of a dataset folder, those rows included that its tombstones take back."""
        files: Mapping[str, str] = dataset.manifest["files"]
        shards = dataset.manifest["shards"]
        names = [shard["name"].replace(".tar", ".parquet") for shard in shards]
        parts = [
            IndexPart(shard["name"], shard["samples"], dataset.folder / name)
            for shard, name in zip(shards, names, strict=True)
        ]
        return cls(parts, sha256_json([[name, files.get(name)] for name in names]), dataset.annotations)

    @classmethod
    def of_table(cls, table: pa.Table) -> ShardIndex:
        """The index of foreign tars: a table in the order of its tars."""
        shards = table["shard"].combine_chunks().dictionary_encode() if len(table) else None
        if shards is None:
            return cls([], sha256_json([]))
        codes = shards.indices.to_numpy()
        starts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
        names = shards.dictionary.to_pylist()
        table = table.combine_chunks()
        parts = [
            IndexPart(names[codes[start]], stop - start, table=table.slice(start, stop - start))
            for start, stop in pairwise(starts)
        ]
        return cls(parts, _hash_rows(parts))

    def __len__(self) -> int:
        return self._bounds[-1]

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns, those of annotations with `annotation_` in front."""
        import pyarrow as pa

        if any(part.table is not None for part in self.parts):
            return next(part.table for part in self.parts if part.table is not None).schema
        schema = arrow_schema(INDEX_COLUMNS)
        if self._annotations is not None and len(self._annotations):
            for name in list(ANNOTATION_COLUMNS)[1:]:
                schema = schema.append(pa.field(f"annotation_{name}", self._annotations.schema.field(name).type))
        return schema

    def read(self, shard: int, columns: Sequence[str]) -> pa.Table:
        """Columns of the rows of one shard. Raises DataError where its index is not readable or another one."""
        part = self.parts[shard]
        if part.table is not None:
            return part.table.select(list(columns))
        stored = [name for name in columns if not name.startswith("annotation_")]
        joined = [name for name in columns if name.startswith("annotation_")]
        table = _read_parquet(part, [*stored, *(["key"] if joined and "key" not in stored else [])])
        for name in joined:
            table = table.append_column(name, self._annotation(table["key"], name.removeprefix("annotation_")))
        return table.select(list(columns))

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Columns of all rows, shard by shard, one record batch a shard."""
        for shard in range(len(self.parts)):
            yield from self.read(shard, columns).combine_chunks().to_batches()

    def value(self, row: int, name: str) -> Any:
        """One of READ_COLUMNS of a row."""
        shard = bisect_right(self._bounds, row) - 1
        held = self._held.get(shard)
        if held is None:
            held = self._hold(shard)
        column = held[name]
        found = column[row - self._bounds[shard]]
        return found if type(column) is memoryview else found.as_py()

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Columns of the given rows, in their order."""
        import pyarrow as pa

        order = np.argsort(rows, kind="stable")
        shards = np.searchsorted(self.bounds, rows[order], side="right") - 1
        parts = [
            self.read(shard, columns).take(pa.array(rows[order][shards == shard] - self._bounds[shard]))
            for shard in np.unique(shards).tolist()
        ]
        places = np.empty(len(rows), dtype=np.int64)
        places[order] = np.arange(len(rows))
        return pa.concat_tables(parts).take(pa.array(places)) if parts else self.schema.empty_table().select(columns)

    def kin(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) ids of the article and of the first caption of each row, -1 where they are not known."""
        articles, captions = np.full(len(rows), -1, dtype=np.int64), np.full(len(rows), -1, dtype=np.int64)
        shards = np.searchsorted(self.bounds, rows, side="right") - 1
        for shard in np.unique(shards).tolist():
            own = np.flatnonzero(shards == shard)
            facts = self._kin_of(shard)
            local = rows[own] - self._bounds[shard]
            articles[own], captions[own] = facts[0][local], facts[1][local]
        return articles, captions

    def _hold(self, shard: int) -> dict[str, Any]:
        table = self.read(shard, READ_COLUMNS)
        held = {name: _fast_to_index(table[name].combine_chunks()) for name in READ_COLUMNS}
        self._held[shard] = held
        while len(self._held) > 1 and sum(self.parts[number].rows for number in self._held) > HELD_ROWS:
            self._held.popitem(last=False)
        return held

    def _kin_of(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        if shard not in self._kin:
            known = "caption_sha1" in self.schema.names
            table = self.read(shard, ["article_id", "caption_sha1"] if known else ["article_id"])
            articles = hash_strings(table["article_id"])
            captions = shorten_hashes(table["caption_sha1"]) if known else np.full(len(table), -1, dtype=np.int64)
            self._kin[shard] = articles, captions
            while len(self._kin) > 1 and sum(self.parts[number].rows for number in self._kin) > HELD_ROWS:
                self._kin.popitem(last=False)
        return self._kin[shard]

    def _annotation(self, keys: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
        import pyarrow.compute as pc

        if self._annotations is None:
            raise KeyError(name)
        places = pc.index_in(keys, value_set=self._annotations["key"].combine_chunks())
        return self._annotations[name].take(places)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": OrderedDict(), "_kin": OrderedDict()}


def _fast_to_index(column: pa.Array) -> pa.Array | memoryview:
    """The column, numbers as what gives Python's numbers ten times faster than Arrow does."""
    import pyarrow as pa

    return memoryview(column.to_numpy()) if pa.types.is_integer(column.type) and not column.null_count else column


def hash_strings(values: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """(N,) int64 ids of at least 0 that depend on each text alone, -1 for null: equal in every source and run."""
    import pyarrow as pa

    whole = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    encoded = whole.dictionary_encode()
    ids = np.array([hash_text(text) for text in encoded.dictionary.to_pylist()] + [-1], dtype=np.int64)
    found: np.ndarray = ids[encoded.indices.fill_null(len(ids) - 1).to_numpy(zero_copy_only=False)]
    return found


def shorten_hashes(values: pa.ChunkedArray) -> np.ndarray:
    """(N,) int64 ids of at least 0 from hexadecimal hashes: their first 15 digits, -1 where there are not as many."""
    import pyarrow as pa
    import pyarrow.compute as pc

    digits = 15
    known = pc.fill_null(pc.match_substring_regex(values, f"^[0-9a-f]{{{digits}}}"), False).to_numpy()
    heads = pc.utf8_slice_codeunits(values.filter(pa.array(known)), 0, digits).combine_chunks()
    letters = np.frombuffer(heads.cast(pa.binary(digits)).buffers()[1] or b"", dtype=np.uint8)
    values_of = (letters & 15) + 9 * (letters >> 6)
    place = np.int64(16) ** np.arange(digits - 1, -1, -1, dtype=np.int64)
    found = np.full(len(values), -1, dtype=np.int64)
    found[known] = values_of[: digits * len(heads)].reshape(-1, digits).astype(np.int64) @ place
    return found


def hash_text(text: str) -> int:
    """The id of a text: 62 bits of its hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2


def _read_parquet(part: IndexPart, columns: Sequence[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    todo = "rebuild the dataset or fetch it again"
    try:
        # One thread: reading processes are forked, and the pool of threads is not.
        table = pq.read_table(part.file, columns=list(columns), use_threads=False, pre_buffer=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(str(part.file), "cannot be read as parquet", found=str(error)[:80], todo=todo) from None
    if missing := set(columns) - set(table.column_names):
        raise DataError(str(part.file), "lacks columns", found=", ".join(sorted(missing)), todo="rebuild the dataset")
    if len(table) != part.rows:
        raise DataError(str(part.file), f"has not the {part.rows} rows of its manifest", found=len(table), todo=todo)
    return table.select(list(columns)).cast(arrow_schema({name: INDEX_COLUMNS[name] for name in columns}))


def _hash_rows(parts: Sequence[IndexPart]) -> str:
    """Hash of the keys and places of samples of foreign tars: what tells two of their indexes apart."""
    digest = hashlib.sha256()
    for part in parts:
        table = part.table
        if table is None:
            continue
        for name in ("key", "article_id"):
            digest.update("\x1f".join(text or "" for text in table[name].to_pylist()).encode())
        for name in ("image_offset", "image_size", "text_offset", "text_size"):
            digest.update(table[name].to_numpy().tobytes())
    return digest.hexdigest()
