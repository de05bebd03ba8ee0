"""What became of the article versions between two days: new, changed, removed, retracted, or under another licence.

Reads two inventories, or two article tables (made of a folder on the fly where a copy of the bucket is named), and
writes one parquet with a row for each article version that differs, sorted by PMC id and version; `data plan --only`
builds what it names and `data purge` takes back what it withdraws. An inventory knows files and hashes, so two of them
tell what changed but not how; article tables hold licences and retractions. A record that could not be read on the
later day is `unreadable`, never `removed`: a failed download must not purge an article. Comparing is left to DuckDB
with a memory limit, because the tables have 8 million rows.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.errors import DataError
from biomedclip.files import TEMPORARY_PREFIX, write_atomic
from data_builders.pmc.article_table import snapshot_of, write_articles
from data_builders.pmc.catalog import LocalBucket
from data_builders.pmc.inventory import Inventory, open_database
from data_builders.pmc.sources import OaPackages

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = ("new", "changed", "licence_changed", "retracted", "removed", "unreadable")
"""What a row can be. A version that is retracted since, or new and retracted, is `retracted`, whatever else changed;
one whose licence code changed is `licence_changed`, whatever else changed."""

_DIFF_KEY = b"biomedclip_diff"
_BATCH_ROWS = 50_000

_INVENTORY = """SELECT article_id, pmcid, version, coalesce(etag, last_modified || ' ' || keys) AS content,
    NULL::VARCHAR AS licence, false AS retracted, true AS known FROM read_parquet('{path}')"""
# A table holds a record and perhaps Drops of its media; a version with Drops alone is one that could not be read.
_ARTICLES = """WITH records AS (SELECT article_id, pmcid, version,
        hash((licence, is_manuscript, doi, pmid, title, citation, xml_name, xml_md5, media_names, media_md5s))
        AS content, licence, coalesce(is_retracted, false) AS retracted, true AS known
    FROM read_parquet('{path}') WHERE reason IS NULL)
    SELECT * FROM records UNION ALL
    SELECT DISTINCT article_id, pmcid, version, 0, NULL, false, false
    FROM read_parquet('{path}') drops ANTI JOIN records USING (pmcid, version)
    WHERE reason IS NOT NULL AND pmcid IS NOT NULL"""
_COMPARE = """
    SELECT coalesce(b.article_id, a.article_id) AS article_id, coalesce(b.pmcid, a.pmcid) AS pmcid,
           coalesce(b.version, a.version) AS version,
           CASE WHEN b.pmcid IS NULL THEN 'removed'
                WHEN NOT b.known THEN 'unreadable'
                WHEN b.retracted AND NOT (a.known AND a.retracted) IS TRUE THEN 'retracted'
                WHEN a.pmcid IS NULL OR NOT a.known THEN 'new'
                WHEN a.licence IS DISTINCT FROM b.licence THEN 'licence_changed'
                ELSE 'changed' END AS kind,
           a.licence AS licence_before, b.licence AS licence_now
    FROM ({old}) a FULL OUTER JOIN ({new}) b ON a.pmcid = b.pmcid AND a.version = b.version
    WHERE CASE WHEN a.pmcid IS NULL THEN b.known WHEN b.pmcid IS NULL THEN a.known
               WHEN NOT a.known THEN b.known WHEN NOT b.known THEN true
               ELSE a.content IS DISTINCT FROM b.content OR a.retracted IS DISTINCT FROM b.retracted END
    ORDER BY pmcid, version
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffFacts:
    """What a diff says of itself."""

    tables: str
    """`inventories` or `articles`: what was compared, and with it whether licences and retractions are known."""
    old: str | None
    """Snapshot of the older side."""
    new: str | None
    counts: dict[str, int]
    """Kind -> article versions, for each of KINDS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One article version that differs."""

    article_id: str
    pmcid: int
    version: int
    kind: str
    """One of KINDS."""
    licence_before: str | None = None
    licence_now: str | None = None


