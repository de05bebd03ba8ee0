"""Search over a million figures: milliseconds a query beside FAISS and numpy that compare everything, recall, building.

The vectors are random ones of mini's width, stored as if a model had made them: search and building do not look at what
they mean, and random directions are the hardest to quantise. A second set has the shape of real embeddings (a common
direction, clusters, few strong directions; queries from another cone, as texts are), for recall alone. Ours is all that
follows the embedding of a query: scan, exact comparison from disk, rows and captions of ten hits out of a dataset of a
hundred shards. Medians of one query at a time, on files that were just written, so without waits for a disk.

SEARCH_BENCH_VECTORS=100000 makes it ten times smaller, for a first look.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

TOTAL = int(os.environ.get("SEARCH_BENCH_VECTORS", "1000000"))
DIM = 256
TOP = 10
QUERIES = 100
SHARD = 10_000


def measure_search() -> dict[str, float]:
    """All figures; times are medians a query, on as many threads as libraries take."""
    return measure_random() | {"search_recall_10_lifelike": round(measure_lifelike(), 4)}


def measure_random() -> dict[str, float]:
    """Milliseconds, recall and rates among random vectors."""
    import faiss

    from biomedclip.app.search import open_index

    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder, cache = Path(temporary) / "shards", Path(temporary) / "cache"
        encoder = make_encoder()
        vectors = unit(random.standard_normal((TOTAL, DIM), dtype=np.float32))
        queries = unit(random.standard_normal((QUERIES, DIM), dtype=np.float32))
        write_dataset(folder)
        store_vectors(folder, cache, encoder, vectors)
        begun = time.perf_counter()
        index = open_index(folder, encoder, cache=cache)
        build_s = time.perf_counter() - begun
        begun = time.perf_counter()
        index = open_index(folder, encoder, cache=cache)
        open_s = time.perf_counter() - begun
        if len(index) != TOTAL or index.is_exact:
            raise SystemExit(f"the index has {len(index)} vectors, compared exactly: {index.is_exact}")
        best = rank_exactly(vectors, queries)
        ours, hits = time_each(lambda query: [int(hit.key[1:]) for hit in index.search_vector(query, TOP)], queries)
        flat = faiss.IndexFlatIP(DIM)
        flat.add(vectors)
        theirs, _ = time_each(lambda query: flat.search(query[None], TOP)[1][0], queries[:30])
        plain, _ = time_each(lambda query: np.argpartition(vectors @ query, -TOP)[-TOP:], queries[:30])
    return {
        "search_1m_ms": round(ours, 1), "search_faiss_flat_1m_ms": round(theirs, 1),
        "search_numpy_1m_ms": round(plain, 1), "search_vs_faiss_flat": round(theirs / ours, 1),
        "search_recall_10": round(recall(hits, best), 4),
        "search_build_vectors_per_s": round(TOTAL / build_s), "search_open_1m_s": round(open_s, 2),
    }  # fmt: skip


def measure_lifelike() -> float:
    """Recall among vectors and queries of the shape that embeddings have."""
    from biomedclip.app.nearest import TRAINING_VECTORS, Coded, write_codes

    random = np.random.default_rng(1)
    spectrum = (1 / np.sqrt(1 + np.arange(DIM))).astype(np.float32)
    centres = random.standard_normal((2_000, DIM), dtype=np.float32) * spectrum
    common, apart = (random.standard_normal(DIM, dtype=np.float32) for _ in range(2))
    vectors = np.empty((TOTAL, DIM), np.float32)
    for start in range(0, TOTAL, SHARD):
        block = vectors[start : start + SHARD]
        block[:] = random.standard_normal(block.shape, dtype=np.float32) * spectrum
        block += centres[random.integers(0, len(centres), len(block))] + 0.2 * common
        block[:] = unit(block)
    topics = centres[random.integers(0, len(centres), QUERIES)]
    queries = unit(topics + random.standard_normal((QUERIES, DIM), dtype=np.float32) * spectrum + 0.2 * apart)
    with tempfile.TemporaryDirectory() as temporary:
        sample = vectors[random.choice(TOTAL, min(TOTAL, TRAINING_VECTORS), replace=False)]
        blocks = (vectors[start : start + SHARD] for start in range(0, TOTAL, SHARD))
        write_codes(Path(temporary), DIM, TOTAL, sample, blocks)
        index = Coded(Path(temporary), DIM, TOTAL, lambda places: vectors[places])
        found = [index.search(query, TOP)[1] for query in queries]
    return recall(found, rank_exactly(vectors, queries))


def write_dataset(folder: Path) -> None:
    """A dataset folder whose shards are one shard's bytes under many names, each with an index of its own keys.

    Only what search reads is true of it: a million made-up pictures would measure the writer instead.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from biomedclip.schema import Pair
    from biomedclip.shards import MANIFEST, DatasetWriter

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    data = buffer.getvalue()
    count = min(SHARD, TOTAL)
    with DatasetWriter(folder, name="million") as writer:
        for number in range(count):
            writer.add(
                Pair(key=f"k{number:08d}", image=data, image_format="png", width=8, height=8, source="pmc", phash=0,
                     caption=f"Figure {number}. A caption of the usual length. " * 8, licence="CC BY",
                     sha256=hashlib.sha256(data).hexdigest(), article_id=f"PMC{number}.1", figure_id="F1")
            )  # fmt: skip
        manifest = writer.finish(provenance={}, card=lambda manifest: "made up")
    first = manifest["shards"][0]
    table = pq.read_table(folder / "00000.parquet")
    shards = []
    for number in range(TOTAL // count):
        name = f"{number:05d}"
        keys = pa.array([f"k{number * count + place:08d}" for place in range(count)])
        own = table.set_column(0, "key", keys).set_column(1, "shard", pa.array([f"{name}.tar"] * count))
        pq.write_table(own, folder / f"{name}.parquet", compression="zstd")
        if number:
            os.link(folder / "00000.tar", folder / f"{name}.tar")
        shards.append({**first, "name": f"{name}.tar", "sha256": hashlib.sha256(name.encode()).hexdigest()})
    manifest |= {"shards": shards, "samples": count * len(shards), "splits": {"train": count * len(shards)}}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def make_encoder():
    """An Encoder of no model: the embeddings are there already, and only their place in the cache is asked of it."""
    import torch

    from biomedclip.app.encoder import Encoder

    encoder = object.__new__(Encoder)
    encoder.name, encoder.model, encoder.preprocess = "random", torch.nn.Linear(1, 1), str
    return encoder


def store_vectors(folder: Path, cache: Path, encoder, vectors: np.ndarray) -> None:
    """Put the vectors where embedding the shards would have put them."""
    from biomedclip.app.shard_vectors import cache_of, write_shard_vectors
    from biomedclip.shards import DatasetFolder

    home = cache_of(encoder, cache)
    shards = DatasetFolder(folder).manifest["shards"]
    for shard, block in zip(shards, np.array_split(vectors, len(shards)), strict=True):
        write_shard_vectors(home, shard, block)


def time_each(search: Callable[[np.ndarray], object], queries: np.ndarray) -> tuple[float, list]:
    """(median milliseconds, what was found) of queries, one after the other, after three that nobody counts."""
    for query in queries[:3]:
        search(query)
    times, found = [], []
    for query in queries:
        begun = time.perf_counter()
        found.append(search(query))
        times.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(times), found


def rank_exactly(vectors: np.ndarray, queries: np.ndarray) -> list[np.ndarray]:
    """Numbers of the TOP nearest vectors of each query, in float32, all compared."""
    scores = queries @ vectors.T
    return [np.argpartition(row, -TOP)[-TOP:] for row in scores]


def recall(found: list, best: list[np.ndarray]) -> float:
    """Share of the true TOP among those found."""
    return float(np.mean([len(set(map(int, f)) & set(map(int, b))) / TOP for f, b in zip(found, best, strict=True)]))


def unit(vectors: np.ndarray) -> np.ndarray:
    """The rows at length 1, in place."""
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


if __name__ == "__main__":
    print(json.dumps(measure_search()))
