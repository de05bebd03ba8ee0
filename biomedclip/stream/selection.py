"""Which samples of a source are used, in which parts: split, tombstones, `where`, caps and balance, over the index.

Reads only the columns that the choice needs, shard by shard, and yields row numbers and small integer columns: no
pixel is read and no shard rewritten. A choice over many rows is kept in the cache folder under a hash of everything it
depends on, so a resumed run does not ask again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from biomedclip.errors import DataError
from biomedclip.files import sha256_json, write_bytes
from biomedclip.predicates import check_columns, check_predicate, rows_where
from biomedclip.shards import ARTICLE_COLUMNS, arrow_schema
from biomedclip.stream.columns import ShardIndex
from biomedclip.stream.members import Caps
from biomedclip.stream.parts import Part, RowNumbers, Selection, read_selection, selection_bytes

if TYPE_CHECKING:
    import pyarrow as pa

    from biomedclip.stream.source import Place

WORTH_KEEPING = 100_000
"""Rows from which on a choice is kept in the cache folder."""

_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is chosen of a source, as the config says it."""

    split: str = "train"
    where: str | None = None
    caps: Mapping[str, int] = field(default_factory=dict)
    """The most samples of each `label` and `concept` in an epoch."""
    balance: bool | Literal["weights"] = False


def select_rows(place: Place, name: str, choice: Choice, cache: Path) -> Selection:
    """The rows of a source that its config chooses.

    Raises DataError where nothing is left, ConfigError for a predicate that is none or names unknown columns.
    """
    where = f"data.sources: {name}: where"
    if choice.where is not None:
        columns = check_predicate(choice.where, where)
        check_columns(columns, [*place.index.schema.names, *(["article"] if place.dataset else [])], where)
    facts = {
        "version": _VERSION, "index": place.index.sha256, "split": choice.split, "where": choice.where,
        "caps": dict(choice.caps), "balance": choice.balance, "withdrawn": _hash_withdrawn(place),
        "class_weights": _class_weights(place) if choice.balance == "weights" else None,
        "annotations": place.annotations_sha256 if choice.where and "annotation_" in choice.where else None,
    }  # fmt: skip
    sha256 = sha256_json(facts)
    path = cache / "selection" / f"{sha256[:32]}.npz"
    selection = read_selection(path, name, sha256)
    if selection is None:
        selection = _select(place, name, choice, sha256)
        if len(place.index) >= WORTH_KEEPING:
            # An unwritable cache costs the same choice next time, and nothing now.
            with suppress(OSError):
                write_bytes(path, selection_bytes(selection, name))
    return selection


def _select(place: Place, name: str, choice: Choice, sha256: str) -> Selection:
    index = place.index
    chosen = _rows_of_split(place, choice.split)
    if not len(chosen):
        found = ", ".join(sorted(place.splits)) or "no samples"
        raise DataError(place.where, f"has no samples of split '{choice.split}'", found=found)
    if choice.where is not None or place.withdrawn:
        mask = _mask(index, chosen)
        if place.withdrawn:
            mask &= ~_withdrawn(place)
        if choice.where is not None:
            mask &= _rows_where(place, choice.where, f"data.sources: {name}: where")
        chosen = np.flatnonzero(mask).astype(_row_type(index))
        if not len(chosen):
            reason = "its where is true of none" if choice.where is not None else "all were taken back"
            raise DataError(place.where, f"has no samples left of split '{choice.split}'", found=reason)
    labels = _ListColumn.read(index, "labels", chosen)
    caps = _cap_rows(index, chosen, labels, choice.caps)
    names = tuple(sorted(labels.names[code] for code in set(labels.codes.tolist())))
    most = int(labels.lengths.max(initial=0))
    parts = tuple(
        Part(part, share, chosen if members is None else _take(chosen, members), _caps_of(caps, members))
        for part, share, members in _parts(place, name, choice, labels)
    )
    return Selection(parts, names, most, sha256)


