"""Which samples a step of a run saw, and which steps saw an article: worked out from the run's plans, not logged.

Reads `plans.json` and the config in it, the indexes of the sources as they are now, and the ledger of samples that
could not be read; yields one line for each sample shown. The plan is inverted, so asking for one article among
millions looks at one window of each epoch. Samples taken back since the run are found too: their index rows stay.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from biomedclip.config import check_config
from biomedclip.errors import ConfigError, DataError
from biomedclip.runs import DONE, read_facts, read_metrics
from biomedclip.stream.ledger import Unreadable, read_unreadable
from biomedclip.stream.plan import Plan
from biomedclip.stream.rows import Rows, read_rows
from biomedclip.stream.tars import FetcherHere
from biomedclip.training.config import DataConfig
from biomedclip.training.plans import PlanRecord, read_plans, stream_sources

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One sample that was shown to the model."""

    step: int
    """From 0: the first batch is step 0."""
    slot: int
    """Place in the batch, over all processes."""
    source: str
    key: str
    article: str | None
    epoch: int
    instead_of: str | None = None
    """Key of the sample that the plan names, where that one could not be read."""
    reason: str | None = None
    """Why it could not."""


def seen_at(run_folder: str | Path, step: int) -> list[Seen]:
    """The samples of a step, by slot. Raises ConfigError for a step that the run did not do."""
    steps = steps_done(run_folder)
    if step >= steps:
        raise ConfigError(
            run_folder, f"did not do step {step}", found=f"{steps} steps, from 0", todo="ask for a lower one"
        )
    followed = next(plan for plan in reversed(_open_plans(run_folder)) if plan.record.first_step <= step)
    # A slot whose substitute could not be read either has several entries, all with the sample that was shown.
    replaced = {entry.slot: entry for entry in reversed(read_unreadable(run_folder)) if entry.step == step}
    return [followed.shown(step, slot, replaced.get(slot)) for slot in range(followed.plan.batch_size)]


def seen_of(run_folder: str | Path, *, article: str | None = None, key: str | None = None) -> list[Seen]:
    """Each time that a run showed a sample of an article (`PMC123` or `PMC123.1`), or one sample, in order.

    Raises DataError where none of the run's sources has such a sample.
    """
    steps, found, known = steps_done(run_folder), [], False
    entries = read_unreadable(run_folder)
    plans = _open_plans(run_folder)
    for number, followed in enumerate(plans):
        until = min(plans[number + 1].record.first_step, steps) if number + 1 < len(plans) else steps
        wanted = followed.rows_of(article, key)
        known = known or bool(wanted)
        own = [entry for entry in entries if followed.record.first_step <= entry.step < until]
        found += followed.seen(wanted, own, until)
    if not known:
        raise DataError(run_folder, "its sources have no such sample", found=article or key, todo="check the name")
    return sorted(found, key=lambda one: (one.step, one.slot))


