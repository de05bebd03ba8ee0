"""EfficientNet-Lite0 beside CLIP's text transformer, in torch alone: the bundled model without a long import.

open_clip, and timm and torchvision behind it, take longer to import than a picture takes to classify. Reads the facts
and files of a released model of that architecture; yields `(model, preprocess, tokenizer)` as `load` does, with the
same tensors under the same names and the same embeddings to the last digits of float32. For inference only: what
trains, exports or explains a model takes open_clip's, from `biomedclip.load`.

The image tower follows Liu et al. 2020 (EfficientNet-Lite: no squeeze and excitation, ReLU6, stem and head not scaled)
on Tan and Le 2019, with TensorFlow's padding; the text tower Radford et al. 2021, section 2.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from biomedclip.models.build import Loaded, assemble
from biomedclip.models.load import find_released, released_parts
from biomedclip.models.zoo import Architecture
from biomedclip.tokens import encode_captions

_STAGES = (
    # blocks, kernel, stride of the first, expansion, channels: Tan and Le 2019, table 1
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _FEATURES = 32, 1280
_NORM_EPS = 1e-3
"""TensorFlow's, which the published weights were trained with."""
_VISION = {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "linear"}
_VISION_FREE = {"image_size", "timm_model_pretrained"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers"}


def load_lite(name: str | Path, *, device: str = "cpu") -> Loaded | None:
    """`(model, preprocess, tokenizer)` of a released model that these towers express; None of any other.

    Raises CheckpointError as `load` does.
    """
    facts = find_released(name)
    if facts is None or facts.tokenizer.kind != "clip" or not fits(facts.architecture):
        return None
    parts = released_parts(facts, tokenise=ClipTokens(facts.tokenizer.context))
    return assemble(parts, device=device, build=build)


def fits(architecture: Architecture) -> bool:
    """Whether the towers of this file are those of the architecture, to the last setting."""
    config = architecture.config
    if architecture.builder != "open_clip" or architecture.activation != "gelu":
        return False
    if set(config) != {"embed_dim", "custom_text", "vision_cfg", "text_cfg"} or config["custom_text"] is not True:
        return False
    vision, text = config["vision_cfg"], config["text_cfg"]
    return set(text) == _TEXT and {k: v for k, v in vision.items() if k not in _VISION_FREE} == _VISION


def build(architecture: Architecture) -> LiteClip:
    """The model of an architecture that `fits`, with weights of no meaning: a file's take their place."""
    config = architecture.config
    return LiteClip(config["embed_dim"], config["text_cfg"])


class ClipTokens:
    """Sentences to CLIP's ids, equal to open_clip's tokenizer."""

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> torch.Tensor:
        """(B, L) int64 ids; a longer sentence is cut and keeps its end token."""
        sentences = [texts] if isinstance(texts, str) else list(texts)
        return torch.from_numpy(encode_captions(sentences, context_length or self.context_length))


class LiteClip(nn.Module):
    """Two towers and a temperature, with the methods that scoring asks of open_clip's models."""

    def __init__(self, embed_dim: int, text: dict[str, int]) -> None:
        super().__init__()
        self.visual, self.text = LiteImageTower(embed_dim), TextTower(embed_dim, **text)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.logit_bias: nn.Parameter | None = None
        self.context_length, self.vocab_size = text["context_length"], text["vocab_size"]

    def encode_image(self, image: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """(B, D) of (B, 3, H, W)."""
        features: torch.Tensor = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """(B, D) of (B, L) token ids."""
        features: torch.Tensor = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features


class LiteImageTower(nn.Module):
    """Pictures (B, 3, H, W) to (B, D)."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.trunk = LiteTrunk()
        self.head = nn.Sequential()
        self.head.add_module("proj", nn.Linear(_FEATURES, embed_dim, bias=False))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Embeddings, not normalised."""
        embedding: torch.Tensor = self.head(self.trunk(image).mean((2, 3)))
        return embedding


class LiteTrunk(nn.Module):
    """Pictures to (B, 1280, H/32, W/32)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv(3, _STEM, 3, stride=2)
        self.bn1 = nn.BatchNorm2d(_STEM, eps=_NORM_EPS)
        stages, before = [], _STEM
        for count, kernel, stride, expansion, channels in _STAGES:
            blocks: list[nn.Module] = []
            for number in range(count):
                blocks.append(Block(before, channels, kernel, stride if number == 0 else 1, expansion))
                before = channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = nn.Conv2d(before, _FEATURES, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(_FEATURES, eps=_NORM_EPS)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Features before pooling."""
        x = self.blocks(F.relu6(self.bn1(self.conv_stem(image))))
        return F.relu6(self.bn2(self.conv_head(x)))


class Block(nn.Module):
    """Inverted residual: expanded (where it is), filtered channel by channel, projected without an activation."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = before * expansion
        self.is_expanded, self.has_skip = expansion > 1, stride == 1 and before == after
        filtered = SameConv(wide, wide, kernel, stride=stride, groups=wide)
        if self.is_expanded:
            self.conv_pw = nn.Conv2d(before, wide, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(wide, eps=_NORM_EPS)
            self.conv_dw, self.bn2 = filtered, nn.BatchNorm2d(wide, eps=_NORM_EPS)
            self.conv_pwl = nn.Conv2d(wide, after, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(after, eps=_NORM_EPS)
        else:
            # timm's names for the block without expansion, whose pointwise convolution is the projection
            self.conv_dw, self.bn1 = filtered, nn.BatchNorm2d(wide, eps=_NORM_EPS)
            self.conv_pw = nn.Conv2d(wide, after, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(after, eps=_NORM_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, after, H/stride, W/stride) of (B, before, H, W)."""
        if self.is_expanded:
            wide = F.relu6(self.bn1(self.conv_pw(x)))
            y: torch.Tensor = self.bn3(self.conv_pwl(F.relu6(self.bn2(self.conv_dw(wide)))))
        else:
            y = self.bn2(self.conv_pw(F.relu6(self.bn1(self.conv_dw(x)))))
        return x + y if self.has_skip else y


class SameConv(nn.Conv2d):
    """TensorFlow's "same" padding: with a stride, the odd pixel is added at the right and at the bottom."""

    def __init__(self, before: int, after: int, kernel: int, *, stride: int, groups: int = 1) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(before, after, kernel, stride=stride, padding=padding, groups=groups, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, after, ceil(H / stride), ceil(W / stride))."""
        stride, kernel = self.stride[0], self.kernel_size[0]
        if stride > 1:
            high, wide = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in input.shape[-2:])
            input = F.pad(input, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        return super().forward(input)


class TextTower(nn.Module):
    """Token ids (B, L) to (B, D), read at the end token, which has the largest id."""

    def __init__(
        self, embed_dim: int, *, context_length: int, vocab_size: int, width: int, heads: int, layers: int
    ) -> None:
        super().__init__()
        # Without initial values: drawing them for a tensor without memory makes torch import its compiler, 2 seconds.
        self.token_embedding = nn.Embedding.from_pretrained(torch.empty(vocab_size, width), freeze=False)
        self.positional_embedding = nn.Parameter(torch.zeros(context_length, width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, embed_dim))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Embeddings, not normalised."""
        length = text.shape[1]
        x = self.token_embedding(text) + self.positional_embedding[:length]
        hidden = torch.full((length, length), float("-inf"), device=x.device, dtype=x.dtype).triu_(1)
        blocks: Any = self.transformer.resblocks
        for block in blocks:
            x = block(x, hidden)
        pooled: torch.Tensor = self.ln_final(x)[torch.arange(len(x), device=x.device), text.argmax(dim=-1)]
        return pooled @ self.text_projection


class TextBlock(nn.Module):
    """A layer of the text tower: what stands before a word, then four times the width and back."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2, self.mlp = nn.LayerNorm(width), nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """(B, L, W), where `hidden` (L, L) is added to the attention's logits."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=hidden)[0]
        z: torch.Tensor = self.mlp(self.ln_2(x))
        return x + z
