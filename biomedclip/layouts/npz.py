"""Arrays of an .npz archive, without unpickling and within bounded memory.

Arrays up to `MAX_LOADED_BYTES` are read once, checksum and all, and the last few kept. Larger ones (PathMNIST at 224
pixels is 13 GB) are read row by row from the compressed stream: forward is as fast as decompression, a step back
starts again, which suits readers that go through a set in order.
"""

from __future__ import annotations

import math
import os
import struct
import threading
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from biomedclip.errors import DataError

MAX_LOADED_BYTES = 1 << 30
"""Larger arrays are read row by row."""


class Header(NamedTuple):
    """What an array is, from its first bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    data_offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def check_archive(path: Path) -> list[list[object]]:
    """Name, size and CRC-32 of every array, from the archive's list. Raises DataError for a file that is no .npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [[info.filename, info.file_size, info.CRC] for info in archive.infolist()]
    except (OSError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile) as error:
        raise DataError(path, "cannot be read as .npz", found=str(error)[:80], todo="download it again") from None


def read_header(path: str, key: str) -> Header:
    """Shape and type of an array. Raises DataError where it is missing, corrupt or pickled."""
    return _read_header(path, key, _stamp(path))


def read_array(path: str, key: str) -> np.ndarray:
    """One array of an .npz, kept in memory. Raises DataError where it is missing, corrupt or pickled."""
    return _load_array(path, key, _stamp(path))


def read_row(path: str, key: str, number: int) -> np.ndarray:
    """One row of an array, whatever its size. Raises DataError as `read_array` does."""
    stamp = _stamp(path)
    header = _read_header(path, key, stamp)
    if not 0 <= number < header.shape[0]:
        raise DataError(f"{path}: {key}", f"has no row {number}", found=f"{header.shape[0]} rows")
    if math.prod(header.shape) * header.dtype.itemsize <= MAX_LOADED_BYTES:
        return np.asarray(_load_array(path, key, stamp)[number])
    with _lock, _reading(path, key):
        stream = _open_stream(path, key, stamp, os.getpid())
        stream.seek(header.data_offset + number * header.row_bytes)
        data = stream.read(header.row_bytes)
    if len(data) < header.row_bytes:
        raise DataError(f"{path}: {key}", "ends before its last row", todo="download it again")
    return np.frombuffer(data, header.dtype).reshape(header.shape[1:])


_lock = threading.Lock()


def _stamp(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from None
    return stat.st_mtime_ns, stat.st_size


@contextmanager
def _reading(path: str, key: str) -> Iterator[None]:
    """Turn what a damaged or hostile archive raises into one DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of headers it has to mend; the checksum decides
            yield
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        # RuntimeError: encrypted, or compressed in a way zipfile does not know.
        raise DataError(f"{path}: {key}", "cannot be read", found=str(error)[:80], todo="download it again") from None
    except (ValueError, SyntaxError, tokenize.TokenError) as error:
        raise DataError(f"{path}: {key}", "is not a plain array", found=str(error)[:60],
                        todo="a pickled array is never loaded; save it as numbers") from None  # fmt: skip
    except MemoryError as error:
        raise DataError(f"{path}: {key}", "does not fit into memory", found=str(error)[:80],
                        todo="if the size is absurd, the file is damaged: download it again") from None  # fmt: skip


def _check_member(archive: zipfile.ZipFile, path: str, key: str) -> str:
    member = f"{key}.npy"
    if member not in archive.namelist():
        names = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
        raise DataError(path, f"has no array '{key}'", found=names, todo="check that this is the right file")
    return member


@lru_cache(maxsize=32)
def _read_header(path: str, key: str, stamp: tuple[int, int]) -> Header:
    with _reading(path, key), zipfile.ZipFile(path) as archive:
        member = _check_member(archive, path, key)
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            offset = file.tell()
        if dtype.hasobject:
            raise ValueError("Object arrays cannot be loaded")
        if (fortran and len(shape) > 1) or not shape:
            raise ValueError("not stored row by row")
        said = math.prod(shape) * dtype.itemsize + offset
        if said > MAX_LOADED_BYTES and said > archive.getinfo(member).file_size:
            raise MemoryError(f"header speaks of {said} bytes")
        return Header(shape, dtype, offset)


@lru_cache(maxsize=6)
def _load_array(path: str, key: str, stamp: tuple[int, int]) -> np.ndarray:
    """The array; `stamp` makes a file that was replaced a different one."""
    with (
        _reading(path, key),
        zipfile.ZipFile(path) as archive,
        archive.open(_check_member(archive, path, key)) as file,
    ):
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        file.read()  # to the end, because that is where zipfile compares the checksum
    array.setflags(write=False)
    return array


@lru_cache(maxsize=2)
def _open_stream(path: str, key: str, stamp: tuple[int, int], process: int) -> BinaryIO:
    """The array's bytes, decompressed as they are read; `process` because a fork would share the position."""
    return zipfile.ZipFile(path).open(f"{key}.npy")  # type: ignore[return-value]
