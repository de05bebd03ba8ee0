"""CapS-Adapter: Tip's cache with captions in it, and with what images and support say about the classes.

Wang et al. 2024, after SuS-X (Udandarao et al. 2023): S = (1 - delta) f . K_image' + delta f . K_caption';
logits = s f . w + alpha exp(-beta (1 - S)) V + gamma psi(-KL(p(f) || p(k))) V, where p are the zero-shot
probabilities of image and support and psi brings -KL to the range of the affinities exp(-beta (1 - S)). The reference
takes the ends of psi from the images being scored, so that an image's answer depends on the others in its batch; here
they come from the support itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.errors import ConfigError, DataError
from biomedclip.evaluation.adapters.features import (
    Adapted,
    Features,
    Logits,
    Params,
    Selection,
    Vectors,
    zero_shot_logits,
)
from biomedclip.evaluation.metrics import softmax

ALPHAS = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)
BETAS = (1.0, 3.5, 5.5, 8.0)
GAMMAS = (0.0, 0.1, 1.0, 10.0)
DELTAS = (0.0, 0.3, 0.6)


@dataclass(frozen=True, slots=True)
class _Support:
    """A support set with captions, and what is needed of it again and again."""

    features: Features
    captions: Vectors
    log_p: NDArray[np.float64]


def fit_caps(
    support: Features, selection: Selection, *, text: Vectors, captions: Vectors, logit_scale: float = 100.0,
    grid: tuple[tuple[float, ...], ...] = (ALPHAS, BETAS, GAMMAS, DELTAS), **_: Any,
) -> Adapted:  # fmt: skip
    """CapS-Adapter; `captions` (M, D) are the embeddings of the support's captions, in its order.

    `grid` holds the values of alpha, beta, gamma and delta. Raises DataError where captions and support differ in
    number, ConfigError where the selection has no features: folds of the support would need its captions split too.
    """
    if len(captions) != len(support.y):
        raise DataError("captions", "must be one for each sample of the support", found=len(captions))
    if selection.features is None:
        raise ConfigError("selection", "needs a validation split for CapS-Adapter", todo="give features")
    held = _Support(support, captions, np.log(np.maximum(_probabilities(support.vectors, text, logit_scale), 1e-300)))
    alphas, betas, gammas, deltas = grid

    def candidates(train: Features, held_out: Features) -> Iterator[tuple[Params, Logits]]:
        base = zero_shot_logits(held_out.vectors, text, logit_scale)
        for beta, delta in product(betas, deltas):
            votes, signature = _two_votes(held_out.vectors, held, text, logit_scale, beta, delta)
            for alpha, gamma in product(alphas, gammas):
                params = {"alpha": alpha, "beta": beta, "gamma": gamma, "delta": delta}
                yield params, base + alpha * votes + gamma * signature

    choice = selection.choose(support, candidates)
    chosen = choice.hparams

    def logits(vectors: Vectors) -> Logits:
        votes, signature = _two_votes(vectors, held, text, logit_scale, chosen["beta"], chosen["delta"])
        base = zero_shot_logits(vectors, text, logit_scale)
        return base + chosen["alpha"] * votes + chosen["gamma"] * signature

    return Adapted(method="caps", logits=logits, choice=choice)


def _two_votes(
    vectors: Vectors, held: _Support, text: Vectors, logit_scale: float, beta: float, delta: float
) -> tuple[Logits, Logits]:
    """(N, C) votes by affinity and by likeness of class probabilities."""
    values = held.features.one_hot().astype(np.float64)
    affinity = _affinity(vectors, held, beta, delta)
    inner = _affinity(held.features.vectors, held, beta, delta)
    inner_likeness = _likeness(held.features.vectors, held, text, logit_scale)
    low, high = inner_likeness.min(), inner_likeness.max()
    share = (_likeness(vectors, held, text, logit_scale) - low) / max(high - low, 1e-12)
    scaled = inner.min() + np.clip(share, 0, 1) * (inner.max() - inner.min())
    return affinity @ values, scaled @ values


def _affinity(vectors: Vectors, held: _Support, beta: float, delta: float) -> NDArray[np.float64]:
    wide = np.asarray(vectors, dtype=np.float64)
    keys = (1 - delta) * held.features.vectors.astype(np.float64) + delta * held.captions.astype(np.float64)
    return np.exp(-beta * (1 - wide @ keys.T))


def _likeness(vectors: Vectors, held: _Support, text: Vectors, logit_scale: float) -> NDArray[np.float64]:
    """(N, M) -KL(p(f) || p(k))."""
    p = _probabilities(vectors, text, logit_scale)
    return p @ held.log_p.T - (p * np.log(np.maximum(p, 1e-300))).sum(1, keepdims=True)


def _probabilities(vectors: Vectors, text: Vectors, logit_scale: float) -> NDArray[np.float64]:
    return softmax(zero_shot_logits(vectors, text, logit_scale))
