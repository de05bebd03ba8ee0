"""One step of contrastive training as a LightningModule: batch to loss, optimiser and schedule.

Reads the batches of `biomedclip.stream.loader` (uint8 images, normalised here on the device) and yields the loss; the
Trainer does the rest. The model inside is a plain open_clip model, so it can be exported at any step. The number of
steps comes from the config: asking the Trainer for it (`estimated_stepping_batches`) makes Lightning load the data
before the state of the loader is restored, and a resumed run silently starts its data at the beginning.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from biomedclip.training.config import ScheduleConfig, TrainConfig
from biomedclip.training.losses import clip_loss, same_article, soft_targets


class ContrastiveModule(LightningModule):
    """Trains an open_clip model. `latest` holds the numbers of the last step, for callbacks to log."""

    # Buffers of the normalisation, named for the type checker.
    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        if config.channels_last:
            self.model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload, union-attr]
        visual: Any = model.visual
        facts = visual.preprocess_cfg
        self.register_buffer("mean", 255 * torch.tensor(facts["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(facts["std"]).view(-1, 1, 1), persistent=False)
        self.latest: dict[str, Tensor | float] = {}
        self._validation: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        image, text = self.embed(batch)
        settings = self.config.loss
        targets = soft_targets(batch["labels"], settings.soft_targets) if settings.soft_targets else None
        ignore = same_article(batch["article"]) if settings.same_article == "ignore" else None
        scale = self.logit_scale
        loss = clip_loss(image, text, scale, targets=targets, ignore=ignore)
        self.latest = {"loss": loss.detach(), "logit_scale": scale.detach()}
        return loss

    def embed(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Unit embeddings (B, D) of a batch's images and texts."""
        pixels = (batch["image"].to(self.mean.dtype) - self.mean) / self.std
        if self.config.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        # Captions compiled from labels repeat within a batch: each different one goes through the tower once.
        texts, place = torch.unique(batch["text"], dim=0, return_inverse=True)
        model: Any = self.model
        return model.encode_image(pixels, normalize=True), model.encode_text(texts, normalize=True)[place]

    @property
    def logit_scale(self) -> Tensor:
        """The factor of the cosine similarities (exponentiated)."""
        parameter: Any = self.model.logit_scale
        return parameter.exp()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keeps the embeddings of a validation batch until the last one is in."""
        self._validation.append(self.embed(batch))

    def on_validation_epoch_end(self) -> None:
        """Adds the loss and recall@1 over all validation pairs to `latest`."""
        image, text = (torch.cat(parts) for parts in zip(*self._validation, strict=True))
        self._validation.clear()
        own = torch.arange(len(image), device=image.device)
        best_text, best_image = (image @ text.T).argmax(dim=1), (text @ image.T).argmax(dim=1)
        self.latest["val_loss"] = clip_loss(image, text, self.logit_scale)
        self.latest["val_image_to_text/recall@1"] = (best_text == own).float().mean()
        self.latest["val_text_to_image/recall@1"] = (best_image == own).float().mean()

    def configure_optimizers(self) -> Any:
        """AdamW over decaying and not decaying parameters, its rate set at every step."""
        settings = self.config.optim
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
        steps, schedule = self.config.max_steps, self.config.schedule
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps, schedule))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clips the global norm as the config says and keeps the norm before clipping for the log."""
        limit = self.config.optim.clip_norm or math.inf
        self.latest["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keeps the logit scale within [1, max_logit_scale], as CLIP does (Radford et al. 2021, section 2.5)."""
        with torch.no_grad():
            parameter: Any = self.model.logit_scale
            parameter.clamp_(0, math.log(self.config.loss.max_logit_scale))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the state of torch's generator, which dropout and patch dropout draw from."""
        checkpoint["rng_cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            checkpoint["rng_cuda"] = torch.cuda.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the state of torch's generator."""
        torch.set_rng_state(checkpoint["rng_cpu"])
        if torch.cuda.is_available() and "rng_cuda" in checkpoint:
            torch.cuda.set_rng_state(checkpoint["rng_cuda"])


def rate_factor(step: int, max_steps: int, schedule: ScheduleConfig) -> float:
    """Share of the full learning rate that step `step` (from 0) takes; the first step is already above zero."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    done = min((step - schedule.warmup_steps) / max(max_steps - schedule.warmup_steps, 1), 1.0)
    return schedule.final_ratio + (1 - schedule.final_ratio) * (1 + math.cos(math.pi * done)) / 2
