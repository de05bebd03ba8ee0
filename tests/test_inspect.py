"""One article looked at: the decisions of a build, from every kind of place, and nothing a stranger wrote runs."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from mock_bucket import MockBucket
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from biomedclip import cli
from biomedclip.config import check_config
from biomedclip.errors import ConfigError, DataError
from biomedclip.schema import Article, Drop, Pair
from data_builders.build import BuildConfig, build
from data_builders.pmc.catalog import ArticleRecord, LocalBucket
from data_builders.pmc.inspection import InspectConfig, Inspection, inspect_source, parse_wanted
from data_builders.pmc.inspection_folders import inspect_article
from data_builders.pmc.inspection_views import count_line, print_inspection, printable, write_inspection
from data_builders.pmc.pairs import article_pairs
from data_builders.purge import Withdrawal, purge
from data_builders.units import write_unit

SAMPLE = Path(str(resources.files("data_builders"))) / "sample" / "pmc"
HOSTILE = "[red]x[/] &lt;script&gt;alert(1)&lt;/script&gt; &quot;&gt;&lt;img src=http://evil.example/x&gt;"
WHOLE = check_config({"licence": "commercial-derivatives", "panels": {"mode": "none"}}, InspectConfig, "test")
STRICT = check_config({"licence": "commercial-derivatives"}, InspectConfig, "test")


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_article(root: Path, figures: str, media: dict[str, bytes], *, licence: str = "", code: str | None) -> None:
    xml = (
        '<article xmlns:xlink="http://www.w3.org/1999/xlink" xml:lang="en"><front><article-meta><title-group>'
        f"<article-title>{HOSTILE}</article-title></title-group><permissions>{licence}</permissions></article-meta>"
        f'</front><body><sec><p>See <xref ref-type="fig" rid="F1">Figure 1</xref>.</p>{figures}</sec></body></article>'
    ).encode()
    folder = root / "PMC7.1"
    folder.mkdir(parents=True)
    urls = {}
    for name, data in {"PMC7.1.xml": xml, **media}.items():
        (folder / name).write_bytes(data)
        urls[name] = f"s3://b/PMC7.1/{name}?md5={hashlib.md5(data).hexdigest()}"
    facts = {"pmcid": "PMC7", "version": 1, "license_code": code, "is_retracted": False, "is_manuscript": False,
             "xml_url": urls.pop("PMC7.1.xml"), "media_urls": list(urls.values())}  # fmt: skip
    (folder / "PMC7.1.json").write_text(json.dumps(facts))


def fig(number: int, caption: str, graphic: str) -> str:
    return (
        f'<fig id="F{number}"><label>Figure {number}</label><caption><p>{caption}</p></caption>'
        f'<graphic xlink:href="{graphic}"/></fig>'
    )


def shown(seen: Inspection, width: int = 200) -> str:
    out = io.StringIO()
    print_inspection(seen, Console(file=out, width=width, highlight=False))
    return out.getvalue()


@lru_cache
def inspect_sample() -> Inspection:
    """Six figures, of which three are cut into seven panels."""
    return inspect_source("PMC999000012", "sample://pmc", STRICT)


@lru_cache
def sample_items() -> list[Article | Pair | Drop]:
    (record,) = LocalBucket(SAMPLE).find(999000012)
    assert isinstance(record, ArticleRecord)
    return list(article_pairs(record, LocalBucket(SAMPLE), STRICT, preset="commercial-derivatives"))


@pytest.mark.slow
def test_what_is_shown_is_what_a_build_decides():
    items, seen = sample_items(), inspect_sample()
    panels = [panel for figure in seen.figures for panel in figure.panels]
    keys = [figure.key for figure in seen.figures if figure.status == "kept"] + [panel.key for panel in panels]
    assert sorted(filter(None, keys)) == sorted(item.key for item in items if isinstance(item, Pair))
    dropped = [(figure.item, figure.reason) for figure in seen.figures if figure.reason]
    assert dropped == [(item.item, item.reason) for item in items if isinstance(item, Drop)]
    assert seen.article == items[0]
    for figure in seen.figures:
        for panel in figure.panels:
            assert panel.box is not None
            assert 0 <= panel.box[0] < panel.box[2] <= figure.width
            assert 0 <= panel.box[1] < panel.box[3] <= figure.height


def test_an_article_without_version_is_the_one_a_build_takes_and_the_others_are_named():
    seen = inspect_source("PMC999000007", "sample://pmc")
    assert seen.article_id == "PMC999000007.2"
    assert seen.notes == ("PMC999000007.1: superseded_version",)
    assert inspect_source("PMC999000007.1", "sample://pmc").article_id == "PMC999000007.1"


def test_the_three_inputs_of_a_licence_decision_are_shown_beside_it(tmp_path):
    link = '<license xlink:href="https://creativecommons.org/licenses/by/4.0/"><license-p>Creative Commons Attribution '
    link += "Non-Commercial License</license-p></license>"
    write_article(tmp_path, fig(1, "Words.", "f1.png"), {"f1.png": picture(1)}, licence=link, code="CC BY")
    seen = inspect_source("PMC7", str(tmp_path))
    assert seen.licence.decision == "licence_conflict"
    assert seen.licence.presets == ()
    assert seen.licence.metadata == "CC BY"
    assert "-> CC BY" in seen.licence.links[0]
    assert any(piece.endswith("-> CC BY-NC") for piece in seen.licence.words)
    text = shown(seen)
    assert "licence_conflict: admitted by no preset" in text
    assert re.search(r"metadata +CC BY *\n", text)
    assert seen.figures[0].reason == "licence_conflict"
    assert seen.figures[0].image == picture(1)  # a dropped figure is shown all the same


def test_every_dropped_figure_says_why_and_what_it_would_have_been(tmp_path):
    figures = [
        fig(1, "Kept.", "f1"), fig(2, "Nobody has it.", "gone.tif"), fig(3, "", "f3.png"), fig(4, "Cut.", "f4.png"),
        fig(5, "Reprinted with permission from Elsevier, copyright 2017.", "f5.png"),
    ]  # fmt: skip
    media = {f"f{n}.png": picture(n) for n in (1, 3, 5)} | {"f4.png": picture(4)[:300]}
    write_article(tmp_path, "".join(figures), media, code="CC BY")
    seen = inspect_source("pmc7.1", str(tmp_path), STRICT)
    found = [(figure.item, figure.reason, figure.file, figure.image is not None) for figure in seen.figures]
    assert found == [
        ("F1", None, "f1.png", True), ("F2", "missing_graphic", None, False), ("F3", "no_caption", "f3.png", True),
        ("F4", "broken_image", "f4.png", False), ("F5", "third_party", "f5.png", True),
    ]  # fmt: skip
    assert seen.figures[0].mentions == ("See Figure 1.",)
    text = shown(seen)
    assert "5 seen = 1 kept + 4 dropped (missing_graphic 1, no_caption 1, broken_image 1, third_party 1)" in text
    assert "gone.tif -> no file of the article" in text
    assert "f1 -> f1.png" in text
    assert "60 x 40 px" in text
    assert inspect_source("PMC7", str(tmp_path)).figures[4].status == "kept"  # under the preset `all`


def test_an_article_whose_xml_cannot_be_read_is_one_reason(tmp_path):
    write_article(tmp_path, "", {}, code="CC BY")
    (tmp_path / "PMC7.1" / "PMC7.1.xml").write_bytes(b"changed")
    seen = inspect_source("PMC7", str(tmp_path))
    assert seen.article is None
    assert [figure.reason for figure in seen.figures] == ["md5_mismatch"]
    assert "dropped: md5_mismatch" in shown(seen)
    (tmp_path / "PMC7.1" / "PMC7.1.json").write_text("{}")
    assert [figure.reason for figure in inspect_source("PMC7", str(tmp_path)).figures] == ["metadata_error"]


def test_the_page_holds_its_pictures_and_asks_for_nothing(tmp_path):
    write_article(tmp_path, fig(1, HOSTILE, "f1.png"), {"f1.png": picture(1)}, code="CC BY")
    path = write_inspection(tmp_path / "it.html", inspect_source("PMC7", str(tmp_path)))
    page = path.read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 1
    assert not re.findall(r'(?:src|href)="(?!data:|https://(?:doi\.org|pmc\.ncbi\.nlm\.nih\.gov)/)', page)
    assert "default-src 'none'" in page
    assert write_inspection(tmp_path / "again.html", inspect_source("PMC7", str(tmp_path))).read_text() == page


def test_the_page_draws_the_boxes_of_panels(tmp_path):
    seen = inspect_sample()
    page = write_inspection(tmp_path / "it.html", seen).read_text()
    assert page.count('<rect class="panel"') == sum(len(figure.panels) for figure in seen.figures) == 7
    assert '<text class="tab"' in page


def test_terminals_get_plain_text(tmp_path):
    write_article(tmp_path, fig(1, "[bold]x[/bold] [link=http://e]", "f1.png"), {"f1.png": picture(1)}, code="CC BY")
    assert "[bold]x[/bold] [link=http://e]" in shown(inspect_source("PMC7", str(tmp_path)))
    assert printable("a\x1b[31mb\nc\u202e") == "a�[31mb c�"


def write_mirror(root: Path) -> None:
    root.mkdir()
    with tarfile.open(root / "PMC999000012.tar.gz", "w:gz") as tar:
        for path in sorted((SAMPLE / "PMC999000012.1").iterdir()):
            if path.suffix != ".json":
                name = path.name.replace("PMC999000012.1.xml", "article.nxml")
                tar.add(path, f"PMC999000012/{name}")


def test_every_kind_of_source_shows_the_same_figures(tmp_path):
    local = inspect_sample()
    write_mirror(tmp_path / "mirror")
    mirror = inspect_source("PMC999000012", str(tmp_path / "mirror"), WHOLE)
    with MockBucket(SAMPLE) as bucket:
        cloud = inspect_source("PMC999000012.1", bucket.endpoint, WHOLE)
        two = inspect_source("PMC999000007", bucket.endpoint, WHOLE)
        with pytest.raises(DataError, match="holds no article PMC5"):
            inspect_source("PMC5", bucket.endpoint, STRICT)
        asked = {request.key.partition("/")[0] for request in bucket.log if request.key}
    assert asked <= {"PMC999000012.1", "PMC999000007.1", "PMC999000007.2", "metadata"}  # no other article is touched
    kept = [(figure.key, figure.image, figure.file) for figure in local.figures]
    assert [(figure.key, figure.image, figure.file) for figure in cloud.figures] == kept
    assert [figure.key for figure in mirror.figures] == [figure.key for figure in local.figures]
    assert mirror.licence.metadata is None
    assert two.article_id == "PMC999000007.2"
    with pytest.raises(DataError, match="holds no article PMC5"):
        inspect_source("PMC5", str(tmp_path / "mirror"))
    (tmp_path / "mirror" / "PMC5.tar.gz").write_bytes(b"\x1f\x8bno")
    assert inspect_source("PMC5", str(tmp_path / "mirror")).figures[0].reason == "broken_package"


@pytest.mark.slow
def test_a_dataset_folder_and_a_folder_of_units_show_what_they_keep(tmp_path):
    for name in ("PMC999000012.1", "PMC999000007.1", "PMC999000007.2"):
        shutil.copytree(SAMPLE / name, tmp_path / "bucket" / name)
    rules = {"panels": {"mode": "split"}, "concepts": True}
    config = {"name": "x", "licence": "commercial-derivatives",
              "source": {"kind": "pmc", "root": str(tmp_path / "bucket"), **rules}}  # fmt: skip
    build(check_config(config, BuildConfig, "test"), tmp_path / "shards")
    write_unit(tmp_path / "raw", "unit-000000", sample_items(), identity={})
    source = inspect_sample()
    for folder in ("shards", "raw"):
        seen = inspect_article("PMC999000012", str(tmp_path / folder))
        by_item = {figure.item: figure for figure in seen.figures}
        assert len(by_item) == len(seen.figures) == len(source.figures)
        for figure in source.figures:
            found = by_item[figure.item]
            assert (found.key, found.image, found.caption, found.file) == (
                figure.key, figure.image, figure.caption, figure.file,
            )  # fmt: skip
            assert {panel.key: panel.box for panel in found.panels} == {p.key: p.box for p in figure.panels}
        assert seen.licence.decision == "CC BY"
        assert "admitted by commercial-derivatives" in shown(seen)
    with pytest.raises(DataError, match="holds no article PMC5"):
        inspect_article("PMC5", str(tmp_path / "shards"))
    purge(tmp_path / "shards", [Withdrawal(what="PMC999000007", reason="retracted", stated="2026-10-01")])
    taken = inspect_article("PMC999000007.2", str(tmp_path / "shards"))
    assert "pmc-999000007-v2-fig1-p0 was taken back: retracted, stated 2026-10-01" in taken.notes
    assert len(inspect_article("PMC999000012", str(tmp_path / "shards")).notes) == 1
    old = inspect_article("PMC999000007.1", str(tmp_path / "shards"))
    assert [figure.reason for figure in old.figures] == ["superseded_version"]


@pytest.mark.parametrize("text", ["", "PMC", "PMC0", "PMC1.0", "12.x", "../PMC1", "PMC1.1/x"])
def test_what_is_no_article_id_is_refused(text):
    with pytest.raises(ConfigError, match="is no article id"):
        parse_wanted(text)


def test_the_command_prints_writes_and_ends_with_2_where_there_is_nothing(tmp_path, monkeypatch, capsys):
    html = tmp_path / "it.html"
    arguments = ["PMC999000012", "-s", "sample://pmc", "--html", str(html), "--set", "panels.mode=none"]
    done = CliRunner().invoke(cli.app, ["data", "inspect", *arguments])
    assert done.exit_code == 0
    assert "6 seen = 6 kept + 0 dropped" in done.output
    assert html.stat().st_size > 10_000
    for arguments, wrong in (
        (["PMC5", "-s", "sample://pmc"], "holds no article PMC5"),
        (["PMC999000012.4", "-s", "sample://pmc"], "found PMC999000012.1"),
        (["PMC5", "-s", "/nowhere"], "there is no such folder"),
        (["PMC5", "-s", "sample://pmc", "--set", "licence=gpl"], "licence"),
    ):
        monkeypatch.setattr("sys.argv", ["biomedclip", "data", "inspect", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        error = capsys.readouterr().err.strip()
        assert wrong in error
        assert len(error.splitlines()) == 1


def test_panels_are_counted_apart_from_figures():
    assert count_line(inspect_sample()).endswith("6 kept + 0 dropped; 7 panels")
