"""A small S3-like server for tests, on the loopback address only, with faults that can be asked for.

`MockBucket(objects)` serves a mapping or a folder: GET and HEAD of keys, Range, ETag, 404 as XML, `list-type=2` with
prefix, delimiter, start-after and continuation tokens. A `Fault` spoils the first `times` requests whose key matches;
`log` holds every request with the status it got, so that a test can count retries. The server is bounded: at most
`MAX_CONNECTIONS` at a time, sockets time out, and leaving the `with` block closes all of them.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

MAX_CONNECTIONS = 64
SOCKET_TIMEOUT_S = 10.0

KINDS = (
    "slow_down", "too_many", "server_error", "missing", "forbidden", "redirect", "truncated", "wrong_bytes",
    "dropped", "trickle", "trickle_headers", "stall", "no_answer", "ignore_range",
)  # fmt: skip


@dataclass
class Fault:
    """One kind of misbehaviour for keys that match a shell pattern, for the first `times` requests of them."""

    kind: str
    match: str = "*"
    times: int = 1_000_000
    retry_after: str | None = None
    """The Retry-After header of slow_down and too_many."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind} is no fault; use one of {KINDS}")


@dataclass(frozen=True)
class Request:
    """One request as the server saw it, and the status it answered (0 where it gave no answer)."""

    method: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    status: int
    port: int
    """The client's port: equal ports are one kept-alive connection."""


