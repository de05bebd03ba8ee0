"""One HTTP request for a range of bytes, with a deadline that nothing on the other side can stretch.

Takes a URL and a range, gives the answer's status, headers and body over kept-alive connections. The client is the
standard library's, as for the PMC bucket: the libraries that the `train` extra brings are either asynchronous, which
forked readers break, or change their name between releases of huggingface_hub; and a deadline must hold for every
single `recv`, because a server that sends a byte a second resets any ordinary timeout. Redirects are an answer here,
not something that is followed; proxies named by the environment are used.
"""

from __future__ import annotations

import http.client
import io
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from functools import cached_property, partial
from typing import Any
from urllib.parse import urlsplit

import biomedclip

MAX_ERROR_BYTES = 1 << 16
_SLOW_BYTES_PER_S = 16 << 10
"""An answer that comes slower, beyond one silence in all, is given up: another connection may be quicker."""
_CONNECT_S = 10.0


class Trouble(Exception):
    """A fault that another attempt may not meet; `cause` is a word for it, `pause_s` what the server asks to wait."""

    def __init__(self, cause: str, detail: str, pause_s: float | None = None) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause, self.pause_s = cause, pause_s


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said: the body is whole, or it would have been Trouble."""

    status: int
    headers: Message
    body: bytes


class Transport:
    """Kept-alive connections to any number of hosts, for the threads of one process."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._lock = threading.Lock()

    def ask(self, url: str, headers: Mapping[str, str], *, max_bytes: int, deadline: float) -> Answer:
        """The answer to a GET, read before `deadline` (of time.monotonic). Raises Trouble.

        A body of more than `max_bytes` is Trouble too, except that of an error, of which the beginning is enough.
        """
        parts = urlsplit(url)
        home = (parts.scheme, parts.netloc)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection, reused = self._take(home)
        try:
            return self._exchange(home, connection, target, headers, max_bytes, deadline)
        except _StaleError:
            # The server closed an idle connection: no fault of either side, so once more on a new one.
            if not reused:
                raise Trouble("dropped", "no answer came") from None
        try:
            return self._exchange(home, self._connect_to(home), target, headers, max_bytes, deadline)
        except _StaleError:
            raise Trouble("dropped", "no answer came") from None

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            for connections in self._idle.values():
                for connection in connections:
                    connection.close()
            self._idle.clear()

    def _exchange(
        self,
        home: tuple[str, str],
        connection: http.client.HTTPConnection,
        target: str,
        headers: Mapping[str, str],
        max_bytes: int,
        deadline: float,
    ) -> Answer:
        done = False
        connection.response_class = partial(_BoundedResponse, deadline=deadline, silence_s=self._silence_s)  # type: ignore[assignment]
        try:
            if connection.sock is None:
                connection.timeout = max(min(_CONNECT_S, deadline - time.monotonic()), 0.001)
                connection.connect()
            connection.sock.settimeout(self._silence_s)
            try:
                connection.request(
                    "GET", target, headers={"User-Agent": _AGENT, "Accept-Encoding": "identity", **headers}
                )
                response = connection.getresponse()
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError) as error:
                raise _StaleError from error
            with response:
                limit = max_bytes if response.status in (200, 206) else MAX_ERROR_BYTES
                body = _read_body(response, limit)
                done = response.isclosed() and not response.will_close
            return Answer(response.status, response.headers, body)
        except _TooSlowError:
            raise Trouble("slow", f"less than {_SLOW_BYTES_PER_S} bytes a second") from None
        except TimeoutError:
            late = time.monotonic() >= deadline
            raise Trouble("slow" if late else "timeout", "the deadline passed" if late else "silence") from None
        except http.client.IncompleteRead as error:
            raise Trouble("truncated", f"{len(error.partial)} bytes, then the end") from None
        except http.client.HTTPException as error:
            raise Trouble("protocol", f"{type(error).__name__} {error}"[:120]) from None
        except ssl.SSLCertVerificationError as error:
            raise Trouble("certificate", str(error.verify_message)) from None
        except OSError as error:
            raise Trouble("dropped" if connection.sock else "connect", str(error)[:120]) from None
        finally:
            self._put_back(home, connection, done)

    def _take(self, home: tuple[str, str]) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            idle = self._idle.get(home)
            if idle:
                return idle.pop(), True
        return self._connect_to(home), False

    def _put_back(self, home: tuple[str, str], connection: http.client.HTTPConnection, done: bool) -> None:
        if not done:
            connection.close()
            return
        with self._lock:
            self._idle.setdefault(home, []).append(connection)

    def _connect_to(self, home: tuple[str, str]) -> http.client.HTTPConnection:
        scheme, netloc = home
        host = urlsplit(f"{scheme}://{netloc}")
        name, port = host.hostname or "", host.port
        proxy = None if urllib.request.proxy_bypass(name) else urllib.request.getproxies().get(scheme)
        via = urlsplit(proxy if "//" in proxy else f"//{proxy}") if proxy else None
        where = (via.hostname or "", via.port) if via else (name, port)
        connection: http.client.HTTPConnection
        if scheme == "https":
            connection = http.client.HTTPSConnection(*where, context=self._tls)
        else:
            connection = http.client.HTTPConnection(*where)
        if via:
            connection.set_tunnel(name, port)
        return connection

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()


class _StaleError(Exception):
    """The connection was closed before the first byte of an answer."""


class _TooSlowError(TimeoutError):
    """Bytes come, and too few of them."""


_AGENT = f"biomedclip/{biomedclip.__version__} (training stream)"


def _read_body(response: http.client.HTTPResponse, limit: int) -> bytes:
    if response.length is not None and response.length <= limit:
        return response.read()
    if response.status in (200, 206):
        if response.length is not None:
            raise Trouble("too_large", f"{response.length} bytes where at most {limit} were asked for")
        body = response.read(limit + 1)
        if len(body) > limit:
            raise Trouble("too_large", f"more than {limit} bytes")
        return body
    return response.read(limit)


class _BoundedResponse(http.client.HTTPResponse):
    """A response of which every `recv` ends by the deadline, and sooner where too little has come."""

    def __init__(self, sock: Any, *args: Any, deadline: float, silence_s: float, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_BoundedReader(self.fp.detach(), sock, deadline, silence_s), 1 << 16)


class _BoundedReader(io.RawIOBase):
    def __init__(self, raw: Any, sock: Any, deadline: float, silence_s: float) -> None:
        self._raw, self._sock, self._deadline, self._silence_s = raw, sock, deadline, silence_s
        self._began, self._received = 0.0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        now = time.monotonic()
        left = self._deadline - now
        if left <= 0:
            raise TimeoutError
        # Patience grows with what has come and not with what was asked for: a trickle must not eat the whole deadline.
        patience = self._silence_s
        if self._received:
            patience = self._began + self._silence_s + self._received / _SLOW_BYTES_PER_S - now
        if patience <= 0:
            raise _TooSlowError
        self._sock.settimeout(min(left, patience, self._silence_s))
        try:
            count = int(self._raw.readinto(buffer))
        except TimeoutError:
            if patience < min(left, self._silence_s):
                raise _TooSlowError from None
            raise
        self._began = self._began or time.monotonic()
        self._received += count
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