def steps_done(run_folder: str | Path) -> int:
    """Steps that a run has finished, as far as its folder says. Raises ConfigError where it holds no training run."""
    folder = Path(run_folder)
    facts = read_facts(folder)
    if not facts or facts["kind"] != "train":
        raise ConfigError(folder, "holds no training run", todo="name a folder that `biomedclip train` wrote")
    if (folder / DONE).exists():
        return int(json.loads((folder / DONE).read_bytes())["steps"])
    logged = [int(row["step"] or 0) for row in read_metrics(folder)]
    saved = [int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")]
    return max([0, *logged, *saved])


@dataclass(frozen=True, slots=True)
class _Followed:
    """A plan of the run and the rows it speaks of."""

    record: PlanRecord
    plan: Plan
    rows: Sequence[Rows]

    def shown(self, step: int, slot: int, entry: Unreadable | None) -> Seen:
        picks = self.plan.picks(step)
        part, row, epoch = int(picks.sources[slot]), int(picks.rows[slot]), int(picks.epochs[slot])
        if entry is not None:
            row = int(_find_key(self.rows[part], entry.substitute)[0])
        return self._seen(step, slot, part, row, epoch, entry)

    def seen(self, wanted: dict[int, np.ndarray], entries: Sequence[Unreadable], until: int) -> list[Seen]:
        lost = {(entry.step, entry.slot): entry for entry in reversed(entries)}
        found = []
        for part, rows in wanted.items():
            keys = {self.rows[part].columns["key"][row]: row for row in rows.tolist()}
            for row in rows.tolist():
                for step, epoch in self.plan.steps_of(part, row, until):
                    slot = self._slot(step, part, row, epoch)
                    if (step, slot) not in lost:
                        found.append(self._seen(step, slot, part, row, epoch))
            for (step, slot), entry in lost.items():
                if entry.part == part and entry.substitute in keys:
                    epoch = int(self.plan.picks(step).epochs[slot])
                    found.append(self._seen(step, slot, part, keys[entry.substitute], epoch, entry))
        return found

    def rows_of(self, article: str | None, key: str | None) -> dict[int, np.ndarray]:
        """Part -> rows of the article, or of the key."""
        found = {}
        for part, rows in enumerate(self.rows):
            places = _find_key(rows, key) if key is not None else _find_article(rows, article or "")
            if len(places):
                found[part] = places
        return found

    def _slot(self, step: int, part: int, row: int, epoch: int) -> int:
        picks = self.plan.picks(step)
        return int(np.flatnonzero((picks.sources == part) & (picks.rows == row) & (picks.epochs == epoch))[0])

    def _seen(self, step: int, slot: int, part: int, row: int, epoch: int, entry: Unreadable | None = None) -> Seen:
        columns = self.rows[part].columns
        return Seen(step=step, slot=slot, source=self.rows[part].source.name, key=columns["key"][row],
                    article=columns["article_id"][row], epoch=epoch, instead_of=entry.key if entry else None,
                    reason=entry.reason if entry else None)  # fmt: skip


def _open_plans(run_folder: str | Path) -> list[_Followed]:
    """The plans of a run over the data of today. Raises ConfigError where it kept none, DataError for other data."""
    records = read_plans(run_folder)
    if not records:
        raise ConfigError(run_folder, "keeps no plan", todo="it was trained before plans were kept")
    opened: list[_Followed] = []
    for record in records:
        data = check_config(record.config["data"], DataConfig, f"{run_folder}: data")
        fetcher = FetcherHere(data.fetch)
        try:
            sources = stream_sources(data)
            withdrawn = {name: frozenset(keys) for name, keys in record.withdrawn.items()}
            rows, plan_sources, _ = read_rows(sources, data.size_exponent, fetcher, withdrawn=withdrawn)
        finally:
            fetcher.close()
        plan = Plan(plan_sources, batch_size=data.planned(record.config["batch_size"]), seed=record.config["seed"],
                    first_step=record.first_step)  # fmt: skip
        if plan.sha256 != record.sha256:
            raise DataError(run_folder, "its sources hold other samples than when it was trained",
                            todo="restore them where its plans.json says they were")  # fmt: skip
        opened.append(_Followed(record, plan, rows))
    return opened


def _find_article(rows: Rows, article: str) -> np.ndarray:
    """Rows of an article, of any version of it where none is named."""
    import pyarrow.compute as pc

    def of_article(names: pa.Array) -> pa.Array:
        return pc.or_(pc.equal(names, article), pc.starts_with(names, f"{article}."))

    return _find(rows, "article_id", of_article)


def _find_key(rows: Rows, key: str) -> np.ndarray:
    import pyarrow.compute as pc

    return _find(rows, "key", lambda keys: pc.equal(keys, key))


def _find(rows: Rows, column: str, is_wanted: Callable[[pa.Array], pa.Array]) -> np.ndarray:
    """Rows of a plan source for whose column something holds, from the index of all rows."""
    found, start = [np.zeros(0, dtype=np.int64)], 0
    for batch in rows.place.index.batches([column]):
        holds = is_wanted(batch[column]).fill_null(False).to_numpy(zero_copy_only=False)
        found.append(np.flatnonzero(holds) + start)
        start += len(batch)
    numbers = np.concatenate(found)
    if isinstance(rows.numbers, range):
        inside = (numbers >= rows.numbers.start) & (numbers < rows.numbers.stop)
        return numbers[inside] - rows.numbers.start
    return np.flatnonzero(np.isin(rows.numbers, numbers))
