"""What a build of PMC adds where its config asks: panels, and how they are counted; concepts; MeSH terms."""

from __future__ import annotations

import hashlib
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from biomedclip.config import check_config
from biomedclip.errors import ConfigError, DataError
from biomedclip.schema import Article, Drop, Pair
from biomedclip.shards import DatasetFolder
from data_builders.build import BuildConfig, build, config_sha256, open_input
from data_builders.pmc.catalog import ArticleRecord, LocalBucket
from data_builders.pmc.mesh_terms import read_mesh_terms
from data_builders.pmc.pairs import PmcConfig, article_pairs
from data_builders.pmc.panel_boxes import read_boxes

CAPTION = "Chest of a child. (A) CT scan of the left lung. (B) Histology of it, H&amp;E stain."
BODY = (
    '<p>A scan (<xref rid="F1">Fig. 1A</xref>). A slide (<xref rid="F1">Fig. 1B</xref>). All of it'
    ' (<xref rid="F1">Fig. 1</xref>). Both (<xref rid="F1">Fig. 1A, B</xref>).</p>'
)


def grid(columns: int = 2) -> bytes:
    picture = np.full((80, columns * 92 - 12, 3), 255, np.uint8)
    dice = np.random.default_rng(0)
    for column in range(columns):
        picture[:, column * 92 : column * 92 + 80] = dice.integers(0, 120, (80, 80, 3))
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def write_bucket(
    root: Path, *, caption: str = CAPTION, licence: str = "CC BY", graphics: int = 1, body: str = BODY
) -> LocalBucket:
    """A bucket of one article with one figure."""
    hrefs = "".join(f'<graphic xlink:href="f{n}.png"/>' for n in range(graphics))
    xml = (
        '<article xmlns:xlink="http://www.w3.org/1999/xlink" xml:lang="en"><front><article-meta><title-group>'
        f"<article-title>T</article-title></title-group></article-meta></front><body>{body}"
        f'<fig id="F1"><label>Figure 1</label><caption><p>{caption}</p></caption>{hrefs}</fig></body></article>'
    ).encode()
    files = {"PMC7.1.xml": xml, **{f"f{n}.png": grid() for n in range(graphics)}}
    folder = root / "bucket" / "PMC7.1"
    folder.mkdir(parents=True)
    urls = {name: f"s3://b/PMC7.1/{name}?md5={hashlib.md5(data).hexdigest()}" for name, data in files.items()}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    facts = {
        "pmcid": "PMC7", "version": 1, "license_code": licence, "is_retracted": False, "is_manuscript": False,
        "xml_url": urls.pop("PMC7.1.xml"), "media_urls": list(urls.values()), "pmid": 5,
    }  # fmt: skip
    (folder / "PMC7.1.json").write_text(json.dumps(facts))
    return LocalBucket(root / "bucket")


def items(bucket: LocalBucket, preset: str = "commercial", **rules: Any) -> list[Pair | Drop]:
    (record,) = bucket.records()
    assert isinstance(record, ArticleRecord)
    config = check_config({"root": "x", **rules}, PmcConfig, "test")
    found = article_pairs(record, bucket, config, preset=preset)
    return [item for item in found if not isinstance(item, Article)]


def pairs(found: list[Pair | Drop]) -> list[Pair]:
    assert all(isinstance(item, Pair) for item in found)
    return [item for item in found if isinstance(item, Pair)]


def test_figures_stay_whole_and_unmarked_unless_panels_are_asked_for(tmp_path: Path) -> None:
    (whole,) = pairs(items(write_bucket(tmp_path)))
    assert (whole.panel, whole.flags, whole.concepts, whole.modality) == (None, (), (), None)


def test_panels_stand_after_their_figure_and_name_it(tmp_path: Path) -> None:
    whole, a, b = pairs(items(write_bucket(tmp_path), panels={"mode": "split"}))
    assert (whole.key, a.key, b.key) == ("pmc-7-v1-f1-p0", "pmc-7-v1-f1-p0-a", "pmc-7-v1-f1-p0-b")
    assert (whole.panel, a.panel, b.panel) == (None, "A", "B")
    assert whole.sidecar["panels"] == ["A", "B"]
    assert whole.sidecar["panel_captions"] == {"A": a.caption, "B": b.caption}
    assert a.sidecar["parent"] == b.sidecar["parent"] == whole.key
    assert whole.image == grid()
    assert "left lung" in a.caption
    assert "left lung" not in b.caption
    assert {pair.split for pair in (whole, a, b)} == {whole.split}
    assert {pair.group_id for pair in (whole, a, b)} == {"PMC7"}
    assert ("has_panels" in whole.flags, "panel" in a.flags) == (True, True)


