"""Pictures in which a coloured square decides, and small towers that learn to see it: evidence whose place is known."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from biomedclip.models.build import build_architecture, quiet
from biomedclip.models.zoo import Architecture

COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1]])
EMBED_DIM = 32
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


@dataclass(frozen=True)
class PatchPicture:
    """One noisy picture with a square, in red, in green, and in red beside a green one; (3, H, W), normalised."""

    red: torch.Tensor
    green: torch.Tensor
    both: torch.Tensor
    top: int
    left: int
    side: int
    other: tuple[int, int]
    """Top and left of the green square in `both`."""

    def holds_peak(self, heat: torch.Tensor) -> bool:
        """Whether the strongest place of a map lies in the square, or in a patch of 8 pixels that the square cuts."""
        row, column = divmod(int(heat.flatten().argmax()), heat.shape[1])
        low, high = -4, self.side + 4
        return low <= row - self.top < high and low <= column - self.left < high

    def prefers_red(self, heat: torch.Tensor) -> bool:
        """Whether a map of `both` is stronger in the red square than in the green one."""
        red, green = (
            heat[top : top + self.side, left : left + self.side].mean()
            for top, left in ((self.top, self.left), self.other)
        )
        return bool(red > green)


def draw_patches(count: int, size: int, seed: int) -> list[PatchPicture]:
    """Pictures with a square a quarter as wide at a random place."""
    generator = torch.Generator().manual_seed(seed)
    side, drawn = size // 4, []
    for _ in range(count):
        noise = F.avg_pool2d(torch.rand(3, size, size, generator=generator) * 0.6 + 0.2, 3, 1, 1)
        here, there = (0, 0), (0, 0)
        while max(abs(here[0] - there[0]), abs(here[1] - there[1])) < side + 4:
            here, there = (tuple(torch.randint(0, size - side, (2,), generator=generator).tolist()) for _ in "ab")
        red, green = _paint(noise, COLOURS[0], here, side), _paint(noise, COLOURS[1], here, side)
        both = _paint(red, COLOURS[1], there, side)
        drawn.append(PatchPicture(*((one - 0.5) / 0.25 for one in (red, green, both)), *here, side, there))
    return drawn


def _paint(picture: torch.Tensor, colour: torch.Tensor, corner: tuple[int, ...], side: int) -> torch.Tensor:
    painted = picture.clone()
    painted[:, corner[0] : corner[0] + side, corner[1] : corner[1] + side] = colour[:, None, None]
    return painted


@dataclass(frozen=True)
class PatchTower:
    """A small image tower and how long it learns."""

    size: int
    steps: int
    vision: tuple[tuple[str, Any], ...]
    lr: float = 3e-3


def _vision(**config: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(config.items())


PATCH_TOWERS = {
    "EfficientNet": PatchTower(96, 40, _vision(timm_model_name="test_efficientnet", timm_pool="avg", image_size=96)),
    "ResNet": PatchTower(64, 40, _vision(timm_model_name="test_resnet", timm_pool="avg", image_size=64)),
    "ViT": PatchTower(64, 200, _vision(image_size=64, layers=2, width=48, patch_size=8, head_width=16)),
}


@cache
def patch_model(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A tower that tells red, green and no square apart, and the embeddings (3, D) of the three."""
    spec = PATCH_TOWERS[name]
    torch.manual_seed(0)
    config = {"embed_dim": EMBED_DIM, "custom_text": True, "vision_cfg": dict(spec.vision), "text_cfg": TEXT}
    with quiet():
        model = build_architecture(Architecture(activation="gelu", config=config)).train()
    generator = torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(3, EMBED_DIM, generator=generator), dim=-1)
    optimizer = torch.optim.AdamW(model.visual.parameters(), lr=spec.lr, weight_decay=0.01)
    for _ in range(spec.steps):
        pictures, labels = _draw_batch(32, spec.size, generator)
        logits = 10 * F.normalize(model.encode_image(pictures), dim=-1) @ texts.T
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    model.eval()
    pictures, labels = _draw_batch(96, spec.size, generator)
    with torch.no_grad():
        right = ((model.encode_image(pictures) @ texts.T).argmax(dim=1) == labels).float().mean().item()
    assert right > 0.9, f"{name} has not learnt the squares: {right:.2f}"
    return model, texts


def random_copy(model: nn.Module, seed: int) -> nn.Module:
    """The same tower with random weights: every parameter with more than one dimension drawn anew."""
    stranger = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stranger.visual.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.std())
    return stranger


def _draw_batch(count: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, 3, H, W) with squares of several sizes, and labels: 0 red, 1 green, 2 no square."""
    pictures = F.avg_pool2d(torch.rand(count, 3, size, size, generator=generator) * 0.6 + 0.2, 3, 1, 1)
    labels = torch.randint(0, 3, (count,), generator=generator)
    side = int(torch.randint(size // 7, size // 3, (1,), generator=generator))
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        top, left = torch.randint(0, size - side, (2,), generator=generator).tolist()
        if label < 2:
            picture[:, top : top + side, left : left + side] = COLOURS[label][:, None, None]
    return (pictures - 0.5) / 0.25, labels
