"""Articles from the PMC Cloud Service over HTTPS, and from a mirror of the packages that PMC had before 2026.

Both yield the records and bytes that a local copy of the bucket (`catalog.LocalBucket`) would: `CloudBucket` asks for
the metadata of many articles at once and yields them in order; `OaPackages` streams each tar.gz, never extracting it,
and joins the file lists beside the packages. A package states no checksums, so they are taken while it is listed and
hold for every later read; it has no version either and counts as version 1. Its first listing and the reads that
follow share one pass, because inflating is what costs.
"""

from __future__ import annotations

import os
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from biomedclip.errors import DataError
from biomedclip.schema import Drop
from data_builders.pmc.archive import Member, read_members
from data_builders.pmc.catalog import (
    ARTICLE_ID,
    MAX_FILE_BYTES,
    ArticleRecord,
    BadFile,
    SourceFile,
    check_md5,
    is_safe_key,
    parse_metadata,
)
from data_builders.pmc.client import Client
from data_builders.pmc.file_lists import ListedArticle, find_lists
from data_builders.pmc.inventory import Inventory
from data_builders.pmc.media import rank_extension

MAX_METADATA_BYTES = 16 * 2**20

SourceKind = Literal["cloud", "bucket", "packages"]

_PACKAGE = re.compile(r"PMC([1-9][0-9]{0,11})\.tar\.gz")


class CloudBucket:
    """The PMC Cloud Service bucket, or any server with its layout.

    `article_ids` are the article versions to read, such as an `Inventory`; None lists the whole bucket, which takes
    thousands of requests one after another. Raises DataError for an id that is none.
    """

    def __init__(self, client: Client, article_ids: Iterable[str] | None = None) -> None:
        self.client = client
        self._article_ids: Iterable[str] | None = article_ids
        if article_ids is not None and not isinstance(article_ids, Inventory):
            self._article_ids = sorted(set(article_ids), key=id_and_version)

    def records(self) -> Iterator[ArticleRecord | Drop]:
        """Article versions in the order of id and version; the reason of a Drop may be one of the client's."""
        article_ids = self._list() if self._article_ids is None else self._article_ids
        count = 0
        for item in self.client.map(self._record, article_ids):
            count += 1
            yield item
        if not count:
            raise DataError(self.client.config.endpoint, "holds no articles", todo="check the endpoint")

    def find(self, pmcid: int) -> list[ArticleRecord | Drop]:
        """The versions of one article in order, asked for by name; empty where there is none."""
        listed = [
            *self.client.list_keys(f"PMC{pmcid}.", delimiter="/"),
            *self.client.list_keys(f"metadata/PMC{pmcid}."),
        ]
        names = {entry.key.removeprefix("metadata/").rstrip("/").removesuffix(".json") for entry in listed}
        return [self._record(name) for name in sorted(filter(ARTICLE_ID.fullmatch, names), key=id_and_version)]

    def read(self, file: SourceFile) -> bytes:
        """The bytes of a file. Raises BadFile with the reasons of `Client.read`."""
        return self.client.read(file.key, md5=file.md5)

    def read_many(self, files: Iterable[SourceFile]) -> Iterator[bytes | BadFile]:
        """The bytes of each file in order, or the BadFile that reading it raised; many are read at once."""
        return self.client.read_many(files)

    def _list(self) -> list[str]:
        folders = {e.key.rstrip("/") for e in self.client.list_keys("PMC", delimiter="/") if e.is_prefix}
        names = {e.key.removeprefix("metadata/") for e in self.client.list_keys("metadata/")}
        folders |= {name.removesuffix(".json") for name in names if name.endswith(".json")}
        return sorted((name for name in folders if ARTICLE_ID.fullmatch(name)), key=id_and_version)

    def _record(self, article_id: str) -> ArticleRecord | Drop:
        # The article's own folder first: metadata/ is one prefix, and S3 limits requests by prefix.
        for key in (f"{article_id}/{article_id}.json", f"metadata/{article_id}.json"):
            try:
                data = self.client.read(key, max_bytes=MAX_METADATA_BYTES)
            except BadFile as error:
                if error.reason == "missing_file":
                    continue
                return _drop(article_id, error.reason, error.detail)
            return parse_metadata(data, article_id)
        return _drop(article_id, "no_metadata", "neither beside the article nor in metadata/")


