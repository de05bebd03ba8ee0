"""MedSigLIP: the two towers of transformers' SigLIP, with attention-pooled images and no text mask.

open_clip has the architecture, but its timm trunk cannot be told the 448 pixels of the release, so the towers are
transformers' own; the released keys are theirs as well. SigLIP attends to padding and reads the last position (Zhai et
al. 2023, section 3.2), so text is always padded to the context. Scores are sigmoid(scale * cosine + bias).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import SiglipTextConfig, SiglipTextModel, SiglipVisionConfig, SiglipVisionModel

from biomedclip.models.towers.two_towers import Tower, TwoTowers

INITIAL_LOGIT_BIAS = -10.0  # Zhai et al. 2023, section 3.2; checkpoints replace it


class SiglipTower(Tower):
    """Images (B, 3, H, W) or token ids (B, L) to embeddings (B, D), by one of transformers' SigLIP models."""

    def __init__(self, trunk: nn.Module, context_length: int | None = None, vocab_size: int | None = None) -> None:
        super().__init__()
        self.trunk, self.context_length, self.vocab_size = trunk, context_length, vocab_size

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Embeddings, not normalised."""
        pooled: torch.Tensor = self.trunk(batch).pooler_output
        return pooled


def build(config: Mapping[str, Any]) -> TwoTowers:
    """The model of a config with `vision` and `text` sections in transformers' words, with random weights."""
    # The ids of start and end only serve generation; the defaults are CLIP's and lie outside of this vocabulary.
    text = SiglipTextConfig(**config["text"], bos_token_id=None, eos_token_id=None)
    vision = SiglipVisionConfig(**config["vision"])
    model = TwoTowers(
        SiglipTower(SiglipVisionModel(vision)),
        SiglipTower(SiglipTextModel(text), text.max_position_embeddings, text.vocab_size),
    )
    model.logit_bias = nn.Parameter(torch.tensor(INITIAL_LOGIT_BIAS))
    return model
