"""Weights between two models of one architecture, and a model that carries them for a while.

Reads two sets of weights; yields their interpolation (WiSE-FT, averages, sweeps in evaluation and in training). What is
done with a point is `biomedclip.training.wise` and `biomedclip.evaluation.adapters.wise`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from biomedclip.errors import CheckpointError

Weights = Mapping[str, Tensor]


def interpolate(start: Weights, end: Weights, alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) start + alpha end, tensor by tensor; integers are the end's.

    Wortsman et al. 2022 (arXiv 2109.01903, equation 1). 0 gives the start's and 1 the end's values exactly. Raises
    CheckpointError where names or shapes differ, because what is missing on one side cannot be between.
    """
    _check_alike(start, end)
    mixed = {}
    for name, last in end.items():
        first = start[name]
        if not last.is_floating_point() or alpha == 1:
            mixed[name] = last.clone()
        elif alpha == 0:
            mixed[name] = first.to(last.dtype, copy=True)
        else:
            wide = torch.lerp(first.to(torch.float64), last.to(torch.float64), alpha)
            mixed[name] = wide.to(last.dtype)
    return mixed


@contextmanager
def carrying(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Let the model carry other weights inside the block; its own come back bit by bit, whatever happens inside.

    `weights` may name a part of the model's parameters and buffers.
    """
    state = model.state_dict()
    saved = {name: state[name].clone() for name in weights}
    try:
        _put(state, weights)
        yield
    finally:
        _put(state, saved)


def _check_alike(start: Weights, end: Weights) -> None:
    if alone := sorted(start.keys() ^ end.keys()):
        raise CheckpointError("WiSE-FT", f"{len(alone)} tensors are in one model only", found=alone[0],
                              todo="name two states of one model")  # fmt: skip
    for name, tensor in end.items():
        if start[name].shape != tensor.shape:
            raise CheckpointError("WiSE-FT", f"{name} has two shapes",
                                  found=f"{tuple(start[name].shape)} and {tuple(tensor.shape)}",
                                  todo="name two states of one model")  # fmt: skip


def _put(state: Weights, weights: Weights) -> None:
    with torch.no_grad():
        for name, tensor in weights.items():
            state[name].copy_(tensor)
