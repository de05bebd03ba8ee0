"""The chosen rows of a source as values, and as a file that a resumed run reads instead of choosing again."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from biomedclip.stream.members import Caps

RowNumbers = range | np.ndarray
"""Ascending row numbers of an index."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a source that the plan deals with as one: all of them, or a class or weight that is balanced."""

    name: str
    share: float
    """Of the weight of the source."""
    rows: RowNumbers
    """Row numbers in the index, ascending."""
    caps: Caps | None


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen rows of a source in parts, and what is known of their labels."""

    parts: tuple[Part, ...]
    labels: tuple[str, ...]
    """Names, sorted."""
    most_labels: int
    """Of one sample."""
    sha256: str
    """Identity: equal rows of equal content, equal hash."""

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts)


def selection_bytes(selection: Selection, name: str) -> bytes:
    """The selection of a source of this name as a file; the name itself is not in it."""
    arrays: dict[str, np.ndarray] = {}
    parts = []
    for number, part in enumerate(selection.parts):
        span = [part.rows.start, part.rows.stop] if isinstance(part.rows, range) else None
        parts.append({"name": part.name.removeprefix(name), "share": part.share, "caps": part.caps is not None,
                      "range": span})  # fmt: skip
        if span is None:
            arrays[f"rows{number}"] = np.asarray(part.rows)
        if part.caps is not None:
            arrays[f"groups{number}"], arrays[f"taken{number}"] = part.caps.groups, part.caps.taken
    header = {"sha256": selection.sha256, "labels": selection.labels, "most_labels": selection.most_labels,
              "parts": parts}  # fmt: skip
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def read_selection(path: Path, name: str, sha256: str) -> Selection | None:
    """The selection kept under a path; None where there is none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            header: dict[str, Any] = json.loads(stored["header"].tobytes())
            if header["sha256"] != sha256:
                return None
            parts = [_read_part(number, facts, name, stored) for number, facts in enumerate(header["parts"])]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return Selection(tuple(parts), tuple(header["labels"]), header["most_labels"], sha256)


def _read_part(number: int, facts: Mapping[str, Any], name: str, stored: Mapping[str, np.ndarray]) -> Part:
    rows: RowNumbers = range(*facts["range"]) if facts["range"] else stored[f"rows{number}"]
    caps = Caps(stored[f"groups{number}"], stored[f"taken{number}"]) if facts["caps"] else None
    return Part(name + facts["name"], facts["share"], rows, caps)
