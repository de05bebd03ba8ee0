"""Task kinds and sections of a config, end to end with planted answers; reports, comparisons, bad input."""

import csv
import json

import numpy as np
import pytest

from biomedclip.errors import ConfigError, DataError
from biomedclip.evaluation.compare import compare_results, comparison_table
from biomedclip.evaluation.evaluate import evaluate
from biomedclip.evaluation.leakage import read_leakage
from biomedclip.evaluation.overview import arrange, averages, matrix, write_overview
from biomedclip.evaluation.results import read_results, read_skipped, write_skipped
from biomedclip.evaluation.scores import read_scores
from biomedclip.evaluation.selection import folder_task
from biomedclip.evaluation.tasks import Task, parse_suite
from tests.test_evaluate import COLOURS, Painter, articles, cells, config, painter, picture, preprocess, tokenizer

__all__ = ["articles", "cells"]

MULTI = """
suite: own
tasks:
  spots:
    title: Spots
    modality: m
    kind: zero_shot
    labels: multi
    layout: {type: csv, table: {test: t.csv}, image: file, label: label, label_separator: "|"}
    split: test
    classes: [{label: R, name: platelet}, {label: G, name: red blood cell}]
    prompt_sets: {default: {source: here, templates: ["{}"], negative: ["colour 0 0 1 {}"]}}
    metrics: {primary: auroc, also: [auprc, macro_f1]}
    bootstrap: {by: sample}
    licence: MIT
    citation: none
    contamination: none
  asked:
    title: Asked
    modality: m
    kind: options
    layout: {type: csv, table: {test: q.csv}, image: file, text: answer, attributes: [options]}
    split: test
    metrics: {primary: accuracy, also: [over_chance]}
    bootstrap: {by: sample}
    licence: MIT
    citation: none
    contamination: none
  slides:
    title: Slides
    modality: m
    kind: zero_shot
    layout: {type: csv, table: {test: p.csv}, image: file, label: label, group: slide}
    split: test
    pool: 1
    classes: [{label: R, name: platelet}, {label: G, name: red blood cell}]
    prompt_sets: {default: {source: here, templates: ["{}"]}}
    metrics: {primary: accuracy}
    bootstrap: {by: class}
    licence: MIT
    citation: none
    contamination: none
"""


