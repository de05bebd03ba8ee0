"""The report: its numbers are the JSON's, its text cannot break out, and it asks nothing of the network."""

import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from biomedclip.errors import DataError
from biomedclip.evaluation.report import results_table, summarise, summary_table, write_report
from biomedclip.evaluation.results import write_result
from biomedclip.evaluation.retrieval import KS
from biomedclip.evaluation.scores import ClassScores, RankScores, measure
from biomedclip.evaluation.tasks import find_task
from biomedclip.images import check_image
from biomedclip.page.charts import collect_curves, draw_funnel, draw_interval, draw_lines
from biomedclip.page.gallery import article_link, choose_figures, thumbnail
from biomedclip.runs import read_metrics
from biomedclip.schema import Article, Drop, Pair
from biomedclip.shards import DatasetFolder, DatasetWriter

HOSTILE = "<script>alert(1)</script> \"quoted\" 'x' & <img src=http://evil.example/x onerror=alert(2)> ]]> 𝔐"
VOID = {"meta", "img", "br", "link", "line", "circle", "rect", "polyline", "path"}


class Page(HTMLParser):
    """Tags, attributes, text and the nesting of a page."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.numbers, self.open, self.confusions = [], [], [], [], {}
        self._table = None

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self.numbers.append(attributes | {"text": ""})
        if tag == "table" and attributes.get("class") == "confusion":
            self._table = (attributes["data-task"], attributes["data-stage"])
            self.confusions[self._table] = []

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            self._table = None

    def handle_data(self, text):
        self.text.append(text)
        if self.open and self.open[-1] == "data":
            self.numbers[-1]["text"] += text
        if self._table and self.open[-1] == "td" and text.strip():
            self.confusions[self._table].append(int(text.replace(",", "")))


def picture(colour, size=(400, 300)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def build_dataset(folder):
    with DatasetWriter(folder, name=f"pmc {HOSTILE}") as writer:
        for number in range(8):
            checked = check_image(picture((number * 20, 90, 90)))
            writer.add(
                Pair(
                    key=f"fig-{number}", image=checked.data, image_format="png", width=400, height=300,
                    caption=f"Figure {number}: {HOSTILE}", source="pmc", licence="CC BY", sha256=checked.sha256,
                    phash=checked.phash, split="test" if number > 5 else "train", article_id=f"PMC{number // 2 + 1}.1",
                )
            )  # fmt: skip
        for number in range(5):
            writer.add(Drop(source="pmc", item=str(number), reason="no_caption" if number else "broken_image"))
        articles = [
            Article(article_id="PMC1.1", pmcid=1, version=1, title=HOSTILE, licence="CC BY", authors=(HOSTILE, "B"),
                    doi="10.1371/journal.x(1)<a>", published="2019-02"),
            Article(article_id="PMC2.1", pmcid=999000002, version=1, title="No DOI", licence="CC BY"),
        ]  # fmt: skip
        writer.finish(articles=articles, provenance={}, card=lambda manifest: "card")
    return DatasetFolder(folder)


def describe(name, model, scores):
    task = find_task(name)
    facts = measure(scores, task.metrics.names, resamples=200)
    groups = scores.group_ids
    return {
        "task": name, "title": task.title, "kind": task.kind, "primary": task.metrics.primary,
        "model": {"name": model, "fingerprint": "sha256:" + "0f" * 32, "preprocess": HOSTILE, "logit_scale": 14.3},
        "dataset": {
            "split": "test", "n": len(scores.sample_ids), "classes": [c.label for c in task.classes],
            "n_groups": len(set(groups)) if groups else None, "group": task.group, "manifest_sha256": "ab" * 32,
            "licence": task.licence, "citation": task.citation, "contamination": task.contamination,
            "excluded": {"n": 1, "by_reason": {HOSTILE: 1}, "listed": []},
        },
        "prompt_set": "default", "prompt_source": HOSTILE, "prompts": {"RBC": [HOSTILE]} if task.classes else {},
        "ensemble": {"mode": "embed"}, "seed": 0, "warnings": [HOSTILE], "versions": {"torch": "2.8"}, **facts,
    }  # fmt: skip


def class_scores(signal, seed=0):
    rng = np.random.default_rng(seed)
    y = np.repeat([0, 1, 2], 15)
    cosines = rng.normal(size=(45, 3)) * 0.1
    cosines[np.arange(45), y] += signal
    return ClassScores(
        sample_ids=tuple(map(str, range(45))), group_ids=tuple(str(i // 3) for i in range(45)),
        classes=("Platelets", "RBC", "WBC"), y=y, cosines=cosines.astype(np.float32), logit_scale=14.3,
    )  # fmt: skip


def rank_scores(ranks):
    ranks, n = np.asarray(ranks, dtype=float), len(ranks)
    return RankScores(
        sample_ids=tuple(f"fig-{i}" for i in range(n)), group_ids=tuple(str(i // 2) for i in range(n)),
        caption_ids=np.arange(n), image_to_text=ranks, text_to_image=ranks, image_to_text_top=np.arange(n),
        text_to_image_top=np.arange(n), cosines=np.zeros(n, np.float32), logit_scale=14.3,
        image_to_text_full=(ranks[:, None] <= KS).astype(float),
        text_to_image_full=(ranks[:, None] <= KS).astype(float),
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    dataset = build_dataset(root / "data")
    stages = {}
    for stage, signal, ranks in (("before", 0.0, [5, 3, 8, 2, 6, 7, 4, 8]), ("after", 0.3, [1, 1, 2, 1, 1, 6, 1, 1])):
        cells = write_result(root, describe("bccd", stage, class_scores(signal)), class_scores(signal))
        record = describe("article_retrieval", stage, rank_scores(ranks))
        example = {"sample_id": "fig-6", "caption": HOSTILE, "top_sample_id": "fig-7", "top_caption": HOSTILE}
        record["examples"] = [example | {"hit": False, "rank": 2.5}]
        stages[stage] = [cells, write_result(root, record, rank_scores(ranks))]
    run = root / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("step,train_loss,val_loss,lr\n0,4.2,,1e-3\n10,3.1,3.3,1e-3\n20,2.5,3.0,1e-3\n")
    (run / "run.json").write_text(json.dumps({"kind": "train", "started": "2026-11-01T00:00", "seed": 7}))
    (run / "config.yaml").write_text(f"note: '{HOSTILE}'\n")
    (run / "done.json").write_text(json.dumps({"kind": "train", "seconds": 150.0}))
    path = write_report(
        root / "report.html", before=stages["before"], after=stages["after"], run=run, datasets=[dataset],
        title=f"Demo {HOSTILE}", lede=HOSTILE,
    )  # fmt: skip
    html = path.read_text()
    page = Page()
    page.feed(html)
    page.close()
    return {"root": root, "stages": stages, "dataset": dataset, "html": html, "page": page}


def test_every_number_of_the_page_is_the_one_of_the_json(made):
    records = {(s, r.task): json.loads(r.path.read_text()) for s, results in made["stages"].items() for r in results}
    numbers = made["page"].numbers
    shown = {(n["data-stage"], n["data-task"], n["data-metric"]) for n in numbers}
    for (stage, task), record in records.items():
        assert {(stage, task, name) for name in record["metrics"]} <= shown
    for number in numbers:
        value = records[number["data-stage"], number["data-task"]]["metrics"][number["data-metric"]]["value"]
        assert json.loads(number["value"]) == value
        assert float(number["text"].replace(",", "")) == pytest.approx(value, abs=6e-4 if value < 10 else 0.06)


def test_intervals_counts_and_confusions_are_on_the_page(made):
    text = " ".join(made["page"].text)
    entry = made["stages"]["after"][0].metrics["balanced_accuracy"]
    assert f"{entry['ci_low']:.3f} to {entry['ci_high']:.3f}" in text
    assert "45 samples of the test split, 15 groups (by blood smear field)" in text
    for stage in ("before", "after"):
        expected = np.ravel(made["stages"][stage][0].record["confusion"]).tolist()
        assert made["page"].confusions["bccd", stage] == expected


def test_the_ledger_adds_up_on_the_page_and_in_the_summary(made):
    assert "13 seen = 8 kept + 5 dropped" in " ".join(made["page"].text)
    summary = summarise(made["stages"]["before"], made["stages"]["after"], [made["dataset"]])
    assert summary["ledger"] == {"seen": 13, "kept": 8, "dropped": 5}
    broken = DatasetFolder(made["root"] / "data")
    broken.manifest["ledger"]["seen"] = 14
    with pytest.raises(DataError, match="does not add up"):
        write_report(made["root"] / "no.html", after=made["stages"]["after"], datasets=[broken])
    assert not (made["root"] / "no.html").exists()


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(made):
    for tag, attributes in made["page"].tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "form", "base", "audio", "video"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "srcset", "href", "action", "data"):
            address = attributes.get(name)
            if address is not None:
                assert address.startswith("data:image/jpeg;base64,") or (tag == "a" and address.startswith("https://"))
        assert "url(" not in attributes.get("style", "")
    style = re.search(r"<style>(.*?)</style>", made["html"], re.DOTALL)[1]
    assert not re.search(r"url\(|@import|https?:", style)
    policies = [a["content"] for t, a in made["page"].tags if t == "meta" and "http-equiv" in a]
    assert policies[0].startswith("default-src 'none'; img-src data:")


def test_what_strangers_wrote_stays_text(made):
    assert "<script" not in made["html"]
    assert "<img src=http" not in made["html"]
    assert "<script>alert(1)</script>" in " ".join(made["page"].text)  # shown, not run
    assert made["page"].open == []  # every tag is closed in order
    assert any(a.get("href") == "https://doi.org/10.1371/journal.x(1)%3Ca%3E" for _, a in made["page"].tags)


def test_pictures_are_small_and_inside(made):
    images = [a["src"] for t, a in made["page"].tags if t == "img"]
    assert len(images) == 7  # six samples and the retrieved one
    assert len(made["html"]) < 200_000


def test_the_summary_has_exactly_the_promised_keys(made):
    summary = summarise(made["stages"]["before"], made["stages"]["after"], [made["dataset"]])
    assert set(summary) == {"tasks", "ledger"}
    assert set(summary["tasks"]) == {"bccd", "article_retrieval"}
    assert set(summary["tasks"]["bccd"]) == {"before", "after"}
    assert set(summary["tasks"]["bccd"]["after"]) == {"balanced_accuracy", "auroc", "accuracy"}
    ways = [f"{way}/recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert list(summary["tasks"]["article_retrieval"]["before"]) == ways
    entry = summary["tasks"]["bccd"]["after"]["auroc"]
    assert set(entry) == {"value", "ci_low", "ci_high", "n"}
    assert entry["value"] == made["stages"]["after"][0].metrics["auroc"]["value"]


def test_tables_for_the_terminal_are_aligned(made):
    lines = results_table(made["stages"]["after"]).splitlines()
    assert lines[0].split() == ["task", "metric", "value", "95", "%", "interval", "chance", "n"]
    assert len({line.rindex(line.split()[-1]) + len(line.split()[-1]) for line in lines}) == 1
    table = summary_table(summarise(made["stages"]["before"], made["stages"]["after"], [made["dataset"]]))
    assert "13 figures and images seen = 8 kept + 5 dropped" in table


def test_a_report_of_one_model_needs_neither_run_nor_data(made, tmp_path):
    html = write_report(tmp_path / "one.html", after=made["stages"]["after"]).read_text()
    assert 'data-stage="before"' not in html
    assert 'id="loss"' not in html


def test_links_are_only_made_of_what_can_be_an_article():
    assert article_link({"doi": "10.7554/eLife.30274"})[0] == "https://doi.org/10.7554/eLife.30274"
    assert article_link({"doi": "javascript:alert(1)", "pmcid": 12419688})[1] == "PMC12419688"
    assert article_link({"doi": '10.1/"x', "pmcid": 0}) == (None, "")
    assert '"' not in article_link({"doi": '10.1234/"x'})[0]
    assert article_link({"doi": None, "pmcid": 999000001}) == (None, "")  # an id of ours is none of PMC's


def test_figures_are_chosen_by_seed_from_different_articles(made):
    first = choose_figures(made["dataset"], 3)
    assert [f.key for f in first] == [f.key for f in choose_figures(made["dataset"], 3)]
    assert len({int(f.key.split("-")[1]) // 2 for f in first}) == 3
    assert {f.split for f in choose_figures(made["dataset"], 9, split="test")} == {"test"}


def test_a_thumbnail_is_a_small_jpeg_and_a_broken_picture_none():
    assert thumbnail(b"broken") == ""
    assert len(thumbnail(picture("white", (3000, 2000)))) < 10_000


def test_curves_are_read_from_a_metrics_file_with_holes(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,val/loss,train/loss,lr\n0,,4.0,1\n5,,nan,1\n9,2.5,2.0,1\n")
    curves = collect_curves(read_metrics(tmp_path))
    assert list(curves) == ["train/loss", "val/loss"]
    assert curves["train/loss"] == [(0, 4.0), (9, 2.0)]
    assert collect_curves([]) == {}


def test_charts_survive_flat_and_single_values():
    for points in ([(0.0, 1.0), (1.0, 1.0)], [(3.0, 0.0), (4.0, 0.0)], [(0.0, -5.0), (1e6, 1e-9)]):
        assert "nan" not in draw_lines({"a": points, "b": points}, x_label="step", y_label="loss")
    undefined = {"value": None, "ci_low": None, "ci_high": None}
    assert "circle" not in draw_interval(None, undefined, None)
    assert 'width="440.0"' in draw_funnel(5, 5, {})
    assert "nan" not in draw_funnel(0, 0, {})
