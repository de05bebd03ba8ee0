"""Heat maps over a model's input: which places of the picture raise a score, by the kind of the image tower.

Reads a model, the function of its input that is to be explained (a cosine) and one input, yields a map and the name of
the method. Three ways, the first that fits:

- Towers whose blocks pass tokens with self-attention (ViT): attention relevance (Chefer et al. 2021, "Generic
  Attention-model Explainability", section 3.1). Attention maps, each weighted by its own positive gradient, are
  multiplied through the blocks, from the pooling's attention or the tokens that are read, back to the patches.
- Towers whose stages pass feature maps (ResNet, EfficientNet, MobileNet, ConvNeXt, Swin): LayerCAM (Jiang et al. 2021),
  the sum over channels of the positive part of gradient times activation, which is the paper's for activations after a
  ReLU and holds for the signed ones of inverted bottlenecks too. The maps of the last three sizes are multiplied: on
  96 px the last one is 3 x 3, which Grad-CAM (Selvaraju et al. 2017) draws as it is; earlier ones give the outline.
- Any other tower: occlusion (Zeiler & Fergus 2014), a grey square moved over the picture, which needs no knowledge of
  the inside and a pass for every place.

Fused attention computes no attention map. A `TorchFunctionMode` stands in for it while a picture is explained and
computes the same by its definition, so that no tower has to be rebuilt and nothing is patched.
"""

from __future__ import annotations

import threading
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

_RELEVANCE = "attention relevance (Chefer et al. 2021)"
_LAYER_CAM = "LayerCAM of the last three sizes of feature maps (Jiang et al. 2021)"
_OCCLUSION = "occlusion (Zeiler & Fergus 2014)"
# Where towers that are not timm's keep their blocks, relative to the image tower.
_BLOCKS = ("transformer.resblocks", "trunk.layers", "trunk.vision_model.encoder.layers", "trunk.encoder.layers")
_CLIP_STAGES = ("layer1", "layer2", "layer3", "layer4")
_REACHED = 0.5
"""A map tells places apart only where the score depends on more than this share of them: a head that reads one patch
(CXR-CLIP's Swin) leaves the last stage without."""
_MAPS = 3
_FLOOR = 0.05
"""Added before maps are multiplied: what one stage misses is weakened twentyfold and not lost."""
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
        with torch.enable_grad(), _record(visual, blocks) as record:
            value = score(pixels.detach().requires_grad_(True)).sum()
        dimensions = {output.dim() for output in record.outputs}
        if dimensions == {3}:
            heat, method = _attention_relevance(value, record), _RELEVANCE
        elif dimensions == {4}:
            channels_last = str(getattr(getattr(visual, "trunk", None), "output_fmt", "")).endswith("NHWC")
            heat, method = _layer_cam(value, record, channels_last), _LAYER_CAM
    if heat is None:
        heat, method = _occlude(score, pixels), _OCCLUSION
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


@contextmanager
def record_attention() -> Iterator[list[torch.Tensor]]:
    """A list that fills with the attention maps (B, heads, queries, keys) of what is run inside, in order.

    Outputs stay the same but for rounding. Maps are part of the graph: a score has gradients for them.
    """
    with _Attention() as mode:
        yield mode.maps


class _Attention(TorchFunctionMode):
    """Computes attention by its definition, so that its maps (B, heads, L, L) exist and have gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward and _is_plain(args, kwargs):
            return self._attend_with_weights(args, kwargs), None
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

    def _attend_with_weights(self, args: Any, kwargs: Any) -> torch.Tensor:
        """What `nn.MultiheadAttention` computes; states are (L, B, W), for one input's attention as for a pooling's."""
        heads, packed, bias, out_weight, out_bias = (args[number] for number in (4, 5, 6, 11, 12))
        if kwargs.get("use_separate_proj_weight"):
            weights = [kwargs[f"{part}_proj_weight"] for part in "qkv"]
        else:
            weights = packed.chunk(3)
        biases = bias.chunk(3) if bias is not None else (None, None, None)
        query, key, value = (
            F.linear(states, weight, shift).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
            for states, weight, shift in zip(args[:3], weights, biases, strict=True)
        )
        mixed = self._attend(query, key, value)
        return F.linear(mixed.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias)


def _is_plain(args: Any, kwargs: Any) -> bool:
    """Whether `F.multi_head_attention_forward` is called as an image tower does: by place, no mask, nothing added."""
    extras = ("key_padding_mask", "attn_mask", "static_k", "static_v", "is_causal")
    return len(args) == 13 and args[7] is args[8] is None and not args[9] and not any(map(kwargs.get, extras))


@dataclass
class _Record:
    """What one pass left: each block's output, the attention maps, and the size of the last map before the blocks."""

    maps: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    grid: tuple[int, int] = (0, 0)