@dataclass(frozen=True, slots=True)
class _Package:
    """One package: what its files are called in the archive, and the bytes of those worth keeping."""

    record: ArticleRecord
    drops: tuple[Drop, ...]
    member_names: dict[str, str]
    """Key -> name of the member."""
    sizes: dict[str, int]
    md5s: dict[str, str | None]
    data: dict[str, bytes] = field(default_factory=dict)
    """Key -> bytes of the XML and the pictures, as far as they fit."""


class OaPackages:
    """A mirror of `oa_package`: `PMC<id>.tar.gz` in any folder below `root`, with the file lists in `root`.

    Licences come from the lists (None where no list names the article; the XML may still state one). `keep_bytes`
    bounds the bytes of one package that are kept until the next few packages are read. Raises DataError where `root`
    holds no packages.
    """

    def __init__(self, root: str | Path, *, keep_bytes: int = 512 * 2**20) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(root, "there is no such folder", todo="name a mirror of oa_package")
        self._keep_bytes = keep_bytes
        self._lists = find_lists(self.root)
        self._folders: list[str] = []
        self._ids, self._places = self._find_packages()
        if not len(self._ids):
            raise DataError(root, "holds no packages", todo="expected files such as PMC13900.tar.gz")
        self._recent: OrderedDict[int, _Package] = OrderedDict()
        self._lock = threading.Lock()

    def records(self) -> Iterator[ArticleRecord | Drop]:
        """Articles in the order of their ids, each after a Drop for every member of its package that is refused.

        Reasons: `broken_package`, `package_too_large`, `duplicate_package`, `no_xml` for a whole package;
        `unsafe_member`, `duplicate_member`, `stray_member`, `extra_xml` for a member, which is the Drop's item.
        """
        previous = None
        for position, pmcid in enumerate(self._ids.tolist()):
            article_id = f"PMC{pmcid}.1"
            if pmcid == previous:
                path = self._path(position).relative_to(self.root)
                yield _drop(article_id, "duplicate_package", "another folder has it too", item=path.as_posix())
                continue
            previous = pmcid
            try:
                package = self._open(pmcid, position)
            except _NoArticleError as error:
                yield from error.drops
                yield _drop(article_id, "no_xml", "the package holds no article")
                continue
            except BadFile as error:
                yield _drop(article_id, error.reason, error.detail)
                continue
            yield from package.drops
            yield package.record

    def find(self, pmcid: int) -> list[ArticleRecord | Drop]:
        """The article's package, version 1 as all are; a Drop where it is broken, empty where there is none."""
        article_id = f"PMC{pmcid}.1"
        try:
            position = self._position(pmcid)
            return [self._open(pmcid, position).record] if position is not None else []
        except BadFile as error:
            return [_drop(article_id, error.reason, error.detail)]

    def read(self, file: SourceFile) -> bytes:
        """The bytes of a file. Raises BadFile with the reasons of `LocalBucket.read`, or those of its package."""
        if not is_safe_key(file.key):
            raise BadFile("unsafe_key", repr(file.key)[:200])
        pmcid, position = self._locate(file.key)
        package = self._open(pmcid, position)
        member_name = package.member_names.get(file.key)
        if member_name is None:
            raise BadFile("missing_file", file.key)
        if package.sizes[file.key] > MAX_FILE_BYTES:
            raise BadFile("file_too_large", f"{file.key} has {package.sizes[file.key]} bytes")
        data = package.data.get(file.key)
        if data is None:
            return check_md5(self._read_member(position, member_name), file)
        # The checksum of these very bytes was taken as they were read.
        return data if file.md5 in (None, package.md5s[file.key]) else check_md5(data, file)

    def _find_packages(self) -> tuple[array[int], array[int]]:
        """PMC ids, sorted, and for each the position of its folder."""
        import numpy as np

        ids, places = array("q"), array("q")
        for folder, subfolders, names in os.walk(self.root):
            subfolders.sort()
            found = [match for name in names if (match := _PACKAGE.fullmatch(name))]
            if found:
                ids.extend(int(match[1]) for match in found)
                places.extend([len(self._folders)] * len(found))
                self._folders.append(folder)
        order = np.lexsort((np.array(places, np.int64), np.array(ids, np.int64)))
        return (
            array("q", np.array(ids, np.int64)[order].tobytes()),
            array("q", np.array(places, np.int64)[order].tobytes()),
        )

    def _path(self, position: int) -> Path:
        return Path(self._folders[self._places[position]]) / f"PMC{self._ids[position]}.tar.gz"

    def _locate(self, key: str) -> tuple[int, int]:
        match = ARTICLE_ID.fullmatch(key.partition("/")[0])
        pmcid = int(match[1]) if match and match[2] == "1" else -1
        position = self._position(pmcid)
        if position is None:
            raise BadFile("missing_file", key)
        return pmcid, position

    def _position(self, pmcid: int) -> int | None:
        from bisect import bisect_left

        position = bisect_left(self._ids, pmcid)
        return position if position < len(self._ids) and self._ids[position] == pmcid else None

    def _open(self, pmcid: int, position: int) -> _Package:
        """A package, listed once and remembered for a while. Raises BadFile."""
        with self._lock:
            package = self._recent.get(pmcid)
            if package is not None:
                self._recent.move_to_end(pmcid)
                return package
        package = self._list_package(pmcid, self._path(position))
        with self._lock:
            self._recent[pmcid] = package
            while len(self._recent) > 1 and (
                len(self._recent) > 8 or sum(sum(map(len, p.data.values())) for p in self._recent.values())
                > self._keep_bytes
            ):  # fmt: skip
                self._recent.popitem(last=False)
        return package

    def _list_package(self, pmcid: int, path: Path) -> _Package:
        room = self._keep_bytes

        def wants(name: str, size: int) -> bool:
            nonlocal room
            is_useful = name.endswith((".nxml", ".xml")) or rank_extension(name) < 99
            if not is_useful or size > min(room, MAX_FILE_BYTES):
                return False
            room -= size
            return True

        return _arrange(pmcid, list(read_members(path, wants)), self._listed(pmcid))

    def _listed(self, pmcid: int) -> ListedArticle | None:
        found = [row for row in (one.find(pmcid) for one in self._lists) if row is not None]
        if not found:
            return None
        is_retracted = any(row.is_retracted for row in found)
        first = found[0]
        return ListedArticle(pmcid, first.licence, first.citation, first.pmid, is_retracted)

    def _read_member(self, position: int, name: str) -> bytes:
        for member in read_members(self._path(position), lambda other, _: other == name):
            if member.data is not None:
                return member.data
        raise BadFile("missing_file", name)


