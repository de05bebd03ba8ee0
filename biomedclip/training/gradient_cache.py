"""Batches larger than memory, exactly: embed in parts, take the loss of the whole, embed again part by part.

Reads a function that embeds a part and one that takes the loss of all embeddings; leaves the gradients in the
parameters (Gao et al. 2021, section 3). A contrastive loss couples all samples, so adding up the losses of parts is
another objective; here the loss sees every pair, and its gradient at the embeddings is carried through the towers in
the second pass. Each part draws its dropout from a seed of its own, so the second pass repeats the first exactly. The
logit scale gets its gradient once, from the loss, and the gradients of several processes are exchanged once, with the
last part. The cost is one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")
Embeddings = tuple[Tensor, ...]


def cached_backward(
    parts: Sequence[Part],
    embed: Callable[[int, Part], Embeddings],
    backward_loss: Callable[[Embeddings], None],
    *,
    exchange: Callable[[bool], AbstractContextManager[object]],
    backward_part: Callable[[Tensor, bool], None],
) -> None:
    """Add the gradient of the loss over all parts to the parameters.

    `embed(i, part)` gives (b, D) tensors and must repeat itself exactly for the same i; `backward_loss` takes the
    embeddings of all parts as leaves and runs backward down to them. `exchange(False)` is a context in which gradients
    stay in this process; `backward_part(surrogate, last)` runs backward from a scalar whose gradient is the part's.
    """
    with torch.no_grad():
        embedded = [embed(number, part) for number, part in enumerate(parts)]
    leaves = tuple(torch.cat(rows).detach().requires_grad_() for rows in zip(*embedded, strict=True))
    sizes = [len(rows[0]) for rows in embedded]
    del embedded
    with exchange(False):
        backward_loss(leaves)
    slopes = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    first = 0
    for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        last = number == len(parts) - 1
        with exchange(last):
            rows = embed(number, part)
            here = [slope[first : first + size] for slope in slopes]
            surrogate = torch.stack([(row * slope).sum() for row, slope in zip(rows, here, strict=True)]).sum()
            backward_part(surrogate, last)
        first += size
