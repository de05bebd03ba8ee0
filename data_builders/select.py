"""Folders of units in, one parquet out that says of every pair whether it is selected, and why not.

All decisions between harvesting and packing are made here, over columns and before a byte of an image is moved: what
the config excludes, filters, looks up in hash files of evaluation sets and compares for duplicates over all sources at
once. Every pair seen is one row, selected or with exactly one of REASONS: the first that applies, in their order. Rows
pass by unit by unit; only the columns that duplicates are found by are held in memory.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import biomedclip
from biomedclip.errors import ConfigError, DataError
from biomedclip.files import explain_full_disk, remove_leftovers, sha256_file, sha256_json, write_atomic
from biomedclip.licences import is_allowed
from biomedclip.predicates import check_predicate, rows_where
from biomedclip.progress import Progress, silent
from biomedclip.schema import SPLITS
from biomedclip.shards import ARTICLE_COLUMNS, arrow_schema, read_tables
from data_builders.caption_quality import make_caption_rules
from data_builders.contamination import contamination
from data_builders.dedup import REASONS as DUPLICATE_REASONS
from data_builders.dedup import DedupConfig, find_duplicates
from data_builders.filters import make_rules, refuse_rows
from data_builders.selection import (
    REASONS,
    SELECTION_COLUMNS,
    SELECTION_FORMAT,
    SELECTION_KEY,
    Raw,
    SelectConfig,
    Selection,
    TimeSplit,
    first_day,
)
from data_builders.units import HARVEST, PAIR_COLUMNS, UnitRecord, fingerprint_units, missing_units, read_units

if TYPE_CHECKING:
    import pyarrow as pa

_GROUP_ROWS = 20_000
_NARROW = ("key", "source", "sha256", "phash", "width", "height", "licence_class")
_DECIDING = (*_NARROW, "article_id", "licence", "caption", "published", "split")


def select(
    raws: Sequence[str | Path], out: str | Path, config: SelectConfig, *, progress: Progress = silent
) -> Selection:
    """Write the selection of all pairs of some folders of units to `out`, and return what it says of itself.

    Raises ConfigError where the config does not fit the pairs, DataError where a folder is damaged or owes units.
    """
    out = Path(out)
    sources = [(Path(raw), read_units(raw)) for raw in raws]
    if not config.allow_unfinished and (owed := missing_units([raw for raw, _ in sources])):
        raise DataError(raws[0], "lacks units of its plan", found=f"{len(owed)}, such as {owed[0]}",
                        todo="finish the harvest, or: --set allow_unfinished=true")  # fmt: skip
    units = [(number, record) for number, (_, records) in enumerate(sources) for record in records if record.kept]
    rows = _Rows(sum(record.kept for _, record in units))
    if config.where is not None:
        rows.refuse("where", ~_ask_where(config.where, units, progress))
    left = _Left(_judge_units(rows, units, config, progress))
    if config.against:
        _match(rows, left.of(rows), config)
    _find_repeated_keys(rows, left.of(rows))
    _find_duplicates(rows, left.of(rows), config.dedup)
    selection = _describe(out, sources, config, rows)
    with explain_full_disk(out):
        remove_leftovers(out.parent, of=out.name)
        _write(out, selection, rows, units, config, progress)
    return selection


class _Rows:
    """What is decided of each row so far."""

    def __init__(self, count: int) -> None:
        self.codes = np.zeros(count, dtype=np.int8)
        """0, or n for REASONS[n - 1]."""
        self.split = np.zeros(count, dtype=np.int8)
        """Position in SPLITS."""
        self.cluster = np.zeros(count, dtype=np.int64)
        self.in_cluster = np.zeros(count, dtype=np.bool_)
        self.matches: dict[int, list[str]] = {}
        self.contamination: dict[str, dict[str, int]] = {}

    def refuse(self, reason: str, mask: np.ndarray, at: slice = slice(None)) -> None:
        """Give the rows of a mask a reason, where they have none of an earlier rule."""
        code, codes = REASONS.index(reason) + 1, self.codes[at]
        codes[mask & ((codes == 0) | (codes > code))] = code

    def refuse_at(self, reason: str, places: np.ndarray) -> None:
        """Give rows that have none a reason."""
        self.codes[places] = REASONS.index(reason) + 1


class _Left:
    """The rows that no rule has refused so far: the columns that sets of rows are judged by, and their positions."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.places = np.arange(table.num_rows)

    def of(self, rows: _Rows) -> _Left:
        """Itself, without the rows that have been refused meanwhile."""
        stays = rows.codes[self.places] == 0
        if not stays.all():
            self.table, self.places = self.table.filter(stays), self.places[stays]
        return self


