"""Which article versions will be built, frozen in one parquet before anything large is downloaded.

Reads an article table (or any source) and a `PlanConfig`; writes every row of it once: planned, with its unit and all
that is needed to fetch it, or excluded, with the reason, so that `seen == planned + sum(excluded by reason)`. One
version of an article is chosen as `catalog.choose_versions` does, then one article of each DOI by the same rule; a
retraction of any of them holds for all, else choosing another version would undo it. Sampling ranks articles by a hash
of the PMC id alone: a smaller sample is part of a larger one, on every machine and whatever else is in the table.
The decisions are in `plan_rules`; here the wide columns pass by in batches.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.config import check_config
from biomedclip.errors import DataError
from biomedclip.files import TEMPORARY_PREFIX, sha256_json, write_atomic
from biomedclip.progress import Progress, silent
from biomedclip.schema import Drop
from data_builders.pmc.article_table import (
    BATCH_ROWS,
    crawl_articles,
    item_of_row,
    snapshot_of,
    table_schema,
    write_articles,
)
from data_builders.pmc.catalog import ArticleRecord, LocalBucket, Source, SourceFile
from data_builders.pmc.client import Client, ClientConfig
from data_builders.pmc.inventory import read_inventory
from data_builders.pmc.plan_rules import REASONS, Columns, PlanConfig, decide, load_columns
from data_builders.pmc.sources import OaPackages, kind_of_source

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

PLAN_KEY = b"biomedclip_plan"

_GROUP_ROWS = 50_000
_WIDE = ("title", "citation", "media_names", "media_md5s")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts:
    """What a plan says of itself."""

    config: dict[str, Any]
    config_sha256: str
    snapshot: str | None
    """Of the inventory, or whatever the source was dated with."""
    seen: int
    planned: int
    excluded: dict[str, int]
    """Reason -> rows; with `planned` they add up to `seen`."""
    licences: dict[str, int]
    """Code of the metadata -> planned articles."""
    media: int
    """Media files of planned articles."""
    pictures: int
    """Pictures among them, one for all encodings and sizes of the same stem."""
    units: int
    rows_per_group: int


def make_plan(
    articles: str | Path | Source,
    out: str | Path,
    config: PlanConfig,
    *,
    only: Iterable[int] | None = None,
    snapshot: str | None = None,
) -> PlanFacts:
    """The facts of the plan written to `out`, from an article table or straight from a source.

    `only` restricts it to these PMC ids, for updates; version and DOI rules still see all rows. `snapshot` dates a
    source; a table has its own. Raises DataError where the input is no article table, not sorted, or nothing is left.
    """
    out = Path(out)
    if not isinstance(articles, str | Path):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=out.parent) as folder:
            table = Path(folder) / "articles.parquet"
            write_articles(articles.records(), table, snapshot=snapshot)
            return make_plan(table, out, config, only=only)
    articles = Path(articles)
    stored = snapshot_of(articles)
    columns = load_columns(articles)
    codes = decide(columns, config, only)
    planned = codes == 0
    if not planned.any():
        found = ", ".join(f"{reason} {count}" for reason, count in _count(codes, columns).items())
        raise DataError(out, "nothing is left to plan", found=found or "no rows",
                        todo="check the licence preset, the dates and the source")  # fmt: skip
    facts = PlanFacts(
        config=config.model_dump(mode="json"),
        config_sha256=sha256_json(config.model_dump(mode="json")),
        snapshot=stored,
        seen=len(codes),
        planned=int(planned.sum()),
        excluded=_count(codes, columns),
        licences=columns.count_licences(planned),
        media=int(columns.num_media[planned].sum()),
        pictures=int(columns.num_pictures[planned].sum()),
        units=-(-int(planned.sum()) // config.unit_size),
        rows_per_group=max(1, _GROUP_ROWS // config.unit_size) * config.unit_size,
    )
    _write(articles, out, codes, facts, config.unit_size)
    return facts


def plan_source(
    source: str,
    out: str | Path,
    config: PlanConfig,
    *,
    only: Iterable[int] | None = None,
    snapshot: str | None = None,
    progress: Progress = silent,
) -> PlanFacts:
    """The facts of a plan over `source`: a copy of the bucket, a mirror of oa_package, an https address, a table.

    Over the network, the newest inventory (or that of `snapshot`) and the metadata it lists are kept beside `out` as
    `.inventory.parquet` and `.articles.parquet`, so an interrupted plan goes on where it was. `only` as in `make_plan`.
    Raises DataError where the source is neither.
    """
    out = Path(out)
    if source.startswith(("https://", "http://")):
        with Client(check_config({"endpoint": source}, ClientConfig, source)) as client:
            inventory = read_inventory(client, out.with_suffix(".inventory.parquet"), snapshot=snapshot)
            table = out.with_suffix(".articles.parquet")
            crawl_articles(client, inventory, table, progress=progress)
        return make_plan(table, out, config, only=only)
    root = Path(source)
    if root.is_file():
        return make_plan(root, out, config, only=only)
    is_mirror = kind_of_source(source) == "packages"
    return make_plan(OaPackages(root) if is_mirror else LocalBucket(root), out, config, only=only, snapshot=snapshot)


def plan_facts(path: str | Path) -> PlanFacts:
    """What a plan says of itself. Raises DataError where `path` is no plan."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        stored = pq.read_schema(path).metadata or {}
        return PlanFacts(**json.loads(stored[PLAN_KEY]))
    except FileNotFoundError:
        raise DataError(path, "there is no such file", todo="make one with: biomedclip data plan") from None
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError):
        raise DataError(path, "is no plan", todo="make one with: biomedclip data plan") from None


