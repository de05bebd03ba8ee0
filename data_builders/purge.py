"""Samples of a finished dataset taken back, without rewriting a shard: tombstones that readers pass over.

Reads a diff of two days (retracted, removed, or under a licence that the dataset's preset does not admit) or a list of
articles, DOIs and keys; adds a row for each sample found to `tombstones.parquet`, which is a union and so the same
whatever the order of purges. Card, checksums and manifest stay as they are, because they speak of the shards, and
these still hold everything: who passes shards on must select and pack again without the articles. There is no undo:
deleting the file is one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from biomedclip.errors import ConfigError
from biomedclip.files import write_atomic
from biomedclip.licences import is_allowed
from biomedclip.schema import KEY_PATTERN, TOMBSTONE_COLUMNS
from biomedclip.shards import (
    TOMBSTONE_KEY,
    TOMBSTONES,
    DatasetFolder,
    arrow_schema,
    read_tables,
    tombstone_promise,
)
from data_builders.claims import hold_folder
from data_builders.pmc.diff import Change, read_changes, read_facts
from data_builders.pmc.licences import normalise_code

_ARTICLE = re.compile(r"pmc[1-9][0-9]{0,11}(\.[1-9][0-9]{0,3})?")
_DOI = re.compile(r"10\.[0-9]{4,9}/\S+")
_REASON = re.compile(r"[a-z0-9_]{1,40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawal:
    """What is to be taken back: `what` is an article with or without version, a DOI or a sample's key."""

    what: str
    reason: str
    stated: str | None = None
    """Day of the source that said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PurgeFacts:
    """What a purge did to a dataset."""

    samples: int
    """Samples that had no tombstone before."""
    reasons: dict[str, int]
    """Reason -> samples of this dataset among what was named, whether new or not."""
    absent: tuple[str, ...]
    """What was named and has no sample here."""
    withdrawn: int
    """Samples with a tombstone now."""
    left: int
    outdated: tuple[str, ...] = field(default=())
    """Articles of the dataset that changed without being withdrawn."""


def purge(folder: str | Path, withdrawals: Iterable[Withdrawal]) -> PurgeFacts:
    """What was done, after `tombstones.parquet` says it. Raises DataError where `folder` holds no finished dataset."""
    dataset = DatasetFolder(folder)
    with hold_folder(dataset.folder):
        before = {_order(row): row for row in dataset.tombstones.to_pylist()}
        named = list(withdrawals)
        rows, absent = _find_samples(dataset, named)
        after = before | {_order(row): row for row in rows}
        if after.keys() != before.keys():
            _write(dataset.folder, [after[key] for key in sorted(after)])
    withdrawn = {row["key"] for row in after.values()}
    reasons: dict[str, set[str]] = {}
    for row in rows:
        reasons.setdefault(row["reason"], set()).add(row["key"])
    return PurgeFacts(
        samples=len(withdrawn - dataset.withdrawn),
        reasons={reason: len(keys) for reason, keys in sorted(reasons.items())},
        absent=absent,
        withdrawn=len(withdrawn),
        left=int(dataset.manifest["samples"]) - len(withdrawn),
    )


def purge_by_diff(folder: str | Path, diff: str | Path) -> PurgeFacts:
    """What was done with a dataset and a diff of its source. Raises DataError where either is none."""
    dataset = DatasetFolder(folder)
    preset = dataset.manifest.get("provenance", {}).get("config", {}).get("licence")
    stated = read_facts(diff).new
    articles = _article_ids(dataset)
    pmcids = {article_id.partition(".")[0] for article_id in articles}
    named, outdated = [], set()
    for change in read_changes(diff):
        # Of 8 million changes only those that concern this dataset are remembered.
        if f"PMC{change.pmcid}" in pmcids:
            withdrawal = _withdrawal(change, preset, stated)
            if withdrawal is None:
                outdated.add(f"PMC{change.pmcid}")
            elif change.kind == "retracted" or change.article_id in articles:
                named.append(withdrawal)
    facts = purge(folder, named)
    gone = {withdrawal.what.partition(".")[0] for withdrawal in named}
    facts_now = {name: getattr(facts, name) for name in PurgeFacts.__dataclass_fields__}
    return PurgeFacts(**{**facts_now, "outdated": tuple(sorted(outdated - gone, key=lambda name: int(name[3:])))})


def read_withdrawals(text: str, *, reason: str, stated: str | None = None) -> list[Withdrawal]:
    """What a file names, one a line (`#` begins a comment), or a comma-separated list of ids. Raises ConfigError."""
    if not _REASON.fullmatch(reason):
        raise ConfigError("--reason", "must be one word of a-z, 0-9 and _", found=repr(reason))
    if stated is not None and not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T0-9Z-]*", stated):
        raise ConfigError("--stated", "must be a date such as 2026-11-01", found=repr(stated))
    path = Path(text)
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(path, "cannot be read as a list of articles", found=str(error)[:80]) from None
    words = [word for line in lines if (word := line.partition("#")[0].strip())]
    if not words:
        raise ConfigError(text, "names no article", todo="one a line: PMC123, PMC123.1, a DOI or a sample's key")
    withdrawals = []
    for word in words:
        what = word.lower().removeprefix("https://doi.org/").removeprefix("doi:").strip()
        if not (_ARTICLE.fullmatch(what) or _DOI.fullmatch(what) or KEY_PATTERN.fullmatch(word)):
            raise ConfigError(text, "is neither a file nor an article", found=repr(word)[:60],
                              todo="use PMC123, PMC123.1, a DOI or a sample's key")  # fmt: skip
        what = what.upper() if _ARTICLE.fullmatch(what) else what
        withdrawals.append(Withdrawal(what=what, reason=reason, stated=stated))
    return withdrawals


def _withdrawal(change: Change, preset: str | None, stated: str | None) -> Withdrawal | None:
    """What a change takes back; None where the sample may stay, if perhaps out of date."""
    if change.kind == "retracted":
        # A retraction of one version holds for all of the article, as in a plan.
        return Withdrawal(what=f"PMC{change.pmcid}", reason="retracted", stated=stated)
    if change.kind == "removed":
        return Withdrawal(what=change.article_id, reason="removed", stated=stated)
    if change.kind == "licence_changed":
        now = normalise_code(change.licence_now)
        if preset is None or now is None or not is_allowed(now, preset):
            return Withdrawal(what=change.article_id, reason="licence_changed", stated=stated)
    return None


def _find_samples(
    dataset: DatasetFolder, withdrawals: Iterable[Withdrawal]
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """A tombstone for each sample that is named, and what names none."""
    wanted: dict[str, list[Withdrawal]] = {}
    for withdrawal in withdrawals:
        wanted.setdefault(withdrawal.what, []).append(withdrawal)
    if not wanted:
        return [], ()
    dois = _dois(dataset) if any(_DOI.fullmatch(what) for what in wanted) else {}
    rows, found = [], set()
    for key, article_id in _keys(dataset):
        names = [key, *_names(article_id, dois)]
        for name in names:
            for withdrawal in wanted.get(name, ()):
                found.add(name)
                rows.append({"key": key, "article_id": article_id, "reason": withdrawal.reason,
                             "stated": withdrawal.stated})  # fmt: skip
    return rows, tuple(sorted(set(wanted) - found))


def _names(article_id: str | None, dois: Mapping[str, str]) -> Iterator[str]:
    if article_id is not None:
        yield article_id
        if "." in article_id:
            yield article_id.partition(".")[0]
        if article_id in dois:
            yield dois[article_id]


def _keys(dataset: DatasetFolder) -> Iterator[tuple[str, str | None]]:
    for shard in dataset.manifest["shards"]:
        path = dataset.folder / shard["name"].replace(".tar", ".parquet")
        table = read_tables([path], {"key": "string", "article_id": "string"})
        yield from zip(table["key"].to_pylist(), table["article_id"].to_pylist(), strict=True)


def _article_ids(dataset: DatasetFolder) -> set[str]:
    return {article_id for _, article_id in _keys(dataset) if article_id is not None}


def _dois(dataset: DatasetFolder) -> dict[str, str]:
    table = read_tables([dataset.folder / "articles.parquet"], {"article_id": "string", "doi": "string"})
    return {row["article_id"]: row["doi"].lower() for row in table.to_pylist() if row["doi"]}


def _order(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[column] or "" for column in TOMBSTONE_COLUMNS)


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema(TOMBSTONE_COLUMNS)
    with (
        write_atomic(folder / TOMBSTONES) as file,
        pq.ParquetWriter(file, schema, compression="zstd", store_schema=False) as writer,
    ):
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        writer.add_key_value_metadata({TOMBSTONE_KEY: json.dumps(tombstone_promise(folder, rows)).encode()})
