"""Linear probe: multinomial logistic regression on frozen embeddings, its strength of regularisation swept.

min over (W, b) of sum_i nll_i + |W|^2 / (2 C) (scikit-learn's C). Published probes fix it (CONCH: 1/C = 100 / (M K), M
dimensions and K classes) or train by SGD for some epochs; a fixed strength is a different one for every number of
shots, so C is swept over a grid, from strong to weak, each fit starting where the last ended.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from biomedclip.errors import DataError
from biomedclip.evaluation.adapters.features import Adapted, Features, Logits, Params, Selection, Vectors

GRID = tuple(float(10.0**power) for power in np.linspace(-3, 5, 9))
"""Embeddings have length 1, so a useful C is larger than for standardised features."""


def fit_linear(
    support: Features, selection: Selection, *, grid: tuple[float, ...] = GRID, balanced: bool = False,
    max_iter: int = 200, **_: Any,
) -> Adapted:  # fmt: skip
    """Logits f . W + b at the C of `grid` that the selection chooses; `balanced` weighs classes by 1 / n_c.

    Classes that the support lacks have logit -infinity: nothing is known about them. Raises DataError for a support
    of one class.
    """
    if len(np.unique(support.y)) < 2:
        raise DataError(support.split, "has samples of one class only, which no boundary can be learnt from")

    fitted: dict[float, Any] = {}

    def candidates(train: Features, held_out: Features) -> Iterator[tuple[Params, Logits]]:
        for strength, model in _sweep(train, sorted(grid), balanced, max_iter):
            if train is support:
                fitted[strength] = copy.deepcopy(model)
            yield {"C": strength}, _logits(model, held_out.vectors, train.num_classes)

    choice = selection.choose(support, candidates)
    chosen = choice.hparams["C"]
    if chosen not in fitted:
        weaker = [c for c in sorted(grid) if c <= chosen]
        fitted.update(_sweep(support, weaker, balanced, max_iter))
    final = fitted[chosen]
    return Adapted(method="linear_probe", logits=lambda v: _logits(final, v, support.num_classes), choice=choice)


def conch_strength(num_dimensions: int, num_classes: int) -> float:
    """scikit-learn's C of CONCH's fixed penalty, M K / 100."""
    return num_dimensions * num_classes / 100


def _sweep(train: Features, strengths: Sequence[float], balanced: bool, max_iter: int) -> Iterator[tuple[float, Any]]:
    """(C, model) from strong to weak; it is one model, which the next fit goes on with."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(warm_start=True, max_iter=max_iter, class_weight="balanced" if balanced else None)
    for strength in strengths:
        model.set_params(C=strength)
        with warnings.catch_warnings():
            # The end of a weak penalty's valley is flat; what was reached is judged on held-out samples anyway.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(np.asarray(train.vectors, dtype=np.float32), train.y)
        yield strength, model


def _logits(model: Any, vectors: Vectors, num_classes: int) -> Logits:
    values = model.decision_function(np.asarray(vectors, dtype=np.float32))
    if values.ndim == 1:  # two classes: one margin
        values = np.stack([np.zeros(len(values)), values], axis=1)
    full = np.full((len(values), num_classes), -np.inf)
    full[:, model.classes_] = values
    return full
