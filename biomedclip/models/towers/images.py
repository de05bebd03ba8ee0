"""Image towers over timm's trunks: ViT, Swin and ResNet-50 with the poolings of the released models.

timm's names are used for all three because they are stable: a ResNet-50 is called as in torchvision, while the Swin of
transformers has renamed its weights between versions.
"""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
from open_clip.modified_resnet import ModifiedResNet
from pydantic import Field

from biomedclip.config import Config
from biomedclip.models.towers.two_towers import Head, Projection, Tower


class Vision(Config):
    """An image tower; `options` go to timm as they are."""

    trunk: str
    """A name of timm, or `clip_resnet` for CLIP's ResNet with attention pooling."""
    image_size: int
    pool: Literal["trunk", "first"] = "trunk"
    """`trunk`: as timm pools it (class token of a ViT, mean of a Swin or ResNet); `first`: the first patch's features,
    which is what CXR-CLIP takes from its Swin for a class token."""
    options: dict[str, Any] = Field(default_factory=dict)
    projection: Projection = Projection()


class TimmTower(Tower):
    """A timm trunk and a head: images (B, 3, H, W) to embeddings (B, D)."""

    def __init__(self, vision: Vision, embed_dim: int) -> None:
        super().__init__()
        sized: dict[str, Any] = {} if vision.trunk.startswith("resnet") else {"img_size": vision.image_size}
        trunk: Any = timm.create_model(vision.trunk, pretrained=False, num_classes=0, **sized, **vision.options)
        self.trunk = trunk
        self.first = vision.pool == "first"
        self.image_size = (vision.image_size, vision.image_size)
        self.head = Head(vision.projection, trunk.num_features, embed_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings of images, not normalised."""
        trunk: Any = self.trunk
        features = trunk.forward_features(images).flatten(1, -2)[:, 0] if self.first else trunk(images)
        embedding: torch.Tensor = self.head(features)
        return embedding


def build_image_tower(vision: Vision, embed_dim: int) -> torch.nn.Module:
    """The tower of a config: timm's trunk with a head, or open_clip's ResNet, whose attention pooling projects."""
    if vision.trunk != "clip_resnet":
        return TimmTower(vision, embed_dim)
    return ModifiedResNet(output_dim=embed_dim, image_size=vision.image_size, **vision.options)
