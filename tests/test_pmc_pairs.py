"""One article to pairs: every figure is exactly one Pair or Drop, and each rule has a small article that breaks it."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from biomedclip.schema import KEY_PATTERN, Article, Drop, Figure, Pair
from data_builders.pmc.catalog import ArticleRecord, LocalBucket, SourceFile
from data_builders.pmc.pairs import (
    PmcConfig,
    SplitConfig,
    article_identity,
    article_pairs,
    compose_caption,
    sample_key,
    split_of,
)

CC_BY = "https://creativecommons.org/licenses/by/4.0/"
Item = Article | Pair | Drop
Build = Callable[..., list[Item]]


def picture(seed: int = 0, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(buffer, format)
    return buffer.getvalue()


def fig(number: int, *, caption: str | None = "A caption of some words.", graphic: str | None = "", inside: str = "",
        attributes: str = "") -> str:  # fmt: skip
    href = f"f{number}.png" if graphic == "" else graphic
    return (
        f'<fig id="F{number}" {attributes}><label>Figure {number}</label>'
        + (f"<caption><p>{caption}</p></caption>" if caption is not None else "")
        + (f'<graphic xlink:href="{href}"/>' if href else "")
        + f"{inside}</fig>"
    )


def article(figures: str, *, licence: str = f'<license xlink:href="{CC_BY}"><license-p>CC BY</license-p></license>',
            attributes: str = 'xml:lang="en"', doi: str = "10.5555/x.1", front: str = "") -> bytes:  # fmt: skip
    return (
        f'<article xmlns:xlink="http://www.w3.org/1999/xlink" article-type="research-article" {attributes}><front>'
        f'<article-meta><article-id pub-id-type="doi">{doi}</article-id><title-group><article-title>A title'
        f"</article-title></title-group><permissions>{licence}</permissions>{front}</article-meta></front>"
        f'<body><sec><title>Results</title><p>See <xref ref-type="fig" rid="F1">Figure 1A</xref>.</p>{figures}</sec>'
        "</body></article>"
    ).encode()


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Writes a bucket with one article and returns what `article_pairs` yields."""

    def run(
        xml: bytes,
        media: dict[str, bytes] | None = None,
        *,
        preset: str = "commercial-derivatives",
        config: dict[str, Any] | None = None,
        **metadata: Any,
    ) -> list[Item]:
        folder = tmp_path / "PMC7.1"
        folder.mkdir()
        media = media if media is not None else {f"f{i}.png": picture(i) for i in range(1, 4)}
        files = {"PMC7.1.xml": xml, **media}
        for name, data in files.items():
            (folder / name).write_bytes(data)
        urls = {name: f"s3://b/PMC7.1/{name}?md5={hashlib.md5(data).hexdigest()}" for name, data in files.items()}
        facts = {
            "pmcid": "PMC7", "version": 1, "license_code": "CC BY", "is_retracted": False, "is_manuscript": False,
            "xml_url": urls.pop("PMC7.1.xml"), "media_urls": list(urls.values()), "pmid": 5, "citation": "C 2024",
        }  # fmt: skip
        (folder / "PMC7.1.json").write_text(json.dumps(facts | metadata))
        bucket = LocalBucket(tmp_path)
        (record,) = bucket.records()
        assert isinstance(record, ArticleRecord)
        return list(article_pairs(record, bucket, PmcConfig(root="x", **(config or {})), preset=preset))

    return run


def pairs(items: list[Item]) -> list[Pair]:
    return [item for item in items if isinstance(item, Pair)]


def drops(items: list[Item]) -> list[tuple[str, str]]:
    return [(item.item, item.reason) for item in items if isinstance(item, Drop)]


