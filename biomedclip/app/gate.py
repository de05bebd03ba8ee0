"""What stands between the network and the page: requests that it does not need are refused, answers say what they may.

An ASGI application around Gradio's. Gradio brings more than a local page wants: it fetches addresses that a request
names, redirects to other hosts, documents and records its calls. Here only the paths pass that the page was seen to
use, files only out of the private folder, posts only from the page itself, and every answer carries a
Content-Security-Policy under which a browser asks no other host for anything. A loopback page also refuses foreign
Host names, because a hostile site can point its own name at 127.0.0.1 (DNS rebinding).
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Message, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
MAX_CALL_BYTES = 1_000_000
"""Of the JSON of one call; files are uploaded on their own."""

_PAGE = re.compile(r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static|svelte)/[^\0]*")
_CALLS = re.compile(
    r"/gradio_api/(upload|upload_progress|queue/join|queue/data|heartbeat/\w+|startup-events|cancel|reset)/?"
)
_FILE = "/gradio_api/file="
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-src 'self'; frame-ancestors 'none'"
)
"""Gradio's own scripts stand inline and make functions of templates; what others wrote is escaped before it comes
here. The policy is inherited by the frames of reports, which are sandboxed besides."""
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Gate:
    """The application with its guards; `hosts` are the names under which it may be asked, None for any."""

    def __init__(self, app: Asgi, folder: Path, hosts: frozenset[str] | None) -> None:
        self.app, self.folder, self.hosts = app, folder.resolve(), hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with the reason why not."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return
        status, wrong = self._refuse(scope)
        if not wrong and scope["path"].startswith("/gradio_api/queue/join"):
            body = await _read_body(receive)
            status, wrong = refuse_call(body)
            receive = _replay(body or b"", receive)
        if wrong:
            return await _answer(send, status, wrong)
        await self.app(scope, receive, _with_headers(send))

    def _refuse(self, scope: Message) -> tuple[int, str]:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self.hosts is not None and _host_name(f"//{host}") not in self.hosts:
            return 403, "this page is asked under the address that the command printed"
        if scope["method"] not in ("GET", "HEAD") and headers.get("origin", f"http://{host}") not in (
            f"http://{host}", f"https://{host}"
        ):  # fmt: skip
            return 403, "calls come from the page itself"
        path = str(scope["path"])
        if path.startswith(_FILE):
            return (0, "") if self._is_ours(path.removeprefix(_FILE)) else (403, "only files of this page are served")
        return (0, "") if _PAGE.fullmatch(path) or _CALLS.fullmatch(path) else (404, "there is nothing here")

    def _is_ours(self, name: str) -> bool:
        try:
            path = Path(name).resolve()
        except (OSError, ValueError, RuntimeError):
            return False
        return path.is_relative_to(self.folder) and path.is_file()


def refuse_call(body: bytes | None) -> tuple[int, str]:
    """(status, reason) where a call must not be passed on, (0, "") where it may; None stands for one too large.

    Gradio downloads the file of an argument whose path is an address, which would let any web page make this machine
    ask other hosts.
    """
    if body is None:
        return 413, f"a call has at most {MAX_CALL_BYTES:,} bytes"
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return 400, "a call is JSON"
    named = any(isinstance(path, str) and "://" in path for path in _paths_in(call))
    return (400, "files are uploaded, not named by address") if named else (0, "")


def _paths_in(tree: Any) -> Iterator[Any]:
    left = [tree]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            if "path" in node:
                yield node["path"]
            left.extend(node.values())
        elif isinstance(node, list):
            left.extend(node)


def _host_name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


async def _read_body(receive: Receive) -> bytes | None:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = bool(message.get("more_body"))
        if size > MAX_CALL_BYTES:
            return None
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again


def _with_headers(send: Send) -> Send:
    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            ours = {name for name, _ in _HEADERS}
            kept = [pair for pair in message.get("headers", ()) if pair[0].lower() not in ours]
            message["headers"] = [*kept, *_HEADERS]
        await send(message)

    return send_on


async def _answer(send: Send, status: int, text: str) -> None:
    body = f"{text}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode()), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
