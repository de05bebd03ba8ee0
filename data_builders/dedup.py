"""Index tables of any number of sources in, and out for each row its duplicate cluster and whether it stays.

Rows are duplicates where their image bytes are equal, where their perceptual hashes are within a few bits and their
shapes agree, or, if asked for, where their captions are equal or nearly so. Being a duplicate is carried on from row to
row: a cluster is a connected component. Of each cluster the first row of one fixed order stays: least restricted
licence, then largest image, then source and key; so the same rows stay in whatever order the sources are given.
Captions are left out by default: sister figures of one article share theirs, and their pictures differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from biomedclip.config import Config
from biomedclip.errors import DataError, MissingExtra
from data_builders.caption_hash import hash_captions, near_captions
from data_builders.components import label_components
from data_builders.hamming import DEFAULT_DISTANCE, MAX_DISTANCE, near_pairs

if TYPE_CHECKING:
    import pyarrow as pa

LICENCE_ORDER = ("commercial-derivatives", "commercial", "noncommercial", "other", "none")
"""Licence classes, the one that allows most first."""

REASONS = ("duplicate_image", "near_duplicate_image", "duplicate_caption", "near_duplicate_caption")
"""Why a row does not stay: the strictest of these rules under which it is joined with the row that does."""

_COLUMNS = ("key", "source", "sha256", "phash", "width", "height", "licence_class", "caption_sha1", "caption")


class DedupConfig(Config):
    """Which rows count as duplicates of each other."""

    images: Literal["exact", "near"] | None = "near"
    max_distance: int = Field(default=DEFAULT_DISTANCE, ge=0, le=MAX_DISTANCE)
    """Bits in which perceptual hashes may differ; an even number, as nearly all hashes have 32 bits set."""
    max_aspect_change: float = Field(default=0.05, ge=0)
    """Near duplicates have equal width over height but for this share; strips and squares of white hash alike."""
    captions: Literal["exact", "near"] | None = None
    """Needs a column `caption`; `exact` makes do with `caption_sha1`, and then tells `CT.` from `CT`."""
    min_jaccard: float = Field(default=0.8, gt=0, le=1)
    """Shared three-word sequences over all of them, for near captions."""


def find_duplicates(tables: Sequence[pa.Table], config: DedupConfig | None = None) -> pa.Table:
    """One row for each row of the index tables, in their order: `key`, `source`, `cluster`, `kept`, `reason`.

    `cluster` (int64) is null for a row without duplicates and is otherwise made of the kept row's source and key, so
    that it is the same in any run that keeps the same row; `reason` (one of REASONS) is null for rows that stay. Raises
    DataError where a column that the config needs is missing or empty.
    """
    config = config or DedupConfig()
    pa, _ = _arrow()
    rows = pa.concat_tables([_select(table) for table in tables], promote_options="default")
    count = rows.num_rows
    if not count:
        return _no_duplicates(rows)
    labels = np.arange(count, dtype=np.int64)
    levels: list[tuple[str, np.ndarray]] = []
    for reason, joins in _joins(rows, config):
        pairs = [(labels, np.arange(count))] if levels else []
        pairs += list(joins)
        labels = label_components(count, *(np.concatenate(side) for side in zip(*pairs, strict=True)))
        levels.append((reason, labels))
    kept = _keep_first(rows, labels)
    reasons = np.zeros(count, dtype=np.int8)
    for number in range(len(levels), 0, -1):
        reached = levels[number - 1][1]
        reasons[reached == reached[kept]] = number
    stays = kept == np.arange(count)
    reasons[stays] = 0
    names = pa.array([None, *(reason for reason, _ in levels)], type=pa.string())
    return pa.table(
        {
            "key": rows["key"],
            "source": rows["source"],
            "cluster": _name_clusters(rows, kept),
            "kept": pa.array(stays),
            "reason": names.take(pa.array(reasons)),
        }
    )


def _no_duplicates(rows: pa.Table) -> pa.Table:
    pa, _ = _arrow()
    kinds = {"cluster": pa.int64(), "kept": pa.bool_(), "reason": pa.string()}
    columns = {name: pa.array([], type=kind) for name, kind in kinds.items()}
    return pa.table({"key": rows["key"], "source": rows["source"], **columns})


def set_clusters(index: pa.Table, duplicates: pa.Table) -> pa.Table:
    """The index with its `dup_cluster` column filled in. Raises DataError where rows of the two do not agree."""
    if index.num_rows != duplicates.num_rows or not index["key"].equals(duplicates["key"]):
        raise DataError("duplicates", "are not those of this index", found=f"{duplicates.num_rows} rows",
                        todo="pass the rows that find_duplicates returned for it")  # fmt: skip
    return index.set_column(index.schema.get_field_index("dup_cluster"), "dup_cluster", duplicates["cluster"])


def _select(table: pa.Table) -> pa.Table:
    pa, _ = _arrow()
    for column in ("key", "sha256", "width", "height"):
        if column not in table.column_names:
            raise DataError("index", f"has no column {column}", todo="pass the index table of a dataset folder")
    columns = {name: table[name] for name in _COLUMNS if name in table.column_names}
    for name, value in (("source", ""), ("licence_class", "none")):
        columns.setdefault(name, pa.array([value] * table.num_rows, type=pa.string()))
    return pa.table(columns)


def _joins(rows: pa.Table, config: DedupConfig) -> Iterator[tuple[str, Iterator[tuple[np.ndarray, np.ndarray]]]]:
    """The rules of a config, strictest first, each with the pairs of rows it joins."""
    if config.images is not None:
        yield REASONS[0], _equal_pairs(_codes(rows, "sha256"))
    if config.images == "near":
        yield REASONS[1], _near_image_pairs(rows, config)
    if config.captions is not None:
        exact = "caption" in rows.column_names
        if not exact and config.captions == "near":
            raise DataError("index", "has no column caption", todo="near captions need the captions themselves")
        codes = hash_captions(rows["caption"].to_pylist()) if exact else _codes(rows, "caption_sha1")
        yield REASONS[2], _equal_pairs(codes)
        if config.captions == "near":
            yield REASONS[3], _near_caption_pairs(rows, codes, config.min_jaccard)


def _codes(rows: pa.Table, column: str) -> np.ndarray:
    """A number for each value of a text column, equal where the values are. Raises DataError for missing values."""
    if column not in rows.column_names or rows[column].null_count:
        raise DataError("index", f"lacks values of {column}", todo="build the dataset again")
    codes: np.ndarray = rows[column].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    return codes


def _equal_pairs(codes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each row joined with the next of equal code."""
    order = np.argsort(codes, kind="stable")
    same = codes[order[1:]] == codes[order[:-1]]
    yield order[:-1][same], order[1:][same]


