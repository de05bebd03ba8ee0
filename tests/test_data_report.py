"""The page of a dataset: its numbers are the index's own, it escapes what strangers wrote and asks for nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_units import article, articles, pair, write_raw
from typer.testing import CliRunner

from biomedclip import cli
from biomedclip.errors import DataError
from biomedclip.page.bars import draw_bars, draw_drops, draw_histogram, write_share
from biomedclip.schema import Article, Drop, Pair
from biomedclip.shards import DatasetFolder, DatasetWriter
from data_builders.data_report import write_data_report
from data_builders.purge import Withdrawal, purge
from data_builders.survey import SHORTER_SIDE_PX, TOKENS, WORDS, survey_folder
from data_builders.units import write_unit

HOSTILE = "<script>alert(1)</script> \"><img src=http://evil.example/x onerror=alert(2)> & 'x' ]]>"


def write_dataset(folder: Path, items: list[Article | Pair | Drop], **provenance: Any) -> Path:
    with DatasetWriter(folder, name="made up", max_samples=7) as writer:
        for item in items:
            if not isinstance(item, Article):
                writer.add(item)
        found = [item for item in items if isinstance(item, Article)]
        writer.finish(articles=found, provenance=provenance, card=lambda manifest: "card")
    return folder


@pytest.fixture(scope="module")
def items() -> list[Article | Pair | Drop]:
    return [
        *articles(range(1, 6)),
        *articles([20], published="2019-02", journal="Other"),
        article(30, published=None, journal=None),
        pair(1, 9, caption="word " * 300, flags=("third_party",), licence="CC BY-NC", modality="ct", concepts=("ct",)),
        pair(1, 10, caption="word " * 100, split="test", concepts=("ct", "head")),
        Drop(source="pmc", item="F1", reason="no_caption"),
    ]


@pytest.fixture(scope="module")
def dataset(items, tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("report") / "shards", items)


def test_every_number_is_counted_as_the_index_says(dataset):
    survey = survey_folder(dataset)
    index = DatasetFolder(dataset).index.to_pylist()
    captions = [sample.caption for sample in DatasetFolder(dataset).samples()]
    assert (survey.kept, survey.seen, survey.dropped) == (26, 33, {"missing_graphic": 6, "no_caption": 1})
    for column in ("licence", "licence_class", "source", "split", "modality", "image_format"):
        assert survey.counts[column] == Counter(row[column] or "" for row in index)
    for column in ("concepts", "flags", "labels"):
        assert survey.counts[column] == Counter(value for row in index for value in row[column])
    sides = [min(row["width"], row["height"]) for row in index]
    assert survey.histograms["shorter_side"].tolist() == np.histogram(sides, [*SHORTER_SIDE_PX, 1e9])[0].tolist()
    tokens = [row["caption_tokens"] for row in index]
    assert survey.histograms["tokens"].tolist() == np.histogram(tokens, [*TOKENS, 1e9])[0].tolist()
    assert survey.beyond_77 == sum(count + 2 > 77 for count in tokens) == 2
    assert survey.beyond_256 == sum(count + 2 > 256 for count in tokens) == 1
    words = [len(caption.split()) for caption in captions]
    assert survey.histograms["words"].tolist() == np.histogram(words, [*WORDS, 1e9])[0].tolist()
    assert survey.image_bytes == sum(row["image_size"] for row in index)
    assert (survey.articles_read, survey.articles_kept) == (7, 6)
    assert survey.years == {"2023": 5, "2019": 1, "": 1}
    assert survey.journals == {"J": 5, "Other": 1, "": 1}
    assert all(histogram.sum() == 26 for histogram in survey.histograms.values())


def test_units_count_as_the_dataset_of_them_and_say_their_reasons_one_by_one(items, dataset, tmp_path):
    raw = write_raw(tmp_path / "raw", items[:18], items[18:])
    survey, other = survey_folder(raw), survey_folder(dataset)
    assert (survey.seen, survey.kept, survey.dropped) == (other.seen, other.kept, other.dropped)
    for column in ("licence", "split", "modality", "concepts", "flags"):
        assert survey.counts[column] == other.counts[column]
    for name, histogram in survey.histograms.items():
        assert histogram.tolist() == other.histograms[name].tolist()
    assert survey.years == other.years
    assert [(name, kept, dict(dropped)) for name, kept, dropped in survey.units] == [
        ("unit-000000", 12, {"missing_graphic": 3}), ("unit-000001", 14, {"missing_graphic": 3, "no_caption": 1}),
    ]  # fmt: skip
    write_data_report(raw, tmp_path / "raw.html")
    page = (tmp_path / "raw.html").read_text()
    assert "<td>unit-000001</td><td>18</td><td>14</td><td>3</td><td>1</td>" in page
    assert page.count("data:image/jpeg;base64,") == 24


def test_a_delta_is_counted_with_the_unit_that_it_mends(tmp_path):
    raw = write_raw(tmp_path / "raw", articles([1]))
    write_unit(
        raw, "unit-000000-r01", [article(1), pair(1, 99)], identity={},
        supersedes=[("PMC1.1", "F99", "missing_graphic")],
    )  # fmt: skip
    survey = survey_folder(raw)
    assert (survey.seen, survey.kept, survey.dropped) == (5, 5, {})
    assert survey.units == [("unit-000000", 5, Counter())]
    assert survey.articles_read == survey.articles_kept == 1


def test_the_page_shows_the_sums_the_samples_and_their_licences(dataset, tmp_path):
    write_data_report(dataset, tmp_path / "one.html")
    page = (tmp_path / "one.html").read_text()
    assert "33 seen = 26 kept + 7 dropped" in page
    assert 'data-seen="33" data-kept="26" data-dropped="7"' in page
    assert page.count("data:image/jpeg;base64,") == 24
    assert "A. Author 2023 · CC BY" in page
    assert "8 % of captions are cut by a context of 77 tokens (2 of 26)" in page
    assert "Not looked for" in page
    write_data_report(dataset, tmp_path / "two.html")
    assert (tmp_path / "two.html").read_text() == page
    write_data_report(dataset, tmp_path / "three.html", seed=1, samples=3)
    keys = survey_folder(dataset, samples=3, seed=1).chosen
    assert [chosen.key for chosen in keys] != [chosen.key for chosen in survey_folder(dataset, samples=3).chosen]


def test_nothing_that_a_stranger_wrote_leaves_its_place(tmp_path):
    items = [article(1, title=HOSTILE, authors=(HOSTILE,), journal=HOSTILE, doi=f"10.1371/{HOSTILE}")]
    items.append(
        pair(1, 1, caption=HOSTILE, concepts=(HOSTILE,), flags=(HOSTILE,), modality=HOSTILE, labels=(HOSTILE,))
    )
    items.append(Drop(source=HOSTILE, item=HOSTILE, reason="no_caption", detail=HOSTILE))
    write_data_report(write_dataset(tmp_path / "d", items), tmp_path / "d.html")
    page = (tmp_path / "d.html").read_text()
    assert "<script" not in page
    assert "evil.example" in page
    assert len(re.findall("<img ", page)) == page.count('<img alt="" src="data:image/jpeg;base64,') == 1
    assert not re.findall(r'(?:src|href)="(?!data:|https://(?:doi\.org|pmc\.ncbi\.nlm\.nih\.gov)/)', page)
    assert "default-src 'none'" in page


def test_one_sample_without_an_article_is_a_page_too(tmp_path):
    (one,) = [pair(1, 1, article_id=None, source="set")]
    survey = write_data_report(write_dataset(tmp_path / "d", [one]), tmp_path / "d.html")
    assert (survey.kept, survey.articles_read, survey.articles_kept) == (1, 0, 0)
    assert 'id="articles"' not in (tmp_path / "d.html").read_text()


def test_clusters_contamination_and_tombstones_are_shown_where_they_are_recorded(items, tmp_path):
    selection = {"contamination": {"bccd": {"pairs": 3, "samples": 2, "sha256": 3}}}
    folder = write_dataset(tmp_path / "d", items, selection=selection, config={"select": {"against": ["x"]}})
    path = folder / "00000.parquet"
    table = pq.read_table(path)
    clusters = pa.array([4, 4, 4, 9, 9, None, None], pa.int64())
    place = table.schema.get_field_index("dup_cluster")
    pq.write_table(table.set_column(place, "dup_cluster", clusters), path)
    keys = [row["key"] for row in DatasetFolder(folder).index.to_pylist()]
    purge(folder, [Withdrawal(what=key, reason="retracted") for key in keys[:20]])
    survey = survey_folder(folder)
    assert survey.cluster_sizes == {3: 1, 2: 1}
    assert (survey.withdrawn, survey.tombstones) == (set(keys[:20]), {"retracted": 20})
    assert survey.kept == 26
    assert not {chosen.key for chosen in survey.chosen} & set(keys[:20])
    assert len(survey.chosen) == 6
    write_data_report(folder, tmp_path / "d.html")
    page = (tmp_path / "d.html").read_text()
    assert "5 samples are in 2 clusters of duplicates" in page
    assert "3 pairs show one of 2 samples of bccd" in page
    assert "20 samples were taken back" in page


def test_words_of_many_captions_are_those_of_a_sample_and_it_is_said(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("data_builders.survey.MOST_CAPTIONS", 13)
    survey = write_data_report(dataset, tmp_path / "d.html")
    assert 3 <= survey.words_counted <= 23
    assert survey.histograms["words"].sum() == survey.words_counted
    assert f"Words are those of {survey.words_counted} captions" in (tmp_path / "d.html").read_text()


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (lambda d: (d / "manifest.json").unlink(), "holds no finished dataset"),
        (lambda d: (d / "00001.tar").unlink(), "00001.tar: is missing"),
        (lambda d: (d / "00001.parquet").write_bytes(b"PAR1"), "cannot be read as parquet"),
        (lambda d: pq.write_table(pq.read_table(d / "ledger.parquet").slice(1), d / "ledger.parquet"), "has 32 rows"),
        (lambda d: pq.write_table(pq.read_table(d / "00001.parquet").slice(1), d / "00001.parquet"), "holds 25 rows"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(dataset, tmp_path, spoil, wrong):
    folder = Path(shutil.copytree(dataset, tmp_path / "copy"))
    spoil(folder)
    with pytest.raises(DataError, match=wrong) as error:
        survey_folder(folder)
    assert "\n" not in str(error.value)


def test_a_funnel_that_leaks_is_never_drawn(dataset, tmp_path):
    folder = Path(shutil.copytree(dataset, tmp_path / "copy"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["ledger"]["dropped"] = {"no_caption": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="does not add up"):
        survey_folder(folder)


def test_bars_say_their_numbers_and_the_rest_in_one_row():
    html = draw_bars({f"n{i}": 10 - i for i in range(8)}, 52, most=3)
    assert re.findall(r'<th scope="row">([^<]+)</th>', html) == ["n0", "n1", "n2", "5 others"]
    assert "width:19.23%" in html
    assert ">25<" in html
    assert draw_bars({}, 0) == draw_bars({"x": 0}, 5)
    funnel = draw_drops(10, 4, {"a": 1, "b_c": 5})
    assert re.findall(r"margin-left:([\d.]+)%", funnel) == ["0.00", "50.00", "40.00", "0.00"]
    assert "b c" in funnel


def test_a_histogram_has_a_column_for_each_bin_that_is_not_empty():
    svg = draw_histogram([4, 0, 2], ["0", "<5", "10"], label="words", marks={1: "77"})
    assert svg.count("<rect") == 2
    assert "&lt;5" in svg
    assert 'class="chance"' in svg


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (0.004, "0.4 %"), (0.5, "50 %"), (0.996, "99.6 %"), (1, "100 %")]
)
def test_a_share_is_never_rounded_to_nothing_or_to_all(share, text):
    assert write_share(share) == text


def test_the_command_writes_the_page(dataset, tmp_path):
    done = CliRunner().invoke(cli.app, ["data", "report", str(dataset), "--out", str(tmp_path / "r.html")])
    assert done.exit_code == 0
    assert "26 samples out of 33 seen, of 6 articles" in done.output
    assert (tmp_path / "r.html").exists()
