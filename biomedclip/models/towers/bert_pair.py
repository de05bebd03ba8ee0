"""KEEP, PMC-CLIP, MedCLIP, FLAIR, CXR-CLIP and RetiZero: an image tower beside a BERT, each with its pooling and head.

The six differ in trunk, pooling and projection only, so that one builder with a checked config serves them all; what
each takes, and who said so, stands in its file of the zoo.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from biomedclip.config import Config, check_config
from biomedclip.models.towers.bert import Bert, BertTower
from biomedclip.models.towers.images import Vision, build_image_tower
from biomedclip.models.towers.two_towers import TwoTowers


class BertPair(Config):
    """The `architecture.config` of a model built here."""

    embed_dim: int
    vision: Vision
    text: Bert


def build(config: Mapping[str, Any]) -> TwoTowers:
    """The model of a config, with random weights. Raises ConfigError for a config that breaks the schema."""
    pair = check_config(dict(config), BertPair, "architecture.config")
    return TwoTowers(build_image_tower(pair.vision, pair.embed_dim), BertTower(pair.text, pair.embed_dim))