def _near_image_pairs(rows: pa.Table, config: DedupConfig) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of near hash and equal shape. Rows of equal hash and shape are joined first and stand for each other."""
    if "phash" not in rows.column_names or rows["phash"].null_count:
        raise DataError("index", "lacks values of phash", todo="build the dataset again")
    hashes = rows["phash"].to_numpy().astype(np.uint64)
    shapes = np.log(np.maximum(rows["width"].to_numpy(), 1) / np.maximum(rows["height"].to_numpy(), 1))
    order = np.lexsort((shapes, hashes))
    step = np.log1p(config.max_aspect_change) + 1e-9
    # Sorted by shape within a hash, neighbours that agree are enough to join all that do.
    near = (np.diff(hashes[order]) == 0) & (np.diff(shapes[order]) <= step)
    yield order[:-1][near], order[1:][near]
    same = (np.diff(hashes[order]) == 0) & (np.diff(shapes[order]) == 0)
    heads = order[np.append(True, ~same)]
    unique, numbers = np.unique(hashes[heads], return_inverse=True)
    starts = np.searchsorted(numbers, np.arange(len(unique) + 1))
    for left, right in near_pairs(unique, config.max_distance):
        for first, second in _nearest_shapes(left, right, numbers, starts, shapes[heads]):
            near = np.abs(shapes[heads[first]] - shapes[heads[second]]) <= step
            yield heads[first[near]], heads[second[near]]


def _nearest_shapes(
    left: np.ndarray, right: np.ndarray, numbers: np.ndarray, starts: np.ndarray, shapes: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each head of one hash beside that of the other hash whose shape is nearest from below, and from above.

    Those two are enough: between them and the farthest that still agrees, rows of the other hash are joined among
    themselves. Comparing all with all would be the product of both, and a blank page comes in every shape.
    """
    _, ranks = np.unique(shapes, return_inverse=True)
    span = np.int64(ranks.max() + 1 if len(ranks) else 1)
    places = numbers * span + ranks  # sorted, as the heads are by hash and then by shape
    counts = starts[left + 1] - starts[left]
    first = np.repeat(starts[left] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    other = np.repeat(right, counts)
    above = np.searchsorted(places, other * span + ranks[first])
    for second in (above - 1, above):
        inside = (second >= starts[other]) & (second < starts[other + 1])
        yield first[inside], second[inside]


def _near_caption_pairs(
    rows: pa.Table, codes: np.ndarray, min_jaccard: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    _, firsts = np.unique(codes, return_index=True)
    captions = rows["caption"].take(firsts).to_pylist()
    pairs = np.array(list(near_captions(captions, min_jaccard)), dtype=np.int64).reshape(-1, 2)
    yield firsts[pairs[:, 0]], firsts[pairs[:, 1]]


def _keep_first(rows: pa.Table, labels: np.ndarray) -> np.ndarray:
    """For each row the row of its cluster that stays."""
    import pyarrow.compute as pc

    pa, _ = _arrow()
    classes = rows["licence_class"].combine_chunks().dictionary_encode()
    names = classes.dictionary.to_pylist()
    # A class that is not known is the last of all, like one that is not stated.
    ranks = np.array([LICENCE_ORDER.index(name) if name in LICENCE_ORDER else len(LICENCE_ORDER) for name in names])
    indices = classes.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)
    order_table = pa.table(
        {
            "licence": np.append(ranks, len(LICENCE_ORDER))[indices],
            "area": -rows["width"].to_numpy().astype(np.int64) * rows["height"].to_numpy(),
            "source": rows["source"],
            "key": rows["key"],
        }
    )
    sort_keys: Any = [(name, "ascending") for name in order_table.column_names]
    order = pc.sort_indices(order_table, sort_keys=sort_keys).to_numpy()
    place = np.empty(len(labels), dtype=np.int64)
    place[order] = np.arange(len(labels))
    first = np.full(len(labels), len(labels), dtype=np.int64)
    np.minimum.at(first, labels, place)
    kept: np.ndarray = order[first[labels]]
    return kept


def _name_clusters(rows: pa.Table, kept: np.ndarray) -> pa.Array:
    """The cluster of each row as int64; null where a row is alone."""
    pa, _ = _arrow()
    count = len(kept)
    sizes = np.bincount(kept, minlength=count)
    heads = np.flatnonzero(sizes > 1)
    names = np.zeros(count, dtype=np.int64)
    chosen = rows.select(["source", "key"]).take(heads).to_pylist()
    for head, row in zip(heads.tolist(), chosen, strict=True):
        digest = hashlib.sha256(f"{row['source']}\n{row['key']}".encode()).digest()
        names[head] = int.from_bytes(digest[:8], "big") >> 1
    return pa.array(names[kept], mask=sizes[kept] < 2)


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtra("build", "pyarrow") from None
    return pa, pq
