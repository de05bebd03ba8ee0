"""The bucket's daily inventory in, one table of article versions out; `data_builders.pmc.diff` compares two of them.

Reads the newest `manifest.json` below the inventory prefix and the csv.gz files it names (md5-checked, one at a time);
writes a parquet of one row an article version, sorted by PMC id and version. Columns are taken from the manifest's
`fileSchema`, because the bucket's own description has them in another order than the files. An article's metadata
JSON holds the md5 of all its files, so the JSON's ETag alone tells whether anything in the article changed. Grouping
is left to DuckDB with a memory limit: the tables have 8 million rows today, and more if the inventory should one day
list every object.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, ValidationError

from biomedclip.errors import DataError
from biomedclip.files import TEMPORARY_PREFIX, write_atomic
from data_builders.pmc.catalog import BadFile, is_safe_key
from data_builders.pmc.client import Client

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

INVENTORY_PREFIX = "inventory-reports/pmc-oa-opendata/metadata/"

MAX_ROWS = 2_000_000_000
"""A csv.gz that goes on beyond this is taken for a decompression bomb."""

MEMORY_LIMIT = "1GB"
"""Of DuckDB; it spills to a temporary folder beside the output beyond that."""

_SNAPSHOT = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}-\d{2}Z")
_ARTICLE_KEY = (
    r"^(?P<folder>metadata/)?PMC(?P<pmcid>[1-9][0-9]{0,11})\.(?P<version>[1-9][0-9]{0,3})(?P<rest>\.json|/.+)$"
)
_KEY_VALUE = b"biomedclip_inventory"
_BATCH_ROWS = 100_000
_AGAIN = "take the inventory of another day"


class _ManifestFile(BaseModel):
    key: str
    size: int = 0
    md5: str | None = Field(default=None, alias="MD5checksum", pattern=r"^[0-9a-f]{32}$")


class _Manifest(BaseModel):
    fileFormat: Literal["CSV"]
    fileSchema: str
    files: list[_ManifestFile]


@dataclass(frozen=True, slots=True)
class Manifest:
    """One day's inventory: its snapshot, the columns of its files in order, and the files with their md5."""

    snapshot: str
    columns: tuple[str, ...]
    files: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryFacts:
    """What an inventory table says of itself."""

    snapshot: str
    articles: int
    """Article versions."""
    keys: int
    """Keys listed."""
    other_keys: int
    """Keys that belong to no article version: README.txt, the inventory's own files."""


class Inventory:
    """An inventory table on disk; iterating yields the article ids, sorted by PMC id and version."""

    def __init__(self, path: str | Path) -> None:
        """Raises DataError where `path` is no inventory table."""
        self.path = Path(path)
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # The file's own key-value pairs: the schema's are those of the columns alone.
            stored = pq.read_metadata(self.path).metadata or {}
            self.facts = InventoryFacts(**json.loads(stored[_KEY_VALUE]))
        except FileNotFoundError:
            raise DataError(path, "there is no such file", todo="name an inventory table") from None
        except (pa.ArrowInvalid, KeyError, ValueError, TypeError, OSError):
            raise DataError(path, "is no inventory table", todo="make one with read_inventory") from None

    def __len__(self) -> int:
        return self.facts.articles

    def __iter__(self) -> Iterator[str]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path, pre_buffer=False) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=["article_id"], use_threads=False):
                yield from batch.column(0).to_pylist()


def find_manifest(client: Client, snapshot: str | None = None) -> Manifest:
    """The newest inventory that is complete, or that of `snapshot` (`2026-01-18T01-00Z`). Raises DataError."""
    where = f"{client.config.endpoint}/{INVENTORY_PREFIX}"
    names = [entry.key.removeprefix(INVENTORY_PREFIX).rstrip("/") for entry in
             client.list_keys(INVENTORY_PREFIX, delimiter="/") if entry.is_prefix]  # fmt: skip
    # `data/` and `hive/` lie beside the dated folders.
    snapshots = sorted((name for name in names if _SNAPSHOT.fullmatch(name)), reverse=True)
    if snapshot is not None:
        snapshots = [name for name in snapshots if name == snapshot]
    for name in snapshots:
        try:
            data = client.read(f"{INVENTORY_PREFIX}{name}/manifest.json", max_bytes=2**20)
        except BadFile as error:
            if error.reason == "missing_file":
                continue  # the day's inventory is still being written
            raise DataError(f"{where}{name}/manifest.json", "cannot be read", found=error, todo="try again") from None
        return parse_manifest(data, name)
    raise DataError(where, f"holds no inventory{f' of {snapshot}' if snapshot else ''}",
                    todo="inventories are kept for 30 days; leave the snapshot out for the newest")  # fmt: skip


