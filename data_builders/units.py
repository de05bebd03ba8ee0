"""Units: the steps in which a source becomes pairs, each a set of files that is there as a whole or not at all.

Takes a stream of `Article | Pair | Drop` and writes `<name>.tar` (images), `<name>.pairs.parquet`,
`<name>.articles.parquet`, `<name>.ledger.parquet` and, last, the commit record `<name>.json` with the hashes of the
four; reads such folders back as tables, pairs and images. A unit exists if and only if its commit record does, and a
committed unit never changes: what a retry mends goes into a delta unit `<name>-r01`, whose record says which ledger
rows of the earlier ones it replaces. Only dropped rows are ever replaced, so the pairs of a folder are simply those of
all its units. Images wait in tars without captions, because captions, filters and splits are still to be decided.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from biomedclip.errors import DataError
from biomedclip.files import (
    explain_full_disk,
    remove_leftovers,
    sha256_file,
    sha256_json,
    write_atomic,
    write_json,
)
from biomedclip.licences import licence_class
from biomedclip.schema import LEDGER_COLUMNS, Article, Drop, Pair
from biomedclip.shards import (
    ARTICLE_COLUMNS,
    BLOCK,
    IMAGE_MEMBER,
    arrow_schema,
    check_pair,
    read_member,
    read_tables,
    tar_header,
)
from biomedclip.tokens import count_tokens

if TYPE_CHECKING:
    import pyarrow as pa

HARVEST = "harvest.json"
"""What a folder of units says of itself; a folder without one is still a folder of units."""

UNIT_FORMAT = 1
KINDS = {"tar": "tar", "pairs": "pairs.parquet", "articles": "articles.parquet", "ledger": "ledger.parquet"}
"""Kind of a file -> what follows the unit's name and a dot; beside them stands `<name>.json`."""

_TYPES = {"width": "int32", "height": "int32", "phash": "uint64", "captions": "list<string>", "labels": "list<string>",
          "label_ids": "list<int32>", "concepts": "list<string>", "flags": "list<string>"}  # fmt: skip
PAIR_COLUMNS: dict[str, str] = {
    **{field.name: _TYPES.get(field.name, "string") for field in fields(Pair) if field.name != "image"},
    "unit": "string",
    "image_offset": "int64",
    "image_size": "int64",
    "image_crc32": "uint32",
    "licence_class": "string",
    "caption_tokens": "int32",
    "caption_chars": "int32",
    "published": "string",
}
"""Columns of `<name>.pairs.parquet`, one row a kept pair: the Pair (its sidecar as JSON text), where its image is, and
what filters ask for. `published` is that of its article; `split` is the source's, before any selection."""

_ROW_GROUP = 10_000
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_DELTA = re.compile(r"(.+)-r([0-9]{2,})")
_REBUILD = "delete its .json and run the harvest again: it builds what has no commit record"

