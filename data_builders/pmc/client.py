"""Keys of the PMC Cloud Service bucket in, their bytes out: an anonymous, polite HTTPS client for one host.

Reads objects (md5-checked, in whole or a range) and listings over kept-alive connections of the standard library; a
pool of threads reads many at once. Every fault is either overcome by a bounded number of attempts, each counted under
its cause, or ends as a `BadFile` whose reason goes into the ledger; only a host that no longer answers at all raises,
because turning an outage into a million ledger rows would help nobody. Redirects are never followed, so no other host
than the configured one is ever asked. Slow servers are met by one rule for header and body alike: after a grace
period a minimum rate, counted at the socket, where a trickle cannot hide behind a timeout that each byte resets.
"""

from __future__ import annotations

import hashlib
import http.client
import random
import socket
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from pydantic import Field, field_validator

import biomedclip
from biomedclip.config import Config
from biomedclip.errors import DataError
from data_builders.pmc.answers import (
    MAX_ERROR_BYTES,
    Answer,
    ListedKey,
    Pace,
    PacedResponse,
    SlowError,
    StaleConnectionError,
    TroubleError,
    cut_range,
    judge_status,
    parse_listing,
    read_body,
)
from data_builders.pmc.catalog import MAX_FILE_BYTES, BadFile, SourceFile, is_safe_key
from data_builders.pmc.throttle import Throttle, backoff_s

ENDPOINT = "https://pmc-oa-opendata.s3.amazonaws.com"

RETRYABLE_REASONS = frozenset(
    ("fetch_connect", "fetch_timeout", "fetch_slow", "fetch_dropped", "fetch_truncated", "fetch_throttled",
     "fetch_server_error", "fetch_protocol", "md5_mismatch")
)  # fmt: skip
"""Reasons that another run may not meet again; what `--retry-failed` asks for anew."""

_MAX_LISTING_BYTES = 16 * 2**20
_KEY_SAFE = "/!-_.*'()~"

Item = TypeVar("Item")
Result = TypeVar("Result")


class ClientConfig(Config):
    """How the bucket is asked. The defaults suit one builder on a good line; all of them hold for each process."""

    endpoint: str = ENDPOINT
    """Scheme, host and, for path-style servers, the bucket: `http://localhost:9000/pmc-oa-opendata`."""
    contact: str | None = Field(default=None, pattern=r"^[\x21-\x7e]{3,200}$")
    """A mail address or page that goes into the user agent, so that the service can reach whoever runs this."""
    max_concurrency: int = Field(default=64, ge=1, le=512)
    start_concurrency: int = Field(default=8, ge=1)
    connect_timeout_s: float = Field(default=10.0, gt=0)
    read_timeout_s: float = Field(default=30.0, gt=0)
    """Longest silence within an answer."""
    min_bytes_per_s: float = Field(default=1024.0, ge=0)
    grace_s: float = Field(default=20.0, gt=0)
    """An answer may be slower than `min_bytes_per_s` for this long."""
    max_attempts: int = Field(default=6, ge=1, le=100)
    first_backoff_s: float = Field(default=0.5, ge=0)
    max_backoff_s: float = Field(default=60.0, ge=0)
    max_retry_after_s: float = Field(default=300.0, ge=0)
    """A longer Retry-After is cut to this; the request's attempts bound the rest."""
    give_up_after: int = Field(default=20, ge=1)
    """Files in a row that could not be fetched for reasons of the host, after which it counts as gone."""

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ValueError("must be http(s)://host[:port][/bucket]")
        return value.rstrip("/")


