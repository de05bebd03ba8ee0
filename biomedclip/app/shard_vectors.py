"""The embeddings of a dataset's pictures, shard by shard, made once and kept in the user's cache.

Reads a `DatasetFolder` and an `Encoder`; yields one `ShardVectors` a shard: a file of float16 rows, one for each sample
of the shard in its order. Files are named after the shard's sha256 in a folder named after weights and preprocessing,
so a grown dataset only embeds its new shards, a copied or moved one none, and another model finds nothing of this one.
They lie in the cache and not beside the shards, because dataset folders may be read-only, are hashed and are shared.
float16 halves the disk: cosines move by less than 0.001. An interrupted run loses at most `PART_ROWS` pictures.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.annotation.embeddings import PartReader, make_part_manifest, read_shard_rows
from biomedclip.app.encoder import Encoder
from biomedclip.errors import ConfigError
from biomedclip.evaluation.embed import describe_preprocess, embed_images, fingerprint
from biomedclip.files import explain_full_disk, remove_leftovers, sha256_file, sha256_json, write_atomic, write_json
from biomedclip.models.hub import cache_folder
from biomedclip.progress import Advance, Progress, silent
from biomedclip.shards import DatasetFolder

_FORMAT = 1
_BATCH = 64
_TYPE = np.dtype("<f2")


@dataclass(frozen=True, slots=True)
class ShardVectors:
    """One shard's embeddings on disk."""

    path: Path
    samples: int
    dim: int
    sha256: str
    """Of the file; checked when an index is built of it."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Key -> why its picture cannot be read; its row is zero, as are those of samples that were withdrawn."""

    def read(self) -> NDArray[np.float16]:
        """(samples, D), all of them."""
        return np.fromfile(self.path, _TYPE).reshape(self.samples, self.dim)

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(rows), D), some of them, without reading the others."""
        size = self.dim * _TYPE.itemsize
        with self.path.open("rb") as file:
            data = b"".join(os.pread(file.fileno(), size, row * size) for row in rows.tolist())
        return np.frombuffer(data, _TYPE).reshape(len(rows), self.dim).astype(np.float32)


def cache_of(encoder: Encoder, root: Path | None = None) -> Path:
    """The folder of all that is cached for a model: of its weights and preprocessing, whatever it is called."""
    key = sha256_json([_FORMAT, fingerprint(encoder.model), describe_preprocess(encoder.preprocess)])
    return (root or cache_folder() / "search") / key[:24]


@contextmanager
def owning(folder: Path) -> Iterator[None]:
    """Hold a cache folder alone: a second process waits here instead of embedding the same pictures.

    Raises ConfigError where the folder cannot be written, DataError where the disk is full.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("ab")
    except OSError as error:
        raise ConfigError(folder, "cannot be written", found=error.strerror,
                          todo="name a folder for caches in BIOMEDCLIP_CACHE") from None  # fmt: skip
    with lock, explain_full_disk(folder):
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_leftovers(folder)
        yield


def find_vectors(dataset: DatasetFolder, folder: Path) -> list[ShardVectors] | None:
    """The embeddings of each shard from the cache; None where it lacks some."""
    found = [_read(folder, shard, dataset.withdrawn) for shard in dataset.manifest["shards"]]
    whole = [vectors for vectors in found if vectors is not None]
    return whole if len(whole) == len(found) else None


def embed_shards(
    dataset: DatasetFolder, encoder: Encoder, folder: Path, *, workers: int = 0, progress: Progress = silent
) -> list[ShardVectors]:
    """The embeddings of each shard, in the order of the manifest, from `folder` where it has them.

    The caller owns the folder. Files whose bytes changed are made again. `workers` are processes that read pictures.
    Raises DataError where an embedding is not finite.
    """
    shards = dataset.manifest["shards"]
    found = [_read(folder, shard, dataset.withdrawn) for shard in shards]
    found = [vectors if vectors and sha256_file(vectors.path) == vectors.sha256 else None for vectors in found]
    left = sum(shard["samples"] for shard, vectors in zip(shards, found, strict=True) if vectors is None)
    if not left:
        return [vectors for vectors in found if vectors is not None]
    with progress(f"embedding {dataset.manifest['name']}", left) as advance:
        done = [
            vectors or _embed(dataset, shard, encoder, folder, workers, advance)
            for shard, vectors in zip(shards, found, strict=True)
        ]
    shutil.rmtree(folder / "parts", ignore_errors=True)
    return done


def _embed(
    dataset: DatasetFolder, shard: dict[str, Any], encoder: Encoder, folder: Path, workers: int, advance: Advance
) -> ShardVectors:
    """One shard's embeddings, written; its finished parts are taken over from an interrupted run."""
    rows = read_shard_rows(dataset, shard["name"])
    live = {row["key"]: place for place, row in enumerate(rows) if row["key"] not in dataset.withdrawn}
    withdrawn = [row["key"] for row in rows if row["key"] not in live]
    advance(len(withdrawn))
    array: NDArray[np.float16] = np.zeros((len(rows), 0), _TYPE)
    unreadable: dict[str, str] = {}
    if live:
        chosen = [rows[place] for place in live.values()]
        reader = PartReader(DatasetFolder(dataset.folder), {row["key"]: row for row in chosen})
        made = embed_images(
            encoder.model, encoder.preprocess, make_part_manifest(dataset, chosen), read=reader, batch_size=_BATCH,
            workers=workers, device=encoder.device, max_excluded=1.0, cache=folder / "parts", model_hash=folder.name,
            progress=lambda *_: nullcontext(advance),
        )  # fmt: skip
        array = np.zeros((len(rows), made.vectors.shape[1]), _TYPE)
        array[[live[key] for key in made.sample_ids]] = made.vectors
        unreadable = {drop.item: drop.detail for drop in made.drops}
    return _write(folder, shard, array, unreadable, withdrawn)


def write_shard_vectors(folder: Path, shard: dict[str, Any], vectors: NDArray[Any]) -> ShardVectors:
    """Embeddings (samples, D) that were made elsewhere, kept for the shard of a manifest as if they were made here."""
    return _write(folder, shard, vectors.astype(_TYPE), {}, [])


def _write(
    folder: Path, shard: dict[str, Any], array: NDArray[np.float16], unreadable: dict[str, str], withdrawn: list[str]
) -> ShardVectors:
    path = folder / f"{shard['sha256']}.f16"
    with write_atomic(path) as file:
        file.write(array.tobytes())
    facts = {"samples": len(array), "dim": array.shape[1], "sha256": sha256_file(path), "unreadable": unreadable}
    write_json(path.with_suffix(".json"), {**facts, "withdrawn": withdrawn})
    for part in (folder / "parts").glob("*.npz"):
        part.unlink()
    return ShardVectors(path, **facts)


def _read(folder: Path, shard: dict[str, Any], withdrawn: frozenset[str]) -> ShardVectors | None:
    """What the cache has of a shard; None where it has nothing whole, or lacks samples that are no longer withdrawn."""
    path = folder / f"{shard['sha256']}.f16"
    try:
        facts = json.loads(path.with_suffix(".json").read_bytes())
        missing = frozenset(facts.pop("withdrawn"))
        found = ShardVectors(path, **facts)
        whole = found.samples == shard["samples"] and path.stat().st_size == found.samples * found.dim * _TYPE.itemsize
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if whole and missing <= withdrawn else None
