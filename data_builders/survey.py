"""What a dataset folder or a folder of units holds, counted: the numbers of `data report`, without their page.

Reads indexes (or the pairs of units), ledgers and article tables column by column and batch by batch, so a million rows
cost no more memory than a thousand; yields a `Survey` of counters and histograms. Funnels are checked here: a sum that
does not add up is an error, never a chart. What has a tombstone is still in the shards, and counted; only the samples
that are shown leave it out.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biomedclip.errors import DataError
from biomedclip.shards import MANIFEST, DatasetFolder
from data_builders.units import UnitRecord, count_rows, read_units

if TYPE_CHECKING:
    import pyarrow as pa

SHORTER_SIDE_PX = (0, 64, 128, 224, 336, 512, 768, 1024, 1536, 2048)
ASPECTS = (0.0, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
"""Width by height; each bin takes in its lower end, the last has no upper one."""
TOKENS = (0, 16, 32, 48, 64, 76, 96, 128, 192, 255, 512)
"""CLIP's tokens; a context of 77 holds 75 beside the two marks, one of 256 holds 254."""
WORDS = (0, 5, 10, 20, 40, 60, 80, 120, 160, 240, 320)

MOST_CAPTIONS = 200_000
"""A dataset's captions are in its tars: of more than these, a sample by hash is counted in words."""

_COUNTED = ("licence", "licence_class", "source", "split", "modality", "image_format")
_COUNTED_LISTS = ("concepts", "flags", "labels")
_ARTICLE_FACTS = ("article_id", "journal", "published")
_BATCH_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class Chosen:
    """A sample to show: where its row is."""

    key: str
    path: Path


@dataclass(slots=True, kw_only=True)
class Survey:
    """Counts over one folder."""

    name: str
    kind: str
    """`dataset` or `units`."""
    seen: int
    kept: int
    dropped: dict[str, int]
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """Column of the index -> value -> samples; a value that is null is ''."""
    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    """`shorter_side`, `aspect`, `tokens`, `words`: samples in each bin of the edges above."""
    tokens_known: int = 0
    beyond_77: int = 0
    beyond_256: int = 0
    words_counted: int = 0
    image_bytes: int = 0
    articles_read: int = 0
    articles_kept: int = 0
    journals: Counter[str] = field(default_factory=Counter)
    years: Counter[str] = field(default_factory=Counter)
    cluster_sizes: Counter[int] = field(default_factory=Counter)
    """Samples of one recorded duplicate cluster -> clusters."""
    units: list[tuple[str, int, Counter[str]]] = field(default_factory=list)
    """Unit with its deltas, pairs kept, rows dropped by reason."""
    tombstones: Counter[str] = field(default_factory=Counter)
    """Reason -> tombstones."""
    withdrawn: frozenset[str] = frozenset()
    """Keys of the samples taken back."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    chosen: list[Chosen] = field(default_factory=list)


def survey_folder(folder: str | Path, *, samples: int = 24, seed: int = 0) -> Survey:
    """The counts of a dataset folder or a folder of units, and `samples` of its samples chosen by a seeded hash.

    Raises DataError where the folder is neither, is damaged, or its ledger does not add up.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists() or not any(folder.glob("*.pairs.parquet")):
        survey, paths, articles = _open_dataset(DatasetFolder(folder))
    else:
        survey, paths, articles = _open_units(folder)
    _count_rows(survey, paths, samples, seed)
    _count_articles(survey, articles)
    return survey


