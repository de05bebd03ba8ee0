"""BioViL and BioViL-T: a ResNet-50 whose patches are projected and then averaged, beside CXR-BERT.

BioViL-T (Bannur et al., CVPR 2023) halves the projected patches' input: 256 channels from the image, 256 from its
difference to an earlier one. Without an earlier image the second half is one learned vector, and the transformer that
compares two images is not run; this is the path built here, and the transformer's weights are dropped by the zoo file.
The layer order follows the public hi-ml code. Cosines are published unscaled, so that the zoo files fill the scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from pydantic import Field
from torch import nn

from biomedclip.config import Config, check_config
from biomedclip.models.towers.bert import Bert, BertTower
from biomedclip.models.towers.two_towers import Tower, TwoTowers


class BioVilVision(Config):
    """The image tower of BioViL; `temporal_dim` makes it BioViL-T's."""

    image_size: int
    temporal_dim: int | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class BioVil(Config):
    """The `architecture.config` of a model built here."""

    embed_dim: int
    vision: BioVilVision
    text: Bert


class BioVilTower(Tower):
    """Images (B, 3, H, W) to embeddings (B, D): the mean of the projected patches."""

    def __init__(self, vision: BioVilVision, embed_dim: int) -> None:
        super().__init__()
        trunk: Any = timm.create_model("resnet50", pretrained=False, num_classes=0, **vision.options)
        self.trunk, width = trunk, trunk.num_features
        self.image_size = (vision.image_size, vision.image_size)
        self.reduce: nn.Module | None = None
        if vision.temporal_dim is not None:
            self.reduce = nn.Conv2d(width, vision.temporal_dim, 1, bias=False)
            self.missing_previous = nn.Parameter(torch.zeros(1, vision.temporal_dim, 1, 1))
            width = 2 * vision.temporal_dim
        self.projector = nn.Sequential(
            nn.Conv2d(width, embed_dim, 1, bias=False),
            nn.BatchNorm2d(embed_dim),
            nn.ReLU(),
            nn.Conv2d(embed_dim, embed_dim, 1),
        )

    def embed_patches(self, images: torch.Tensor) -> torch.Tensor:
        """Projected patches (B, D, h, w), what similarity maps are drawn from."""
        trunk: Any = self.trunk
        patches = trunk.forward_features(images)
        if self.reduce is not None:
            patches = self.reduce(patches)
            patches = torch.cat([patches, self.missing_previous.expand_as(patches)], dim=1)
        projected: torch.Tensor = self.projector(patches)
        return projected

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings of images, not normalised."""
        return self.embed_patches(images).mean(dim=(2, 3))


def build(config: Mapping[str, Any]) -> TwoTowers:
    """The model of a config, with random weights. Raises ConfigError for a config that breaks the schema."""
    biovil = check_config(dict(config), BioVil, "architecture.config")
    head = nn.Sequential(
        nn.Linear(biovil.text.hidden_size, biovil.embed_dim),
        nn.GELU(),
        nn.LayerNorm(biovil.embed_dim, eps=1e-12),
        nn.Linear(biovil.embed_dim, biovil.embed_dim),
    )
    text = BertTower(biovil.text, biovil.embed_dim, head)
    return TwoTowers(BioVilTower(biovil.vision, biovil.embed_dim), text)
