"""What a source of PMC articles holds: one record per article version, and its files, md5-checked.

Reads the layout of the PMC Cloud Service, here from a local copy (`LocalBucket`); yields `ArticleRecord`s in a fixed
order and the bytes of their files. Sources over the network or over archives keep to the same `Source` protocol, so
everything after this module is the same for all of them. A metadata record that cannot be trusted becomes a `Drop`
here, because without one neither the licence nor the checksums of an article are known; file names in it are taken
as hostile and must stay inside the article's own folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ValidationError

from biomedclip.errors import DataError
from biomedclip.schema import Drop

ARTICLE_ID = re.compile(r"PMC([1-9][0-9]{0,11})\.([1-9][0-9]{0,3})")
"""`PMC<id>.<version>`: an article version, its folder in the bucket and the stem of its XML and JSON."""

MAX_FILE_BYTES = 256 * 2**20
"""Larger XML or media files are refused unread; the largest figure of PMC is far below."""

_URL = re.compile(r"s3://[a-z0-9.-]+/(?P<key>[^?]+)(?:\?md5=(?P<md5>[0-9a-f]{32}))?")


class BadFile(ValueError):
    """A file of a source that cannot be used; `reason` is the ledger's word for it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of an article: its key in the bucket and the md5 that the metadata promises."""

    key: str
    md5: str | None

    @property
    def name(self) -> str:
        """The key without the article's folder, as an article's XML may name it."""
        return self.key.partition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArticleRecord:
    """What the metadata say of one article version, before its XML is read."""

    article_id: str
    pmcid: int
    version: int
    licence: str | None
    """`license_code` as written; None where the publisher's own terms apply."""
    xml: SourceFile
    media: tuple[SourceFile, ...] = ()
    is_retracted: bool = False
    is_manuscript: bool = False
    doi: str | None = None
    pmid: int | None = None
    title: str | None = None
    citation: str | None = None


class Source(Protocol):
    """Where articles come from."""

    def records(self) -> Iterator[ArticleRecord | Drop]:
        """All article versions in the order of id and version; a Drop for each record that cannot be used."""
        ...

    def read(self, file: SourceFile) -> bytes:
        """The bytes of a file. Raises BadFile where it is missing, unsafe, too large or has another md5."""
        ...


