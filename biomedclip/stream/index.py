"""An index for somebody's WebDataset tars, so that they are read like our own: by position, in any order.

Scans the headers of each tar once, on the disk or by ranges where only headers and small members are fetched, and
yields what the loader needs of each sample. Samples are grouped as webdataset groups them: consecutive members whose
names agree up to the first dot. What cannot be used is counted under a reason, sample by sample, in a ledger; a tar
that is cut off also has a row of its own, because nobody knows how many samples it lost. The scan is cached by the
tar's size and time, or its ETag.
"""

from __future__ import annotations

import glob
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.errors import ConfigError, DataError
from biomedclip.layouts.tars import MAX_TEXT_BYTES, TarMember, TarScan
from biomedclip.schema import LEDGER_COLUMNS
from biomedclip.shards import arrow_schema, read_tables, write_table
from biomedclip.stream.addresses import is_remote, shown
from biomedclip.stream.cache import entry_name
from biomedclip.stream.fetch import Fetcher, RangeFile

if TYPE_CHECKING:
    import pyarrow as pa

TAR_COLUMNS: dict[str, str] = {
    "key": "string", "shard": "string", "image_offset": "int64", "image_size": "int64", "image_format": "string",
    "text_offset": "int64", "text_size": "int64", "json_offset": "int64", "json_size": "int64", "article_id": "string",
}  # fmt: skip
"""What a scan knows of a sample; json_* and article_id may be null. Offsets and sizes are bytes within `shard`."""

IMAGES = ("jpg", "png", "jpeg", "webp", "tif", "tiff", "gif", "bmp")
"""Suffixes taken for the picture, the first that a sample has."""

CAPTIONS = ("txt", "text", "caption")

_MAGIC = (
    ("jpg", rb"\xff\xd8\xff"), ("png", rb"\x89PNG\r\n\x1a\n"), ("webp", rb"RIFF....WEBP"), ("gif", rb"GIF8"),
    ("tif", rb"II\*\0|MM\0\*"), ("bmp", rb"BM"),
)  # fmt: skip
_VERSION = 1


@dataclass(frozen=True, slots=True)
class ShardFact:
    """What a shard was when it was indexed: another one under its name is noticed. None is not known."""

    size: int
    etag: str | None = None
    mtime_ns: int | None = None
    version: str = ""
    """What tells its content from another's in the cache."""


@dataclass(frozen=True, slots=True)
class TarIndex:
    """The usable samples of some tars (TAR_COLUMNS), why the others are not (LEDGER_COLUMNS), and the tars."""

    table: pa.Table
    ledger: pa.Table
    shards: dict[str, ShardFact]

    @property
    def dropped(self) -> Counter[str]:
        """Reason -> samples left out; reasons of a whole tar start with `tar_`."""
        return Counter(self.ledger["reason"].to_pylist())


def expand_tars(wanted: str | Sequence[str]) -> list[str]:
    """The tars that paths, URLs, brace lists (`{000..099}`) and local globs name, each once, in that order.

    Raises DataError for one that names no file.
    """
    from braceexpand import braceexpand

    found: dict[str, None] = {}
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        for word in braceexpand(pattern):
            matches = [word] if is_remote(word) else sorted(glob.glob(str(Path(word).expanduser()))) or [word]
            for match in matches:
                if not is_remote(match) and not Path(match).is_file():
                    raise DataError(match, "there is no such file", todo="check the path or the pattern")
                found[match] = None
    return list(found)


