"""The record and the card of a model trained here: numbers from files only, holes refused, misses said as misses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_model import write_tiny_model
from typer.testing import CliRunner

from biomedclip import cli
from biomedclip.errors import CheckpointError, ConfigError, DataError
from biomedclip.files import sha256_file, sha256_json
from biomedclip.models.collect_record import (
    check_copy,
    collect_record,
    count_hours,
    describe_weights,
    find_runs,
    find_start,
)
from biomedclip.models.export import WEIGHTS_FILE, export_released
from biomedclip.models.load import load, load_parts
from biomedclip.models.own_cards import record_card
from biomedclip.models.training_record import CardNotes, TrainingRecord, WeightsRecord, read_record

NOTES = CardNotes(
    title="Demo CLIP", summary="A small CLIP.", licence="apache-2.0", intended_use="Research.", out_of_scope="Care.",
    training_data="Figures of PubMed Central.", consent="Published figures; none sought.",
    population="English articles.", limitations=("Small.",), contact="issues of the repository",
)  # fmt: skip
WEIGHTS = WeightsRecord(file=WEIGHTS_FILE, sha256="w", bytes=1, parameters=7, fingerprint="sha256:f", preprocess="p",
                        context=16)  # fmt: skip
LOG = """2026-11-28T06:00:00+00:00 started train
2026-11-28T06:30:00+00:00 step 10
not a line of ours
2026-11-28T09:00:00+00:00 resumed with the same versions
2026-11-28T09:15:00+00:00 done
"""


def write_run(folder: Path, *, start: str = "biomedclip-demo", licences: bool = True, **model: str) -> Path:
    """A finished run as `train` leaves it, with its dataset folder beside it."""
    write_tiny_model(folder / "final")
    write_tiny_model(folder / "start", seed=1)
    shards = folder.parent / "shards"
    shards.mkdir(exist_ok=True)
    manifest = {"samples": 12, "splits": {"train": 12}, "shards": [{"sha256": "aa"}, {"sha256": "bb"}],
                **({"licences": {"CC BY": 10, "CC0": 2}} if licences else {})}  # fmt: skip
    (shards / "manifest.json").write_text(json.dumps(manifest))
    config = {"model": {"name": start, "init": "random", **model},
              "data": {"sources": [{"name": "pmc", "path": str(shards)}]}}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    facts = {"seed": 3, "git_commit": "c" * 40, "kind": "train", "versions": {"torch": "2.8"},
             "machine": {"system": "Linux", "cpus": 2, "gpus": ["a GPU"]}}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "log.txt").write_text(LOG)
    (folder / "done.json").write_text(json.dumps({"kind": "train", "steps": 40}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def result(fingerprint: str = "sha256:f", **metric: Any) -> dict[str, Any]:
    value = {"value": 0.75, "ci_low": 0.625, "ci_high": 0.875, "ci_method": "bootstrap", "n": 50, **metric}
    return {
        "task": "demo", "title": "Demo task", "primary": "accuracy", "schema": 1, "model": {"fingerprint": fingerprint},
        "dataset": {"split": "test", "n": 50, "manifest_sha256": "ab", "n_groups": 20, "classes": ["cat", "dog"],
                    "leakage": {"text": "none found"}},
        "metrics": {"accuracy": value}, "confusion": [[30, 8], [2, 10]],
        "per_class": [
            {"class": "cat", "support": 38, "recall": 0.789}, {"class": "dog", "support": 12, "recall": 0.83},
        ],
        "baselines": {"majority": {"accuracy": 0.76}},
        "beyond": {
            "subgroups": {"attribute": "sex", "groups": [
                {"name": "f", "n": 30, "value": 0.8, "ci_low": 0.7, "ci_high": 0.9, "reason": None}]},
            "corruptions": {"worst": "blur", "by_corruption": {"blur": 0.55, "noise": 0.7}},
        },
    }  # fmt: skip


def collect(run: Path, after: list[dict[str, Any]], **options: Any) -> TrainingRecord:
    return collect_record(run, options.pop("notes", NOTES), after, weights=WEIGHTS, **options)


def test_numbers_come_from_results_of_exactly_these_weights(run: Path) -> None:
    text = record_card(collect(run, [result(), result("sha256:other", value=0.99)]))
    assert "| Demo task | test | accuracy | 0.750 (0.625 to 0.875) | 50 (20 groups) | 0.760 | not measured |" in text
    assert "0.99" not in text
    assert f"| pmc | 12 | train 12 | CC BY: 10, CC0: 2 | `{sha256_json(['aa', 'bb'])[:16]}` |" in text
    assert (
        "| 1 | pretraining | biomedclip-demo (random) | 40 | 0.75 | 3 | Linux, 2 CPUs, a GPU | `cccccccccccc` |" in text
    )
    assert "0.75 hours in all. Versions: torch 2.8." in text
    assert "Demo task: 8 of 38 cat are called dog" in text
    assert "worst corruption is blur, accuracy 0.550" in text
    assert "accuracy by sex" in text
    assert "| f | 0.800 (0.700 to 0.900) | 30 |" in text
    assert "Not for clinical use" in text
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.75, "name": "accuracy"}]
    from huggingface_hub import ModelCard

    assert ModelCard(text).data.eval_results[0].metric_value == 0.75


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ({"value": 0.5, "ci_low": 0.4, "ci_high": 0.6}, "better than its start, intervals apart"),
        ({"value": 0.6, "ci_low": 0.5, "ci_high": 0.7}, "NOT clearly better than its start"),
    ],
)
def test_the_starting_point_stands_beside_and_is_beaten_only_with_intervals_apart(run, start, words) -> None:
    record = collect(run, [result()], before=[result("sha256:s", **start)], start_fingerprint="sha256:s")
    assert words in record_card(record)
    low, high = start["ci_low"], start["ci_high"]
    assert f"| {start['value']:.3f} ({low:.3f} to {high:.3f}) |" in record_card(record)


@pytest.mark.parametrize(("target", "words"), [(0.75, "target 0.75 reached"), (0.76, "target 0.76 MISSED")])
def test_a_missed_target_is_called_missed(run: Path, target: float, words: str) -> None:
    notes = NOTES.model_copy(update={"targets": {"demo": target}})
    assert words in record_card(collect(run, [result()], notes=notes))


def test_less_is_better_where_a_metric_is_an_error(run: Path) -> None:
    def error(fingerprint: str, value: float) -> dict[str, Any]:
        record = result(fingerprint)
        score = {"value": value, "ci_low": value - 0.1, "ci_high": value + 0.1, "n": 5}
        return record | {"primary": "ece", "metrics": {"ece": score}}

    notes = NOTES.model_copy(update={"targets": {"demo": 0.3}})
    (task,) = collect(run, [error("sha256:f", 0.2)], before=[error("sha256:s", 0.9)], start_fingerprint="sha256:s",
                      notes=notes).tasks  # fmt: skip
    assert task.beats_start
    assert task.reaches_target


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"after": []}, r"no result of these weights \(sha256:f…\): evaluate them"),
        ({"after": [result("sha256:other")]}, "there are results of sha256:other"),
        ({"after": [result(n=None)]}, "demo: accuracy has no n or interval"),
        ({"licences": False}, "source pmc: no manifest with licences"),
        ({"before": []}, r"no result of the starting point .*demo: was not scored at the starting point"),
        ({"before": [result("sha256:s", ci_low=None)]}, "accuracy of the starting point has no n or interval"),
        ({"before": [result("sha256:s") | {"dataset": {"manifest_sha256": "cd"}}]}, "scored on other samples"),
        ({"notes": NOTES.model_copy(update={"targets": {"bcc": 0.9}})}, "targets.bcc: no result of this task"),
        ({"unfinished": True}, "the run is not finished"),
    ],
)
def test_a_record_with_a_hole_is_not_made(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    run = write_run(tmp_path / "run", licences=options.pop("licences", True))
    if options.pop("unfinished", False):
        (run / "done.json").unlink()
    with pytest.raises(ConfigError, match=message):
        collect(run, options.pop("after", [result()]), start_fingerprint="sha256:s", **options)


def test_hours_are_those_of_all_sessions_without_the_pause_between_them() -> None:
    assert count_hours(LOG) == 0.75
    assert count_hours("") is None


def write_text_run(folder: Path) -> Path:
    write_tiny_model(folder / "final")
    (folder.parent / "sentences.txt").write_text("one sentence\u2028still the first\nanother\n")
    config = {"task": "text", "model": "biomedclip-demo", "sentences": [str(folder.parent / "sentences.txt")]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"seed": 4, "kind": "train"}))
    (folder / "log.txt").write_text(LOG)
    (folder / "done.json").write_text(json.dumps({"kind": "train", "cosine": 0.9}))
    return folder


def test_earlier_runs_are_found_and_the_start_is_that_of_the_first_with_pictures(tmp_path: Path) -> None:
    text = write_text_run(tmp_path / "text")
    first = write_run(tmp_path / "first", text_tower=str(text / "final"))
    second = write_run(tmp_path / "second", start=str(first / "final"))
    assert find_runs(second) == [text, first, second]
    assert find_start(second) == first / "start"
    with pytest.raises(ConfigError, match=r"sentences .*sentences.txt: text_licence of the notes is missing"):
        collect(second, [result()])
    record = collect(second, [result()], notes=NOTES.model_copy(update={"text_licence": "CC BY and CC0"}))
    assert [(run.task, run.steps, run.seed) for run in record.runs] == [
        ("text", None, 4), ("pretraining", 40, 3), ("pretraining", 40, 3)]  # fmt: skip
    assert record.runs[1].starts_from == "biomedclip-demo (random), text tower of text"
    assert record.runs[2].starts_from == "first (random)"
    (sentences,) = (source for source in record.sources if source.name == "sentences.txt")
    assert (sentences.samples, sentences.licences) == (2, {"CC BY and CC0": 2})
    assert sentences.sha256 == sha256_file(tmp_path / "sentences.txt")
    assert str(tmp_path) not in record.model_dump_json()


def test_a_record_survives_its_file_and_another_file_is_refused(run: Path, tmp_path: Path) -> None:
    record = collect(run, [result()])
    path = tmp_path / "results.json"
    path.write_text(json.dumps(record.model_dump(mode="json")))
    assert read_record(path) == record
    path.write_text("[]")
    with pytest.raises(DataError, match="is no record of a training"):
        read_record(path)
    path.write_text(json.dumps(record.model_dump(mode="json") | {"tasks": []}))
    with pytest.raises(DataError, match=r"is no record of a training .*tasks"):
        read_record(path)


def test_weights_that_are_not_published_say_so(run: Path) -> None:
    notes = NOTES.model_copy(update={"weights": "two sources carry no licence."})
    text = record_card(collect(run, [result()], notes=notes))
    assert "Its weights are not published: two sources carry no licence." in text
    assert "biomedclip.load(" not in text


def test_a_copy_in_half_precision_is_the_run_s_and_another_model_is_not(run: Path, tmp_path: Path) -> None:
    parts, (model, _, _) = load_parts(run)
    half = export_released(model, parts, tmp_path / "half", half=True) / WEIGHTS_FILE
    check_copy(run / "final" / WEIGHTS_FILE, half)
    facts = describe_weights(half, fingerprint="f", parameters=1, preprocess="p", context=16)
    assert (facts.precision, facts.sha256) == ("float16", sha256_file(half))
    with pytest.raises(CheckpointError, match=r"does not hold what the run .*/run trained \(found \d+ tensors differ"):
        check_copy(run / "final" / WEIGHTS_FILE, run / "start" / WEIGHTS_FILE)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["models", "card", *map(str, arguments)])


def test_the_command_collects_a_record_and_writes_cards_of_it(run: Path, tmp_path: Path) -> None:
    from biomedclip.evaluation.embed import fingerprint

    assert "with the keys title, summary, licence, intended_use" in str(invoke(run).exception)
    notes = tmp_path / "notes.yaml"
    notes.write_text(yaml.safe_dump(NOTES.model_dump(mode="json")))
    assert "--results: is missing" in str(invoke(run, "--notes", notes).exception)
    parts, (model, _, _) = load_parts(run)
    half = export_released(model, parts, tmp_path / "half", half=True)
    for name, folder, value in (("after", half, 0.75), ("before", run / "start", 0.25)):
        path = tmp_path / name / "results" / "m" / "demo.json"
        path.parent.mkdir(parents=True)
        score = {"value": value, "ci_low": value - 0.1, "ci_high": value + 0.1}
        path.write_text(json.dumps(result(fingerprint(load(folder)[0]), **score)))
    given = [run, "--notes", notes, "--results", tmp_path / "after", "--before", tmp_path / "before"]
    assert "no result of these weights" in str(invoke(*given).exception), "the run's own weights were not scored"
    done = invoke(*given, "--model", half, "--out", tmp_path / "results.json")
    assert done.exit_code == 0, done.exception
    assert read_record(tmp_path / "results.json").weights.precision == "float16"
    done = invoke(tmp_path / "results.json", "--out", tmp_path / "card.md")
    assert done.exit_code == 0, done.exception
    assert invoke(*given, "--model", half).output == (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "0.750 (0.650 to 0.850)" in (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "intervals apart" in (tmp_path / "card.md").read_text(encoding="utf-8")