LedgerKey = tuple[str | None, str, str]
"""Article id, item and reason of a dropped row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRecord:
    """The commit record of one unit."""

    folder: Path
    name: str
    identity: dict[str, Any]
    """Whatever the writer is to be known by: hashes of config and plan."""
    files: dict[str, dict[str, Any]]
    """Kind -> `sha256` and `bytes`."""
    articles: int
    kept: int
    dropped: dict[str, int]
    """Reason -> ledger rows."""
    supersedes: tuple[LedgerKey, ...] = ()
    """One entry for each dropped row of the base unit or an earlier delta that this delta replaces."""

    @property
    def base(self) -> str:
        """The unit that this one mends; its own name where it mends none."""
        match = _DELTA.fullmatch(self.name)
        return match[1] if match else self.name

    def path(self, kind: str) -> Path:
        """Of one of its files, by the keys of KINDS."""
        return self.folder / f"{self.name}.{KINDS[kind]}"


def unit_name(number: int, retry: int = 0) -> str:
    """`unit-000012`, or `unit-000012-r01` for its first delta."""
    return f"unit-{number:06d}" + (f"-r{retry:02d}" if retry else "")


def write_unit(
    folder: str | Path,
    name: str,
    items: Iterable[Article | Pair | Drop],
    *,
    identity: Mapping[str, Any],
    supersedes: Sequence[LedgerKey] = (),
) -> UnitRecord:
    """The record of the unit now committed; nothing of it has a final name before the last item is there.

    An article must come before its pairs. `supersedes` is read after the last item. The caller sees to it that no
    other process writes the same unit. Raises DataError where a pair breaks the contract, a key occurs twice or the
    disk is full.
    """
    folder = Path(folder)
    if not _NAME.fullmatch(name):
        raise DataError(folder, "cannot hold a unit of this name", found=repr(name), todo="use [a-z0-9_-], 64 at most")
    with explain_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").unlink(missing_ok=True)
        remove_leftovers(folder, f"{name}.*")
        unit = _Unit(folder, name)
        with unit.open_files:
            for item in items:
                unit.add(item)
            unit.finish()
        record = UnitRecord(
            folder=folder, name=name, identity=dict(identity), articles=len(unit.published), kept=len(unit.keys),
            dropped=dict(sorted(unit.dropped.items())), supersedes=tuple(supersedes),
            files={
                kind: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
                for kind in KINDS
                if (path := folder / f"{name}.{KINDS[kind]}")
            },
        )  # fmt: skip
        stored = {key: value for key, value in asdict(record).items() if key not in ("folder", "name")}
        write_json(folder / f"{name}.json", {"format": UNIT_FORMAT, "unit": name, **stored})
    return record


def delete_unit(record: UnitRecord) -> None:
    """Take a unit back, its commit record first."""
    for path in (record.folder / f"{record.name}.json", *map(record.path, KINDS)):
        path.unlink(missing_ok=True)


def read_unit(folder: str | Path, name: str) -> UnitRecord | None:
    """The commit record of a unit, None where it has none. Raises DataError where the record is damaged."""
    path = Path(folder) / f"{name}.json"
    try:
        facts = json.loads(path.read_bytes())
        if facts.pop("format") != UNIT_FORMAT:
            raise DataError(path, f"is not of format {UNIT_FORMAT}", todo="upgrade biomedclip or harvest anew")
        keys = tuple((key[0], key[1], key[2]) for key in facts.pop("supersedes"))
        return UnitRecord(folder=Path(folder), name=facts.pop("unit"), supersedes=keys, **facts)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise DataError(path, "is no commit record", todo=f"not one of ours, or damaged: {_REBUILD}") from None


def find_damage(record: UnitRecord, *, verify: bool = False) -> list[str]:
    """What is wrong with a committed unit, one line a file: missing, another size or, with `verify`, other bytes."""
    problems = []
    for kind, promised in record.files.items():
        path = record.path(kind)
        size = path.stat().st_size if path.exists() else None
        if size is None:
            problems.append(f"{path}: is missing")
        elif size != promised["bytes"]:
            problems.append(f"{path}: has {size} bytes, its commit record says {promised['bytes']}")
        elif verify and sha256_file(path) != promised["sha256"]:
            problems.append(f"{path}: has other bytes than its commit record says")
    return problems


def read_units(folder: str | Path, *, verify: bool = False) -> list[UnitRecord]:
    """The committed units in the order of their names, each delta after what it mends.

    Files are looked at by size, with `verify` by hash. Raises DataError where there are none or one is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(folder, "there is no such folder", todo="name the output of `biomedclip data harvest`")
    names = sorted(path.stem for path in folder.glob("*.json") if path.name != HARVEST)
    records = [record for name in names if (record := read_unit(folder, name)) is not None]
    if not records:
        raise DataError(folder, "holds no finished unit", todo="run `biomedclip data harvest` first")
    for record in records:
        problems = find_damage(record, verify=verify)
        if problems:
            raise DataError(record.folder / f"{record.name}.json", "speaks of other files", found=problems[0],
                            todo=_REBUILD)  # fmt: skip
    return records