def test_a_plain_article_gives_its_facts_and_a_pair_a_figure(build: Build) -> None:
    items = build(article(fig(1) + fig(2)))
    assert isinstance(items[0], Article)
    assert (items[0].article_id, items[0].pmcid, items[0].version) == ("PMC7.1", 7, 1)
    assert (items[0].licence, items[0].doi, items[0].pmid, items[0].citation) == ("CC BY", "10.5555/x.1", 5, "C 2024")
    first, second = pairs(items)
    assert (first.key, second.key) == ("pmc-7-v1-f1-p0", "pmc-7-v1-f2-p0")
    assert (first.image, first.image_format) == (picture(1), "png")
    assert (first.width, first.height) == (60, 40)
    assert first.sha256 == hashlib.sha256(picture(1)).hexdigest()
    assert first.caption == "A caption of some words."
    assert (first.source, first.licence, first.group_id, first.figure_id) == ("pmc", "CC BY", "PMC7", "F1")
    assert first.split == second.split
    assert first.sidecar["label"] == "Figure 1"
    assert first.sidecar["file"] == "f1.png"
    assert first.sidecar["mentions"][0]["panels"] == ["A"]


def test_every_figure_is_one_pair_or_one_drop_with_its_own_reason(build: Build) -> None:
    figures = [
        fig(1), fig(2, caption=None), fig(3, caption=" "), fig(4, graphic=None), fig(5), fig(6), fig(7), fig(8),
        fig(9, caption="Reproduced with permission from Elsevier, copyright 2017."),
        fig(10, attributes='xml:lang="fr"', caption="Une légende."),
    ]  # fmt: skip
    media = {
        "f1.png": picture(1), "f2.png": picture(2), "f3.png": picture(3), "f6.png": picture(6)[:200],
        "f7.png": b"I am not a figure", "f8.png": b"", "f9.png": picture(9), "f10.png": picture(10),
    }  # fmt: skip
    items = build(article("".join(figures)), media)
    assert [pair.figure_id for pair in pairs(items)] == ["F1"]
    assert drops(items) == [
        ("F2", "no_caption"), ("F3", "no_caption"), ("F4", "no_graphic"), ("F5", "missing_graphic"),
        ("F6", "broken_image"), ("F7", "not_an_image"), ("F8", "empty_file"), ("F9", "third_party"),
        ("F10", "other_language"),
    ]  # fmt: skip
    assert len(items) == 1 + len(figures)


@pytest.mark.parametrize(
    ("licence", "code", "preset", "reason"),
    [
        ("", None, "commercial-derivatives", "no_licence"),
        ("", None, "all", "no_licence"),
        ("", "NO-CC CODE", "all", "no_licence"),
        (f'<license xlink:href="{CC_BY}"/>', "CC BY-NC", "all", "licence_conflict"),
        ("", "CC BY-NC", "commercial", "licence_not_allowed"),
        ("", "CC BY-ND", "commercial-derivatives", "licence_not_allowed"),
        ("", "TDM", "noncommercial", "licence_not_allowed"),
    ],
)
def test_without_an_admitted_licence_every_figure_is_a_drop(
    build: Build, licence: str, code: str | None, preset: str, reason: str
) -> None:
    items = build(article(fig(1) + fig(2), licence=licence), preset=preset, license_code=code)
    assert drops(items) == [("F1", reason), ("F2", reason)]
    assert not pairs(items)


@pytest.mark.parametrize(
    ("code", "preset"),
    [("CC BY-ND", "commercial"), ("CC BY-NC", "noncommercial"), ("TDM", "all"), ("CC0", "commercial-derivatives")],
)
def test_a_preset_admits_its_licences(build: Build, code: str, preset: str) -> None:
    items = build(article(fig(1), licence=""), preset=preset, license_code=code)
    assert [pair.licence for pair in pairs(items)] == [code]


def test_a_figure_with_a_stricter_licence_of_its_own_is_judged_by_it(build: Build) -> None:
    own = '<permissions><license xlink:href="https://creativecommons.org/licenses/by-nc/4.0/"/></permissions>'
    xml = article(fig(1, inside=own) + fig(2))
    config = {"third_party": "keep"}
    assert ("F1", "licence_not_allowed") in drops(build(xml, preset="commercial", config=config))


def test_the_licence_of_a_pair_is_the_strictest_of_article_and_figure(build: Build) -> None:
    own = '<permissions><license xlink:href="https://creativecommons.org/licenses/by-nc/4.0/"/></permissions>'
    items = build(article(fig(1, inside=own) + fig(2)), preset="noncommercial", config={"third_party": "keep"})
    assert [pair.licence for pair in pairs(items)] == ["CC BY-NC", "CC BY"]


