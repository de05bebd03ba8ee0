"""A stand-in for the bundled model: random weights of a smaller architecture, in a folder like the package's own."""

from __future__ import annotations

from pathlib import Path

import torch

from biomedclip.files import sha256_file
from biomedclip.models.build import Parts, assemble
from biomedclip.models.export import export_released
from biomedclip.models.load import released_parts
from biomedclip.models.zoo import ReleasedModel, Source, read_model


def stand_in(folder: Path) -> ReleasedModel:
    """The facts of a bundled model whose small random weights lie in `folder`, written in half precision."""
    facts = read_model("biomedclip-mini")
    config = facts.architecture.config
    config = config | {
        "embed_dim": 16, "vision_cfg": config["vision_cfg"] | {"timm_model_name": "test_efficientnet"},
        "text_cfg": config["text_cfg"] | {"width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
    architecture = facts.architecture.model_copy(update={"config": config})
    small = facts.model_copy(
        update={"architecture": architecture, "source": Source(kind="bundled", folder=str(folder))}
    )
    torch.manual_seed(0)
    parts = released_parts(small, random_init=True)
    model, _, _ = assemble(parts)
    export_released(model, Parts(where="mini", architecture=architecture, transform=parts.transform,
                                 tokenise=parts.tokenise), folder, half=True)  # fmt: skip
    files = tuple(
        file.model_copy(update={"size": (folder / file.paths[0]).stat().st_size,
                                "sha256": sha256_file(folder / file.paths[0])})
        for file in facts.files
    )  # fmt: skip
    return small.model_copy(update={"files": files})