def test_a_panel_has_the_mentions_that_name_it(tmp_path: Path) -> None:
    whole, a, b = pairs(items(write_bucket(tmp_path), panels={"mode": "split"}))
    texts = [[mention["text"] for mention in pair.sidecar["mentions"]] for pair in (whole, a, b)]
    assert texts[0] == ["A scan (Fig. 1A).", "A slide (Fig. 1B).", "All of it (Fig. 1).", "Both (Fig. 1A, B)."]
    assert texts[1] == ["A scan (Fig. 1A).", "Both (Fig. 1A, B)."]
    assert texts[2] == ["A slide (Fig. 1B).", "Both (Fig. 1A, B)."]


def test_a_panel_has_its_mentions_also_behind_many_of_others(tmp_path: Path) -> None:
    many = "".join(f'<p>Scan {n}, <xref rid="F1">Fig. 1A</xref>.</p>' for n in range(9))
    last = '<p>The slide, <xref rid="F1">Fig. 1B</xref>.</p>'
    whole, a, b = pairs(items(write_bucket(tmp_path, body=many + last), panels={"mode": "split"}))
    assert [len(pair.sidecar["mentions"]) for pair in (whole, a, b)] == [5, 5, 1]
    assert b.sidecar["mentions"][0]["text"] == "The slide, Fig. 1B."


def test_a_replaced_figure_is_a_drop_and_its_panels_are_kept(tmp_path: Path) -> None:
    drop, a, b = items(write_bucket(tmp_path), panels={"mode": "split", "parent": "replace"})
    assert isinstance(drop, Drop)
    assert (drop.item, drop.reason, drop.detail) == ("F1", "replaced_by_panels", "A B")
    assert [pair.panel for pair in pairs([a, b])] == ["A", "B"]


@pytest.mark.parametrize(
    ("changes", "preset", "flag"),
    [
        ({"licence": "CC BY-ND"}, "commercial", "panels_not_allowed"),
        ({"licence": "CC BY-NC-ND"}, "noncommercial", "panels_not_allowed"),
        ({"licence": "TDM"}, "all", "panels_not_allowed"),
        ({"caption": "Four. (A) One. (B) Two. (C) Three. (D) Four."}, "commercial", "panels_uncut"),
        ({"graphics": 2}, "commercial", "panels_shared"),
    ],
)
def test_a_compound_figure_that_stays_whole_says_why(
    tmp_path: Path, changes: dict[str, Any], preset: str, flag: str
) -> None:
    found = pairs(items(write_bucket(tmp_path, **changes), preset, panels={"mode": "split", "parent": "replace"}))
    assert len(found) == changes.get("graphics", 1)
    assert all(flag in pair.flags and "panel" not in pair.flags for pair in found)


def test_a_figure_without_panels_is_not_marked(tmp_path: Path) -> None:
    (whole,) = pairs(items(write_bucket(tmp_path, caption="A chest X-ray."), panels={"mode": "split"}))
    assert not [flag for flag in whole.flags if "panel" in flag]


def test_a_higher_confidence_leaves_more_figures_whole(tmp_path: Path) -> None:
    bucket = write_bucket(tmp_path, caption="Cells. A, Control group of mice. B, Treated.")
    assert len(items(bucket, panels={"mode": "split"})) == 3
    (whole,) = pairs(items(bucket, panels={"mode": "split", "min_confidence": 0.99}))
    assert "panels_uncut" in whole.flags


ROWS = [
    {"article_id": "PMC7.1", "figure_id": "F1", "x0": 0, "y0": 0, "x1": 30, "y1": 80, "score": 0.9, "letter": "B"},
    {"article_id": "PMC7.1", "figure_id": "F1", "x0": 40, "y0": 0, "x1": 90, "y1": 80, "score": 0.8, "letter": "a"},
    {"article_id": "PMC7.1", "figure_id": "F1", "x0": 0, "y0": 0, "x1": 9, "y1": 9, "score": 0.1, "letter": "A"},
]