class Client:
    """A pool of connections and threads for one bucket; close it, or use it in a `with` block.

    All methods may be called from any thread. `throttle` is the host's budget: clients of one process that talk to
    the same host should share it.
    """

    def __init__(
        self, config: ClientConfig | None = None, *, throttle: Throttle | None = None, seed: int | None = None
    ):
        self.config = config or ClientConfig()
        parts = urlsplit(self.config.endpoint)
        self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.throttle = throttle or Throttle(
            start=self.config.start_concurrency, most=self.config.max_concurrency
        )  # fmt: skip
        self._dice = random.Random(seed)  # noqa: S311  (jitter)
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._threads: ThreadPoolExecutor | None = None
        self._closed = False
        self._counts: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._failed_in_a_row = 0
        contact = f"; {self.config.contact}" if self.config.contact else ""
        self._headers = {"User-Agent": f"biomedclip/{biomedclip.__version__} (PMC builder{contact})"}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop waiting threads, let running requests end, close all connections."""
        self.throttle.close()
        with self._lock:
            self._closed = True
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def read(
        self,
        key: str,
        *,
        md5: str | None = None,
        byte_range: tuple[int, int] | None = None,
        max_bytes: int = MAX_FILE_BYTES,
    ) -> bytes:
        """The bytes of an object, or of its half-open `byte_range`; `md5` (hex) is that of what is returned.

        Raises BadFile: `unsafe_key`, `missing_file`, `file_too_large`, `fetch_forbidden`, `fetch_refused`, or one of
        RETRYABLE_REASONS where the attempts are used up; DataError where the host does not answer any more.
        """
        if not is_safe_key(key):
            raise BadFile("unsafe_key", repr(key)[:200])
        headers = {}
        if byte_range is not None:
            start, stop = byte_range
            if not 0 <= start < stop:
                raise ValueError(f"byte_range {byte_range} is empty or negative")
            headers["Range"] = f"bytes={start}-{stop - 1}"
        target = f"{self._path}/{quote(key, safe=_KEY_SAFE)}"

        def check(answer: Answer) -> bytes:
            data = cut_range(answer, byte_range, key)
            if md5 is not None and (found := hashlib.md5(data, usedforsecurity=False).hexdigest()) != md5:
                raise TroubleError("md5_mismatch", f"{key} has {found}, promised was {md5}")
            return data

        return self._fetch(key, target, headers, max_bytes, check)

    def read_many(self, files: Iterable[SourceFile]) -> Iterator[bytes | BadFile]:
        """The bytes of each file in order, or the BadFile that reading it raised; many are read at once."""

        def read(file: SourceFile) -> bytes | BadFile:
            try:
                return self.read(file.key, md5=file.md5)
            except BadFile as error:
                return error

        return self.map(read, files)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`function` of each item in order, run by the client's threads with a bounded look-ahead.

        `function` must not call `map` itself: its threads would wait for each other.
        """
        pending: deque[Future[Result]] = deque()
        pool = self._pool()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= 2 * self.config.max_concurrency:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def list_keys(self, prefix: str = "", *, delimiter: str = "", start_after: str = "") -> Iterator[ListedKey]:
        """Objects and common prefixes below `prefix`, in the bucket's lexical order, over all pages.

        Raises DataError where a listing cannot be fetched or read: what it would have named cannot be counted.
        """
        query = {"list-type": "2", "encoding-type": "url", "prefix": prefix}
        query |= {"delimiter": delimiter} if delimiter else {}
        query |= {"start-after": start_after} if start_after else {}
        where = f"{self.config.endpoint} listing of {prefix!r}"
        token: str | None = None
        while True:
            target = f"{self._path}/?" + urlencode(query | ({"continuation-token": token} if token else {}))
            try:
                page = self._fetch(prefix or "/", target, {}, _MAX_LISTING_BYTES, parse_listing)
            except BadFile as error:
                raise DataError(where, "cannot be fetched", found=error, todo="run it again") from None
            yield from page.entries
            if page.token is not None and page.token == token:
                raise DataError(where, "does not go on", found=f"token {token!r} twice", todo="run it again")
            token = page.token
            if token is None:
                return

    def metrics(self) -> dict[str, Any]:
        """Counters so far: requests, bytes, connections, retries by cause, failures by reason, concurrency."""
        with self._lock:
            return {
                **{name: self._counts[name] for name in ("requests", "bytes", "connections")},
                "retries": dict(self._retries),
                "failures": dict(self._failures),
                "concurrency": int(self.throttle.limit),
                "peak_concurrency": self.throttle.peak,
            }

    def _fetch(
        self, name: str, target: str, headers: dict[str, str], max_bytes: int, check: Callable[[Answer], Result]
    ) -> Result:
        """What `check` makes of the answer, asked for up to `max_attempts` times. Raises BadFile."""
        config, seen = self.config, set()
        for attempt in range(1, config.max_attempts + 1):
            self._refuse_if_gone()
            try:
                with self.throttle.slot() as started:
                    try:
                        result = check(self._ask(name, target, headers, max_bytes))
                    except TroubleError as trouble:
                        if trouble.cause == "throttled":
                            self.throttle.slow_down(started, min(trouble.pause_s or 0.0, config.max_retry_after_s))
                        raise
                self.throttle.speed_up()
                self._note_success()
                return result
            except BadFile as error:
                self._note_success()  # the host did answer
                with self._lock:
                    self._failures[error.reason] += 1
                raise
            except TroubleError as trouble:
                # The same wrong bytes twice are what the bucket holds: asking a third time would change nothing.
                hopeless = trouble.cause == "md5_mismatch" and trouble.detail in seen
                seen.add(trouble.detail)
                if attempt == config.max_attempts or hopeless:
                    raise self._give_up(trouble, name, attempt) from None
                with self._lock:
                    self._retries[trouble.cause] += 1
                    delay = backoff_s(attempt, config.first_backoff_s, config.max_backoff_s, self._dice)
                self.throttle.wait(delay)
        raise BadFile("fetch_protocol", name)  # not reached: max_attempts is at least one

    def _ask(self, name: str, target: str, headers: dict[str, str], max_bytes: int) -> Answer:
        """One answer of status 200 or 206. Raises TroubleError or BadFile."""
        connection, reused = self._take_connection()
        try:
            answer = self._exchange(connection, target, headers, max_bytes, name)
        except StaleConnectionError as error:
            # The server closed an idle connection: no fault of either side, so once more on a new one.
            if not reused:
                raise TroubleError("dropped", f"{name}: {error}") from None
            with self._lock:
                self._retries["stale_connection"] += 1
            try:
                answer = self._exchange(self._new_connection(), target, headers, max_bytes, name)
            except StaleConnectionError as again:
                raise TroubleError("dropped", f"{name}: {again}") from None
        if answer.status in (200, 206):
            return answer
        raise judge_status(answer, name)

    def _exchange(
        self, connection: http.client.HTTPConnection, target: str, headers: dict[str, str], max_bytes: int, name: str
    ) -> Answer:
        config, is_done = self.config, False
        pace = Pace(time.monotonic(), config.grace_s, config.min_bytes_per_s)
        connection.response_class = partial(PacedResponse, pace=pace)  # type: ignore[assignment]
        with self._lock:
            self._counts["requests"] += 1
        try:
            if connection.sock is None:
                self._connect(connection)
            pace.started = time.monotonic()
            try:
                connection.request("GET", target, headers=self._headers | headers)
                response = connection.getresponse()
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError) as error:
                raise StaleConnectionError(str(error) or type(error).__name__) from None
            with response:
                limit = max_bytes if response.status in (200, 206) else MAX_ERROR_BYTES
                body = read_body(response, limit, name)
                is_done = response.isclosed() and not response.will_close
            return Answer(response.status, body, response.headers)
        except SlowError as error:
            raise TroubleError("slow", f"{name}: {error}") from None
        except TimeoutError:
            raise TroubleError("timeout", f"{name}: silent for {config.read_timeout_s:g} s") from None
        except http.client.IncompleteRead as error:
            raise TroubleError("truncated", f"{name}: {len(error.partial)} bytes, then the end") from None
        except http.client.HTTPException as error:
            raise TroubleError("protocol", f"{name}: {type(error).__name__} {error}"[:200]) from None
        except OSError as error:
            raise TroubleError("dropped", f"{name}: {error}"[:200]) from None
        finally:
            with self._lock:
                self._counts["bytes"] += pace.received
            self._put_back(connection, is_done)

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._counts["connections"] += 1
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:
            raise DataError(self.config.endpoint, "its certificate cannot be verified", found=error.verify_message,
                            todo="check the endpoint and this machine's certificates") from None  # fmt: skip
        except OSError as error:
            raise TroubleError("connect", f"{self._host}: {error}"[:200]) from None
        if isinstance(connection.sock, socket.socket):
            connection.sock.settimeout(self.config.read_timeout_s)

    def _new_connection(self) -> http.client.HTTPConnection:
        timeout = self.config.connect_timeout_s
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        return http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=self._tls)

    def _take_connection(self) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            # Last in, first out: under low load the others grow old and are closed by the server, not by us.
            if self._idle:
                return self._idle.pop(), True
        return self._new_connection(), False

    def _put_back(self, connection: http.client.HTTPConnection, is_done: bool) -> None:
        with self._lock:
            if is_done and not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.config.max_concurrency, thread_name_prefix="pmc")
            return self._threads

    def _note_success(self) -> None:
        with self._lock:
            self._failed_in_a_row = 0

    def _give_up(self, trouble: TroubleError, name: str, attempts: int) -> BadFile:
        reason = trouble.cause if trouble.cause == "md5_mismatch" else f"fetch_{trouble.cause}"
        with self._lock:
            self._failures[reason] += 1
            self._failed_in_a_row = 0 if reason == "md5_mismatch" else self._failed_in_a_row + 1
        return BadFile(reason, f"{trouble.detail} ({attempts} attempts)")

    def _refuse_if_gone(self) -> None:
        with self._lock:
            failed, causes = self._failed_in_a_row, dict(self._failures)
        if failed >= self.config.give_up_after:
            raise DataError(self.config.endpoint, f"does not answer: {failed} files in a row failed",
                            found=causes, todo="check the network and run it again")  # fmt: skip
