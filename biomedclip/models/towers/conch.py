"""CONCH: timm's ViT with CoCa's attention pooling, beside CoCa's text transformer with its own class token.

open_clip's CoCa pools with one pooler for both of its losses; CONCH has one for contrast and one for captions. The
caption pooler feeds only the decoder, whose weights were never released, so that it is not built. Text is 127 tokens
and a learned class token behind them; the mask is the published one, shifted by one position against the tokens, as
in all of open_clip's early CoCa weights (`correct_cls_mask` false).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from open_clip.transformer import AttentionalPooler, TextTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from biomedclip.config import Config, check_config
from biomedclip.models.towers.two_towers import Tower, TwoTowers


class ConchVision(Config):
    """The image tower."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    pooler_heads: int


class ConchText(Config):
    """The text tower; `context` leaves out the class token."""

    context: int
    vocab_size: int
    width: int
    layers: int
    heads: int


class Conch(Config):
    """The `architecture.config` of a model built here."""

    embed_dim: int
    vision: ConchVision
    text: ConchText


class ConchTower(Tower):
    """Images (B, 3, H, W) to embeddings (B, D)."""

    def __init__(self, vision: ConchVision, embed_dim: int) -> None:
        super().__init__()
        self.trunk = VisionTransformer(
            img_size=vision.image_size, patch_size=vision.patch_size, embed_dim=vision.width, depth=vision.layers,
            num_heads=vision.heads, num_classes=0, dynamic_img_size=True,
        )  # fmt: skip
        self.image_size = (vision.image_size, vision.image_size)
        self.attn_pool_contrast = AttentionalPooler(embed_dim, vision.width, n_head=vision.pooler_heads, n_queries=1)
        self.ln_contrast = nn.LayerNorm(embed_dim)
        self.proj_contrast = nn.Parameter(vision.width**-0.5 * torch.randn(embed_dim, embed_dim))

    def embed_features(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled features (B, D) before the projection: what the authors take for probing."""
        trunk: Any = self.trunk
        features: torch.Tensor = self.ln_contrast(self.attn_pool_contrast(trunk.forward_features(images))[:, 0])
        return features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings of images, not normalised."""
        return self.embed_features(images) @ self.proj_contrast


def build(config: Mapping[str, Any]) -> TwoTowers:
    """The model of a config, with random weights. Raises ConfigError for a config that breaks the schema."""
    conch = check_config(dict(config), Conch, "architecture.config")
    text = TextTransformer(
        context_length=conch.text.context, vocab_size=conch.text.vocab_size, width=conch.text.width,
        heads=conch.text.heads, layers=conch.text.layers, output_dim=conch.embed_dim, embed_cls=True, pad_id=0,
    )  # fmt: skip
    return TwoTowers(ConchTower(conch.vision, conch.embed_dim), text)
