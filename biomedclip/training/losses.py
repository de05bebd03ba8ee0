"""Contrastive objectives as functions of embeddings: the number to minimise, and nothing else.

They read unit image and text embeddings of one batch and the logit scale; `soft_targets` turns the labels of the
batch into the share that each text has in each image's target. Captions compiled from labels repeat: with a target
of one per row, twenty pictures of a red blood cell are told to be unlike each other's captions. With targets by label
overlap they share the target instead, which is what lets a hundred steps suffice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def clip_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, targets: Tensor | None = None, ignore: Tensor | None = None
) -> Tensor:
    """Scalar CLIP loss of (B, D) unit embeddings: the mean of image-to-text and text-to-image cross entropy.

    `logit_scale` is the factor itself (already exponentiated). row i of `targets` (B, B), whose
    rows add up to 1, says how image i spreads over the texts and text i over the images; None means the identity,
    which gives the loss of CLIP (Radford et al. 2021, figure 3) and open_clip's `ClipLoss`. `ignore` (B, B) is true
    where a pair is neither a positive nor a negative, such as two figures of one article.
    """
    logits = logit_scale * image @ text.T
    if ignore is not None:
        logits = logits.masked_fill(ignore, torch.finfo(logits.dtype).min)
    if targets is None:
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return (_soft_cross_entropy(logits, targets) + _soft_cross_entropy(logits.T, targets)) / 2


def _soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def soft_targets(labels: Tensor, strength: float = 1.0) -> Tensor:
    """(B, B) targets, each row adding up to 1, from (B, K) label ids, -1 where a sample has fewer than K.

    Pairs weigh the Jaccard overlap of their label sets, |a ∩ b| / |a ∪ b| (for one label each: same or not, as in
    UniCL, Yang et al. 2022); a sample weighs 1 with itself and, without labels, 0 with all others. The result is
    (1 - strength) I + strength (row-normalised overlap).
    """
    size = len(labels)
    identity = torch.eye(size, device=labels.device)
    if labels.numel() == 0 or strength == 0:
        return identity
    _, ids = torch.unique(labels.clamp(min=-1), return_inverse=True)
    members = torch.zeros(size, int(ids.max()) + 1, device=labels.device)
    members.scatter_(1, ids, (labels >= 0).float())
    shared = members @ members.T
    counts = members.sum(dim=1)
    union = counts[:, None] + counts[None, :] - shared
    overlap = torch.where(union > 0, shared / union.clamp(min=1), torch.zeros_like(shared))
    overlap.fill_diagonal_(1.0)
    return (1 - strength) * identity + strength * overlap / overlap.sum(dim=1, keepdim=True)


def same_article(articles: Tensor) -> Tensor:
    """(B, B) bool, true where two different samples come from one article; -1 marks a sample without an article."""
    same = (articles[:, None] == articles[None, :]) & (articles >= 0)[:, None]
    return same & ~torch.eye(len(articles), dtype=torch.bool, device=articles.device)
