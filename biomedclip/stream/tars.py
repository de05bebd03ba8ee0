"""The bytes of a source's samples out of its tars: positional reads on this disk, ranges of what a URL points to.

Takes where a source lies and the columns of its index; gives one object with the same four methods for both. Remote
ranges are asked for batch by batch before they are needed. What a tar no longer holds where its index says is a fault
with a word, so that it can be counted.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from biomedclip.shards import BLOCK
from biomedclip.stream.addresses import shown
from biomedclip.stream.faults import CutOff, Missing, Replaced, WrongBytes
from biomedclip.stream.fetch import MAX_BLOCK, FetchConfig, Fetcher, Pending, Span
from biomedclip.stream.index import ShardFact

if TYPE_CHECKING:
    from biomedclip.stream.source import Place

_SPANS = {member: (f"{member}_offset", f"{member}_size") for member in ("image", "text", "json")}
PAIR = ("image", "text")
"""Members that are read together unless a caller needs others."""

MAX_OPEN = 64
"""Shards kept open by a reading process."""

_REPAIR = "the tar was changed after it was written; rebuild the dataset or fetch it again"


class Shards(Protocol):
    """The bytes of one source's samples, by row of its columns."""

    def prepare(self, rows: Sequence[int]) -> None:
        """Begin to read what these rows need."""

    def read(self, row: int, member: str) -> bytes:
        """The bytes of a row's `image`, `text` or `json`. Raises DataError where they cannot be had."""

    def release(self, rows: Sequence[int]) -> None:
        """Forget what was prepared for these rows."""

    def close(self) -> None:
        """Close what this process opened; reading opens it again."""


class LocalShards:
    """Positional reads from tars on this machine, one for picture and caption: they lie next to each other."""

    def __init__(self, place: Place, columns: Mapping[str, Sequence[Any]], members: Sequence[str] = PAIR) -> None:
        self._base, self._columns, self._facts, self._members = place.base, columns, place.shards, tuple(members)
        self._is_ours = place.dataset is not None
        self._files = OpenShards()
        self._paths: dict[str, Path] = {}
        self._held = _Held(-1, 0, b"", {})

    def prepare(self, rows: Sequence[int]) -> None:
        """Nothing: the system reads ahead."""

    def release(self, rows: Sequence[int]) -> None:
        """Nothing."""

    def read(self, row: int, member: str) -> bytes:
        """The bytes of a member of the row's sample. Raises Fault where the tar ends before, or is another one."""
        held = self._held
        if held.row != row:
            held = self._held = self._load(row)
        first, data = held.first, held.data
        if member in held.members:
            start, stop = held.members[member]
        else:
            start, stop = _span_of(self._columns, row, (member,))
            first, data = start, self._pread(row, start, stop)
        if stop > first + len(data):
            raise CutOff(self._where(row), "is cut off", found=f"{max(first + len(data) - start, 0)} of {stop - start} "
                         "bytes", todo=_REPAIR)  # fmt: skip
        return data[start - first : stop - first]

    def _load(self, row: int) -> _Held:
        wanted = _present(self._columns, row, self._members)
        members = {member: _span_of(self._columns, row, (member,)) for member in wanted}
        first, last = min(members.values())[0], max(stop for _, stop in members.values())
        if last - first > MAX_BLOCK:  # members far apart
            return _Held(row, 0, b"", {})
        data = self._pread(row, first, last)
        if self._is_ours and "text" in members:
            check_name(data, members["text"][0] - first, self._columns, row, self._where)
        return _Held(row, first, data, members)

    def _pread(self, row: int, start: int, stop: int) -> bytes:
        shard = self._columns["shard"][row]
        path = self._paths.get(shard) or self._paths.setdefault(shard, Path(self._base + shard))
        return os.pread(self._files.open(path, self._facts.get(shard)), stop - start, start)

    def _where(self, row: int) -> str:
        return f"{self._base}{self._columns['shard'][row]}: {self._columns['key'][row]}"

    def close(self) -> None:
        """Close the tars."""
        self._files.close()
        self._held = _Held(-1, 0, b"", {})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OpenShards(), "_held": _Held(-1, 0, b"", {})}


@dataclass(frozen=True, slots=True)
class _Held:
    """The row read last: its bytes, where they begin in the shard, and where the members in them begin and end."""

    row: int
    first: int
    data: bytes
    members: dict[str, tuple[int, int]]


