"""A vision transformer beside a BERT, as one model of transformers: copied into exports, so it stands alone.

BiomedCLIP and UniMed-CLIP have no class in transformers (plain CLS tokens and a two-layer text projection), so an
export of them brings this file, and AutoModel reads it with `trust_remote_code=True`. It imports torch and
transformers only. Keys and arithmetic are those of the open_clip model it was exported from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


class DualEncoderConfig(PretrainedConfig):
    """Sizes of the two towers; `vision` and `text` are plain tables."""

    model_type = "biomedclip_dual_encoder"

    def __init__(
        self,
        vision: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        projection_dim: int = 512,
        **kwargs: Any,
    ) -> None:
        self.vision = vision or {"width": 32, "layers": 1, "heads": 2, "patch_size": 16, "image_size": 32}
        self.text = text or {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden": 32}
        self.projection_dim = projection_dim
        super().__init__(**kwargs)


@dataclass
class DualEncoderOutput(ModelOutput):
    """Logits of each image for each text, and the unit embeddings."""

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float, quick_gelu: bool) -> None:
        super().__init__()
        self.heads, self.quick_gelu = heads, quick_gelu
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, W) to (B, L, W)."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))
        hidden = self.fc1(self.norm2(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick_gelu else F.gelu(hidden)
        output: torch.Tensor = x + self.fc2(hidden)
        return output


class VisionTower(nn.Module):
    """Images (B, 3, H, W) to embeddings (B, D): a ViT's class token, projected without bias."""

    def __init__(self, config: dict[str, Any], projection_dim: int) -> None:
        super().__init__()
        width, patch, eps = config["width"], config["patch_size"], config.get("eps", 1e-6)
        tokens = (config["image_size"] // patch) ** 2 + 1
        self.patch = nn.Conv2d(3, width, patch, patch, bias=config.get("patch_bias", True))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.pre_norm = nn.LayerNorm(width, eps=eps) if config.get("pre_norm") else nn.Identity()
        hidden = config.get("hidden", 4 * width)
        quick = config.get("quick_gelu", False)
        self.blocks = nn.Sequential(
            *(Block(width, config["heads"], hidden, eps, quick) for _ in range(config["layers"]))
        )
        self.norm = nn.LayerNorm(width, eps=eps)
        self.proj = nn.Linear(width, projection_dim, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings, not normalised."""
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        embedding: torch.Tensor = self.proj(self.norm(self.blocks(self.pre_norm(x))[:, 0]))
        return embedding


class DualEncoder(PreTrainedModel):
    """Image and text embeddings and their logits, as transformers' CLIPModel gives them."""

    config_class = DualEncoderConfig
    base_model_prefix = "dual_encoder"
    main_input_name = "pixel_values"

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__(config)
        sizes = {key: value for key, value in config.text.items() if key != "hidden"}
        width, hidden = config.text["hidden_size"], config.text["hidden"]
        self.vision = VisionTower(config.vision, config.projection_dim)
        self.text = BertModel(BertConfig(**sizes), add_pooling_layer=False)
        self.text_proj = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, config.projection_dim, bias=False)
        )
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, D) embeddings of images, not normalised."""
        features: torch.Tensor = self.vision(pixel_values)
        return features

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """(B, D) embeddings of texts, not normalised; without a mask, padding is what has the id 0."""
        mask = (input_ids != 0).long() if attention_mask is None else attention_mask
        states = self.text(input_ids=input_ids, attention_mask=mask).last_hidden_state
        features: torch.Tensor = self.text_proj(states[:, 0])
        return features

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool = False,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> DualEncoderOutput:
        """Logits of each image for each text; `return_loss` adds CLIP's symmetric cross entropy of a batch of pairs."""
        images = F.normalize(self.get_image_features(pixel_values), dim=-1)
        texts = F.normalize(self.get_text_features(input_ids, attention_mask), dim=-1)
        logits = self.logit_scale.exp() * images @ texts.T
        loss = None
        if return_loss:
            labels = torch.arange(len(logits), device=logits.device)
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        return DualEncoderOutput(
            loss=loss, logits_per_image=logits, logits_per_text=logits.T, image_embeds=images, text_embeds=texts
        )
