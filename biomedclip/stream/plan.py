"""Which sample when: a pure function of the step, so that resuming needs nothing but the step.

Reads the sources (name, weight, and for each row the article it belongs to); yields for any step the rows of that
batch. Three decisions make it pure and exact:

* The slots of all batches form one endless line. A smooth weighted round robin deals them to the sources, so a batch
  holds each source's share to within one sample, what a batch could not give is carried to the next, and after
  `PATTERN` slots the shares are exact. How many slots a source got before step t is a table look-up.
* A source's n-th slot is entry n of its epochs laid end to end. Each epoch visits each row exactly once.
* Rows of one article are spread evenly over an epoch instead of being shuffled blindly: shards are written article by
  article, and two figures of one article in a batch are false negatives of each other. A batch is free of them where
  the article has no more rows than the epoch has batches.

The reader may expect random draws of the source: those make shares right on average only, and need a generator's
state to resume.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from biomedclip.errors import ConfigError
from biomedclip.files import sha256_json

PATTERN = 4096
"""Slots after which the shares are exact: weights are rounded to this many parts of the whole."""

_CACHED_EPOCHS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSource:
    """One source of samples: its share, and the article (or other group to keep apart) of each row."""

    name: str
    weight: float
    groups: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.groups)


@dataclass(frozen=True, slots=True)
class Pick:
    """One sample of a batch: row `row` of source `source`, seen for the `epoch`-th time (from 0)."""

    source: int
    row: int
    epoch: int


class Plan:
    """The samples of every batch. Raises ConfigError for no sources, an empty one, or weights that are not positive."""

    def __init__(self, sources: Sequence[PlanSource], *, batch_size: int, seed: int) -> None:
        if not sources:
            raise ConfigError("data.sources", "names no source", todo="add at least one")
        for source in sources:
            if not len(source):
                raise ConfigError(f"data.sources: {source.name}", "has no samples", todo="check its path and split")
            if not source.weight > 0:
                raise ConfigError(f"data.sources: {source.name}", "has no positive weight", found=source.weight)
        if batch_size < 1:
            raise ConfigError("batch_size", "must be at least 1", found=batch_size)
        self.sources, self.batch_size, self.seed = tuple(sources), batch_size, seed
        self._pattern = deal_slots([source.weight for source in sources])
        self._before = np.zeros((PATTERN + 1, len(sources)), dtype=np.int64)
        np.cumsum(self._pattern[:, None] == np.arange(len(sources)), axis=0, out=self._before[1:])
        self._orders: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def batch(self, step: int) -> tuple[Pick, ...]:
        """The `batch_size` samples of batch `step` (from 0), in slot order."""
        first = step * self.batch_size
        given = self.given(first)
        picks = []
        for slot in range(first, first + self.batch_size):
            source = int(self._pattern[slot % PATTERN])
            epoch, offset = divmod(int(given[source]), len(self.sources[source]))
            picks.append(Pick(source, int(self._order(source, epoch)[offset]), epoch))
            given[source] += 1
        return tuple(picks)

    def given(self, slots: int) -> np.ndarray:
        """(S,) how many of the first `slots` slots each source got."""
        rounds, rest = divmod(slots, PATTERN)
        return rounds * self._before[PATTERN] + self._before[rest]

    def substitute(self, pick: Pick, attempt: int) -> Pick:
        """Another sample of the same source in place of one that cannot be read; the same one on every run."""
        rows = len(self.sources[pick.source])
        draw = draw_int(self.seed, "substitute", self.sources[pick.source].name, pick.row, pick.epoch, attempt)
        return Pick(pick.source, (pick.row + 1 + draw % max(rows - 1, 1)) % rows, pick.epoch)

    @property
    def sha256(self) -> str:
        """Identity of the plan: a resumed run must have the same one, or its step numbers mean other samples."""
        sources = [[source.name, source.weight, list(source.groups)] for source in self.sources]
        return sha256_json({"sources": sources, "batch_size": self.batch_size, "seed": self.seed, "version": 1})

    def _order(self, source: int, epoch: int) -> np.ndarray:
        key = (source, epoch)
        if key not in self._orders:
            owner = self.sources[source]
            self._orders[key] = spread_rows(owner.groups, draw_int(self.seed, "order", owner.name, epoch))
            while len(self._orders) > _CACHED_EPOCHS * len(self.sources):
                self._orders.popitem(last=False)
        return self._orders[key]


def mixing_weights(weights: Sequence[float], sizes: Sequence[int], exponent: float) -> list[float]:
    """Weights of sources of so many samples, times size ** exponent: 0 leaves them, 1 makes them proportional to size.

    Between the two, small sources come up more often than their size says and less often than large ones (the
    temperature sampling of multilingual models: Conneau and Lample 2019, section 3.1).
    """
    return [weight * size**exponent for weight, size in zip(weights, sizes, strict=True)]


def deal_slots(weights: Sequence[float]) -> np.ndarray:
    """(PATTERN,) source of each slot: smooth weighted round robin over weights rounded to PATTERN parts.

    At each slot every source's credit grows by its share and the largest credit takes the slot, so any run of slots
    is within one of its exact share; the credits are back at zero after PATTERN slots.
    """
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * PATTERN
    parts = np.maximum(np.floor(exact), 1).astype(np.int64)
    for source in np.argsort(parts - exact, kind="stable")[: max(PATTERN - int(parts.sum()), 0)]:
        parts[source] += 1
    parts[np.argmax(parts)] += PATTERN - parts.sum()
    credit = np.zeros(len(parts), dtype=np.int64)
    slots = np.empty(PATTERN, dtype=np.int16)
    for slot in range(PATTERN):
        credit += parts
        slots[slot] = taken = int(np.argmax(credit))
        credit[taken] -= PATTERN
    return slots


def spread_rows(groups: Sequence[str | None], seed: int) -> np.ndarray:
    """(N,) a random order of the rows in which the rows of one group lie about N / (rows of the group) apart.

    Each group gets a random start on a circle and its rows, shuffled, even distances from there with a jitter of a
    quarter of that distance. A row without a group is a group of its own, so without groups this is a plain shuffle.
    """
    random = np.random.Generator(np.random.Philox(key=seed))
    _, ids = np.unique([f"g{g}" if g is not None else f"r{i}" for i, g in enumerate(groups)], return_inverse=True)
    shuffled = random.permutation(len(ids))
    by_group = shuffled[np.argsort(ids[shuffled], kind="stable")]
    sizes = np.bincount(ids)
    starts = np.repeat(np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes)
    size = np.repeat(sizes, sizes)
    rank = np.arange(len(ids)) - starts
    place = np.repeat(random.random(len(sizes)), sizes) + (rank + random.uniform(-0.125, 0.125, len(ids))) / size
    return by_group[np.argsort(place % 1.0, kind="stable")]


def draw_int(*facts: object) -> int:
    """A 64-bit number that depends on the facts alone: randomness without a state."""
    text = "\x1f".join(str(fact) for fact in facts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
