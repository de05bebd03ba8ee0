"""CLOOB's objective: InfoLOOB on patterns retrieved from a modern Hopfield network.

Reads unit embeddings here and everywhere; yields this process's share of the loss. Each embedding is replaced by the
mixture of stored embeddings that it retrieves, once with the images of the batch as the store and once with its texts,
and normalised again. Retrieval is one softmax attention without weights, so torch's memory-saving attention computes
it without a B x B matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from biomedclip.training.gather import gather_rows
from biomedclip.training.objectives.pairs import Pairs
from biomedclip.training.objectives.softmax import at_least_float32, infoloob_losses


def retrieve(states: Tensor, stored: Tensor, beta: float) -> Tensor:
    """(b, D) unit vectors: for each state the sum of (B, D) stored patterns weighted by softmax(beta state·stored)."""
    found = F.scaled_dot_product_attention(states[None, None], stored[None, None], stored[None, None], scale=beta)
    return F.normalize(found[0, 0], dim=1)


def cloob_losses(
    image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, logit_scale: Tensor, *, beta: float,
    pairs: Pairs | None = None, first_row: int = 0, tile: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scalar CLOOB loss (Fürst et al. 2022, equations 7 and 8), and the (b,) losses of the samples whose mean it is.

    With U patterns retrieved from the stored images and V from the stored texts: InfoLOOB of the retrieved images
    against the retrieved texts over U, plus InfoLOOB of the retrieved texts against the retrieved images over V, both
    times 1 / logit_scale.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text, all_image, all_text = (at_least_float32(rows) for rows in (image, text, all_image, all_text))
        loss, samples = image.new_zeros(()), image.new_zeros(len(image))
        for anchors, others, store in ((image, text, all_image), (text, image, all_text)):
            columns = gather_rows(retrieve(others, store, beta))
            one_way, each = infoloob_losses(
                retrieve(anchors, store, beta), columns, logit_scale, pairs=pairs, first_row=first_row, both=False,
                tile=tile,
            )  # fmt: skip
            loss, samples = loss + one_way, samples + each
    return loss, samples
