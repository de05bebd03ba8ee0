"""Who may write what: advisory file locks, held by a process and given back by the system however that ends.

`hold_lock` locks a small hidden file with flock. A kill -9 releases the lock and leaves the file, which the next holder
reuses; there is nothing to clean up by hand and no process id to mistrust. On NFS, Linux turns flock into a lock that
other machines see.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_S = 0.05


@contextmanager
def hold_lock(path: str | Path, *, shared: bool = False, wait_s: float = 0.0, keep: bool = True) -> Iterator[bool]:
    """Yield whether `path` is locked by us now: False where another still holds it after `wait_s` seconds.

    Holders that share exclude only those that do not. With `keep` False the file is deleted after use, which only
    locks that are never shared can afford.
    """
    deadline = time.monotonic() + wait_s
    while (descriptor := _try_lock(Path(path), shared)) is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        if not keep:
            Path(path).unlink(missing_ok=True)
        os.close(descriptor)


def _try_lock(path: Path, shared: bool) -> int | None:
    """The descriptor that holds the lock; None where another process has it."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        # The file may have been deleted between our opening and locking it: then the lock protects nothing.
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None
