"""Tip-Adapter: a cache of labelled embeddings votes beside the zero-shot classifier; with training, Tip-Adapter-F.

Zhang et al. 2022, section 3: logits = s f . w + alpha exp(-beta (1 - f . K')) V, with K the support's embeddings and V
their labels. -F lets K be learnt (AdamW, learning rate 1e-3, eps 1e-4, cosine over the epochs). The reference chooses
alpha, beta and the best epoch on the test set; here all three are chosen by the selection. CapS-Adapter (Wang et al.
2024) is in caps.py and shares the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
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

ALPHAS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""0 is the zero-shot classifier itself: never worse than that on the selection split."""
BETAS = (0.5, 1.0, 2.0, 3.5, 5.5, 8.0, 12.0)
_CELLS = 8_000_000


def fit_tip(
    support: Features, selection: Selection, *, text: Vectors, logit_scale: float = 100.0,
    alphas: tuple[float, ...] = ALPHAS, betas: tuple[float, ...] = BETAS, **_: Any,
) -> Adapted:  # fmt: skip
    """Tip-Adapter without training; alpha and beta are chosen."""

    def candidates(train: Features, held_out: Features) -> Iterator[tuple[Params, Logits]]:
        base = zero_shot_logits(held_out.vectors, text, logit_scale)
        votes = {beta: vote(held_out.vectors, train.vectors, train.one_hot(), beta) for beta in betas}
        for alpha, beta in product(alphas, betas):
            yield {"alpha": alpha, "beta": beta}, base + alpha * votes[beta]

    choice = selection.choose(support, candidates)
    alpha, beta = choice.hparams["alpha"], choice.hparams["beta"]

    def logits(vectors: Vectors) -> Logits:
        votes = vote(vectors, support.vectors, support.one_hot(), beta)
        return zero_shot_logits(vectors, text, logit_scale) + alpha * votes

    return Adapted(method="tip", logits=logits, choice=choice)


def vote(vectors: Vectors, keys: Vectors, values: NDArray[Any], beta: float) -> Logits:
    """(N, C) exp(-beta (1 - f . K')) V, a block of rows at a time."""
    parts = []
    step = max(1, _CELLS // max(1, len(keys)))
    for start in range(0, len(vectors), step):
        affinity = np.asarray(vectors[start : start + step], np.float32) @ np.asarray(keys, np.float32).T
        np.subtract(affinity, 1, out=affinity)
        affinity *= beta
        np.exp(affinity, out=affinity)
        parts.append((affinity @ values).astype(np.float64))
    return np.concatenate(parts) if parts else np.zeros((0, values.shape[1]))


def fit_tip_trained(
    support: Features, selection: Selection, *, text: Vectors, logit_scale: float = 100.0, epochs: int = 20,
    batch_size: int = 256, learning_rate: float = 1e-3, alpha: float = 1.0, beta: float = 5.5, seed: int = 0,
    alphas: tuple[float, ...] = ALPHAS, betas: tuple[float, ...] = BETAS, **_: Any,
) -> Adapted:  # fmt: skip
    """Tip-Adapter-F: keys trained at `alpha` and `beta` as given; epoch, alpha and beta of use are chosen.

    Epoch 0 is the untrained cache, so a training that only harms is not used.
    """
    facts = (text, logit_scale, epochs, batch_size, learning_rate, alpha, beta, seed)

    def candidates(train: Features, held_out: Features) -> Iterator[tuple[Params, Logits]]:
        base = zero_shot_logits(held_out.vectors, text, logit_scale)
        for epoch, keys in enumerate(train_keys(train, *facts)):
            for b in betas:
                votes = vote(held_out.vectors, keys, train.one_hot(), b)
                for a in alphas:
                    yield {"epoch": epoch, "alpha": a, "beta": b}, base + a * votes

    choice = selection.choose(support, candidates)
    chosen = next(k for epoch, k in enumerate(train_keys(support, *facts)) if epoch == choice.hparams["epoch"])
    use_alpha, use_beta = choice.hparams["alpha"], choice.hparams["beta"]

    def logits(vectors: Vectors) -> Logits:
        base = zero_shot_logits(vectors, text, logit_scale)
        return base + use_alpha * vote(vectors, chosen, support.one_hot(), use_beta)

    return Adapted(method="tip_f", logits=logits, choice=choice)


def train_keys(
    support: Features, text: Vectors, logit_scale: float, epochs: int, batch_size: int, learning_rate: float,
    alpha: float, beta: float, seed: int,
) -> Iterator[Vectors]:  # fmt: skip
    """The keys (M, D) before training, and after each epoch."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    vectors, labels = torch.tensor(support.vectors), torch.tensor(support.y)
    weights, values = torch.tensor(np.asarray(text, np.float32)), torch.tensor(support.one_hot())
    keys = torch.nn.Parameter(vectors.clone())
    yield keys.detach().numpy().copy()
    optimizer = torch.optim.AdamW([keys], lr=learning_rate, eps=1e-4)
    steps = epochs * -(-len(labels) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=draw).split(batch_size):
            f = vectors[rows]
            votes = torch.exp(-beta * (1 - f @ keys.T)) @ values
            loss = torch.nn.functional.cross_entropy(logit_scale * f @ weights.T + alpha * votes, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        yield keys.detach().numpy().copy()