Units = Sequence[tuple[int, UnitRecord]]


def _ask_where(predicate: str, units: Units, progress: Progress) -> np.ndarray:
    import pyarrow as pa

    schema, article = arrow_schema(PAIR_COLUMNS), arrow_schema(ARTICLE_COLUMNS)
    with_articles = "article" in check_predicate(predicate)
    if with_articles:
        schema = schema.append(pa.field("article", pa.struct(list(article))))

    def batches() -> Iterator[pa.RecordBatch]:
        with progress("asking where", len(units)) as advance:
            for _, record in units:
                table = _read_pairs(record, tuple(PAIR_COLUMNS))
                if with_articles:
                    facts = _article_facts(record, table, article.names)
                    table = table.append_column("article", pa.chunked_array([facts.to_struct_array().combine_chunks()]))
                yield from table.combine_chunks().to_batches()
                advance()

    return rows_where(predicate, schema, batches())


def _judge_units(rows: _Rows, units: Units, config: SelectConfig, progress: Progress) -> pa.Table:
    """Ask the rules that need one row at a time; the columns that the others need, of all rows."""
    import pyarrow as pa

    excluded = _read_exclusions(config.exclude_articles)
    rules = (*make_rules(config.filters), *make_caption_rules(config.captions))
    rules = tuple(sorted(rules, key=lambda rule: REASONS.index(rule.reason)))
    kept_columns = [*_NARROW, *(["caption"] if config.dedup.captions else [])]
    narrow, start = [arrow_schema({name: PAIR_COLUMNS[name] for name in kept_columns}).empty_table()], 0
    with progress("filtering", len(units)) as advance:
        for _, record in units:
            table = _read_pairs(record, _DECIDING)
            at = slice(start, start + table.num_rows)
            start = at.stop
            if excluded or config.languages is not None:
                facts = _article_facts(record, table, ("language", "doi"))
                rows.refuse("excluded_article", _are_excluded(table, facts, excluded), at)
                rows.refuse("other_language", _of_other_language(facts, config.languages), at)
            if config.licence is not None:
                rows.refuse("licence_not_allowed", _of_other_licence(table, config.licence), at)
            left = np.flatnonzero(rows.codes[at] == 0)
            found = np.zeros(table.num_rows, dtype=np.int16)
            found[left] = refuse_rows(table.take(pa.array(left)), rules)
            for number, rule in enumerate(rules, 1):
                rows.refuse(rule.reason, found == number, at)
            rows.split[at], undated = _splits(table, config.split_by_time)
            rows.refuse("no_date", undated, at)
            narrow.append(table.select(kept_columns))
            advance()
    return pa.concat_tables(narrow)


def _read_pairs(record: UnitRecord, columns: Sequence[str]) -> pa.Table:
    path = record.path("pairs")
    table = read_tables([path], {name: PAIR_COLUMNS[name] for name in columns})
    if table.num_rows != record.kept:
        raise DataError(path, f"has {table.num_rows} pairs, its commit record says {record.kept}",
                        todo="harvest the unit again")  # fmt: skip
    return table


