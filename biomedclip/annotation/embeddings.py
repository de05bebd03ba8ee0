"""A dataset folder's pictures to one array of unit embeddings on disk, in the order of its shards.

Reads a `DatasetFolder` and a model; writes `embeddings.npy` (N, D), `keys.parquet` and, last, `embeddings.json`, whose
presence means complete. Pictures are embedded in parts by `evaluation.embed.embed_images`, whose cache holds each
finished part under a key made of weights, preprocessing and pictures: an interrupted run is run again and goes on, and
one with another model cannot take over its parts. Vectors of one part are in memory at a time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biomedclip.annotation.config import EmbedConfig
from biomedclip.errors import ConfigError, DataError
from biomedclip.evaluation.embed import choose_device, describe_preprocess, embed_images, fingerprint
from biomedclip.files import TEMPORARY_PREFIX, remove_leftovers, sha256_file, write_atomic, write_json
from biomedclip.images import read_rgb
from biomedclip.layouts.manifest import make_manifest
from biomedclip.progress import Progress, silent
from biomedclip.schema import INDEX_COLUMNS, Drop, ImageRef, LabelledImage, Manifest
from biomedclip.shards import MANIFEST, DatasetFolder, read_tables, write_table

if TYPE_CHECKING:
    from PIL import Image

FACTS, VECTORS, KEYS, PARTS = "embeddings.json", "embeddings.npy", "keys.parquet", "parts"
FORMAT = 1
PLACE_COLUMNS = {
    name: INDEX_COLUMNS[name]
    for name in ("key", "shard", "image_crc32", *(f"{m}_{f}" for m in ("image", "text", "json")
                                                  for f in ("offset", "size")))
}  # fmt: skip
"""What `DatasetFolder.read` needs of a sample."""
_TODO = "make them again: biomedclip data annotate embed"


class Embeddings:
    """A folder that `embed_folder` finished. Raises DataError where it is not one, or its files do not belong together.

    `facts` are those of `embeddings.json`; `keys` and the rows of `vectors` (N, D) correspond.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.facts: dict[str, Any] = json.loads((self.folder / FACTS).read_bytes())
            if self.facts["format"] != FORMAT:
                raise DataError(self.folder / FACTS, f"is not of format {FORMAT}", todo=_TODO)
        except OSError:
            raise DataError(self.folder, "holds no finished embeddings", todo=_TODO) from None
        except (ValueError, KeyError, TypeError):
            raise DataError(self.folder / FACTS, "says nothing of embeddings", todo=_TODO) from None

    @cached_property
    def keys(self) -> list[str]:
        """Sample keys, in the order of the shards."""
        keys: list[str] = read_tables([self.folder / KEYS], {"key": "string"})["key"].to_pylist()
        if len(keys) != self.facts["n"]:
            raise DataError(self.folder / KEYS, f"has {len(keys)} rows instead of {self.facts['n']}", todo=_TODO)
        return keys

    @cached_property
    def vectors(self) -> np.ndarray:
        """(N, D), of length 1, mapped from disk."""
        path = self.folder / VECTORS
        try:
            vectors: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(path, "cannot be read as an array", found=str(error)[:80], todo=_TODO) from None
        if vectors.shape != (self.facts["n"], self.facts["dim"]):
            raise DataError(path, "has another shape than its facts say", found=vectors.shape, todo=_TODO)
        return vectors

    def open_dataset(self, folder: str | Path | None = None) -> DatasetFolder:
        """The dataset that was embedded, from where it was then or from `folder`. Raises DataError for another one."""
        dataset = DatasetFolder(self.folder / self.facts["dataset"] if folder is None else folder)
        if sha256_file(dataset.folder / MANIFEST) != self.facts["dataset_sha256"]:
            raise DataError(self.folder, "holds embeddings of another dataset", found=dataset.folder, todo=_TODO)
        return dataset


def embed_folder(
    folder: str | Path,
    out: str | Path,
    config: EmbedConfig,
    *,
    model: tuple[Any, Any, Any] | None = None,
    progress: Progress = silent,
) -> Embeddings:
    """The embeddings of all pictures of a dataset folder, in `out`, made now unless they are there already.

    `model` is `(model, preprocess, tokenizer)` where it is loaded already. Raises ConfigError where `out` holds other
    embeddings or other files, DataError where too many pictures cannot be read.
    """
    dataset, out = DatasetFolder(folder), Path(out)
    if model is None:
        from biomedclip.models.load import load

        model = load(config.model)
    device = choose_device(config.device)
    net, preprocess, _ = model
    identity = {
        "dataset_sha256": sha256_file(dataset.folder / MANIFEST), "fingerprint": fingerprint(net),
        "preprocess": describe_preprocess(preprocess), "dtype": config.dtype,
    }  # fmt: skip
    if (out / FACTS).exists():
        return _finished(out, identity)
    _claim(out)
    net = net.to(device)
    writer = _Writer(out, np.dtype(config.dtype))
    with progress(f"embedding {dataset.manifest['name']}", len(dataset)) as advance:
        for rows in _parts(dataset, config.part_size):
            reader = PartReader(DatasetFolder(dataset.folder), {row["key"]: row for row in rows})
            found = embed_images(
                net, preprocess, make_part_manifest(dataset, rows), read=reader, batch_size=config.batch_size,
                workers=config.workers, device=device, max_excluded=1.0, cache=out / PARTS,
                model_hash=identity["fingerprint"],
            )  # fmt: skip
            writer.add(rows, dict(zip(found.sample_ids, found.vectors, strict=True)), found.drops)
            _check_excluded(writer.drops, len(dataset), dataset, config.max_excluded)
            advance(len(rows))
    facts = {
        "format": FORMAT, "dataset": os.path.relpath(dataset.folder, out), **identity, "model": config.model,
        **writer.finish(),
    }  # fmt: skip
    write_json(out / FACTS, facts)
    shutil.rmtree(out / PARTS)
    return Embeddings(out)