def _open_dataset(dataset: DatasetFolder) -> tuple[Survey, list[Path], list[Path]]:
    import pyarrow.parquet as pq

    ledger = dataset.manifest["ledger"]
    survey = Survey(
        name=dataset.manifest["name"], kind="dataset", seen=ledger["seen"], kept=ledger["kept"],
        dropped=ledger["dropped"], provenance=dataset.manifest["provenance"], withdrawn=dataset.withdrawn,
        tombstones=Counter(dataset.tombstones["reason"].to_pylist()),
    )  # fmt: skip
    _check_sum(survey, dataset.folder)
    path = dataset.folder / "ledger.parquet"
    rows = pq.read_metadata(path).num_rows
    if rows != survey.seen:
        wrong = f"has {rows} rows, the manifest says that {survey.seen} were seen"
        raise DataError(path, wrong, todo="build the dataset again")
    paths = [dataset.folder / shard["name"].replace(".tar", ".parquet") for shard in dataset.manifest["shards"]]
    return survey, paths, [dataset.folder / "articles.parquet"]


def _open_units(folder: Path) -> tuple[Survey, list[Path], list[Path]]:
    records = read_units(folder)
    kept, dropped = count_rows(records)
    survey = Survey(
        name=folder.name, kind="units", seen=kept + sum(dropped.values()), kept=kept, dropped=dict(dropped),
        units=list(_by_unit(records)),
    )  # fmt: skip
    _check_sum(survey, folder)
    return survey, [record.path("pairs") for record in records], [record.path("articles") for record in records]


def _by_unit(records: Iterable[UnitRecord]) -> Iterator[tuple[str, int, Counter[str]]]:
    bases: dict[str, list[UnitRecord]] = {}
    for record in records:
        bases.setdefault(record.base, []).append(record)
    for base, group in bases.items():
        yield base, *count_rows(group)


def _check_sum(survey: Survey, folder: Path) -> None:
    dropped = sum(survey.dropped.values())
    if survey.seen != survey.kept + dropped:
        found = f"{survey.seen} seen, {survey.kept} kept, {dropped} dropped"
        raise DataError(folder, "its ledger does not add up", found=found, todo="build it again")


def _count_rows(survey: Survey, paths: list[Path], samples: int, seed: int) -> None:
    edges = {"shorter_side": SHORTER_SIDE_PX, "aspect": ASPECTS, "tokens": TOKENS, "words": WORDS}
    survey.histograms = {name: np.zeros(len(bins), dtype=np.int64) for name, bins in edges.items()}
    survey.counts = {column: Counter() for column in (*_COUNTED, *_COUNTED_LISTS)}
    article_hashes: list[np.ndarray] = []
    clusters: list[np.ndarray] = []
    best: list[tuple[bytes, str, str]] = []
    total = 0
    keep_words = min(1.0, MOST_CAPTIONS / max(survey.kept, 1))
    for path, batch in _batches(paths):
        total += batch.num_rows
        _count_batch(survey, batch)
        article_hashes.append(_hash_articles(batch.column("article_id")))
        if "dup_cluster" in batch.schema.names:
            clusters.append(batch.column("dup_cluster").drop_null().to_numpy(zero_copy_only=False))
        ranks = [(_rank(seed, key), key, str(path)) for key in batch.column("key").to_pylist()]
        best = heapq.nsmallest(samples, [*best, *(entry for entry in ranks if entry[1] not in survey.withdrawn)])
        words = _count_words(batch, path, [rank for rank, _, _ in ranks], keep_words)
        survey.histograms["words"] += _bin(words, WORDS)
        survey.words_counted += len(words)
    if total != survey.kept:
        where = paths[0].parent if paths else survey.name
        raise DataError(where, f"holds {total} rows, its ledger kept {survey.kept}", todo="build it again")
    survey.articles_kept = len(np.unique(np.concatenate(article_hashes))) if article_hashes else 0
    if clusters:
        _, sizes = np.unique(np.concatenate(clusters), return_counts=True)
        survey.cluster_sizes.update(sizes.tolist())
    survey.chosen = [Chosen(key, Path(path)) for _, key, path in best]


