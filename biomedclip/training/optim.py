"""Which parameter learns how fast: groups of the optimizer, and the schedule of its rate.

Reads a model's named parameters and the config; yields AdamW's groups. Weights of matrices and kernels decay, vectors
and scalars (norms, biases, the logit scale) do not. With layer-wise decay a block near the input learns slower than one
near the output, tower by tower: the rate is multiplied by decay ** (blocks above it), the stem standing below the
first block and the head above the last (Bao et al. 2022, BEiT, section 3.1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import nn

from biomedclip.training.config import OptimConfig, ScheduleConfig

_BLOCK = re.compile(r"(?:resblocks|blocks|layers?|stages)\.(\d+)\.|layer(\d+)\.")
_STEM = re.compile(
    r"conv1|conv_stem|bn1|class_embedding|positional_embedding|pos_embed|cls_token|reg_token|patch_embed|"
    r"token_embedding|embeddings|ln_pre|norm_pre|\.stem"
)
_TEXT = re.compile(r"text\.|transformer\.|token_embedding|positional_embedding|ln_final|text_projection|cls_emb")


def make_optimizer(model: nn.Module, settings: OptimConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained. Each group keeps its share of the rate as `rate_share`."""
    groups = [
        {"params": parameters, "weight_decay": decay, "lr": settings.lr * share, "rate_share": share}
        for (share, decay), parameters in parameter_groups(model.named_parameters(), settings).items()
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], settings: OptimConfig
) -> dict[tuple[float, float], list[nn.Parameter]]:
    """(share of the rate, weight decay) -> the trained parameters that have it."""
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    depths = {name: _depth(name) for name, _ in trained}
    highest: dict[str, float] = {}
    for tower, depth in depths.values():
        if math.isfinite(depth):
            highest[tower] = max(highest.get(tower, 0), depth)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained:
        tower, depth = depths[name]
        above = max(highest.get(tower, 0) + 1 - depth, 0) if tower and math.isfinite(depth) else 0
        share = settings.layer_decay**above
        decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((share, decay), []).append(parameter)
    return groups


def _depth(name: str) -> tuple[str, float]:
    """Tower of a parameter and its block, from 1; 0 for the stem, infinity for the head, no tower for the scale."""
    name = name.replace("_orig_mod.", "")
    tower = "image" if name.startswith("visual.") else "text" if _TEXT.match(name) else ""
    block = _BLOCK.search(name)
    if block:
        return tower, int(block[1] or block[2]) + 1
    return tower, 0 if _STEM.search(name) else math.inf


def rate_factor(step: int, max_steps: int, schedule: ScheduleConfig) -> float:
    """Share of the full learning rate that step `step` (from 0) takes; the first step is already above zero."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    done = min((step - schedule.warmup_steps) / max(max_steps - schedule.warmup_steps, 1), 1.0)
    return schedule.final_ratio + (1 - schedule.final_ratio) * (1 + math.cos(math.pi * done)) / 2
