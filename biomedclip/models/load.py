"""A name, folder or file to `(model, preprocess, tokenizer)`, in open_clip's conventions.

Accepts what open_clip accepts (`ViT-B-32/openai`, `hf-hub:…`, `local-dir:…`), the folders this project writes (a run,
one of its checkpoints, an export) and the architectures it ships. Towers, weights, transforms and tokenizers are
open_clip's; what is added is that a name never yields random weights unless they are asked for, that a wrong name
says what was meant, and that a local folder is read without a request to anywhere.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.errors import CheckpointError, MissingExtra
from biomedclip.models.catalog import architecture_folder, list_architectures
from biomedclip.models.export import CONFIG_FILE

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a name stands for: the name open_clip knows it by, its weights, and its model config."""

    name: str
    """As open_clip takes it: an architecture, `local-dir:…` or `hf-hub:…`."""
    pretrained: str | None
    """Tag of the weights for an architecture; None for folders and repositories, which bring theirs."""
    model_cfg: dict[str, Any]


def load(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    random_init: bool = False,
    preprocess: dict[str, Any] | None = None,
) -> tuple[nn.Module, Callable[..., Any], Callable[..., Any]]:
    """`(model, preprocess, tokenizer)`, the model in evaluation mode.

    `name` is a run folder, checkpoint folder or export; an open_clip architecture with a tag, such as
    `ViT-B-32/openai`; an architecture shipped here with `random_init=True`; or an `hf-hub:` or `local-dir:` string.
    `preprocess` overrides entries of the model's preprocessing (mean, std, interpolation, resize_mode). Raises
    CheckpointError where the name is unknown, a file is missing or broken, or weights do not fit.
    """
    open_clip = _import_open_clip()
    origin = find_origin(name, random_init=random_init)
    known = {} if preprocess is None else {"force_preprocess_cfg": preprocess}
    with _one_error(name), _quiet():
        model = open_clip.create_model(
            origin.name, pretrained=None if random_init else origin.pretrained, load_weights=not random_init,
            require_pretrained=not random_init, pretrained_text=False, device=device, **known,
        )  # fmt: skip
        tokenizer = open_clip.get_tokenizer(origin.name)
    if dtype is not None:
        model = model.to(dtype=dtype)
    transform = _evaluation_transform(model)
    return model.eval(), transform, tokenizer


def find_origin(name: str | Path, *, random_init: bool = False) -> Origin:
    """What open_clip must be asked for `name`. Raises CheckpointError for a name that is none, with the nearest one."""
    open_clip = _import_open_clip()
    text = str(name)
    if text.startswith("hf-hub:"):
        with _one_error(name), _quiet():
            return Origin(name=text, pretrained=None, model_cfg=open_clip.get_model_config(text))
    folder = Path(text.removeprefix("local-dir:"))
    if text.startswith("local-dir:") or folder.is_dir():
        export = find_export(folder)
        return Origin(name=f"local-dir:{export}", pretrained=None, model_cfg=_read_config(export)["model_cfg"])
    register_architectures()
    architecture, _, tag = text.partition("/")
    model_cfg = open_clip.get_model_config(architecture)
    if model_cfg is None:
        raise CheckpointError(text, "is no model, folder or architecture", todo=_suggest(text, open_clip.list_models()))
    if random_init:
        return Origin(name=architecture, pretrained=None, model_cfg=model_cfg)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not tag:
        todo = f"name its weights: {architecture}/{tags[0]}" if tags else "ask for random weights: random_init=True"
        raise CheckpointError(text, "is an architecture, without weights", todo=todo)
    if tag not in tags:
        raise CheckpointError(text, f"has no weights '{tag}'", todo=_suggest(tag, tags))
    return Origin(name=architecture, pretrained=tag, model_cfg=model_cfg)


def find_export(folder: str | Path) -> Path:
    """The folder with the newest weights under a run, checkpoint or export folder.

    A finished run's `final`, else its last checkpoint. Raises CheckpointError where there is none.
    """
    folder = Path(folder)
    candidates = [folder, folder / "final", *sorted((folder / "checkpoints").glob("step-*"), reverse=True)]
    for candidate in candidates:
        if (candidate / CONFIG_FILE).exists():
            return candidate
    wrong = f"holds no {CONFIG_FILE}, neither itself nor in final/ or checkpoints/"
    if not folder.is_dir():
        wrong = "there is no such folder"
    elif (folder / "run.json").exists():
        wrong = "is a run that has saved no checkpoint yet"
    raise CheckpointError(folder, wrong, todo="name a run folder, or a folder in open_clip's format")


def register_architectures() -> None:
    """Make the shipped architectures known to open_clip, beside its own. Repeating it changes nothing."""
    open_clip = _import_open_clip()
    if not set(list_architectures()) <= set(open_clip.list_models()):
        open_clip.add_model_config(architecture_folder())


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
        config["model_cfg"]["embed_dim"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(path, "is no open_clip config", found=repr(error)[:80], todo="export it again") from None
    return config


@contextmanager
def _one_error(name: str | Path) -> Iterator[None]:
    """Turn what open_clip, the Hub and the weight readers raise into one CheckpointError that names the model."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    try:
        yield
    except UnpicklingError as error:
        raise CheckpointError(
            name, "holds a pickle of more than tensors, which is never loaded", todo="ask its publisher for safetensors"
        ) from error
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        offline = "no offline copy" if re.search(r"offline|connect|resolve|LocalEntryNotFound", text, re.I) else None
        todo = "download it once with access to the Hub, or name a local folder" if offline else "check the files"
        raise CheckpointError(name, "cannot be loaded", found=text[:300], todo=todo) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's advice to the log out of the user's sight: what matters is raised."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # open_clip says itself which of the two activations it takes; the tag decides, as it does there.
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            yield
    finally:
        logging.disable(level)


def _evaluation_transform(model: nn.Module) -> Callable[..., Any]:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    visual: Any = model.visual
    return image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=False)


def _suggest(name: str, known: list[str]) -> str:
    lower = {entry.lower(): entry for entry in [*list_architectures(), *known]}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{lower[near[0]]}'?"
    return "name a folder, an open_clip model such as ViT-B-32/openai, or hf-hub:owner/repository"


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ImportError:
        raise MissingExtra("train", "open_clip") from None
    return open_clip
