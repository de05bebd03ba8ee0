"""What Long-CLIP adds to CLIP's loss: label smoothing, and short captions matched to what is coarse in the images.

Reads the embeddings of a step; yields numbers that are added to the objective. An image that only ever meets long
captions loses its sense of which of its facts are the important ones, so the short caption (the first sentence) is
matched to the image's embedding rebuilt from the first few principal components of the batch (Zhang et al. 2024, arXiv
2403.15378, section 3.2). Components are those of the global batch: a result that does not depend on how many processes
share it, and the authors' where there is one. They come from the D x D covariance rather than from a singular value
decomposition of the batch, because only the subspace is wanted, and its gradient exists wherever the last kept variance
is above the first dropped one; that of single vectors blows up where any two variances meet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from biomedclip.training.objectives.softmax import at_least_float32

_SMALLEST_GAP = 1e-12
"""Of the largest variance: below it two variances count as equal, and the gradient through their order as none."""


def smoothing_losses(
    image: Tensor, all_text: Tensor, logit_scale: Tensor, smoothing: float, *, first_row: int = 0
) -> tuple[Tensor, Tensor]:
    """What label smoothing adds to the CLIP loss of (b, D) images and (B, D) texts, and its (b,) shares.

    Cross entropy with `smoothing` e over B columns (Szegedy et al. 2016, section 7) is the plain one plus
    e (S_ii - mean_j S_ij). Its mean over the rows is that over the columns too, and the mean of all S_ij is the product
    of the mean embeddings, so no matrix is needed.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = at_least_float32(image), at_least_float32(all_text)
        own = text[first_row : first_row + len(image)]
        samples = smoothing * logit_scale.to(image.dtype) * torch.linalg.vecdot(image, own - text.mean(dim=0))
    return samples.mean(), samples.detach()


def rebuild(rows: Tensor, store: Tensor, count: int) -> Tensor:
    """(b, D) rows as the mean of the (B, D) store and its first `count` principal components give them back.

    Not normalised, as in the authors' code. The rows themselves where the store has no more components than that.
    """
    if count >= min(len(store) - 1, store.shape[1]):
        return rows
    with torch.autocast(rows.device.type, enabled=False):
        rows, store = at_least_float32(rows), at_least_float32(store)
        mean = store.mean(dim=0)
        centred = store - mean
        onto: Tensor = _Projector.apply(centred.T @ centred, count)
        return mean + (rows - mean) @ onto


class _Projector(torch.autograd.Function):
    """(D, D) projector onto the eigenvectors of the `count` largest eigenvalues of a symmetric matrix."""

    @staticmethod
    def forward(ctx: Any, covariance: Tensor, count: int) -> Tensor:
        values, vectors = torch.linalg.eigh(covariance.double())
        ctx.save_for_backward(values, vectors)
        ctx.count, ctx.dtype = count, covariance.dtype
        kept = vectors[:, -count:]
        return (kept @ kept.T).to(covariance.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        values, vectors = ctx.saved_tensors
        dropped, kept = vectors[:, : -ctx.count], vectors[:, -ctx.count :]
        gap = values[-ctx.count :][:, None] - values[: -ctx.count][None, :]
        clear = gap > _SMALLEST_GAP * values[-1]
        share = torch.where(clear, 1 / gap.where(clear, torch.ones_like(gap)), 0.0)
        slope = gradients[0].double()
        between = share * (kept.T @ (slope + slope.T) @ dropped)
        turned = kept @ between @ dropped.T
        return ((turned + turned.T) / 2).to(ctx.dtype), None