def table(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def kinds(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    for name, colour in {"r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255), "rg": (255, 200, 0)}.items():
        for number in range(6):
            (root / f"{name}{number}.png").write_bytes(picture(colour))
    said = {"r": "R", "g": "G", "rg": "R|G"}
    table(root / "t.csv", ["file", "label"], [[f"{n}{i}.png", label] for n, label in said.items() for i in range(6)])
    options = json.dumps(["a platelet", "a red blood cell", "a white blood cell"])
    table(root / "q.csv", ["file", "answer", "options"],
          [["r0.png", "a platelet", options], ["g0.png", "a red blood cell", options],
           ["b0.png", "a platelet", options]])  # fmt: skip
    table(root / "p.csv", ["file", "label", "slide"],
          [["b0.png", "R", "s1"], ["r1.png", "R", "s1"], ["g0.png", "G", "s2"], ["b1.png", "G", "s2"]])  # fmt: skip
    return root


def run(kinds, tmp_path, name):
    tasks = parse_suite(MULTI, "x.yaml")
    return evaluate(config(data={name: str(kinds)}), tmp_path / "out", model=painter(), tasks=tasks)[0]


def test_several_labels_are_a_question_each(kinds, tmp_path):
    result = run(kinds, tmp_path, "spots")
    assert result.metrics["auroc"]["value"] == 1.0
    assert [row["support"] for row in result.record["per_class"]] == [12, 12]
    assert result.record["n_undefined"] == 0
    assert result.record["baselines"]["random"]["auprc"] == pytest.approx(12 / 18)
    again = read_scores(result.scores_path)
    assert again.labels == ("R", "G")
    assert (again.truth.sum(0) == [12, 12]).all()


def test_options_of_each_image_and_their_chance(kinds, tmp_path):
    result = run(kinds, tmp_path, "asked")
    assert result.metrics["accuracy"]["value"] == pytest.approx(2 / 3)
    assert result.metrics["over_chance"]["value"] == pytest.approx((2 / 3 - 1 / 3) / (2 / 3))
    assert result.record["baselines"]["random"]["accuracy"] == pytest.approx(1 / 3)
    assert set(result.record["pooled_and_macro"]) == {"pooled", "macro_over_sets"}
    assert read_scores(result.scores_path).answer_texts[0] == "a platelet"


def test_an_answer_that_is_no_option_is_named(kinds, tmp_path):
    text = (kinds / "q.csv").read_text().replace("b0.png,a platelet", "b0.png,a horse")
    (kinds / "q.csv").write_text(text)
    with pytest.raises(DataError, match=r"b0.png: its answer must be one of its options"):
        run(kinds, tmp_path, "asked")


def test_patches_are_pooled_to_slides(kinds, tmp_path):
    result = run(kinds, tmp_path, "slides")
    assert result.metrics["accuracy"] | {"value": 1.0, "n": 2} == result.metrics["accuracy"]


def test_sections_of_a_config_are_in_the_result(cells, tmp_path):
    """Adapters learn on the training split, and a section that cannot be had says why."""
    rows = [["file", "label", "split", "source_image"]]
    for split in ("test", "train", "val"):
        for label, colour in COLOURS.items():
            for n in range(6):
                name = f"{split}_{label}_{n}.png"
                (cells / name).write_bytes(picture(tuple(int(c * (0.8 + 0.03 * n)) for c in colour)))
                # One training group is also in the test split: nothing may be learnt from it.
                rows.append([name, label, split, f"{'test' if split == 'train' and n == 5 else split}{label}{n}"])
    table(cells / "manifest.csv", rows[0], rows[1:])
    wanted = config(
        data={"bccd": str(cells)}, adapters=["knn", "gda", "tip"], calibration=True, prompt_sensitivity={"k": 4},
        few_shot={"shots": [1, 2], "seeds": 2, "methods": ["nearest_mean"]}, corruptions=False,
        subgroups={"bccd": "site"},
    )  # fmt: skip
    (result,) = evaluate(wanted, tmp_path / "out", model=painter())
    beyond = result.record["beyond"]
    assert {name: entry["selection"]["split"] for name, entry in beyond["adapters"].items()} == dict.fromkeys(
        ("knn", "gda", "tip"), "val"
    )
    assert beyond["adapters"]["tip"]["balanced_accuracy"] == 1.0
    assert beyond["adapters"]["tip"]["n_train"] == 15
    assert beyond["few_shot"]["curves"]["nearest_mean"]["2"]["n"] == 2
    assert beyond["calibration"]["temperature"]["split"] == "val"
    assert beyond["calibration"]["temperature"]["reason"] == "all 18 samples of val are right"
    assert beyond["prompt_sensitivity"]["n"] == 4
    assert "no row has the attribute 'site'" in beyond["subgroups"]["reason"]
    assert json.loads(result.path.read_text())["beyond"] == beyond
    write_overview(tmp_path / "out", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert all(title in page for title in ("Few shots", "Wording", "Curves", "Beyond accuracy"))


def test_a_task_without_a_training_split_says_so_and_keeps_its_result(cells, tmp_path):
    (result,) = evaluate(config(data={"bccd": str(cells)}, adapters=["gda"]), tmp_path / "out", model=painter())
    assert "has nothing in split" in result.record["beyond"]["adapters"]["reason"] or "class" in str(
        result.record["beyond"]["adapters"]
    )
    assert result.metrics["accuracy"]["value"] == pytest.approx(34 / 36)


def test_a_section_that_names_a_task_the_run_lacks_is_refused(cells, tmp_path):
    with pytest.raises(ConfigError, match=r"ood.nihcxr: is not among the tasks"):
        evaluate(config(data={"bccd": str(cells)}, ood={"near": ["nihcxr"]}), tmp_path, model=painter())


def test_retrieval_has_strict_numbers_beside_relaxed_ones_and_foils(articles, tmp_path):
    wanted = config(data={"article_retrieval": str(articles)}, composition=True)
    (result,) = evaluate(wanted, tmp_path / "out", model=painter())
    key = "image_to_text/recall@1"
    assert result.record["strict"][key] < result.metrics[key]["value"]
    assert "no caption has anything to change" in result.record["beyond"]["composition"]["side"]["reason"]


def test_comparison_says_better_only_beyond_noise(cells, tmp_path):
    class Blind(Painter):
        def encode_image(self, x, normalize=False):
            return super().encode_image(x * 0 + 1, normalize)

    for name, model in (("good", Painter()), ("blind", Blind())):
        evaluate(config(data={"bccd": str(cells)}, model_name=name), tmp_path / name,
                 model=(model, preprocess, tokenizer))  # fmt: skip
    blind, good = read_results(tmp_path / "blind"), read_results(tmp_path / "good")
    (row,) = compare_results(blind, good, resamples=200)
    assert row.verdict == "better"
    assert "better" in comparison_table([row])
    (same,) = compare_results(good, good, resamples=200)
    assert same.verdict == "no difference beyond noise"
    with pytest.raises(DataError, match="no task in common"):
        compare_results([], good)


def test_averages_are_over_one_metric_and_list_their_members(cells, tmp_path):
    for number in range(2):
        (tmp_path / f"f{number}").mkdir()
        for label, colour in (("platelet", (255, 0, 0)), ("red_blood_cell", (0, 255, 0))):
            (tmp_path / f"f{number}" / label).mkdir()
            for n in range(3):
                (tmp_path / f"f{number}" / label / f"{n}.png").write_bytes(picture(colour))
    tasks = {t.name: t for t in (folder_task(tmp_path / f"f{n}", ["a {}"]) for n in range(2))}
    assert all(isinstance(task, Task) for task in tasks.values())
    data = {"own_f0": str(tmp_path / "f0"), "own_f1": str(tmp_path / "f1"), "bccd": str(cells)}
    found = arrange(evaluate(config(data=data), tmp_path / "out", model=painter(), tasks=tasks))
    assert averages(found)[1:] == [("own", "balanced accuracy", "1.000", "own_f0, own_f1")]
    header, *rows = matrix(found)
    assert header[-6:] == ("random", "majority", "n", "excluded", "leakage")[-6:] or "leakage" in header
    assert all(row[-1] == "not checked" for row in rows)
    write_skipped(tmp_path / "out", {"pcam": "no data in x", "bccd": "no data"})
    assert read_skipped(tmp_path / "out") == {"pcam": "no data in x"}
    write_overview(tmp_path / "out", tmp_path / "rep")
    assert "no data in x" in (tmp_path / "rep" / "report.md").read_text()


def test_leakage_that_was_not_looked_for_is_unknown(tmp_path):
    assert read_leakage(None)["status"] == "unknown"
    report = {"mode": "drop", "compared_with": [{"name": "test"}], "found": {"group": 0, "pixels": 2, "near": 1}}
    (tmp_path / "leakage.json").write_text(json.dumps(report))
    assert read_leakage(str(tmp_path))["text"] == "3 found and dropped"
    with pytest.raises(DataError, match="no leakage report"):
        read_leakage(str(tmp_path / "none.json"))


def test_embeddings_that_are_not_finite_keep_finished_results(cells, articles, tmp_path):
    class Sick(Painter):
        def encode_image(self, x, normalize=False):
            found = super().encode_image(x, normalize)
            return found * np.nan if self.calls > 1 else found

    wanted = config(data={"bccd": str(cells), "article_retrieval": str(articles)})
    with pytest.raises(DataError, match="not finite"):
        evaluate(wanted, tmp_path / "out", model=(Sick(), preprocess, tokenizer))
    assert [result.task for result in read_results(tmp_path / "out")] == ["bccd"]
