"""Made-up perceptual hashes and index rows for the tests of duplicates and contamination."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa


def near_hashes(random: np.random.Generator, count: int, *, alike: int, spread: int = 16) -> np.ndarray:
    """Random hashes of which some are copies with a few bits turned; a low `spread` crowds them."""
    hashes = random.integers(0, 2**spread, count, dtype=np.uint64) << np.uint64(64 - spread)
    hashes |= random.integers(0, 2**20, count, dtype=np.uint64)
    for _ in range(alike):
        i, j = random.integers(0, count, 2)
        turned = random.choice(64, random.integers(0, 9), replace=False)
        hashes[i] = hashes[j] ^ np.bitwise_or.reduce(np.uint64(1) << turned.astype(np.uint64))
    return hashes


def index_row(key: str, **changes: object) -> dict[str, object]:
    """One row of an index, a duplicate of no other but for what `changes` says."""
    digest = hashlib.sha256(key.encode()).digest()
    return {
        "key": key, "source": "pmc", "sha256": key, "phash": int.from_bytes(digest[:8], "big"), "width": 100,
        "height": 100, "licence_class": "commercial-derivatives", "caption_sha1": key, "caption": f"picture {key}",
    } | changes  # fmt: skip


def index_table(*rows: dict[str, object]) -> pa.Table:
    """Rows as an index table."""
    texts = ("key", "source", "sha256", "licence_class", "caption_sha1", "caption")
    numbers = {"phash": pa.uint64(), "width": pa.int32(), "height": pa.int32()}
    schema = pa.schema([*((name, pa.string()) for name in texts), *numbers.items()])
    return pa.Table.from_pylist(list(rows), schema=schema)