def parse_manifest(data: bytes, snapshot: str) -> Manifest:
    """The manifest in a `manifest.json`. Raises DataError where it is none, or names files outside the inventory."""
    where = f"inventory {snapshot}: manifest.json"
    try:
        manifest = _Manifest.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field_name = ".".join(str(part) for part in problem["loc"])
        raise DataError(where, f"{field_name} {problem['msg'].lower()}".strip(), todo=_AGAIN) from None
    columns = tuple(name.strip() for name in manifest.fileSchema.split(","))
    missing = {"Key", "ETag"} - set(columns)
    if missing or len(set(columns)) != len(columns):
        raise DataError(where, "its fileSchema needs Key and ETag, each column once", found=manifest.fileSchema[:200])
    unsafe = [file.key for file in manifest.files if not is_safe_key(file.key)]
    if unsafe or not manifest.files:
        raise DataError(where, "must name files of the inventory", found=repr(unsafe)[:200], todo=_AGAIN)
    return Manifest(snapshot, columns, tuple((file.key, file.md5) for file in manifest.files))


def read_inventory(client: Client, out: str | Path, *, snapshot: str | None = None) -> Inventory:
    """The newest inventory as a table in `out`: article_id, pmcid, version, etag, last_modified, keys.

    `etag` is that of the article's metadata JSON, the md5 of its bytes; None where the inventory lists none. Raises
    DataError where no complete inventory can be fetched; a file that cannot be read spoils all of it, because the
    articles it would have named cannot be counted.
    """
    manifest = find_manifest(client, snapshot)
    counts = _Counts()
    return _write_grouped(_stream_keys(client, manifest, counts), Path(out), manifest.snapshot, counts)


@dataclass(slots=True)
class _Counts:
    keys: int = 0
    other_keys: int = 0
    failure: DataError | None = None
    """What ended the stream: DuckDB turns what its input raises into an error of its own."""


def _remember_failure(batches: Iterator[pa.RecordBatch], counts: _Counts) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except DataError as error:
        counts.failure = error
        raise


def _stream_keys(client: Client, manifest: Manifest, counts: _Counts) -> Iterator[pa.RecordBatch]:
    """The keys of article versions in all files, as batches of pmcid, version, is_metadata, etag, last_modified."""
    import pyarrow as pa
    import pyarrow.csv

    for key, md5 in manifest.files:
        try:
            data = client.read(key, md5=md5, max_bytes=2**31)
        except BadFile as error:
            raise DataError(
                f"inventory {manifest.snapshot}: {key}", "cannot be read", found=error, todo=_AGAIN
            ) from None
        options = pyarrow.csv.ReadOptions(use_threads=False, column_names=list(manifest.columns))
        convert = pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in manifest.columns}, strings_can_be_null=False
        )
        try:
            with (
                pa.input_stream(pa.py_buffer(data), compression="gzip") as stream,
                pyarrow.csv.open_csv(stream, read_options=options, convert_options=convert) as reader,
            ):
                for batch in reader:
                    counts.keys += batch.num_rows
                    if counts.keys > MAX_ROWS:
                        raise DataError(f"inventory {manifest.snapshot}: {key}", f"has more than {MAX_ROWS} rows")
                    yield _select_articles(batch, counts)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"inventory {manifest.snapshot}: {key}", "cannot be read as csv.gz",
                            found=str(error)[:120], todo=_AGAIN) from None  # fmt: skip


