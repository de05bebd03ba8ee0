"""Pairs to numbered tars with an index, and back: the interface between building and everything after.

`DatasetWriter` takes `Pair | Drop` and writes a dataset folder:

    00000.tar 00000.parquet …   shards and their indexes; a shard holds samples of one split only
    articles.parquet            article facts, once per article
    ledger.parquet              every figure seen: kept, or the reason it was dropped
    sizes.json                  samples per shard, as open_clip's trainer reads it
    README.md                   dataset card
    SHA256SUMS                  of all of the above
    manifest.json               written last: its presence means the folder is complete
    tombstones.parquet          perhaps, and later: samples taken back, which readers of this project pass over
    annotations.parquet         perhaps, and later: what experts say of clusters of samples, joined to the index

Shards are written with a ustar header of our own (zeroed owner, time and mode), because the bytes must depend on the
input alone and because the offsets of the members are known while writing; `tarfile`, webdataset and `tar` read them.
`DatasetFolder` reads such a folder back; bytes come by position, so any sample can be had without scanning a tar.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from biomedclip.errors import DataError, MissingExtra
from biomedclip.files import remove_leftovers, sha256_file, sha256_json, write_atomic, write_json, write_text
from biomedclip.licences import licence_class
from biomedclip.schema import (
    ANNOTATION_COLUMNS,
    IMAGE_FORMATS,
    INDEX_COLUMNS,
    KEY_PATTERN,
    LEDGER_COLUMNS,
    SPLITS,
    TOMBSTONE_COLUMNS,
    Article,
    Drop,
    Pair,
)

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK = 512
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
FORMAT_VERSION = 1
TOMBSTONES = "tombstones.parquet"
TOMBSTONE_KEY = b"biomedclip_tombstones"
ANNOTATIONS = "annotations.parquet"
ANNOTATION_KEY = b"biomedclip_annotations"

IMAGE_MEMBER = "jpg"
"""Extension of every image member, whatever its encoding, which the index and the .json name. `datasets` takes the
extension for a column: a shard with both .jpg and .png is refused, or has None for the images of the rarer kind.
Readers (Pillow, torchvision's decode_image, webdataset, open_clip, datasets) look at the bytes, never at this name."""


class DatasetWriter:
    """Writes a dataset folder from a stream of `Pair | Drop`; use as a context manager and call `finish`.

    Leaving the block without `finish` removes what was written, except complete shards under their final names,
    which a rerun overwrites with the same bytes.
    """

    def __init__(
        self, folder: str | Path, *, name: str, max_samples: int = 10_000, max_bytes: int = 500_000_000
    ) -> None:
        self.folder, self.name = Path(folder), name
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MANIFEST).unlink(missing_ok=True)
        remove_leftovers(self.folder)
        self._open: dict[str, ShardWriter] = {}
        self._done: list[dict[str, Any]] = []
        self._num_opened = 0
        self._ledger: list[dict[str, Any]] = []
        self._keys: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self._open.values():
            shard.abandon()
        self._open.clear()

    def add(self, item: Pair | Drop) -> None:
        """Write a pair to its split's shard, or note a drop. Raises DataError for a pair that breaks the contract."""
        if isinstance(item, Drop):
            self._ledger.append(
                {
                    "source": item.source, "article_id": item.article_id, "item": item.item,
                    "status": "dropped", "reason": item.reason, "detail": item.detail, "key": None,
                }
            )  # fmt: skip
            return
        check_pair(item)
        if item.key in self._keys:
            raise DataError(item.key, "is the key of two samples", todo="make keys unique before writing")
        self._keys.add(item.key)
        shard = self._open.get(item.split)
        if shard is None:
            shard = self._open[item.split] = ShardWriter(self.folder, self._num_opened, item.split)
            self._num_opened += 1
        shard.add(item)
        self._ledger.append(
            {
                "source": item.source, "article_id": item.article_id, "item": item.figure_id or item.key,
                "status": "kept", "reason": None, "detail": "", "key": item.key,
            }
        )  # fmt: skip
        if shard.num_samples >= self.max_samples or shard.position >= self.max_bytes:
            self._done.append(self._open.pop(item.split).close())

    def finish(
        self,
        *,
        articles: Iterable[Article] = (),
        provenance: Mapping[str, Any],
        card: Callable[[dict[str, Any]], str],
        reports: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Close the shards, write tables, card and checksums, then the manifest; returns the manifest.

        `card` turns the manifest into the text of README.md. `provenance` is stored as it is and must not depend on
        time or machine, because the folder's bytes must not. `reports` are further JSON files by name.
        """
        for split in list(self._open):
            self._done.append(self._open.pop(split).close())
        _write_articles(self.folder / "articles.parquet", articles)
        write_table(self.folder / "ledger.parquet", self._ledger, LEDGER_COLUMNS)
        dropped = Counter(row["reason"] for row in self._ledger if row["status"] == "dropped")
        return finish_folder(
            self.folder, self._done, name=self.name, dropped=dropped, provenance=provenance, card=card, reports=reports
        )


def finish_folder(
    folder: Path,
    shards: Iterable[Mapping[str, Any]],
    *,
    name: str,
    dropped: Mapping[str, int],
    provenance: Mapping[str, Any],
    card: Callable[[dict[str, Any]], str],
    reports: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of a folder whose shards and tables are written, now complete: the last step of every writer.

    `shards` are what `ShardWriter.close` returned; `dropped` counts the ledger's dropped rows by reason. Writes the
    JSON files, the card, the checksums and, last, the manifest; shards of earlier runs are deleted.
    """
    done = sorted((dict(shard) for shard in shards), key=lambda shard: str(shard["name"]))
    _remove_stale_shards(folder, {shard["name"] for shard in done})
    write_json(folder / "sizes.json", {shard["name"]: shard["samples"] for shard in done})
    for file_name, report in (reports or {}).items():
        write_json(folder / file_name, report)
    manifest = _manifest(name, done, dropped, dict(provenance))
    write_text(folder / "README.md", card(manifest))
    manifest["files"] = _write_sums(folder, done, tuple(reports or ()))
    write_json(folder / MANIFEST, manifest)
    return manifest


def _manifest(
    name: str, shards: list[dict[str, Any]], dropped: Mapping[str, int], provenance: dict[str, Any]
) -> dict[str, Any]:
    kept = sum(shard["samples"] for shard in shards)
    splits: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    for shard in shards:
        splits[shard["split"]] += shard["samples"]
        licences.update(shard.pop("licences"))
        sources.update(shard.pop("sources"))
    return {
        "format": FORMAT_VERSION,
        "name": name,
        "samples": kept,
        "splits": {split: splits[split] for split in SPLITS if splits[split]},
        "ledger": {
            "seen": kept + sum(dropped.values()),
            "kept": kept,
            "dropped": dict(sorted(dropped.items())),
        },
        "licences": dict(sorted(licences.items())),
        "sources": dict(sorted(sources.items())),
        "shards": shards,
        "provenance": provenance,
    }


def _write_sums(folder: Path, shards: Sequence[Mapping[str, Any]], reports: Sequence[str]) -> dict[str, str]:
    sums = {shard["name"]: shard["sha256"] for shard in shards}
    others = [shard["name"].replace(".tar", ".parquet") for shard in shards]
    for name in (*others, *reports, "articles.parquet", "ledger.parquet", "sizes.json", "README.md"):
        sums[name] = sha256_file(folder / name)
    sums = dict(sorted(sums.items()))
    write_text(folder / SUMS, sums_text(sums))
    return sums


def sums_text(sums: Mapping[str, str]) -> str:
    """The content of SHA256SUMS, as `sha256sum --check` reads it, from name -> hash."""
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def check_pair(pair: Pair) -> None:
    """Raise DataError where a pair would be lost or misread by a reader of its shard."""
    if not KEY_PATTERN.fullmatch(pair.key):
        raise DataError(repr(pair.key), "cannot be a sample key", todo=f"it must match {KEY_PATTERN.pattern}")
    if pair.image_format not in IMAGE_FORMATS:
        raise DataError(pair.key, "is in an encoding shards do not hold", found=pair.image_format)
    if not pair.caption.strip():
        raise DataError(pair.key, "has an empty caption", todo="drop it with a reason")
    if pair.captions and pair.captions[0] != pair.caption:
        raise DataError(pair.key, "captions[0] is not the caption", found=repr(pair.captions[0])[:60])
    if not pair.licence:
        raise DataError(pair.key, "has no licence", todo="drop it with a reason")
    if pair.split not in SPLITS:
        raise DataError(pair.key, "has an unknown split", found=pair.split)


class ShardWriter:
    """One tar being written, and the rows of its index; ends with `close`, or with `abandon`, which leaves nothing."""

    def __init__(self, folder: Path, number: int, split: str) -> None:
        self.folder, self.name, self.split = folder, f"{number:05d}.tar", split
        self.rows: list[dict[str, Any]] = []
        self.position = 0
        self._stack = ExitStack()
        self._file: BinaryIO = self._stack.enter_context(write_atomic(folder / self.name))
        self._hash = hashlib.sha256()

    @property
    def num_samples(self) -> int:
        """Samples added so far."""
        return len(self.rows)

    def add(self, pair: Pair, **known: Any) -> None:
        """Write a pair's members and its index row; `known` are columns that `index_row` need not work out."""
        row = index_row(pair, known)
        members = (
            ("image", IMAGE_MEMBER, pair.image),
            ("text", "txt", pair.caption.encode()),
            ("json", "json", json.dumps(sidecar(pair), ensure_ascii=False, sort_keys=True).encode()),
        )
        for column, extension, data in members:
            row[f"{column}_offset"] = self._member(f"{pair.key}.{extension}", data)
            row[f"{column}_size"] = len(data)
        self.rows.append(row | {"shard": self.name})

    def _member(self, name: str, data: bytes) -> int:
        self._write(tar_header(name, len(data)))
        offset = self.position
        self._write(data)
        self._write(b"\0" * (-len(data) % BLOCK))
        return offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.position += len(data)

    def close(self) -> dict[str, Any]:
        """The shard's facts for `finish_folder`, after tar and index have taken their final names."""
        self._write(b"\0" * (2 * BLOCK))
        self._stack.close()
        write_table(self.folder / self.name.replace(".tar", ".parquet"), self.rows, INDEX_COLUMNS)
        return {
            "name": self.name,
            "split": self.split,
            "samples": len(self.rows),
            "bytes": self.position,
            "sha256": self._hash.hexdigest(),
            "licences": Counter(row["licence"] for row in self.rows),
            "sources": Counter(row["source"] for row in self.rows),
        }

    def abandon(self) -> None:
        """Delete what was written."""
        abandoned = RuntimeError("the dataset was not finished")
        self._stack.__exit__(RuntimeError, abandoned, None)


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte ustar header of a regular file, the same for the same name and size on every machine."""
    encoded = name.encode("ascii")
    if len(encoded) > 100:
        raise DataError(name, "is too long for a tar member", found=f"{len(encoded)} bytes", todo="shorten the key")
    header = bytearray(BLOCK)
    header[0 : len(encoded)] = encoded
    header[100:108] = b"0000644\0"
    header[108:116] = header[116:124] = b"0000000\0"
    header[124:136] = b"%011o\0" % size
    header[136:148] = b"00000000000\0"
    header[148:156] = b" " * 8
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    header[329:337] = header[337:345] = b"0000000\0"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def sidecar(pair: Pair) -> dict[str, Any]:
    """What the sample's .json member holds: everything a training run may want without the index."""
    facts = {
        "key": pair.key,
        "source": pair.source,
        "split": pair.split,
        "licence": pair.licence,
        "image_format": pair.image_format,
        "width": pair.width,
        "height": pair.height,
        "sha256": pair.sha256,
        "captions": list(pair.captions or (pair.caption,)),
        "article_id": pair.article_id,
        "figure_id": pair.figure_id,
        "panel": pair.panel,
        "modality": pair.modality,
        "labels": list(pair.labels),
        "label_ids": list(pair.label_ids),
        "group_id": pair.group_id,
        "concepts": list(pair.concepts),
        "flags": list(pair.flags),
    }
    # `datasets` infers types from the first samples: a null or an empty list there would make a later value an error.
    return {key: value for key, value in {**facts, **pair.sidecar}.items() if value not in (None, [])}


def index_row(pair: Pair, known: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The pair's row of the index, without the shard name and offsets, which only the writer knows.

    `known` goes before what the pair says; its `caption_tokens` spares counting them.
    """
    row = {
        "key": pair.key,
        "image_format": pair.image_format,
        "image_crc32": zlib.crc32(pair.image),
        "sha256": pair.sha256,
        "phash": pair.phash,
        "width": pair.width,
        "height": pair.height,
        "caption_sha1": hashlib.sha1(pair.caption.encode(), usedforsecurity=False).hexdigest(),
        "caption_chars": len(pair.caption),
        "caption_tokens": None,
        "num_captions": len(pair.captions) or 1,
        "source": pair.source,
        "article_id": pair.article_id,
        "figure_id": pair.figure_id,
        "panel": pair.panel,
        "modality": pair.modality,
        "licence": pair.licence,
        "licence_class": licence_class(pair.licence),
        "split": pair.split,
        "labels": list(pair.labels),
        "label_ids": list(pair.label_ids),
        "group_id": pair.group_id,
        "concepts": list(pair.concepts),
        "dup_cluster": None,
        "flags": list(pair.flags),
    } | dict(known)
    if row["caption_tokens"] is None:
        from biomedclip.tokens import count_tokens

        row["caption_tokens"] = count_tokens(pair.caption)
    return row


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample read back from a shard: its members and its index row."""

    key: str
    image: bytes
    caption: str
    json: dict[str, Any]
    row: dict[str, Any]


class DatasetFolder:
    """A complete dataset folder. Raises DataError where the folder is missing, unfinished or of a newer format.

    Samples that `tombstones.parquet` names are not in `index`, `samples`, `splits` or the length; the shards keep them.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.exists():
            wrong = "holds no finished dataset" if self.folder.is_dir() else "there is no such folder"
            raise DataError(self.folder, wrong, todo="run its `biomedclip build` command again")
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(path, "is not JSON", found=str(error), todo="rebuild the dataset") from None
        if self.manifest.get("format") != FORMAT_VERSION:
            raise DataError(path, f"is not of format {FORMAT_VERSION}", found=self.manifest.get("format"),
                            todo="upgrade biomedclip or rebuild the dataset")  # fmt: skip

    def __len__(self) -> int:
        return int(self.manifest["samples"]) - len(self.withdrawn)

    @cached_property
    def index(self) -> pa.Table:
        """The index rows in shard order; with `annotation_label` and the like where there are annotations."""
        if not self.withdrawn:
            return self._annotated(self.stored_index)
        keys = self.stored_index["key"].to_pylist()
        return self._annotated(self.stored_index.filter([key not in self.withdrawn for key in keys]))

    @cached_property
    def annotations(self) -> pa.Table:
        """ANNOTATION_COLUMNS; no rows where nobody annotated. Raises DataError for those of another dataset."""
        return read_annotations(self.folder)

    def _annotated(self, index: pa.Table) -> pa.Table:
        import pyarrow.compute as pc

        if not len(self.annotations):
            return index
        places = pc.index_in(index["key"], value_set=self.annotations["key"].combine_chunks())
        for name in list(ANNOTATION_COLUMNS)[1:]:
            index = index.append_column(f"annotation_{name}", self.annotations[name].take(places))
        return index

    @cached_property
    def stored_index(self) -> pa.Table:
        """The index rows of all samples in the shards, those with a tombstone too."""
        paths = [self.folder / s["name"].replace(".tar", ".parquet") for s in self.manifest["shards"]]
        return read_tables(paths, INDEX_COLUMNS)

    @cached_property
    def tombstones(self) -> pa.Table:
        """TOMBSTONE_COLUMNS; no rows where nothing was taken back. Raises DataError where they cannot be trusted."""
        return read_tombstones(self.folder)

    @cached_property
    def withdrawn(self) -> frozenset[str]:
        """Keys of the samples taken back."""
        return frozenset(self.tombstones["key"].to_pylist())

    @cached_property
    def splits(self) -> dict[str, int]:
        """Split -> samples; a split of which nothing is left is not there."""
        if not self.withdrawn:
            return dict(self.manifest["splits"])
        counts: Counter[str] = Counter()
        for shard in self.manifest["shards"]:
            keys = read_tables([self.folder / shard["name"].replace(".tar", ".parquet")], {"key": "string"})["key"]
            counts[shard["split"]] += shard["samples"] - len(self.withdrawn.intersection(keys.to_pylist()))
        return {split: counts[split] for split in SPLITS if counts[split]}

    @cached_property
    def ledger(self) -> pa.Table:
        """One row for each figure or image seen."""
        return read_tables([self.folder / "ledger.parquet"], LEDGER_COLUMNS)

    @cached_property
    def articles(self) -> pa.Table:
        """One row an article."""
        return read_tables([self.folder / "articles.parquet"], None)

    def shard_paths(self, split: str | None = None) -> list[Path]:
        """Tars of one split, or all of them, in order."""
        return [self.folder / s["name"] for s in self.manifest["shards"] if split in (None, s["split"])]

    def samples(self, split: str | None = None) -> Iterator[Sample]:
        """Samples in shard order, read by position and checked against the index's crc32."""
        for row in self.index.to_pylist():
            if split in (None, row["split"]):
                yield self.read(row)

    def read(self, row: Mapping[str, Any]) -> Sample:
        """The sample an index row points at. Raises DataError where the tar is truncated or was replaced."""
        path = self.folder / row["shard"]
        with path.open("rb") as file:
            image, text, side = (
                read_member(file, row[f"{column}_offset"], row[f"{column}_size"], path, row["key"])
                for column in ("image", "text", "json")
            )
        if zlib.crc32(image) != row["image_crc32"]:
            raise DataError(f"{path}: {row['key']}", "has other bytes than its index says", todo=_REPAIR)
        return Sample(row["key"], image, text.decode(), json.loads(side), dict(row))


def read_tombstones(folder: Path) -> pa.Table:
    """The tombstones of a dataset folder, TOMBSTONE_COLUMNS; no rows where it has none.

    Raises DataError where the file is damaged or speaks of another dataset: passing over it would bring back what
    somebody took care to take out.
    """
    _, pq = _arrow()
    path = folder / TOMBSTONES
    if not path.exists():
        return arrow_schema(TOMBSTONE_COLUMNS).empty_table()
    table = read_tables([path], TOMBSTONE_COLUMNS)
    todo = "delete it and run `biomedclip data purge` again"
    try:
        promised = json.loads((pq.read_metadata(path).metadata or {})[TOMBSTONE_KEY])
    except (KeyError, ValueError):
        raise DataError(path, "is no table of tombstones", todo=todo) from None
    if promised != tombstone_promise(folder, table.to_pylist()):
        raise DataError(path, "is damaged, or of another dataset", todo=todo)
    return table


def read_annotations(folder: Path) -> pa.Table:
    """The annotations of a dataset folder, ANNOTATION_COLUMNS; no rows where it has none.

    Raises DataError where the file is damaged or speaks of another dataset, as one does that was built anew.
    """
    _, pq = _arrow()
    path = folder / ANNOTATIONS
    if not path.exists():
        return arrow_schema(ANNOTATION_COLUMNS).empty_table()
    table = read_tables([path], ANNOTATION_COLUMNS)
    try:
        facts = json.loads((pq.read_metadata(path).metadata or {})[ANNOTATION_KEY])
    except (KeyError, ValueError):
        facts = {}
    if facts.get("dataset_sha256") != sha256_file(folder / MANIFEST):
        raise DataError(path, "is not of this dataset", todo="delete it, or apply the annotations again")
    return table


def tombstone_promise(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the metadata of `tombstones.parquet` say: hashes of its rows and of the manifest of its dataset."""
    return {"manifest_sha256": sha256_file(folder / MANIFEST), "rows_sha256": sha256_json(rows)}


_REPAIR = "the tar was changed after it was written; rebuild the dataset or fetch it again"


def read_member(file: BinaryIO, offset: int, size: int, path: Path, key: str) -> bytes:
    """`size` bytes at `offset` of an open shard. Raises DataError where the file ends before them."""
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise DataError(f"{path}: {key}", "is cut off", found=f"{len(data)} of {size} bytes", todo=_REPAIR)
    return data


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a dataset folder, one line a finding; empty means every byte and count is as promised."""
    dataset = DatasetFolder(folder)
    problems = []
    for name, digest in dataset.manifest["files"].items():
        path = dataset.folder / name
        if not path.exists():
            problems.append(f"{path}: is missing")
        elif sha256_file(path) != digest:
            problems.append(f"{path}: has other bytes than SHA256SUMS says")
    sums = dataset.folder / SUMS
    if not sums.exists() or sums.read_bytes() != sums_text(dataset.manifest["files"]).encode():
        problems.append(f"{sums}: is missing or does not agree with {MANIFEST}")
    if problems:
        return problems
    ledger = dataset.manifest["ledger"]
    if ledger["seen"] != ledger["kept"] + sum(ledger["dropped"].values()):
        problems.append(f"{dataset.folder}: seen {ledger['seen']} is not kept + dropped")
    rows = dataset.stored_index
    if len(rows) != ledger["kept"]:
        problems.append(f"{dataset.folder}: the index has {len(rows)} rows, the ledger kept {ledger['kept']}")
    keys = Counter(rows["key"].to_pylist())
    problems += [f"{dataset.folder}: key {key} occurs {n} times" for key, n in keys.items() if n > 1]
    try:
        strangers = sorted(dataset.withdrawn - set(keys))
        problems += [f"{dataset.folder / TOMBSTONES}: {key} is no sample of this dataset" for key in strangers]
    except DataError as error:
        problems.append(str(error))
    for row in rows.to_pylist():
        try:
            dataset.read(row)
        except DataError as error:
            problems.append(str(error))
    return problems


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Write rows as parquet with the given columns and types, byte-reproducibly."""
    pa, pq = _arrow()
    table = pa.Table.from_pylist(list(rows), schema=arrow_schema(columns))
    with write_atomic(path) as file:
        pq.write_table(table, file, compression="zstd", store_schema=False)


def write_batches(path: Path, tables: Iterable[pa.Table], columns: Mapping[str, str]) -> None:
    """Write tables, one after the other, as one parquet with the given columns and types, byte-reproducibly."""
    _, pq = _arrow()
    schema = arrow_schema(columns)
    with (
        write_atomic(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd", store_schema=False) as writer,
    ):
        for table in tables:
            writer.write_table(table.cast(schema))


def read_tables(paths: Sequence[Path], columns: Mapping[str, str] | None) -> pa.Table:
    """Parquet files as one table of the given columns, None for all of the files'.

    Raises DataError where a file is missing, broken or lacks a column.
    """
    pa, pq = _arrow()
    tables = []
    for path in paths:
        try:
            table = pq.read_table(path, columns=list(columns) if columns else None)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(path, "cannot be read as parquet", found=str(error)[:80], todo=_REPAIR) from None
        missing = set(columns or ()) - set(table.column_names)
        if missing:
            raise DataError(path, "lacks columns", found=", ".join(sorted(missing)), todo="rebuild the dataset")
        tables.append(table.select(list(columns)).cast(arrow_schema(columns)) if columns else table)
    return pa.concat_tables(tables) if tables else arrow_schema(columns or {}).empty_table()


def arrow_schema(columns: Mapping[str, str]) -> pa.Schema:
    """The pyarrow schema of a column table such as `schema.INDEX_COLUMNS`."""
    pa, _ = _arrow()
    kinds = {
        "string": pa.string(), "int32": pa.int32(), "int64": pa.int64(), "uint32": pa.uint32(),
        "uint64": pa.uint64(), "bool": pa.bool_(), "float32": pa.float32(), "float64": pa.float64(),
        "list<string>": pa.list_(pa.string()), "list<int32>": pa.list_(pa.int32()),
    }  # fmt: skip
    return pa.schema([(name, kinds[kind]) for name, kind in columns.items()])


ARTICLE_COLUMNS: dict[str, str] = {
    field.name: {
        "pmcid": "int64", "version": "int32", "pmid": "int64", "authors": "list<string>", "keywords": "list<string>",
        "mesh": "list<string>", "flags": "list<string>", "is_retracted": "bool", "is_manuscript": "bool",
    }.get(field.name, "string")
    for field in fields(Article)
}  # fmt: skip


def _write_articles(path: Path, articles: Iterable[Article]) -> None:
    rows = [asdict(article) for article in sorted(articles, key=lambda a: (a.pmcid, a.version))]
    write_table(path, rows, ARTICLE_COLUMNS)


def _remove_stale_shards(folder: Path, keep: set[str]) -> None:
    for path in folder.glob("[0-9][0-9][0-9][0-9][0-9].tar"):
        if path.name not in keep:
            path.unlink()
            path.with_suffix(".parquet").unlink(missing_ok=True)


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("build", "pyarrow") from None
    return pyarrow, pyarrow.parquet
