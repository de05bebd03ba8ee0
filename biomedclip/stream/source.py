"""Where the samples of a training source lie: on this disk, or wherever a URL points.

A source is a dataset folder of ours, here or at a URL (its manifest and indexes are copied into the cache, its shards
stay where they are), or somebody's WebDataset tars. `locate` yields its index; `open_shards` what reads its bytes, from
`biomedclip.stream.tars`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.errors import DataError
from biomedclip.files import sha256_file, write_bytes
from biomedclip.shards import (
    ANNOTATIONS,
    ARTICLE_COLUMNS,
    MANIFEST,
    TOMBSTONES,
    DatasetFolder,
    arrow_schema,
    read_tables,
)
from biomedclip.stream.addresses import is_remote, shown
from biomedclip.stream.cache import entry_name
from biomedclip.stream.columns import ShardIndex
from biomedclip.stream.fetch import Fetcher
from biomedclip.stream.index import ShardFact, expand_tars, index_tars
from biomedclip.stream.tars import PAIR, FetcherHere, LocalShards, RemoteShards, Shards

if TYPE_CHECKING:
    import pyarrow as pa


_ARTICLES = "articles.parquet"


@dataclass(frozen=True, slots=True)
class Place:
    """A source that was found: the index of its samples, and where its shards are."""

    where: str
    """As messages name it."""
    index: ShardIndex
    """Columns of schema.INDEX_COLUMNS, at least those that the loader reads."""
    shards: Mapping[str, ShardFact]
    """What each shard must be; empty for a local dataset folder, whose samples carry checksums."""
    base: str = ""
    """What stands before a shard's name in its path or URL, `/` included."""
    dataset: DatasetFolder | None = None
    withdrawn: frozenset[str] = frozenset()
    """Keys of samples taken back."""
    ledger: pa.Table | None = None
    """Samples of foreign tars that cannot be used, LEDGER_COLUMNS."""

    @property
    def notice(self) -> str | None:
        """One line about what cannot be used; None where everything can."""
        dropped = Counter(self.ledger["reason"].to_pylist()) if self.ledger is not None else Counter()
        if not dropped:
            return None
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items()))
        return f"{self.where}: {dropped.total()} samples or tars cannot be used, {len(self.index)} can ({counts})"

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> samples."""
        if self.dataset is not None:
            return self.dataset.splits
        return {"train": len(self.index)} if len(self.index) else {}

    @property
    def annotations_sha256(self) -> str | None:
        """Identity of what experts say of the samples; None where they say nothing."""
        path = self.dataset.folder / ANNOTATIONS if self.dataset is not None else None
        return sha256_file(path) if path is not None and path.exists() else None

    def articles(self) -> pa.Table:
        """ARTICLE_COLUMNS, one row an article; no rows for foreign tars."""
        if self.dataset is None:
            return arrow_schema(ARTICLE_COLUMNS).empty_table()
        return read_tables([self.dataset.folder / _ARTICLES], ARTICLE_COLUMNS)


def locate(
    path: str | Path,
    tars: Sequence[str],
    name: str,
    fetcher: Fetcher,
    *,
    article_key: str | None = None,
    article_pattern: str | None = None,
    articles: bool = False,
) -> Place:
    """The source at a folder, a URL, or the tars that `path` or `tars` name. Raises DataError where there is none.

    `articles` asks for the facts of articles too, which are not copied from afar otherwise.
    """
    if tars or str(path).endswith(".tar"):
        found = index_tars(expand_tars(list(tars) or str(path)), name, fetcher, article_key=article_key,
                           article_pattern=article_pattern)  # fmt: skip
        return Place(name, ShardIndex.of_table(_fill(found.table)), found.shards, ledger=found.ledger)
    if not is_remote(path):
        dataset = DatasetFolder(path)
        return Place(str(path), ShardIndex.of_folder(dataset), {}, f"{dataset.folder}/", dataset, dataset.withdrawn)
    url = str(path).rstrip("/")
    dataset = DatasetFolder(mirror_dataset(url, fetcher, articles=articles))
    shards = {s["name"]: ShardFact(s["bytes"], version=s["sha256"]) for s in dataset.manifest["shards"]}
    return Place(shown(url), ShardIndex.of_folder(dataset), shards, f"{url}/", dataset, dataset.withdrawn)


def mirror_dataset(url: str, fetcher: Fetcher, *, articles: bool = False) -> Path:
    """A folder in the cache with the manifest, indexes and tombstones of a remote dataset folder, hashes checked."""
    stored = fetcher.read_file(f"{url}/{MANIFEST}") or b""
    try:
        manifest = json.loads(stored)
        files = {s["name"].replace(".tar", ".parquet"): None for s in manifest["shards"]}
        files = {name: manifest["files"][name] for name in [*files, *([_ARTICLES] if articles else [])]}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise DataError(f"{shown(url)}/{MANIFEST}", "is no manifest of a dataset", todo="check the address") from None
    if not all(re.fullmatch(r"\d{5,}\.parquet", name) for name in files if name != _ARTICLES):
        raise DataError(f"{shown(url)}/{MANIFEST}", "names shards that are none", todo="check the address")
    folder = fetcher.config.folder / "datasets" / entry_name(url, hashlib.sha256(stored).hexdigest())

    def copy(name: str) -> None:
        if (folder / name).exists() and sha256_file(folder / name) == files[name]:
            return
        data = fetcher.read_file(f"{url}/{name}")
        if data is None or hashlib.sha256(data).hexdigest() != files[name]:
            raise DataError(f"{shown(url)}/{name}", "has other bytes than its manifest says", todo="upload it again")
        write_bytes(folder / name, data)

    with ThreadPoolExecutor(fetcher.config.threads) as threads:
        list(threads.map(copy, files))
    tombstones = fetcher.read_file(f"{url}/{TOMBSTONES}", optional=True)
    if tombstones is None:
        (folder / TOMBSTONES).unlink(missing_ok=True)
    else:
        write_bytes(folder / TOMBSTONES, tombstones)
    write_bytes(folder / MANIFEST, stored)
    return folder


def open_shards(
    place: Place, columns: Mapping[str, Sequence[Any]], fetcher: FetcherHere, members: Sequence[str] = PAIR
) -> Shards:
    """The bytes of the samples whose columns these are. `members` are read together, because all will be asked for."""
    if is_remote(place.base) or any(map(is_remote, place.shards)):
        return RemoteShards(place, columns, fetcher, members)
    return LocalShards(place, columns, members)


def _fill(table: pa.Table) -> pa.Table:
    """A foreign index with the columns that only our own shards have: unknown, or what holds for all such tars."""
    import pyarrow as pa

    rows = len(table)
    constants = {
        "image_crc32": pa.nulls(rows, pa.uint32()), "num_captions": pa.repeat(pa.scalar(1, pa.int32()), rows),
        "modality": pa.nulls(rows, pa.string()), "labels": pa.nulls(rows, pa.list_(pa.string())),
        "split": pa.repeat("train", rows),
    }  # fmt: skip
    for name, column in constants.items():
        table = table.append_column(name, column)
    return table
