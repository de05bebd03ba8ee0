"""Small models of the zoo with given tensors, what to feed them, and how their outputs are compared."""

from __future__ import annotations

from typing import Any

import torch

from biomedclip.models.build import build_architecture, check_keys
from biomedclip.models.convert import convert
from biomedclip.models.zoo import read_model


def load_small(name: str, config: dict[str, Any], tensors: dict[str, torch.Tensor], **changes: Any) -> torch.nn.Module:
    """A small model with published tensors, strictly."""
    facts = read_model(name)
    model = build_architecture(facts.architecture.model_copy(update={"config": config} | changes))
    ready, _ = convert({key: tensor.clone() for key, tensor in tensors.items()}, facts.keys.rules, name)
    missing, extra = check_keys(model.state_dict(), ready, facts.keys, where=name, name=name)
    assert not missing
    assert not extra
    model.load_state_dict(ready)
    return model.eval()


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
