"""A frozen plan and a source to a folder of units: every planned article fetched once, its figures kept or dropped.

Reads a plan (`pmc.plan`) and the articles it names, from the bucket, a copy of it or a mirror of oa_package; writes one
unit (`data_builders.units`) for each unit of the plan, and one named `plan` for the rows that the plan left out, so
that seen == kept + dropped over everything. `harvest.json` says what the folder is the harvest of; the same plan and
config go on where they were, any other is refused. The source is no part of that: the plan holds the checksums, so
where bytes come from changes nothing. Units are claimed by locks, so any number of processes and machines may share a
folder. Failures that another day may not meet again are rows of the ledger, which `retry_failed` turns into deltas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

from biomedclip.config import check_config
from biomedclip.errors import ConfigError, DataError
from biomedclip.files import explain_full_disk
from biomedclip.progress import Progress, silent
from biomedclip.schema import Article, Drop, Pair
from data_builders.build import resolve_root
from data_builders.engines import check_engine, run_tasks
from data_builders.pmc.catalog import ArticleRecord, BadFile, LocalBucket, Source
from data_builders.pmc.client import RETRYABLE_REASONS, Client, ClientConfig
from data_builders.pmc.harvest_folder import claim_harvest, committed_unit, describe_harvest, hold_unit, unit_records
from data_builders.pmc.look_ahead import read_ahead
from data_builders.pmc.mend import Mend, failed_articles
from data_builders.pmc.pairs import PmcRules, article_pairs
from data_builders.pmc.plan import PlanFacts, plan_facts, read_exclusions, read_plan
from data_builders.pmc.sources import CloudBucket, OaPackages, kind_of_source
from data_builders.units import (
    HARVEST,
    PLAN_UNIT,
    UnitRecord,
    count_rows,
    delete_unit,
    read_unit,
    unit_name,
    write_unit,
)

_PROBED = 8


class HarvestConfig(PmcRules):
    """The rules of figures, and how the bucket is asked; the licence preset is the plan's and cannot be changed."""

    client: ClientConfig = ClientConfig()
    """For a source that is an address; its `endpoint` is that address. Never part of what the harvest is known by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarvestFacts:
    """Where a harvest stands, over all units that are in its folder."""

    units: int
    """Of the plan."""
    finished: int
    """Of those, in the folder."""
    left_to_others: tuple[str, ...]
    """Units of the slice that another process is building now."""
    articles: int
    kept: int
    dropped: dict[str, int]
    """Reason -> rows, with those that the plan left out; with `kept` they add up to `seen`."""
    retryable: int
    """Dropped rows that `retry_failed` would ask for anew."""
    retried: int
    """Units that this run looked at for failures."""

    @property
    def seen(self) -> int:
        """Figures, articles that could not be read, and articles that the plan left out."""
        return self.kept + sum(self.dropped.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What every task of a harvest needs; goes to worker processes."""

    plan: Path
    source: str
    out: Path
    config: HarvestConfig
    preset: str
    identity: dict[str, str]
    skips_locked: bool


def harvest(
    plan: str | Path,
    source: str,
    out: str | Path,
    config: HarvestConfig | None = None,
    *,
    engine: str = "local",
    workers: int = 1,
    unit_slice: tuple[int, int] = (0, 1),
    retry_failed: bool = False,
    progress: Progress = silent,
) -> HarvestFacts:
    """Where the harvest in `out` stands after all units of the slice are built, or their failures retried.

    A slice (i, n) has the units whose number leaves the remainder i when divided by n; slice 0 also takes the plan's
    exclusions into the ledger. Interrupted at any moment, it is run again and gives the same bytes. Raises ConfigError
    for a slice or engine that is none and where `out` holds another harvest, other files or is being written by
    somebody else; DataError where plan or source are missing or do not belong together, the host is gone or the disk
    is full.
    """
    config, plan, out = config or HarvestConfig(), Path(plan).resolve(), Path(out).resolve()
    facts = plan_facts(plan)
    check_engine(engine, workers)
    _check_slice(unit_slice)
    source = source if source.startswith(("https://", "http://")) else str(resolve_root(source).resolve())
    kind_of_source(source)
    rules = config.model_dump(mode="json", exclude={"client"})
    identity = describe_harvest(plan, rules, config.side_files(), facts)
    is_sliced = unit_slice[1] > 1
    job = _Job(
        plan=plan, source=source, out=out, config=config, preset=facts.config["licence"], skips_locked=is_sliced,
        identity={key: identity[key] for key in ("config_sha256", "plan_sha256")},
    )  # fmt: skip
    numbers = range(unit_slice[0], facts.units, unit_slice[1])
    with explain_full_disk(out), claim_harvest(out, identity, shared=is_sliced):
        try:
            if retry_failed:
                todo = [number for number in numbers if _failures(unit_records(out, number))]
                work, title = _retry_unit, "retrying units"
            else:
                todo = [number for number in numbers if committed_unit(out, unit_name(number)) is None]
                work, title = _build_unit, "harvesting units"
                if todo and len(todo) == len(numbers):
                    _probe(job, todo[0])
                if unit_slice[0] == 0:
                    _write_exclusions(job)
            left, kept = [], 0
            with progress(title, len(todo)) as advance:
                results = run_tasks(partial(work, job), todo, engine=engine, workers=workers, name=unit_name)
                for number, record in zip(todo, results, strict=True):
                    if record is None:
                        left.append(unit_name(number))
                    else:
                        kept += record.kept
                    advance(1, f"{kept:,} kept")
        finally:
            _open_packages.cache_clear()
    return _summarise(out, facts, left, retried=len(todo) if retry_failed else 0)


