"""MUSK: the image and the text expert of one BEiT-3 multiway transformer, as two towers.

In BEiT-3 (Wang et al., CVPR 2023) every layer holds two sets of weights, A for patches and B for words. An image alone
passes through all A, a text alone through all B, so that for retrieval and zero-shot the multiway transformer is two
plain ones: pre-norm blocks with a second LayerNorm inside attention and feed-forward (sub-LN, Magneto). The order of
layers follows public torchscale code; LayerNorm's epsilon is torchscale's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from biomedclip.config import Config, check_config
from biomedclip.models.towers.two_towers import Tower, TwoTowers

FIRST_POSITION = 2  # positions are counted from 2, as fairseq does; rows 0 and 1 of the tables are never read
PAD = 1  # XLM-R's <pad>


class Musk(Config):
    """The `architecture.config` of a model built here."""

    width: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    vocab_size: int
    positions: int
    """Rows of the text's position table."""
    context: int
    layer_norm_eps: float = 1e-5


class Attention(nn.Module):
    """Self-attention with a LayerNorm before its output projection."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.inner_attn_ln = nn.LayerNorm(width, eps=eps)
        self.out_proj = nn.Linear(width, width)

    def forward(self, states: torch.Tensor, attended: torch.Tensor | None) -> torch.Tensor:
        """States (B, L, W); `attended` (B, 1, 1, L) is true for tokens that may be looked at."""
        query, key, value = (
            part(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attended)
        projected: torch.Tensor = self.out_proj(self.inner_attn_ln(mixed.transpose(1, 2).flatten(2)))
        return projected


class FeedForward(nn.Module):
    """Linear, GELU, LayerNorm, Linear."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.ffn_layernorm = nn.LayerNorm(4 * width, eps=eps)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States (B, L, W) to the same shape."""
        widened: torch.Tensor = self.fc2(self.ffn_layernorm(F.gelu(self.fc1(states))))
        return widened


class Layer(nn.Module):
    """One block of one expert; names as in the published weights."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=eps)
        self.self_attn = Attention(width, heads, eps)
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)
        self.ffn = FeedForward(width, eps)

    def forward(self, states: torch.Tensor, attended: torch.Tensor | None) -> torch.Tensor:
        """States (B, L, W) to the same shape."""
        states = states + self.self_attn(self.self_attn_layer_norm(states), attended)
        changed: torch.Tensor = states + self.ffn(self.final_layer_norm(states))
        return changed


class Encoder(nn.Module):
    """All blocks of one expert with its table of positions: (B, L, W) to the first token's state (B, W)."""

    def __init__(self, musk: Musk, positions: int) -> None:
        super().__init__()
        self.embed_positions = nn.Embedding(positions, musk.width)
        self.layers = nn.ModuleList(Layer(musk.width, musk.heads, musk.layer_norm_eps) for _ in range(musk.layers))
        self.layer_norm = nn.LayerNorm(musk.width, eps=musk.layer_norm_eps)
        self.checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.checkpointing = enable

    def forward(self, states: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
        """`real` (B, L) is true for tokens that are no padding."""
        states = states + self.embed_positions.weight[FIRST_POSITION : FIRST_POSITION + states.shape[1]]
        attended = None
        if real is not None:
            states = states * real.unsqueeze(-1)
            attended = real[:, None, None, :]
        for layer in self.layers:
            if self.checkpointing and self.training:
                states = checkpoint(layer, states, attended, use_reentrant=False)
            else:
                states = layer(states, attended)
        first: torch.Tensor = self.layer_norm(states[:, 0])
        return first


class ImageTower(Tower):
    """Images (B, 3, H, W) to embeddings (B, W)."""

    def __init__(self, musk: Musk) -> None:
        super().__init__()
        patches = (musk.image_size // musk.patch_size) ** 2
        self.image_size = (musk.image_size, musk.image_size)
        self.proj = nn.Conv2d(3, musk.width, musk.patch_size, stride=musk.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, musk.width))
        self.trunk = Encoder(musk, patches + 1 + FIRST_POSITION)
        self.head = nn.Linear(musk.width, musk.width, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings of images, not normalised."""
        patches = self.proj(images).flatten(2).transpose(1, 2)
        states = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        embedding: torch.Tensor = self.head(self.trunk(states))
        return embedding


class TextTower(Tower):
    """Token ids (B, L) to embeddings (B, W)."""

    def __init__(self, musk: Musk) -> None:
        super().__init__()
        self.context_length, self.vocab_size = musk.context, musk.vocab_size
        self.token_embedding = nn.Embedding(musk.vocab_size, musk.width)
        self.trunk = Encoder(musk, musk.positions)
        self.head = nn.Linear(musk.width, musk.width, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings of sentences, not normalised."""
        embedding: torch.Tensor = self.head(self.trunk(self.token_embedding(tokens), tokens != PAD))
        return embedding


def build(config: Mapping[str, Any]) -> TwoTowers:
    """The model of a config, with random weights. Raises ConfigError for a config that breaks the schema."""
    musk = check_config(dict(config), Musk, "architecture.config")
    return TwoTowers(ImageTower(musk), TextTower(musk))
