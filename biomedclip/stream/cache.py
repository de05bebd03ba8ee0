"""Byte ranges of remote files on the local disk, shared by any number of processes and bounded in size.

An entry is one sample's range, not a block: a sample's range is the same in every epoch, and nothing is fetched that
was not asked for. Its name is a hash of (url, identity, range), so a replaced file has other entries; its bytes carry
a hash, so a damaged entry is a miss. Entries are written whole or not at all. When a process has written a share of
the limit it deletes the least recently used ones, unless another does so at this moment. A disk that is full or
cannot be written turns the cache off and leaves one notice; reading goes on.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from biomedclip.files import TEMPORARY_PREFIX, write_bytes

_DIGEST = 16
_KEEP = 0.9
_CHECKS = 32
_LEFTOVER_S = 3600


class DiskCache:
    """Entries below `folder`, together at most about `max_bytes`; `max_bytes` 0 keeps nothing."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.notice: str | None = None
        """Why the cache is off, where it is."""
        self._written, self._checked = 0, False
        self._lock = threading.Lock()

    def has(self, name: str) -> bool:
        """Whether there is an entry, of which `read` may still find that it is damaged."""
        return self.max_bytes > 0 and self._path(name).exists()

    def read(self, name: str) -> bytes | None:
        """The bytes stored under `name`; None where there are none or they are damaged."""
        path = self._path(name)
        try:
            stored = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        data = stored[_DIGEST:]
        if _digest(data) == stored[:_DIGEST]:
            return data
        with suppress(OSError):
            path.unlink()
        return None

    def write(self, name: str, data: bytes) -> None:
        """Store `data`, unless the cache is off."""
        if self.max_bytes <= 0 or len(data) > self.max_bytes // 4:
            return
        try:
            write_bytes(self._path(name), _digest(data) + data)
        except OSError as error:
            self.max_bytes = 0
            self.notice = (
                f"{self.folder}: the cache is off, its disk cannot be written ({os.strerror(error.errno or 0)})"
            )
            return
        with self._lock:
            self._written += len(data)
            due = not self._checked or self._written > self.max_bytes // _CHECKS
            if due:
                self._written, self._checked = 0, True
        if due:
            self._shrink()

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name[2:]

    def _shrink(self) -> None:
        """Delete the least recently used entries beyond the limit, unless another process is at it."""
        import fcntl

        with suppress(OSError), (self.folder / ".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            entries = []
            for found in os.scandir(self.folder):
                if not found.is_dir() or len(found.name) != 2:
                    continue
                for entry in os.scandir(found.path):
                    with suppress(FileNotFoundError):
                        facts = entry.stat()
                        leftover = entry.name.startswith(TEMPORARY_PREFIX)
                        if leftover and time.time() - facts.st_mtime < _LEFTOVER_S:
                            continue
                        # An interrupted writer's leftover is older than anything that is used.
                        entries.append((0.0 if leftover else facts.st_mtime, facts.st_size, entry.path, leftover))
            total = sum(size for _, size, _, _ in entries)
            over = total > self.max_bytes
            for _, size, path, leftover in sorted(entries):
                if leftover or (over and total > _KEEP * self.max_bytes):
                    with suppress(FileNotFoundError):
                        os.unlink(path)
                    total -= size


def entry_name(*facts: object) -> str:
    """The name of the entry for some facts: a hash of them."""
    return hashlib.blake2b("\x1f".join(map(str, facts)).encode(), digest_size=20).hexdigest()


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()
