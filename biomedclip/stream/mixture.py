"""Which source gives the next sample: weights over steps to slots, counted in closed form.

Reads the weight of each source (one number, or points that are joined by straight lines over steps) and yields, for
any step, the source of each slot of its batch and how many slots that source had before. A smooth weighted round robin
deals the slots, so a batch holds each source's share to within one sample, and what it could not give is carried to
the next. Weights are constant within a segment of steps: a ramp becomes up to `RAMP_PIECES` of them, so that counting
the slots of a source before any step is a sum over segments, however far away the step is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from biomedclip.errors import ConfigError

PATTERN = 4096
"""Slots after which the shares are exact: weights are rounded to this many parts of the whole."""

RAMP_PIECES = 32
"""Steps of constant weight that stand for a straight line between two points."""

Weight = float | Mapping[int, float]
"""A weight, or step -> weight: straight lines between the points, constant before the first and after the last."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Steps from `first` on, until the next segment, in which all weights stay the same."""

    first: int
    weights: tuple[float, ...]


class Mixture:
    """The deal of slots to sources. Raises ConfigError for weights that are no weights."""

    def __init__(self, weights: Mapping[str, Weight], *, batch_size: int, first_step: int = 0) -> None:
        self.names, self.batch_size, self.first_step = tuple(weights), batch_size, first_step
        for name, weight in weights.items():
            _check_weight(name, weight)
        self.segments = cut_segments(list(weights.values()), first_step)
        for segment in self.segments:
            if not sum(segment.weights) > 0:
                raise ConfigError("data.sources", f"no source has a weight above 0 from step {segment.first} on",
                                  todo="give one of them a weight there")  # fmt: skip
        self._patterns: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._at_start = [np.zeros(len(self.names), dtype=np.int64)]

    def deal(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(B,) source of each slot of a step's batch, and (B,) how many slots that source had before it."""
        number = self._segment_at(step)
        pattern, _ = self._pattern(number)
        first = (step - self.segments[number].first) * self.batch_size
        sources = pattern[np.arange(first, first + self.batch_size) % len(pattern)].astype(np.int64)
        ordinals = np.empty(self.batch_size, dtype=np.int64)
        before = self.before(step)
        for source in np.unique(sources):
            own = sources == source
            ordinals[own] = before[source] + np.arange(int(own.sum()))
        return sources, ordinals

    def before(self, step: int) -> np.ndarray:
        """(S,) how many slots each source had in the batches before `step`."""
        number = self._segment_at(step)
        slots = (step - self.segments[number].first) * self.batch_size
        return self._start(number) + self._given(number, slots)

    def step_of(self, source: int, ordinal: int, until: int) -> int | None:
        """The step whose batch holds the source's slot `ordinal`; None where that is not before step `until`."""
        low, high = self.first_step, until
        if high <= low or self.before(high)[source] <= ordinal:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self.before(middle)[source] <= ordinal:
                low = middle
            else:
                high = middle
        return low

    def most_per_batch(self, source: int) -> int:
        """Upper bound of the samples that the source has in one batch."""
        share = max(segment.weights[source] / sum(segment.weights) for segment in self.segments)
        return min(int(self.batch_size * share) + 2, self.batch_size)

    def _segment_at(self, step: int) -> int:
        if step < self.first_step:
            raise ValueError(f"step {step} is before the plan's first step {self.first_step}")
        firsts = [segment.first for segment in self.segments]
        return int(np.searchsorted(firsts, step, side="right")) - 1

    def _start(self, number: int) -> np.ndarray:
        """(S,) slots of each source before a segment."""
        while len(self._at_start) <= number:
            last = len(self._at_start) - 1
            steps = self.segments[last + 1].first - self.segments[last].first
            self._at_start.append(self._at_start[last] + self._given(last, steps * self.batch_size))
        return self._at_start[number]

    def _given(self, number: int, slots: int) -> np.ndarray:
        _, counts = self._pattern(number)
        rounds, rest = divmod(slots, len(counts) - 1)
        given: np.ndarray = rounds * counts[-1] + counts[rest]
        return given

    def _pattern(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number not in self._patterns:
            pattern = deal_slots(self.segments[number].weights)
            counts = np.zeros((len(pattern) + 1, len(self.names)), dtype=np.int64)
            np.cumsum(pattern[:, None] == np.arange(len(self.names)), axis=0, out=counts[1:])
            self._patterns[number] = pattern, counts
        return self._patterns[number]


def cut_segments(weights: Sequence[Weight], first_step: int = 0) -> tuple[Segment, ...]:
    """Stretches of steps with constant weights, the first from `first_step`; a ramp takes the weight of its middle."""
    corners = sorted({step for weight in weights if isinstance(weight, Mapping) for step in weight})
    starts = {first_step}
    for left, right in pairwise(corners):
        if any(weight_at(weight, left) != weight_at(weight, right) for weight in weights):
            starts.update(np.linspace(left, right, min(right - left, RAMP_PIECES) + 1).round().astype(int).tolist())
    starts = {start for start in starts if start >= first_step}
    ordered, segments = sorted(starts), []
    for number, start in enumerate(ordered):
        last = ordered[number + 1] - 1 if number + 1 < len(ordered) else start
        segments.append(Segment(start, tuple(weight_at(weight, (start + last) / 2) for weight in weights)))
    return tuple(segments)


def weight_at(weight: Weight, step: float) -> float:
    """The weight of a source at a step."""
    if not isinstance(weight, Mapping):
        return float(weight)
    steps = sorted(weight)
    return float(np.interp(step, steps, [weight[at] for at in steps]))


def scale_weight(weight: Weight, factor: float) -> Weight:
    """A weight, or all points of one, times a factor."""
    if isinstance(weight, Mapping):
        return {step: value * factor for step, value in weight.items()}
    return weight * factor


def mixing_weights(weights: Sequence[Weight], sizes: Sequence[int], exponent: float) -> list[Weight]:
    """Weights of sources of so many samples, times size ** exponent: 0 leaves them, 1 makes them proportional to size.

    Between the two, small sources come up more often than their size says and less often than large ones (the
    temperature sampling of multilingual models: Conneau and Lample 2019, section 3.1).
    """
    return [scale_weight(weight, size**exponent) for weight, size in zip(weights, sizes, strict=True)]


def deal_slots(weights: Sequence[float]) -> np.ndarray:
    """(P,) source of each slot: smooth weighted round robin over weights rounded to P parts.

    P is `PATTERN`, or more where there are many sources. At each slot every source's credit grows by its share and the
    largest credit takes the slot, so any run of slots is within one of its exact share; the credits are back at zero
    after P slots. A source of weight 0 gets none, any other at least one.
    """
    length = PATTERN
    while length < 16 * len(weights):
        length *= 2
    wanted = np.asarray(weights, dtype=np.float64)
    exact = wanted / wanted.sum() * length
    parts = np.where(wanted > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    remainders = np.where(wanted > 0, parts - exact, np.inf)
    for source in np.argsort(remainders, kind="stable")[: max(length - int(parts.sum()), 0)]:
        parts[source] += 1
    parts[np.argmax(parts)] += length - parts.sum()
    credit = np.zeros(len(parts), dtype=np.int64)
    slots = np.empty(length, dtype=np.int16)
    for slot in range(length):
        credit += parts
        slots[slot] = taken = int(np.argmax(credit))
        credit[taken] -= length
    return slots


def _check_weight(name: str, weight: Weight) -> None:
    where = f"data.sources: {name}"
    if not isinstance(weight, Mapping):
        if not 0 < weight < np.inf:
            raise ConfigError(where, "has no positive weight", found=weight)
        return
    if not weight or not all(0 <= value < np.inf for value in weight.values()) or not max(weight.values()) > 0:
        raise ConfigError(where, "needs weights of at least 0, one of them above", found=dict(weight))