def _finished(out: Path, identity: Mapping[str, str]) -> Embeddings:
    found = Embeddings(out)
    for part, value in identity.items():
        if found.facts.get(part) != value:
            raise ConfigError(out, f"holds finished embeddings of another {part.removesuffix('_sha256')}",
                              todo="name another folder, or delete this one")  # fmt: skip
    if (out / PARTS).exists():
        shutil.rmtree(out / PARTS)
    return found


def _claim(out: Path) -> None:
    """Make `out`, or see that nothing but an interrupted run is in it."""
    if out.exists() and not out.is_dir():
        raise ConfigError(out, "is a file", todo="name a folder")
    ours = {PARTS, VECTORS, KEYS}
    others = sorted(
        path.name for path in (out.iterdir() if out.exists() else ())
        if path.name not in ours and not path.name.startswith(TEMPORARY_PREFIX)
    )  # fmt: skip
    if others:
        raise ConfigError(out, "holds other files", found=others[0], todo="name an empty or a new folder")
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    remove_leftovers(out / PARTS)


@dataclass(frozen=True)
class PartReader:
    """Reads the picture of a manifest's row by its place in a shard; worker processes get a copy, so that the dataset
    should be a fresh one, without tables."""

    dataset: DatasetFolder
    rows: dict[str, dict[str, Any]]

    def __call__(self, manifest: Manifest, row: LabelledImage) -> Image.Image:
        sample = self.dataset.read(self.rows[row.sample_id])
        return read_rgb(sample.image, f"{manifest.root}: {row.sample_id}")


def _parts(dataset: DatasetFolder, size: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of live samples, `size` places in the shards at a time: a later purge moves no part."""
    import pyarrow.parquet as pq

    for shard in dataset.manifest["shards"]:
        with pq.ParquetFile(dataset.folder / shard["name"].replace(".tar", ".parquet")) as file:
            for batch in file.iter_batches(size, columns=list(PLACE_COLUMNS)):
                rows = [row for row in batch.to_pylist() if row["key"] not in dataset.withdrawn]
                if rows:
                    yield rows


def read_shard_rows(dataset: DatasetFolder, shard: str) -> list[dict[str, Any]]:
    """PLACE_COLUMNS of all samples of a shard, in its order. Raises DataError where its index is broken."""
    return read_tables([dataset.folder / shard.replace(".tar", ".parquet")], PLACE_COLUMNS).to_pylist()


def make_part_manifest(dataset: DatasetFolder, rows: Sequence[Mapping[str, Any]]) -> Manifest:
    """The rows as a Manifest for `embed_images`, whose hash is of their keys and pictures."""
    pictures = [LabelledImage(sample_id=row["key"], image=ImageRef(path=row["shard"])) for row in rows]
    content = [[row["key"], row["image_crc32"], row["image_size"]] for row in rows]
    return make_manifest(str(dataset.manifest["name"]), dataset.folder, pictures, kind="caption", content=content)


def _check_excluded(drops: Sequence[Drop], total: int, dataset: DatasetFolder, limit: float) -> None:
    if len(drops) > limit * total:
        wrong = f"{len(drops)} of {total} pictures cannot be read, more than {limit:.2%}"
        found = f"{drops[0].item}: {drops[0].detail}"
        raise DataError(dataset.folder, wrong, found=found, todo="repair them or raise max_excluded")


class _Writer:
    """Collects vectors on disk: as raw bytes first, because the array's header says how many there are."""

    def __init__(self, out: Path, dtype: np.dtype[Any]) -> None:
        self.out, self.dtype, self.dim = out, dtype, 0
        self.keys: list[str] = []
        self.drops: list[Drop] = []
        self._raw = out / PARTS / "vectors.raw"
        self._raw.write_bytes(b"")

    def add(self, rows: Sequence[Mapping[str, Any]], vectors: Mapping[str, np.ndarray], drops: Sequence[Drop]) -> None:
        self.drops += drops
        known = [row["key"] for row in rows if row["key"] in vectors]
        if not known:
            return
        block = np.stack([vectors[key] for key in known]).astype(self.dtype)
        self.keys += known
        self.dim = block.shape[1]
        with self._raw.open("ab") as file:
            file.write(block.tobytes())

    def finish(self) -> dict[str, Any]:
        """Write array and keys; returns their facts. Raises DataError where there are none."""
        if not self.keys:
            raise DataError(self.out, "no picture could be read", found=f"{len(self.drops)} unreadable")
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False,
                  "shape": (len(self.keys), self.dim)}  # fmt: skip
        with write_atomic(self.out / VECTORS) as file, self._raw.open("rb") as raw:
            np.lib.format.write_array_header_1_0(file, header)
            shutil.copyfileobj(raw, file, 1 << 24)
        write_table(self.out / KEYS, [{"key": key} for key in self.keys], {"key": "string"})
        return {
            "n": len(self.keys), "dim": self.dim, "excluded": {drop.item: drop.detail for drop in self.drops},
            "vectors_sha256": sha256_file(self.out / VECTORS),
        }  # fmt: skip
