"""Files of published predictions give the published figures, and a verdict says so, or that they do not."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk
from typer.testing import CliRunner

from biomedclip.cli import app
from biomedclip.config import check_config
from biomedclip.errors import ConfigError, DataError
from biomedclip.evaluation.config import EvaluateConfig
from biomedclip.evaluation.evaluate import evaluate
from biomedclip.evaluation.given import evaluate_given
from biomedclip.evaluation.overview import write_overview
from biomedclip.evaluation.reproduce import judge, names_of, rounding_tolerance
from biomedclip.evaluation.results import read_results
from biomedclip.evaluation.score_files import OF_DECISIONS, read_given
from biomedclip.evaluation.tasks import Published, find_task, parse_suite
from tests.test_evaluate import cells, config, painter

__all__ = ["cells"]

ECG = Path(__file__).parent / "data" / "ecg_predictions"
COHEN = [[88, 14, 18], [10, 40, 10], [2, 6, 12]]
"""Cohen 1960, table 1: two raters on 200 patients, kappa .492."""

THREE = """
suite: own
tasks:
  three:
    title: Three
    modality: m
    kind: zero_shot
    layout: {type: csv}
    split: test
    classes: [{label: a, name: one}, {label: b, name: two}, {label: c, name: three}]
    prompt_sets: {default: {source: here, templates: ["{}"]}}
    metrics: {primary: kappa, also: [accuracy, balanced_accuracy, auroc, ece, nll]}
    bootstrap: {by: sample}
    licence: MIT
    citation: none
    contamination: none
    published:
      - {model: Rater B, metric: kappa, value: 0.492, n: 200, source: "Cohen 1960"}
  two:
    title: Two
    modality: m
    kind: zero_shot
    layout: {type: csv}
    split: test
    classes: [{label: n, name: normal}, {label: p, name: ill}]
    prompt_sets: {default: {source: here, templates: ["{}"]}}
    metrics: {primary: auroc, also: [accuracy, brier]}
    bootstrap: {by: class}
    licence: MIT
    citation: none
    contamination: none
