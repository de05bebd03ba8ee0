"""Training end to end on made-up shards: what a run leaves, that resuming changes nothing, and what is refused."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from synthetic_shards import write_articles, write_colours
from tiny_model import write_tiny_model

from biomedclip.config import check_config
from biomedclip.errors import ConfigError, DataError
from biomedclip.training.config import TrainConfig
from biomedclip.training.module import rate_factor
from biomedclip.training.train import train


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_colours(root / "colours")
    write_articles(root / "articles")
    write_tiny_model(root / "model")
    return root


def config(folders, **changes):
    values = {
        "model": {"name": str(folders / "model")},
        "data": {
            "sources": [
                {"name": "colours", "path": str(folders / "colours"), "balance": True},
                {"name": "articles", "path": str(folders / "articles")},
            ]
        },
        "max_steps": 6,
        "batch_size": 8,
        "optim": {"lr": 1e-3},
        "schedule": {"warmup_steps": 2},
        "loss": {"soft_targets": 1.0, "same_article": "ignore"},
        "log_every_steps": 1,
        "checkpoints": {"every_steps": 2, "keep_last": 9},
        "threads": 1,
    }
    return check_config(values | changes, TrainConfig, "test")


def weights(folder):
    return load_file(folder / "open_clip_model.safetensors")


def metrics(folder):
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    return train(config(folders), tmp_path_factory.mktemp("run") / "a")


def test_a_run_leaves_start_checkpoints_final_and_its_facts(finished, folders):
    assert equal(weights(finished.start), weights(folders / "model"))
    assert not equal(weights(finished.start), weights(finished.final))
    names = sorted(path.name for path in (finished.folder / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000006"]
    done = json.loads((finished.folder / "done.json").read_bytes())
    assert done["steps"] == finished.steps == 6
    assert json.loads((finished.folder / "run.json").read_bytes())["versions"]["torch"] in torch.__version__


def test_metrics_are_a_row_a_step_and_the_loss_falls_as_the_rate_follows_its_schedule(finished, folders):
    rows = metrics(finished.folder)
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    wanted = [1e-3 * rate_factor(step, 6, config(folders).schedule) for step in range(6)]
    assert [float(row["lr"]) for row in rows] == pytest.approx(wanted, rel=1e-4)


def test_every_checkpoint_loads_in_open_clip(finished):
    for folder in [finished.final, *(finished.folder / "checkpoints").iterdir()]:
        model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        assert model.logit_scale.exp().item() <= 100


def test_the_same_config_gives_the_same_weights(finished, folders, tmp_path):
    again = train(config(folders), tmp_path / "b")
    assert equal(weights(finished.final), weights(again.final))
    other = train(config(folders, seed=1), tmp_path / "c")
    assert not equal(weights(finished.final), weights(other.final))


@pytest.mark.parametrize("last", [2, 4])
def test_a_run_resumed_from_any_checkpoint_ends_with_the_same_weights(finished, folders, tmp_path, last):
    copy = tmp_path / "run"
    shutil.copytree(finished.folder, copy)
    (copy / "done.json").unlink()
    shutil.rmtree(copy / "final")
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > last:
            shutil.rmtree(checkpoint)
    resumed = train(config(folders), copy, resume=True)
    assert equal(weights(finished.final), weights(resumed.final))
    rows = metrics(copy)
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_returned_and_another_config_is_refused(finished, folders):
    assert train(config(folders), finished.folder, resume=True).steps == 6
    with pytest.raises(ConfigError, match="a finished run"):
        train(config(folders), finished.folder)


def test_a_run_cannot_be_resumed_with_other_learning(finished, folders, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished.folder, copy)
    (copy / "done.json").unlink()
    with pytest.raises(ConfigError, match=r"was started with another config: batch_size differ"):
        train(config(folders, batch_size=4), copy, resume=True)


def test_missing_and_empty_sources_are_refused_before_anything_is_trained(folders, tmp_path):
    data = {"sources": [{"name": "x", "path": str(tmp_path / "nowhere")}]}
    with pytest.raises(DataError, match="there is no such folder"):
        train(config(folders, data=data), tmp_path / "r")
    data = {"sources": [{"name": "x", "path": str(folders / "articles"), "split": "test"}]}
    with pytest.raises(DataError, match=r"has no samples of split 'test' \(found train\)"):
        train(config(folders, data=data), tmp_path / "s")


def test_a_loss_that_is_not_finite_stops_with_the_remedy_and_keeps_the_last_checkpoint(folders, tmp_path):
    wild = config(folders, optim={"lr": 1e30, "clip_norm": None}, max_steps=40, schedule={"warmup_steps": 3})
    with pytest.raises(ConfigError, match=r"(?i)finite|nan") as caught:
        train(wild, tmp_path / "r")
    assert "lr" in str(caught.value) or "rate" in str(caught.value)
    for folder in (tmp_path / "r" / "checkpoints").glob("step-*"):
        assert all(torch.isfinite(tensor).all() for tensor in weights(folder).values())


def test_the_trap_of_lightnings_step_estimate_is_never_touched():
    from pathlib import Path

    import biomedclip.training

    for path in Path(biomedclip.training.__file__).parent.glob("*.py"):
        assert "trainer.estimated_stepping_batches" not in path.read_text()


SCRIPT = """
import sys
from biomedclip.config import load_config
from biomedclip.training.config import TrainConfig
from biomedclip.training.train import train
train(load_config(sys.argv[1], TrainConfig), sys.argv[2], resume=True)
"""


@pytest.mark.timeout(600)  # a dozen starts of torch, on a machine that may be busy
@pytest.mark.fault
def test_a_run_killed_anywhere_and_resumed_ends_with_the_same_weights(folders, tmp_path):
    import yaml

    long = config(folders, max_steps=60, checkpoints={"every_steps": 3, "keep_last": 2})
    whole = train(long, tmp_path / "whole")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(long.model_dump(mode="json")))
    command = [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / "killed")]
    for _ in range(12):
        process = subprocess.Popen(command)
        metrics = tmp_path / "killed" / "metrics.csv"
        begin = metrics.read_text().count("\n") if metrics.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            rows = metrics.read_text().count("\n") if metrics.exists() else 0
            if rows > begin + 8:
                break
            time.sleep(0.01)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    else:
        subprocess.run(command, check=True)
    assert equal(weights(whole.final), weights(tmp_path / "killed" / "final"))