def test_third_party_figures_are_kept_under_all_and_flagged(build: Build) -> None:
    xml = article(fig(1, caption="Reprinted with permission from Springer Nature, copyright 2015."))
    (kept,) = pairs(build(xml, preset="all"))
    assert "third_party" in kept.flags


@pytest.mark.parametrize("preset", ["commercial-derivatives", "commercial", "noncommercial"])
def test_third_party_figures_are_dropped_under_every_other_preset(build: Build, preset: str) -> None:
    xml = article(fig(1, caption="Reprinted with permission from Springer Nature, copyright 2015."))
    assert drops(build(xml, preset=preset)) == [("F1", "third_party")]


def test_the_figures_of_a_retracted_article_are_dropped_whoever_says_so(build: Build) -> None:
    assert drops(build(article(fig(1)), is_retracted=True)) == [("F1", "retracted")]


def test_a_retraction_stated_in_the_xml_counts(build: Build) -> None:
    notice = '<related-article related-article-type="retracted-article" ext-link-type="doi" xlink:href="10.1/y"/>'
    xml = article(fig(1), front=notice).replace(b'"research-article"', b'"retraction"')
    assert drops(build(xml)) == [("F1", "retracted")]


@pytest.mark.parametrize(
    "xml",
    [
        b"",
        b"this is no XML",
        b"<html><body/></html>",
        b'<!DOCTYPE a [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><article>&b;</article>',
        b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><article><body>&x;</body></article>',
    ],
)
def test_hostile_or_broken_xml_is_one_drop_for_the_whole_article(build: Build, xml: bytes) -> None:
    (drop,) = build(xml)
    assert isinstance(drop, Drop)
    assert (drop.item, drop.article_id) == ("PMC7.1", "PMC7.1")
    assert "root:" not in drop.detail


def test_a_changed_xml_is_one_drop_and_a_changed_image_is_one_figure(build: Build, tmp_path: Path) -> None:
    items = build(article(fig(1) + fig(2)))
    assert len(pairs(items)) == 2
    bucket = LocalBucket(tmp_path)
    (record,) = bucket.records()
    assert isinstance(record, ArticleRecord)
    (tmp_path / "PMC7.1" / "f1.png").write_bytes(picture(99))
    changed = list(article_pairs(record, bucket, PmcConfig(root="x"), preset="commercial"))
    assert drops(changed) == [("F1", "md5_mismatch")]
    (tmp_path / "PMC7.1" / "PMC7.1.xml").write_bytes(article(""))
    (drop,) = article_pairs(record, bucket, PmcConfig(root="x"), preset="commercial")
    assert isinstance(drop, Drop)
    assert (drop.item, drop.reason) == ("PMC7.1", "md5_mismatch")
    (tmp_path / "PMC7.1" / "PMC7.1.xml").unlink()
    (drop,) = article_pairs(record, bucket, PmcConfig(root="x"), preset="commercial")
    assert isinstance(drop, Drop)
    assert drop.reason == "missing_file"


def test_an_article_without_figures_gives_its_facts_and_nothing_else(build: Build) -> None:
    (facts,) = build(article(""))
    assert isinstance(facts, Article)


def test_a_figure_of_two_graphics_is_two_pairs_that_share_the_caption(build: Build) -> None:
    items = build(article(fig(1, inside='<graphic xlink:href="f2.png"/>')))
    first, second = pairs(items)
    assert (first.key, second.key) == ("pmc-7-v1-f1-p0", "pmc-7-v1-f1-p1")
    assert (first.image, second.image) == (picture(1), picture(2))
    assert (first.panel, second.panel) == ("0", "1")
    assert first.caption == second.caption
    assert "shared_caption" in first.flags


def test_the_caption_of_a_group_comes_before_that_of_its_figures(build: Build) -> None:
    group = f"<fig-group><caption><title>All of it.</title></caption>{fig(1)}{fig(2)}</fig-group>"
    items = build(article(group))
    assert [pair.caption for pair in pairs(items)] == ["All of it. A caption of some words."] * 2


def figure(**changes: Any) -> Figure:
    facts: dict[str, Any] = {
        "article_id": "PMC7.1", "figure_id": "F1", "ordinal": 0, "label": None, "caption": "Own.", "graphic": "f",
    }  # fmt: skip
    return Figure(**{**facts, **changes})