def missing_units(folders: Sequence[str | Path]) -> list[str]:
    """Names of the units that these folders' harvests still owe, `<plan sha256, 8 digits>/<unit>`.

    A plan may be harvested into several folders, a slice into each: what one of them has, none of them owes.
    """
    owed: dict[str, set[str]] = {}
    found: dict[str, set[str]] = {}
    for folder in map(Path, folders):
        if not (folder / HARVEST).exists():
            continue
        facts = json.loads((folder / HARVEST).read_bytes())
        plan = f"{facts['plan_sha256'][:8]}/{facts['config_sha256'][:8]}"
        owed[plan] = {PLAN_UNIT, *map(unit_name, range(facts["units"]))}
        found.setdefault(plan, set()).update(path.stem for path in folder.glob("*.json") if path.name != HARVEST)
    return [f"{plan[:8]}/{name}" for plan in sorted(owed) for name in sorted(owed[plan] - found[plan])]


PLAN_UNIT = "plan"
"""The unit without pairs that takes what the plan left out into the ledger."""


def count_rows(records: Iterable[UnitRecord]) -> tuple[int, Counter[str]]:
    """Pairs kept, and rows dropped by reason, after every delta's supersedes: seen is their sum."""
    kept, dropped = 0, Counter[str]()
    for record in records:
        kept += record.kept
        dropped.update(record.dropped)
        dropped.subtract(reason for _, _, reason in record.supersedes)
    return kept, +dropped


def fingerprint_units(records: Iterable[UnitRecord]) -> str:
    """Hex sha256 of the hashes of all files of some units; equal contents, equal fingerprint, on any machine."""
    return sha256_json([[record.name, *(facts["sha256"] for facts in record.files.values())] for record in records])


def pair_files(folder: str | Path) -> list[Path]:
    """The parquets of all kept pairs in order, for readers such as DuckDB that need not hold them in memory."""
    return [record.path("pairs") for record in read_units(folder)]


def pair_rows(folder: str | Path) -> pa.Table:
    """All kept pairs of a folder, PAIR_COLUMNS."""
    return read_tables(pair_files(folder), PAIR_COLUMNS)


def article_rows(folder: str | Path) -> pa.Table:
    """Every article read, once, in the order of the units, `shards.ARTICLE_COLUMNS`."""
    import pyarrow as pa

    table = read_tables([record.path("articles") for record in read_units(folder)], ARTICLE_COLUMNS)
    first: dict[str, int] = {}
    for position, article_id in enumerate(table["article_id"].to_pylist()):
        first.setdefault(article_id, position)
    return table.take(pa.array(first.values(), pa.int64()))


def ledger_rows(folder: str | Path) -> pa.Table:
    """Every figure seen, once, LEDGER_COLUMNS: the rows that a delta replaced are left out."""
    return live_rows(read_units(folder))


def live_rows(records: Sequence[UnitRecord]) -> pa.Table:
    """The ledger of these units, deltas after what they mend, without the rows that a delta replaced."""
    import pyarrow as pa

    gone: dict[str, set[LedgerKey]] = {}
    tables = []
    for record in reversed(records):
        table = read_tables([record.path("ledger")], LEDGER_COLUMNS)
        if superseded := gone.get(record.base):
            columns = (table[name].to_pylist() for name in ("article_id", "item", "reason"))
            table = table.filter(pa.array([key not in superseded for key in zip(*columns, strict=True)], pa.bool_()))
        tables.append(table)
        gone.setdefault(record.base, set()).update(record.supersedes)
    return pa.concat_tables(reversed(tables))


def pair_of_row(row: Mapping[str, Any], image: bytes) -> Pair:
    """The pair that a row of PAIR_COLUMNS was written from."""
    facts = {field.name: row[field.name] for field in fields(Pair) if field.name not in ("image", "sidecar")}
    lists = {name: tuple(facts[name]) for name, kind in PAIR_COLUMNS.items() if kind.startswith("list<")}
    return Pair(image=image, sidecar=json.loads(row["sidecar"]), **{**facts, **lists})


