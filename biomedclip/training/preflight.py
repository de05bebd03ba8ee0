"""What a run will read, worked out before a GPU is taken: steps, coverage, exposure, bytes, requests and hours.

Reads the config and the indexes of its sources, never a pixel or a weight. What follows from the plan in closed form
(slots, epochs, different samples) is exact; what depends on which samples meet in a batch (classes, licences, articles
that meet, bytes, requests) is counted over all steps of a short run, and over `BLOCKS` stretches of a long one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biomedclip.errors import ConfigError
from biomedclip.runs import read_metrics
from biomedclip.stream.addresses import is_remote
from biomedclip.stream.fetch import Span, coalesce
from biomedclip.stream.mixture import weight_at
from biomedclip.stream.plan import Plan
from biomedclip.stream.rows import Rows, index_rows, read_rows
from biomedclip.stream.tars import FetcherHere
from biomedclip.training.config import TrainConfig
from biomedclip.training.plans import stream_sources, unindexed_sources

if TYPE_CHECKING:
    import pyarrow as pa

WALKED_SLOTS, BLOCKS = 200_000, 8
"""Samples whose index rows are looked at, and in how many stretches of steps of a run that has more."""

_COLUMNS = ("shard", "image_offset", "image_size", "text_offset", "text_size", "json_offset", "json_size",
            "num_captions", "labels", "modality", "licence")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceForecast:
    """What a run sees of one source."""

    name: str
    samples: int
    """That its config chooses."""
    share_first: float
    share_last: float
    """Of a batch, at the first and the last step."""
    shown: int
    distinct: int
    epochs: float
    """Times that each sample is seen; of a balanced source, the mean over its samples."""
    most_epochs: float
    """Of the part that is seen most often."""
    bytes_read: int
    """Of all samples shown; bytes of the members that are read."""
    remote: bool
    requests: int
    """Range requests of a source at a URL, without what the disk cache spares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A run before it is run. Percentages are of samples shown."""

    plan_sha256: str
    steps: int
    batch_size: int
    processes: int
    per_process: int
    """Samples of a step in each process."""
    shown: int
    walked_steps: int
    """Steps whose samples were looked at; what depends on them is extrapolated to all steps."""
    sources: tuple[SourceForecast, ...]
    same_article_pct: float
    """Samples that share their article with another sample of their batch."""
    same_caption_pct: float
    """Samples whose first caption another sample of their batch has too."""
    licences_pct: dict[str, float] = field(default_factory=dict)
    labels_pct: dict[str, float] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    """What is not known: sources without an index, of which nothing above speaks."""
    modalities_pct: dict[str, float] = field(default_factory=dict)
    samples_s: float | None = None
    hours: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The forecast as JSON-able values."""
        return asdict(self)


def forecast_run(config: TrainConfig, *, samples_s: float | None = None, out: str | Path | None = None) -> Forecast:
    """What a run of the config would read. `samples_s` is its speed; by default that of the run in the folder `out`.

    Raises what training would raise for sources that cannot be read, and ConfigError where the processes would not get
    equally many samples of each step.
    """
    processes = config.devices * config.num_nodes
    if config.batch_size % processes:
        raise ConfigError("batch_size", "is not a multiple of the number of processes",
                          found=f"{config.batch_size} for {processes}")  # fmt: skip
    fetcher = FetcherHere(config.data.fetch)
    try:
        sources = stream_sources(config.data)
        rows, plan_sources, _ = read_rows(sources, config.data.size_exponent, fetcher)
    finally:
        fetcher.close()
    planned = config.data.planned(config.batch_size)
    if planned % processes:
        raise ConfigError("batch_size", "leaves indexed sources no even share for each process",
                          found=f"{planned} samples for {processes}")  # fmt: skip
    plan = Plan(plan_sources, batch_size=planned, seed=config.seed)
    walk = _Walk(plan, rows, processes)
    stretches = _stretches(config.max_steps, planned)
    for stretch in stretches:
        walk.add(stretch)
    samples_s = samples_s or _measured_rate(out)
    shown = config.max_steps * config.batch_size
    return Forecast(
        plan_sha256=plan.sha256, steps=config.max_steps, batch_size=config.batch_size, processes=processes,
        per_process=config.batch_size // processes, shown=shown, walked_steps=sum(map(len, stretches)),
        sources=tuple(_source_forecasts(plan, rows, walk, config.max_steps)),
        same_article_pct=100 * walk.same_article / walk.shown, same_caption_pct=100 * walk.same_caption / walk.shown,
        licences_pct=_percent(walk.licences, walk.shown), labels_pct=_percent(walk.labels, walk.shown),
        modalities_pct=_percent(walk.modalities, walk.shown), samples_s=samples_s,
        hours=shown / samples_s / 3600 if samples_s else None,
        notices=tuple(source.notice for source in unindexed_sources(config.data)),
    )  # fmt: skip


