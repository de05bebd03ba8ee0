"""Batches of a plan in order, for whoever trains: sized, resumable, in this process or several.

Takes `biomedclip.stream.samples`, yields their batches step by step, whatever the number of reading processes. The
state is the number of batches delivered to the caller and the plan's identity, so it is the same on every process of a
run, and a checkpoint that holds only the first process's is complete. A reader may have read further, but what was not
delivered is read again. Parts of batches that come from sources without an index are joined to the planned ones; for
them the promise does not hold, which is the first thing the loader has to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

from biomedclip.errors import BiomedclipError, ConfigError, DataError
from biomedclip.files import sha256_json
from biomedclip.stream.ledger import Ledger, Unreadable
from biomedclip.stream.plan import Plan
from biomedclip.stream.rows import StreamSource
from biomedclip.stream.samples import MAX_ATTEMPTS, Samples
from biomedclip.stream.unindexed import UnindexedSamples, join_batches

__all__ = ["Samples", "StreamLoader", "StreamSource"]

PREFETCH = 4
"""Batches that each reading process holds ready."""


class StreamLoader:
    """Batches `start`, `start` + 1, ... of a run of `max_steps`; sized, and resumable by its state.

    Iterating continues where the state is, so `for batch in loader` after `load_state_dict` gives exactly the batches
    an uninterrupted run would have given next.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        max_steps: int,
        workers: int = 0,
        pin_memory: bool = False,
        unindexed: UnindexedSamples | None = None,
    ) -> None:
        self.samples, self.max_steps, self.workers, self.pin_memory = samples, max_steps, workers, pin_memory
        self.unindexed = unindexed
        samples.max_steps = max_steps
        self.delivered = 0
        self.ledger = Ledger()
        self._run_folder: Path | None = None
        self._continued: frozenset[str] = frozenset()
        self.last_bad: str | None = None
        self.notices: list[str] = []
        """What somebody should know once: samples that cannot be used, a cache that is off."""
        self.on_notice: Callable[[str], None] | None = None
        for place in {rows.source.name: rows.place for rows in samples.rows}.values():
            self._note(place.notice)
        for source in unindexed.sources if unindexed else ():
            self._note(source.notice)

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        samples = self.samples
        # Only now: Lightning says late which of how many processes this is.
        if self._run_folder:
            self.ledger = Ledger(self._run_folder, plan_sha256=self.plan_sha256, rank=samples.rank,
                                 world_size=samples.world_size)  # fmt: skip
            self.ledger.rewind(self.delivered)
        samples.passed_over = self.ledger.known
        for batch in self._batches():
            self._note(batch.pop("notice"))
            self._count(batch.pop("bad"), len(batch["key"]))
            # Counted before it is handed over: a state taken while the caller works on it includes it.
            self.delivered += 1
            yield batch

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Batches from the next step on, with the reading processes' notes."""
        settings: dict[str, Any] = dict(
            batch_size=None, num_workers=self.workers, prefetch_factor=PREFETCH if self.workers else None,
            collate_fn=_as_it_is, pin_memory=self.pin_memory,
        )  # fmt: skip
        steps = range(self.delivered, self.max_steps)
        if self.workers and steps:
            self.samples.warm(steps[0])
        planned: DataLoader[Any] = DataLoader(_Caught(self.samples), sampler=steps, **settings)
        if self.unindexed is None:
            return _raise_caught(planned)
        self.unindexed.first_step, self.unindexed.max_steps = self.delivered, self.max_steps
        other: DataLoader[Any] = DataLoader(_CaughtStream(self.unindexed), **settings)
        return map(join_batches, _raise_caught(planned), _raise_caught(other))

    def state_dict(self) -> dict[str, Any]:
        """Batches delivered, and the identity of the plan they came from."""
        return {"delivered": self.delivered, "plan_sha256": self.plan_sha256}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the state's batches. Raises ConfigError where the state is of another plan."""
        if state["plan_sha256"] not in {self.plan_sha256, *self._continued}:
            raise ConfigError(
                "data",
                "is not what the interrupted run read: sources, their tombstones, weights, batch size or seed differ",
                todo="restore the old values or start a new run folder",
            )  # fmt: skip
        self.delivered = int(state["delivered"])

    def follow(self, plan: Plan, continued: frozenset[str] = frozenset()) -> None:
        """Read this plan; the state of a plan in `continued` is gone on with too, by this one."""
        self.samples.plan, self._continued = plan, continued

    def keep_ledger(self, folder: str | Path) -> None:
        """Keep the unreadable samples in a run's folder; a resumed run passes over those it could not read before."""
        self._run_folder = Path(folder)

    @property
    def bad(self) -> Counter[str]:
        """Unreadable samples by source, each time one was met."""
        counts: Counter[str] = Counter()
        for (source, _), count in self.ledger.counts.items():
            counts[source] += count
        return counts

    @property
    def plan_sha256(self) -> str:
        """Identity of the plan that is read."""
        plan = self.samples.plan.sha256
        return sha256_json([plan, self.unindexed.sha256]) if self.unindexed else plan

    def _note(self, notice: str | None) -> None:
        if notice and notice not in self.notices:
            self.notices.append(notice)
            if self.on_notice:
                self.on_notice(notice)

    def _count(self, bad: Sequence[Unreadable], size: int) -> None:
        if not bad:
            return
        for entry in bad:
            if (entry.source, entry.reason) not in self.ledger.counts:
                self._note(f"{entry.source}: a sample cannot be read and is replaced, as others will be; the first "
                           f"({entry.reason}): {entry.detail}")  # fmt: skip
        self.ledger.add(bad)
        self.last_bad = bad[-1].detail
        count, seen = self.ledger.own, (self.delivered + 1) * size
        if count > max(self.samples.max_bad * seen, MAX_ATTEMPTS):
            reasons = ", ".join(f"{number} {reason}" for reason, number in self.ledger.by_reason.items())
            raise DataError(
                "data", f"{count:.0f} of {seen} samples cannot be read, more than {self.samples.max_bad:.0%}",
                found=f"{reasons}; last: {self.last_bad}",
                todo="rebuild the dataset, check the disk, or raise data.max_bad",
            )  # fmt: skip


class _Caught(Dataset[Any]):
    """Samples whose errors are handed over as values: of those that a reading process raises torch makes others."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, step: int) -> dict[str, Any] | BiomedclipError:
        try:
            return self.samples[step]
        except BiomedclipError as error:
            return error


class _CaughtStream(IterableDataset[Any]):
    """The same for a stream."""

    def __init__(self, samples: UnindexedSamples) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[dict[str, Any] | BiomedclipError]:
        try:
            yield from self.samples
        except BiomedclipError as error:
            yield error


def _raise_caught(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    try:
        for batch in batches:
            if isinstance(batch, BiomedclipError):
                raise batch
            yield batch
    except (RuntimeError, ConnectionResetError, EOFError) as error:
        # A dead process is noticed by torch's signal, or by its broken pipe where that comes first.
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise DataError(
            "data.workers", "a reading process died", found=str(error).partition("\n")[0][:200],
            todo="resume the run; if memory ran out, lower data.workers or data.cache_mb",
        ) from None  # fmt: skip


def _as_it_is(batch: Any) -> Any:
    return batch
