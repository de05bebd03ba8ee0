"""An open_clip model around two towers that were built elsewhere, and the projections that end a tower.

`TwoTowers` is open_clip's own `CustomTextCLIP` (encode_image, encode_text, logits, locking, gradient checkpointing)
without its constructor, which knows only open_clip's towers. A tower is a module with `forward` to (B, D), `lock` and
`set_grad_checkpointing`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from open_clip.model import CustomTextCLIP
from open_clip.utils import freeze_batch_norm_2d
from torch import nn
from torch.nn import functional as F

from biomedclip.config import Config
from biomedclip.errors import ConfigError

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)  # as in CLIP (Radford et al. 2021, section 2.3); checkpoints replace it


class TwoTowers(CustomTextCLIP):  # type: ignore[misc]
    """`encode_image` and `encode_text` to plain (B, D) tensors, with one learned temperature and no bias."""

    def __init__(self, visual: nn.Module, text: nn.Module) -> None:
        nn.Module.__init__(self)
        self.visual, self.text = visual, text
        self.context_length: Any = getattr(text, "context_length", None)
        self.vocab_size: Any = getattr(text, "vocab_size", None)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        self.logit_bias: nn.Parameter | None = None
        self.output_dict = False


class Tower(nn.Module):
    """What open_clip asks of a tower beside `forward`: to be frozen, and to trade time for memory."""

    trunk: nn.Module

    def lock(
        self, unlocked_layers: int = 0, freeze_layer_norm: bool = True, *, unlocked_groups: int = 0,
        freeze_bn_stats: bool = False,
    ) -> None:  # fmt: skip
        """Freeze the tower, with the options open_clip gives an image or a text tower.

        `freeze_bn_stats` also keeps running means and variances, for good. Raises ConfigError where layers are to stay
        free, which these towers cannot do.
        """
        free = unlocked_layers or unlocked_groups
        if free:
            raise ConfigError(
                type(self).__name__, "can only be locked as a whole", found=free, todo="lock all of it, or nothing"
            )
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm) and not freeze_layer_norm:
                module.requires_grad_(True)
        if freeze_bn_stats:
            freeze_batch_norm_2d(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the trunk's activations in the backward pass, where the trunk can."""
        trunk: Any = self.trunk
        if hasattr(trunk, "set_grad_checkpointing"):
            trunk.set_grad_checkpointing(enable)
            return
        # Newer releases of transformers call it activation checkpointing, older ones gradient checkpointing.
        kind = "activation" if hasattr(trunk, "activation_checkpointing_enable") else "gradient"
        getattr(trunk, f"{kind}_checkpointing_{'enable' if enable else 'disable'}")()


class Projection(Config):
    """From a tower's features to the embedding."""

    kind: Literal["none", "linear", "mlp"] = "linear"
    """`mlp`: Linear, GELU, Linear, the hidden layer as wide as the embedding."""
    bias: bool = False
    unit_features: bool = False
    """Features are scaled to length 1 before they are projected (FLAIR and its descendants)."""


class Head(nn.Module):
    """Features (B, W) to embeddings (B, D)."""

    def __init__(self, projection: Projection, width: int, embed_dim: int) -> None:
        super().__init__()
        self.unit_features = projection.unit_features
        self.proj: nn.Module
        if projection.kind == "none":
            self.proj = nn.Identity()
        elif projection.kind == "linear":
            self.proj = nn.Linear(width, embed_dim, bias=projection.bias)
        else:
            self.proj = nn.Sequential(
                nn.Linear(width, embed_dim, bias=projection.bias),
                nn.GELU(),
                nn.Linear(embed_dim, embed_dim, bias=projection.bias),
            )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Embeddings of features, not normalised."""
        if self.unit_features:
            features = F.normalize(features, dim=-1)
        embedding: torch.Tensor = self.proj(features)
        return embedding
