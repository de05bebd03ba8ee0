"""The objective that a config names, from the tensors of a step to one number.

A module only because ALIP keeps running means, which a resumed run must continue. ALIP (Yang et al. 2023, section 3.3)
trusts a sample less where its caption and a second caption of the same picture disagree more than usual, and within
such samples trusts each image-caption pair by its similarity; both captions train the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from biomedclip.errors import ConfigError
from biomedclip.training.config import LossConfig
from biomedclip.training.gather import gather_rows, world_size
from biomedclip.training.objectives.hopfield import cloob_losses
from biomedclip.training.objectives.long_captions import rebuild, smoothing_losses
from biomedclip.training.objectives.pairs import Pairs, batch_pairs
from biomedclip.training.objectives.sigmoid import siglip_losses
from biomedclip.training.objectives.softmax import clip_losses, infoloob_losses
from biomedclip.training.terms import StepTensors

ALIP_SHARPNESS, ALIP_MOMENTUM = 2.0, 0.99
"""Gamma and the momentum of the running means (Yang et al. 2023, section 4.1)."""


class Objective(nn.Module):
    """Computes the loss of a step; its mean over the processes is the loss of the global batch."""

    means: Tensor

    def __init__(self, settings: LossConfig) -> None:
        super().__init__()
        self.settings = settings
        # Running means of cos(text, second text), cos(image, text), cos(image, second text); NaN before the first step.
        self.register_buffer("means", torch.full((3,), torch.nan), persistent=settings.name == "alip")

    def forward(self, step: StepTensors) -> tuple[Tensor, Tensor]:
        """Scalar loss, and the (b,) losses of the samples, without gradient, whose mean it is.

        Raises ConfigError where the model or the batch lacks what the objective needs.
        """
        settings = self.settings
        pairs = batch_pairs(
            dict(step.batch), soft_targets=settings.soft_targets, same_article=settings.same_article == "ignore",
            same_caption=settings.same_caption == "ignore", dtype=step.image.dtype,
        )  # fmt: skip
        known: dict[str, Any] = {"pairs": pairs, "first_row": step.first_row, "tile": settings.tile}
        if settings.name == "siglip":
            if step.logit_bias is None:
                raise ConfigError("loss.name", "siglip needs a model with a logit bias", todo="take another model")
            return siglip_losses(step.image, step.all_text, step.logit_scale, step.logit_bias, **known)
        if settings.name == "infoloob" and settings.hopfield_beta:
            return cloob_losses(
                step.image, step.text, step.all_image, step.all_text, step.logit_scale, beta=settings.hopfield_beta,
                **known,
            )  # fmt: skip
        if settings.name == "infoloob":
            return infoloob_losses(step.image, step.all_text, step.logit_scale, **known)
        if settings.name == "alip":
            return self._alip(step, pairs)
        return self._clip(step, known)

    def _clip(self, step: StepTensors, known: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """CLIP's loss, and with Long-CLIP's settings that of short captions beside it."""
        settings = self.settings

        def losses(image: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
            loss, samples = clip_losses(image, texts, step.logit_scale, **known)
            if not settings.label_smoothing:
                return loss, samples
            extra, each = smoothing_losses(
                image, texts, step.logit_scale, settings.label_smoothing, first_row=step.first_row
            )
            return loss + extra, samples + each

        loss, samples = losses(step.image, step.all_text)
        short = settings.short_captions
        if short is None:
            return loss, samples
        if step.second_text is None:
            raise ConfigError("loss.short_captions", "needs samples with a short caption", todo="pass second_text")
        coarse = rebuild(step.image, step.all_image, short.components)
        of_short, each = losses(coarse, gather_rows(step.second_text))
        return loss + short.weight * of_short, samples + short.weight * each

    def _alip(self, step: StepTensors, pairs: Pairs) -> tuple[Tensor, Tensor]:
        if step.second_text is None:
            raise ConfigError("loss.name", "alip needs samples with two captions", todo="pass second_text")
        image, text, second = step.image.detach(), step.text.detach(), step.second_text.detach()
        cosines = torch.stack([(text * second).sum(1), (image * text).sum(1), (image * second).sum(1)])
        if self.training:
            self._follow(cosines.mean(dim=1))
        sample, *captions = alip_weights(cosines, self.means.to(cosines))
        loss, samples = step.image.new_zeros(()), step.image.new_zeros(len(step.image))
        for rows, weight in zip((step.all_text, gather_rows(step.second_text)), captions, strict=True):
            of_caption, each = clip_losses(
                step.image, rows, step.logit_scale, pairs=pairs, weights=sample * weight, first_row=step.first_row,
                tile=self.settings.tile,
            )  # fmt: skip
            loss, samples = loss + of_caption, samples + each
        return loss, samples

    def _follow(self, now: Tensor) -> None:
        if world_size() > 1:
            dist.all_reduce(now)
            now = now / world_size()
        now = now.to(self.means)
        seen = torch.where(torch.isnan(self.means), now, self.means)
        self.means.copy_(ALIP_MOMENTUM * seen + (1 - ALIP_MOMENTUM) * now)


def alip_weights(cosines: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b,) weights of the samples, of their pairs with the caption, and with the second caption.

    From (3, b) cosines of caption and second caption, image and caption, image and second caption, and their running
    means: min(1, exp(gamma (c - mean))) for samples; exp(gamma (c - mean)) for pairs where the sample's is below 1.
    """
    powers = torch.exp(ALIP_SHARPNESS * (cosines - means[:, None]))
    sample = powers[0].clamp(max=1.0)
    ones = torch.ones_like(sample)
    return sample, torch.where(sample < 1, powers[1], ones), torch.where(sample < 1, powers[2], ones)
