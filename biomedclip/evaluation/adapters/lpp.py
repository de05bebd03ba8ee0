"""LP++: a linear probe whose class weights are a visual prototype plus a learnt multiple of the text weight.

Huang et al. 2024: logits_c = f . (v_c + a_c w_c), trained by full-batch steps whose size comes from a bound on the
curvature, so that no learning rate is searched and the loss never rises. The loss is convex in (v, a). Bounds used
here: the softmax's curvature is at most 1/2, so that of v is at most the largest eigenvalue of F'F / 2N and that of
a_c at most mean (f . w_c)^2 / 2; v and a take turns. Starting point: v_c the class mean, a_c the logit scale, which is
the zero-shot classifier plus a prototype (the paper's closed-form start of a is not reproduced here). The number of
steps is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.evaluation.adapters.features import Adapted, Features, Logits, Params, Selection, Vectors
from biomedclip.evaluation.metrics import softmax

STEPS = (0, 10, 30, 100, 300)
Wide = NDArray[np.float64]


def fit_lpp(
    support: Features, selection: Selection, *, text: Vectors, logit_scale: float = 100.0,
    steps: tuple[int, ...] = STEPS, **_: Any,
) -> Adapted:  # fmt: skip
    """LP++ after the number of steps that the selection chooses. Raises DataError for a class without a sample."""

    fitted: dict[int, Wide] = {}

    def candidates(train: Features, held_out: Features) -> Iterator[tuple[Params, Logits]]:
        for taken, weights in descend(train, text, logit_scale, steps):
            if train is support:
                fitted[taken] = weights
            yield {"steps": taken}, np.asarray(held_out.vectors, dtype=np.float64) @ weights.T

    choice = selection.choose(support, candidates)
    chosen = choice.hparams["steps"]
    if chosen not in fitted:
        fitted.update(descend(support, text, logit_scale, (chosen,)))
    weights = fitted[chosen]
    return Adapted(method="lp++", logits=lambda v: np.asarray(v, dtype=np.float64) @ weights.T, choice=choice)


def descend(support: Features, text: Vectors, logit_scale: float, steps: tuple[int, ...]) -> Iterator[tuple[int, Wide]]:
    """(steps taken, weights v + a w (C, D)) at each number of steps asked for."""
    # float32 is half the memory to walk through at each step; the weights themselves add up in float64.
    f, w = np.asarray(support.vectors, dtype=np.float32), np.asarray(text, dtype=np.float64)
    target, count = support.one_hot().astype(np.float64), len(f)
    prototypes, blend = support.class_means(), np.full(len(w), logit_scale)
    cosines = f.astype(np.float64) @ w.T
    bound_v = float(np.linalg.eigvalsh(f.T @ f / count if f.shape[1] <= count else f @ f.T / count)[-1]) / 2
    bound_a = np.maximum((cosines**2).mean(0) / 2, 1e-12)
    for taken in range(max(steps) + 1):
        if taken in steps:
            yield taken, prototypes + blend[:, None] * w
        margins = f @ prototypes.astype(np.float32).T
        error = (softmax(margins + blend * cosines) - target) / count
        prototypes = prototypes - (error.astype(np.float32).T @ f) / bound_v
        margins = f @ prototypes.astype(np.float32).T
        error = (softmax(margins + blend * cosines) - target) / count
        blend = blend - (error * cosines).sum(0) / bound_a
