"""Tables that a build reads beside its articles: kept while they are used, and part of what names the build.

Each process of a build reads such a file once, not once an article; and since a file's name says nothing of what is in
it, its hash goes into the identity of whatever was built with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from biomedclip.errors import DataError
from biomedclip.files import sha256_file

Table = TypeVar("Table")


def read_once(read: Callable[[Path], Table], path: Path) -> Table:
    """What `read` makes of a file, from memory while the file stays the same. Raises DataError where it is missing."""
    try:
        facts = path.stat()
    except OSError as error:
        raise DataError(path, "cannot be read", found=error.strerror or str(error)) from None
    table: Table = _read(read, path, facts.st_mtime_ns, facts.st_size)
    return table


@lru_cache(maxsize=4)
def _read(read: Callable[[Path], Any], path: Path, mtime_ns: int, size: int) -> Any:
    return read(path)


def hash_files(paths: dict[str, str | None]) -> dict[str, str]:
    """Name -> sha256 of the file, of those that are given. Raises DataError where one is missing."""
    hashes = {}
    for name, text in paths.items():
        if text is None:
            continue
        path = Path(text).expanduser()
        if not path.is_file():
            raise DataError(path, f"there is no such file, which {name} names")
        hashes[name] = sha256_file(path)
    return hashes