class RemoteShards:
    """Ranges of tars at URLs: one range a sample, from its first needed member to its last."""

    def __init__(
        self, place: Place, columns: Mapping[str, Sequence[Any]], fetcher: FetcherHere, members: Sequence[str] = PAIR
    ) -> None:
        self._base, self._columns, self._facts, self._fetcher = place.base, columns, place.shards, fetcher
        self._is_ours, self._members = place.dataset is not None, tuple(members)
        self._pending: dict[int, Pending] = {}
        self._held: dict[int, bytes] = {}
        self._owner = os.getpid()

    def prepare(self, rows: Sequence[int]) -> None:
        """Begin to fetch these rows, near ones together."""
        self._disown()
        spans = {row: self._span(row) for row in rows if row not in self._pending}
        started = self._fetcher.open().start(list(spans.values()))
        self._pending |= {row: started[span] for row, span in spans.items()}

    def read(self, row: int, member: str) -> bytes:
        """The bytes of a member of the row's sample. Raises DataError, or Unreachable where the host is away."""
        self._disown()
        span, pending = self._span(row), self._pending.get(row)
        data = self._held.get(row)
        if data is None:
            data = pending.result() if pending else self._fetcher.open().read(span)
            if pending:
                self._held[row] = data
        start, stop = _span_of(self._columns, row, (member,))
        if self._is_ours and member == "text":
            check_name(data, start - span.start, self._columns, row, self._where)
        return data[start - span.start : stop - span.start]

    def release(self, rows: Sequence[int]) -> None:
        """Forget these rows; what else needs them reads them again."""
        for row in rows:
            self._pending.pop(row, None)
            self._held.pop(row, None)

    def close(self) -> None:
        """Forget everything; the fetcher is closed by its owner."""
        self._pending.clear()
        self._held.clear()

    def _span(self, row: int) -> Span:
        columns = self._columns
        many = "image" in self._members and columns["num_captions"][row] > 1
        members = {*self._members, "json"} if many else self._members
        start, stop = _span_of(columns, row, _present(columns, row, members))
        shard = columns["shard"][row]
        fact = self._facts[shard]
        return Span(self._base + shard, start, stop, fact.version, fact.etag, fact.size)

    def _where(self, row: int) -> str:
        return f"{shown(self._base + self._columns['shard'][row])}: {self._columns['key'][row]}"

    def _disown(self) -> None:
        """Drop what a parent process had begun: its threads are not in this one."""
        if self._owner != os.getpid():
            self._owner = os.getpid()
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": {}, "_held": {}}


class FetcherHere:
    """The fetcher of whichever process asks for it: threads and connections do not survive a fork."""

    def __init__(self, config: FetchConfig) -> None:
        self.config = config
        self._fetcher: Fetcher | None = None
        self._owner = 0

    def open(self) -> Fetcher:
        """This process's fetcher."""
        if self._fetcher is None or self._owner != os.getpid():
            self._fetcher, self._owner = Fetcher(self.config), os.getpid()
        return self._fetcher

    @property
    def notice(self) -> str | None:
        """What the disk cache has to say, if anything was fetched here."""
        return self._fetcher.cache.notice if self._fetcher is not None and self._owner == os.getpid() else None

    def close(self) -> None:
        """Close it; `open` makes a new one."""
        if self._fetcher is not None and self._owner == os.getpid():
            self._fetcher.close()
        self._fetcher = None

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "_fetcher": None, "_owner": 0}


class OpenShards:
    """The shards a process has open, the least recently used closed beyond `MAX_OPEN`."""

    def __init__(self) -> None:
        # Open files belong to a process: a forked worker must not share its parent's.
        self._files: OrderedDict[Path, BinaryIO] = OrderedDict()
        self._owner = os.getpid()
        weakref.finalize(self, _close_all, self._files)

    def open(self, path: Path, fact: ShardFact | None = None) -> int:
        """Descriptor of the shard, opened for reading. Raises Missing, or Replaced where it is not what `fact` says."""
        if self._owner != os.getpid():
            self.close()
            self._owner = os.getpid()
        file = self._files.get(path)
        if file is None:
            try:
                file = self._files[path] = path.open("rb")
            except OSError as error:
                raise Missing(path, "cannot be opened", found=error.strerror, todo="rebuild the dataset") from None
            while len(self._files) > MAX_OPEN:
                self._files.popitem(last=False)[1].close()
        else:
            self._files.move_to_end(path)
        descriptor = file.fileno()
        if fact:  # asked each time: a tar without checksums may be overwritten while it is open
            now = os.fstat(descriptor)
            if (now.st_size, now.st_mtime_ns) != (fact.size, fact.mtime_ns):
                raise Replaced(path, "was replaced since its index was read", found=f"{now.st_size} bytes, not "
                               f"{fact.size}, or another date", todo="start a new run with its new index")  # fmt: skip
        return descriptor

    def close(self) -> None:
        """Close all of them."""
        _close_all(self._files)


def _close_all(files: OrderedDict[Path, BinaryIO]) -> None:
    while files:
        files.popitem()[1].close()


def _present(columns: Mapping[str, Sequence[Any]], row: int, members: Collection[str]) -> list[str]:
    """Those of the members that the row's sample has: foreign tars may lack the json."""
    return [member for member in members if member != "json" or columns["json_offset"][row] is not None]


def _span_of(columns: Mapping[str, Sequence[Any]], row: int, members: Sequence[str]) -> tuple[int, int]:
    """First and last byte (exclusive) of some members of a row's sample within its shard."""
    first, last = 1 << 62, 0
    for member in members:
        offset, size = _SPANS[member]
        start = int(columns[offset][row])
        first, last = min(first, start), max(last, start + int(columns[size][row]))
    return first, last


def check_name(
    data: bytes, caption: int, columns: Mapping[str, Sequence[Any]], row: int, where: Callable[[int], str]
) -> None:
    """Raise WrongBytes where the header before a caption of ours names another sample: captions have no checksum.

    The caption begins at byte `caption` of `data`, or its header may lie before them.
    """
    header = caption - BLOCK
    name = f"{columns['key'][row]}.".encode()
    if header >= 0 and len(data) >= header + len(name) and not data.startswith(name, header):
        raise WrongBytes(where(row), "is not where its index says", todo=_REPAIR)