def read_plan(path: str | Path, units: Iterable[int] | None = None) -> Iterator[ArticleRecord]:
    """The planned records of some units, or of all, sorted by PMC id; a unit is read without those before it."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    facts = plan_facts(path)
    units_per_group = facts.rows_per_group // facts.config["unit_size"]
    wanted = range(facts.units) if units is None else sorted(set(units))
    strangers = [unit for unit in wanted if not 0 <= unit < facts.units] if units is not None else []
    if strangers:
        raise DataError(path, f"has units 0 to {facts.units - 1}", found=strangers[0], todo="name one of these")
    units_wanted = pa.array(wanted, pa.int32())
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for group in sorted({unit // units_per_group for unit in wanted}):
            for batch in file.iter_batches(2_000, row_groups=[group], use_threads=False):
                # A group holds many units: only the rows of those asked for become Python objects.
                for row in batch.filter(pc.is_in(batch["unit"], units_wanted)).to_pylist():
                    item = item_of_row(row)
                    if isinstance(item, ArticleRecord):
                        yield item


def read_exclusions(path: str | Path) -> Iterator[Drop]:
    """A Drop for every row that the plan leaves out, in the order of the source."""
    import pyarrow.parquet as pq

    facts = plan_facts(path)
    first = -(-facts.planned // facts.rows_per_group)
    columns = ["article_id", "item", "reason", "detail"]
    with pq.ParquetFile(path, pre_buffer=False) as file:
        groups = list(range(first, file.metadata.num_row_groups))
        for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns, use_threads=False):
            for row in batch.to_pylist():
                item = item_of_row(row)
                if isinstance(item, Drop):
                    yield item


class PlannedSource:
    """A source that yields what a plan says, and reads the files from where the plan was made of.

    With `units` it holds these units alone; without, all of them and then a Drop for every excluded row.
    """

    def __init__(self, plan: str | Path, source: Source, units: Iterable[int] | None = None) -> None:
        self.plan, self.source = Path(plan), source
        self.units = None if units is None else tuple(units)

    def records(self) -> Iterator[ArticleRecord | Drop]:
        """The planned records, without a request for metadata."""
        yield from read_plan(self.plan, self.units)
        if self.units is None:
            yield from read_exclusions(self.plan)

    def read(self, file: SourceFile) -> bytes:
        """The bytes of a file. Raises BadFile as the source does."""
        return self.source.read(file)


def _count(codes: np.ndarray, columns: Columns) -> dict[str, int]:
    import numpy as np

    counts = np.bincount(codes[codes > 0], minlength=len(REASONS) + 1)
    found = {reason: int(counts[number]) for number, reason in enumerate(REASONS, start=1) if counts[number]}
    return found | dict(sorted(columns.drop_reasons.items()))


def _write(articles: Path, out: Path, codes: np.ndarray, facts: PlanFacts, unit_size: int) -> None:
    """Planned rows with their unit first, in row groups of whole units; then the excluded ones with their reason."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = table_schema().append(pa.field("unit", pa.int32()))
    stored = schema.with_metadata({PLAN_KEY: json.dumps(asdict(facts)).encode()})
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["licence", "reason", "unit"]}
    units = np.cumsum(codes == 0, dtype=np.int64) - 1
    units //= unit_size
    with write_atomic(out) as file, pq.ParquetWriter(file, stored, **options) as writer:
        waiting: list[pa.Table] = []
        for start, batch in _scan(articles, table_schema().names):
            chosen = codes[start : start + batch.num_rows] == 0
            unit = pa.array(units[start : start + batch.num_rows].astype(np.int32))
            waiting.append(pa.Table.from_batches([batch]).append_column("unit", unit).filter(pa.array(chosen)))
            waiting = _write_groups(writer, waiting, facts.rows_per_group)
        if sum(table.num_rows for table in waiting):
            writer.write_table(pa.concat_tables(waiting), row_group_size=facts.rows_per_group)
        narrow = [name for name in table_schema().names if name not in _WIDE]
        reasons = pa.array([None, *REASONS])
        for start, batch in _scan(articles, narrow):
            excluded = _excluded(batch, codes[start : start + batch.num_rows], reasons, schema)
            if excluded.num_rows:
                writer.write_table(excluded)


def _scan(path: Path, names: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    import pyarrow.parquet as pq

    start = 0
    # Without buffering ahead, which for a scan of all rows means to hold the whole file.
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(_GROUP_ROWS, columns=names, use_threads=False):
            yield start, batch
            start += batch.num_rows


def _write_groups(writer: Any, waiting: list[pa.Table], rows: int) -> list[pa.Table]:
    """Write as many whole row groups as there are rows for; returns the rest."""
    import pyarrow as pa

    total = sum(table.num_rows for table in waiting)
    if total < rows:
        return waiting
    table = pa.concat_tables(waiting)
    for start in range(0, total - total % rows, rows):
        writer.write_table(table.slice(start, rows), row_group_size=rows)
    # A copy: a slice would keep all that was written alive.
    rest = table.slice(total - total % rows)
    return [rest.take(pa.array(range(rest.num_rows)))] if rest.num_rows else []


def _excluded(batch: pa.RecordBatch, codes: np.ndarray, reasons: pa.Array, schema: pa.Schema) -> pa.Table:
    """The rows of a batch that are not planned, with a reason each and without their wide columns."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    table = pa.Table.from_batches([batch]).filter(pa.array(codes != 0))
    numbers = pa.array(np.maximum(codes[codes != 0], 0))
    reason = pc.coalesce(table.column("reason"), reasons.take(numbers))
    columns = []
    for field in schema:
        if field.name == "reason":
            columns.append(reason)
        elif field.name in table.schema.names:
            columns.append(table.column(field.name))
        else:
            columns.append(pa.nulls(table.num_rows, field.type))
    return pa.table(columns, schema=schema)
