"""Penalties on the weights themselves: stay near the weights training started from, most where they mattered.

They read parameters and the anchors that were copied before the first step; they need no teacher pass and no data
(EWC: one pass before training). Anchors are plain tensors by name, on the device and in float32, outside of anything
an optimizer or a checkpoint sees: a resumed run takes them again from the weights the run started from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from biomedclip.errors import CheckpointError
from biomedclip.files import write_bytes
from biomedclip.training.exports import read_weights
from biomedclip.training.gather import gather_rows, rank, world_size
from biomedclip.training.objectives.softmax import clip_loss
from biomedclip.training.terms import StepTensors
from biomedclip.training.towers import encode_text

FISHER_FILE = "fisher.safetensors"

Weights = Mapping[str, Tensor]
BatchT = TypeVar("BatchT")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def l2_sp(parameters: Weights, anchors: Weights) -> Tensor:
    """½ Σ |θ - θ0|². L2-SP, Li et al. 2018 (arXiv 1802.01483, equation 2, without new layers).

    ZSCL's weight consolidation (arXiv 2303.06628, section 3.3) is this with the weights before the present task and
    without the half.
    """
    return torch.stack([(parameters[name] - anchor).square().sum() for name, anchor in anchors.items()]).sum() / 2


def ewc(parameters: Weights, anchors: Weights, fisher: Weights) -> Tensor:
    """½ Σ F (θ - θ0)², F the diagonal of the Fisher information. EWC, Kirkpatrick et al. 2017 (PNAS, equation 3)."""
    parts = [(fisher[name] * (parameters[name] - anchor).square()).sum() for name, anchor in anchors.items()]
    return torch.stack(parts).sum() / 2


def estimate_fisher(model: nn.Module, batches: Iterable[BatchT], loss: Callable[[BatchT], Tensor]) -> dict[str, Tensor]:
    """Mean over batches of the squared gradient of the batch's loss, by parameter name: the diagonal F of EWC.

    A contrastive loss has no gradient of a single sample (its negatives are the batch), so F is that of batches, as in
    CTP's EWC baseline (arXiv 2308.07146, code); its size depends on the batch size. In several processes the mean of
    `loss` over them is that of the global batch. Gradients that parameters hold are left alone. Raises ValueError where
    there is no batch.
    """
    parameters = trained_parameters(model)
    fisher = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    count = 0
    for batch in batches:
        gradients = torch.autograd.grad(loss(batch), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                if world_size() > 1:
                    torch.distributed.all_reduce(gradient)
                    gradient = gradient / world_size()
                fisher[name] += gradient.float().square()
        count += 1
    if not count:
        raise ValueError("the Fisher information needs at least one batch")
    return {name: total / count for name, total in fisher.items()}


def load_anchors(start: Path, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """The trained parameters as they were in the weights stored at `start`, in float32 on `device`."""
    stored = read_weights(start)
    return {name: stored[name].to(device, torch.float32) for name in trained_parameters(model)}


def load_fisher(
    folder: Path, step: StepTensors, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
) -> dict[str, Tensor]:
    """The Fisher information of a run: from its folder, or estimated at its first step and stored there.

    `batches` yields uint8 images and token ids. Raises CheckpointError where the file of a run under way is gone.
    """
    from safetensors.torch import load_file, save

    path, device = folder / FISHER_FILE, step.image.device
    if path.exists():
        return {name: tensor.to(device) for name, tensor in load_file(path).items()}
    if step.step:
        raise CheckpointError(path, "is missing, and the weights it was estimated with have moved on",
                              todo="start the run anew")  # fmt: skip
    model: Any = step.model
    was_training = model.training
    model.eval()  # batch norm must not count these batches

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        image = nn.functional.normalize(model.encode_image(step.normalise(batch[0])).float(), dim=1)
        text = nn.functional.normalize(encode_text(model, batch[1]).float(), dim=1)
        scale = model.logit_scale.exp().reshape(())
        return clip_loss(image, gather_rows(text), scale, first_row=rank() * len(image))

    try:
        with torch.enable_grad():
            fisher = estimate_fisher(model, batches(), loss)
    finally:
        model.train(was_training)
    if rank() == 0:
        write_bytes(path, save({name: tensor.cpu().contiguous() for name, tensor in fisher.items()}))
    return fisher