def _batches(paths: list[Path]) -> Iterator[tuple[Path, pa.RecordBatch]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = {
        "key", "article_id", "dup_cluster", "width", "height", "caption_tokens", "image_size", "caption", "text_offset",
        "text_size", "shard", *_COUNTED, *_COUNTED_LISTS,
    }  # fmt: skip
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                names = [name for name in file.schema_arrow.names if name in wanted]
                for batch in file.iter_batches(_BATCH_ROWS, columns=names, use_threads=False):
                    yield path, batch
        except (OSError, pa.ArrowInvalid) as error:
            todo = "rebuild the dataset or fetch it again"
            raise DataError(path, "cannot be read as parquet", found=str(error)[:80], todo=todo) from None


def _count_batch(survey: Survey, batch: pa.RecordBatch) -> None:
    import pyarrow.compute as pc

    for column in (*_COUNTED, *_COUNTED_LISTS):
        values = batch.column(column)
        flat = values.flatten() if column in _COUNTED_LISTS else values
        found = pc.value_counts(flat)
        names, counts = found.field("values").to_pylist(), found.field("counts").to_pylist()
        for name, count in zip(names, counts, strict=True):
            survey.counts[column][name or ""] += count
    width, height = (batch.column(side).to_numpy(zero_copy_only=False) for side in ("width", "height"))
    survey.histograms["shorter_side"] += _bin(np.minimum(width, height), SHORTER_SIDE_PX)
    survey.histograms["aspect"] += _bin(width / np.maximum(height, 1), ASPECTS)
    tokens = batch.column("caption_tokens").drop_null().to_numpy(zero_copy_only=False)
    survey.histograms["tokens"] += _bin(tokens, TOKENS)
    survey.tokens_known += len(tokens)
    survey.beyond_77 += int((tokens > 75).sum())
    survey.beyond_256 += int((tokens > 254).sum())
    survey.image_bytes += pc.sum(batch.column("image_size")).as_py() or 0


def _bin(values: np.ndarray, edges: tuple[float, ...]) -> np.ndarray:
    places = np.clip(np.searchsorted(np.asarray(edges), values, side="right") - 1, 0, len(edges) - 1)
    return np.bincount(places, minlength=len(edges))


def _hash_articles(ids: pa.Array) -> np.ndarray:
    """64 bits for each article of a batch: 5 million ids in memory would be most of a gigabyte."""
    import pyarrow.compute as pc

    known = [value for value in pc.unique(ids).to_pylist() if value]
    digests = [hashlib.blake2b(value.encode(), digest_size=8).digest() for value in known]
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _rank(seed: int, key: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()


def _count_words(batch: pa.RecordBatch, path: Path, ranks: list[bytes], share: float) -> np.ndarray:
    """Words of the captions, of a share of them where they must be read out of a tar."""
    import pyarrow.compute as pc

    if "caption" in batch.schema.names:
        lengths = pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(batch.column("caption"))))
        return lengths.to_numpy(zero_copy_only=False)
    limit = int(share * 2**64)
    taken = [place for place, rank in enumerate(ranks) if int.from_bytes(rank, "big") < limit]
    offsets, sizes = (batch.column(name).to_pylist() for name in ("text_offset", "text_size"))
    tar = path.with_suffix(".tar")
    try:
        with tar.open("rb") as file:
            texts = [os.pread(file.fileno(), sizes[place], offsets[place]) for place in taken]
    except FileNotFoundError:
        raise DataError(tar, "is missing", todo="fetch the shard again, or rebuild the dataset") from None
    return np.array([len(text.split()) for text in texts], dtype=np.int64)


def _count_articles(survey: Survey, paths: list[Path]) -> None:
    import pyarrow.parquet as pq

    seen: set[bytes] = set()
    for path in paths:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(_ARTICLE_FACTS)):
                rows = zip(*(batch.column(name).to_pylist() for name in _ARTICLE_FACTS), strict=True)
                for article_id, journal, published in rows:
                    digest = hashlib.blake2b(article_id.encode(), digest_size=8).digest()
                    if digest not in seen:  # a retried unit reads an article again
                        seen.add(digest)
                        survey.journals[journal or ""] += 1
                        survey.years[(published or "")[:4]] += 1
    survey.articles_read = len(seen)
