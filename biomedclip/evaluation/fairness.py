"""Subgroups: the same metric for each sex, age band, skin type, site or background, and what the gaps amount to.

Reads labels, scores or predictions and one attribute per sample; yields a value with n per subgroup and summaries:
the worst group, the gap, the equity-scaled metric, demographic parity and equalised odds. A subgroup below `min_size`
is listed and not measured: a gap from three patients is noise that reads like injustice. Summaries take only measured
groups, and samples without the attribute are counted as `missing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biomedclip.evaluation.statistics import Interval, Resampler, bootstrap

Measure = Callable[[NDArray[np.int64], "NDArray[np.float64] | None"], Any]
"""`measure(rows, weights)`: the metric on these rows, (R,) values under (R, n) weights of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subgroup:
    """One subgroup; `value` is NaN where `reason` says why."""

    name: str
    n: int
    value: float
    interval: Interval | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subgroups:
    """One attribute."""

    overall: float
    groups: tuple[Subgroup, ...]
    missing: int

    @property
    def measured(self) -> dict[str, float]:
        """{group: value} of the groups that have one."""
        return {group.name: group.value for group in self.groups if not np.isnan(group.value)}

    @property
    def worst(self) -> tuple[str, float] | None:
        """Name and value of the lowest group; None where none is measured."""
        return min(self.measured.items(), key=lambda item: item[1], default=None)

    @property
    def gap(self) -> float:
        """Largest less smallest value; NaN below two measured groups."""
        values = list(self.measured.values())
        return max(values) - min(values) if len(values) > 1 else float("nan")

    @property
    def equity_scaled(self) -> float:
        """M / (1 + sum over groups |M - M_g|) (Luo et al. 2024, FairVLMed's ES-AUC); NaN without measured groups."""
        values = list(self.measured.values())
        return self.overall / (1 + sum(abs(self.overall - v) for v in values)) if values else float("nan")


def measure_subgroups(
    measure: Measure, attribute: Sequence[str | None], *, min_size: int = 20,
    groups: Sequence[str] | None = None, y: ArrayLike | None = None, resamples: int = 0, seed: int = 0,
) -> Subgroups:  # fmt: skip
    """The metric of every value of the attribute, by name; with intervals where `resamples` is not 0.

    Intervals resample within the subgroup, by `groups` where they are known, else by the classes of `y`.
    """
    values = np.asarray(["" if v is None else str(v) for v in attribute])
    found = []
    for name in sorted(set(values) - {""}):
        rows = np.flatnonzero(values == name)
        if rows.size < min_size:
            reason = f"fewer than {min_size} samples"
            found.append(Subgroup(name=name, n=int(rows.size), value=float("nan"), reason=reason))
            continue
        value, interval = float(measure(rows, None)), None
        if resamples:
            resampler = Resampler(
                rows.size, y=None if y is None else np.asarray(y)[rows], resamples=resamples, seed=seed,
                groups=None if groups is None else [groups[i] for i in rows.tolist()],
            )  # fmt: skip

            def statistic(w: NDArray[np.float64] | None, rows: NDArray[np.int64] = rows) -> Any:
                return measure(rows, w)

            interval = bootstrap({name: statistic}, resampler)[name]
        undefined = "undefined for this subgroup" if np.isnan(value) else None
        found.append(Subgroup(name=name, n=int(rows.size), value=value, interval=interval, reason=undefined))
    return Subgroups(overall=float(measure(np.arange(values.size), None)), groups=tuple(found),
                     missing=int((values == "").sum()))  # fmt: skip


def parity_difference(predicted_positive: ArrayLike, attribute: Sequence[str], *, min_size: int = 20) -> float:
    """Largest less smallest share of positive predictions over the groups; NaN below two measured groups."""
    shares = _rates(np.asarray(predicted_positive, dtype=bool), None, attribute, min_size)
    return _spread(shares)


def equalised_odds(
    positive: ArrayLike, predicted_positive: ArrayLike, attribute: Sequence[str], *, min_size: int = 20
) -> dict[str, float]:
    """Spread over groups of true and of false positive rates, and the larger of the two (Hardt et al. 2016).

    A group without a positive has no true positive rate, one without a negative no false one, and takes no part there.
    """
    truth, guess = np.asarray(positive, dtype=bool), np.asarray(predicted_positive, dtype=bool)
    true_rate = _spread(_rates(guess, truth, attribute, min_size))
    false_rate = _spread(_rates(guess, ~truth, attribute, min_size))
    return {"tpr_gap": true_rate, "fpr_gap": false_rate, "equalised_odds": float(np.fmax(true_rate, false_rate))}


def cross(*attributes: Sequence[str | None]) -> list[str | None]:
    """Intersections of attributes as one: `F/60-80`; None where one is missing."""
    rows = zip(*attributes, strict=True)
    return [None if any(not v for v in row) else "/".join(str(v) for v in row) for row in rows]


def background_gap(
    correct: ArrayLike, y: ArrayLike, background: Sequence[str | None], *, min_size: int = 20
) -> Mapping[str, Any]:
    """Does the background decide: worst and mean accuracy over class x background (Sagawa et al. 2020).

    `groups` {class/background: accuracy}, `worst`, `mean` (every group counting alike) and `gap` = mean - worst.
    """
    right = np.asarray(correct, dtype=np.float64)
    table = measure_subgroups(
        lambda rows, _: right[rows].mean(), cross([str(c) for c in np.asarray(y)], background), min_size=min_size
    )
    values = list(table.measured.values())
    mean = float(np.mean(values)) if values else float("nan")
    worst = min(values, default=float("nan"))
    return {"groups": table.measured, "worst": worst, "mean": mean, "gap": mean - worst}


def _rates(
    guess: NDArray[np.bool_], among: NDArray[np.bool_] | None, attribute: Sequence[str], min_size: int
) -> list[float]:
    values, rates = np.asarray(attribute), []
    for name in np.unique(values):
        rows = values == name
        if rows.sum() < min_size:
            continue
        part = guess[rows if among is None else rows & among]
        if part.size:
            rates.append(float(part.mean()))
    return rates


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values) if len(values) > 1 else float("nan")
