"""GDA: Gaussian discriminant analysis on frozen embeddings, mixed with the zero-shot classifier.

Wang et al. 2024, "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", section 3: classes are Gaussians of
one covariance S, and their logits are linear, W_c = S^-1 mu_c, b_c = log pi_c - mu_c' S^-1 mu_c / 2 with equal priors.
With fewer samples than dimensions S has no inverse; the paper takes the empirical Bayes ridge of Kubokawa and
Srivastava, S^-1 = D ((N - 1) S + tr(S) I)^-1. Final logits are s f . w + alpha (f . W + b), alpha chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.evaluation.adapters.features import (
    Adapted,
    Features,
    Logits,
    Params,
    Selection,
    Vectors,
    zero_shot_logits,
)

GRID = tuple(float(10.0**power) for power in range(-4, 3))
Wide = NDArray[np.float64]


def fit_gda(
    support: Features, selection: Selection, *, text: Vectors, logit_scale: float = 100.0,
    grid: tuple[float, ...] = GRID, **_: Any,
) -> Adapted:  # fmt: skip
    """Logits s f . w + alpha (f . W + b). Raises DataError for a class without a sample."""

    def candidates(train: Features, held_out: Features) -> Iterator[tuple[Params, Logits]]:
        weights, bias = discriminant(train)
        base = zero_shot_logits(held_out.vectors, text, logit_scale)
        ours = np.asarray(held_out.vectors, dtype=np.float64) @ weights.T + bias
        for alpha in sorted(grid):
            yield {"alpha": alpha}, base + alpha * ours

    choice = selection.choose(support, candidates)
    weights, bias = discriminant(support)

    def logits(vectors: Vectors) -> Logits:
        ours = np.asarray(vectors, dtype=np.float64) @ weights.T + bias
        return zero_shot_logits(vectors, text, logit_scale) + choice.hparams["alpha"] * ours

    return Adapted(method="gda", logits=logits, choice=choice)


def discriminant(features: Features) -> tuple[Wide, Wide]:
    """Weights (C, D) and bias (C,) of the linear discriminant, with equal priors."""
    means = features.class_means()
    centred = np.asarray(features.vectors, dtype=np.float64) - means[features.y]
    covariance = centred.T @ centred / max(1, len(centred) - 1)
    weights = np.asarray(np.linalg.solve(shrink(covariance, len(centred)), means.T).T, dtype=np.float64)
    bias = np.log(1 / features.num_classes) - (means * weights).sum(1) / 2
    return weights, np.asarray(bias, dtype=np.float64)


def shrink(covariance: Wide, num_samples: int) -> Wide:
    """((N - 1) S + tr(S) I) / D, whose inverse stands for that of S. Where one sample a class leaves no spread at
    all it is the identity: GDA is then the nearest mean."""
    size = len(covariance)
    spread = float(np.trace(covariance))
    if spread == 0:
        return np.eye(size)
    return ((num_samples - 1) * covariance + spread * np.eye(size)) / size