@dataclass(frozen=True, slots=True)
class _ListColumn:
    """A column of lists of texts as integers: the lists end to end, how long each is, and the text of each code."""

    codes: np.ndarray
    lengths: np.ndarray
    names: tuple[str, ...]

    @property
    def firsts(self) -> np.ndarray:
        """(N,) the first code of each list, -1 for an empty one."""
        found = np.full(len(self.lengths), -1, dtype=np.int64)
        full = self.lengths > 0
        found[full] = self.codes[(np.cumsum(self.lengths) - self.lengths)[full]]
        return found

    @classmethod
    def read(cls, index: ShardIndex, column: str, rows: RowNumbers) -> _ListColumn:
        import pyarrow as pa
        import pyarrow.compute as pc

        known: dict[str, int] = {}
        codes, lengths = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.int32)]
        for shard, local in _by_shard(index, rows):
            values = index.read(shard, [column])[column].combine_chunks()
            if local is not None:
                values = values.take(pa.array(local))
            lengths.append(pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int32))
            flat = values.flatten().dictionary_encode()
            here = [known.setdefault(text, len(known)) for text in flat.dictionary.to_pylist()]
            codes.append(np.array(here, dtype=np.int32)[flat.indices.to_numpy()] if here else codes[0])
        return cls(np.concatenate(codes), np.concatenate(lengths), tuple(known))


def _rows_of_split(place: Place, split: str) -> RowNumbers:
    """Row numbers of a split: a shard of ours holds one split only, foreign tars are `train`."""
    if place.dataset is None:
        return range(len(place.index)) if split == "train" else range(0)
    bounds = place.index.bounds.tolist()
    spans: list[list[int]] = []
    for number, shard in enumerate(place.dataset.manifest["shards"]):
        if shard["split"] == split:
            if spans and spans[-1][1] == bounds[number]:
                spans[-1][1] = bounds[number + 1]
            else:
                spans.append([bounds[number], bounds[number + 1]])
    if len(spans) <= 1:
        return range(*spans[0]) if spans else range(0)
    return np.concatenate([np.arange(*span, dtype=_row_type(place.index)) for span in spans])


def _rows_where(place: Place, predicate: str, where: str) -> np.ndarray:
    """(N,) bool over all rows: where the predicate is true. `article` is a struct of the article's facts."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = {name.lower() for name in check_predicate(predicate, where)}
    fields = [field for field in place.index.schema if field.name.lower() in wanted]
    with_articles = "article" in wanted and place.dataset is not None
    columns = [field.name for field in fields] or ["key"]
    schema = pa.schema(fields or [place.index.schema.field("key")])
    if not with_articles:
        return rows_where(predicate, schema, place.index.batches(columns), where)
    articles = place.articles()
    ids = articles["article_id"].combine_chunks()
    schema = schema.append(pa.field("article", pa.struct(list(arrow_schema(ARTICLE_COLUMNS)))))

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in place.index.batches([*columns, *([] if "article_id" in columns else ["article_id"])]):
            places = pc.index_in(batch["article_id"], value_set=ids, skip_nulls=True)
            facts = articles.take(places).to_struct_array().combine_chunks()
            yield pa.RecordBatch.from_arrays([*(batch[name] for name in columns), facts], schema=schema)

    return rows_where(predicate, schema, batches(), where)


def _withdrawn(place: Place) -> np.ndarray:
    """(N,) bool over all rows: taken back by a tombstone."""
    import pyarrow as pa
    import pyarrow.compute as pc

    keys = pa.array(sorted(place.withdrawn), pa.string())
    parts = [pc.is_in(batch["key"], value_set=keys).to_numpy(zero_copy_only=False) for batch in
             place.index.batches(["key"])]  # fmt: skip
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.bool_)


def _cap_rows(index: ShardIndex, rows: RowNumbers, labels: _ListColumn, caps: Mapping[str, int]) -> _CapOfRows | None:
    """The value that limits each row most: of its labels and concepts, the one with most rows for its cap.

    All rows of one value are at most as limited as the value itself, so an epoch holds no value more often than its
    cap says, however many values a sample has.
    """
    kinds = [(kind, cap, labels if kind == "label" else _ListColumn.read(index, "concepts", rows))
             for kind, cap in sorted(caps.items())]  # fmt: skip
    ranked: list[tuple[float, str, str, int, int]] = []
    for number, (kind, cap, column) in enumerate(kinds):
        ranked += [(cap / count, kind, column.names[code], number, code)
                   for code, count in enumerate(np.bincount(column.codes).tolist()) if count > cap]  # fmt: skip
    if not ranked:
        return None
    ranked.sort()
    limit = np.full(len(rows), len(ranked), dtype=np.int32)
    for number, (_, _, column) in enumerate(kinds):
        rank_of = np.full(len(column.names), len(ranked), dtype=np.int32)
        for rank, (*_, own, code) in enumerate(ranked):
            if own == number:
                rank_of[code] = rank
        full = np.flatnonzero(column.lengths)
        if len(full):
            starts = (np.cumsum(column.lengths) - column.lengths)[full]
            limit[full] = np.minimum(limit[full], np.minimum.reduceat(rank_of[column.codes], starts))
    limit[limit == len(ranked)] = -1
    return _CapOfRows(limit, np.array([ratio for ratio, *_ in ranked]))


@dataclass(frozen=True, slots=True)
class _CapOfRows:
    """The cap group of each chosen row, -1 for none, and the share of each group that an epoch takes."""

    groups: np.ndarray
    ratios: np.ndarray


def _caps_of(caps: _CapOfRows | None, members: np.ndarray | None) -> Caps | None:
    """The caps of a part's rows; a part has only some of the rows of a group, and the same share of them."""
    if caps is None:
        return None
    groups = caps.groups if members is None else caps.groups[members]
    used, inside = np.unique(groups[groups >= 0], return_inverse=True)
    if not len(used):
        return None
    renamed = np.full(len(groups), -1, dtype=np.int32)
    renamed[groups >= 0] = inside
    sizes = np.bincount(inside)
    taken = np.maximum(np.floor(sizes * caps.ratios[used] + 1e-9), 1).astype(np.int64)
    return Caps(renamed, taken)