@contextmanager
def _record(visual: nn.Module, blocks: list[nn.Module]) -> Iterator[_Record]:
    """Keep the outputs of `blocks` and the grid of patches of the passes that are made while the context lasts."""
    record = _Record()
    owner = threading.get_ident()  # The page's other threads may run the same model meanwhile.

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == owner:
            # Blocks of transformers and of some of open_clip's return a tuple with the states first.
            record.outputs.append(output[0] if isinstance(output, tuple) else output)

    def keep_grid(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if threading.get_ident() == owner and not record.outputs:
            record.grid = (output.shape[-2], output.shape[-1])

    handles = [block.register_forward_hook(keep) for block in blocks]
    handles += [m.register_forward_hook(keep_grid) for m in visual.modules() if isinstance(m, nn.Conv2d)]
    try:
        with record_attention() as record.maps:
            yield record
    finally:
        for handle in handles:
            handle.remove()


def _attention_relevance(value: torch.Tensor, record: _Record) -> torch.Tensor | None:
    """Relevance of the patches (h, w); None where attention or the grid of patches is not what it is taken for."""
    last = record.outputs[-1]
    tokens = last.numel() // last.shape[-1]
    maps = [weights for weights in record.maps if weights.shape[-2:] == (tokens, tokens)]
    pools = [weights for weights in record.maps if weights.shape[-1] == tokens != weights.shape[-2]][-1:]
    height, width = record.grid
    if not maps or not 0 < height * width <= tokens:
        return None
    from_last, *gradients = torch.autograd.grad(value, [last, *maps, *pools], allow_unused=True)
    weighted = [
        # No gradient: the tower reads nothing that this map moved.
        torch.zeros_like(weights) if gradient is None else (weights * gradient).clamp_min(0)
        for weights, gradient in zip([*maps, *pools], gradients, strict=True)
    ]
    if pools:
        start = weighted[-1].reshape(-1, tokens).mean(dim=0)
    else:
        start = from_last.reshape(tokens, -1).norm(dim=-1)
        start = start / start.sum().clamp_min(torch.finfo(start.dtype).tiny)
    relevance = start
    for step in reversed(weighted[: len(maps)]):
        relevance = relevance + relevance @ step.reshape(-1, tokens, tokens).mean(dim=0)
    if not pools:
        # The class token, or all tokens alike where their mean is read: that one is read is no evidence by itself.
        relevance = relevance - start
    return relevance[tokens - height * width :].reshape(height, width)


def _layer_cam(value: torch.Tensor, record: _Record, channels_last: bool) -> torch.Tensor | None:
    """LayerCAM over the last stages, (h, w) of the finest; None where no stage tells places apart."""
    gradients = torch.autograd.grad(value, record.outputs, allow_unused=True)
    found: dict[torch.Size, torch.Tensor] = {}
    for output, gradient in zip(record.outputs, gradients, strict=True):
        if gradient is None:
            continue
        channel = -1 if channels_last else 1
        reached = (gradient != 0).any(dim=channel).float().mean()
        heat = (output * gradient).clamp_min(0).sum(dim=channel)[0]
        if reached > _REACHED and heat.numel() > 1:
            found[heat.shape] = heat  # of several maps of one size the last is the nearest to the score
    maps = list(found.values())[-_MAPS:]
    if not maps:
        return None
    size = maps[0].shape
    heat = torch.ones(size, device=maps[0].device)
    for found_map in maps:
        scaled = found_map.float() / found_map.max().clamp_min(torch.finfo(torch.float32).tiny)
        heat = heat * (F.interpolate(scaled[None, None], size, mode="bilinear")[0, 0] + _FLOOR)
    return heat - _FLOOR ** len(maps)


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
