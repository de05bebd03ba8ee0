"""Embeddings to clusters, and a table in which experts say what each cluster shows.

Reads `Embeddings` and their dataset; writes `clusters.parquet` beside the embeddings (which sample is in which cluster,
how far from its middle), the table (one row a cluster, largest first, with empty columns to fill) and contact sheets
beside the table. PCA is fitted on a sample and k-means runs on one thread with a seed, because the names of clusters
must be the same on every machine: they begin with a hash of embeddings and config, so that a table that was filled for
another clustering is noticed.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biomedclip.annotation.config import ClusterConfig
from biomedclip.annotation.embeddings import Embeddings
from biomedclip.annotation.sheets import write_sheets
from biomedclip.errors import ConfigError, DataError
from biomedclip.files import sha256_json, write_atomic, write_bytes
from biomedclip.progress import Progress, silent
from biomedclip.shards import INDEX_COLUMNS, DatasetFolder, arrow_schema, read_member, read_tables

if TYPE_CHECKING:
    import pyarrow as pa

CLUSTERS = "clusters.parquet"
CLUSTER_COLUMNS: dict[str, str] = {"key": "string", "cluster": "string", "distance": "float32"}
TO_FILL = ("label", "secondary", "keep", "notes")
TABLE_COLUMNS = ("cluster", "size", "examples", "terms", *TO_FILL)

_PCA_ROWS = 50_000
_MINIBATCH_ABOVE = 20_000
_CAPTIONS = 50
"""Captions of each cluster, the nearest, whose words are counted."""
_BATCH_ROWS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Clustering:
    """Which picture is in which cluster; clusters are numbered by size, the largest first."""

    members: tuple[np.ndarray, ...]
    """Positions of each cluster's pictures, the nearest to its middle first."""
    distance: np.ndarray
    """(N,) float32, of each picture from the middle of its cluster, in the reduced space."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFacts:
    """What `cluster_embeddings` wrote."""

    clusters: int
    images: int
    smallest: int
    largest: int
    table: Path
    sheets: tuple[Path, ...]


def cluster_embeddings(
    folder: str | Path,
    out: str | Path,
    config: ClusterConfig | None = None,
    *,
    dataset: str | Path | None = None,
    progress: Progress = silent,
) -> ClusterFacts:
    """Group the embeddings in `folder`, write the table to `out` and contact sheets beside it.

    `dataset` is the dataset folder, where it has moved since. Raises ConfigError for more clusters than pictures,
    and where `out` is a table that somebody has begun to fill.
    """
    config, found, out = config or ClusterConfig(), Embeddings(folder), Path(out)
    _spare_filled(out)
    source = found.open_dataset(dataset)
    clustering = find_clusters(found.vectors, config)
    identity = sha256_json([found.facts["vectors_sha256"], config.model_dump(mode="json")])[:6]
    names = [f"{identity}-{number:04d}" for number in range(len(clustering.members))]
    _write_assignment(found, clustering, names)
    shown = max(config.images, config.examples, _CAPTIONS)
    rows = _rows_of(source, {found.keys[i] for members in clustering.members for i in members[:shown].tolist()})
    nearest = [
        [rows[key] for i in members[:shown].tolist() if (key := found.keys[i]) in rows]
        for members in clustering.members
    ]  # fmt: skip
    terms = find_terms([_captions(source, group[:_CAPTIONS]) for group in nearest], config.terms)
    sizes = [len(members) for members in clustering.members]
    _write_table(out, names, sizes, nearest, terms, config)
    sheets = write_sheets(
        out, source, list(zip(names, sizes, terms, [group[: config.images] for group in nearest], strict=True)),
        per_page=config.clusters_per_page, progress=progress,
    )  # fmt: skip
    return ClusterFacts(clusters=len(names), images=sum(sizes), smallest=min(sizes), largest=max(sizes), table=out,
                        sheets=tuple(sheets))  # fmt: skip


def find_clusters(vectors: np.ndarray, config: ClusterConfig) -> Clustering:
    """The clusters of (N, D) embeddings. Raises ConfigError for more clusters than rows."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    count = len(vectors)
    wanted = config.clusters or min(2000, max(2, round(count**0.5)))
    if wanted > count:
        raise ConfigError("clusters", f"must be at most the number of pictures, {count}", found=wanted)
    few = config.method == "kmeans" or (config.method == "auto" and count <= _MINIBATCH_ABOVE)
    model = (
        KMeans(wanted, n_init=10, random_state=config.seed)
        if few
        else MiniBatchKMeans(wanted, n_init=3, random_state=config.seed, batch_size=4096)
    )
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # Fewer distinct pictures than clusters: what remains empty is left out below.
        warnings.simplefilter("ignore", ConvergenceWarning)
        reduced = reduce_dims(vectors, config.pca_dims, config.seed)
        cluster = model.fit_predict(reduced)
        distance = np.linalg.norm(reduced - model.cluster_centers_[cluster], axis=1).astype(np.float32)
    order = np.lexsort((np.arange(count), distance, cluster))
    starts = np.flatnonzero(np.diff(cluster[order], prepend=-1))
    members = sorted(np.split(order, starts[1:]), key=lambda group: (-len(group), int(group[0])))
    return Clustering(members=tuple(members), distance=distance)


