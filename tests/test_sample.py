"""The sample data that come with the project: small, openly licensed, credited, and what their metadata say."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

import data_builders
from data_builders.pmc.catalog import ARTICLE_ID, ArticleRecord, LocalBucket

SAMPLE = Path(data_builders.__file__).parent / "sample"
PMC = SAMPLE / "pmc"
FIELDS = {
    "pmcid", "version", "pmid", "doi", "title", "citation", "is_pmc_openaccess", "is_manuscript", "is_historical_ocr",
    "is_retracted", "license_code", "xml_url", "pdf_url", "text_url", "media_urls",
}  # fmt: skip


def articles() -> list[tuple[str, dict[str, Any]]]:
    folders = sorted(path for path in PMC.iterdir() if ARTICLE_ID.fullmatch(path.name))
    return [(path.name, json.loads((path / f"{path.name}.json").read_bytes())) for path in folders]


def test_the_whole_sample_is_at_most_15_mb_and_the_articles_at_most_10_3() -> None:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size(PMC) <= 10_300_000
    assert size(SAMPLE) <= 15_000_000


def test_there_are_at_least_20_articles_and_80_images() -> None:
    found = articles()
    assert len({metadata["pmcid"] for _, metadata in found}) >= 20
    assert sum(len(metadata["media_urls"]) for _, metadata in found) >= 80


@pytest.mark.parametrize(("article_id", "metadata"), articles(), ids=[article_id for article_id, _ in articles()])
def test_metadata_have_the_fields_of_the_service_and_the_md5_of_every_file(
    article_id: str, metadata: dict[str, Any]
) -> None:
    assert set(metadata) == FIELDS
    assert f"{metadata['pmcid']}.{metadata['version']}" == article_id
    assert metadata["license_code"] in ("CC BY", "CC0")
    assert (PMC / "metadata" / f"{article_id}.json").read_bytes() == (
        PMC / article_id / f"{article_id}.json"
    ).read_bytes()
    promised = {}
    for url in [metadata["xml_url"], *metadata["media_urls"]]:
        key, md5 = url.removeprefix("s3://pmc-oa-opendata/").split("?md5=")
        promised[key] = md5
    there = [path for path in (PMC / article_id).iterdir() if path.name != f"{article_id}.json"]
    assert promised == {f"{article_id}/{path.name}": hashlib.md5(path.read_bytes()).hexdigest() for path in there}


def test_ids_are_those_the_articles_state_or_beyond_what_pmc_has_given_out() -> None:
    for article_id, metadata in articles():
        xml = etree.parse(
            PMC / article_id / f"{article_id}.xml", etree.XMLParser(load_dtd=False, no_network=True, recover=True)
        )
        stated = {"PMC" + node.text.removeprefix("PMC") for node in xml.iterfind(".//{*}front//{*}article-id")
                  if node.get("pub-id-type") in ("pmc", "pmcid")}  # fmt: skip
        assert stated == {metadata["pmcid"]} if stated else int(metadata["pmcid"][3:]) >= 999_000_001


def test_every_article_is_credited_once() -> None:
    with (PMC / "ATTRIBUTION.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["article_id"] for row in rows) == sorted(article_id for article_id, _ in articles())
    metadata = dict(articles())
    for row in rows:
        assert all(row[column] for column in ("doi", "title", "authors", "licence", "source", "changes"))
        assert row["doi"] == metadata[row["article_id"]]["doi"]
        assert row["title"] == metadata[row["article_id"]]["title"]
        assert row["licence"].startswith(metadata[row["article_id"]]["license_code"])
        assert row["licence_url"].startswith("https://creativecommons.org/") or "in words" in row["licence"]


def test_the_catalog_reads_every_article_and_every_file() -> None:
    bucket = LocalBucket(PMC)
    for item in bucket.records():
        assert isinstance(item, ArticleRecord)
        for file in (item.xml, *item.media):
            assert bucket.read(file)


def test_the_sample_says_where_it_comes_from() -> None:
    assert (SAMPLE / "README.md").exists()
    for folder in SAMPLE.iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            assert (folder / "PROVENANCE.md").exists(), folder
