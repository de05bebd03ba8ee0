"""Which rows an epoch of a source visits: all of them, or those that caps and keep-probabilities leave.

Reads the cap group and the keep-probability of each row; yields the rows of any epoch, and how many all epochs before
it had. A cap takes another part of its group each epoch, in turn, so every row is seen equally often and none is lost;
a keep-probability draws anew each epoch by a hash of (seed, epoch, row). Both are functions of the epoch alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from biomedclip.errors import ConfigError

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True, eq=False)
class Caps:
    """The cap group of each row, -1 for none, and how many rows of each group an epoch takes."""

    groups: np.ndarray
    """(N,) int32."""
    taken: np.ndarray
    """(G,) int64, at least 1 and at most the rows of the group."""


class Members:
    """The rows of each epoch of a source of `size` rows. Raises ConfigError where keep-probabilities leave none."""

    def __init__(self, name: str, size: int, *, seed: int, caps: Caps | None, keep: np.ndarray | None) -> None:
        self.size, self._seed, self._keep = size, seed, keep
        self._groups = _CapGroups(caps, seed) if caps is not None else None
        if keep is not None and float(keep.sum()) < 1:
            raise ConfigError(f"data.sources: {name}", "keeps less than one sample an epoch", todo="raise keep")
        self._before = [0]
        self._latest: tuple[int, np.ndarray | range] = (-1, range(0))

    def rows(self, epoch: int) -> np.ndarray | range:
        """Rows of an epoch, ascending."""
        if self._groups is None and self._keep is None:
            return range(self.size)
        if self._latest[0] != epoch:
            rows = self._groups.rows(epoch) if self._groups is not None else np.arange(self.size)
            if self._keep is not None:
                rows = rows[uniform_hash(rows, self._seed, epoch) < self._keep[rows]]
            self._latest = epoch, rows
        return self._latest[1]

    def before(self, epoch: int) -> int:
        """Rows of all epochs before this one."""
        if self._keep is None:
            return epoch * (self.size if self._groups is None else self._groups.per_epoch)
        while len(self._before) <= epoch:
            self._before.append(self._before[-1] + len(self.rows(len(self._before) - 1)))
        return self._before[epoch]

    def locate(self, ordinal: int) -> tuple[int, int]:
        """The epoch of the source's slot `ordinal`, and the slot's place in it."""
        if self._keep is None:
            return divmod(ordinal, self.before(1))
        while self._before[-1] <= ordinal:
            self.before(len(self._before))
        epoch = int(np.searchsorted(self._before, ordinal, side="right")) - 1
        return epoch, ordinal - self._before[epoch]


class _CapGroups:
    """Rows in the order in which each group uses them up."""

    def __init__(self, caps: Caps, seed: int) -> None:
        shuffled = np.random.Generator(np.random.Philox(key=seed)).permutation(len(caps.groups))
        by_group = shuffled[np.argsort(caps.groups[shuffled], kind="stable")]
        free = int((caps.groups < 0).sum())
        self._free, self._capped = by_group[:free], by_group[free:]
        self._sizes = np.bincount(caps.groups[caps.groups >= 0], minlength=len(caps.taken))
        self._taken = np.minimum(caps.taken, self._sizes)
        self.per_epoch = free + int(self._taken.sum())

    def rows(self, epoch: int) -> np.ndarray:
        starts = np.cumsum(self._sizes) - self._sizes
        group = np.repeat(np.arange(len(self._taken)), self._taken)
        rank = np.arange(len(group)) - np.repeat(np.cumsum(self._taken) - self._taken, self._taken)
        place = (epoch * self._taken[group] + rank) % self._sizes[group]
        rows: np.ndarray = np.sort(np.concatenate([self._free, self._capped[starts[group] + place]]))
        return rows


def uniform_hash(rows: np.ndarray, *facts: int) -> np.ndarray:
    """(N,) numbers in [0, 1) that depend on each row and the facts alone (SplitMix64, Steele et al. 2014)."""
    state = rows.astype(np.uint64)
    for fact in (*facts, 0):
        state = state + np.uint64((fact + 1) * _GOLDEN & 0xFFFFFFFFFFFFFFFF)
        state = (state ^ (state >> np.uint64(30))) * _FIRST
        state = (state ^ (state >> np.uint64(27))) * _SECOND
        state = state ^ (state >> np.uint64(31))
    unit: np.ndarray = (state >> np.uint64(11)).astype(np.float64) / float(1 << 53)
    return unit