def index_tars(
    tars: Sequence[str],
    name: str,
    fetcher: Fetcher,
    *,
    article_key: str | None = None,
    article_pattern: str | None = None,
) -> TarIndex:
    """The index of tars under the name of their source, scanned where no scan of the same bytes is cached.

    A sample's article is `article_key` of its json, else the first group (or all) of what `article_pattern` finds in
    its key, else unknown. Keys that occur in several tars get the tar's name in front. Raises DataError for a tar that
    cannot be read at all, ConfigError for a wrong pattern.
    """
    import pyarrow as pa

    try:
        pattern = re.compile(article_pattern) if article_pattern else None
    except re.error as error:
        raise ConfigError("article_pattern", "is no regular expression", found=str(error)) from None
    reader = _Reader(name, fetcher, article_key, pattern)
    with ThreadPoolExecutor(fetcher.config.threads if any(map(is_remote, tars)) else 1) as threads:
        done = list(threads.map(reader.read, tars))
    table = pa.concat_tables([rows for rows, _, _ in done]) if done else arrow_schema(TAR_COLUMNS).empty_table()
    keys = table["key"].to_pylist()
    if len(set(keys)) < len(keys):
        stems = {tar: shown(tar).rpartition("/")[2].removesuffix(".tar") for tar in tars}
        long = [f"{stems[shard]}/{key}" for key, shard in zip(keys, table["shard"].to_pylist(), strict=True)]
        table = table.set_column(0, "key", pa.array(long, pa.string()))
    ledger = pa.concat_tables([drops for _, drops, _ in done]) if done else arrow_schema(LEDGER_COLUMNS).empty_table()
    return TarIndex(table, ledger, {tar: fact for tar, (_, _, fact) in zip(tars, done, strict=True)})


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the index of one tar, from the cache where it can."""

    name: str
    fetcher: Fetcher
    article_key: str | None
    article_pattern: re.Pattern[str] | None

    def read(self, tar: str) -> tuple[pa.Table, pa.Table, ShardFact]:
        if not is_remote(tar):
            path = Path(tar)
            try:
                facts = path.stat()
                with path.open("rb") as local:
                    fact = ShardFact(facts.st_size, mtime_ns=facts.st_mtime_ns, version=str(facts.st_mtime_ns))
                    return self._cached(str(path.absolute()), tar, local, fact)
            except OSError as error:
                raise DataError(tar, "cannot be read", found=error.strerror) from None
        remote = RangeFile(self.fetcher, tar)
        version = remote.etag or ""
        return self._cached(tar, tar, remote, ShardFact(remote.size, etag=remote.etag, version=version))

    def _cached(self, identity: str, tar: str, file: Any, fact: ShardFact) -> tuple[pa.Table, pa.Table, ShardFact]:
        pattern = self.article_pattern.pattern if self.article_pattern else None
        known = (_VERSION, identity, tar, self.name, fact.size, fact.version, self.article_key, pattern)
        folder = self.fetcher.config.folder / "index"
        rows_path, ledger_path = (folder / f"{entry_name(*known)}.{end}" for end in ("parquet", "ledger.parquet"))
        # Without an ETag or a date a replaced tar of the same size would be taken for the old one.
        if fact.version and rows_path.exists():
            with suppress(DataError):
                return read_tables([rows_path], TAR_COLUMNS), read_tables([ledger_path], LEDGER_COLUMNS), fact
        rows, drops = self._scan(tar, file, fact.size)
        # An unwritable cache costs a scan next time, and nothing now.
        with suppress(OSError):
            write_table(ledger_path, drops, LEDGER_COLUMNS)
            write_table(rows_path, rows, TAR_COLUMNS)
        import pyarrow as pa

        return (
            pa.Table.from_pylist(rows, schema=arrow_schema(TAR_COLUMNS)),
            pa.Table.from_pylist(drops, schema=arrow_schema(LEDGER_COLUMNS)),
            fact,
        )

    def _scan(self, tar: str, file: Any, size: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        rows: list[dict[str, Any]] = []
        drops: list[dict[str, Any]] = []
        seen: set[str] = set()
        scan = TarScan(file, size)
        for key, members, last in _group(scan):
            sample = {member.suffix: member for member in members}
            reason = "duplicate_key" if key in seen else _refuse_sample(members, size)
            row = {} if reason else self._row(tar, key, sample, file)
            reason = reason or row.pop("reason", None)
            if reason and last and scan.damage and reason in ("no_caption", "no_image"):
                reason = "cut_off"
            if reason:
                drops.append(self._drop(f"{shown(tar)}/{key}", reason))
            else:
                rows.append(row)
            seen.add(key)
        if scan.damage:
            drops.append(self._drop(shown(tar), f"tar_{scan.damage}", scan.detail))
        return rows, drops

    def _row(self, tar: str, key: str, sample: dict[str, TarMember], file: Any) -> dict[str, Any]:
        """The sample's row, or `{"reason": …}`."""
        image, text = (next(sample[s] for s in suffixes if s in sample) for suffixes in (IMAGES, CAPTIONS))
        head = _read(file, image.offset, min(image.size, 12))
        found = next((word for word, magic in _MAGIC if re.match(magic, head, re.DOTALL)), None)
        if found is None:
            return {"reason": "not_an_image"}
        side, article = sample.get("json"), None
        if self.article_key and side:
            try:
                record = json.loads(_read(file, side.offset, side.size))
            except (ValueError, RecursionError):
                return {"reason": "broken_json"}
            value = record.get(self.article_key) if isinstance(record, dict) else None
            article = None if value is None else str(value)
        if article is None and self.article_pattern and (match := self.article_pattern.search(key)):
            article = match[1] if match.re.groups else match[0]
        return {
            "key": key, "shard": tar, "image_offset": image.offset, "image_size": image.size, "image_format": found,
            "text_offset": text.offset, "text_size": text.size, "json_offset": side.offset if side else None,
            "json_size": side.size if side else None, "article_id": article,
        }  # fmt: skip

    def _drop(self, item: str, reason: str, detail: str = "") -> dict[str, Any]:
        return {"source": self.name, "article_id": None, "item": item, "status": "dropped", "reason": reason,
                "detail": detail, "key": None}  # fmt: skip


def _group(scan: TarScan) -> Iterator[tuple[str, list[TarMember], bool]]:
    """(key, members, whether it is the last one) of consecutive members with one key."""
    members: list[TarMember] = []
    for member in scan:
        if re.match(r"__[^/]*__($|/)", member.name):
            continue  # webdataset's own notes
        if members and members[0].key != member.key:
            yield members[0].key, members, False
            members = []
        members.append(member)
    if members:
        yield members[0].key, members, True


def _refuse_sample(members: Sequence[TarMember], size: int) -> str | None:
    """Why a sample cannot be used, as far as its headers say."""
    suffixes = [member.suffix for member in members]
    if any(member.offset + member.size > size for member in members):
        return "cut_off"
    if not all(member.plain for member in members):
        return "not_a_plain_member"
    if len(set(suffixes)) < len(suffixes):
        return "duplicate_member"
    if not any(suffix in IMAGES for suffix in suffixes):
        # `PMC1.2_f.jpg` has the key `PMC1` and the suffix `2_f.jpg`: no reader of such tars finds its picture.
        return "dotted_key" if any(s.rpartition(".")[2] in IMAGES for s in suffixes) else "no_image"
    texts = [member for member in members if member.suffix in CAPTIONS]
    if not texts or next(m for s in CAPTIONS for m in texts if m.suffix == s).size == 0:
        return "no_caption"
    return "text_too_long" if any(m.size > MAX_TEXT_BYTES for m in members if m.suffix in (*CAPTIONS, "json")) else None


def _read(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    return bytes(file.read(size))
