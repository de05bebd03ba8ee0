"""What looks at the picture: any model of `biomedclip.load`, or a bare image network of timm with its weights file.

Reads an encoder's entry of the config; yields a module with `encode_image` and its preprocessing, which is all that a
head needs. A bare network (`timm/ARCHITECTURE`) answers "does pretraining on captions help?" from the other side: the
same head on weights that saw labels of photographs. Its weights are read as tensors alone, from a file that is named:
nothing is downloaded, and no file can run code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from biomedclip.errors import ConfigError
from biomedclip.models.backbones import fill_image_tower
from biomedclip.models.load import load
from biomedclip.models.preprocess import transform_from_open_clip
from biomedclip.training.vqa.config import TIMM, VqaEncoderConfig


class BareTower(nn.Module):
    """A timm network without its classifier: pictures to pooled features."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        # The place where open_clip keeps a timm trunk, so that weights are filled in by the same code.
        self.visual = nn.Module()
        self.visual.trunk = trunk

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """(B, D) features of (B, 3, H, W) pictures; of length 1 with `normalize`."""
        found: Tensor = self.visual.trunk(image)  # type: ignore[operator]
        return nn.functional.normalize(found, dim=-1) if normalize else found


def load_encoder(encoder: VqaEncoderConfig) -> tuple[nn.Module, Callable[..., Tensor]]:
    """(module with `encode_image`, preprocessing). Random weights are those of seed 0, on any call.

    Raises ConfigError for an unknown architecture of timm, CheckpointError for weights that are missing or do not fit.
    """
    torch.manual_seed(0)
    random = encoder.init == "random"
    if not encoder.model.startswith(TIMM):
        # A file beside random weights would be ignored in silence; the config refuses the two together.
        model, preprocess, _ = load(encoder.model, random_init=random, checkpoint=encoder.checkpoint)
        return model, preprocess
    import timm

    name = encoder.model.removeprefix(TIMM)
    if name not in timm.list_models():
        near = timm.list_models(f"*{name}*")[:4]
        raise ConfigError(f"encoders.{encoder.name}.model", "is no architecture of timm", found=encoder.model,
                          todo=f"one of {', '.join(near)}" if near else "see timm.list_models()")  # fmt: skip
    tower = BareTower(timm.create_model(name, pretrained=False, num_classes=0))
    if encoder.checkpoint is not None:
        fill_image_tower(tower, encoder.checkpoint)
    return tower.eval(), _preprocessing(tower.visual.trunk, encoder.size_px)


def _preprocessing(trunk: Any, size_px: int | None) -> Callable[..., Tensor]:
    """Size, mean and std that timm notes beside the architecture's weights; the whole picture, not its centre."""
    facts = trunk.pretrained_cfg
    size = size_px or facts["input_size"][-1]
    known = {"mean": facts["mean"], "std": facts["std"], "size": size, "resize_mode": "squash"}
    return transform_from_open_clip({**known, "interpolation": facts.get("interpolation") or "bicubic"})
