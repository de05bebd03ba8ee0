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
from tiny_model import write_training_folders

from biomedclip.config import check_config
from biomedclip.errors import CheckpointError, ConfigError, DataError
from biomedclip.training.checkpoints import list_checkpoints
from biomedclip.training.config import TrainConfig
from biomedclip.training.failures import check_tokens
from biomedclip.training.module import ContrastiveModule
from biomedclip.training.optim import rate_factor
from biomedclip.training.train import train


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_training_folders(tmp_path_factory.mktemp("data"))


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


EVERYTHING = {
    "micro_batch_size": 3, "precision": "bf16", "optim": {"lr": 1e-3, "layer_decay": 0.8},
    "towers": {"patch_dropout": 0.5, "stages": [{"until_step": 3, "size_px": 16}], "gradient_checkpointing": True},
    "validation": {"every_steps": 2, "max_samples": 8},
}  # fmt: skip


def test_alip_reads_a_second_caption_of_each_sample(folders, tmp_path):
    from biomedclip.training.train import _build

    settings = config(folders, loss={"name": "alip"}, max_steps=3)
    batch = next(iter(_build(settings)[3].train_loader))
    both = {tuple(row.tolist()) for name in ("text", "second_text") for row in batch[name]}
    places = [n for n, source in enumerate(batch["source"]) if source == "colours"]
    assert not any(torch.equal(batch["text"][n], batch["second_text"][n]) for n in places)
    assert all(torch.equal(batch["text"][n], batch["second_text"][n]) for n in range(8) if n not in places)
    assert len(both) > len(places)
    state = torch.load(train(settings, tmp_path / "r").folder / "checkpoints" / "step-00000002" / "trainer.ckpt",
                       weights_only=True)  # fmt: skip
    assert torch.isfinite(state["state_dict"]["objective.means"]).all()


