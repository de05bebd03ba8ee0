"""The LightningModule of an answering head: a batch of questions to a loss, and a batch to answers.

Each question is a row of (picture index, word ids, answer index, type, word scores). Pictures are either embedded
already (frozen tower: a table of features) or pixels that go through the tower in every step (fine-tuned). The loss is
the sum over answers of binary cross-entropy within the question's own type, as MEVF and QCR have it, plus the type's;
an answer outside the training vocabulary is no target, so such rows teach only the type. When answering, the type comes
from the words of the question, or from the data where the run says `answer_type: told`.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from biomedclip.training.vqa.config import VqaTrainConfig
from biomedclip.training.vqa.heads import FUSIONS, AutoEncoder, Words, silence
from biomedclip.training.vqa.pictures import Pictures

CLOSED = 0
"""Value of a row's type; 1 is open."""
_SHARPNESS = 8.0
"""Logits per unit of a word score, before training: a score of one half, the border between said and not, is 0."""


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
        self.fusion = FUSIONS[head.name](head, width, pictures.regions, closed, opened)
        if head.words_first:
            self.sharpness = nn.Parameter(torch.full((3,), _SHARPNESS))
            silence(self.fusion)
            nn.init.zeros_(self.opened.weight)
            nn.init.zeros_(self.opened.bias)

    def look(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(B, R, D) picture features and the auto-encoder's loss; zeros for a blind head."""
        loss = torch.zeros((), device=self.device)
        if self.pictures.features is not None:
            seen = self.pictures.features[index.cpu()].to(self.device)
        else:
            pixels = self.pictures.pixels(index.cpu()).to(self.device)  # type: ignore[misc]
            seen = self.tower.encode_image(pixels.flatten(0, 1), normalize=True).float()  # type: ignore[union-attr,operator]
            seen = seen.view(len(pixels), self.pictures.regions, -1)
        # Unit vectors have coordinates near 1 / sqrt(D): scaled, they move a layer as much as the words' states.
        seen = seen * seen.shape[-1] ** 0.5
        if self.autoencoder is not None:
            grey = self.pictures.grey[index.cpu()].to(self.device).float() / 255  # type: ignore[index]
            coded, loss = self.autoencoder(grey)
            seen = torch.cat([seen, coded[:, None].expand(-1, seen.shape[1], -1)], 2)
        return (torch.zeros_like(seen), loss * 0) if self.blind else (seen, loss)

    def forward(self, index: Tensor, ids: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, closed + open) answer logits, (B,) logits of being open, and the auto-encoder's loss."""
        seen, loss = self.look(index)
        states, last = self.words(ids)
        logits, opened = self.fusion(seen, states, last, ids != 0), self.opened(last)[:, 0]
        if self.settings.head.words_first:
            scale = self.sharpness.repeat_interleave(self._parts(logits))
            said = (start - 0.5) * scale
            logits, opened = logits + said[:, :-1], opened + said[:, -1]
        return logits, opened, loss

    def _parts(self, logits: Tensor) -> Tensor:
        """How many columns of word scores are of closed answers, of open ones, and of being open."""
        return torch.tensor([self.num_closed, logits.shape[1] - self.num_closed, 1], device=logits.device)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        index, ids, answer, kind, start = batch
        logits, type_logit, coded = self(index, ids, start)
        parts = logits[:, : self.num_closed], logits[:, self.num_closed :]
        loss = F.binary_cross_entropy_with_logits(type_logit, kind.float())
        for value, (part, offset) in enumerate(zip(parts, (0, self.num_closed), strict=True)):
            rows = (kind == value) & (answer >= 0)
            if rows.any() and part.shape[1]:
                target = F.one_hot(answer[rows] - offset, part.shape[1]).float()
                loss = loss + F.binary_cross_entropy_with_logits(part[rows], target, reduction="sum") / len(answer)
        return loss + self.settings.head.autoencoder_weight * coded

    @torch.no_grad()
    def answer(self, index: Tensor, ids: Tensor, start: Tensor, kind: Tensor | None = None) -> Tensor:
        """(B,) answer indices: the best of the type that the words suggest, or of `kind` where it is told."""
        logits, type_logit, _ = self(index, ids, start)
        opened = type_logit > 0 if kind is None else kind != CLOSED
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
