"""How the weights of a run are written and found again: open_clip's format, or a released model's own.

Reads what the config's model is; yields what writes the trained model as a folder that `biomedclip.load` takes. Most
models are open_clip's, and open_clip loads the folder too. Models with towers that open_clip cannot express are plain
modules as well and are trained alike, but their folder holds safetensors and the model's facts. What cannot be trained
are models whose pictures go through steps of their own: the training loader has open_clip's steps only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.errors import CheckpointError, ConfigError
from biomedclip.models.build import Parts
from biomedclip.training.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class ModelForm:
    """What a model is written as: one of the two."""

    model_cfg: dict[str, Any] | None = None
    """open_clip's model config."""
    parts: Parts | None = None
    """A released model with towers that open_clip cannot express."""

    def write(self, model: nn.Module, folder: Path, state: Mapping[str, Any] | None = None) -> None:
        """Write the model to `folder`; `state` are its whole weights where its own are shared over processes."""
        from biomedclip.models.export import export_open_clip, export_released

        if self.parts is None:
            export_open_clip(model, folder, model_cfg=self.model_cfg or {}, state=state)
        else:
            export_released(model, self.parts, folder)


def find_form(settings: ModelConfig) -> ModelForm:
    """The form of a config's model.

    Raises ConfigError for a model whose image steps the loader lacks, and for changes that a model with towers of its
    own cannot take; CheckpointError for a name that is no model.
    """
    from biomedclip.models.build import model_config
    from biomedclip.models.load import Origin, find_parts
    from biomedclip.models.preprocess import open_clip_config

    random_init = settings.init == "random"
    parts = find_parts(settings.name, random_init=random_init)
    if isinstance(parts, Origin):
        return ModelForm(model_cfg=parts.model_cfg)
    if open_clip_config(parts.transform) is None:
        raise ConfigError(
            f"model.name: {settings.name}", "takes pictures through steps of its own, which training does not have",
            todo="train another model; this one can be evaluated and compared with",
        )  # fmt: skip
    if parts.architecture.builder == "open_clip":
        return ModelForm(model_cfg=model_config(parts.architecture))
    changed = [name for name in ("preprocess", "context_length") if getattr(settings, name) != _DEFAULTS[name]]
    if changed:
        raise ConfigError(
            f"model.{changed[0]}", f"cannot be changed: {settings.name} has towers that open_clip cannot express",
            todo="leave it out",
        )  # fmt: skip
    return ModelForm(parts=parts)


_DEFAULTS = {name: field.default for name, field in ModelConfig.model_fields.items()}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder that a run wrote, by name. Raises CheckpointError where it holds none."""
    from safetensors.torch import load_file

    return load_file(find_weights(folder))


def find_weights(folder: Path) -> Path:
    """The weights file of a folder that a run wrote. Raises CheckpointError where it holds none."""
    from biomedclip.models.export import WEIGHTS_FILE

    for name in (WEIGHTS_FILE, "model.safetensors"):
        if (folder / name).exists():
            return folder / name
    raise CheckpointError(folder / WEIGHTS_FILE, "is missing", todo="export the model again")
