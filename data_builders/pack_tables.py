"""The tables of a packed dataset: the ledger of all that was seen, the articles, and what the card says of them.

Reads the ledgers and articles of units, and the selection made from them. At the size of PubMed Central these are
tables of tens of millions of rows, so they pass through by unit, or through DuckDB, which sorts on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.errors import DataError
from biomedclip.progress import Progress
from biomedclip.schema import LEDGER_COLUMNS, Article
from biomedclip.shards import ARTICLE_COLUMNS, write_batches
from data_builders.card import MAX_ATTRIBUTION_ROWS
from data_builders.units import UnitRecord, live_rows

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

_BATCH_ROWS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFolder:
    """A folder of units that a selection was made from."""

    folder: Path
    records: list[UnitRecord]


def write_ledger(
    path: Path, out: Path, sources: Sequence[UnitFolder], selected: int, progress: Progress
) -> Counter[str]:
    """Write every figure seen by any source, with the selection's reasons; returns the dropped rows by reason.

    Raises DataError where the rows that stay kept are not as many as are `selected`.
    """
    refused = _read_refused(path)
    dropped: Counter[str] = Counter()
    kept = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal kept
        with progress("writing the ledger", sum(len(source.records) for source in sources)) as advance:
            for number, source in enumerate(sources):
                for _, group in groupby(source.records, key=lambda record: record.base):
                    records = list(group)
                    table = _with_reasons(live_rows(records), [refused.get((number, r.name)) for r in records])
                    for status, reason in zip(*(table[c].to_pylist() for c in ("status", "reason")), strict=True):
                        kept += status == "kept"
                        if status == "dropped":
                            dropped[reason] += 1
                    yield table
                    advance(len(records))

    write_batches(out, tables(), LEDGER_COLUMNS)
    if kept != selected:
        raise DataError(path, "does not agree with the ledgers of its units", found=f"{kept} kept, {selected} selected",
                        todo="select again, then pack")  # fmt: skip
    return dropped


def _read_refused(path: Path) -> dict[tuple[int, str], pa.Table]:
    """The rows that are not selected, by folder and unit: `key`, `reason` and what the ledger says beside it."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    parts: dict[tuple[int, str], list[pa.RecordBatch]] = {}
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["key", "reason", "dup_cluster", "matches", "raw", "unit"]):
            left_out = batch.filter(batch.column("reason").is_valid())
            cluster = pc.binary_join_element_wise("cluster ", left_out.column("dup_cluster").cast(pa.string()), "")
            matches = pc.binary_join(left_out.column("matches"), "; ")
            table = pa.table({"key": left_out.column("key"), "reason": left_out.column("reason"),
                              "detail": pc.coalesce(matches, cluster, "")})  # fmt: skip
            names = list(zip(left_out.column("raw").to_pylist(), left_out.column("unit").to_pylist(), strict=True))
            for name in dict.fromkeys(names):
                parts.setdefault(name, []).append(table.filter(pa.array([other == name for other in names])))
    return {name: pa.concat_tables(tables) for name, tables in parts.items()}


def _with_reasons(ledger: pa.Table, refused: Iterable[pa.Table | None]) -> pa.Table:
    """A ledger in which the pairs that were not selected are dropped rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    tables = [table for table in refused if table is not None]
    if not tables:
        return ledger
    reasons = pa.concat_tables(tables)
    places = pc.index_in(ledger["key"], value_set=reasons["key"].combine_chunks(), skip_nulls=True)
    is_refused = places.is_valid()
    changes = {
        "status": "dropped",
        "reason": reasons["reason"].take(places),
        "detail": reasons["detail"].take(places),
        "key": pa.scalar(None, pa.string()),
    }
    columns = {
        name: pc.if_else(is_refused, changes[name], ledger[name]) if name in changes else ledger[name]
        for name in ledger.column_names
    }
    return pa.table(columns)


def load_articles(database: duckdb.DuckDBPyConnection, path: Path, sources: Sequence[UnitFolder]) -> None:
    """Make the tables `articles` (each once, from the first unit that has it) and `credited` (with its samples)."""
    import pyarrow as pa

    files = [str(record.path("articles")) for source in sources for record in source.records]
    database.register("files", pa.table({"filename": files, "place": range(len(files))}))
    database.execute("SET VARIABLE article_files = (SELECT list(filename ORDER BY place) FROM files)")
    database.execute(
        "CREATE TABLE articles AS SELECT * EXCLUDE (filename, file_row_number, place, occurrence) FROM ("
        "  SELECT *, row_number() OVER (PARTITION BY article_id ORDER BY place, file_row_number) AS occurrence"
        "  FROM read_parquet(getvariable('article_files'), filename = true, file_row_number = true)"
        "  JOIN files USING (filename)"
        ") WHERE occurrence = 1 ORDER BY pmcid, version, article_id"
    )
    database.execute(
        "CREATE TABLE samples AS SELECT article_id, count(*) AS samples FROM read_parquet(?) "
        "WHERE reason IS NULL AND article_id IS NOT NULL GROUP BY article_id",
        [str(path)],
    )
    database.execute(
        "CREATE TABLE credited AS SELECT * FROM articles JOIN samples USING (article_id) "
        "ORDER BY pmcid, version, article_id"
    )


def write_articles(database: duckdb.DuckDBPyConnection, out: Path) -> None:
    """Write all articles that were read, in the order of their PMC ids."""
    import pyarrow as pa

    names = list(ARTICLE_COLUMNS)
    batches = database.sql("FROM articles ORDER BY pmcid, version, article_id").to_arrow_reader(_BATCH_ROWS)
    write_batches(out, (pa.Table.from_batches([batch]).select(names) for batch in batches), ARTICLE_COLUMNS)


def read_credits(database: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """What `dataset_card` says of articles: the first of those that have samples, and how many there are."""
    query = f"FROM credited ORDER BY pmcid, version, article_id LIMIT {MAX_ATTRIBUTION_ROWS}"
    rows = database.sql(query)
    total = database.table("credited").shape[0]
    articles, kept = [], {}
    for row in rows.to_arrow_table().to_pylist():
        kept[row["article_id"]] = row.pop("samples")
        facts: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}
        articles.append(Article(**facts))
    licences = database.sql("SELECT DISTINCT licence, licence_url FROM credited").fetchall()
    return {"articles": articles, "kept": kept, "unlisted": total - len(articles), "licences": licences}
