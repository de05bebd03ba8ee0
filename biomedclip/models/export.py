"""A model as a folder that open_clip loads: `open_clip_config.json` and `open_clip_model.safetensors`.

Reads a model built here (or by open_clip) and its config; writes the two files so that
`open_clip.create_model_from_pretrained("local-dir:FOLDER")` gives the same outputs and the same preprocessing. Beside
them lie the tokenizer files and the text tower's own config, so that `biomedclip.load(FOLDER)` asks nobody. The weights
are written first and the config last, each whole or not at all, so a folder with a config is complete. A released model
also keeps its facts (`biomedclip_model.json`); one that open_clip cannot express has these and plain safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.errors import CheckpointError
from biomedclip.files import write_bytes, write_json
from biomedclip.models.build import Parts, model_config
from biomedclip.models.folders import CONFIG_FILE, FACTS_FILE, TEXT_CONFIG_FILE
from biomedclip.models.preprocess import open_clip_config
from biomedclip.models.zoo import File, Keys

if TYPE_CHECKING:
    from torch import nn

WEIGHTS_FILE = "open_clip_model.safetensors"


def export_open_clip(
    model: nn.Module, folder: str | Path, *, model_cfg: Mapping[str, Any], metadata: Mapping[str, str] | None = None,
    state: Mapping[str, Any] | None = None, half: bool = False,
) -> Path:  # fmt: skip
    """Write the model to `folder` in open_clip's format and return the folder.

    `model_cfg` is open_clip's model config (the content of an architecture JSON); the preprocessing is taken from
    `model.visual.preprocess_cfg`, where open_clip keeps it. `metadata` goes into the header of the weights file.
    `state` are the weights where the model's own are shared over processes. `half` stores matrices and kernels in half
    precision: half the bytes, read back as float32. Raises CheckpointError where the model holds values that are not
    finite, or that half precision cannot hold.
    """
    folder = Path(folder)
    config = {"model_cfg": deepcopy(dict(model_cfg)), "preprocess_cfg": preprocess_config(model)}
    packed = _pack(state or model.state_dict(), folder, metadata, half=half)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    write_bytes(folder / WEIGHTS_FILE, packed)
    write_companions(model, folder)
    write_json(folder / CONFIG_FILE, config)
    return folder


def export_released(model: nn.Module, parts: Parts, folder: str | Path, *, half: bool = False) -> Path:
    """Write a loaded model with its facts to `folder`, in open_clip's format where open_clip has words for it.

    `half` and what it raises are those of `export_open_clip`.
    """
    folder = Path(folder)
    # Of what the folder held before, nothing may say what the new weights are.
    for name in (CONFIG_FILE, FACTS_FILE):
        (folder / name).unlink(missing_ok=True)
    weights = WEIGHTS_FILE
    if parts.architecture.builder == "open_clip" and open_clip_config(parts.transform) is not None:
        export_open_clip(model, folder, model_cfg=model_config(parts.architecture), half=half)
    else:
        weights = "model.safetensors"
        write_bytes(folder / weights, _pack(model.state_dict(), folder, None, half=half))
        write_companions(model, folder)
    if parts.facts is not None:
        files = [File(paths=(weights,)), *(File(paths=(name,), role="tokenizer") for name in parts.companions)]
        facts = parts.facts.model_copy(update={"keys": Keys(), "files": tuple(files)})
        write_json(folder / FACTS_FILE, facts.model_dump(mode="json", exclude_defaults=True))
    elif weights != WEIGHTS_FILE:
        raise CheckpointError(parts.where, "has towers or image steps that open_clip cannot express, and no facts",
                              todo="load it by its name in the zoo")  # fmt: skip
    return folder


def write_companions(model: nn.Module, folder: Path) -> None:
    """Copy the tokenizer files a model was loaded with, and its text tower's config, to `folder`."""
    attached: Any = model
    companions: Mapping[str, Path] = getattr(attached, "companions", None) or {}
    for name, path in companions.items():
        if (folder / name).resolve() != path.resolve():
            write_bytes(folder / name, path.read_bytes())
    if "vocab.txt" in companions and "tokenizer_config.json" not in companions:
        lower = getattr(attached, "lower_case", True)
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": lower})
    if getattr(attached, "text_config", None):
        write_json(folder / TEXT_CONFIG_FILE, attached.text_config)


def _pack(state: Mapping[str, Any], folder: Path, metadata: Mapping[str, str] | None, *, half: bool) -> bytes:
    """The bytes of a safetensors file. Raises CheckpointError for NaN and infinity."""
    import torch
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    _check_finite(tensors, folder, "NaN or infinity", "go back to the last good checkpoint and lower the learning rate")
    if half:
        # Vectors stay: norms, their running variances and the logit scale are few bytes, and small ones would be lost.
        tensors = {
            name: tensor.to(torch.float16) if tensor.dtype == torch.float32 and tensor.dim() > 1 else tensor
            for name, tensor in tensors.items()
        }
        _check_finite(tensors, folder, "values beyond half precision", "export it without --half")
    return save(tensors, metadata={"format": "pt", **(metadata or {})})


def _check_finite(tensors: Mapping[str, Any], folder: Path, what: str, todo: str) -> None:
    import torch

    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(folder, f"{len(broken)} tensors hold {what}", found=broken[0], todo=todo)


def preprocess_config(model: nn.Module) -> dict[str, Any]:
    """The model's preprocessing as open_clip writes it: size, mean, std, interpolation, resize_mode, fill_color."""
    found: dict[str, Any] = dict(model.visual.preprocess_cfg)  # type: ignore[arg-type, union-attr]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