def _article_facts(record: UnitRecord, pairs: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Facts of each pair's article, null where it has none."""
    import pyarrow.compute as pc

    articles = read_tables([record.path("articles")], ARTICLE_COLUMNS)
    places = pc.index_in(pairs["article_id"].combine_chunks(), value_set=articles["article_id"].combine_chunks(),
                         skip_nulls=True)  # fmt: skip
    return articles.select(list(columns)).take(places)


def _read_exclusions(path: str | None) -> frozenset[str]:
    if path is None:
        return frozenset()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(path, "cannot be read as a list of articles", found=str(error)) from None
    words = (line.partition("#")[0].strip().lower() for line in lines)
    return frozenset(word.removeprefix("https://doi.org/").removeprefix("doi:") for word in words if word)


def _are_excluded(pairs: pa.Table, facts: pa.Table, excluded: frozenset[str]) -> np.ndarray:
    ids, dois = pairs["article_id"].to_pylist(), facts["doi"].to_pylist()
    return np.array(
        [
            (article is not None and not excluded.isdisjoint((article.lower(), article.lower().partition(".")[0])))
            or (doi is not None and doi.lower() in excluded)
            for article, doi in zip(ids, dois, strict=True)
        ],
        dtype=np.bool_,
    )


def _of_other_language(facts: pa.Table, languages: tuple[str, ...] | None) -> np.ndarray:
    import pyarrow.compute as pc

    if languages is None:
        return np.zeros(facts.num_rows, dtype=np.bool_)
    tags = pc.replace_substring_regex(pc.utf8_lower(facts["language"]), "[-_].*", "")
    known = [language.lower() for language in languages]
    return np.array([tag is not None and tag not in known for tag in tags.to_pylist()], dtype=np.bool_)


def _of_other_licence(pairs: pa.Table, preset: str) -> np.ndarray:
    codes = pairs["licence"].combine_chunks().dictionary_encode()
    refused = np.array([not is_allowed(code, preset) for code in codes.dictionary.to_pylist()], dtype=np.bool_)
    found: np.ndarray = refused[codes.indices.to_numpy()] if len(refused) else np.zeros(len(codes), dtype=np.bool_)
    return found


def _splits(pairs: pa.Table, by_time: TimeSplit | None) -> tuple[np.ndarray, np.ndarray]:
    """Positions in SPLITS, and which rows have no date though their article needs one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    own = pc.index_in(pairs["split"], value_set=pa.array(SPLITS)).to_numpy().astype(np.int8)
    if by_time is None:
        return own, np.zeros(len(own), dtype=np.bool_)
    days = [None if date is None else first_day(date) for date in pairs["published"].to_pylist()]
    # Pairs of labelled sets have no article, and keep the split their set gave them.
    of_article = pairs["article_id"].is_valid().to_numpy()
    undated = of_article & np.array([day is None for day in days], dtype=np.bool_)
    late = {name: np.array([bool(first and day and day >= first) for day in days], dtype=np.bool_)
            for name, first in (("val", by_time.val_from), ("test", by_time.test_from))}  # fmt: skip
    split = np.where(late["test"], SPLITS.index("test"), np.where(late["val"], SPLITS.index("val"), 0))
    return np.where(of_article, split, own).astype(np.int8), undated


def _match(rows: _Rows, left: _Left, config: SelectConfig) -> None:
    """Look the rows that are left up in the hash files."""
    table = contamination(left.table, config.against, max_distance=config.against_distance)
    pairs: Counter[str] = Counter()
    samples: dict[str, set[str]] = {}
    kinds: dict[str, Counter[str]] = {}
    for found in table.to_pylist():
        matches = list(zip(found["sets"], found["samples"], found["reasons"], strict=True))
        rows.matches[int(left.places[found["row"]])] = [f"{name}: {sample} ({kind})" for name, sample, kind in matches]
        pairs.update({name for name, _, _ in matches})
        for name, sample, kind in matches:
            samples.setdefault(name, set()).add(sample)
            kinds.setdefault(name, Counter())[kind] += 1
    rows.contamination = {
        name: {"pairs": pairs[name], "samples": len(samples[name]), **dict(sorted(kinds[name].items()))}
        for name in sorted(pairs)
    }
    if config.contaminated == "drop":
        rows.refuse_at("contaminated", np.array(list(rows.matches), dtype=np.int64))


def _find_repeated_keys(rows: _Rows, left: _Left) -> None:
    """Refuse rows whose key an earlier one has: the same figure in two folders."""
    codes = left.table["key"].combine_chunks().dictionary_encode().indices.to_numpy()
    rows.refuse_at("duplicate_key", np.delete(left.places, np.unique(codes, return_index=True)[1]))


def _find_duplicates(rows: _Rows, left: _Left, config: DedupConfig) -> None:
    import pyarrow.compute as pc

    found = find_duplicates([left.table], config)
    rows.in_cluster[left.places] = found["cluster"].is_valid().to_numpy()
    rows.cluster[left.places] = found["cluster"].fill_null(0).to_numpy()
    for reason in DUPLICATE_REASONS:
        mask = pc.equal(found["reason"], reason).fill_null(False).to_numpy()
        rows.refuse_at(reason, left.places[mask])


def _describe(
    out: Path, sources: Sequence[tuple[Path, list[UnitRecord]]], config: SelectConfig, rows: _Rows
) -> Selection:
    raws = [_describe_raw(out, folder, records) for folder, records in sources]
    files = [path for path in (*config.against, config.exclude_articles) if path is not None]
    hashes = {path: sha256_file(path) for path in files}
    dumped = config.model_dump(mode="json")
    identity = {"config": dumped, "raws": [raw.sha256 for raw in raws], "files": list(hashes.values())}
    counts = np.bincount(rows.codes, minlength=len(REASONS) + 1).tolist()
    splits = np.bincount(rows.split[rows.codes == 0], minlength=len(SPLITS)).tolist()
    return Selection(
        biomedclip=biomedclip.__version__,
        config=dumped,
        identity=sha256_json(identity),
        raws=raws,
        seen=len(rows.codes),
        selected=counts[0],
        reasons={reason: count for reason, count in zip(REASONS, counts[1:], strict=True) if count},
        splits={split: count for split, count in zip(SPLITS, splits, strict=True) if count},
        clusters=len(np.unique(rows.cluster[rows.in_cluster])),
        contamination=rows.contamination,
        sha256=hashes,
    )


def _describe_raw(out: Path, folder: Path, records: Sequence[UnitRecord]) -> Raw:
    harvest = folder / HARVEST
    facts = json.loads(harvest.read_bytes()) if harvest.exists() else {}
    facts |= {name: facts["config"][name] for name in ("licence", "languages") if name in facts.get("config", {})}
    return Raw(
        path=os.path.relpath(folder.resolve(), out.resolve().parent),
        name=folder.resolve().name,
        sha256=fingerprint_units(records),
        units=[(record.name, record.kept) for record in records if record.kept],
        facts={name: facts[name] for name in ("notices", "snapshot", "licence", "languages") if name in facts},
    )


def _write(
    out: Path, selection: Selection, rows: _Rows, units: Units, config: SelectConfig, progress: Progress
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema(SELECTION_COLUMNS)
    stored = json.dumps({"format": SELECTION_FORMAT, **asdict(selection)}, ensure_ascii=False)
    start = 0
    with (
        progress("writing the selection", len(units)) as advance,
        write_atomic(out) as file,
        pq.ParquetWriter(file, schema, compression="zstd", store_schema=False) as writer,
    ):
        for raw, record in units:
            table = _read_pairs(record, tuple(PAIR_COLUMNS))
            at = slice(start, start + table.num_rows)
            start = at.stop
            columns = dict(zip(table.column_names, table.columns, strict=True)) | _decided(rows, at, raw)
            if config.contaminated == "flag":
                columns["flags"] = _flagged(table["flags"], rows.matches, at)
            writer.write_table(pa.table(columns, schema=schema), row_group_size=_GROUP_ROWS)
            advance()
        writer.add_key_value_metadata({SELECTION_KEY: stored})


def _decided(rows: _Rows, at: slice, raw: int) -> dict[str, Any]:
    import pyarrow as pa

    count = at.stop - at.start
    codes = pa.array(rows.codes[at])
    return {
        "split": pa.array(SPLITS, pa.string()).take(pa.array(rows.split[at])),
        "raw": pa.array(np.full(count, raw, dtype=np.int32)),
        "dup_cluster": pa.array(rows.cluster[at], mask=~rows.in_cluster[at]),
        "matches": pa.array([rows.matches.get(row) for row in range(at.start, at.stop)], pa.list_(pa.string())),
        "reason": pa.array([None, *REASONS], pa.string()).take(codes),
    }


def _flagged(flags: Any, matches: dict[int, list[str]], at: slice) -> Any:
    import pyarrow as pa

    hits = [row - at.start for row in range(at.start, at.stop) if row in matches]
    if not hits:
        return flags
    lists = flags.to_pylist()
    for row in hits:
        lists[row] = [*lists[row], "contaminated"]
    return pa.chunked_array([pa.array(lists, pa.list_(pa.string()))])
