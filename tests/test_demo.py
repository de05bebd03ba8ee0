"""The walking skeleton, shortened to a few steps: every stage on the real sample data, its report and its numbers."""

import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from biomedclip.demo import Builder, run_demo
from biomedclip.errors import ConfigError
from biomedclip.shards import verify
from data_builders.build import BuildConfig, build, resolve_root

SHORT = ["max_steps=4", "batch_size=16", "schedule.warmup_steps=1", "checkpoints.every_steps=2",
         "checkpoints.keep_last=2"]  # fmt: skip
BUILDER = Builder(config=BuildConfig, build=build, find_sample=resolve_root)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    said = []
    result = run_demo(tmp_path_factory.mktemp("demo") / "out", BUILDER, overrides=SHORT, say=said.append)
    return result, json.loads(result.summary.read_bytes()), said


@pytest.mark.slow
def test_the_summary_has_every_task_before_and_after_with_intervals(done):
    _, summary, _ = done
    assert set(summary["tasks"]) == {"bccd", "pneumoniamnist", "article_retrieval"}
    for task, metric, n in (
        ("bccd", "balanced_accuracy", 176),
        ("pneumoniamnist", "auroc", 624),
        ("article_retrieval", "image_to_text/recall@5", 33),
    ):
        for stage in ("before", "after"):
            entry = summary["tasks"][task][stage][metric]
            assert set(entry) == {"value", "ci_low", "ci_high", "n"}
            assert 0 <= entry["ci_low"] <= entry["ci_high"] <= 1
            assert entry["n"] == n


@pytest.mark.slow
def test_the_ledger_adds_up_and_the_datasets_verify(done):
    result, summary, said = done
    ledger = summary["ledger"]
    assert ledger["seen"] == ledger["kept"] + ledger["dropped"]
    folders = sorted((result.report.parent / "data").iterdir())
    assert [folder.name for folder in folders] == ["bccd", "pmc", "pneumoniamnist"]
    assert all(verify(folder) == [] for folder in folders)
    assert any("131 seen = 99 kept + 32 dropped" in line for line in said)


@pytest.mark.slow
def test_the_numbers_of_the_report_are_those_of_the_summary(done):
    result, summary, _ = done
    page = result.report.read_text()
    text = unescape(re.sub(r"<[^>]+>", " ", page))
    assert not re.search(r"""(?:src|href)=["'](?!data:|#|https://)""", page)
    for task in summary["tasks"].values():
        for entry in task["after"].values():
            assert f"{entry['value']:.3f}" in text
    assert f"{summary['ledger']['seen']:,}" in text or "131" in text


@pytest.mark.slow
def test_the_weights_load_by_the_folder_and_in_open_clip(done):
    import open_clip
    import torch

    import biomedclip

    run = done[0].report.parent / "run"
    model, preprocess, tokenizer = biomedclip.load(run)
    theirs, their_preprocess = open_clip.create_model_from_pretrained(f"local-dir:{run / 'final'}")
    tokens = tokenizer(["a chest X-ray", "a blood smear"])
    with torch.no_grad():
        assert torch.equal(model.encode_text(tokens), theirs.eval().encode_text(tokens))
    picture = Image.fromarray(np.arange(50 * 40 * 3, dtype=np.uint8).reshape(50, 40, 3))
    assert torch.equal(preprocess(picture), their_preprocess(picture))


def test_the_lines_of_the_readme_run_as_they_stand():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    names: dict = {}
    exec(lines, names)
    assert names["probabilities"].shape == (1, 2)
    assert abs(names["probabilities"].sum().item() - 1) < 1e-5


@pytest.mark.slow
def test_a_second_run_finds_everything_done_and_keeps_the_numbers(done):
    result, summary, _ = done
    weights = result.report.parent / "run" / "final" / "open_clip_model.safetensors"
    before = weights.stat().st_mtime_ns
    again = run_demo(result.report.parent, BUILDER, overrides=SHORT)
    assert json.loads(again.summary.read_bytes())["tasks"] == summary["tasks"]
    assert weights.stat().st_mtime_ns == before


@pytest.mark.slow
def test_an_interrupted_training_goes_on_and_ends_alike(done):
    result, summary, _ = done
    folder = result.report.parent
    # What a kill after the first checkpoint leaves: no final weights, no done marker, no later checkpoint.
    shutil.rmtree(folder / "run" / "final")
    (folder / "run" / "done.json").unlink()
    first, second = sorted((folder / "run" / "checkpoints").glob("step-*"))
    shutil.rmtree(second)
    shutil.rmtree(folder / "results")
    again = run_demo(folder, BUILDER, overrides=SHORT)
    assert (first.name, second.name) == ("step-00000002", "step-00000004")
    assert json.loads(again.summary.read_bytes())["tasks"] == summary["tasks"]


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.docx").write_text("x")
    with pytest.raises(ConfigError, match=r"holds other files \(found thesis\.docx\)"):
        run_demo(tmp_path, BUILDER)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        run_demo(tmp_path / "file", BUILDER)
