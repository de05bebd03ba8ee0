"""Records of a local bucket: the order, the versions, and every way metadata and files can be wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from biomedclip.errors import DataError
from biomedclip.schema import Drop
from data_builders.pmc.catalog import (
    ArticleRecord,
    BadFile,
    LocalBucket,
    SourceFile,
    choose_versions,
    fingerprint,
    is_safe_key,
    parse_metadata,
)

Put = Callable[..., None]


def metadata(article_id: str, files: dict[str, bytes], **changes: Any) -> dict[str, Any]:
    pmcid, version = article_id.split(".")

    def url(name: str, data: bytes) -> str:
        return f"s3://pmc-oa-opendata/{article_id}/{name}?md5={hashlib.md5(data).hexdigest()}"

    xml = f"{article_id}.xml"
    facts = {
        "pmcid": pmcid, "version": int(version), "pmid": None, "doi": "10.1/x", "title": "T", "citation": "C",
        "is_pmc_openaccess": True, "is_manuscript": False, "is_historical_ocr": False, "is_retracted": False,
        "license_code": "CC BY", "xml_url": url(xml, files.get(xml, b"")), "pdf_url": None, "text_url": None,
        "media_urls": [url(name, data) for name, data in files.items() if name != xml],
    }  # fmt: skip
    return facts | changes


@pytest.fixture
def put(tmp_path: Path) -> Put:
    def write(article_id: str, files: dict[str, bytes] | None = None, **changes: Any) -> None:
        files = files if files is not None else {f"{article_id}.xml": b"<article/>", "f1.jpg": b"picture"}
        folder = tmp_path / article_id
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        (folder / f"{article_id}.json").write_text(json.dumps(metadata(article_id, files, **changes)))

    return write


def only(bucket: LocalBucket) -> ArticleRecord | Drop:
    (item,) = bucket.records()
    return item


def test_a_record_holds_what_the_metadata_say(put: Put, tmp_path: Path) -> None:
    put("PMC12.3", pmid=77, license_code="CC BY-NC")
    record = only(LocalBucket(tmp_path))
    assert isinstance(record, ArticleRecord)
    assert (record.article_id, record.pmcid, record.version, record.pmid) == ("PMC12.3", 12, 3, 77)
    assert (record.licence, record.doi) == ("CC BY-NC", "10.1/x")
    assert record.xml == SourceFile("PMC12.3/PMC12.3.xml", hashlib.md5(b"<article/>").hexdigest())
    assert [file.name for file in record.media] == ["f1.jpg"]
    assert LocalBucket(tmp_path).read(record.media[0]) == b"picture"


def test_records_come_in_the_order_of_numbers_not_of_letters(put: Put, tmp_path: Path) -> None:
    for article_id in ("PMC10.1", "PMC9.10", "PMC9.2"):
        put(article_id)
    (tmp_path / "inventory-reports").mkdir()
    assert [item.article_id for item in LocalBucket(tmp_path).records()] == ["PMC9.2", "PMC9.10", "PMC10.1"]


def test_the_metadata_folder_is_used_where_the_article_folder_has_none(put: Put, tmp_path: Path) -> None:
    put("PMC1.1")
    (tmp_path / "metadata").mkdir()
    (tmp_path / "PMC1.1" / "PMC1.1.json").rename(tmp_path / "metadata" / "PMC1.1.json")
    assert isinstance(only(LocalBucket(tmp_path)), ArticleRecord)


def test_absent_media_urls_are_no_media(put: Put, tmp_path: Path) -> None:
    put("PMC1.1", media_urls=None)
    record = only(LocalBucket(tmp_path))
    assert isinstance(record, ArticleRecord)
    assert record.media == ()


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"{not json", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        (json.dumps(metadata("PMC2.1", {})).encode(), "speaks of PMC2.1"),
        (json.dumps(metadata("PMC1.1", {}, is_retracted=None)).encode(), "is_retracted"),
        (json.dumps(metadata("PMC1.1", {}, xml_url=None)).encode(), "xml_url"),
        (json.dumps(metadata("PMC1.1", {}, xml_url="https://elsewhere/x")).encode(), "bad_url"),
        (json.dumps(metadata("PMC1.1", {}, media_urls=["s3://b/PMC1.1/../../etc/passwd"])).encode(), "unsafe_key"),
        (json.dumps(metadata("PMC1.1", {}, media_urls=["s3://b/PMC2.1/f.jpg"])).encode(), "unsafe_key"),
    ],
)
def test_metadata_that_cannot_be_trusted_become_a_drop(data: bytes, detail: str) -> None:
    item = parse_metadata(data, "PMC1.1")
    assert isinstance(item, Drop)
    assert (item.reason, item.item, item.article_id) == ("metadata_error", "PMC1.1", "PMC1.1")
    assert detail in item.detail


def test_an_article_folder_without_metadata_is_a_drop(tmp_path: Path) -> None:
    (tmp_path / "PMC1.1").mkdir()
    item = only(LocalBucket(tmp_path))
    assert isinstance(item, Drop)
    assert item.reason == "no_metadata"


def test_a_folder_without_articles_is_an_error_that_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no articles; expected folders such as PMC10009416\.1"):
        list(LocalBucket(tmp_path).records())
    with pytest.raises(DataError, match="there is no such folder"):
        LocalBucket(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (SourceFile("PMC1.1/f1.jpg", "0" * 32), "md5_mismatch"),
        (SourceFile("PMC1.1/absent.jpg", None), "missing_file"),
        (SourceFile("PMC1.1", None), "missing_file"),
        (SourceFile("PMC1.1/../secret", None), "unsafe_key"),
        (SourceFile("/etc/passwd", None), "unsafe_key"),
        (SourceFile("PMC1.1/link.jpg", None), "unsafe_key"),
    ],
)
def test_a_file_is_read_only_if_it_is_the_promised_one_inside_the_source(
    put: Put, tmp_path: Path, file: SourceFile, reason: str
) -> None:
    put("PMC1.1")
    secret = tmp_path.parent / f"{tmp_path.name}-secret"
    secret.write_bytes(b"secret")
    (tmp_path / "PMC1.1" / "link.jpg").symlink_to(secret)
    with pytest.raises(BadFile) as caught:
        LocalBucket(tmp_path).read(file)
    assert caught.value.reason == reason


@pytest.mark.parametrize("key", ["a/../b", "../a", "/a", "a//b", "a/.", "a\\b", "a\nb", "a\x00b", ""])
def test_unsafe_keys_are_known(key: str) -> None:
    assert not is_safe_key(key)


def test_names_with_blanks_and_accents_are_safe() -> None:
    assert is_safe_key("PMC1.1/Fig 1 é..jpg")


def test_of_several_versions_one_is_chosen_and_the_others_are_counted(put: Put, tmp_path: Path) -> None:
    put("PMC1.1")
    put("PMC1.2", {"PMC1.2.xml": b"<article/>"})
    put("PMC1.3", is_manuscript=True)
    put("PMC2.1")
    put("PMC2.2")
    items = list(choose_versions(LocalBucket(tmp_path).records()))
    chosen = [item.article_id for item in items if isinstance(item, ArticleRecord)]
    superseded = [(item.item, item.reason) for item in items if isinstance(item, Drop)]
    assert chosen == ["PMC1.1", "PMC2.2"]
    assert superseded == [
        ("PMC1.2", "superseded_version"), ("PMC1.3", "superseded_version"), ("PMC2.1", "superseded_version"),
    ]  # fmt: skip


def test_a_retraction_of_one_version_holds_for_the_article(put: Put, tmp_path: Path) -> None:
    put("PMC1.1")
    put("PMC1.2", {"PMC1.2.xml": b"<article/>"}, is_retracted=True)
    chosen = [item for item in choose_versions(LocalBucket(tmp_path).records()) if isinstance(item, ArticleRecord)]
    assert [(record.article_id, record.is_retracted) for record in chosen] == [("PMC1.1", True)]


def test_the_fingerprint_follows_content_not_place(put: Put, tmp_path: Path) -> None:
    put("PMC1.1")
    before = fingerprint(LocalBucket(tmp_path))
    moved = tmp_path.rename(tmp_path.parent / f"{tmp_path.name}-moved")
    assert fingerprint(LocalBucket(moved)) == before
    assert before[1] == 1
    path = moved / "PMC1.1" / "PMC1.1.json"
    path.write_text(path.read_text().replace('"license_code": "CC BY"', '"license_code": "CC0"'))
    assert fingerprint(LocalBucket(moved))[0] != before[0]
