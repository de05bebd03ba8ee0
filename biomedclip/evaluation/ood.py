"""Does the model know what it does not know: scores for images of no class of the task, and how well they sort.

Reads cosines (N, C) and, for some scores, embeddings of training images; yields (N,) scores, higher for an image that
belongs, and AUROC, AUPR and FPR95 against sets that do not, near ones (another disease of the same organ) and far ones
(another modality) apart, as OpenMIBOOD does: a mean over both hides that only the near ones are hard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biomedclip.errors import DataError
from biomedclip.evaluation import metrics
from biomedclip.evaluation.metrics import Floats, softmax


def msp(cosines: ArrayLike, logit_scale: float) -> Floats:
    """Largest softmax probability (Hendrycks and Gimpel 2017)."""
    return softmax(logit_scale * np.asarray(cosines, dtype=np.float64)).max(1)


def max_logit(cosines: ArrayLike) -> Floats:
    """Largest cosine (Hendrycks et al. 2022); the scale does not matter."""
    return np.asarray(cosines, dtype=np.float64).max(1)


def energy(cosines: ArrayLike, logit_scale: float) -> Floats:
    """log sum exp of the logits (Liu et al. 2020, the negative energy at T = 1)."""
    logits = logit_scale * np.asarray(cosines, dtype=np.float64)
    top = logits.max(1)
    return top + np.log(np.exp(logits - top[:, None]).sum(1))


def mcm(cosines: ArrayLike, temperature: float = 1.0) -> Floats:
    """Largest softmax probability of cosines over a temperature, 1 as in Ming et al. 2022, eq. 2."""
    return msp(cosines, 1 / temperature)


def negative_entropy(cosines: ArrayLike, logit_scale: float) -> Floats:
    """Minus the entropy of the class probabilities, in nats."""
    p = softmax(logit_scale * np.asarray(cosines, dtype=np.float64))
    return (p * np.log(np.maximum(p, 1e-300))).sum(1)


def nearest_distance(vectors: ArrayLike, train: ArrayLike, k: int = 50) -> Floats:
    """Minus the distance to the k-th nearest training embedding, all of length 1 (Sun et al. 2022)."""
    from biomedclip.evaluation.adapters.neighbours import find_nearest

    _, cosines = find_nearest(np.asarray(vectors, np.float32), np.asarray(train, np.float32), k)
    return -np.sqrt(np.maximum(2 - 2 * cosines[:, -1], 0))


def mahalanobis(vectors: ArrayLike, train: ArrayLike, y: ArrayLike) -> Floats:
    """Minus the smallest squared Mahalanobis distance to a class mean, one covariance for all (Lee et al. 2018, eq. 2).

    The covariance is inverted within the space it spans: fewer samples than dimensions leave the rest of it unseen.
    """
    points, labels = np.asarray(train, dtype=np.float64), np.asarray(y)
    classes = np.unique(labels)
    means = np.stack([points[labels == c].mean(0) for c in classes])
    centred = points - means[np.searchsorted(classes, labels)]
    precision = np.linalg.pinv(centred.T @ centred / len(points), hermitian=True)
    moved = np.asarray(vectors, dtype=np.float64)[:, None] - means
    return -np.einsum("ncd,de,nce->nc", moved, precision, moved, optimize=True).min(1)


def vim(
    vectors: ArrayLike, cosines: ArrayLike, train: ArrayLike, train_cosines: ArrayLike, logit_scale: float,
    *, dimensions: int | None = None,
) -> Floats:  # fmt: skip
    """Energy less a virtual logit, the length outside of the training images' main directions (Wang et al. 2022).

    alpha matches the mean virtual logit of training images to their mean largest logit. The zero-shot classifier has
    no bias, so the origin is the middle. `dimensions` of the main space: half of D where not given, which leaves a
    rest to look at.
    """
    points = np.asarray(train, dtype=np.float64)
    size = points.shape[1]
    kept = size // 2 if dimensions is None else dimensions
    if not 0 < kept < size:
        raise DataError("ViM", f"needs 1 to {size - 1} main dimensions", found=kept)
    _, directions = np.linalg.eigh(points.T @ points / len(points))
    rest = directions[:, : size - kept]  # ascending: the smallest ones
    lengths = np.linalg.norm(points @ rest, axis=1)
    alpha = logit_scale * np.asarray(train_cosines, dtype=np.float64).max(1).mean() / max(lengths.mean(), 1e-12)
    outside = np.linalg.norm(np.asarray(vectors, dtype=np.float64) @ rest, axis=1)
    return energy(cosines, logit_scale) - alpha * outside


def no_prompts(cosines: ArrayLike, no_cosines: ArrayLike, logit_scale: float) -> dict[str, Floats]:
    """CLIPN's two rules from cosines with "a photo of c" and "a photo with no c" (Wang et al. 2023, eq. 10 and 11).

    `ctw`: probability of yes against no for the best class; `atd`: 1 less the probability of the class "none",
    1 - sum p_c p_yes,c. CLIPN trains a text tower for "no"; with plain prompts this is its training-free baseline.
    """
    yes = logit_scale * np.asarray(cosines, dtype=np.float64)
    no = logit_scale * np.asarray(no_cosines, dtype=np.float64)
    p_yes = 1 / (1 + np.exp(np.clip(no - yes, -700, 700)))
    p = softmax(yes)
    best = yes.argmax(1)
    return {"ctw": p_yes[np.arange(len(best)), best], "atd": (p * p_yes).sum(1)}


def fpr_at_tpr(belongs: ArrayLike, scores: ArrayLike, tpr: float = 0.95, weights: ArrayLike | None = None) -> Any:
    """Smallest false positive rate at a threshold that keeps at least `tpr` of what belongs; no interpolation."""
    specificity = metrics.specificity_at(belongs, scores, tpr, weights)
    return metrics.unwrap(1 - np.asarray(specificity))


def separate(inside: ArrayLike, outside: ArrayLike) -> dict[str, float]:
    """auroc, aupr_in, aupr_out and fpr95 of two sets of scores; NaN where either is empty."""
    scores = np.concatenate([np.asarray(inside, dtype=np.float64), np.asarray(outside, dtype=np.float64)])
    belongs = np.arange(len(scores)) < len(np.asarray(inside))
    return {
        "auroc": metrics.auroc(belongs, scores),
        "aupr_in": metrics.average_precision(belongs, scores),
        "aupr_out": metrics.average_precision(~belongs, -scores),
        "fpr95": fpr_at_tpr(belongs, scores),
    }


def near_and_far(
    score: Callable[[str], NDArray[Any]], inside: str, outside: Mapping[str, list[str]]
) -> dict[str, dict[str, Any]]:
    """{`near` | `far` | any kind: {sets: {name: numbers}, mean: numbers}} of one score.

    `score(name)` gives the scores of a set; `outside` maps a kind to its sets. Means are over the sets of one kind
    and list them; there is none over kinds.
    """
    home = score(inside)
    table: dict[str, dict[str, Any]] = {}
    for kind, names in outside.items():
        rows = {name: separate(home, score(name)) for name in names}
        keys = next(iter(rows.values()), {})
        table[kind] = {"sets": rows, "mean": {k: float(np.mean([row[k] for row in rows.values()])) for k in keys}}
    return table