class LocalBucket:
    """A local copy of the PMC Cloud Service bucket, or of a part of it.

    `PMC<id>.<version>/` holds the XML, the metadata JSON and the media; `metadata/` may hold the JSON once more and
    is used where the article's folder lacks it. Raises DataError where `root` holds neither.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(root, "there is no such folder", todo="name a copy of the PMC Cloud Service bucket")
        self._real_root = self.root.resolve()

    def records(self) -> Iterator[ArticleRecord | Drop]:
        """Article versions in the order of id and version. Raises DataError where there are none."""
        article_ids = self._article_ids()
        if not article_ids:
            raise DataError(self.root, "holds no articles", todo="expected folders such as PMC10009416.1")
        for article_id in article_ids:
            yield self._record(article_id)

    def find(self, pmcid: int) -> list[ArticleRecord | Drop]:
        """The versions of one article in order, looked up without listing the others; empty where there is none."""
        names = {path.name for path in self.root.glob(f"PMC{pmcid}.*") if path.is_dir()}
        names |= {path.stem for path in (self.root / "metadata").glob(f"PMC{pmcid}.*.json")}
        return [self._record(name) for name in sorted(filter(ARTICLE_ID.fullmatch, names), key=_id_and_version)]

    def read(self, file: SourceFile) -> bytes:
        """The bytes of a file. Raises BadFile: `unsafe_key`, `missing_file`, `file_too_large`, `md5_mismatch`."""
        if not is_safe_key(file.key):
            raise BadFile("unsafe_key", repr(file.key)[:200])
        path = (self.root / file.key).resolve()
        if not path.is_relative_to(self._real_root):
            raise BadFile("unsafe_key", f"{file.key} is a link out of the source")
        if not path.is_file():
            raise BadFile("missing_file", file.key)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BadFile("file_too_large", f"{file.key} has {path.stat().st_size} bytes")
        return check_md5(path.read_bytes(), file)

    def _article_ids(self) -> list[str]:
        names = {path.name for path in self.root.iterdir() if path.is_dir()}
        names |= {path.stem for path in (self.root / "metadata").glob("*.json")}
        return sorted((name for name in names if ARTICLE_ID.fullmatch(name)), key=_id_and_version)

    def _record(self, article_id: str) -> ArticleRecord | Drop:
        for key in (f"{article_id}/{article_id}.json", f"metadata/{article_id}.json"):
            try:
                data = self.read(SourceFile(key, None))
            except BadFile as error:
                if error.reason == "missing_file":
                    continue
                return _drop(article_id, error.reason, error.detail)
            return parse_metadata(data, article_id)
        return _drop(article_id, "no_metadata", "neither beside the article nor in metadata/")


class _Metadata(BaseModel):
    """The fields of a metadata JSON that are used; others may come and go."""

    pmcid: str
    version: int
    license_code: str | None
    is_retracted: bool
    is_manuscript: bool
    xml_url: str
    media_urls: list[str] | None = None
    doi: str | None = None
    pmid: int | None = None
    title: str | None = None
    citation: str | None = None


def parse_metadata(data: bytes, article_id: str) -> ArticleRecord | Drop:
    """The record in a metadata JSON; a Drop `metadata_error` where it is broken or names files of other articles."""
    try:
        metadata = _Metadata.model_validate_json(data)
        if f"{metadata.pmcid}.{metadata.version}" != article_id:
            return _drop(article_id, "metadata_error", f"speaks of {metadata.pmcid}.{metadata.version}"[:200])
        return ArticleRecord(
            article_id=article_id,
            pmcid=_id_and_version(article_id)[0],
            version=metadata.version,
            licence=metadata.license_code,
            xml=_parse_url(metadata.xml_url, article_id),
            media=tuple(_parse_url(url, article_id) for url in metadata.media_urls or ()),
            is_retracted=metadata.is_retracted,
            is_manuscript=metadata.is_manuscript,
            doi=metadata.doi,
            pmid=metadata.pmid,
            title=metadata.title,
            citation=metadata.citation,
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        return _drop(article_id, "metadata_error", f"{where}: {problem['msg']}".removeprefix(": ")[:200])
    except BadFile as error:
        return _drop(article_id, "metadata_error", str(error))


def check_md5(data: bytes, file: SourceFile) -> bytes:
    """`data`, where its md5 is the promised one. Raises BadFile `md5_mismatch` otherwise."""
    if file.md5 is not None:
        found = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if found != file.md5:
            raise BadFile("md5_mismatch", f"{file.key} has {found}, promised was {file.md5}")
    return data


def is_safe_key(key: str) -> bool:
    """Whether a key stays below the source's root: no empty part, no `..`, no backslash or control character."""
    parts = key.split("/")
    return all(part not in ("", ".", "..") for part in parts) and not re.search(r"[\\\x00-\x1f\x7f]", key)


def choose_versions(records: Iterable[ArticleRecord | Drop]) -> Iterator[ArticleRecord | Drop]:
    """One version of each article; the others become a Drop `superseded_version` with the article id as item.

    Author manuscripts yield to publishers' versions, versions without media to those with, lower numbers to higher
    ones: a higher number alone is not better, `.2` may be the manuscript. A retraction of any version holds for the
    article, else choosing an older version would undo it. `records` must be sorted by article.
    """
    for _, group in groupby(records, key=lambda item: (item.article_id or "").partition(".")[0]):
        versions: list[ArticleRecord] = []
        for item in group:
            if isinstance(item, Drop):
                yield item
            else:
                versions.append(item)
        if not versions:
            continue
        best = max(versions, key=lambda record: (not record.is_manuscript, bool(record.media), record.version))
        for record in versions:
            if record is not best:
                yield _drop(record.article_id, "superseded_version", f"{best.article_id} is used")
        yield replace(best, is_retracted=any(record.is_retracted for record in versions))


def fingerprint(source: Source) -> tuple[str, int]:
    """Hex sha256 of everything the metadata promise, checksums included, and the number of records.

    Two sources of equal fingerprint give equal pairs, without a file having been read.
    """
    digest, count = hashlib.sha256(), 0
    for item in source.records():
        digest.update(json.dumps(asdict(item), sort_keys=True).encode() + b"\n")
        count += 1
    return digest.hexdigest(), count


def _parse_url(url: str, article_id: str) -> SourceFile:
    match = _URL.fullmatch(url)
    if match is None:
        raise BadFile("bad_url", repr(url)[:200])
    key = match["key"]
    if not key.startswith(f"{article_id}/") or not is_safe_key(key):
        raise BadFile("unsafe_key", repr(key)[:200])
    return SourceFile(key, match["md5"])


def _id_and_version(article_id: str) -> tuple[int, int]:
    match = ARTICLE_ID.fullmatch(article_id)
    if match is None:
        raise DataError(article_id, "is no article id", todo="expected PMC<id>.<version>")
    return int(match[1]), int(match[2])


def _drop(article_id: str, reason: str, detail: str) -> Drop:
    return Drop(source="pmc", item=article_id, reason=reason, detail=detail, article_id=article_id)
