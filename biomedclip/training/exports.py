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

    from biomedclip.models.preprocess import ImageTransform


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
    from biomedclip.models.preprocess import ImageTransform
    from biomedclip.models.zoo import find_model

    released = None if Path(settings.name).exists() else find_model(settings.name)
    if released is not None:  # its facts are known before a file of it is fetched
        _check_image_steps(settings.name, ImageTransform(released.preprocess.steps))
        if released.architecture.builder == "open_clip":
            return ModelForm(model_cfg=model_config(released.architecture))
    parts = find_parts(settings.name, random_init=settings.init == "random")
    if isinstance(parts, Origin):
        return ModelForm(model_cfg=parts.model_cfg)
    _check_image_steps(settings.name, parts.transform)
    if parts.architecture.builder == "open_clip":
        return ModelForm(model_cfg=model_config(parts.architecture))
    changed = [name for name in ("preprocess", "context_length") if getattr(settings, name) != _DEFAULTS[name]]
    if changed:
        raise ConfigError(
            f"model.{changed[0]}", f"cannot be changed: {settings.name} has towers that open_clip cannot express",
            todo="leave it out",
        )  # fmt: skip
    return ModelForm(parts=parts)


def _check_image_steps(name: str, transform: ImageTransform) -> None:
    from biomedclip.models.preprocess import open_clip_config

    if open_clip_config(transform) is None:
        raise ConfigError(
            f"model.name: {name}", "takes pictures through steps of its own, which training does not have",
            todo="train another model; this one can be evaluated and compared with",
        )  # fmt: skip


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