@dataclass
class MockBucket:
    """A bucket that runs while the `with` block does. `page_size` bounds the keys of one listing."""

    objects: Mapping[str, bytes] | Path
    faults: list[Fault] = field(default_factory=list)
    page_size: int = 1000
    log: list[Request] = field(default_factory=list)
    peak: int = 0
    """Most requests that were ever answered at the same time."""

    def __enter__(self) -> MockBucket:
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._active = 0
        bucket = self

        class Handler(_Handler):
            mock = bucket

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.mock = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        self._server.shutdown()
        with self._lock:
            for connection in self._sockets:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()  # joins the handler threads
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def requests(self, match: str = "*") -> list[Request]:
        """The requests for objects (not listings) whose key matches."""
        return [r for r in self.log if r.key and fnmatch.fnmatchcase(r.key, match)]

    def names(self) -> list[str]:
        if isinstance(self.objects, Path):
            root = self.objects
            return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        return sorted(self.objects)

    def body(self, key: str) -> bytes | None:
        if isinstance(self.objects, Path):
            path = self.objects / key
            return path.read_bytes() if key and ".." not in key and path.is_file() else None
        return self.objects.get(key)

    def take_fault(self, key: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and fnmatch.fnmatchcase(key, fault.match):
                    fault.times -= 1
                    return fault
        return None

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._active += 1
            self.peak = max(self.peak, self._active)
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close waits for them
    request_queue_size = MAX_CONNECTIONS
    mock: MockBucket

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.mock._lock:
            full = len(self.mock._sockets) >= MAX_CONNECTIONS
            if not full:
                self.mock._sockets.add(request)
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.mock._lock:
            self.mock._sockets.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = SOCKET_TIMEOUT_S
    disable_nagle_algorithm = True  # header and body are two writes; the second would wait 40 ms
    mock: MockBucket

    def log_message(self, format: str, *args: Any) -> None:
        """Requests go to the bucket's log, not to stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with self.mock.counted():
            parts = urlsplit(self.path)
            key = unquote(parts.path.lstrip("/"))
            query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
            if not key and query.get("list-type") == "2":
                fault = self.mock.take_fault(f"?prefix={query.get('prefix', '')}")
                body, status, headers = self._list(query), 200, {"Content-Type": "application/xml"}
            else:
                fault = self.mock.take_fault(key)
                body, status, headers = self._object(key, fault)
            self._answer(key, query, status, headers, body, fault)

    def _object(self, key: str, fault: Fault | None) -> tuple[bytes, int, dict[str, str]]:
        body = self.mock.body(key)
        if body is None:
            return _error("NoSuchKey", "The specified key does not exist."), 404, {}
        headers = {"ETag": f'"{hashlib.md5(body).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or (fault and fault.kind == "ignore_range"):
            return body, 200, headers
        first, last = wanted[1], wanted[2]
        start = int(first) if first else max(0, len(body) - int(last))
        stop = min(int(last) + 1 if first and last else len(body), len(body))
        if start >= len(body):
            return _error("InvalidRange", "The requested range is not satisfiable"), 416, {}
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        return body[start:stop], 206, headers

    def _list(self, query: dict[str, str]) -> bytes:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        limit = min(self.mock.page_size, int(query.get("max-keys", "1000")))
        entries: list[tuple[str, str]] = []
        for key in self.mock.names():
            if not key.startswith(prefix):
                continue
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            entry = ("prefix", key[: cut + len(delimiter)]) if cut >= 0 else ("key", key)
            if entry[1] > after and (not entries or entries[-1] != entry):
                entries.append(entry)
        page, more = entries[:limit], len(entries) > limit
        spell = quote if query.get("encoding-type") == "url" else escape
        xml = [
            '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        ]
        if query.get("encoding-type") == "url":
            xml.append("<EncodingType>url</EncodingType>")
        xml.append(f"<Prefix>{spell(prefix)}</Prefix><IsTruncated>{str(more).lower()}</IsTruncated>")
        for kind, name in page:
            if kind == "prefix":
                xml.append(f"<CommonPrefixes><Prefix>{spell(name)}</Prefix></CommonPrefixes>")
            else:
                body = self.mock.body(name) or b""
                etag = hashlib.md5(body).hexdigest()
                xml.append(f"<Contents><Key>{spell(name)}</Key><Size>{len(body)}</Size>")
                xml.append(f"<ETag>&quot;{etag}&quot;</ETag></Contents>")
        if more:
            xml.append(f"<NextContinuationToken>{escape(page[-1][1])}</NextContinuationToken>")
        xml.append("</ListBucketResult>")
        return "".join(xml).encode()

    def _answer(
        self, key: str, query: dict[str, str], status: int, headers: dict[str, str], body: bytes, fault: Fault | None
    ) -> None:
        kind = fault.kind if fault else ""
        codes = {"slow_down": (503, "SlowDown"), "too_many": (429, "TooManyRequests"), "missing": (404, "NoSuchKey"),
                 "server_error": (500, "InternalError"), "forbidden": (403, "AccessDenied"),
                 "redirect": (307, "TemporaryRedirect"), "no_answer": (0, "")}  # fmt: skip
        if kind in codes:
            status, code = codes[kind]
            headers, body = {}, _error(code, kind)
            if fault and fault.retry_after is not None:
                headers["Retry-After"] = fault.retry_after
            if kind == "redirect":
                headers["Location"] = "http://elsewhere.invalid/"
        with self.mock._lock:
            self.mock.log.append(
                Request(self.command, key, query, dict(self.headers.items()), status, self.client_address[1])
            )
        if kind == "no_answer":
            self.close_connection = True
            return
        if kind == "trickle_headers":
            self._trickle(b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 10_000)
            return
        if kind == "wrong_bytes":
            body = bytes(b ^ 0xFF for b in body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self._send_body(body, kind)

    def _send_body(self, body: bytes, kind: str) -> None:
        half = body[: len(body) // 2]
        if kind == "truncated":  # an orderly end of the stream, too early
            self.wfile.write(half)
            self.close_connection = True
        elif kind == "dropped":  # a reset
            self.wfile.write(half)
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            os.close(self.connection.detach())  # without the orderly shutdown that the server would do first
        elif kind == "trickle":
            self._trickle(body)
        elif kind == "stall":
            self.wfile.write(half)
            self.mock._stopping.wait(SOCKET_TIMEOUT_S)
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _trickle(self, data: bytes) -> None:
        self.close_connection = True
        deadline = time.monotonic() + SOCKET_TIMEOUT_S
        for position in range(len(data)):
            if self.mock._stopping.wait(0.01) or time.monotonic() > deadline:
                return
            self.wfile.write(data[position : position + 1])
            self.wfile.flush()


def _error(code: str, message: str) -> bytes:
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return text.encode()
