"""A model shared over processes by FSDP2: each holds a part of every weight, gradient and optimizer state.

Reads an open_clip model and the processes' mesh; shards each transformer block, then each tower, then the rest in
place. Scalars (logit scale and bias) stay whole on every process, since a scalar has no parts. Embedding enters by
`encode_image` and `encode_text` instead of `forward`, which FSDP is told.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_BLOCK_LISTS = ("resblocks", "blocks", "layer", "layers")


def shard_model(model: nn.Module, mesh: Any) -> None:
    """Shard the model in place over the data-parallel part of Lightning's device mesh."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    over = mesh["data_parallel"]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and name.rpartition(".")[2] in _BLOCK_LISTS:
            for block in module:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=over)
    scalars = {p for p in model.parameters(recurse=False) if p.ndim == 0 or p.numel() == 1}
    fully_shard(model, mesh=over, ignored_params=scalars, reshard_after_forward=False)
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's whole weights on the CPU of the first process, empty elsewhere; a collective of all processes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Any = get_model_state_dict(model, options=options)
    return dict(state)
