"""What a source says of all its article versions, as one parquet: read once over the network, planned from many times.

Takes the records of any source and writes one row each, in the source's order, with everything needed to make the
record again (file names and md5 included) and a Drop as a row with its reason. The table knows nothing of licence
presets or dates wanted, so plans with other rules need no further request. `crawl_articles` fills it from the bucket in
parts, because eight million metadata files take an hour and an interruption should cost a minute.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from biomedclip.errors import DataError
from biomedclip.files import sha256_json, write_atomic
from biomedclip.progress import Progress, silent
from biomedclip.schema import Drop
from data_builders.pmc.catalog import ArticleRecord, SourceFile
from data_builders.pmc.client import Client
from data_builders.pmc.inventory import Inventory
from data_builders.pmc.media import RASTER_RANK, split_extension
from data_builders.pmc.sources import CloudBucket, id_and_version

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_KEY = b"biomedclip_articles"
BATCH_ROWS = 20_000
PART_ARTICLES = 50_000

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DATE = re.compile(
    r"\. (?P<year>(?:1[5-9]|20)[0-9]{2})(?: (?P<month>[A-Z][a-z]{2})[a-z]*(?:-[A-Z][a-z]+)?(?: (?P<day>[0-9]{1,2}))?)?"
    r"(?:-[0-9]{1,2})? ?(?=[;:.(]|$)"
)
_DOI_PREFIX = re.compile(r"^(https?://(dx\.)?doi\.org/|doi:)")
_DOI = re.compile(r"10\.[0-9]{4,9}/\S+")


def table_schema() -> pa.Schema:
    """The columns. Keys of files are `article_id || '/' || name`; md5s are the 16 raw bytes; `published` is yyyymmdd
    with zeros for what the citation does not say; `doi_key` is a 64-bit hash of the normalised DOI, 0 for none."""
    import pyarrow as pa

    text, flag, md5 = pa.string(), pa.bool_(), pa.binary(16)
    return pa.schema(
        {
            "article_id": text, "pmcid": pa.int64(), "version": pa.int16(), "licence": text, "is_retracted": flag,
            "is_manuscript": flag, "published": pa.int32(), "doi": text, "doi_key": pa.uint64(), "pmid": pa.int64(),
            "title": text, "citation": text, "xml_name": text, "xml_md5": md5, "media_names": pa.list_(text),
            "media_md5s": pa.list_(md5), "num_media": pa.int32(), "num_pictures": pa.int32(), "item": text,
            "reason": text, "detail": text,
        }
    )  # fmt: skip


def write_articles(items: Iterable[ArticleRecord | Drop], out: str | Path, *, snapshot: str | None = None) -> int:
    """The number of rows written to `out`: one a record or Drop, in their order.

    `snapshot` says when the source was taken, such as an inventory's; every plan made from the table carries it.
    """
    rows = 0
    with write_atomic(out) as file, _writer(file, snapshot) as writer:
        for batch in _batches(items):
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


def crawl_articles(client: Client, inventory: Inventory, out: str | Path, *, progress: Progress = silent) -> int:
    """The number of rows in `out`, filled with the metadata of every article version of an inventory.

    Parts of PART_ARTICLES are kept in the folder `<out>.parts` until all are there; interrupted, it is run again and
    only the missing parts are fetched.
    """
    out = Path(out)
    parts = out.with_name(f"{out.name}.parts") / sha256_json([inventory.facts.snapshot, len(inventory)])[:12]
    article_ids, paths = iter(inventory), []
    with progress("reading metadata", len(inventory)) as advance:
        for number in itertools.count():
            part = list(itertools.islice(article_ids, PART_ARTICLES))
            if not part:
                break
            path = parts / f"{number:05d}.parquet"
            if not path.exists():
                write_articles(CloudBucket(client, part).records(), path, snapshot=inventory.facts.snapshot)
            paths.append(path)
            advance(len(part))
    rows = _join(paths, out, inventory.facts.snapshot)
    for path in paths:
        path.unlink()
    parts.rmdir()
    if not any(parts.parent.iterdir()):
        parts.parent.rmdir()
    return rows


def read_articles(path: str | Path) -> Iterator[ArticleRecord | Drop]:
    """The records and Drops of a table, equal to those it was written from. Raises DataError where it is none."""
    import pyarrow.parquet as pq

    snapshot_of(path)
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
            yield from map(item_of_row, batch.to_pylist())


def snapshot_of(path: str | Path) -> str | None:
    """When the source of a table was taken. Raises DataError where `path` is no article table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        stored = pq.read_schema(path).metadata or {}
    except FileNotFoundError:
        raise DataError(path, "there is no such file", todo="name an article table") from None
    except (pa.ArrowInvalid, OSError):
        stored = {}
    if TABLE_KEY not in stored:
        raise DataError(path, "is no article table", todo="make one with write_articles or crawl_articles")
    return json.loads(stored[TABLE_KEY])["snapshot"]