class _Walk:
    """Counts over the batches that were looked at."""

    def __init__(self, plan: Plan, rows: list[Rows], processes: int) -> None:
        self._plan, self._rows, self._processes = plan, rows, processes
        self.shown = self.same_article = self.same_caption = 0
        self.licences: Counter[str] = Counter()
        self.labels: Counter[str] = Counter()
        self.modalities: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.of_source: Counter[str] = Counter()

    def add(self, steps: range) -> None:
        """Look at some batches. Raises RuntimeError where processes would not share one evenly: a defect of ours."""
        batches = [self._plan.picks(step) for step in steps]
        for step, picks in zip(steps, batches, strict=True):
            self._check_shares(step, len(picks))
            self.shown += len(picks)
            articles, captions = np.full((2, len(picks)), -1, dtype=np.int64)
            for source in np.unique(picks.sources).tolist():
                own = picks.sources == source
                articles[own], captions[own] = self._plan.sources[source].kin(picks.rows[own])
            self.same_article += _num_shared(articles)
            self.same_caption += _num_shared(captions)
        for source in range(len(self._rows)):
            own = [np.flatnonzero(picks.sources == source) for picks in batches]
            if any(len(slots) for slots in own):
                rows = np.concatenate([picks.rows[slots] for picks, slots in zip(batches, own, strict=True)])
                self._count(self._rows[source], rows, own)

    def _check_shares(self, step: int, size: int) -> None:
        slots = [range(size)[rank :: self._processes] for rank in range(self._processes)]
        if len({len(own) for own in slots}) != 1 or sorted(slot for own in slots for slot in own) != list(range(size)):
            raise RuntimeError(f"step {step} is not shared evenly by {self._processes} processes")

    def _count(self, rows: Rows, places: np.ndarray, slots: list[np.ndarray]) -> None:
        """Count the samples of one source; `slots` are theirs in each batch, in the order of `places`."""
        known = set(rows.place.index.schema.names)
        columns = [name for name in _COLUMNS if name in known]
        table = rows.place.index.take(index_rows(rows.numbers, places), columns)
        name = rows.source.name
        self.of_source[name] += len(places)
        unknown = ["unknown"] * len(places)
        self.licences.update(v or "unknown" for v in (table["licence"].to_pylist() if "licence" in known else unknown))
        self.modalities.update(value or "unknown" for value in table["modality"].to_pylist())
        self.labels.update(f"{name}: {label}" for labels in table["labels"].to_pylist() for label in labels or ())
        spans = _spans(table)
        self.bytes[name] += sum(stop - start for _, start, stop in spans)
        if _is_remote(rows):
            of_batch = iter(spans)
            for own in slots:
                found = [(slot % self._processes, next(of_batch)) for slot in own.tolist()]
                for rank in range(self._processes):
                    wanted = (Span(*span) for process, span in found if process == rank)
                    self.requests[name] += len(coalesce(wanted))


def _spans(table: pa.Table) -> list[tuple[str, int, int]]:
    """(shard, start, stop) of what is read of each row: from its first needed member to its last."""
    spans = []
    for row in table.to_pylist():
        members = ("image", "text", "json") if row["num_captions"] > 1 else ("image", "text")
        starts = [row[f"{member}_offset"] for member in members]
        stops = [row[f"{member}_offset"] + row[f"{member}_size"] for member in members]
        spans.append((row["shard"], min(starts), max(stops)))
    return spans


def _source_forecasts(plan: Plan, rows: list[Rows], walk: _Walk, steps: int) -> list[SourceForecast]:
    given = plan.mixture.before(steps)
    first, last = (_shares(plan, step) for step in (0, steps - 1))
    found = []
    for name in dict.fromkeys(part.source.name for part in rows):
        parts = [number for number, part in enumerate(rows) if part.source.name == name]
        samples, shown = sum(len(rows[n]) for n in parts), int(sum(given[n] for n in parts))
        scale = shown / walk.of_source[name] if walk.of_source[name] else 0.0
        found.append(
            SourceForecast(
                name=name, samples=samples, share_first=float(first[parts].sum()), share_last=float(last[parts].sum()),
                shown=shown, distinct=sum(plan.distinct_before(steps, n) for n in parts), epochs=shown / samples,
                most_epochs=max(given[n] / len(rows[n]) for n in parts), bytes_read=round(walk.bytes[name] * scale),
                remote=_is_remote(rows[parts[0]]), requests=round(walk.requests[name] * scale),
            )
        )  # fmt: skip
    return found


def _shares(plan: Plan, step: int) -> np.ndarray:
    weights = np.array([weight_at(source.weight, step) for source in plan.sources])
    shares: np.ndarray = weights / weights.sum()
    return shares


def _is_remote(rows: Rows) -> bool:
    return is_remote(rows.place.base) or any(map(is_remote, rows.place.shards))


def _stretches(steps: int, batch_size: int) -> list[range]:
    """Steps to look at: all of a short run, `BLOCKS` stretches of a long one."""
    wanted = max(WALKED_SLOTS // batch_size, BLOCKS)
    if steps <= wanted:
        return [range(steps)]
    length = wanted // BLOCKS
    return [range(start, start + length) for start in np.linspace(0, steps - length, BLOCKS).astype(int).tolist()]


def _num_shared(ids: np.ndarray) -> int:
    """How many of the ids of at least 0 occur more than once."""
    _, counts = np.unique(ids[ids >= 0], return_counts=True)
    return int(counts[counts > 1].sum())


def _percent(counts: Counter[str], whole: int) -> dict[str, float]:
    return {name: 100 * count / whole for name, count in counts.most_common()}


def _measured_rate(out: str | Path | None) -> float | None:
    """Median samples per second that a run logged."""
    rates = sorted(rate for row in (read_metrics(out) if out else []) if (rate := row.get("samples_s")))
    return rates[len(rates) // 2] if rates else None
