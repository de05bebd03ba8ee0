"""Towers and tensors put together: a model built without ever filling it with random numbers.

Reads what a model is (`Parts`: architecture, files, key rules, image and text side) and yields `(model, preprocess,
tokenizer)` with the report of what was loaded on the model. Parameters are created on the meta device and replaced by
the file's tensors, mapped from disk where the format allows: a model costs its file's bytes once, and no time for
initial values. Every key must fit; what the facts allow to be missing or left over is counted in the report.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.errors import CheckpointError, MissingExtra
from biomedclip.models.convert import convert
from biomedclip.models.hub import file_hash
from biomedclip.models.pickles import extract_member, read_tensors
from biomedclip.models.preprocess import ImageTransform, open_clip_config
from biomedclip.models.zoo import Architecture, Keys, ReleasedModel

if TYPE_CHECKING:
    import torch
    from torch import nn

Loaded = tuple["nn.Module", ImageTransform, Callable[..., Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFile:
    """One file that tensors are read from."""

    path: Path
    prefix: str = ""
    member: str | None = None
    sha256: str | None = None
    """What it is pinned to; None where nothing is known."""


@dataclass(slots=True, kw_only=True)
class Parts:
    """Everything needed to put a model together."""

    where: str
    """What the user asked for, for messages."""
    architecture: Architecture
    transform: ImageTransform
    tokenise: Callable[..., Any]
    weights: Sequence[WeightsFile] = ()
    """None for random weights."""
    keys: Keys = field(default_factory=Keys)
    companions: Mapping[str, Path] = field(default_factory=dict)
    """Tokenizer files, by name."""
    facts: ReleasedModel | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What was loaded, and what was done to it; `model.load_report`."""

    name: str
    revision: str | None
    files: tuple[WeightsFile, ...]
    renamed: int = 0
    dropped: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    def hashes(self) -> dict[str, str]:
        """sha256 of each file by its path; computed on the first call."""
        return {str(file.path): file_hash(file.path) for file in self.files}

    def __str__(self) -> str:
        lines = [f"{self.name}, revision {self.revision or 'not pinned'}"]
        for file in self.files:
            lines.append(f"  {file.path}: {'sha256 ' + file.sha256 if file.sha256 else 'sha256 not pinned'}")
        lines.append(f"  {self.renamed} keys renamed, {len(self.dropped)} left out, {len(self.filled)} filled in,"
                     f" {len(self.missing)} missing, {len(self.extra)} left over")  # fmt: skip
        return "\n".join(lines)


def assemble(
    parts: Parts, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, trust_pickle: bool = False,
    build: Callable[[Architecture], nn.Module] | None = None,
) -> Loaded:  # fmt: skip
    """`(model, preprocess, tokenizer)` of the parts, the model in evaluation mode with its `load_report`.

    Without weights the model has random ones. `build` makes another module of the architecture, with the same names of
    its tensors. Raises CheckpointError where a file cannot be read or does not fit.
    """
    build = build or build_architecture
    with quiet():
        if parts.weights:
            with parameters_on_meta():
                model = build(parts.architecture)
            report = _load_weights(model, parts, trust_pickle)
        else:
            model = build(parts.architecture)
            report = LoadReport(name=parts.where, revision=None, files=())
    attached: Any = model
    attached.load_report, attached.facts, attached.companions = report, parts.facts, dict(parts.companions)
    attached.text_config = parts.architecture.text_config
    attached.lower_case = getattr(getattr(parts.tokenise, "facts", None), "lower", True)
    config = open_clip_config(parts.transform)
    visual: Any = getattr(model, "visual", None)
    if config is not None and visual is not None:
        # Where open_clip keeps a model's preprocessing.
        visual.image_mean, visual.image_std, visual.preprocess_cfg = config["mean"], config["std"], config
    model = model.to(device=device, dtype=dtype) if dtype is not None else model.to(device=device)
    return model.eval(), parts.transform, parts.tokenise


def build_architecture(architecture: Architecture) -> nn.Module:
    """The model of an architecture with whatever values its constructors give. Raises CheckpointError."""
    try:
        if architecture.builder == "open_clip":
            return _build_open_clip(architecture)
        module = import_module(f"biomedclip.models.towers.{architecture.builder}")
        built: nn.Module = module.build(architecture.config)
        return built
    except ImportError as error:
        if (error.name or "").startswith("biomedclip"):
            raise CheckpointError(architecture.builder, "is no builder of this project") from None
        raise MissingExtra("train", error.name or str(error)) from None
    except (TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            "architecture.config", "describes no model", found=" ".join(str(error).split())[:160],
            todo="check its entries against open_clip's model configs",
        ) from error  # fmt: skip


