"""What `load` accepts, as a table that costs no torch: architectures shipped here, released checkpoints by name.

A checkpoint is listed only where `load` gets it through open_clip's own `hf-hub:` loading with nothing to convert; the
facts are its publisher's, and its weights have not been run here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A released model that open_clip loads by name."""

    name: str
    """What to pass to `load`."""
    domain: str
    licence: str
    """As its model page states it."""


CHECKPOINTS = (
    Checkpoint(
        name="hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", domain="PMC figures", licence="MIT"
    ),
    Checkpoint(name="hf-hub:wisdomik/QuiltNet-B-32", domain="histopathology", licence="MIT"),
    Checkpoint(name="hf-hub:wisdomik/QuiltNet-B-16", domain="histopathology", licence="MIT"),
    Checkpoint(name="ViT-B-32/openai", domain="general (for comparison)", licence="MIT"),
)


def list_architectures() -> list[str]:
    """Names of the architectures this project ships: open_clip model configs under `architectures/`."""
    return sorted(path.stem for path in architecture_folder().glob("*.json"))


def architecture_folder() -> Path:
    """Folder of the shipped model configs."""
    return Path(str(resources.files("biomedclip.models"))) / "architectures"


def models_table() -> str:
    """Architectures and checkpoints as aligned plain text."""
    lines = ["architectures shipped here (random weights; `train` starts from them)"]
    for name in list_architectures():
        config = json.loads((architecture_folder() / f"{name}.json").read_text())
        vision, text = config["vision_cfg"], config["text_cfg"]
        tower = vision.get("timm_model_name") or f"ViT, {vision.get('layers')} layers"
        lines.append(
            f"  {name:<18} {tower}, {vision['image_size']} px; text {text['layers']} layers,"
            f" {text['context_length']} tokens; embedding {config['embed_dim']}"
        )
    lines += ["", "released checkpoints (downloaded on first use; licence as their publisher states it)"]
    width = max(len(checkpoint.name) for checkpoint in CHECKPOINTS)
    lines += [f"  {entry.name:<{width}}  {entry.licence:<4}  {entry.domain}" for entry in CHECKPOINTS]
    lines += ["", "also: a run folder, a checkpoint folder, local-dir:FOLDER, and every ARCHITECTURE/TAG of open_clip"]
    return "\n".join(lines)
