"""The members of one tar.gz, streamed in order and never extracted, whoever made the archive.

Yields every member with its kind, size and md5, and the bytes of those the caller wants. The headers are read here
rather than by `tarfile`, which trusts the sizes of extended headers (a few hundred bytes of gzip can ask it for
gigabytes of memory) and follows links within an archive; the subset that occurs (ustar, GNU long names, pax path and
size) is small. Sizes, counts and the unpacked total are bounded, and an archive that is cut or damaged anywhere is
refused as a whole: without checksums of its own, what was read before the damage cannot be trusted either.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from data_builders.pmc.catalog import BadFile

MAX_UNPACKED_BYTES = 16 * 2**30
MAX_MEMBERS = 100_000
_MAX_HEADER_BYTES = 2**20
_BLOCK = 512
_CHUNK = 2**20
_ZEROS = bytes(_BLOCK)

Kind = Literal["file", "folder", "link", "device", "unknown"]
_KINDS: dict[bytes, Kind] = {
    **dict.fromkeys((b"0", b"\0", b"7"), "file"),
    **dict.fromkeys((b"1", b"2"), "link"),
    **dict.fromkeys((b"3", b"4", b"6"), "device"),
    b"5": "folder",
}


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of an archive. `name` is as written there; `md5` is that of a file's bytes, None for other kinds."""

    name: str
    kind: Kind
    size: int
    md5: str | None = None
    data: bytes | None = None
    """The bytes, where they were asked for."""


def read_members(path: str | Path, wants: Callable[[str, int], bool]) -> Iterator[Member]:
    """Every member of a tar.gz in order; with its bytes where `wants(name, size)`.

    Raises BadFile: `missing_file`, `broken_package` where it is no tar.gz, cut or damaged, `package_too_large` beyond
    MAX_UNPACKED_BYTES or MAX_MEMBERS. Raised late, it takes back what was yielded before.
    """
    path = Path(path)
    try:
        with gzip.open(path, "rb") as stream:
            yield from _walk(_Bounded(stream, path.name), wants)
    except FileNotFoundError:
        raise BadFile("missing_file", path.name) from None
    except (EOFError, OSError, zlib.error) as error:
        raise BadFile("broken_package", f"{path.name}: {error or 'ends too early'}"[:200]) from None


class _Bounded:
    """Exact reads from a stream, and an end to how much it may unpack."""

    def __init__(self, stream: BinaryIO | gzip.GzipFile, name: str) -> None:
        self._stream, self._name, self._left = stream, name, MAX_UNPACKED_BYTES

    def read(self, size: int, *, or_end: bool = False) -> bytes:
        """`size` bytes; none at all where the stream is at its end and `or_end`. Raises BadFile, EOFError."""
        self._left -= size
        if self._left < 0:
            raise BadFile("package_too_large", f"{self._name} unpacks to more than {MAX_UNPACKED_BYTES} bytes")
        data = self._stream.read(size)
        if len(data) != size and (data or not or_end):
            raise EOFError
        return data

    def chunks(self, size: int) -> Iterator[bytes]:
        while size > 0:
            yield self.read(min(size, _CHUNK))
            size -= _CHUNK

    def drain(self) -> None:
        """Read to the end, where gzip checks its checksum."""
        while data := self._stream.read(_CHUNK):
            self._left -= len(data)
            if self._left < 0:
                raise BadFile("package_too_large", f"{self._name} goes on after its end")

    def broken(self, what: str) -> BadFile:
        return BadFile("broken_package", f"{self._name}: {what}")


def _walk(stream: _Bounded, wants: Callable[[str, int], bool]) -> Iterator[Member]:
    long_name: str | None = None
    pax: dict[str, str] = {}
    for _ in range(MAX_MEMBERS):
        header = stream.read(_BLOCK, or_end=True)
        if not header or header == _ZEROS:
            stream.drain()
            return
        if not _has_checksum(header):
            raise stream.broken("a header without its checksum")
        kind, size = header[156:157], _parse_number(header[124:136])
        if size is None:
            raise stream.broken("a header without a size")
        if kind in (b"L", b"K", b"x", b"X", b"g"):
            if size > _MAX_HEADER_BYTES:
                raise stream.broken(f"an extended header of {size} bytes")
            text = stream.read(_padded(size))[:size]
            if kind == b"L":
                long_name = _decode(text.rstrip(b"\0"))
            elif kind in (b"x", b"X"):
                pax = _parse_pax(text)
            continue
        name = pax.get("path") or long_name or _header_name(header)
        if "size" in pax:
            if not re.fullmatch(r"[0-9]{1,18}", pax["size"]):
                raise stream.broken("an extended header with a wrong size")
            size = int(pax["size"])
        sparse = any(key.startswith("GNU.sparse") for key in pax)
        yield _read_member(stream, name, "unknown" if sparse else _KINDS.get(kind, "unknown"), size, wants)
        long_name, pax = None, {}
    raise BadFile("package_too_large", f"more than {MAX_MEMBERS} members")


def _read_member(stream: _Bounded, name: str, kind: Kind, size: int, wants: Callable[[str, int], bool]) -> Member:
    if kind in ("link", "device", "folder"):
        # Some writers note the target's size here, but no data follow.
        return Member(name, kind, 0)
    if kind == "unknown":
        for _ in stream.chunks(_padded(size)):
            pass
        return Member(name, kind, size)
    digest = hashlib.md5(usedforsecurity=False)
    kept: list[bytes] | None = [] if wants(name, size) else None
    for chunk in stream.chunks(size):
        digest.update(chunk)
        if kept is not None:
            kept.append(chunk)
    stream.read(_padded(size) - size)
    return Member(name, kind, size, digest.hexdigest(), None if kept is None else b"".join(kept))


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _has_checksum(header: bytes) -> bool:
    stated = _parse_number(header[148:156])
    return stated == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _parse_number(text: bytes) -> int | None:
    """A number of a header: octal digits, or GNU's base 256. None where it is neither, or negative."""
    if text[0] == 0x80:
        return int.from_bytes(text[1:], "big")
    digits = text.strip(b" \0")
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _header_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return _decode(name)


def _parse_pax(text: bytes) -> dict[str, str]:
    """Records `<length> <key>=<value>\\n`; the rest is ignored from the first one that breaks the form."""
    records: dict[str, str] = {}
    position = 0
    while position < len(text):
        match = re.compile(rb"([0-9]{1,7}) ([^=]{1,200})=").match(text, position)
        if match is None or int(match[1]) <= match.end() - position:
            break
        end = position + int(match[1])
        records[_decode(match[2])] = _decode(text[match.end() : end - 1])
        position = end
    return records


def _decode(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("latin-1")
