"""The LightningModule of an answering head: a batch of questions to a loss, and a batch to answers.

Each question is a row of (picture index, word ids, answer index, type). Pictures are either embedded already (frozen
tower: a table of features) or kept as preprocessed pixels that go through the tower in every step (fine-tuned). The
loss is the sum over answers of binary cross-entropy within the question's own type, as MEVF and QCR have it, plus the
type's; an answer outside the training vocabulary is no target, so such rows teach only the type. When answering, the
type comes from the words of the question, never from the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from biomedclip.training.vqa.config import VqaTrainConfig
from biomedclip.training.vqa.heads import FUSIONS, AutoEncoder, Words

CLOSED = 0
"""Value of a row's type; 1 is open."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """All pictures of a data set: features (N, D), or pixels (N, 3, H, W) and the tower; and grey ones if asked for."""

    features: Tensor | None
    pixels: Tensor | None = None
    grey: Tensor | None = None
    width: int = 0


class AnswerModule(LightningModule):
    """A head, and the tower under it where that is trained too."""

    def __init__(
        self, config: VqaTrainConfig, pictures: Pictures, *, num_words: int, closed: int, opened: int,
        tower: nn.Module | None = None, blind: bool = False, max_steps: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.max_steps = max_steps
        head = config.head
        self.settings, self.pictures, self.num_closed, self.blind = config, pictures, closed, blind
        self.tower = tower
        self.words = Words(num_words, head.width, head.dropout)
        self.opened = nn.Linear(head.width, 1)
        self.autoencoder = AutoEncoder(head.autoencoder_px) if pictures.grey is not None else None
        width = pictures.width + (AutoEncoder.FEATURES if self.autoencoder else 0)
        self.fusion = FUSIONS[head.name](head, width, closed, opened)

    def look(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) picture features and the auto-encoder's loss; zeros for a blind head."""
        loss = torch.zeros((), device=self.device)
        if self.pictures.features is not None:
            seen = self.pictures.features[index.cpu()].to(self.device)
        else:
            pixels = self.pictures.pixels[index.cpu()].to(self.device)  # type: ignore[index]
            seen = self.tower.encode_image(pixels, normalize=True).float()  # type: ignore[union-attr,operator]
        # Unit vectors have coordinates near 1 / sqrt(D): scaled, they move a layer as much as the words' states.
        seen = seen * seen.shape[1] ** 0.5
        if self.autoencoder is not None:
            coded, loss = self.autoencoder(self.pictures.grey[index.cpu()].to(self.device))  # type: ignore[index]
            seen = torch.cat([seen, coded], 1)
        return (torch.zeros_like(seen), loss * 0) if self.blind else (seen, loss)

    def forward(self, index: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, closed + open) answer logits, (B,) logits of being open, and the auto-encoder's loss."""
        seen, loss = self.look(index)
        states, last = self.words(ids)
        mask = ids != 0
        return self.fusion(seen, states, last, mask), self.opened(last)[:, 0], loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        index, ids, answer, kind = batch
        logits, type_logit, coded = self(index, ids)
        parts = logits[:, : self.num_closed], logits[:, self.num_closed :]
        loss = F.binary_cross_entropy_with_logits(type_logit, kind.float())
        for value, (part, offset) in enumerate(zip(parts, (0, self.num_closed), strict=True)):
            rows = (kind == value) & (answer >= 0)
            if rows.any() and part.shape[1]:
                target = F.one_hot(answer[rows] - offset, part.shape[1]).float()
                loss = loss + F.binary_cross_entropy_with_logits(part[rows], target, reduction="sum") / len(answer)
        return loss + self.settings.head.autoencoder_weight * coded

    @torch.no_grad()
    def answer(self, index: Tensor, ids: Tensor) -> Tensor:
        """(B,) answer indices: the best of the type that the question's words suggest."""
        logits, type_logit, _ = self(index, ids)
        opened = type_logit > 0
        if self.num_closed in (0, logits.shape[1]):
            return logits.argmax(1)
        columns = torch.arange(logits.shape[1], device=logits.device) >= self.num_closed
        return logits.masked_fill(columns[None] != opened[:, None], -torch.inf).argmax(1)

    def configure_optimizers(self) -> Any:
        """AdamW, the tower at its own rate, both falling along a cosine."""
        config = self.settings
        tower = list(self.tower.parameters()) if self.tower is not None else []
        ours = {id(p) for p in tower}
        groups: list[dict[str, Any]] = [{"params": [p for p in self.parameters() if id(p) not in ours]}]
        if tower:
            groups.append({"params": tower, "lr": config.tower_lr})
        optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
