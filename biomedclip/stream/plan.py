"""Which sample when: a pure function of the step, so that resuming needs nothing but the step.

Reads the sources (weight, how their rows lie in shards, which rows are kin) and yields for any step the rows of that
batch. Three decisions make it pure and exact:

* The slots of all batches form one endless line, dealt to the sources by `biomedclip.stream.mixture`: how many slots a
  source had before a step is a closed form of the step.
* A source's n-th slot is entry n of its epochs laid end to end. Each epoch visits each of its rows exactly once
  (`biomedclip.stream.members` says which those are where there are caps).
* The order of an epoch is worked out window by window (`biomedclip.stream.order`), with kin kept apart by more than a
  batch, so that neither resuming nor a batch needs more than the index of one window.

The reader may expect random draws of the source: those make shares right on average only, and need a generator's
state to resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from biomedclip.errors import ConfigError
from biomedclip.files import sha256_json
from biomedclip.stream.members import Caps, Members
from biomedclip.stream.mixture import Mixture, Weight
from biomedclip.stream.order import WINDOW_ROWS, WINDOW_SHARDS, Kin, Order

_VERSION = 2
"""Raised where the same config would give other samples: runs begun before cannot be resumed then."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanSource:
    """One source of samples, as far as the plan needs it."""

    name: str
    weight: Weight
    bounds: np.ndarray
    """(S + 1,) rows where its shards begin, and the number of rows."""
    kin: Callable[[np.ndarray], Kin]
    """What the given rows must be kept apart by: an id of the article, of the caption; -1 for none."""
    content: str
    """Identity of the rows: other samples, or in another order, have another one."""
    caps: Caps | None = None
    keep: np.ndarray | None = None
    """(N,) probability that an epoch visits the row."""

    def __len__(self) -> int:
        return int(self.bounds[-1])


@dataclass(frozen=True, slots=True)
class Pick:
    """One sample of a batch: row `row` of source `source`, seen for the `epoch`-th time (from 0)."""

    source: int
    row: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Picks:
    """A batch as columns (B,), in slot order."""

    sources: np.ndarray
    rows: np.ndarray
    epochs: np.ndarray

    def __iter__(self) -> Iterator[Pick]:
        return map(Pick, self.sources.tolist(), self.rows.tolist(), self.epochs.tolist())

    def __len__(self) -> int:
        return len(self.sources)


