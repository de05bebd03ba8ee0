"""Two processes on a CPU against one: the same weights, resumed across numbers of processes, weights shared or not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_model import write_training_folders

from biomedclip.config import check_config
from biomedclip.runs import read_metrics
from biomedclip.training.config import TrainConfig
from biomedclip.training.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # each starts torch twice, on a machine that may be busy
SCRIPT = Path(__file__).parent / "train_script.py"
VALIDATION = ("val_loss", "val_image_to_text/recall@1", "val_text_to_image/recall@1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_training_folders(tmp_path_factory.mktemp("data"))


def settings(folders, **changes):
    sources = [{"name": name, "path": str(folders / name)} for name in ("colours", "articles")]
    values = {
        "model": {"name": str(folders / "model")},
        "data": {"sources": sources},
        "max_steps": 4,
        "batch_size": 8,
        # A small epsilon makes Adam's first steps the sign of the gradient, which magnifies rounding.
        "optim": {"lr": 1e-3, "eps": 1e-3},
        "loss": {"soft_targets": 1.0, "same_article": "ignore"},
        "log_every_steps": 1,
        "checkpoints": {"every_steps": 2, "keep_last": 9},
        "validation": {"every_steps": 2, "max_samples": 7},  # an odd number, so one of two processes has a pair less
        "device": "cpu",
        "threads": 1,
    }
    return values | changes


def run(folder, values, *, environment=None):
    """Train in processes of their own; returns the run folder."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    known = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
    done = subprocess.run(
        [sys.executable, SCRIPT, path, folder], env=known, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def one(folders, tmp_path_factory):
    return train(check_config(settings(folders), TrainConfig, "test"), tmp_path_factory.mktemp("one") / "run").folder


def largest_difference(first, second):
    a, b = (load_file(folder / "open_clip_model.safetensors") for folder in (first, second))
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "ddp"},
        {"strategy": "ddp", "micro_batch_size": 3},
        {"strategy": "fsdp"},
    ],
    ids=["ddp", "ddp in parts", "fsdp"],
)
def test_two_processes_end_with_the_weights_of_one(one, folders, tmp_path, changes):
    two = run(tmp_path / "two", settings(folders, devices=2, **changes))
    assert largest_difference(one / "start", one / "final") > 1e-4
    assert largest_difference(one / "final", two / "final") <= 1e-6
    rows, alone = read_metrics(two), read_metrics(one)
    assert [row["step"] for row in rows] == [row["step"] for row in alone] == [1, 2, 2, 3, 4, 4]
    for a, b in zip(rows, alone, strict=True):
        for name in ("loss", "source/articles", *VALIDATION):
            # Weights that differ in their last digits may swap two answers that are nearly as good.
            near = {"abs": 0.15} if "recall" in name else {"rel": 1e-4}
            assert a[name] == (None if b[name] is None else pytest.approx(b[name], **near))
    assert sum(row["val_loss"] is not None for row in rows) == 2
    assert json.loads((two / "done.json").read_bytes())["steps"] == 4


@pytest.mark.parametrize("devices", [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(one, folders, tmp_path, devices):
    before, after = devices
    folder = run(tmp_path / "run", settings(folders, devices=before))
    (folder / "done.json").unlink()
    for name in ("step-00000004", "step-00000002"):
        # Only the first process's loader state is in a checkpoint, and it is all there is to know.
        state = torch.load(folder / "checkpoints" / name / "trainer.ckpt", weights_only=True)
        assert state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["delivered"] == int(name[-1])
    for path in (folder / "checkpoints" / "step-00000004").iterdir():
        path.unlink()
    (folder / "checkpoints" / "step-00000004").rmdir()
    run(folder, settings(folders, devices=after))
    assert largest_difference(one / "final", folder / "final") <= 1e-6
    assert "continues after step 2" in (folder / "log.txt").read_text()
