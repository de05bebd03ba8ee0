"""How much of a zero-shot score is the wording: the same images under many random single prompts.

Reads image embeddings and the embeddings of every prompt of every class; yields one score a draw and their minimum,
median, quartiles and maximum. One prompt's score is a lottery ticket: CONCH reports the median of 50 draws, and most
questions about not reproducing published numbers are about prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.errors import ConfigError
from biomedclip.evaluation.zero_shot import Vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Scores of the draws, and which prompt of each class each draw took."""

    values: NDArray[np.float64]
    picks: NDArray[np.int64]
    """(K, C)"""

    def summarise(self) -> dict[str, float]:
        """n, min, q1, median, q3, max, iqr; NaN draws are counted in `undefined` and left out."""
        valid = self.values[~np.isnan(self.values)]
        facts = {"n": float(self.values.size), "undefined": float(self.values.size - valid.size)}
        if not valid.size:
            return facts | dict.fromkeys(("min", "q1", "median", "q3", "max", "iqr"), float("nan"))
        low, q1, median, q3, high = (float(v) for v in np.quantile(valid, [0, 0.25, 0.5, 0.75, 1]))
        return facts | {"min": low, "q1": q1, "median": median, "q3": q3, "max": high, "iqr": q3 - q1}


def draw_prompts(counts: Sequence[int], draws: int, *, aligned: bool = False, seed: int = 0) -> NDArray[np.int64]:
    """(K, C) which prompt of each class a draw takes, each class by itself, or the same number for all (`aligned`).

    Where there are no more combinations than draws, each is taken once and no more: K is then smaller. Raises
    ConfigError for `aligned` with unequal counts.
    """
    if aligned and len(set(counts)) > 1:
        raise ConfigError("aligned", "needs equally many prompts per class", found=list(counts))
    sizes = [counts[0]] if aligned else list(counts)
    total = float(np.prod([float(n) for n in sizes]))
    rng = np.random.default_rng(seed)
    if total <= draws:
        picks = np.stack([axis.ravel() for axis in np.meshgrid(*[np.arange(n) for n in sizes], indexing="ij")], axis=1)
    else:
        picks = np.stack([rng.integers(0, n, draws) for n in sizes], axis=1)
    return np.repeat(picks, len(counts), axis=1) if aligned else picks


def prompt_sensitivity(
    images: Vectors, prompts: Sequence[Vectors], score: Callable[[NDArray[np.float32]], Any], *,
    draws: int = 50, aligned: bool = False, seed: int = 0,
) -> Sensitivity:  # fmt: skip
    """`score` of the (N, C) cosines under `draws` random single prompts; cosines with all prompts are taken once."""
    picks = draw_prompts([len(p) for p in prompts], draws, aligned=aligned, seed=seed)
    wide = np.asarray(images, dtype=np.float64)
    cosines = [(wide @ np.asarray(p, dtype=np.float64).T).astype(np.float32) for p in prompts]
    values = [
        float(score(np.stack([table[:, k] for table, k in zip(cosines, row, strict=True)], axis=1))) for row in picks
    ]
    return Sensitivity(values=np.asarray(values), picks=picks)
