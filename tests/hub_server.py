"""A small Hub on the loopback: the resolve protocol as huggingface_hub, open_clip and transformers speak it.

Answers HEAD and GET of `/{repo}/resolve/{revision}/{path}` and `/datasets/{repo}/resolve/…` with ETag, X-Repo-Commit
and ranges (LFS files by a redirect, as the Hub does), model info and trees, and the errors a user meets: a gate (401
and 403), a missing repository, revision and file (404). `broken` cuts a file short: its connection ends too early.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """One repository: files by path, from memory or disk."""

    files: dict[str, bytes | Path]
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    gated: bool = False
    token: str | None = None
    """With a gate: the token that may read; another one gets 403."""
    broken: set[str] = field(default_factory=set)
    """Files whose connection ends after half of the bytes."""
    lfs: set[str] = field(default_factory=set)
    """Files answered by a redirect."""


@dataclass
class Hub:
    """The running server: its address, its repositories (`datasets/…` for data sets), the requests it saw."""

    url: str
    repos: dict[str, Repo]
    pages: dict[str, bytes] = field(default_factory=dict)
    """Plain files by path, with ranges."""
    requests: list[str] = field(default_factory=list)


@contextmanager
def serve(repos: dict[str, Repo]) -> Iterator[Hub]:
    """A Hub that runs while the block does."""
    hub = Hub("", repos)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append(f"{self.command} /{path}")
        if path.startswith("lfs/"):
            repo, _, name = path.removeprefix("lfs/").partition("//")
            return self._send_file(self.hub.repos[repo], name, body)
        if path in self.hub.pages:
            return self._send(self.hub.pages[path], body, {})
        if path.startswith("api/"):
            return self._answer_api(path, body)
        repo_name, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        repo = self.hub.repos.get(repo_name)
        if repo is None:
            return self._refuse(404, "RepoNotFound", body)
        if repo.gated:
            given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if not given:
                return self._refuse(401, "GatedRepo", body)
            if given != repo.token:
                return self._refuse(403, "GatedRepo", body)
        if revision not in ("main", repo.commit):
            return self._refuse(404, "RevisionNotFound", body)
        if name not in repo.files:
            return self._refuse(404, "EntryNotFound", body, {"X-Repo-Commit": repo.commit})
        if name in repo.lfs:
            content = repo.files[name]
            headers = {
                "X-Repo-Commit": repo.commit, "X-Linked-Size": str(_size(content)), "X-Linked-ETag": _etag(content),
                "Location": f"{self.hub.url}/lfs/{repo_name}//{name}", "Content-Length": "0",
            }  # fmt: skip
            return self._headers(302, headers)
        self._send_file(repo, name, body)

    def _answer_api(self, path: str, body: bool) -> None:
        parts = path.split("/")
        repo = self.hub.repos.get("/".join(parts[2:4])) if parts[1] == "models" and len(parts) >= 4 else None
        if repo is None:
            return self._refuse(404, "RepoNotFound", body)
        if len(parts) == 4 or parts[4] == "revision":
            told = {"id": "/".join(parts[2:4]), "sha": repo.commit, "siblings": [{"rfilename": f} for f in repo.files]}
            return self._send(json.dumps(told).encode(), body, {"Content-Type": "application/json"})
        if parts[4] == "tree" and len(parts) == 6:
            told = [{"type": "file", "path": name, "size": 0, "oid": "0"} for name in repo.files]
            return self._send(json.dumps(told).encode(), body, {"Content-Type": "application/json"})
        self._refuse(404, "EntryNotFound", body)

    def _send_file(self, repo: Repo, name: str, body: bool) -> None:
        content = repo.files[name]
        headers = {"X-Repo-Commit": repo.commit, "ETag": _etag(content), "X-Linked-Size": str(_size(content))}
        self._send(content, body, headers, broken=name in repo.broken)

    def _send(self, content: bytes | Path, body: bool, headers: dict[str, str], *, broken: bool = False) -> None:
        asked = self.headers.get("Range") or ""
        first, end, status = 0, _size(content), 200
        if asked.startswith("bytes="):
            start, _, last = asked.removeprefix("bytes=").partition("-")
            first, end, status = int(start), min(int(last) + 1, end) if last else end, 206
            if first >= end:
                self._headers(416, {"Content-Range": f"bytes */{end}", "Content-Length": "0"})
                return
            headers = {**headers, "Content-Range": f"bytes {first}-{end - 1}/{_size(content)}"}
        self._headers(status, {**headers, "Accept-Ranges": "bytes", "Content-Length": str(end - first)})
        if body and broken:
            end = first + (end - first) // 2
            self.close_connection = True
        if body:
            for position in range(first, end, 1 << 22):
                self.wfile.write(_slice(content, position, min(position + (1 << 22), end)))

    def _refuse(self, status: int, code: str, body: bool, headers: dict[str, str] | None = None) -> None:
        text = json.dumps({"error": code}).encode()
        self._headers(status, {"X-Error-Code": code, "Content-Length": str(len(text)), **(headers or {})})
        if body:
            self.wfile.write(text)

    def _headers(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _slice(content: bytes | Path, first: int, end: int) -> bytes:
    if isinstance(content, bytes):
        return content[first:end]
    with content.open("rb") as file:
        file.seek(first)
        return file.read(end - first)


def _etag(content: bytes | Path) -> str:
    # The hash of half a gigabyte takes longer than the test; size and both ends tell these files apart.
    size, edge = _size(content), 1 << 16
    known = _slice(content, 0, edge) + _slice(content, max(size - edge, 0), size) + str(size).encode()
    return f'"{hashlib.sha256(known).hexdigest()}"'
