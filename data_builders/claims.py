"""Whose a dataset folder is while it is written: nobody else's files are overwritten, and nothing finished is touched.

A folder is claimed by a small file with the identity of what is being made (hashes of config and input), held by a
lock while somebody works on it, and given up when its manifest is there. An identity that is finished already is
returned as it is; anything else that is finished is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from biomedclip.errors import ConfigError
from biomedclip.files import TEMPORARY_PREFIX, write_json
from biomedclip.shards import MANIFEST, DatasetFolder
from data_builders.locks import hold_lock

UNFINISHED = ".building.json"
"""Marks a folder that has begun to be filled; gone when it is done."""

_LOCK = ".building.lock"


def finished_dataset(out: Path, identity: Mapping[str, str]) -> dict[str, Any] | None:
    """The manifest of a finished dataset of the same identity. Raises ConfigError for one of another."""
    if not (out / MANIFEST).exists():
        return None
    manifest = DatasetFolder(out).manifest
    provenance = manifest.get("provenance", {})
    for part, text in (("config_sha256", "config"), ("input_sha256", "input")):
        if provenance.get(part) != identity[part]:
            raise ConfigError(
                out, f"holds a finished dataset of another {text}", found=f"{part} {provenance.get(part)}"[:40],
                todo="name another folder, or delete this one to build it anew",
            )  # fmt: skip
    return manifest


def claim_folder(out: Path, identity: Mapping[str, str]) -> bool:
    """Mark `out` as being built; returns whether an interrupted build of the same identity is to be gone on with.

    What an interrupted build of another identity left is to be overwritten: nothing in it was finished. Raises
    ConfigError where the folder holds files that no build left there.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(out, "is a file", todo="name a folder")
    mark = out / UNFINISHED
    if out.exists() and not mark.exists():
        others = sorted(path.name for path in out.iterdir() if not path.name.startswith((TEMPORARY_PREFIX, _LOCK)))
        if others:
            raise ConfigError(out, "holds other files", found=others[0], todo="name an empty or a new folder")
    try:
        known = json.loads(mark.read_bytes()) == dict(identity)
    except (FileNotFoundError, ValueError):
        known = False
    if not known:
        write_json(mark, dict(identity))
    return known


@contextmanager
def hold_folder(out: Path) -> Iterator[None]:
    """Keep all other builders out of `out` meanwhile. Raises ConfigError where one is at work there."""
    if out.exists() and not out.is_dir():
        raise ConfigError(out, "is a file", todo="name a folder")
    out.mkdir(parents=True, exist_ok=True)
    with hold_lock(out / _LOCK, keep=False) as ours:
        if not ours:
            raise ConfigError(out, "is being written by another process", todo="wait for it, or name another folder")
        yield
