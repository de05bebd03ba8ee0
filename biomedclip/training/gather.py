"""Rows of all processes as one tensor, forward and backward: the only communication that the losses need.

Reads the (b, ...) rows of this process; yields the (B, ...) rows of all, in rank order. The gradient of a gathered row
is added up over the processes and goes back to its owner. Strategies average gradients over processes, so a loss whose
mean over the processes is the loss of the global batch trains exactly as one process with that batch. Without a process
group everything here is the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_rows(rows: Tensor) -> Tensor:
    """(B, ...) rows of all processes in rank order, differentiable; `rows` itself in a single process.

    Every process must bring as many rows. The backward pass is a collective too: all processes must run it.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        gathered = rows.new_empty((world_size() * len(rows), *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        own = gradients[0].new_empty((ctx.count, *gradients[0].shape[1:]))
        dist.reduce_scatter_tensor(own, gradients[0].contiguous())
        return own
