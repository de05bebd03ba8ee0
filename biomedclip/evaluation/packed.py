"""Towers on a CPU with their weights laid out for its matrix kernels, for as long as images are embedded.

Reads a model; yields the same model whose linear layers and self-attention compute with oneDNN's packed weights, and
gives its own methods back afterwards. torch multiplies plain float32 matrices with MKL, which on some processors takes
a third longer than oneDNN with packed weights; torch.compile would pack them too, after minutes. Results differ from
the plain ones in the last bits of float32. The packed copy is made at first use, so a tower that is not used costs no
memory; where this build of torch has no such kernels, or they do not give what they should, nothing changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Linear = Callable[["torch.Tensor"], "torch.Tensor"]
_LEAST = 256 * 256
"""Weights below are not worth a copy."""


@contextlib.contextmanager
def packing(model: torch.nn.Module, device: str, precision: str = "float32") -> Iterator[None]:
    """Let the model compute with packed weights inside the block, where it is a float32 model on a CPU."""
    changed: list[torch.nn.Module] = []
    if device == "cpu" and precision == "float32" and _can_pack():
        for module in model.modules():
            forward = _replacement(module)
            # A module that somebody has already given a forward of its own is left alone.
            if forward is not None and "forward" not in module.__dict__:
                module.__dict__["forward"] = forward
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _replacement(module: torch.nn.Module) -> Callable[..., Any] | None:
    """A forward with packed weights for a module that has one; only exact types, as a subclass may do more."""
    import torch

    if type(module) is torch.nn.Linear and _fits(module.weight):
        return _pack(module.weight, module.bias)
    if type(module) is torch.nn.MultiheadAttention and _is_plain(module):
        return _attend(module)
    return None


def _fits(weight: torch.Tensor) -> bool:
    import torch

    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= _LEAST


def _pack(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    import torch

    made: list[torch.Tensor] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or x.dtype != torch.float32:
            return torch.nn.functional.linear(x, weight, bias)
        if not made:
            made.append(_reorder(weight))
        return _multiply(x, made[0], bias)

    return forward


def _is_plain(attention: torch.nn.MultiheadAttention) -> bool:
    """Whether it is self-attention of one width, without the extras that few models use."""
    return (
        attention._qkv_same_embed_dim and attention.bias_k is None and not attention.add_zero_attn
        and attention.in_proj_weight is not None and _fits(attention.in_proj_weight)
    )  # fmt: skip


def _attend(attention: torch.nn.MultiheadAttention) -> Callable[..., Any]:
    import torch

    project = _pack(attention.in_proj_weight, attention.in_proj_bias)
    close = _pack(attention.out_proj.weight, attention.out_proj.bias)
    usual = type(attention).forward

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attn_mask")
        plain = (
            query is key and key is value and query.dim() == 3 and not args and kwargs.get("need_weights") is False
            and kwargs.keys() <= {"need_weights", "attn_mask"} and (mask is None or mask.dim() == 2)
            and not attention.training
        )  # fmt: skip
        if not plain:
            return usual(attention, query, key, value, *args, **kwargs)
        x = query if attention.batch_first else query.transpose(0, 1)
        rows, length, width = x.shape
        q, k, v = project(x).view(rows, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if mask is not None and mask.dtype == torch.bool:
            mask = ~mask  # true means "not to be seen" there, "to be seen" here
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = close(seen.transpose(1, 2).reshape(rows, length, width))
        return (out if attention.batch_first else out.transpose(0, 1)), None

    return forward


def _reorder(weight: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())  # type: ignore[no-any-return]


def _multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    import torch

    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]


@cache
def _can_pack() -> bool:
    """Whether torch's packed kernels, which are not among its public functions, are here and right."""
    import torch

    x, weight, bias = (torch.linspace(-1, 1, n) for n in (6 * 64, 32 * 64, 32))
    x, weight = x.view(2, 3, 64), weight.view(32, 64)
    try:
        with torch.inference_mode():
            found = _multiply(x, _reorder(weight), bias)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return torch.allclose(found, torch.nn.functional.linear(x, weight, bias), atol=1e-5)