def item_of_row(row: dict[str, Any]) -> ArticleRecord | Drop:
    """The record in a row of the table or of a plan; the Drop, where the row has a reason."""
    if row["reason"] is not None:
        return Drop(source="pmc", item=row["item"] or row["article_id"], reason=row["reason"],
                    detail=row["detail"] or "", article_id=row["article_id"])  # fmt: skip
    article_id = row["article_id"]

    def file_of(name: str, md5: bytes | None) -> SourceFile:
        return SourceFile(f"{article_id}/{name}", None if md5 is None else md5.hex())

    return ArticleRecord(
        article_id=article_id,
        pmcid=row["pmcid"],
        version=row["version"],
        licence=row["licence"],
        xml=file_of(row["xml_name"], row["xml_md5"]),
        media=tuple(map(file_of, row["media_names"], row["media_md5s"])),
        is_retracted=row["is_retracted"],
        is_manuscript=row["is_manuscript"],
        doi=row["doi"],
        pmid=row["pmid"],
        title=row["title"],
        citation=row["citation"],
    )


def published_of(citation: str | None) -> int:
    """The date in a citation (`J. 2026 Sep 1;15(9):e7`) as yyyymmdd, zeros for what it lacks; 0 where it has none."""
    match = _DATE.search(citation or "")
    if match is None:
        return 0
    month = (match["month"] or "").lower()
    number = _MONTHS.index(month) + 1 if month in _MONTHS else 0
    day = int(match["day"] or 0)
    return int(match["year"]) * 10_000 + number * 100 + (day if number and 1 <= day <= 31 else 0)


def doi_key(doi: str | None) -> int:
    """A 64-bit hash of a DOI without case and resolver; 0 where it is none.

    Among 8 million DOIs the chance that any two different ones meet is about two in a million.
    """
    name = _DOI_PREFIX.sub("", (doi or "").strip().lower())
    if not _DOI.fullmatch(name):
        return 0
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def count_pictures(names: Iterable[str]) -> int:
    """How many pictures there are among file names, one for all encodings and sizes of the same stem."""
    found = set()
    for name in names:
        stem, extension = split_extension(name)
        if extension in RASTER_RANK:
            found.add(stem)
    return len(found)


def _batches(items: Iterable[ArticleRecord | Drop]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    schema, rows = table_schema(), iter(items)
    while chunk := list(itertools.islice(rows, BATCH_ROWS)):
        yield pa.RecordBatch.from_pylist([_row(item) for item in chunk], schema=schema)


def _row(item: ArticleRecord | Drop) -> dict[str, Any]:
    if isinstance(item, Drop):
        pmcid, version = id_and_version(item.article_id) if item.article_id else (None, None)
        return {"article_id": item.article_id, "pmcid": pmcid, "version": version, "item": item.item,
                "reason": item.reason, "detail": item.detail}  # fmt: skip
    names = [file.name for file in item.media]
    return {
        "article_id": item.article_id, "pmcid": item.pmcid, "version": item.version, "licence": item.licence,
        "is_retracted": item.is_retracted, "is_manuscript": item.is_manuscript,
        "published": published_of(item.citation), "doi": item.doi, "doi_key": doi_key(item.doi), "pmid": item.pmid,
        "title": item.title, "citation": item.citation, "xml_name": item.xml.name, "xml_md5": _raw(item.xml.md5),
        "media_names": names, "media_md5s": [_raw(file.md5) for file in item.media], "num_media": len(names),
        "num_pictures": count_pictures(names),
    }  # fmt: skip


def _raw(md5: str | None) -> bytes | None:
    return None if md5 is None else bytes.fromhex(md5)


def _writer(file: BinaryIO, snapshot: str | None) -> Any:
    import pyarrow.parquet as pq

    facts = {TABLE_KEY: json.dumps({"snapshot": snapshot}).encode()}
    schema = table_schema().with_metadata(facts)
    return pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=["licence", "reason"])


def _join(paths: list[Path], out: Path, snapshot: str | None) -> int:
    import pyarrow.parquet as pq

    rows = 0
    with write_atomic(out) as file, _writer(file, snapshot) as writer:
        for path in paths:
            with pq.ParquetFile(path, pre_buffer=False) as part:
                for batch in part.iter_batches(BATCH_ROWS, use_threads=False):
                    writer.write_batch(batch)
                    rows += batch.num_rows
    return rows