class _NoArticleError(BadFile):
    """A sound package without an article; `drops` are those of its members."""

    def __init__(self, drops: list[Drop]) -> None:
        super().__init__("no_xml", "the package holds no article")
        self.drops = drops


def _arrange(pmcid: int, members: list[Member], listed: ListedArticle | None) -> _Package:
    """The article of a package: its XML, its media, and a Drop for every member that is neither. Raises BadFile."""
    article_id = f"PMC{pmcid}.1"
    files, drops = _admit(article_id, members)
    xml_name = _choose_xml(list(files), files, pmcid)
    if xml_name is None:
        raise _NoArticleError(drops)
    top = xml_name.rpartition("/")[0].partition("/")[0]
    keys: dict[str, str] = {}
    for name in sorted(files):
        folder, _, rest = name.partition("/")
        key = f"{article_id}/{rest if folder == top and rest else name}"
        if top and folder != top:
            drops.append(_drop(article_id, "stray_member", "outside the article's folder", item=name))
        elif name != xml_name and name.lower().endswith(".nxml"):
            drops.append(_drop(article_id, "extra_xml", f"{xml_name} is used", item=name))
        else:
            keys[key] = name
    xml_key = next(key for key, name in keys.items() if name == xml_name)
    record = ArticleRecord(
        article_id=article_id,
        pmcid=pmcid,
        version=1,
        licence=listed.licence if listed else None,
        xml=SourceFile(xml_key, files[xml_name].md5),
        media=tuple(SourceFile(key, files[name].md5) for key, name in keys.items() if name != xml_name),
        is_retracted=listed.is_retracted if listed else False,
        pmid=listed.pmid if listed else None,
        citation=listed.citation if listed else None,
    )
    data = {key: member.data for key, name in keys.items() if (member := files[name]).data is not None}
    names = {key: files[name].name for key, name in keys.items()}
    sizes = {key: files[name].size for key, name in keys.items()}
    md5s = {key: files[name].md5 for key, name in keys.items()}
    return _Package(record, tuple(drops), names, sizes, md5s, data)


