"""K labelled images a class: which ones, and how far each adapter gets with them.

Reads training, validation and test features; yields one row for every method, number of shots and seed. Draws are
nested: the first of K = 2 is the one of K = 1, so that a curve rises because of more images and not of other ones. A
class with fewer than K images gives all it has, and the row says which; a missing number would be filled in by a
reader. Validation is thinned to min(K, 4) images a class (CoOp's protocol), as somebody with one image a class has
no hundred for validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.evaluation.adapters.features import Adapted, Choice, Features, Selection, score_logits

Fit = Callable[..., Adapted]
SHOTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class FewShot:
    """One fit, scored on the test split."""

    method: str
    shots: int
    seed: int
    value: float
    choice: Choice
    short: Mapping[int, int]
    """Class -> images it had, where fewer than asked for."""


def draw_shots(features: Features, shots: int, seed: int) -> tuple[NDArray[np.int64], dict[int, int]]:
    """Rows of `shots` images a class, sorted by class, and the classes that had fewer. No group is drawn twice for
    one class while another is left: two tiles of one slide are hardly two images."""
    rng = np.random.default_rng([seed, 0])
    rows, short = [], {}
    for c in range(features.num_classes):
        own = np.flatnonzero(features.y == c)
        own = own[rng.permutation(len(own))]
        if features.groups is not None:
            own = _spread(own, features.groups)
        rows.append(own[:shots])
        if len(own) < shots:
            short[c] = len(own)
    return np.concatenate(rows), short


def _spread(rows: NDArray[np.int64], groups: Sequence[str]) -> NDArray[np.int64]:
    """One of each group, then a second of each, and so on, in the order of the draw."""
    seen: dict[str, int] = {}
    turn = []
    for row in rows:
        turn.append(seen.get(groups[row], 0))
        seen[groups[row]] = turn[-1] + 1
    return rows[np.argsort(turn, kind="stable")]


def sweep_shots(
    methods: Mapping[str, Fit], train: Features, selection: Selection, test: Features, *,
    shots: Sequence[int] = SHOTS, seeds: Sequence[int] = (0, 1, 2, 3, 4), val_shots: int | None = 4, **facts: Any,
) -> Iterator[FewShot]:  # fmt: skip
    """Every method at every number of shots and seed; the value is the selection's metric on `test`.

    `facts` go to each fit: `text`, `logit_scale`. `val_shots=None` keeps all of the validation split, and the rows'
    choice says how large it was by its score only, so say so where the curve is shown.
    """
    for k in shots:
        for seed in seeds:
            rows, short = draw_shots(train, k, seed)
            part, chosen = train.take(rows), selection
            if selection.features is not None and val_shots is not None:
                val_rows, _ = draw_shots(selection.features, min(k, val_shots), seed)
                chosen = Selection(
                    features=selection.features.take(val_rows), metric=selection.metric, seed=seed,
                    scored_split=selection.scored_split, allow_test=selection.allow_test,
                )  # fmt: skip
            for name, fit in methods.items():
                adapted = fit(part, chosen, seed=seed, **facts)
                value = score_logits(test.y, adapted.logits(test.vectors), selection.metric)
                yield FewShot(method=name, shots=k, seed=seed, value=value, choice=adapted.choice, short=short)


def summarise_shots(rows: Sequence[FewShot]) -> dict[str, dict[int, dict[str, float]]]:
    """{method: {shots: mean, sd, min, max, n}} over seeds; sd is NaN for a single seed."""
    table: dict[str, dict[int, dict[str, float]]] = {}
    for method, k in dict.fromkeys((row.method, row.shots) for row in rows):
        values = np.asarray([row.value for row in rows if (row.method, row.shots) == (method, k)])
        spread = float(values.std(ddof=1)) if values.size > 1 else float("nan")
        table.setdefault(method, {})[k] = {
            "mean": float(values.mean()), "sd": spread, "min": float(values.min()), "max": float(values.max()),
            "n": float(values.size),
        }  # fmt: skip
    return table