class Plan:
    """The samples of every batch. Raises ConfigError for no sources, an empty one, or weights that are not positive.

    `first_step` is the step at which this plan took over from another one; its epochs begin there.
    """

    def __init__(self, sources: Sequence[PlanSource], *, batch_size: int, seed: int, first_step: int = 0) -> None:
        if not sources:
            raise ConfigError("data.sources", "names no source", todo="add at least one")
        for source in sources:
            if not len(source):
                raise ConfigError(f"data.sources: {source.name}", "has no samples", todo="check its path and split")
        if batch_size < 1:
            raise ConfigError("batch_size", "must be at least 1", found=batch_size)
        self.sources, self.batch_size, self.seed, self.first_step = tuple(sources), batch_size, seed, first_step
        self.mixture = Mixture({s.name: s.weight for s in sources}, batch_size=batch_size, first_step=first_step)
        self.members = tuple(
            Members(s.name, len(s), seed=self._draw("members", s.name), caps=s.caps, keep=s.keep) for s in sources
        )
        self._orders = tuple(self._order(number) for number in range(len(sources)))

    def batch(self, step: int) -> tuple[Pick, ...]:
        """The `batch_size` samples of batch `step`, in slot order."""
        return tuple(self.picks(step))

    def picks(self, step: int) -> Picks:
        """The samples of batch `step` as columns."""
        sources, ordinals = self.mixture.deal(step)
        rows, epochs = np.empty_like(ordinals), np.empty_like(ordinals)
        for source in np.unique(sources).tolist():
            slots = np.flatnonzero(sources == source)
            done = 0
            while done < len(slots):
                epoch, place = self.members[source].locate(int(ordinals[slots[done]]))
                found = self._orders[source].rows(epoch, place, len(slots) - done)
                part = slots[done : done + len(found)]
                rows[part], epochs[part] = found, epoch
                done += len(found)
        return Picks(sources, rows, epochs)

    def given(self, slots: int) -> np.ndarray:
        """(S,) how many of the first `slots` slots, a multiple of the batch size, each source got."""
        return self.mixture.before(self.first_step + slots // self.batch_size)

    def epochs_before(self, step: int, source: int) -> float:
        """Epochs of a source in the batches before `step`, the part of the last one as a fraction."""
        ordinal = int(self.mixture.before(step)[source])
        if not ordinal:
            return 0.0
        epoch, place = self.members[source].locate(ordinal)
        return epoch + place / max(self.members[source].before(epoch + 1) - self.members[source].before(epoch), 1)

    def distinct_before(self, step: int, source: int) -> int:
        """Different rows of a source in the batches before `step`."""
        members, order = self.members[source], self._orders[source]
        epoch, place = members.locate(int(self.mixture.before(step)[source]))
        if self.sources[source].caps is None and self.sources[source].keep is None:
            return len(self.sources[source]) if epoch else place
        seen = np.zeros(len(self.sources[source]), dtype=np.bool_)
        for earlier in range(epoch):
            seen[np.asarray(members.rows(earlier))] = True
            if seen.all():
                return len(seen)
        done = 0
        while done < place:
            rows = order.rows(epoch, done, place - done)
            seen[rows] = True
            done += len(rows)
        return int(seen.sum())

    def steps_of(self, source: int, row: int, until: int) -> list[tuple[int, int]]:
        """(step, epoch) of each time that a batch before step `until` holds the row, ascending."""
        found: list[tuple[int, int]] = []
        given = int(self.mixture.before(max(until, self.first_step))[source])
        epoch = 0
        while self.members[source].before(epoch) < given:
            place = self._orders[source].place(epoch, row)
            if place is not None:
                step = self.mixture.step_of(source, self.members[source].before(epoch) + place, until)
                if step is not None:
                    found.append((step, epoch))
            epoch += 1
        return found

    def substitute(self, pick: Pick, attempt: int) -> Pick:
        """Another sample of the same source in place of one that cannot be read; the same one on every run."""
        rows = len(self.sources[pick.source])
        draw = draw_int(self.seed, "substitute", self.sources[pick.source].name, pick.row, pick.epoch, attempt)
        return Pick(pick.source, (pick.row + 1 + draw % max(rows - 1, 1)) % rows, pick.epoch)

    @cached_property
    def sha256(self) -> str:
        """Identity of the plan: a resumed run must have the same one, or its step numbers mean other samples."""
        sources = [
            [s.name, sorted(s.weight.items()) if not isinstance(s.weight, int | float) else float(s.weight), s.content,
             _digest(s.bounds), _digest(s.keep), *((_digest(s.caps.groups), _digest(s.caps.taken)) if s.caps else ())]
            for s in self.sources
        ]  # fmt: skip
        facts = {"version": _VERSION, "window": [WINDOW_ROWS, WINDOW_SHARDS], "batch_size": self.batch_size,
                 "seed": self.seed, "first_step": self.first_step, "sources": sources}  # fmt: skip
        return sha256_json(facts)

    def restarted(self, first_step: int) -> Plan:
        """The same plan, its epochs beginning anew at a step."""
        return Plan(self.sources, batch_size=self.batch_size, seed=self.seed, first_step=first_step)

    def _draw(self, *facts: object) -> int:
        return draw_int(self.seed, *facts, *((self.first_step,) if self.first_step else ()))

    def _order(self, number: int) -> Order:
        source = self.sources[number]
        return Order(self.members[number], source.bounds, source.kin, partial(self._draw, source.name),
                     apart=self.mixture.most_per_batch(number))  # fmt: skip


def draw_int(*facts: object) -> int:
    """A 64-bit number that depends on the facts alone: randomness without a state."""
    text = "\x1f".join(str(fact) for fact in facts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _digest(values: np.ndarray | None) -> str | None:
    return None if values is None else hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