def parse_slice(text: str) -> tuple[int, int]:
    """`i/n` as two numbers. Raises ConfigError for anything else."""
    first, slash, second = text.partition("/")
    if not slash or not first.isdecimal() or not second.isdecimal():
        raise ConfigError("unit slice", "is not i/n", found=repr(text), todo="write, for example, 0/4 to 3/4")
    _check_slice((int(first), int(second)))
    return int(first), int(second)


def _check_slice(unit_slice: tuple[int, int]) -> None:
    number, count = unit_slice
    if not 0 <= number < count:
        raise ConfigError("unit slice", "i must be from 0 to n - 1", found=f"{number}/{count}",
                          todo="write, for example, 0/4 to 3/4")  # fmt: skip


def _probe(job: _Job, number: int) -> None:
    """Raise DataError where the source has none of the first articles: then it is not the plan's."""
    missing = 0
    records = list(islice(read_plan(job.plan, [number]), _PROBED))
    with _open_source(job) as source:
        for record in records:
            try:
                source.read(record.xml)
                return
            except BadFile as error:
                if error.reason != "missing_file":
                    return
                missing += 1
    raise DataError(job.source, f"has none of the first {missing} articles of the plan",
                    found=f"no {records[0].xml.key}", todo="name the source that the plan was made of")  # fmt: skip


def _write_exclusions(job: _Job) -> None:
    with hold_unit(job.out, PLAN_UNIT, or_skip=job.skips_locked) as is_ours:
        if is_ours and committed_unit(job.out, PLAN_UNIT) is None:
            write_unit(job.out, PLAN_UNIT, read_exclusions(job.plan), identity=job.identity)


def _build_unit(job: _Job, number: int) -> UnitRecord | None:
    """The record of one unit; None where another process builds it and the job may leave it to that one."""
    name = unit_name(number)
    with hold_unit(job.out, name, or_skip=job.skips_locked) as is_ours:
        if not is_ours:
            return None
        record = committed_unit(job.out, name)
        if record is not None:
            return record
        for delta in reversed(unit_records(job.out, number)):
            delete_unit(delta)  # what remains of a damaged unit, and the deltas that mended it
        with _open_source(job) as source:
            items = _read_articles(job, source, read_plan(job.plan, [number]))
            return write_unit(job.out, name, (i for group in items for i in group), identity=job.identity)


def _retry_unit(job: _Job, number: int) -> UnitRecord | None:
    """The delta of one unit, or its last record where a retry changed nothing; None as in `_build_unit`."""
    with hold_unit(job.out, unit_name(number), or_skip=job.skips_locked) as is_ours:
        if not is_ours:
            return None
        records = unit_records(job.out, number)
        failed = failed_articles(records, RETRYABLE_REASONS)
        wanted = (record for record in read_plan(job.plan, [number]) if record.article_id in failed)
        mend = Mend(failed)
        with _open_source(job) as source:
            mended = mend.items(_read_articles(job, source, wanted))
            first = next(mended, None)
            if first is None:
                return records[-1]
            items = (item for part in ((first,), mended) for item in part)
            name = unit_name(number, retry=len(records))
            return write_unit(job.out, name, items, identity=job.identity, supersedes=mend.supersedes)


def _read_articles(
    job: _Job, source: Source, records: Iterable[ArticleRecord]
) -> Iterator[Iterable[Article | Pair | Drop]]:
    """The items of each article in the order of the records."""
    read = partial(article_pairs, source=source, config=job.config, preset=job.preset)
    if isinstance(source, CloudBucket):
        return read_ahead(source.client, records, read)
    return map(read, records)


@contextmanager
def _open_source(job: _Job) -> Iterator[Source]:
    kind = kind_of_source(job.source)
    if kind == "cloud":
        settings = {**job.config.client.model_dump(), "endpoint": job.source}
        with Client(check_config(settings, ClientConfig, job.source)) as client:
            yield CloudBucket(client, ())
    elif kind == "packages":
        yield _open_packages(job.source)
    else:
        yield LocalBucket(job.source)


@lru_cache(maxsize=1)
def _open_packages(root: str) -> OaPackages:
    """Kept by each process: looking for the packages of a whole mirror takes longer than reading a unit of it."""
    return OaPackages(root)


def _failures(records: Iterable[UnitRecord]) -> int:
    """Rows of these units that a retry may mend."""
    return sum(count for reason, count in count_rows(records)[1].items() if reason in RETRYABLE_REASONS)


def _summarise(out: Path, facts: PlanFacts, left: list[str], *, retried: int) -> HarvestFacts:
    names = sorted(path.stem for path in out.glob("*.json") if path.name != HARVEST)
    records = [record for name in names if (record := read_unit(out, name)) is not None]
    bases = [record for record in records if record.base == record.name]
    kept, dropped = count_rows(records)
    return HarvestFacts(
        units=facts.units,
        finished=sum(record.name != PLAN_UNIT for record in bases),
        left_to_others=tuple(left),
        articles=sum(record.articles for record in bases),
        kept=kept,
        dropped=dict(Counter(dropped).most_common()),
        retryable=_failures(records),
        retried=retried,
    )