@pytest.mark.parametrize(
    ("caption", "group", "expected"),
    [
        ("Own.", None, "Own."),
        ("Own.", "Group.", "Group. Own."),
        ("", "Group.", "Group."),
        ("Group. Own.", "Group.", "Group. Own."),
        ("", None, ""),
        (" ", " ", ""),
    ],
)
def test_a_composed_caption_repeats_nothing(caption: str, group: str | None, expected: str) -> None:
    assert compose_caption(figure(caption=caption, group_caption=group)) == expected


def test_languages_are_compared_by_their_primary_tag_and_an_unstated_one_is_kept_and_flagged(build: Build) -> None:
    (pair,) = pairs(build(article(fig(1), attributes="")))
    assert "language_unstated" in pair.flags


@pytest.mark.parametrize(
    ("language", "wanted", "kept"),
    [("en-GB", ["en"], 1), ("EN", ["en"], 1), ("fr", ["en"], 0), ("fr", ["en", "fr"], 1), ("fr", None, 1)],
)
def test_the_wanted_languages_stay(build: Build, language: str, wanted: list[str] | None, kept: int) -> None:
    items = build(article(fig(1), attributes=f'xml:lang="{language}"'), config={"languages": wanted})
    assert len(pairs(items)) == kept


RECORD = ArticleRecord(
    article_id="PMC999000001.12", pmcid=999000001, version=12, licence=None, xml=SourceFile("x", None)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=120), st.integers(0, 3)), min_size=1, max_size=8))
def test_keys_are_always_valid_and_unique(ids: list[tuple[str, int]]) -> None:
    used: set[str] = set()
    keys = [
        sample_key(RECORD, figure(figure_id=name, ordinal=n, panel_index=panel), used)
        for n, (name, panel) in enumerate(ids)
    ]
    assert all(KEY_PATTERN.fullmatch(key) for key in keys)
    assert len(set(keys)) == len(keys)
    assert used == set(keys)


def test_keys_of_real_figure_ids_can_be_read() -> None:
    used: set[str] = set()
    ids = ("pone.0000217.g001", "F1", "fig@3", "f1", "x" * 200)
    keys = [sample_key(RECORD, figure(figure_id=name), used) for name in ids]
    assert keys[:3] == [
        "pmc-999000001-v12-pone-0000217-g001-p0", "pmc-999000001-v12-f1-p0", "pmc-999000001-v12-fig-3-p0",
    ]  # fmt: skip
    assert keys[3].startswith("pmc-999000001-v12-f1-")
    assert len(keys[4]) == 80


def test_copies_and_versions_of_an_article_have_one_identity() -> None:
    def identity(pmcid: int, doi: str | None) -> str:
        return article_identity(
            Article(article_id=f"PMC{pmcid}.1", pmcid=pmcid, version=1, title="", licence=None, doi=doi)
        )

    spellings = ("10.1/AbC", "https://doi.org/10.1/abc", "http://dx.doi.org/10.1/abc", "doi:10.1/abc", " 10.1/abc ")
    assert len({identity(n, doi) for n, doi in enumerate(spellings)}) == 1
    assert identity(5, None) == identity(5, "") == "pmc:5"


def test_split_shares_are_those_asked_for_and_articles_stay_where_they_were() -> None:
    names = [f"doi:10.1/{i}" for i in range(5000)]
    before = SplitConfig(val=0.1, test=0.2)
    shares = Counter(split_of(name, before) for name in names)
    assert shares["val"] == pytest.approx(500, abs=90)
    assert shares["test"] == pytest.approx(1000, abs=120)
    after = SplitConfig(val=0.1, test=0.3)
    moved = Counter((split_of(name, before), split_of(name, after)) for name in names)
    assert set(moved) == {("val", "val"), ("test", "test"), ("train", "train"), ("train", "test")}
    assert {split_of(name, SplitConfig(val=0, test=0)) for name in names} == {"train"}
    assert any(split_of(name, before) != split_of(name, SplitConfig(val=0.1, test=0.2, seed=1)) for name in names)


def test_shares_that_leave_nothing_to_train_are_refused() -> None:
    with pytest.raises(ValueError, match="must be below 1"):
        SplitConfig(val=0.5, test=0.5)
