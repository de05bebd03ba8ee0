"""Ranges of files that stay where they are: `https://`, `hf://datasets/…` and public `s3://` objects, by byte range.

Takes spans (url, start, stop), gives their bytes. Spans that lie close together in one file are fetched by one
request, several at a time by threads, and kept in a disk cache. Faults that another attempt may not meet (throttling,
dropped and truncated answers, silence) are retried with growing pauses until `max_wait_s` has passed and then raise
`Unreachable`, which ends the run: it can be resumed, while passing over samples because the network was down would
make two runs of one plan differ. What asking again cannot change (a missing file, one that was replaced) is a
DataError of each sample in it. All processes of a machine share one budget of requests a host.
"""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn
from urllib.parse import urlsplit

from pydantic import Field

from biomedclip.config import Config
from biomedclip.errors import DataError
from biomedclip.stream.addresses import follow, hub, refuse, resolve, shown, sign
from biomedclip.stream.answers import Found, judge
from biomedclip.stream.budget import Budget
from biomedclip.stream.cache import DiskCache, entry_name
from biomedclip.stream.faults import CutOff, Missing, Replaced
from biomedclip.stream.transport import Answer, Transport, Trouble

MAX_GAP = 64 << 10
"""Bytes between two spans that are read along rather than asked for apart: a request costs more."""

MAX_BLOCK = 8 << 20
MAX_WHOLE = 16 << 20
"""A server that ignores ranges is put up with for files of at most this size."""

_MAX_FILE = 2 << 30
_MOVED_S = 300.0
_HUB_PER_S = 10.0
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.25, 30.0
_HOPELESS = ("certificate", "too_large", "paused", "stopped")


class Unreachable(DataError):
    """A host that did not give the bytes in time; the run can be resumed when it does."""


class FetchConfig(Config):
    """How remote shards are read."""

    cache: str | None = None
    """Folder of the disk cache; None: `biomedclip/stream` in the user's cache folder."""
    cache_gb: Annotated[float, Field(ge=0)] = 20.0
    """Most that the cache holds; 0 keeps nothing but the indexes."""
    requests_per_s: Annotated[float, Field(gt=0)] = 500.0
    """Requests a second to one host, of all processes of this machine; the Hugging Face Hub gets at most 10."""
    max_wait_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest time for one read, with all its attempts and pauses."""
    silence_s: Annotated[float, Field(gt=0)] = 20.0
    """Longest silence within an answer before it is asked for again."""
    threads: Annotated[int, Field(ge=1, le=256)] = 32
    """Requests under way at once in each reading process."""
    ahead: Annotated[int, Field(ge=0, le=64)] = 2
    """Batches that a reading process fetches before they are needed."""

    @property
    def folder(self) -> Path:
        """The cache folder."""
        if self.cache is not None:
            return Path(self.cache).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "biomedclip" / "stream"


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` to `stop` (exclusive) of a remote file, and what is known of that file."""

    url: str
    start: int
    stop: int
    version: str = ""
    """Part of the name in the cache: whatever changes when the file does."""
    etag: str | None = None
    """The ETag the file must have; None: it is not checked between runs."""
    total: int | None = None
    """The size the file must have."""


def coalesce(spans: Iterable[Span]) -> list[list[Span]]:
    """Spans grouped into blocks to be fetched by one request each: one file, gaps of at most MAX_GAP."""
    blocks: list[list[Span]] = []
    end = 0
    for span in sorted(set(spans), key=lambda s: (s.url, s.start, s.stop)):
        block = blocks[-1] if blocks else None
        near = block and block[0].url == span.url and span.start <= end + MAX_GAP
        if block and near and max(end, span.stop) - block[0].start <= MAX_BLOCK:
            block.append(span)
            end = max(end, span.stop)
        else:
            blocks.append([span])
            end = span.stop
    return blocks