def _parts(
    place: Place, name: str, choice: Choice, labels: _ListColumn
) -> list[tuple[str, float, np.ndarray | None]]:  # fmt: skip
    """Name, share and places among the chosen rows of each part; None for all of them."""
    if not choice.balance:
        return [(name, 1.0, None)]
    if choice.balance == "weights":
        # Samples of one weight are used equally often: shuffled together, no class of them needs slots of its own.
        weights = _stored_weights(place, labels)
        whole = float(weights.sum())
        return [
            (f"{name}/{weight:g}", weight * int((weights == weight).sum()) / whole, np.flatnonzero(weights == weight))
            for weight in sorted(set(weights.tolist()), key=lambda weight: f"{name}/{weight:g}")
        ]
    firsts = labels.firsts
    codes = sorted(set(firsts.tolist()), key=lambda code: labels.names[code] if code >= 0 else "")
    return [
        (f"{name}/{labels.names[code] if code >= 0 else ''}", 1 / len(codes), np.flatnonzero(firsts == code))
        for code in codes
    ]


def _class_weights(place: Place) -> dict[str, float]:
    manifest = place.dataset.manifest if place.dataset else {}
    balance = manifest.get("provenance", {}).get("balance")
    if not balance:
        raise DataError(place.where, "was compiled without class weights", todo="build it from a recipe with balance, "
                        "or use balance: true")  # fmt: skip
    weights: dict[str, float] = balance["class_weights"]
    return weights


def _stored_weights(place: Place, labels: _ListColumn) -> np.ndarray:
    """(N,) the weight of each sample: the largest class weight of its labels. Raises DataError where there are none."""
    weights = _class_weights(place)
    # A class that the training images lacked when the set was compiled has no weight, and is used as it comes.
    of_code = np.array([weights.get(label, 1.0) for label in labels.names], dtype=np.float64)
    found = np.full(len(labels.lengths), weights.get("", 1.0), dtype=np.float64)
    full = np.flatnonzero(labels.lengths)
    if len(full):
        starts = (np.cumsum(labels.lengths) - labels.lengths)[full]
        found[full] = np.maximum.reduceat(of_code[labels.codes], starts)
    return found


def _by_shard(index: ShardIndex, rows: RowNumbers) -> Iterator[tuple[int, np.ndarray | None]]:
    """Each shard that holds some of the rows, and their places in it; None for all of the shard."""
    bounds = index.bounds.tolist()
    for shard, (start, stop) in enumerate(pairwise(bounds)):
        if isinstance(rows, range):
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                yield shard, None if (first, last) == (start, stop) else np.arange(first - start, last - start)
            continue
        first, last = np.searchsorted(rows, [start, stop]).tolist()
        if last > first:
            yield shard, rows[first:last] - start


def _mask(index: ShardIndex, rows: RowNumbers) -> np.ndarray:
    mask = np.zeros(len(index), dtype=np.bool_)
    if isinstance(rows, range):
        mask[rows.start : rows.stop] = True
    else:
        mask[rows] = True
    return mask


def _take(rows: RowNumbers, places: np.ndarray) -> np.ndarray:
    if isinstance(rows, range):
        return places + rows.start
    return rows[places]


def _row_type(index: ShardIndex) -> type[np.signedinteger[Any]]:
    return np.int32 if len(index) < 1 << 31 else np.int64


def _hash_withdrawn(place: Place) -> str | None:
    if not place.withdrawn:
        return None
    return hashlib.sha256("\n".join(sorted(place.withdrawn)).encode()).hexdigest()