def _admit(article_id: str, members: list[Member]) -> tuple[dict[str, Member], list[Drop]]:
    """Regular files by clean name, and a Drop for each member that is something else or has an unsafe name."""
    files: dict[str, Member] = {}
    drops: list[Drop] = []
    for member in members:
        name = member.name.removeprefix("./")
        shown = ascii(member.name)[1:-1][:200]
        if member.kind == "folder":
            continue
        if member.kind != "file":
            drops.append(_drop(article_id, "unsafe_member", f"a {member.kind}", item=shown))
        elif not is_safe_key(name):
            drops.append(_drop(article_id, "unsafe_member", "its name leaves the package", item=shown))
        elif name in files:
            drops.append(_drop(article_id, "duplicate_member", "the first of the name is used", item=shown))
        else:
            files[name] = member
    return files, drops


def _choose_xml(names: list[str], files: dict[str, Member], pmcid: int) -> str | None:
    """The article's XML: an .nxml before an .xml, directly in the folder before deeper, then the largest."""

    def rank(name: str) -> tuple[bool, bool, bool, int, str]:
        parts = name.split("/")
        return not name.lower().endswith(".nxml"), len(parts) != 2, parts[0] != f"PMC{pmcid}", -files[name].size, name

    return min((name for name in names if name.lower().endswith((".nxml", ".xml"))), key=rank, default=None)


def kind_of_source(source: str) -> SourceKind:
    """Whether `source` is the bucket's http(s) address, a copy of the bucket, or a mirror of oa_package.

    Raises DataError where it is none of them.
    """
    if source.startswith(("https://", "http://")):
        return "cloud"
    root = Path(source)
    if not root.is_dir():
        raise DataError(source, "there is no such folder", todo="name a copy of the bucket, a mirror, or https://…")
    # The first entry mostly decides; a mirror's folders must be searched, a bucket's millions should not.
    with os.scandir(root) as entries:
        for entry in entries:
            if ARTICLE_ID.fullmatch(entry.name) or entry.name == "metadata":
                return "bucket"
            if _PACKAGE.fullmatch(entry.name):
                return "packages"
    return "packages" if next(root.rglob("PMC*.tar.gz"), None) is not None else "bucket"


def id_and_version(article_id: str) -> tuple[int, int]:
    """Both numbers of an article id, the order of all sources. Raises DataError for what is none."""
    match = ARTICLE_ID.fullmatch(article_id)
    if match is None:
        raise DataError(repr(article_id)[:60], "is no article id", todo="expected PMC<id>.<version>")
    return int(match[1]), int(match[2])


def _drop(article_id: str, reason: str, detail: str, *, item: str | None = None) -> Drop:
    return Drop(source="pmc", item=item or article_id, reason=reason, detail=detail, article_id=article_id)