"""
OWN = parse_suite(THREE, "own.yaml")


def settings(task, file, **extra):
    facts = {"model": "someone", "tasks": [task], "data": {task: str(file)}, "bootstrap": {"n": 100}, **extra}
    return check_config(facts, EvaluateConfig, "test")


def test_published_predictions_give_the_published_table_to_its_last_digit(tmp_path):
    tasks = parse_suite((ECG / "suite.yaml").read_text(), "suite.yaml")
    wanted = settings("ecg_abnormalities", ECG / "predictions.csv", model="ECG DNN")
    result = evaluate_given(wanted, tmp_path, tasks=tasks)
    rows = result.record["reproduction"]
    assert len(rows) == 24
    assert {row["verdict"] for row in rows} == {"reproduced"}
    assert max(row["tolerance"] for row in rows) < 5.1e-4
    assert all(f"{row['ours']:.3f}" == f"{row['published']:.3f}" for row in rows)
    assert result.metrics["macro_f1"]["value"] == pytest.approx(
        (0.8966 + 0.9444 + 1 + 0.8824 + 0.8696 + 0.96) / 6, abs=1e-4
    )
    assert result.metrics["auroc"]["value"] is None
    assert result.metrics["auroc"]["reason"] == "predictions alone have no scores"
    assert result.record["dataset"]["class_counts"] == [28, 34, 30, 16, 13, 37]
    assert result.record["warnings"] == []


def test_a_published_table_of_agreement_gives_its_kappa(tmp_path):
    lines = ["label,prediction"]
    for row, counts in enumerate(COHEN):
        lines += [f"{'abc'[row]},{'abc'[column]}" for column, count in enumerate(counts) for _ in range(count)]
    (tmp_path / "p.csv").write_text("\n".join(lines))
    result = evaluate_given(settings("three", tmp_path / "p.csv", published_as="rater-b"), tmp_path / "out", tasks=OWN)
    (row,) = result.record["reproduction"]
    assert (row["verdict"], round(row["ours"], 3)) == ("reproduced", 0.492)
    assert result.record["confusion"] == COHEN
    assert result.metrics["accuracy"]["value"] == pytest.approx(0.7)
    assert all(entry["auroc"] is None for entry in result.record["per_class"])


def test_a_figure_that_does_not_come_out_is_not_reproduced_and_other_models_are_not_judged(tmp_path):
    metrics = {"accuracy": {"value": 0.9, "ci_low": 0.8, "ci_high": 0.95}, "auroc": {"value": None, "reason": "none"}}

    def entry(**facts):
        return Published(**({"model": "M-1", "metric": "accuracy", "value": 0.9, "n": None, "source": "s"} | facts))

    told = [
        entry(),
        entry(value=0.91),
        entry(n=5),
        entry(metric="auroc"),
        entry(prompt_set="other"),
        entry(model="M-2"),
    ]
    rows = judge(told, ["m1"], metrics, n=10, prompt_set="default")
    assert [row["verdict"] for row in rows] == ["reproduced", "not reproduced", *["not comparable"] * 3]
    assert rows[1]["inside_interval"] is True
    assert rows[1]["difference"] == pytest.approx(-0.01)
    assert [row.get("reason") for row in rows[2:]] == [
        "measured on 10 samples, published on 5", "none", "prompt set 'default', published with 'other'",
    ]  # fmt: skip
    assert judge(told[:2], ["m1"], metrics, n=10, tolerance=0.02)[1]["verdict"] == "reproduced"


def test_the_tolerance_is_half_a_unit_of_the_last_printed_digit():
    assert rounding_tolerance(0.7341) == pytest.approx(5e-5, rel=1e-3)
    assert rounding_tolerance(0.9) == rounding_tolerance(0.897) == pytest.approx(5e-4, rel=1e-3)
    rounded = round(0.123450001, 4)
    assert abs(0.123450001 - rounded) <= rounding_tolerance(rounded)


def test_a_released_model_goes_by_its_title():
    assert "BiomedCLIP" in names_of("hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224")
    assert names_of(None, "stranger") == ("stranger",)


def test_a_run_model_is_judged_within_half_a_point(cells, tmp_path):
    (task,) = parse_suite(THREE.split("  two:")[0], "x.yaml").values()
    bccd = find_task("bccd").model_copy(update={"published": (
        *task.published, Published(model="Painter", metric="accuracy", value=0.94, n=None, source="s"),
    )})  # fmt: skip
    wanted = config(data={"bccd": str(cells)}, published_as="painter")
    (result,) = evaluate(wanted, tmp_path / "out", model=painter(), tasks={"bccd": bccd})
    (row,) = result.record["reproduction"]
    assert (row["verdict"], row["tolerance"]) == ("reproduced", 0.005)  # 34 of 36 is .9444
    write_overview(tmp_path / "out", tmp_path / "report")
    assert "reproduced" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize("kind", ["probabilities", "logits", "cosines"])
def test_scores_of_a_table_are_measured_as_sklearn_does(tmp_path, kind):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 90)
    logits = rng.normal(size=(90, 3)) + 1.5 * np.eye(3)[y]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    given = p if kind == "probabilities" else logits
    lines = ["sample_id,label,c,a,b", *(f"s{i},{'abc'[y[i]]},{r[2]!r},{r[0]!r},{r[1]!r}" for i, r in
                                        enumerate(given.tolist()))]  # fmt: skip
    (tmp_path / "s.csv").write_text("\n".join(lines))
    found = evaluate_given(settings("three", tmp_path / "s.csv"), tmp_path / "o", kind=kind, tasks=OWN).metrics
    area = np.mean([sk.roc_auc_score(y == c, given[:, c]) for c in range(3)])
    assert found["auroc"]["value"] == pytest.approx(area, abs=1e-6)
    assert found["kappa"]["value"] == pytest.approx(sk.cohen_kappa_score(y, logits.argmax(1)))
    if kind == "cosines":
        assert "logit scale" in found["nll"]["reason"]
    else:
        assert found["nll"]["value"] == pytest.approx(sk.log_loss(y, p), abs=1e-5)
    arrays = {"y": y, kind: given[:, [1, 0, 2]], "classes": np.array(["b", "a", "c"]), "logit_scale": np.array(1.0)}
    np.savez(tmp_path / "s.npz", **(arrays | {"y": np.array([1, 0, 2])[y]}))
    again = evaluate_given(settings("three", tmp_path / "s.npz"), tmp_path / "o2", tasks=OWN).metrics
    assert again["auroc"]["value"] == found["auroc"]["value"]


def test_one_score_for_the_second_of_two_classes(tmp_path):
    y, p = [0, 0, 1, 1, 1], [0.1, 0.6, 0.55, 0.8, 0.9]
    (tmp_path / "s.csv").write_text("\n".join(["label,score", *(f"{'np'[a]},{b}" for a, b in zip(y, p, strict=True))]))
    found = evaluate_given(settings("two", tmp_path / "s.csv"), tmp_path / "o", tasks=OWN).metrics
    assert found["auroc"]["value"] == pytest.approx(sk.roc_auc_score(y, p))
    assert found["accuracy"]["value"] == pytest.approx(4 / 5)
    assert found["brier"]["value"] == pytest.approx(2 * sk.brier_score_loss(y, p), abs=1e-6)


def test_stored_scores_of_a_model_are_read_back_to_the_same_numbers(cells, tmp_path):
    (first,) = evaluate(config(data={"bccd": str(cells)}), tmp_path / "out", model=painter())
    again = evaluate_given(settings("bccd", first.scores_path), tmp_path / "again")
    assert again.metrics["accuracy"]["value"] == first.metrics["accuracy"]["value"]
    assert again.record["scores_sha256"] == first.record["scores_sha256"]
    assert [r.model for r in read_results(tmp_path / "again")] == ["someone"]
    with pytest.raises(DataError, match="does not answer two"):
        read_given(first.scores_path, OWN["two"])


@pytest.mark.parametrize(("text", "message"), [
    ("label,a,b\na,1,2\n", "has no column of c"),
    ("a,b,c\n1,2,3\n", "has no column `label`"),
    ("label,a,b,c\nx,1,2,3\n", "line 2: names no class of the task"),
    ("label,a,b,c\na,1,2,three\n", "line 2: holds what is no number"),
    ("label,a,b,c\na,1,2,nan\n", "scores that are not finite"),
    ("label,a,b,c\na,1,2\n", "line 2: has another number of cells"),
    ("label,prediction\na,d\n", "names no class of the task"),
    ("sample_id,label,prediction\nx,a,a\nx,a,a\n", "sample ids must be one a row"),
    ("label,a,b,c\n", "has no rows"),
])  # fmt: skip
def test_a_table_that_does_not_answer_the_task_is_one_line(tmp_path, text, message):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_given(tmp_path / "s.csv", OWN["three"])


def test_files_that_are_no_scores_are_refused(tmp_path):
    (tmp_path / "s.npz").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(DataError, match="no npz"):
        read_given(tmp_path / "s.npz", OWN["three"])
    np.savez(tmp_path / "o.npz", y=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="no npz"):
        read_given(tmp_path / "o.npz", OWN["three"])
    np.savez(tmp_path / "p.npz", y=np.array([0]), predictions=np.array([7]))
    with pytest.raises(DataError, match="below 3"):
        read_given(tmp_path / "p.npz", OWN["three"])
    np.savez(tmp_path / "q.npz", y=np.array([0]), probabilities=np.array([[2.0, 0, 0]]))
    with pytest.raises(DataError, match="probabilities must lie"):
        read_given(tmp_path / "q.npz", OWN["three"])
    with pytest.raises(ConfigError, match="answer one task"):
        evaluate_given(check_config({"model": "m", "tasks": ["bccd", "pcam"]}, EvaluateConfig, "x"), tmp_path)
    assert "auroc" not in OF_DECISIONS


def test_the_command_measures_a_file_and_prints_the_verdict(tmp_path):
    done = CliRunner().invoke(app, [
        "eval", "run", "-m", "ECG DNN", "--suite", str(ECG / "suite.yaml"), "--scores", str(ECG / "predictions.csv"),
        "--out", str(tmp_path / "out"), "--set", "bootstrap.n=100", "--report", str(tmp_path / "rep"),
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.output.count("reproduced") == 24
    (result,) = (tmp_path / "out" / "results").glob("*/*.json")
    assert json.loads(result.read_text())["model"]["given"] == "predictions"
    assert "reproduced" in (tmp_path / "rep" / "report.html").read_text()
    done = CliRunner().invoke(app, ["eval", "run", "-m", "x", "--scores", "s.csv"])
    assert isinstance(done.exception, ConfigError)
