"""Resuming on an index of 24 million rows: seconds until the first batch is known, and the memory it took.

`write_index` makes a dataset folder with the indexes of 2,400 shards and no shards, in a minute or more and 2 GB.
`measure_resume` starts processes of their own that resume a run in the middle of its fourth epoch and say how long it
took until everything that reading the batch needs (keys, places of the pictures) was known. `measure` does both.

    python tests/benchmarks/stream_24m.py [ROWS]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from biomedclip.files import sha256_file, write_json
from biomedclip.shards import arrow_schema

ROWS, SHARD_ROWS = 24_000_000, 10_000
COLUMNS = {
    "key": "string", "shard": "string", "image_offset": "int64", "image_size": "int64", "image_format": "string",
    "image_crc32": "uint32", "text_offset": "int64", "text_size": "int64", "json_offset": "int64",
    "json_size": "int64", "caption_sha1": "string", "num_captions": "int32", "article_id": "string",
    "modality": "string", "licence": "string", "split": "string", "labels": "list<string>", "concepts": "list<string>",
}  # fmt: skip

RESUME = """
import json, resource, sys, time
import biomedclip.stream.loader, biomedclip.stream.samples, torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began, cpu = time.perf_counter(), time.process_time()
from biomedclip.stream.fetch import FetchConfig
from biomedclip.stream.plan import Plan
from biomedclip.stream.rows import StreamSource, read_rows
from biomedclip.stream.tars import FetcherHere
folder, cache, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
fetcher = FetcherHere(FetchConfig(cache=cache))
rows, sources, names = read_rows([StreamSource(name="pmc", path=folder)], 0.0, fetcher)
plan = Plan(sources, batch_size=4096, seed=0)
identity = plan.sha256
batch = plan.picks(step)
needed = [(rows[p.source].columns["key"][p.row], rows[p.source].columns["image_offset"][p.row],
           rows[p.source].columns["image_size"][p.row]) for p in batch]
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
articles = rows[0].place.index.kin(batch.rows)[0]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "cpu_s": cpu, "peak_gb": peak * 1024 / 1e9, "imports_gb": before * 1024 / 1e9,
                  "samples": len(set(needed)), "articles": len(set(articles.tolist())), "epoch": int(batch.epochs[0]),
                  "rows": len(sources[0]), "plan": identity}))
"""


def write_index(folder: Path, rows: int = ROWS) -> Path:
    """A dataset folder of so many rows, five of an article, as far as its indexes and manifest go."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, files = [], {}
    for number in range(rows // SHARD_ROWS):
        name = f"{number:05d}"
        pq.write_table(_index(number), folder / f"{name}.parquet", compression="zstd", store_schema=False)
        files[f"{name}.parquet"] = sha256_file(folder / f"{name}.parquet")
        shards.append({"name": f"{name}.tar", "split": "train", "samples": SHARD_ROWS, "bytes": 0, "sha256": ""})
    manifest = {"format": 1, "name": "synthetic", "samples": rows, "splits": {"train": rows}, "shards": shards,
                "files": files, "provenance": {}}  # fmt: skip
    write_json(folder / "manifest.json", manifest)
    return folder


def _index(number: int) -> pa.Table:
    random = np.random.default_rng(number)
    ids = np.arange(number * SHARD_ROWS, (number + 1) * SHARD_ROWS)
    sizes = random.integers(20_000, 100_000, SHARD_ROWS)
    offsets = np.concatenate([[0], np.cumsum(sizes + 2560)[:-1]]) + 512
    sha1 = random.integers(0, 256, (SHARD_ROWS, 20), dtype=np.uint8).tobytes().hex()
    empty = pa.array([[]] * SHARD_ROWS, pa.list_(pa.string()))
    table = {
        "key": [f"pmc{i // 5:08d}-f{i % 5}" for i in ids.tolist()], "shard": [f"{number:05d}.tar"] * SHARD_ROWS,
        "image_offset": offsets, "image_size": sizes, "image_format": ["jpg"] * SHARD_ROWS,
        "image_crc32": random.integers(0, 1 << 32, SHARD_ROWS, dtype=np.uint32), "text_offset": offsets + sizes + 512,
        "text_size": np.full(SHARD_ROWS, 400), "json_offset": offsets + sizes + 1536,
        "json_size": np.full(SHARD_ROWS, 500),
        "caption_sha1": [sha1[40 * i : 40 * i + 40] for i in range(SHARD_ROWS)],
        "num_captions": np.ones(SHARD_ROWS, dtype=np.int32), "article_id": [f"PMC{i // 5}.1" for i in ids.tolist()],
        "modality": ["figure"] * SHARD_ROWS, "licence": ["CC BY"] * SHARD_ROWS, "split": ["train"] * SHARD_ROWS,
        "labels": empty, "concepts": empty,
    }  # fmt: skip
    return pa.table({name: pa.array(values) for name, values in table.items()}).cast(arrow_schema(COLUMNS))


def measure_resume(folder: Path, cache: Path, *, rows: int = ROWS, runs: int = 3) -> dict[str, Any]:
    """Median seconds and peak GB of resuming on an index made by `write_index`; the first start beside them."""
    step = int(3.4 * rows) // 4096

    def resume() -> dict[str, Any]:
        done = subprocess.run([sys.executable, "-c", RESUME, str(folder), str(cache), str(step)], check=True,
                              capture_output=True, text=True)  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    first = resume()
    again = [resume() for _ in range(runs)]
    return {
        "resume_24m_s": round(statistics.median(run["seconds"] for run in again), 2),
        "resume_24m_gb": round(max(run["peak_gb"] for run in [first, *again]), 2),
        "resume_24m_cpu_s": round(statistics.median(run["cpu_s"] for run in again), 2),
        "resume_24m_first_s": round(first["seconds"], 2),
        "resume_24m_imports_gb": round(first["imports_gb"], 2),
        "resume_24m_rows": first["rows"],
    }


def measure(rows: int = ROWS) -> dict[str, Any]:
    """The figures of a new index of so many rows, below the folder for temporary files."""
    with tempfile.TemporaryDirectory(prefix="stream-24m-") as folder:
        began = time.perf_counter()
        index = write_index(Path(folder) / "set", rows)
        print(f"wrote the index in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        return measure_resume(index, Path(folder) / "cache", rows=rows)


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else ROWS)))