def reduce_dims(vectors: np.ndarray, dims: int, seed: int) -> np.ndarray:
    """(N, dims) float32: the vectors along the axes in which a sample of them differs most."""
    from sklearn.decomposition import PCA

    count = len(vectors)
    chosen = np.arange(count)
    if count > _PCA_ROWS:
        chosen = np.sort(np.random.default_rng(seed).choice(count, _PCA_ROWS, replace=False))
    sample = np.asarray(vectors[chosen], dtype=np.float32)
    if not np.ptp(sample, axis=0).any():  # pictures that are all alike have no axes
        return np.zeros((count, 1), dtype=np.float32)
    pca = PCA(min(dims, *sample.shape), svd_solver="full").fit(sample)
    blocks = [
        pca.transform(np.asarray(vectors[start : start + _BATCH_ROWS], dtype=np.float32))
        for start in range(0, count, _BATCH_ROWS)
    ]
    return np.concatenate(blocks).astype(np.float32)


def find_terms(captions: Sequence[Sequence[str]], count: int) -> list[list[str]]:
    """For each cluster's captions the `count` words that speak of it more than of the others."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, stop_words="english", token_pattern=r"\b[a-z][a-z]{2,}\b")  # noqa: S106
    try:
        weights = vectorizer.fit_transform([" ".join(group) for group in captions]).tocsr()
    except ValueError:  # no caption has a word
        return [[] for _ in captions]
    words = vectorizer.get_feature_names_out()
    found = []
    for row in range(weights.shape[0]):
        line = weights[row]
        order = np.lexsort((line.indices, -line.data))[:count]
        found.append([str(words[line.indices[i]]) for i in order])
    return found


def _spare_filled(out: Path) -> None:
    """Raise ConfigError where `out` holds words of an expert: they are worth more than a run."""
    if not out.exists():
        return
    with out.open(encoding="utf-8-sig", newline="", errors="replace") as file:
        for row in csv.DictReader(file):
            if any((row.get(column) or "").strip() for column in TO_FILL):
                raise ConfigError(out, "has been filled already", todo="name another file, or move it away")


def _write_assignment(found: Embeddings, clustering: Clustering, names: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = np.empty(len(found.keys), dtype=np.int32)
    for number, members in enumerate(clustering.members):
        numbers[members] = number
    columns = [found.keys, pa.array(list(names)).take(pa.array(numbers)), clustering.distance]
    table = pa.table(dict(zip(CLUSTER_COLUMNS, columns, strict=True)), schema=arrow_schema(CLUSTER_COLUMNS))
    with write_atomic(found.folder / CLUSTERS) as file:
        pq.write_table(table, file, compression="zstd", store_schema=False)


def _rows_of(dataset: DatasetFolder, keys: set[str]) -> dict[str, dict[str, Any]]:
    """The index rows of some samples, read shard by shard."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(sorted(keys - dataset.withdrawn))
    rows: dict[str, dict[str, Any]] = {}
    for shard in dataset.manifest["shards"]:
        table = read_tables([dataset.folder / shard["name"].replace(".tar", ".parquet")], INDEX_COLUMNS)
        rows.update((row["key"], row) for row in table.filter(pc.is_in(table["key"], wanted)).to_pylist())
    return rows


def _captions(dataset: DatasetFolder, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    captions = []
    for row in rows:
        path = dataset.folder / row["shard"]
        with path.open("rb") as file:
            captions.append(read_member(file, row["text_offset"], row["text_size"], path, row["key"]).decode())
    return captions


def _write_table(
    out: Path, names: Sequence[str], sizes: Sequence[int], nearest: Sequence[Sequence[Mapping[str, Any]]],
    terms: Sequence[Sequence[str]], config: ClusterConfig,
) -> None:  # fmt: skip
    """The table as csv that Excel opens: UTF-8 with its mark, and no cell that it could take for a formula."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\r\n")
    table.writerow(TABLE_COLUMNS)
    for name, size, group, words in zip(names, sizes, nearest, terms, strict=True):
        examples = " ".join(row["key"] for row in group[: config.examples])
        table.writerow([name, size, f" {examples}" if examples.startswith("-") else examples, " ".join(words)]
                       + [""] * len(TO_FILL))  # fmt: skip
    write_bytes(out, "\ufeff".encode() + text.getvalue().encode())


def read_assignment(found: Embeddings) -> pa.Table:
    """CLUSTER_COLUMNS of the last clustering, in the order of the embeddings. Raises DataError where there is none."""
    path = found.folder / CLUSTERS
    if not path.exists():
        raise DataError(found.folder, "has no clusters yet", todo="run: biomedclip data annotate cluster")
    table = read_tables([path], CLUSTER_COLUMNS)
    if table["key"].to_pylist() != found.keys:
        raise DataError(path, "speaks of other pictures than the embeddings", todo="cluster them again")
    return table
