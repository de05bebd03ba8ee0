"""How much of the hardware a run uses: work of a sample, counted once, over what the device could do.

Reads a model before it is trained; yields the floating point operations of a training step for one sample. Forward
passes of both towers are counted by torch's own counter at the model's full picture and text size; the backward pass of
a trained tower counts twice its forward, that of a locked one nothing. Work done twice to save memory is not counted,
so that the figure compares runs (model FLOPs utilisation, Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from biomedclip.training.towers import context_length, encode_text

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "B200": {"half": 2250, "fp32": 75},
    "H200": {"half": 989, "fp32": 67},
    "H100 PCIe": {"half": 756, "fp32": 51},
    "H100": {"half": 989, "fp32": 67},
    "A100": {"half": 312, "fp32": 19.5},
    "L40S": {"half": 362, "fp32": 91.6},
    "L4": {"half": 121, "fp32": 30.3},
    "A10": {"half": 125, "fp32": 31.2},
    "V100": {"half": 125, "fp32": 15.7},
    "T4": {"half": 65, "fp32": 8.1},
    "RTX 4090": {"half": 165, "fp32": 82.6},
    "RTX 3090": {"half": 71, "fp32": 35.6},
}
"""Dense peak of a device, from its maker's data sheets as recalled (not re-read): bf16 or fp16 on tensor cores, and
fp32 without them. The first name that a device's name contains counts."""


def sample_flops(model: nn.Module, size_px: int) -> float:
    """Floating point operations of forward and backward pass for one sample."""
    tower: Any = model
    first = next(model.parameters())
    pixels = torch.zeros(1, 3, size_px, size_px, device=first.device, dtype=first.dtype)
    tokens = torch.ones(1, context_length(model), dtype=torch.int64, device=first.device)
    was_training = model.training
    model.eval()
    try:
        image = _count(lambda: tower.encode_image(pixels))
        text = _count(lambda: encode_text(model, tokens))
    finally:
        model.train(was_training)
    visual = {id(parameter) for parameter in tower.visual.parameters()}
    trains_image = any(parameter.requires_grad for parameter in tower.visual.parameters())
    trains_text = any(p.requires_grad and p.ndim and id(p) not in visual for p in model.parameters())
    return image * (3 if trains_image else 1) + text * (3 if trains_text else 1)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """What the device can do in a second; None where that is unknown, as on every CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    kind = "fp32" if precision == "fp32" else "half"
    return next((1e12 * peaks[kind] for known, peaks in PEAK_TFLOPS.items() if known in name), None)


def _count(forward: Any) -> int:
    # Attention's inference path is one fused operation that the counter does not know.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            forward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())