def write_boxes(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_boxes_of_a_detector_come_from_any_table(tmp_path: Path, form: str) -> None:
    boxes = write_boxes(tmp_path / f"boxes.{form}", ROWS)
    bucket = write_bucket(tmp_path)
    whole, a, b = pairs(items(bucket, panels={"mode": "split", "boxes": str(boxes)}))
    assert [(pair.panel, pair.width, pair.height) for pair in (a, b)] == [("A", 50, 80), ("B", 30, 80)]
    assert a.sidecar["panel_box"] == [40, 0, 90, 80]
    assert a.sidecar["panel_confidence"] == 0.8
    assert "has_panels" in whole.flags


def test_boxes_may_name_a_figure_by_its_key_and_figures_without_boxes_stay_whole(tmp_path: Path) -> None:
    rows = [{"key": "pmc-7-v1-f1-p0", **{k: v for k, v in row.items() if not k.endswith("_id")}} for row in ROWS]
    bucket = write_bucket(tmp_path)
    named = write_boxes(tmp_path / "named.csv", rows)
    assert len(items(bucket, panels={"mode": "split", "boxes": str(named)})) == 3
    others = write_boxes(tmp_path / "others.csv", [{**row, "key": "pmc-8-v1-f1-p0"} for row in rows])
    (whole,) = pairs(items(bucket, panels={"mode": "split", "boxes": str(others)}))
    assert "panels_uncut" in whole.flags


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("b.csv", "article_id,figure_id,x0,y0,x1,y1\nPMC7.1,F1,5,0,1,9\n", r"b\.csv:2: is no row of panel boxes"),
        ("b.csv", "figure_id,x0,y0,x1,y1\nF1,0,0,1,9\n", r"b\.csv:2: .*article_id"),
        ("b.jsonl", '{"key": "a", "x0": 0, "y0": 0, "x1": 1}\n', r"b\.jsonl:1: .*y1"),
        ("b.jsonl", "[]\n", r"b\.jsonl:1: is no JSON object"),
        ("b.jsonl", '{"key": "a", "boxes": []}\n{"key": "a", "boxes": []}\n', r"b\.jsonl:2: is the second line"),
        ("b.csv", "key,x0,y0,x1,y1,score\na,0,0,1,9,7\n", r"b\.csv:2: .*score 7\.0"),
        ("b.parquet", "no parquet", r"b\.parquet: is no parquet file"),
        ("b.txt", "", r"b\.txt: is no file of panel boxes"),
    ],
)
def test_a_bad_file_of_boxes_is_named_with_its_row(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_boxes(tmp_path / name)


def test_boxes_that_are_not_there_are_an_error_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read_boxes(tmp_path / "gone.csv")
    write_bucket(tmp_path)
    config = make_config(tmp_path, panels={"mode": "split", "boxes": str(tmp_path / "gone.csv")})
    with pytest.raises(DataError, match=r"gone\.csv: there is no such file, which panels\.boxes names"):
        build(config, tmp_path / "out")


def make_config(root: Path, **rules: Any) -> BuildConfig:
    source = {"kind": "pmc", "root": str(root / "bucket"), **rules}
    return check_config({"name": "t", "licence": "commercial", "source": source}, BuildConfig, "test")


@pytest.mark.parametrize(("parent", "kept", "dropped"), [("keep", 3, {}), ("replace", 2, {"replaced_by_panels": 1})])
def test_panels_are_counted_as_items_of_their_own(
    tmp_path: Path, parent: str, kept: int, dropped: dict[str, int]
) -> None:
    write_bucket(tmp_path)
    manifest = build(make_config(tmp_path, panels={"mode": "split", "parent": parent}), tmp_path / "out")
    assert manifest["ledger"] == {"seen": 3, "kept": kept, "dropped": dropped}
    rows = DatasetFolder(tmp_path / "out").ledger.to_pylist()
    assert len(rows) == 3
    assert {row["item"] for row in rows} == {"F1"}
    assert sorted(row["panel"] or "" for row in DatasetFolder(tmp_path / "out").index.to_pylist())[-2:] == ["A", "B"]


def test_every_option_and_the_content_of_every_file_is_part_of_the_identity(tmp_path: Path) -> None:
    write_bucket(tmp_path)
    boxes = write_boxes(tmp_path / "boxes.csv", ROWS)
    rules: list[dict[str, Any]] = [
        {}, {"concepts": True}, {"panels": {"mode": "split"}}, {"panels": {"mode": "split", "parent": "replace"}},
        {"panels": {"mode": "split", "min_confidence": 0.5}}, {"panels": {"mode": "split", "boxes": str(boxes)}},
    ]  # fmt: skip
    configs = [make_config(tmp_path, **rule) for rule in rules]
    assert len({config_sha256(config) for config in configs}) == len(configs)
    assert len({open_input(config).fingerprint for config in configs}) == 2
    before = open_input(configs[-1]).fingerprint
    write_boxes(boxes, ROWS[:2])
    assert open_input(configs[-1]).fingerprint != before


def test_concepts_and_modality_are_those_of_each_caption(tmp_path: Path) -> None:
    whole, a, b = pairs(items(write_bucket(tmp_path), panels={"mode": "split"}, concepts=True))
    assert (whole.modality, a.modality, b.modality) == ("ct", "ct", "histopathology")
    assert "h&e" in b.concepts
    assert "h&e" not in a.concepts


def test_a_thousand_captions_are_tagged_within_a_second(tmp_path: Path) -> None:
    from data_builders.concepts import modality_of, tag_caption

    captions = [f"{n}: {CAPTION} Contrast-enhanced axial CT shows a mass in segment {n} (arrow)." for n in range(1000)]
    tag_caption(captions[0])
    start = time.process_time()
    assert {modality_of(tag_caption(caption)) for caption in captions} == {"ct"}
    assert time.process_time() - start < 1


def write_mesh(path: Path, rows: dict[int, list[str] | None]) -> Path:
    columns = {"pmid": list(rows), "mesh": list(rows.values())}
    kinds = pa.schema({"pmid": pa.int64(), "mesh": pa.list_(pa.string())})
    # Row groups of two rows: terms are numbered anew in each.
    pq.write_table(pa.table(columns, schema=kinds), path, row_group_size=2)
    return path


def test_mesh_terms_are_joined_on_the_pmid_and_never_on_the_position(tmp_path: Path) -> None:
    rows = {2: ["Lung"], 4: ["Mice", "Lung"], 5: ["Child", "Thorax"], 9: None, 11: ["Lung", "Child"]}
    table = read_mesh_terms(write_mesh(tmp_path / "mesh.parquet", rows))
    assert [table.of(pmid) for pmid in (2, 3, 4, 5, 9, 11, 12, None)] == [
        ("Lung",), (), ("Mice", "Lung"), ("Child", "Thorax"), (), ("Lung", "Child"), (), (),
    ]  # fmt: skip
    bucket = write_bucket(tmp_path)
    (record,) = bucket.records()
    assert isinstance(record, ArticleRecord)
    config = check_config({"root": "x", "mesh": str(tmp_path / "mesh.parquet")}, PmcConfig, "test")
    facts = next(iter(article_pairs(record, bucket, config, preset="commercial")))
    assert isinstance(facts, Article)
    assert (facts.pmid, facts.mesh) == (5, ("Child", "Thorax"))


def test_a_mesh_table_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "no.parquet").write_text("no")
    pq.write_table(pa.table({"pmid": [1], "terms": ["x"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"pmid": [1], "mesh": ["x"]}), tmp_path / "flat.parquet")
    for name in ("no", "other", "flat"):
        with pytest.raises(DataError, match=rf"{name}\.parquet: is no table of MeSH terms"):
            read_mesh_terms(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match="each PMID once, ascending"):
        read_mesh_terms(write_mesh(tmp_path / "twice.parquet", {3: ["x"], 2: ["x"]}))


@pytest.mark.parametrize(
    "panels", [{"mode": "cut"}, {"parent": "drop"}, {"min_confidence": 1.5}, {"boxs": "x"}],
)  # fmt: skip
def test_a_wrong_option_is_a_config_error(panels: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="panels"):
        check_config({"root": "x", "panels": panels}, PmcConfig, "test")
