"""One HTTP answer, read at a minimum pace and judged: the body, or what is wrong with it and whether to ask again.

Reads from the socket of a kept-alive connection through `PacedResponse`, which counts bytes where they leave the
socket, so that one rule (a minimum rate after a grace period) holds for header and body. Everything that can be wrong
becomes one of two errors: `TroubleError`, which another attempt may overcome, or `BadFile`, which it will not.
"""

from __future__ import annotations

import http.client
import io
import re
import socket
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_plus

from lxml import etree

from data_builders.pmc.catalog import BadFile
from data_builders.pmc.throttle import retry_after_s

MAX_ERROR_BYTES = 64 * 2**10

_THROTTLED = frozenset((429, 503))
_XML_PARSER = etree.XMLParser(resolve_entities=False, load_dtd=False, no_network=True, huge_tree=False)


@dataclass(frozen=True, slots=True)
class ListedKey:
    """One entry of a listing: an object, or a common prefix that ends in the delimiter."""

    key: str
    is_prefix: bool = False
    size: int = 0
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, body and headers as they came."""

    status: int
    body: bytes
    headers: http.client.HTTPMessage


class TroubleError(Exception):
    """A failure that another attempt may overcome."""

    def __init__(self, cause: str, detail: str, *, pause_s: float | None = None) -> None:
        super().__init__(cause, detail)
        self.cause, self.detail, self.pause_s = cause, detail, pause_s


class StaleConnectionError(Exception):
    """The connection ended before a byte of an answer came."""


class SlowError(TimeoutError):
    """The answer came below the minimum rate."""


@dataclass(slots=True)
class Pace:
    """Bytes of one answer, counted as they leave the socket."""

    started: float
    grace_s: float
    min_bytes_per_s: float
    received: int = 0

    def count(self, size: int) -> None:
        """Add bytes. Raises SlowError where they are too few by now."""
        self.received += size
        late = time.monotonic() - self.started - self.grace_s
        if late > 0 and self.received < late * self.min_bytes_per_s:
            raise SlowError(f"{self.received} bytes in {late + self.grace_s:.1f} s")


class _PacedReader(io.RawIOBase):
    def __init__(self, raw: io.RawIOBase, pace: Pace) -> None:
        self._raw, self._pace = raw, pace

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        size = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self._pace.count(size or 0)
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


class PacedResponse(http.client.HTTPResponse):
    """A response whose every byte is counted by a Pace."""

    def __init__(self, sock: socket.socket, *args: Any, pace: Pace, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_PacedReader(self.fp.detach(), pace), 2**16)


def read_body(response: http.client.HTTPResponse, limit: int, name: str) -> bytes:
    """The body, at most `limit` bytes. Raises IncompleteRead where it ends early, BadFile where it is too large."""
    if response.length is not None and response.length <= limit:
        return response.read()
    body = response.read(limit + 1) if response.length is None else b""
    if response.status not in (200, 206):
        return body[:limit]
    if len(body) > limit or response.length is not None:
        raise BadFile("file_too_large", f"{name} has {response.length or 'more than ' + str(limit)} bytes")
    return body


def judge_status(answer: Answer, name: str) -> Exception:
    """The error for an answer that is neither 200 nor 206."""
    match = re.search(rb"<Code>([A-Za-z0-9]{1,60})</Code>", answer.body)
    code = match[1].decode() if match else ""
    detail = f"{name}: status {answer.status} {code}".rstrip()
    if answer.status in _THROTTLED:
        pause = retry_after_s(answer.headers.get("Retry-After"), time.time())
        return TroubleError("throttled", detail, pause_s=pause)
    if answer.status >= 500 or answer.status == 408 or code == "RequestTimeout":
        return TroubleError("server_error", detail)
    if answer.status in (404, 410):
        return BadFile("missing_file", name)
    return BadFile("fetch_forbidden" if answer.status in (401, 403) else "fetch_refused", detail)


def cut_range(answer: Answer, byte_range: tuple[int, int] | None, key: str) -> bytes:
    """The asked part of an object. Servers may ignore a Range and send everything, or answer another one."""
    if byte_range is None:
        if answer.status == 206:
            raise BadFile("fetch_refused", f"{key}: a part came where the whole was asked for")
        return answer.body
    start, stop = byte_range
    if answer.status == 200:
        return answer.body[start:stop]
    if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        raise BadFile("fetch_refused", f"{key}: another range came than was asked for")
    return answer.body


@dataclass(frozen=True, slots=True)
class ListingPage:
    """The entries of one page and the token of the next, None on the last."""

    entries: list[ListedKey]
    token: str | None


def parse_listing(answer: Answer) -> ListingPage:
    """One page of `list-type=2`. Raises TroubleError where it is no listing: a page can be cut like any other file."""
    try:
        root = etree.fromstring(answer.body, _XML_PARSER)
    except etree.XMLSyntaxError as error:
        raise TroubleError("protocol", f"listing: {error}"[:200]) from None
    if etree.QName(root).localname != "ListBucketResult":
        raise TroubleError("protocol", f"listing: <{etree.QName(root).localname}> came")
    spell = unquote_plus if root.findtext("{*}EncodingType") == "url" else str
    entries = []
    for node in root.iterfind("{*}Contents"):
        size = node.findtext("{*}Size") or ""
        etag = (node.findtext("{*}ETag") or "").strip('"') or None
        entries.append(
            ListedKey(spell(node.findtext("{*}Key") or ""), False, int(size) if size.isdecimal() else 0, etag)
        )
    for node in root.iterfind("{*}CommonPrefixes"):
        entries.append(ListedKey(spell(node.findtext("{*}Prefix") or ""), True))
    entries.sort(key=lambda entry: entry.key)
    token = None
    if root.findtext("{*}IsTruncated") == "true":
        token = root.findtext("{*}NextContinuationToken")
        if not token:
            raise TroubleError("protocol", "listing: cut without a token to go on")
    return ListingPage(entries, token)
