"""A model as a folder that open_clip loads: `open_clip_config.json` and `open_clip_model.safetensors`.

Reads a model built here (or by open_clip) and its config; writes the two files so that
`open_clip.create_model_from_pretrained("local-dir:FOLDER")` gives the same outputs and the same preprocessing. The
weights are written first and the config last, each whole or not at all, so a folder with a config is complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.errors import CheckpointError
from biomedclip.files import write_bytes, write_json

if TYPE_CHECKING:
    from torch import nn

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"


def export_open_clip(
    model: nn.Module, folder: str | Path, *, model_cfg: Mapping[str, Any], metadata: Mapping[str, str] | None = None,
    state: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write the model to `folder` in open_clip's format and return the folder.

    `model_cfg` is open_clip's model config (the content of an architecture JSON); the preprocessing is taken from
    `model.visual.preprocess_cfg`, where open_clip keeps it. `metadata` goes into the header of the weights file. `state` are the weights where the
    model's own are shared over processes.
    Raises CheckpointError where the model holds values that are not finite.
    """
    import torch
    from safetensors.torch import save

    folder = Path(folder)
    tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in (state or model.state_dict()).items()
    }
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(
            folder, f"{len(broken)} tensors hold NaN or infinity", found=broken[0],
            todo="go back to the last good checkpoint and lower the learning rate",
        )  # fmt: skip
    config = {"model_cfg": deepcopy(dict(model_cfg)), "preprocess_cfg": preprocess_config(model)}
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    write_bytes(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt", **(metadata or {})}))
    write_json(folder / CONFIG_FILE, config)
    return folder


def preprocess_config(model: nn.Module) -> dict[str, Any]:
    """The model's preprocessing as open_clip writes it: size, mean, std, interpolation, resize_mode, fill_color."""
    found: dict[str, Any] = dict(model.visual.preprocess_cfg)  # type: ignore[arg-type, union-attr]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
