"""WiSE-FT: weights between the start of a run and its end, which often keep the old and have most of the new.

Reads two sets of weights of one architecture; yields their interpolation as a folder in open_clip's format, or, during
training, a model that carries it for the length of a `with` block. Everything with a fractional part is interpolated,
buffers of batch norm and the logit scale too (stored as its logarithm, and interpolated so, as the authors do);
counters and position ids are the end's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from biomedclip.errors import CheckpointError, ConfigError

Weights = Mapping[str, Tensor]


def interpolate(start: Weights, end: Weights, alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) start + alpha end, tensor by tensor; integers are the end's.

    Wortsman et al. 2022 (arXiv 2109.01903, equation 1). 0 gives the start's and 1 the end's values exactly. Raises
    CheckpointError where names or shapes differ, because what is missing on one side cannot be between.
    """
    _check_alike(start, end)
    mixed = {}
    for name, last in end.items():
        first = start[name]
        if not last.is_floating_point() or alpha == 1:
            mixed[name] = last.clone()
        elif alpha == 0:
            mixed[name] = first.to(last.dtype, copy=True)
        else:
            wide = torch.lerp(first.to(torch.float64), last.to(torch.float64), alpha)
            mixed[name] = wide.to(last.dtype)
    return mixed


@contextmanager
def carrying(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Let the model carry other weights inside the block; its own come back bit by bit, whatever happens inside.

    `weights` may name a part of the model's parameters and buffers.
    """
    state = model.state_dict()
    saved = {name: state[name].clone() for name in weights}
    try:
        _put(state, weights)
        yield
    finally:
        _put(state, saved)


def interpolate_folders(start: str | Path, end: str | Path, alpha: float, out: str | Path) -> Path:
    """Write the interpolation of two models as a folder in open_clip's format; returns it.

    `start` and `end` are folders that `biomedclip.models.load` knows (run, checkpoint, export). Raises CheckpointError
    where they are not of one architecture, ConfigError for an alpha outside [0, 1].
    """
    import json

    from safetensors.torch import load_file, save

    from biomedclip.files import write_bytes, write_json
    from biomedclip.models.export import CONFIG_FILE, WEIGHTS_FILE
    from biomedclip.models.load import find_export

    if not 0 <= alpha <= 1:
        raise ConfigError("--alpha", "is not between 0 (start) and 1 (end)", found=alpha)
    first, last, out = find_export(start), find_export(end), Path(out)
    configs = [json.loads((folder / CONFIG_FILE).read_bytes()) for folder in (first, last)]
    if configs[0]["model_cfg"] != configs[1]["model_cfg"]:
        raise CheckpointError(last, f"is another architecture than {first}", todo="name two states of one model")
    for folder in (first, last):
        if not (folder / WEIGHTS_FILE).exists():
            raise CheckpointError(folder / WEIGHTS_FILE, "is missing", todo="export the model again")
    mixed = interpolate(load_file(first / WEIGHTS_FILE), load_file(last / WEIGHTS_FILE), alpha)
    facts = {"format": "pt", "wise_ft_alpha": str(alpha), "wise_ft_start": str(first), "wise_ft_end": str(last)}
    (out / CONFIG_FILE).unlink(missing_ok=True)
    write_bytes(out / WEIGHTS_FILE, save(mixed, metadata=facts))
    write_json(out / CONFIG_FILE, configs[1])
    return out


def _check_alike(start: Weights, end: Weights) -> None:
    if alone := sorted(start.keys() ^ end.keys()):
        raise CheckpointError("WiSE-FT", f"{len(alone)} tensors are in one model only", found=alone[0],
                              todo="name two states of one model")  # fmt: skip
    for name, tensor in end.items():
        if start[name].shape != tensor.shape:
            raise CheckpointError("WiSE-FT", f"{name} has two shapes",
                                  found=f"{tuple(start[name].shape)} and {tuple(tensor.shape)}",
                                  todo="name two states of one model")  # fmt: skip


def _put(state: Weights, weights: Weights) -> None:
    with torch.no_grad():
        for name, tensor in weights.items():
            state[name].copy_(tensor)