def cut_back(folder, last):
    """An interrupted run: what came after the checkpoint of a step is gone."""
    (folder / "done.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "final", ignore_errors=True)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > last:
            shutil.rmtree(checkpoint)


@pytest.mark.slow
def test_a_run_with_parts_dropout_stages_and_validation_resumes_exactly(folders, tmp_path):
    whole = train(config(folders, **EVERYTHING), tmp_path / "a")
    shutil.copytree(whole.folder, tmp_path / "b")
    cut_back(tmp_path / "b", 2)
    resumed = train(config(folders, **EVERYTHING), tmp_path / "b", resume=True)
    assert equal(weights(whole.final), weights(resumed.final))
    plain = train(config(folders, **EVERYTHING | {"micro_batch_size": 0, "towers": {}}), tmp_path / "c")
    assert not equal(weights(whole.final), weights(plain.final))


@pytest.mark.slow
def test_the_best_checkpoint_by_a_validation_stays_beside_the_newest(folders, tmp_path):
    settings = {"every_steps": 0, "every_minutes": 0, "keep_last": 1}
    wanted = {"validation": {"every_steps": 2, "max_samples": 8}, "optim": {"lr": 0.05}}
    for best, choose in (("-val_loss", min), ("val_loss", max)):
        run = train(config(folders, checkpoints=settings | {"best": best}, **wanted), tmp_path / best)
        facts = json.loads((run.folder / "checkpoints" / "best.json").read_bytes())
        losses = {int(row["step"]): float(row["val_loss"]) for row in metrics(run.folder) if row["val_loss"]}
        assert facts["value"] == pytest.approx(choose(losses.values()), rel=1e-4)
        assert losses[int(facts["checkpoint"].removeprefix("step-"))] == choose(losses.values())
        names = {path.name for path in list_checkpoints(run.folder)}
        assert names == {facts["checkpoint"], "step-00000006"}
        # What a best checkpoint holds is enough to go on from, like any other.
        last = int(facts["checkpoint"].removeprefix("step-"))
        cut_back(run.folder, last)
        assert equal(weights(run.final) if run.final.exists() else {}, {})
        again = train(config(folders, checkpoints=settings | {"best": best}, **wanted), run.folder, resume=True)
        assert equal(weights(again.folder / "checkpoints" / "step-00000006"), weights(again.final))
    whole = train(config(folders, checkpoints=settings, **wanted), tmp_path / "plain")
    assert equal(weights(whole.final), weights(again.final))
    with pytest.raises(ConfigError, match=r"no validation measures 'auroc'; name one of: val_image_to_text/recall@1"):
        train(config(folders, checkpoints=settings | {"best": "auroc"}, **wanted), tmp_path / "r")


def test_checkpoints_by_the_clock(folders, tmp_path):
    run = train(config(folders, max_steps=3, checkpoints={"every_minutes": 1e-9, "keep_last": 2}), tmp_path / "r")
    assert [path.name for path in list_checkpoints(run.folder)] == ["step-00000002", "step-00000003"]
    assert "saved step-00000001" in (run.folder / "log.txt").read_text()


def test_metrics_hold_the_loss_of_each_source(finished):
    for row in metrics(finished.folder):
        mean = (4 * float(row["source/colours"]) + 4 * float(row["source/articles"])) / 8
        assert mean == pytest.approx(float(row["loss"]), rel=1e-4)
        assert row["mfu"] == ""
        assert 0 <= float(row["data_wait"]) <= 1


def test_a_full_disk_at_a_checkpoint_says_so_and_leaves_the_last_one(folders, tmp_path):
    """The limit on the size of files fails a write midway, as a full disk does."""
    import resource

    run = train(config(folders), tmp_path / "r")
    whole = weights(run.final)
    cut_back(run.folder, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step-00000004: cannot be written .*free disk space, then resume; "
                                                  r"the last good checkpoint is .*step-00000002"):  # fmt: skip
            train(config(folders), run.folder, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in list_checkpoints(run.folder)] == ["step-00000002"]
    assert equal(whole, weights(train(config(folders), run.folder, resume=True).final))


def test_a_step_that_does_not_fit_into_memory_names_the_settings_that_help(folders, tmp_path, monkeypatch):
    def too_large(self, number, batch):
        return torch.empty(1 << 60)

    monkeypatch.setattr(ContrastiveModule, "_embed_part", too_large)
    with pytest.raises(ConfigError, match=r"does not fit into memory, 8 samples at a time .*set micro_batch_size to 4 "
                                          r".*gradient_checkpointing: true, or set precision: bf16"):  # fmt: skip
        train(config(folders), tmp_path / "a")

    def too_large_on_a_gpu(self, number, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(ContrastiveModule, "_embed_part", too_large_on_a_gpu)
    with pytest.raises(ConfigError, match=r"3 samples at a time \(found CUDA out of memory.*micro_batch_size to 1 "):
        train(config(folders, micro_batch_size=3), tmp_path / "b")


# torch raises where its signal lands; from a destructor Python can only report it, beside the error that ends the run.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_lost_reading_process_is_named_with_its_remedy(folders, tmp_path, monkeypatch):
    from biomedclip.stream.samples import Samples

    read = Samples.__getitem__

    def die(self, step):
        if step == 3:
            os._exit(9)
        return read(self, step)

    monkeypatch.setattr(Samples, "__getitem__", die)
    data = config(folders).data.model_dump(mode="json", exclude={"fetch"}, exclude_defaults=True) | {"workers": 1}
    with pytest.raises(DataError, match=r"data.workers: a reading process died .*lower data.workers"):
        train(config(folders, data=data), tmp_path / "r")


def test_a_tokenizer_that_does_not_fit_the_text_tower_is_refused():
    class Tower:
        context_length, vocab_size = 8, 100

    def tokens(*row):
        return lambda captions: torch.tensor([row])

    check_tokens(tokens(*range(8)), Tower(), "m")
    with pytest.raises(ConfigError, match="m: its tokenizer gives 9 tokens, its text tower takes 8"):
        check_tokens(tokens(*range(9)), Tower(), "m")
    with pytest.raises(ConfigError, match=r"ids beyond the 100 of its text tower \(found 100\)"):
        check_tokens(tokens(100), Tower(), "m")


def test_the_trap_of_lightnings_step_estimate_is_never_touched():
    from pathlib import Path

    import biomedclip.training

    for path in Path(biomedclip.training.__file__).parent.glob("**/*.py"):
        assert "trainer.estimated_stepping_batches" not in path.read_text()


SCRIPT = """
import sys
from biomedclip.config import load_config
from biomedclip.training.config import TrainConfig
from biomedclip.training.train import train
train(load_config(sys.argv[1], TrainConfig), sys.argv[2], resume=True)
"""


@pytest.mark.timeout(400)  # starts torch once more, on a machine that may be busy
@pytest.mark.fault
def test_sigterm_saves_the_step_under_way_and_the_run_goes_on_from_there(folders, tmp_path):
    import yaml

    long = config(folders, max_steps=100, checkpoints={"every_minutes": 0})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(long.model_dump(mode="json")))
    out = tmp_path / "r"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, tmp_path / "run.yaml", out], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not ((out / "metrics.csv").exists() and len(metrics(out)) > 5):
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert b"SIGTERM stopped the run, saved, after step" in said
    (saved,) = list_checkpoints(out)
    assert saved.name == f"step-{int(metrics(out)[-1]['step']):08d}"
    assert equal(weights(train(long, out, resume=True).final), weights(train(long, tmp_path / "whole").final))


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
