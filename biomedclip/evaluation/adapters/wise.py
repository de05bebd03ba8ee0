"""WiSE-FT: the straight line between the weights before and after training, and what each point on it can do.

Wortsman et al. 2022: theta = (1 - a) theta_before + a theta_after. The curve of in-domain against general score is the
honest picture of continual pretraining: its ends are the two models, and a point between them often keeps most of
both. Which point to use is a choice, so it is made by a Selection's rules: on validation data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from biomedclip.errors import CheckpointError

if TYPE_CHECKING:
    import torch

ALPHAS = tuple(k / 10 for k in range(11))


def interpolate_weights(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """State dict of (1 - alpha) before + alpha after, summed in float32 at least; integers as they are after.

    At 0 and 1 it is one of the two, bit for bit. Raises CheckpointError where names or shapes differ.
    """
    import torch

    if before.keys() != after.keys():
        odd = sorted(set(before) ^ set(after))
        raise CheckpointError("weights", f"{len(odd)} tensors are in one model only", found=", ".join(odd[:3]))
    mixed = {}
    for name, start in before.items():
        end = after[name]
        if start.shape != end.shape:
            raise CheckpointError(name, "has two shapes", found=f"{tuple(start.shape)} and {tuple(end.shape)}")
        if alpha in (0, 1) or not end.is_floating_point():
            mixed[name] = (start if alpha == 0 and end.is_floating_point() else end).clone()
        else:
            wide = torch.promote_types(torch.float32, end.dtype)
            mixed[name] = torch.lerp(start.to(wide), end.to(wide), alpha).to(end.dtype)
    return mixed


def sweep_weights(
    model: torch.nn.Module, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor],
    evaluate: Callable[[torch.nn.Module], Mapping[str, float]], alphas: Sequence[float] = ALPHAS,
) -> Iterator[tuple[float, Mapping[str, float]]]:  # fmt: skip
    """(alpha, values) at each point; `evaluate` sees `model` with the mixed weights, and its own are restored after."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        for alpha in alphas:
            model.load_state_dict(interpolate_weights(before, after, alpha))
            yield alpha, evaluate(model)
    finally:
        model.load_state_dict(own)