class Fetcher:
    """Threads, connections and cache of one process; close it when reading ends."""

    def __init__(self, config: FetchConfig) -> None:
        self.config = config
        self.cache = DiskCache(config.folder / "spans", int(config.cache_gb * 1e9))
        self.requests: Counter[str] = Counter()
        """Requests, and retries by cause."""
        self._transport = Transport(config.silence_s)
        self._budget = Budget(config.folder / "budget", config.requests_per_s)
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="fetch")
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._moved: dict[str, tuple[str, float, str | None]] = {}
        self._etags: dict[str, str] = {}
        weakref.finalize(self, _close, self._stop, self._pool, self._transport)

    def close(self) -> None:
        """Stop what is under way and close the connections."""
        _close(self._stop, self._pool, self._transport)

    def start(self, spans: Sequence[Span]) -> dict[Span, Pending]:
        """Begin to read the spans; each can be waited for on its own."""
        names = {span: _name(span) for span in spans}
        pending: dict[Span, Pending] = {
            s: Pending(self, s, None, 0) for s, name in names.items() if self.cache.has(name)
        }
        for block in coalesce(span for span in names if span not in pending):
            future = self._pool.submit(self._read_block, block)
            pending |= {span: Pending(self, span, future, span.start - block[0].start) for span in block}
        return pending

    def read(self, span: Span) -> bytes:
        """The bytes of one span, from the cache or the host. Raises DataError, or Unreachable."""
        cached = self.cache.read(_name(span)) if self.cache.has(_name(span)) else None
        return self._read_block([span]) if cached is None else cached

    def read_file(self, url: str, *, optional: bool = False) -> bytes | None:
        """A whole file, never from the cache; None where it is missing and `optional`. Raises DataError."""
        found = self._fetch(url, 0, None, optional)
        return None if found is None else found.data

    def read_range(self, url: str, start: int, stop: int) -> Found:
        """Bytes of a file, fewer where it ends before `stop`, with its size and ETag; never from the cache."""
        found = self._fetch(url, start, stop, False)
        if found is None:
            refuse(url, "is missing", kind=Missing)
        return found

    def _read_block(self, block: Sequence[Span]) -> bytes:
        first, stop = block[0], max(span.stop for span in block)
        found = self.read_range(first.url, first.start, stop)
        with self._lock:
            known = first.etag or self._etags.setdefault(first.url, found.etag or "")
        if known not in ("", found.etag) or first.total not in (None, found.total):
            seen = f"ETag {found.etag} and {found.total} bytes, not {known or '?'} and {first.total or '?'}"
            refuse(
                first.url, "was replaced since its index was read", seen, "start a new run with its new index", Replaced
            )
        if len(found.data) < stop - first.start:
            refuse(first.url, "is cut off", f"{found.total} of at least {stop} bytes", "upload the tar again", CutOff)
        for span in block:
            self.cache.write(_name(span), found.data[span.start - first.start : span.stop - first.start])
        return found.data

    def _fetch(self, url: str, start: int, stop: int | None, optional: bool) -> Found | None:
        """What the host gives within `max_wait_s`, attempts repeated. Raises DataError or Unreachable."""
        deadline = time.monotonic() + self.config.max_wait_s
        causes: Counter[str] = Counter()
        for attempt in range(1000):
            try:
                answer, etag = self._ask(url, start, stop, deadline, causes)
                if optional and answer.status in _missing(url):
                    return None
                return judge(answer, url, start, stop, etag)
            except Trouble as trouble:
                causes[trouble.cause] += 1
                self._count(trouble.cause)
                pause = min(_FIRST_PAUSE_S * 2**attempt, _MAX_PAUSE_S) * random.uniform(0.5, 1.5)  # noqa: S311
                if trouble.cause == "throttled":
                    pause = trouble.pause_s if trouble.pause_s is not None else pause
                    self._budget.pause(self._host(url), pause)
                    pause = random.uniform(0, 0.25)  # noqa: S311  (the budget holds everybody back for the rest)
                if trouble.cause in _HOPELESS or time.monotonic() + pause >= deadline:
                    self._give_up(url, causes, trouble)
                if self._stop.wait(pause):
                    break
        raise Unreachable(shown(url), "was not read: reading was stopped")

    def _give_up(self, url: str, causes: Counter[str], trouble: Trouble) -> NoReturn:
        met = ", ".join(f"{cause} {count}x" for cause, count in causes.most_common())
        raise Unreachable(
            shown(url), f"cannot be read within {self.config.max_wait_s:g} s", found=f"{met}; last: {trouble}",
            todo="resume the run when the host answers, or raise data.fetch.max_wait_s",
        ) from None  # fmt: skip

    def _ask(
        self, url: str, start: int, stop: int | None, deadline: float, met: Mapping[str, int]
    ) -> tuple[Answer, str | None]:
        """The answer after redirects within the scheme, and the ETag that a redirecting host named.

        `met` are the causes of trouble so far: another address is tried once for each, then the status stands.
        """
        wanted = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        most = _MAX_FILE if stop is None else max(stop - start, MAX_WHOLE)
        with self._lock:
            moved = self._moved.get(url)
        if moved and moved[1] > time.monotonic():
            target, _, etag = moved
            own: Mapping[str, str] = {}
        else:
            (target, own), moved, etag = resolve(url), None, None
        hops = 0
        while True:
            self._wait(target, deadline)
            answer = self._transport.ask(target, {**wanted, **own}, max_bytes=most, deadline=deadline)
            if answer.status not in (301, 302, 303, 307, 308):
                break
            hops += 1
            etag = etag or answer.headers.get("X-Linked-Etag")
            target, own = follow(url, target, answer, own, hops)
        if not moved and answer.status == 403 and "not_public" not in met and (signed := sign(url)):
            with self._lock:
                self._moved[url] = (signed, time.monotonic() + _MOVED_S, None)
            raise Trouble("not_public", "asked again with a signature")
        if moved and answer.status in (400, 401, 403, 404, 410) and "expired" not in met:
            with self._lock:
                self._moved.pop(url, None)  # a signed address that has expired
            raise Trouble("expired", f"status {answer.status}")
        if hops and answer.status in (200, 206):
            with self._lock:
                self._moved[url] = (target, time.monotonic() + _MOVED_S, etag)
        return answer, etag

    def _wait(self, target: str, deadline: float) -> None:
        """Wait for the host's budget. Raises Trouble where it has nothing before the deadline."""
        host = urlsplit(target).netloc
        rate = min(_HUB_PER_S, self.config.requests_per_s) if host == urlsplit(hub()).netloc else None
        wait = self._budget.reserve(host, deadline - time.monotonic(), rate)
        if wait is None:
            raise Trouble("paused", "the host asks for a longer pause than this read may last")
        if wait and self._stop.wait(wait):
            raise Trouble("stopped", "reading was stopped")
        self._count("requests")

    def _host(self, url: str) -> str:
        with self._lock:
            moved = self._moved.get(url)
        return urlsplit(moved[0] if moved else resolve(url)[0]).netloc

    def _count(self, name: str) -> None:
        with self._lock:
            self.requests[name] += 1


