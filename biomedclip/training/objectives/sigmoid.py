"""SigLIP's loss, exact, tile by tile: one pass gives the loss and its gradients.

Reads and yields what `biomedclip.training.objectives.softmax` does. A pair's term depends on no other pair, so the
slope of a tile is known as soon as its logits are: three matrix products in all and nothing to compute again, at the
price of holding the gradients (as large as the embeddings) from the forward to the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from biomedclip.training.objectives.pairs import Pairs, no_facts, tiles
from biomedclip.training.objectives.softmax import at_least_float32, tile_for


def siglip_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, *, pairs: Pairs | None = None,
    first_row: int = 0, tile: int = 0,
) -> Tensor:  # fmt: skip
    """Scalar SigLIP loss of (b, D) image and (B, D) text unit embeddings; image i belongs to text `first_row` + i.

    The sum over all B columns of binary cross entropies with logits s x·y + bias, mean over the rows (Zhai et al.
    2023, algorithm 1); equal to open_clip's `SigLipLoss` without `pairs`. With soft targets a pair's target is
    strength x label overlap, not shared among the row; pairs left out have no term.
    """
    return siglip_losses(image, text, logit_scale, logit_bias, pairs=pairs, first_row=first_row, tile=tile)[0]


def siglip_losses(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, *, pairs: Pairs | None = None,
    first_row: int = 0, tile: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`siglip_loss`, and the (b,) losses of the samples, without gradient, whose mean it is."""
    with torch.autocast(image.device.type, enabled=False):
        image, text = at_least_float32(image), at_least_float32(text)
        loss, samples = _Sigmoid.apply(
            image, text, logit_scale.to(image.dtype), logit_bias.to(image.dtype), pairs or no_facts(), first_row,
            tile or tile_for(image),
        )  # fmt: skip
    return loss, samples


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs, first_row: int, side: int
    ) -> tuple[Tensor, Tensor]:
        to_image, to_text = torch.zeros_like(image), torch.zeros_like(text)
        samples = image.new_zeros(len(image))
        to_bias = image.new_zeros((), dtype=torch.float64)
        for tile in tiles(len(image), len(text), first_row, side):
            rows, columns = image[tile.rows], text[tile.columns]
            logits = torch.mm(rows, columns.T).mul_(scale).add_(bias)
            slope = torch.sigmoid(logits)
            # -log sigmoid(z) for a negative is softplus(logit); a target t takes t x logit off it.
            terms = F.softplus(logits)
            overlap = pairs.overlap(tile)
            if overlap is not None:
                targets = pairs.strength * overlap
                if tile.has_own:
                    targets.diagonal(tile.own).fill_(1.0)
                slope -= targets
                terms -= targets * logits
            elif tile.has_own:
                slope.diagonal(tile.own).sub_(1.0)
                terms.diagonal(tile.own).sub_(logits.diagonal(tile.own))
            ignored = pairs.left_out(tile, overlap)
            if ignored is not None:
                slope.masked_fill_(ignored, 0.0)
                terms.masked_fill_(ignored, 0.0)
            samples[tile.rows] += terms.sum(dim=1)
            to_bias += slope.sum()
            to_image[tile.rows].addmm_(slope, columns)
            to_text[tile.columns].addmm_(slope.T, rows)
        to_scale = torch.linalg.vecdot(image, to_image).sum()
        ctx.save_for_backward(to_image, to_text, to_scale, to_bias.to(image.dtype), scale)
        ctx.mark_non_differentiable(samples)
        return samples.mean(), samples

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        to_image, to_text, to_scale, to_bias, scale = ctx.saved_tensors
        factor = gradients[0] / len(to_image)
        slopes = to_image * (factor * scale), to_text * (factor * scale), factor * to_scale, factor * to_bias
        return (*slopes, None, None, None)
