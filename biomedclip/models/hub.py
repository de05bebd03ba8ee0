"""A file of a released model as a path on this disk: from this package, the Hub's cache, the Hub, a web site, the user.

Reads the facts of a model and its files; yields paths and, for what is pinned, the proof that they hold the published
bytes. Downloads go through `huggingface_hub` (its cache, its token, `HF_ENDPOINT`) or, for plain addresses, into a
cache of the same kind that goes on where an interrupted download stopped. What the Hub, the network and a gate answer
becomes one line that says what to do. A file's sha256 is computed once and remembered beside its size and time.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from biomedclip.errors import CheckpointError
from biomedclip.files import explain_full_disk, sha256_file, write_atomic, write_json
from biomedclip.models.catalog import bundled_folder
from biomedclip.models.zoo import File, ReleasedModel


class NotCached(CheckpointError):
    """A file that is not on this disk, where nothing may or can be downloaded."""


def cache_folder() -> Path:
    """Folder of downloads from plain addresses and of remembered hashes; `BIOMEDCLIP_CACHE` moves it."""
    return Path(os.environ.get("BIOMEDCLIP_CACHE") or Path.home() / ".cache" / "biomedclip")


def fetch(
    model: ReleasedModel, file: File, *, revision: str | None = None, local_files_only: bool = False
) -> Path | None:
    """The path of one file, downloaded where needed; None where an optional one does not exist.

    `revision` is another one than the facts name; hashes then do not apply. Raises CheckpointError where the file
    cannot be had, or is not the published one.
    """
    if model.source.kind == "bundled" and not file.repo:
        return _find_bundled(model, file, revision)
    if model.source.kind == "manual" and not file.repo:
        todo = f"download it from {model.source.page} and give load('{model.name}', checkpoint=PATH)"
        if model.source.terms:
            todo += f" ({model.source.terms})"
        raise CheckpointError(model.name, f"{file.paths[0]} is not on a site a program can download from", todo=todo)
    path: Path | None
    if file.url:
        path = fetch_url(file.url, file.paths[0], model.name, local_files_only=local_files_only, expected=file.size)
    else:
        path = _fetch_hub(model, file, revision, local_files_only)
    if path is None:
        return None
    if revision is None or file.repo:
        check_file(path, file, model.name)
    return path


def check_file(path: Path, file: File, where: str, *, again: str = "delete it and download it again") -> None:
    """Raise CheckpointError where a file is not the pinned one, by size first and then by sha256 or md5."""
    size = path.stat().st_size
    pinned_name = path.name == Path(file.paths[0]).name or len(file.paths) == 1
    if file.size is not None and pinned_name and size != file.size:
        raise CheckpointError(
            path, f"is not the published file of {where}: {file.size:,} bytes are expected", found=f"{size:,} bytes",
            todo=again if size < file.size else "check its revision",
        )  # fmt: skip
    if not pinned_name:
        return
    for algorithm, wanted in (("sha256", file.sha256), ("md5", file.md5)):
        found = file_hash(path, algorithm) if wanted else None
        if found != wanted:
            raise CheckpointError(
                path, f"is not the published file of {where}: {algorithm} {wanted} is expected", found=found,
                todo=f"{again}; if it is meant, name it: checkpoint=PATH",
            )  # fmt: skip


def file_hash(path: str | Path, algorithm: str = "sha256") -> str:
    """Hex hash of a file, remembered as long as its size and time of change stay."""
    real = Path(path).resolve()
    stat = real.stat()
    name = hashlib.sha256(f"{algorithm}:{real}".encode()).hexdigest()[:32]
    note = cache_folder() / "hashes" / f"{name}.json"
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_bytes())
        if known["state"] == state:
            return str(known["hash"])
    if algorithm == "sha256":
        found = sha256_file(real)
    else:
        with real.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    with contextlib.suppress(OSError):  # A cache that cannot be written costs time, not correctness.
        write_json(note, {"path": str(real), "state": state, "hash": found})
    return found


def fetch_hub_file(
    repo: str, path: str, *, revision: str | None, local_files_only: bool, repo_type: str | None = None, where: str = ""
) -> Path | None:
    """One file of a Hub repository; None where the repository has no such file. Raises CheckpointError otherwise."""
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download

    where = where or repo
    try:
        return Path(
            hf_hub_download(repo, path, revision=revision, repo_type=repo_type, local_files_only=local_files_only)
        )
    except hub.RemoteEntryNotFoundError:
        return None
    except hub.GatedRepoError as error:
        raise CheckpointError(
            where, f"{repo} is gated: its owner must let you in", found=_status(error),
            todo=f"accept the terms at https://huggingface.co/{repo}, then run: hf auth login (or set HF_TOKEN)",
        ) from None  # fmt: skip
    except hub.RevisionNotFoundError as error:
        raise CheckpointError(where, f"{repo} has no revision '{revision}'", found=_status(error),
                              todo="name a commit or branch of it") from None  # fmt: skip
    except hub.RepositoryNotFoundError as error:
        raise CheckpointError(
            where, f"the Hub has no repository '{repo}', or shows it only to those it lets in", found=_status(error),
            todo="check the name; where it is private run: hf auth login",
        ) from None  # fmt: skip
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        asked = local_files_only or _is_offline()
        reason = "is not in the local cache, and nothing may be downloaded" if asked else (
            "is not in the local cache, and the Hub does not answer")  # fmt: skip
        raise NotCached(
            where, f"{repo}/{path} {reason}", found=" ".join(str(error.__cause__ or error).split())[:120],
            todo=f"run with access to the Hub: biomedclip models pull {where}",
        ) from None  # fmt: skip
    except hub.HFValidationError as error:
        raise CheckpointError(where, "is no name of a Hub repository", found=repo, todo=str(error)[:160]) from None
    except (hub.HTTPError, hub.FileMetadataError, OSError) as error:
        raise CheckpointError(
            where, f"{repo}/{path} could not be downloaded whole", found=" ".join(str(error).split())[:160],
            todo="run the same command again; it goes on where it stopped",
        ) from error  # fmt: skip


def fetch_url(url: str, name: str, where: str, *, local_files_only: bool = False, expected: int | None = None) -> Path:
    """The file at a plain address, in the cache; an interrupted download goes on. Raises CheckpointError."""

    folder = cache_folder() / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16]
    target, part = folder / name, folder / f"{name}.part"
    if target.exists():
        return target
    if local_files_only or _is_offline():
        raise NotCached(where, f"{name} is not in the local cache, and nothing may be downloaded", found=url,
                              todo=f"run with access to the network: biomedclip models pull {where}")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310
    try:
        with explain_full_disk(folder), urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310  (the zoo's)
            goes_on = answer.status == 206
            total = _total_size(answer.headers, have if goes_on else 0)
            with part.open("ab" if goes_on else "wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        if (
            have
            and isinstance(error, urllib.error.HTTPError)
            and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
        ):
            # Killed after the last byte and before the rename, or another file by now: nothing follows what is here.
            part.unlink()
            return fetch_url(url, name, where, expected=expected)
        raise CheckpointError(where, f"{name} could not be downloaded", found=f"{url}: {error}",
                              todo="run the same command again; it goes on where it stopped") from None  # fmt: skip
    size = part.stat().st_size
    wanted = expected if expected is not None else total
    if wanted is not None and size != wanted:
        if size > wanted:
            part.unlink()
        raise CheckpointError(where, f"{name} came with {size:,} of {wanted:,} bytes", found=url,
                              todo="run the same command again; it goes on where it stopped")  # fmt: skip
    part.replace(target)
    return target


def copy_file(source: Path, target: Path) -> Path:
    """A copy of a cached file under `target`, whole or not at all."""
    with source.open("rb") as file, write_atomic(target) as out:
        while chunk := file.read(1 << 22):
            out.write(chunk)
    return target


def _is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids requests; it holds for plain addresses as well."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _total_size(headers: Any, have: int) -> int | None:
    length = headers.get("content-length")
    return None if length is None else have + int(length)


def _find_bundled(model: ReleasedModel, file: File, revision: str | None) -> Path | None:
    again = "install biomedclip again"
    if revision is not None:
        raise CheckpointError(model.name, "comes with the package and has no revisions", found=revision,
                              todo="leave revision out")  # fmt: skip
    path = bundled_folder(model.source.folder or "") / file.paths[0]
    if not path.is_file():
        if file.optional:
            return None
        raise CheckpointError(model.name, f"this installation lacks {file.paths[0]}", found=path.parent, todo=again)
    check_file(path, file, model.name, again=again)
    return path


def _fetch_hub(model: ReleasedModel, file: File, revision: str | None, local_files_only: bool) -> Path | None:
    repo = file.repo or model.source.repo or ""
    wanted = file.revision if file.repo else revision or model.source.revision
    kind = "dataset" if model.source.kind == "hub-dataset" and not file.repo else None
    missing: NotCached | None = None
    for path in file.paths:
        try:
            found = fetch_hub_file(
                repo, path, revision=wanted, local_files_only=local_files_only, repo_type=kind, where=model.name
            )
        except NotCached as error:
            # Offline, the first of several names may be the one that does not exist.
            missing = error
            continue
        if found is not None:
            return found
    if file.optional:
        return None
    if missing is not None:
        raise missing
    raise CheckpointError(
        model.name, f"{repo} has no file {' or '.join(file.paths)} at {wanted or 'main'}",
        todo="look at its page for the file's name and give load(..., checkpoint=PATH)",
    )  # fmt: skip


def _status(error: Exception) -> str:
    found = re.search(r"\b(4\d\d|5\d\d)\b", str(error))
    return f"HTTP {found.group(1)}" if found else type(error).__name__
