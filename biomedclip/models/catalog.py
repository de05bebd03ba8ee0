"""What `load` accepts, as a table that costs no torch: released models of the zoo, architectures shipped here.

Reads the zoo's YAML files as plain values, without their schema: a list of forty models must come at once, and the
schema is checked by `biomedclip.models.zoo` when a model is used.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

# The C reader of libyaml where it is there: 41 files in 0.1 s instead of 0.7 s.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def list_architectures() -> list[str]:
    """Names of the architectures this project ships: open_clip model configs under `architectures/`."""
    return sorted(path.stem for path in architecture_folder().glob("*.json"))


def architecture_folder() -> Path:
    """Folder of the shipped model configs."""
    return Path(str(resources.files("biomedclip.models"))) / "architectures"


def zoo_folder() -> Path:
    """Folder of the facts of released models, one YAML file each."""
    return Path(str(resources.files("biomedclip.models"))) / "zoo"


def bundled_folder(folder: str) -> Path:
    """Folder of weights that lie inside of this package, by the name that `source.folder` gives."""
    return Path(str(resources.files("biomedclip.models"))) / folder


def list_names() -> list[str]:
    """Names of all released models, sorted."""
    return sorted(path.stem for path in zoo_folder().glob("*.yaml"))


@cache
def plain_facts(name: str) -> dict[str, Any]:
    """A model's YAML file as it is, unchecked."""
    values: dict[str, Any] = yaml.load((zoo_folder() / f"{name}.yaml").read_text(encoding="utf-8"), Loader=_LOADER)  # noqa: S506
    return values


def describe_access(source: dict[str, Any]) -> str:
    """How one gets the files: `bundled` (they are here), `open`, `gated` (accept terms), or `by hand` (no address a
    program can read)."""
    if source.get("gated"):
        return "gated"
    return {"manual": "by hand", "bundled": "bundled"}.get(source["kind"], "open")


def models_table(domain: str | None = None) -> str:
    """Released models and shipped architectures as aligned plain text; `domain` keeps those that name it."""
    rows = []
    for name in list_names():
        facts = plain_facts(name)
        if domain is None or any(domain.lower() in entry.lower() for entry in facts["domains"]):
            licence = facts["licence"].get("name") or facts["licence"]["id"]
            access = describe_access(facts["source"])
            rows.append((name, _shorten(licence, 24), access, ", ".join(facts["domains"])))
    if not rows:
        known = sorted({entry for name in list_names() for entry in plain_facts(name)["domains"]})
        return f"no model for '{domain}'; domains: {', '.join(known)}"
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"released models ({len(rows)}); load(NAME) downloads what is not bundled; licence as their publishers state it"
    ]
    for row in rows:
        lines.append("  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))
    if domain is None:
        lines += ["", "architectures shipped here (random weights; `train` starts from them)"]
        lines += [_describe_architecture(name) for name in list_architectures()]
        lines += ["", "also: a run folder, a checkpoint folder, local-dir:FOLDER, hf-hub:OWNER/NAME,"
                  " and every ARCHITECTURE/TAG of open_clip"]  # fmt: skip
        lines += ["facts of one: biomedclip models info NAME"]
    return "\n".join(lines)


def _describe_architecture(name: str) -> str:
    config = json.loads((architecture_folder() / f"{name}.json").read_text())
    vision, text = config["vision_cfg"], config["text_cfg"]
    tower = vision.get("timm_model_name") or f"ViT, {vision.get('layers')} layers"
    return (
        f"  {name:<18} {tower}, {vision['image_size']} px; text {text['layers']} layers,"
        f" {text['context_length']} tokens; embedding {config['embed_dim']}"
    )


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
