"""The order in which an epoch of a source visits its rows: shuffled within windows of shards, kin kept apart.

Reads how the rows lie in shards and what each row must be kept apart from (its article, its caption); yields the row
at any place of any epoch. An epoch deals its shards, in random order, to windows of at least `WINDOW_SHARDS` shards
and `WINDOW_ROWS` rows, and shuffles rows within a window only: so the order at one place takes the index of one window
to work out, not of all 24 million rows, and the bytes of a window come from a bounded set of shards.

Shards are written article by article, and two figures of one article in a batch are false negatives of each other.
Within a window the rows of an article are therefore spread evenly, and what is still too near is swapped with a random
row elsewhere that fits. `apart` is the distance to keep: the most samples that the source ever has in one batch. An
article or caption with more rows than the window has batches cannot be kept apart; it is spread, and left. Where one
epoch ends and the next begins the same rows could meet, so the beginning is fitted to the end before it. Two windows of
one epoch are not fitted to each other: they share next to nothing, and knowing both would double the time to resume.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from biomedclip.stream.members import Members

WINDOW_ROWS = 320_000
WINDOW_SHARDS = 32

MAX_REPAIRS = 20_000
"""Rows of a window that are swapped at most; a set of mostly copies would take minutes otherwise."""

_TRIES = 32
_HELD_WINDOWS = 4

Kin = tuple[np.ndarray, ...]
"""(N,) int64 each: an article, a caption, … of each row; rows of equal number are kept apart, -1 is kin to none."""


@dataclass(frozen=True, slots=True)
class EpochWindows:
    """How one epoch is cut: the shards of each window, and the places where windows begin, the end last."""

    members: np.ndarray | range
    edges: np.ndarray
    """(S + 1,) where the members of each shard begin in `members`."""
    shards: tuple[np.ndarray, ...]
    starts: np.ndarray

    def rows(self, window: int) -> np.ndarray:
        """Rows of a window, shard by shard."""
        parts = [self.members[self.edges[shard] : self.edges[shard + 1]] for shard in self.shards[window]]
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


@dataclass(frozen=True, slots=True)
class _Window:
    """A window in its own order: rows and their kin."""

    rows: np.ndarray
    kin: Kin


class Order:
    """Rows of one source by epoch and place. `bounds` (S + 1,) are the rows where its shards begin, the end last."""

    def __init__(
        self, members: Members, bounds: np.ndarray, kin: Callable[[np.ndarray], Kin], draw: Callable[..., int],
        *, apart: int,
    ) -> None:  # fmt: skip
        self.members, self._bounds, self._kin, self._draw, self._apart = members, bounds, kin, draw, apart
        self._epochs: OrderedDict[int, EpochWindows] = OrderedDict()
        self._own: OrderedDict[tuple[int, int], _Window] = OrderedDict()
        self._final: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def rows(self, epoch: int, place: int, count: int) -> np.ndarray:
        """At most `count` rows, at least one, from a place of an epoch on: as far as its window goes."""
        cut = self.windows(epoch)
        window = int(np.searchsorted(cut.starts, place, side="right")) - 1
        first = place - int(cut.starts[window])
        return self.window(epoch, window)[first : first + count]

    def place(self, epoch: int, row: int) -> int | None:
        """Where in an epoch a row comes; None where the epoch leaves it out."""
        cut = self.windows(epoch)
        member = row if isinstance(cut.members, range) else int(np.searchsorted(cut.members, row))
        if member >= len(cut.members) or cut.members[member] != row:
            return None
        shard = int(np.searchsorted(cut.edges, member, side="right")) - 1
        window = next(number for number, shards in enumerate(cut.shards) if shard in shards)
        return int(cut.starts[window]) + int(np.flatnonzero(self.window(epoch, window) == row)[0])

    def windows(self, epoch: int) -> EpochWindows:
        """The cut of an epoch."""
        if epoch not in self._epochs:
            members = self.members.rows(epoch)
            edges = self._bounds if isinstance(members, range) else np.searchsorted(members, self._bounds)
            shards = cut_windows(np.diff(edges), self._draw("windows", epoch))
            sizes = [int((edges[part + 1] - edges[part]).sum()) for part in shards]
            starts = np.concatenate([[0], np.cumsum(sizes)])
            _remember(self._epochs, epoch, EpochWindows(members, edges, shards, starts), 3)
        return self._epochs[epoch]

    def window(self, epoch: int, window: int) -> np.ndarray:
        """Rows of a window in the order in which they are seen."""
        key = (epoch, window)
        if key not in self._final:
            own, before = self._own_order(epoch, window), self._epoch_end(epoch - 1) if window == 0 else None
            rows = own.rows
            if before is not None:
                rows = join_windows(before.rows, before.kin, own.rows, own.kin, apart=self._apart,
                                    seed=self._draw("join", epoch))  # fmt: skip
            _remember(self._final, key, rows, _HELD_WINDOWS)
        else:
            self._final.move_to_end(key)
        return self._final[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_own": OrderedDict(), "_final": OrderedDict()}

    def _epoch_end(self, epoch: int) -> _Window | None:
        """The last rows of an epoch, in the order that they keep whatever comes before them."""
        while epoch >= 0 and not len(self.windows(epoch).members):
            epoch -= 1
        if epoch < 0:
            return None
        whole = self._own_order(epoch, len(self.windows(epoch).shards) - 1)
        first = max(len(whole.rows) - max(self._apart - 1, 0), 0)
        return _Window(whole.rows[first:], tuple(ids[first:] for ids in whole.kin))

    def _own_order(self, epoch: int, window: int) -> _Window:
        key = (epoch, window)
        if key not in self._own:
            rows = self.windows(epoch).rows(window)
            kin = self._kin(rows)
            order = arrange(kin, len(rows), apart=self._apart, seed=self._draw("order", epoch, window))
            _remember(self._own, key, _Window(rows[order], tuple(ids[order] for ids in kin)), _HELD_WINDOWS)
        return self._own[key]


def cut_windows(sizes: np.ndarray, seed: int) -> tuple[np.ndarray, ...]:
    """Shards, in random order, dealt to windows of about equal rows; as many windows as can be large enough."""
    shards = np.random.Generator(np.random.Philox(key=seed)).permutation(len(sizes))
    shards = shards[sizes[shards] > 0]
    number = max(min(int(sizes.sum()) // WINDOW_ROWS, len(shards) // WINDOW_SHARDS), 1)
    ends = np.cumsum(sizes[shards])
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, number) / number) + 1 if number > 1 else []
    return tuple(part for part in np.split(shards, cuts) if len(part))


def arrange(kin: Kin, size: int, *, apart: int, seed: int) -> np.ndarray:
    """(N,) a random order of N rows in which kin are at least `apart` places from each other, as far as can be."""
    random = np.random.Generator(np.random.Philox(key=seed))
    if not kin:
        return random.permutation(size)
    groups = kin[0].copy()
    bound = [drop_frequent(ids, apart) for ids in kin]
    for ids in bound[1:]:
        # A row without an article is spread with its caption, as long as that can be kept apart.
        groups = np.where((groups < 0) & (ids >= 0), ids ^ (1 << 62), groups)
    order = spread_rows(groups, random)
    return order[separate(tuple(ids[order] for ids in bound), 0, apart, 0, size, random)]


def join_windows(
    before: np.ndarray, before_kin: Kin, rows: np.ndarray, kin: Kin, *, apart: int, seed: int
) -> np.ndarray:
    """The rows of an epoch's first window, its beginning changed so that it fits the end of the epoch before.

    The last `apart` rows stay where they are: what comes after this window was fitted to them.
    """
    fixed = len(before)
    low, high = fixed + apart, fixed + len(rows) - apart
    if high - low < apart // 2 or not apart:
        return rows
    random = np.random.Generator(np.random.Philox(key=seed))
    # The last rows of an epoch may also be among the first of the next one.
    pairs = zip((before, *before_kin), (rows, *kin), strict=True)
    joined = tuple(drop_frequent(np.concatenate(pair), apart) for pair in pairs)
    order = separate(joined, fixed, apart, low, high, random)
    ordered: np.ndarray = np.concatenate([before, rows])[order][fixed:]
    return ordered


def separate(kin: Kin, fixed: int, apart: int, low: int, high: int, random: np.random.Generator) -> np.ndarray:
    """(N,) the identity with swaps after which kin are `apart` places from each other, as far as tries find a place.

    The first `fixed` places stay; a row that is too near to kin changes places with one of [low, high).
    """
    size = len(kin[0]) if kin else 0
    order, now = np.arange(size), [ids.copy() for ids in kin]
    too_near = [place for place in find_too_near(now, apart) if place >= fixed][:MAX_REPAIRS]

    def fits(row: int, place: int, leaving: int) -> bool:
        start = max(place - apart + 1, 0)
        for ids, original in zip(now, kin, strict=True):
            own = original[row]
            if own >= 0:
                near = np.flatnonzero(ids[start : place + apart] == own) + start
                if any(other not in (place, leaving) for other in near.tolist()):
                    return False
        return True

    for place in too_near:
        if fits(order[place], place, place):
            continue  # an earlier swap took its kin away
        for other in random.integers(low, high, _TRIES).tolist() if high > low else ():
            if fits(order[other], place, other) and fits(order[place], other, place):
                order[[place, other]] = order[[other, place]]
                for ids in now:
                    ids[[place, other]] = ids[[other, place]]
                break
    return order


def find_too_near(kin: Sequence[np.ndarray], apart: int) -> list[int]:
    """Places with kin fewer than `apart` places before them, ascending."""
    found: set[int] = set()
    for ids in kin:
        places = np.flatnonzero(ids >= 0)
        places = places[np.argsort(ids[places], kind="stable")]
        near = (ids[places[1:]] == ids[places[:-1]]) & (places[1:] - places[:-1] < apart)
        found.update(places[1:][near].tolist())
    return sorted(found)


def drop_frequent(ids: np.ndarray, apart: int) -> np.ndarray:
    """The ids, -1 for those with more rows than there are stretches of `apart` rows to put them into."""
    known = ids >= 0
    _, inverse, counts = np.unique(ids[known], return_inverse=True, return_counts=True)
    kept = ids.copy()
    kept[known] = np.where(counts[inverse] * apart > len(ids), -1, ids[known])
    return kept


def spread_rows(groups: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(N,) a random order of the rows in which the rows of one group lie about N / (rows of the group) apart.

    Each group gets a random start on a circle and its rows, shuffled, even distances from there with a jitter of a
    quarter of that distance. A row without a group (below 0) is a group of its own: without groups, a plain shuffle.
    """
    alone = np.flatnonzero(groups < 0)
    ids = np.empty(len(groups), dtype=np.int64)
    _, ids[groups >= 0] = np.unique(groups[groups >= 0], return_inverse=True)
    ids[alone] = np.arange(len(alone)) + len(groups)
    _, ids = np.unique(ids, return_inverse=True)
    shuffled = random.permutation(len(ids))
    by_group = shuffled[np.argsort(ids[shuffled], kind="stable")]
    sizes = np.bincount(ids)
    starts = np.repeat(np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes)
    size = np.repeat(sizes, sizes)
    rank = np.arange(len(ids)) - starts
    place = np.repeat(random.random(len(sizes)), sizes) + (rank + random.uniform(-0.125, 0.125, len(ids))) / size
    order: np.ndarray = by_group[np.argsort(place % 1.0, kind="stable")]
    return order


def _remember(held: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    held[key] = value
    while len(held) > most:
        held.popitem(last=False)
