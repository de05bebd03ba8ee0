"""Small models of the zoo with given tensors, what to feed them, and how their outputs are compared."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from biomedclip.models.build import Parts, WeightsFile, assemble
from biomedclip.models.preprocess import ImageTransform
from biomedclip.models.zoo import read_model


def load_small(name: str, config: dict[str, Any], tensors: dict[str, torch.Tensor], **changes: Any) -> torch.nn.Module:
    """A small model with published tensors, from a file and through the loader: strictly, nothing missing."""
    facts = read_model(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path)
        parts = Parts(
            where=name, architecture=facts.architecture.model_copy(update={"config": config} | changes),
            keys=facts.keys, facts=facts, weights=[WeightsFile(path=path)], tokenise=lambda texts: texts,
            transform=ImageTransform(facts.preprocess.steps),
        )  # fmt: skip
        model, _, _ = assemble(parts)
    assert not model.load_report.missing
    assert not model.load_report.extra
    return model


def sentences(vocabulary: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (3, 9) of three sentences of unequal length with [CLS] and [SEP], and their mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(3, 9, dtype=torch.int64)
    for row, length in enumerate((9, 5, 3)):
        ids[row, :length] = torch.randint(5, vocabulary, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = 2, 3
    return ids, (ids != 0).long()


def pictures(size: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def same(first: torch.Tensor, second: torch.Tensor) -> None:
    assert second.abs().max() > 1e-3, "the reference gives next to nothing"
    assert (second - second[:1]).abs().max() > 1e-4, "the reference gives every input the same"
    torch.testing.assert_close(first, second, rtol=2e-4, atol=2e-5)