def model_config(architecture: Architecture) -> dict[str, Any]:
    """open_clip's model config of an architecture, with the activation. Raises CheckpointError for own towers."""
    if architecture.builder != "open_clip":
        raise CheckpointError(
            f"builder {architecture.builder}", "has towers that open_clip cannot express",
            todo="train from a model of the zoo whose builder is open_clip",
        )  # fmt: skip
    config = deepcopy(architecture.config)
    if architecture.activation == "quick_gelu":
        config["quick_gelu"] = True
    return config


def _build_open_clip(architecture: Architecture) -> nn.Module:
    import open_clip
    from open_clip.coca_model import CoCa

    config = model_config(architecture)
    custom_text = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    kind: Any = CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    if config["vision_cfg"].get("timm_model_name"):
        config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" not in config["text_cfg"]:
        built: nn.Module = kind(**config)
        return built
    config["text_cfg"]["hf_model_pretrained"] = False
    with tempfile.TemporaryDirectory() as folder:
        if architecture.text_config is not None:
            # open_clip asks transformers for a config by name; a folder is a name that needs no network.
            (Path(folder) / "config.json").write_text(json.dumps(architecture.text_config))
            config["text_cfg"]["hf_model_name"] = folder
        built = kind(**config)
    return built


def read_weights(parts: Parts, *, trust_pickle: bool = False) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors of all files under the model's keys, and what the rules changed. Raises CheckpointError."""
    raw: dict[str, torch.Tensor] = {}
    for file in parts.weights:
        path = file.path
        if file.member is not None:
            path = extract_member(path, file.member, path.parent / f"{path.name}.{Path(file.member).name}")
        tensors = read_tensors(
            path,
            unwrap=parts.keys.unwrap,
            safe_globals=parts.keys.safe_globals,
            inert_globals=parts.keys.inert_globals,
            trust_pickle=trust_pickle,
        )
        raw.update({f"{file.prefix}{key}": tensor for key, tensor in tensors.items()})
    where = ", ".join(str(file.path) for file in parts.weights)
    return convert(raw, parts.keys.rules, where)


def check_keys(
    expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], keys: Keys, *, where: str, name: str
) -> tuple[list[str], list[str]]:
    """(missing, extra) keys that the rules allow. Raises CheckpointError with what does not fit."""
    missing = [key for key in expected if key not in tensors]
    extra = [key for key in tensors if key not in expected]
    shapes = [key for key in expected if key in tensors and tensors[key].shape != expected[key].shape]
    bad_missing = [key for key in missing if not _matches(key, keys.allow_missing)]
    bad_extra = [key for key in extra if not _matches(key, keys.allow_extra)]
    wrong = [
        f"{len(found)} keys {what}" for found, what in
        ((bad_missing, "are missing"), (bad_extra, "are unknown"), (shapes, "have another shape")) if found
    ]  # fmt: skip
    if wrong:
        first = [*(f"no {key}" for key in bad_missing[:2]), *(f"unknown {key}" for key in bad_extra[:2])]
        first += [f"{key} is {tuple(tensors[key].shape)}, not {tuple(expected[key].shape)}" for key in shapes[:2]]
        raise CheckpointError(
            where, f"does not fit {name}, which has {len(expected)} tensors: {', '.join(wrong)}",
            found="; ".join(first), todo=f"check that it is a file of {name}, whole and of this revision",
        )  # fmt: skip
    return missing, extra


def _load_weights(model: nn.Module, parts: Parts, trust_pickle: bool) -> LoadReport:
    tensors, changes = read_weights(parts, trust_pickle=trust_pickle)
    expected = model.state_dict()
    where = ", ".join(str(file.path) for file in parts.weights)
    missing, extra = check_keys(expected, tensors, parts.keys, where=where, name=parts.where)
    ready = {key: tensors[key].to(expected[key].dtype) for key in expected if key in tensors}
    model.load_state_dict(ready, strict=False, assign=True)
    for module in model.modules():
        # timm's Swin computes masks on the device of a parameter, which was meta when it did.
        compute: Any = getattr(module, "init_non_persistent_buffers", None)
        if compute is not None and any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            compute()
    left = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    if left:
        raise CheckpointError(where, f"{len(left)} tensors have no value", found=left[0], todo="report it to us")
    return LoadReport(
        name=parts.where, revision=parts.revision, files=tuple(parts.weights), renamed=changes.renamed,
        dropped=tuple(changes.dropped), filled=tuple(changes.filled), missing=tuple(missing), extra=tuple(extra),
    )  # fmt: skip


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(re.search(pattern, key) for pattern in patterns)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Create every parameter without memory; buffers stay real, because a checkpoint may not hold them."""
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def to_meta(module: nn.Module, name: str, value: Any) -> Any:
        if value is None or value.device.type == "meta":
            return None
        return torch.nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' advice to the log out of the user's sight: what matters is raised."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # open_clip says itself which of the two activations it takes; the tag decides, as it does there.
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            yield
    finally:
        logging.disable(level)