@dataclass(frozen=True, slots=True)
class Pending:
    """A span that is being read, or lies in the cache."""

    fetcher: Fetcher
    span: Span
    future: Future[bytes] | None
    offset: int

    def result(self) -> bytes:
        """The bytes, waited for. Raises DataError, or Unreachable."""
        if self.future is None:
            return self.fetcher.read(self.span)
        return self.future.result()[self.offset : self.offset + self.span.stop - self.span.start]


class RangeFile:
    """A remote file to seek and read in, for header scans: jumps fetch little, reading on fetches ever more."""

    def __init__(self, fetcher: Fetcher, url: str) -> None:
        self._fetcher, self._url = fetcher, url
        self._position, self._chunk = 0, MAX_GAP
        first = fetcher.read_range(url, 0, self._chunk)
        self.size, self.etag = first.total, first.etag
        # The last pieces: a scan looks back at the sample whose end it has just found.
        self._pieces = deque([(0, first.data)], maxlen=3)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place, as in any file."""
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def tell(self) -> int:
        """The place that is read next."""
        return self._position

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes. Raises DataError where the file is another one than at the first read."""
        stop = self.size if size < 0 else min(self._position + size, self.size)
        if self._position >= stop:
            return b""
        held = next((p for p in self._pieces if p[0] <= self._position and stop <= p[0] + len(p[1])), None)
        start, data = held or self._fetch(stop)
        found = data[self._position - start : stop - start]
        self._position += len(found)
        return found

    def _fetch(self, stop: int) -> tuple[int, bytes]:
        """A piece from here to `stop` or beyond."""
        # Small members lie within what comes along; past a large one only the next header is worth fetching.
        end = max(start + len(data) for start, data in self._pieces)
        near = -MAX_GAP <= self._position - end < 16 * MAX_GAP
        self._chunk = min(2 * self._chunk, MAX_BLOCK // 2) if near else MAX_GAP
        found = self._fetcher.read_range(self._url, self._position, max(stop, self._position + self._chunk))
        if (found.total, found.etag) != (self.size, self.etag):
            refuse(self._url, "was replaced while it was read", todo="run it again")
        self._pieces.append((self._position, found.data))
        return self._pieces[-1]


def _missing(url: str) -> tuple[int, ...]:
    """Statuses that say a file is not there: S3 says 403 to those who may not list the bucket."""
    return (403, 404, 410) if url.startswith("s3:") or ".amazonaws.com/" in url else (404, 410)


def _name(span: Span) -> str:
    return entry_name(span.url, span.version, span.start, span.stop)


def _close(stop: threading.Event, pool: ThreadPoolExecutor, transport: Transport) -> None:
    stop.set()
    pool.shutdown(wait=False, cancel_futures=True)
    transport.close()
