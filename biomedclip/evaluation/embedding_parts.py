"""Parts of an embedding job on disk: what is finished stays finished, whoever made it and however the run ended.

A part is one npz in the job's folder: row numbers of the manifest, vectors of the rows that were read, a Drop for each
of the others. The folder's name holds the job's key, so parts of other weights, data or precision are never met. A
file that is broken counts as not there: its rows are embedded again.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from biomedclip.files import remove_leftovers, write_atomic
from biomedclip.schema import Drop

PART_ROWS = 2048
"""Rows after which a part is written: at 512 dimensions 4 MB, and seconds to minutes of work to lose."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a manifest: the embedded ones first, in the order of `vectors`, then the dropped ones."""

    rows: NDArray[np.int64]
    vectors: NDArray[np.float32]
    drops: tuple[Drop, ...]

    def embedded(self) -> NDArray[np.int64]:
        """Row numbers of `vectors`."""
        return self.rows[: len(self.vectors)]

    def dropped(self) -> NDArray[np.int64]:
        """Row numbers of `drops`."""
        return self.rows[len(self.vectors) :]


def join_parts(parts: Sequence[Part]) -> Part:
    """One part of several."""
    filled = [part.vectors for part in parts if len(part.vectors)]
    rows = [*(part.embedded() for part in parts), *(part.dropped() for part in parts)]
    return Part(
        np.concatenate(rows), np.concatenate(filled) if filled else np.zeros((0, 0), np.float32),
        tuple(drop for part in parts for drop in part.drops),
    )  # fmt: skip


def write_part(folder: Path, part: Part) -> Path:
    """Write a part, whole or not at all; its name is its first row, which no other part has."""
    path = folder / f"{int(part.rows.min()):010d}.npz"
    with write_atomic(path) as file:
        np.savez(file, rows=part.rows, vectors=part.vectors,
                 drops=np.asarray([json.dumps(asdict(drop)) for drop in part.drops], dtype=np.str_))  # fmt: skip
    return path


def read_parts(folder: Path) -> list[Part]:
    """The readable parts of a folder, by first row; none where there is no folder. A row stands in one part only:
    where a killed run and its successor both wrote it, the first part keeps it and the other counts as not there."""
    if folder.is_dir():
        remove_leftovers(folder)
    parts: list[Part] = []
    seen: set[int] = set()
    for path in sorted(folder.glob("*.npz")):
        part = _read_part(path)
        if part is None or seen & set(part.rows.tolist()):
            path.unlink()
            continue
        seen |= set(part.rows.tolist())
        parts.append(part)
    return parts


def _read_part(path: Path) -> Part | None:
    try:
        # Opened here, because np.load leaves a file of its own open where the zip is broken.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            drops = tuple(Drop(**json.loads(text)) for text in file["drops"].tolist())
            part = Part(file["rows"], file["vectors"], drops)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return part if len(part.rows) == len(part.vectors) + len(part.drops) and len(part.rows) else None