def diff_tables(old: str | Path, new: str | Path, out: str | Path) -> DiffFacts:
    """The facts of the diff written to `out`. Raises DataError where the two sides cannot be compared."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        sides = [_open_side(Path(path), out.parent, stack) for path in (old, new)]
        _check_sides(old, new, sides)
        counts: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        database = stack.enter_context(open_database(out.parent))
        file = stack.enter_context(write_atomic(out))
        _write(database.sql(_COMPARE.format(old=sides[0].query, new=sides[1].query)), file, sides, counts)
    return read_facts(out)


def read_facts(path: str | Path) -> DiffFacts:
    """What a diff says of itself. Raises DataError where `path` is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return DiffFacts(**json.loads((pq.read_metadata(path).metadata or {})[_DIFF_KEY]))
    except FileNotFoundError:
        raise DataError(path, "there is no such file", todo="make one with: biomedclip data diff") from None
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError):
        raise DataError(path, "is no diff", todo="make one with: biomedclip data diff") from None


def read_changes(path: str | Path) -> Iterator[Change]:
    """The changes of a diff, sorted by PMC id and version. Raises DataError where `path` is none."""
    import pyarrow.parquet as pq

    read_facts(path)
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS, use_threads=False):
            yield from (Change(**row) for row in batch.to_pylist())


def changed_articles(path: str | Path) -> list[int]:
    """PMC ids of the articles that must be planned anew, sorted: all that differ in anything.

    That includes those of which a version was removed, because an older one may now be the one to take; the plan's own
    rules leave out what is retracted or gone. Raises DataError where `path` is no diff.
    """
    return sorted({change.pmcid for change in read_changes(path)})


@dataclass(frozen=True, slots=True)
class _Side:
    tables: str
    snapshot: str | None
    query: str


def _open_side(path: Path, folder: Path, stack: ExitStack) -> _Side:
    """An inventory, an article table, or a folder of articles, of which a table is made beside the output."""
    if path.is_dir():
        spare = stack.enter_context(tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=folder))
        source = OaPackages(path) if next(path.rglob("PMC*.tar.gz"), None) else LocalBucket(path)
        path = Path(spare) / "articles.parquet"
        write_articles(source.records(), path)
    try:
        snapshot: str | None = Inventory(path).facts.snapshot
        tables, query = "inventories", _INVENTORY
    except DataError:
        try:
            snapshot, tables, query = snapshot_of(path), "articles", _ARTICLES
        except DataError:
            wrong = "is neither an inventory nor an article table" if path.exists() else "there is no such file"
            raise DataError(path, wrong, todo="name the .inventory.parquet or .articles.parquet that `data plan` "
                            "left beside a plan, or a copy of the bucket") from None  # fmt: skip
    return _Side(tables, snapshot, query.format(path=str(path).replace("'", "''")))


def _check_sides(old: str | Path, new: str | Path, sides: list[_Side]) -> None:
    before, after = sides
    if before.tables != after.tables:
        raise DataError(f"{old}, {new}", "cannot be compared: one is an inventory, the other an article table",
                        todo="name two of a kind")  # fmt: skip
    if before.snapshot and after.snapshot and before.snapshot > after.snapshot:
        raise DataError(old, f"is younger than {new}", found=f"{before.snapshot} and {after.snapshot}",
                        todo="name the older one first")  # fmt: skip


def _write(compared: Any, file: Any, sides: list[_Side], counts: Counter[str]) -> None:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = diff_schema()
    # DuckDB renamed the method in version 2.
    read = compared.to_arrow_reader if hasattr(compared, "to_arrow_reader") else compared.fetch_arrow_reader
    with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=["kind"]) as writer:
        with read(_BATCH_ROWS) as reader:
            for batch in reader:
                writer.write_batch(batch.cast(schema))
                for entry in pc.value_counts(batch.column("kind")).to_pylist():
                    counts[entry["values"]] += entry["counts"]
        facts = DiffFacts(tables=sides[0].tables, old=sides[0].snapshot, new=sides[1].snapshot, counts=dict(counts))
        writer.add_key_value_metadata({_DIFF_KEY: json.dumps(asdict(facts)).encode()})


def diff_schema() -> pa.Schema:
    """The columns of a diff, those of `Change`."""
    import pyarrow as pa

    text = pa.string()
    return pa.schema({"article_id": text, "pmcid": pa.int64(), "version": pa.int16(), "kind": text,
                      "licence_before": text, "licence_now": text})  # fmt: skip
