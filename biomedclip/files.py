"""Files that are written whole or not at all, and their hashes.

Every file this project writes goes through `write_atomic`: bytes go to a temporary name in the same folder, are
flushed to disk, and only then take the final name. A kill -9 at any moment therefore leaves either the old file,
the new file, or a `.tmp-*` leftover that `remove_leftovers` deletes at the next run, never half a file under a final
name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from biomedclip.errors import DataError

TEMPORARY_PREFIX = ".tmp-"


@contextmanager
def write_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a binary file that appears under `path` only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}-{path.name}"
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with write_atomic(path) as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def split_lines(text: str) -> list[str]:
    """The lines of a text, ended by line feeds alone.

    `str.splitlines` also breaks at U+0085, U+2028 and six more, which JSON strings and vocabularies may hold.
    """
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut (POSIX asks for this separately)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explain_full_disk(folder: str | Path) -> Iterator[None]:
    """Turn the system's word for a full disk or an exhausted quota into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(folder, "the disk is full", found=os.strerror(error.errno),
                        todo="free space and run the same command again: what is finished stays") from None  # fmt: skip


def remove_leftovers(folder: str | Path, of: str | None = None) -> int:
    """Delete temporary files that an interrupted run left directly in `folder`; returns how many.

    `of` is a shell pattern of final names: in a folder where others may be writing, only leftovers of these go.
    """
    pattern = f"{TEMPORARY_PREFIX}*" if of is None else f"{TEMPORARY_PREFIX}????????-{of}"
    leftovers = list(Path(folder).glob(pattern))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return len(leftovers)


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON-able value, independent of key order and spacing."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
