"""Heat maps over a model's input: which places of the picture raise a score, by the kind of the image tower.

Reads a model, the function of its input that is to be explained (a cosine) and one input, yields a map and the name of
the method. Three ways, the first that fits:

- Towers whose blocks pass tokens with self-attention (ViT): attention relevance (Chefer et al. 2021, "Generic
  Attention-model Explainability", section 3.1). Attention maps, each weighted by its own positive gradient, are
  multiplied through the blocks, from the tokens that the score depends on back to the patches.
- Towers whose stages pass feature maps (ResNet, EfficientNet, MobileNet, ConvNeXt, Swin): gradient times activation
  (LayerCAM, Jiang et al. 2021, without its ReLUs inside of the sum, because the stages of inverted bottlenecks are
  signed; HiResCAM, Draelos & Carin 2020), summed over channels, over the last stages. On 96 px the last map is 3 x 3,
  which Grad-CAM (Selvaraju et al. 2017) would draw as it is; earlier stages give the outline.
- Any other tower: occlusion (Zeiler & Fergus 2014), a grey square moved over the picture, which needs no knowledge of
  the inside and a pass for every place.

Fused attention computes no attention map. A `TorchFunctionMode` stands in for it while a picture is explained and
computes the same by its definition, so that no tower has to be rebuilt and nothing is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Score = Callable[[torch.Tensor], torch.Tensor]
"""Inputs (B, 3, H, W) to what is explained (B,)."""

# Where towers that are not timm's keep their blocks, relative to the image tower.
_BLOCKS = ("transformer.resblocks", "trunk.layers", "trunk.vision_model.encoder.layers", "trunk.encoder.layers")
_CLIP_STAGES = ("layer1", "layer2", "layer3", "layer4")
_REACHED = 0.5
"""A map tells places apart only where the score depends on more than this share of them: a head that reads one patch
(CXR-CLIP's Swin) leaves the last stage without."""
_MAPS = 3
_OCCLUSION_GRID = 12
_BATCH = 16


def find_evidence(model: nn.Module, score: Score, pixels: torch.Tensor) -> tuple[torch.Tensor, str]:
    """A map (H, W) over `pixels` (1, 3, H, W), 0 to 1 with the strongest place at 1, and the method's name.

    All zero where no place raises the score. Weights and their gradients stay as they are.
    """
    visual = getattr(model, "visual", model)
    blocks = list_blocks(visual)
    heat, method = None, ""
    if blocks:
        with torch.enable_grad(), _record(visual, blocks) as record, record.attention:
            value = score(pixels.detach().requires_grad_(True)).sum()
        if record.outputs and all(output.dim() == 3 for output in record.outputs):
            heat, method = _attention_relevance(value, record), "attention relevance (Chefer et al. 2021)"
        elif record.outputs and all(output.dim() == 4 for output in record.outputs):
            channels_last = str(getattr(getattr(visual, "trunk", None), "output_fmt", "")).endswith("NHWC")
            heat, method = _class_activation(value, record, channels_last), "gradient × activation (LayerCAM)"
    if heat is None:
        heat, method = _occlude(score, pixels), "occlusion"
    heat = F.interpolate(heat.detach().float()[None, None], pixels.shape[2:], mode="bilinear")[0, 0].clamp_min(0)
    return heat / heat.max().clamp_min(torch.finfo(heat.dtype).tiny), method


def list_blocks(visual: nn.Module) -> list[nn.Module]:
    """The blocks or stages of an image tower in the order of the pass; empty for a tower that is not known."""
    trunk: Any = getattr(visual, "trunk", None)
    info: Any = getattr(trunk, "feature_info", None)
    if info:
        entries = info.info if hasattr(info, "info") else info
        return [trunk.get_submodule(entry["module"]) for entry in entries if entry.get("module")]
    for path in _BLOCKS:
        try:
            return list(visual.get_submodule(path).children())
        except AttributeError:
            continue
    if all(hasattr(visual, name) for name in _CLIP_STAGES):
        return [visual.get_submodule(name) for name in _CLIP_STAGES]
    return []


class _Attention(TorchFunctionMode):
    """Computes attention by its definition, so that its maps (B, heads, L, L) exist and have gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward and _is_packed_self_attention(args, kwargs):
            return self._attend_packed(args[0], *args[4:7], *args[11:13]), None
        return func(*args, **kwargs)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        logits = query @ key.transpose(-2, -1) * (scale if scale is not None else query.shape[-1] ** -0.5)
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        weights = logits.softmax(dim=-1)
        self.maps.append(weights)
        return weights @ value

    def _attend_packed(
        self, states: torch.Tensor, heads: int, weight: torch.Tensor, bias: torch.Tensor | None,
        out_weight: torch.Tensor, out_bias: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """What `nn.MultiheadAttention` computes of states (L, B, W) for themselves."""
        parts = F.linear(states, weight, bias).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for part in parts)
        mixed = self._attend(query, key, value)
        return F.linear(mixed.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias)


def _is_packed_self_attention(args: Any, kwargs: Any) -> bool:
    """Whether `F.multi_head_attention_forward` is called as by a block of a ViT: one input, one weight, no mask."""
    extras = ("key_padding_mask", "attn_mask", "use_separate_proj_weight", "static_k", "static_v")
    plain = all(kwargs.get(name) in (None, False) for name in extras)
    return len(args) == 13 and args[0] is args[1] is args[2] and args[7:9] == (None, None) and not args[9] and plain


@dataclass
class _Record:
    """What one pass left: each block's output, the attention maps, and the size of the last map before the blocks."""

    attention: _Attention = field(default_factory=_Attention)
    outputs: list[torch.Tensor] = field(default_factory=list)
    grid: tuple[int, int] = (0, 0)


@contextmanager
def _record(visual: nn.Module, blocks: list[nn.Module]) -> Iterator[_Record]:
    """Keep the outputs of `blocks` and the grid of patches of the passes that are made while the context lasts."""
    record = _Record()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        # Blocks of transformers and of some of open_clip's return a tuple with the states first.
        record.outputs.append(output[0] if isinstance(output, tuple) else output)

    def keep_grid(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if not record.outputs:
            record.grid = (output.shape[-2], output.shape[-1])

    handles = [block.register_forward_hook(keep) for block in blocks]
    handles += [m.register_forward_hook(keep_grid) for m in visual.modules() if isinstance(m, nn.Conv2d)]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _attention_relevance(value: torch.Tensor, record: _Record) -> torch.Tensor | None:
    """Relevance of the patches (h, w); None where attention or the grid of patches is not what it is taken for."""
    last = record.outputs[-1]
    tokens = last.numel() // last.shape[-1]
    maps = [weights for weights in record.attention.maps if weights.shape[-2:] == (tokens, tokens)]
    height, width = record.grid
    if not maps or not 0 < height * width <= tokens:
        return None
    gradients = torch.autograd.grad(value, [last, *maps], allow_unused=True)
    relevance = gradients[0].reshape(tokens, -1).norm(dim=-1)
    relevance = relevance / relevance.sum().clamp_min(torch.finfo(relevance.dtype).tiny)
    for weights, gradient in zip(reversed(maps), reversed(gradients[1:]), strict=True):
        if gradient is not None:  # the last block of a tower that reads its output in part only
            weighted = (weights * gradient).clamp_min(0).reshape(-1, tokens, tokens).mean(dim=0)
            relevance = relevance + relevance @ weighted
    return relevance[tokens - height * width :].reshape(height, width)


def _class_activation(value: torch.Tensor, record: _Record, channels_last: bool) -> torch.Tensor | None:
    """Gradient times activation over the last stages, (h, w) of the finest; None where no stage tells places apart."""
    gradients = torch.autograd.grad(value, record.outputs, allow_unused=True)
    found: dict[torch.Size, torch.Tensor] = {}
    for output, gradient in zip(record.outputs, gradients, strict=True):
        if gradient is None:
            continue
        channel = -1 if channels_last else 1
        reached = (gradient != 0).any(dim=channel).float().mean()
        heat = (output * gradient).sum(dim=channel)[0].clamp_min(0)
        if reached > _REACHED and heat.numel() > 1:
            found[heat.shape] = heat  # of several maps of one size the last is the nearest to the score
    maps = list(found.values())[-_MAPS:]
    if not maps:
        return None
    size = maps[0].shape
    drawn = [
        F.interpolate((heat / heat.max().clamp_min(1e-30))[None, None].float(), size, mode="bilinear") for heat in maps
    ]
    return torch.stack(drawn).mean(dim=0)[0, 0]


def _occlude(score: Score, pixels: torch.Tensor) -> torch.Tensor:
    """The fall of the score when a square is hidden, (h, w) over the places of the square."""
    size = torch.Size(pixels.shape[2:])
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    places = F.interpolate(torch.eye(_OCCLUSION_GRID**2).view(-1, 1, _OCCLUSION_GRID, _OCCLUSION_GRID), size=size)
    # Squares reach over their neighbours' places by half: one alone may hide too little to matter.
    margin = [length // (2 * _OCCLUSION_GRID) for length in size]
    hidden = F.max_pool2d(places, [2 * m + 1 for m in margin], stride=1, padding=margin) > 0
    with torch.no_grad():
        whole = score(pixels)
        falls = [whole - score(torch.where(part.to(pixels.device), mean, pixels)) for part in hidden.split(_BATCH)]
    return torch.cat(falls).view(_OCCLUSION_GRID, _OCCLUSION_GRID).clamp_min(0)
