"""Three heads: features of a picture's regions and words of a question to one logit an answer.

concat: [v, q, v q, |v - q|] through an MLP, the regions side by side. qcr: bilinear attention between regions and words
(Kim et al. 2018), then reasoning conditioned on the question, apart for open and closed answers (Zhan et al. 2020), as
PubMedCLIP used it with one region. transformer: regions and words as one sequence. All read the same words with the
same embedding, answer from the same vocabulary, closed answers first, and guess the question's type from its words, so
that only the fusion differs. Shape letters beside the design's: R regions, W width of the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biomedclip.training.vqa.config import VqaHeadConfig


class Words(nn.Module):
    """(B, L) word ids, 0 for none, to (B, L, W) states of a GRU and the (B, W) last one."""

    def __init__(self, num_words: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_words, width, padding_idx=0)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """States and the state behind each question's last word."""
        states, _ = self.gru(self.dropout(self.embedding(ids)))
        last = (ids != 0).sum(1).clamp(min=1) - 1
        return states, states[torch.arange(len(ids), device=ids.device), last]


def mlp(inputs: int, hidden: int, outputs: int, dropout: float) -> nn.Sequential:
    """Two layers with dropout between them."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))


class ConcatFusion(nn.Module):
    """Concatenation, product and difference of picture and question."""

    def __init__(self, config: VqaHeadConfig, image_width: int, regions: int, closed: int, opened: int) -> None:
        super().__init__()
        self.image = nn.Linear(regions * image_width, config.width)
        self.answer = mlp(4 * config.width, config.width, closed + opened, config.dropout)

    def forward(self, image: Tensor, states: Tensor, last: Tensor, mask: Tensor) -> Tensor:
        """(B, closed + open) logits."""
        v = torch.tanh(self.image(image.flatten(1)))
        return self.answer(torch.cat([v, last, v * last, (v - last).abs()], 1))  # type: ignore[no-any-return]


class QcrFusion(nn.Module):
    """Bilinear attention of regions and words in several glimpses, then a gate by the question for each answer type."""

    def __init__(self, config: VqaHeadConfig, image_width: int, regions: int, closed: int, opened: int) -> None:
        super().__init__()
        width = config.width
        self.attend_image, self.attend_words = nn.Linear(image_width, width), nn.Linear(width, width)
        self.glimpse = nn.Linear(width, config.glimpses)
        self.join_image = nn.ModuleList(nn.Linear(image_width, width) for _ in range(config.glimpses))
        self.join_words = nn.ModuleList(nn.Linear(width, width) for _ in range(config.glimpses))
        self.back = nn.ModuleList(nn.Linear(width, width) for _ in range(config.glimpses))
        self.importance = nn.Linear(width, 1)
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.answers = nn.ModuleList(mlp(width, width, size, config.dropout) for size in (closed, opened))

    def forward(self, image: Tensor, states: Tensor, last: Tensor, mask: Tensor) -> Tensor:
        """(B, closed + open) logits."""
        seen, asked = torch.tanh(self.attend_image(image)), torch.tanh(self.attend_words(states))
        joint = self.glimpse(seen[:, :, None] * asked[:, None])
        joint = joint.masked_fill(~mask[:, None, :, None], -torch.inf)
        weights = joint.flatten(1, 2).softmax(1).view_as(joint)
        for g, (image_in, words_in, back) in enumerate(zip(self.join_image, self.join_words, self.back, strict=True)):
            v, q = F.relu(image_in(image)), F.relu(words_in(states))
            pooled = torch.einsum("brl,brw,blw->bw", weights[..., g], v, q)
            states = states + back(pooled)[:, None]
        fused = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        importance = self.importance(states).masked_fill(~mask[..., None], -torch.inf).softmax(1)
        condition = (importance * states).sum(1)
        parts = [
            answer(fused * torch.sigmoid(gate(condition)))
            for gate, answer in zip(self.gates, self.answers, strict=True)
        ]
        return torch.cat(parts, 1)


class TransformerFusion(nn.Module):
    """Self-attention over a summary token, the regions and the words."""

    def __init__(self, config: VqaHeadConfig, image_width: int, regions: int, closed: int, opened: int) -> None:
        super().__init__()
        self.image = nn.Linear(image_width, config.width)
        self.summary = nn.Parameter(torch.randn(1, 1, config.width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            config.width, max(1, config.width // 64), 2 * config.width, config.dropout, batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.answer = mlp(config.width, config.width, closed + opened, config.dropout)

    def forward(self, image: Tensor, states: Tensor, last: Tensor, mask: Tensor) -> Tensor:
        """(B, closed + open) logits."""
        sequence = torch.cat([self.summary.expand(len(image), -1, -1), self.image(image), states], 1)
        hidden = F.pad(~mask, (1 + image.shape[1], 0), value=False)
        return self.answer(self.layers(sequence, src_key_padding_mask=hidden)[:, 0])  # type: ignore[no-any-return]


def silence(fusion: nn.Module) -> None:
    """Let a fusion say 0 for every answer until it is trained: what it is added to is then heard first."""
    answers = list(fusion.answers) if isinstance(fusion, QcrFusion) else [fusion.answer]
    for answer in answers:
        last: Any = answer[-1]  # type: ignore[index]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


FUSIONS = {"concat": ConcatFusion, "qcr": QcrFusion, "transformer": TransformerFusion}


class AutoEncoder(nn.Module):
    """MEVF's denoising auto-encoder (Nguyen et al. 2019): a grey picture to 64 features, and the picture again."""

    FEATURES = 64

    def __init__(self, size_px: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.features = nn.Linear(8 * (size_px // 8) ** 2, self.FEATURES)
        self.decode = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(16, 16, 2, stride=2), nn.ReLU(),
            nn.ConvTranspose2d(16, 1, 2, stride=2), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, grey: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 64) features and the mean squared error of the picture made again from one with noise."""
        noisy = (grey + 0.1 * torch.randn_like(grey)).clamp(0, 1) if self.training else grey
        code = self.encode(noisy)
        return self.features(code.flatten(1)), F.mse_loss(self.decode(code), grey)