def _select_articles(batch: pa.RecordBatch, counts: _Counts) -> pa.RecordBatch:
    """The rows of a batch whose key belongs to an article version; current versions only, where that is stated."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = batch.schema.names
    parts = pc.extract_regex(batch.column("Key"), _ARTICLE_KEY)
    folder, rest = pc.struct_field(parts, "folder"), pc.struct_field(parts, "rest")
    is_metadata = pc.not_equal(folder, "")
    keep = pc.fill_null(pc.xor(pc.equal(rest, ".json"), pc.invert(is_metadata)), False)
    if "IsLatest" in names:
        keep = pc.and_(keep, pc.equal(pc.utf8_lower(batch.column("IsLatest")), "true"))
    if "IsDeleteMarker" in names:
        keep = pc.and_(keep, pc.not_equal(pc.utf8_lower(batch.column("IsDeleteMarker")), "true"))
    modified = batch.column("LastModifiedDate") if "LastModifiedDate" in names else pc.utf8_slice_codeunits(rest, 0, 0)
    table = pa.record_batch(
        {
            "pmcid": pc.struct_field(parts, "pmcid"), "version": pc.struct_field(parts, "version"),
            "is_metadata": is_metadata, "rest": rest,
            "etag": pc.utf8_trim(batch.column("ETag"), '"'), "last_modified": modified,
        }
    ).filter(keep)  # fmt: skip
    counts.other_keys += batch.num_rows - table.num_rows
    return pa.record_batch(
        {
            "pmcid": pc.cast(table.column("pmcid"), pa.int64()),
            "version": pc.cast(table.column("version"), pa.int16()),
            "is_metadata": table.column("is_metadata"),
            "rest": table.column("rest"),
            "etag": table.column("etag"),
            "last_modified": table.column("last_modified"),
        }
    )


def _write_grouped(batches: Iterator[pa.RecordBatch], out: Path, snapshot: str, counts: _Counts) -> Inventory:
    import duckdb
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.int64()
    keys = pa.RecordBatchReader.from_batches(
        pa.schema({"pmcid": number, "version": pa.int16(), "is_metadata": pa.bool_(), "rest": text, "etag": text,
                   "last_modified": text}), _remember_failure(batches, counts),
    )  # fmt: skip
    # The JSON lies in metadata/ and once more beside the article; both copies have the same ETag.
    sql = """
        SELECT 'PMC' || pmcid || '.' || version AS article_id, pmcid, version,
               coalesce(max(etag) FILTER (is_metadata),
                        max(etag) FILTER (rest = '/PMC' || pmcid || '.' || version || '.json')) AS etag,
               max(last_modified) AS last_modified, count(*) AS keys
        FROM keys GROUP BY pmcid, version ORDER BY pmcid, version
    """
    schema = pa.schema({"article_id": text, "pmcid": number, "version": pa.int16(), "etag": text,
                        "last_modified": text, "keys": number})  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    with open_database(out.parent) as database, write_atomic(out) as file:
        database.register("keys", keys)
        grouped, articles = database.sql(sql), 0
        # DuckDB renamed the method in version 2.
        read = grouped.to_arrow_reader if hasattr(grouped, "to_arrow_reader") else grouped.fetch_arrow_reader
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            try:
                with read(_BATCH_ROWS) as reader:
                    for rows in reader:
                        articles += rows.num_rows
                        writer.write_batch(rows.cast(schema))
            except duckdb.Error as error:
                raise (counts.failure or error) from None
            facts = InventoryFacts(snapshot=snapshot, articles=articles, keys=counts.keys, other_keys=counts.other_keys)
            writer.add_key_value_metadata({_KEY_VALUE: json.dumps(asdict(facts)).encode()})
    return Inventory(out)


@contextmanager
def open_database(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB with a memory limit in memory that spills into a temporary folder inside `folder`."""
    import duckdb

    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=folder) as spill:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY_LIMIT,
            "temp_directory": spill,
            "preserve_insertion_order": "false",
        }
        with duckdb.connect(config=settings) as database:
            # DuckDB draws its bar on stdout, which belongs to results.
            database.execute("SET enable_progress_bar = false")
            yield database
