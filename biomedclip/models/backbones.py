"""Weights of one tower that were trained elsewhere, put into a model.

Reads a state dict of tensors (PyTorch or safetensors) and fills the trunk of a timm image tower; or takes the text
tower of another model. Names of a trunk are matched first. Files of other implementations name the same layers in other
words: where every tensor of the trunk has, in the order of the layers, one of its own shape in the file, they are taken
by position; the file's classifier is left over. Anything less than a full match is refused, because a trunk that is
half filled trains as if nothing were wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from biomedclip.errors import CheckpointError
from biomedclip.models.pickles import read_tensors

CLASSIFIERS = ("classifier.", "fc.", "_fc.", "head.", "head.fc.")


def fill_image_tower(model: Any, path: str | Path) -> tuple[str, ...]:
    """Fill the image tower's trunk from the weights file `path`; the names of the file that were left over.

    The projection to the embedding keeps its values. Raises CheckpointError where the tower has no timm trunk or a
    tensor of it finds no match.
    """
    trunk = getattr(getattr(model, "visual", None), "trunk", None)
    if trunk is None:
        raise CheckpointError(path, "fits no tower: only timm's have a trunk to fill", todo="leave out image_weights")
    wanted, found = dict(trunk.state_dict()), dict(read_tensors(Path(path)))
    pairs = _by_name(wanted, found) or _by_position(wanted, found)
    if pairs is None:
        raise CheckpointError(
            path, "does not fit the image tower's trunk", found=_first_difference(wanted, found),
            todo="name the weights of the same architecture",
        )  # fmt: skip
    trunk.load_state_dict({name: found[other] for name, other in pairs.items()})
    return tuple(sorted(set(found) - set(pairs.values())))


def fill_text_tower(model: Any, name: str | Path) -> None:
    """Give the model the text tower of another one: what `load` makes of `name`. Raises CheckpointError."""
    from biomedclip.models.load import load

    other, _, _ = load(name)
    wanted, found = _text_tensors(model), _text_tensors(other)
    if [(key, value.shape) for key, value in wanted.items()] != [(key, value.shape) for key, value in found.items()]:
        raise CheckpointError(
            name, "has another text tower", found=f"{len(found)} tensors, for {len(wanted)}",
            todo="name a model with the same text tower and the same width",
        )  # fmt: skip
    model.load_state_dict({**model.state_dict(), **found})


def _text_tensors(model: Any) -> dict[str, Any]:
    """Everything of a model's state that is neither its image tower's nor its scale and bias."""
    return {
        name: value for name, value in sorted(model.state_dict().items()) if not name.startswith(("visual.", "logit_"))
    }


def _by_name(wanted: dict[str, Any], found: dict[str, Any]) -> dict[str, str] | None:
    for prefix in ("", "module.", "backbone.", "trunk.", "model."):
        if all(prefix + name in found and found[prefix + name].shape == wanted[name].shape for name in wanted):
            return {name: prefix + name for name in wanted}
    return None


def _by_position(wanted: dict[str, Any], found: dict[str, Any]) -> dict[str, str] | None:
    layers = [name for name in found if not name.startswith(CLASSIFIERS)]
    if len(layers) != len(wanted):
        return None
    pairs = dict(zip(wanted, layers, strict=True))
    same = all(wanted[name].shape == found[other].shape for name, other in pairs.items())
    # The last part of a name (weight, running_mean) is common to all implementations and guards equal shapes.
    alike = all(name.rsplit(".", 1)[-1] == other.rsplit(".", 1)[-1] for name, other in pairs.items())
    return pairs if same and alike else None


def _first_difference(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    layers = [name for name in found if not name.startswith(CLASSIFIERS)]
    for name, other in zip(wanted, layers, strict=False):
        if wanted[name].shape != found[other].shape:
            return f"{name} {tuple(wanted[name].shape)}, in the file {other} {tuple(found[other].shape)}"
    return f"{len(wanted)} tensors, in the file {len(layers)}"