def read_image(folder: str | Path, row: Mapping[str, Any]) -> bytes:
    """The image bytes of a row of PAIR_COLUMNS. Raises DataError where the tar was cut or changed."""
    path = Path(folder) / f"{row['unit']}.tar"
    try:
        with path.open("rb") as file:
            data = read_member(file, row["image_offset"], row["image_size"], path, row["key"])
    except FileNotFoundError:
        raise DataError(path, "is missing", todo=_REBUILD) from None
    if zlib.crc32(data) != row["image_crc32"]:
        raise DataError(f"{path}: {row['key']}", "has other bytes than its row says", todo=_REBUILD)
    return data


class _Unit:
    """The four files of a unit while they are written."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.keys: set[str] = set()
        self.published: dict[str, str | None] = {}
        self.dropped: Counter[str] = Counter()
        self._position = 0
        with ExitStack() as stack:
            self._tar: BinaryIO = stack.enter_context(write_atomic(folder / f"{name}.tar"))
            self._add_pairs = stack.enter_context(_open_table(folder / f"{name}.pairs.parquet", PAIR_COLUMNS))
            self._add_articles = stack.enter_context(_open_table(folder / f"{name}.articles.parquet", ARTICLE_COLUMNS))
            self._add_ledger = stack.enter_context(_open_table(folder / f"{name}.ledger.parquet", LEDGER_COLUMNS))
            self.open_files = stack.pop_all()

    def add(self, item: Article | Pair | Drop) -> None:
        if isinstance(item, Article):
            if item.article_id not in self.published:
                self.published[item.article_id] = item.published
                self._add_articles(asdict(item))
        elif isinstance(item, Drop):
            self.dropped[item.reason] += 1
            self._note(item.source, item.article_id, item.item, "dropped", reason=item.reason, detail=item.detail)
        else:
            check_pair(item)
            if item.key in self.keys:
                raise DataError(f"{self.folder / self.name}: {item.key}", "is the key of two pairs",
                                todo="make keys unique in the source")  # fmt: skip
            self.keys.add(item.key)
            self._add_pairs(self._row(item) | {"image_offset": self._write_image(item)})
            self._note(item.source, item.article_id, item.figure_id or item.key, "kept", key=item.key)

    def finish(self) -> None:
        self._tar.write(b"\0" * (2 * BLOCK))

    def _note(
        self, source: str, article_id: str | None, item: str, status: str, *, reason: str | None = None,
        detail: str = "", key: str | None = None,
    ) -> None:  # fmt: skip
        self._add_ledger({"source": source, "article_id": article_id, "item": item, "status": status,
                          "reason": reason, "detail": detail, "key": key})  # fmt: skip

    def _row(self, pair: Pair) -> dict[str, Any]:
        facts = {field.name: getattr(pair, field.name) for field in fields(Pair) if field.name != "image"}
        return facts | {
            "sidecar": json.dumps(dict(pair.sidecar), ensure_ascii=False, sort_keys=True),
            "unit": self.name,
            "image_size": len(pair.image),
            "image_crc32": zlib.crc32(pair.image),
            "licence_class": licence_class(pair.licence),
            "caption_tokens": count_tokens(pair.caption),
            "caption_chars": len(pair.caption),
            "published": self.published.get(pair.article_id) if pair.article_id else None,
        }

    def _write_image(self, pair: Pair) -> int:
        """The offset at which the image now stands in the tar."""
        self._tar.write(tar_header(f"{pair.key}.{IMAGE_MEMBER}", len(pair.image)))
        offset = self._position + BLOCK
        self._tar.write(pair.image)
        padding = -len(pair.image) % BLOCK
        self._tar.write(b"\0" * padding)
        self._position = offset + len(pair.image) + padding
        return offset


@contextmanager
def _open_table(path: Path, columns: Mapping[str, str]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that adds a row to a parquet which appears when the block ends; _ROW_GROUP rows wait at most."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, rows = arrow_schema(columns), list[Mapping[str, Any]]()

    def add(row: Mapping[str, Any]) -> None:
        rows.append(row)
        if len(rows) == _ROW_GROUP:
            flush()

    def flush() -> None:
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=_ROW_GROUP)
            rows.clear()

    with (
        write_atomic(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd", store_schema=False) as writer,
    ):
        yield add
        flush()
