"""Runs with terms against forgetting: the teacher stays out of sight, resuming changes nothing, probes are asked."""

import csv
import json
import shutil

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import write_training_folders

from biomedclip.config import check_config
from biomedclip.errors import ConfigError, DataError
from biomedclip.training.config import TrainConfig
from biomedclip.training.forgetting import read_validation
from biomedclip.training.train import train
from data_builders.build import resolve_root

ALL_TERMS = {
    "modx": {}, "vr_lwf": {"num_texts": 8, "num_words": 4}, "ctp": {}, "lwf": {}, "features": {}, "similarity": {},
    "l2_sp": {"weight": 0.1}, "ewc": {"weight": 10, "batches": 2}, "ema": {"decay": 0.5},
    "ensemble": {"every_steps": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_training_folders(tmp_path_factory.mktemp("data"), "other")


def config(folders, **changes):
    values = {
        "model": {"name": str(folders / "model")},
        "data": {"sources": [{"name": "articles", "path": str(folders / "articles")}]},
        "max_steps": 4,
        "batch_size": 8,
        "optim": {"lr": 1e-3},
        "log_every_steps": 1,
        "checkpoints": {"every_steps": 2, "keep_last": 9},
        "threads": 1,
    }
    return check_config(values | changes, TrainConfig, "test")


def everything(folders, **changes):
    continual = ALL_TERMS | {"zscl": {"path": str(folders / "colours"), "batch_size": 4, "num_texts": 4}}
    return config(folders, continual=continual, **changes)


def weights(folder):
    return load_file(folder / "open_clip_model.safetensors")


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    return train(everything(folders), tmp_path_factory.mktemp("run") / "all")


TERMS = ("modx", "vr_lwf", "zscl", "ctp", "lwf", "features", "similarity", "l2_sp", "ewc")


def test_every_term_has_a_column_and_starts_where_its_formula_says(finished):
    rows = list(csv.DictReader((finished.folder / "metrics.csv").read_text().splitlines()))
    for name in TERMS:
        assert all(float(row[f"loss/{name}"]) > -1e-6 for row in rows), name  # a divergence, but for rounding
    # Before the first step student and teacher are one model, and no weight has moved.
    for name in ("modx", "ctp", "lwf", "features", "l2_sp", "ewc"):
        assert float(rows[0][f"loss/{name}"]) == pytest.approx(0, abs=1e-6), name
        assert float(rows[-1][f"loss/{name}"]) > 1e-12, name
    assert float(rows[0]["loss/zscl"]) > 0  # a cross entropy: the teacher's own entropy stays


def test_the_teacher_is_in_no_checkpoint_optimizer_or_average(finished, folders):
    student = open_clip.create_model_from_pretrained(f"local-dir:{folders / 'model'}")[0]
    names = set(student.state_dict())
    checkpoint = torch.load(finished.folder / "checkpoints" / "step-00000004" / "trainer.ckpt", weights_only=True)
    assert {name.removeprefix("model.") for name in checkpoint["state_dict"]} == names
    optimizer = checkpoint["optimizer_states"][0]
    assert sum(len(group["params"]) for group in optimizer["param_groups"]) == len(list(student.parameters()))
    averages = [state for key, state in checkpoint["callbacks"].items() if key.startswith("AverageWeights")]
    assert len(averages) == 2
    assert all(set(state["tensors"]) <= names for state in averages)
    size = sum(tensor.numel() for tensor in student.state_dict().values())
    held = sum(t.numel() for state in averages for t in state["tensors"].values())
    assert held <= 2 * size


def test_the_module_does_not_own_the_teacher(folders, tmp_path):
    from biomedclip.training.continual.teacher import FrozenTeacher
    from biomedclip.training.module import ContrastiveModule
    from biomedclip.training.terms import Continual

    student = open_clip.create_model_from_pretrained(f"local-dir:{folders / 'model'}")[0]
    teacher = FrozenTeacher.load(folders / "other", student)
    module = ContrastiveModule(student, config(folders), Continual(teacher=teacher))
    teacher.embed_images(torch.zeros(1, 3, 32, 32))  # loaded now, and still nobody's
    owned = {id(parameter) for parameter in module.parameters()} | {id(buffer) for buffer in module.buffers()}
    assert teacher._model is not None
    assert not owned & {id(tensor) for tensor in [*teacher._model.parameters(), *teacher._model.buffers()]}
    assert len(module.state_dict()) == len(student.state_dict())
    assert not any(parameter.requires_grad for parameter in teacher._model.parameters())


def test_averages_are_written_beside_the_end_and_load_in_open_clip(finished):
    end = weights(finished.final)
    for name in ("ema", "ensemble"):
        model, _ = open_clip.create_model_from_pretrained(f"local-dir:{finished.folder / name}")
        assert not equal(weights(finished.folder / name), end)
        assert model.logit_scale.exp() > 1
    # The ensemble is the plain mean of the start and of the weights after steps 2 and 4.
    states = [weights(finished.start)]
    states += [weights(finished.folder / "checkpoints" / f"step-0000000{step}") for step in (2, 4)]
    for name, tensor in weights(finished.folder / "ensemble").items():
        if tensor.is_floating_point():
            wanted = torch.stack([state[name].double() for state in states]).mean(0)
            torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-7)


def test_a_resumed_run_ends_with_the_same_weights_and_averages(finished, folders, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished.folder, copy)
    (copy / "done.json").unlink()
    for name in ("final", "ema", "ensemble", "checkpoints/step-00000004"):
        shutil.rmtree(copy / name)
    resumed = train(everything(folders), copy, resume=True)
    assert equal(weights(finished.final), weights(resumed.final))
    for name in ("ema", "ensemble"):
        assert equal(weights(finished.folder / name), weights(copy / name))


@pytest.mark.slow
def test_parts_of_a_batch_give_what_the_whole_batch_gives(finished, folders, tmp_path):
    """Under gradient caching a term sees the whole batch; only sums are rounded in another order."""
    parts = train(everything(folders, micro_batch_size=4), tmp_path / "parts")
    for name, tensor in weights(parts.final).items():
        torch.testing.assert_close(tensor, weights(finished.final)[name], rtol=1e-3, atol=2e-5)


def test_a_heavy_weight_penalty_keeps_the_weights(folders, tmp_path):
    changes = {"max_steps": 10, "schedule": {"name": "constant"}}
    free = train(config(folders, **changes), tmp_path / "free")
    held = train(config(folders, **changes, continual={"l2_sp": {"weight": 1e4}}), tmp_path / "held")
    start = weights(free.start)

    def moved(folder):
        return sum(float((tensor - start[name]).square().sum()) for name, tensor in weights(folder).items())

    assert moved(held.final) < moved(free.final) / 2


@pytest.mark.slow
def test_fisher_information_that_went_missing_stops_a_resumed_run(finished, folders, tmp_path):
    from biomedclip.errors import CheckpointError

    copy = tmp_path / "run"
    shutil.copytree(finished.folder, copy)
    (copy / "done.json").unlink()
    (copy / "fisher.safetensors").unlink()
    shutil.rmtree(copy / "checkpoints" / "step-00000004")
    with pytest.raises(CheckpointError, match="the weights it was estimated with have moved on"):
        train(everything(folders), copy, resume=True)


PROBES = {
    "every_steps": 2,
    "wise_alphas": [0.5],
    "probes": [
        {"task": "bccd", "data": str(resolve_root("sample://bccd")), "max_samples": 30, "role": "retention"},
        {"task": "bccd", "data": str(resolve_root("sample://bccd")), "max_samples": 12, "split": "val"},
    ],
}


def test_probes_are_asked_at_step_0_and_on_and_the_weights_never_notice(folders, tmp_path):
    plain = train(config(folders, continual={"ema": {"decay": 0.5}}), tmp_path / "plain")
    asked = train(config(folders, continual={"ema": {"decay": 0.5}}, validation=PROBES), tmp_path / "asked")
    assert equal(weights(plain.final), weights(asked.final))
    rows = read_validation(asked.folder)
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[0]["n"] == {"bccd": 28, "bccd/val": 10}
    assert rows[0]["roles"] == {"bccd": "retention", "bccd/val": "gain"}
    assert rows[0]["mean_retention"] == 1.0
    assert "wise" not in rows[0]
    last = rows[-1]
    assert last["retention"]["bccd"] == pytest.approx(last["values"]["bccd"] / rows[0]["values"]["bccd"])
    assert last["backward_transfer"] == pytest.approx(last["values"]["bccd"] - rows[0]["values"]["bccd"])
    assert [point["alpha"] for point in last["wise"]] == [0.5]
    assert set(last["ema"]) == {"bccd", "bccd/val"}


@pytest.mark.slow
def test_the_curve_has_the_values_of_the_weights_that_the_command_writes(folders, tmp_path):
    from biomedclip.evaluation.evaluate import Encoder
    from biomedclip.models.load import load
    from biomedclip.training.config import ProbeConfig
    from biomedclip.training.validation import open_probes
    from biomedclip.training.wise import interpolate_folders

    run = train(config(folders, optim={"lr": 1e-2}, validation=PROBES), tmp_path / "run")
    out = interpolate_folders(run.start, run.final, 0.5, tmp_path / "half")
    found = read_validation(run.folder)[-1]["wise"][0]["values"]
    for probe in open_probes([check_config(one, ProbeConfig, "test") for one in PROBES["probes"]]):
        assert probe.value(Encoder("", *load(out), "cpu")) == pytest.approx(found[probe.name])


def test_a_resumed_run_writes_each_validation_once(folders, tmp_path):
    run = train(config(folders, validation=PROBES), tmp_path / "run")
    rows = read_validation(run.folder)
    (run.folder / "done.json").unlink()
    shutil.rmtree(run.folder / "checkpoints" / "step-00000004")
    train(config(folders, validation=PROBES), run.folder, resume=True)
    again = read_validation(run.folder)
    assert [row["step"] for row in again] == [0, 2, 4]
    assert [row["values"] for row in again] == [row["values"] for row in rows]


@pytest.mark.parametrize("task", ["bccd", "pneumoniamnist"])
def test_a_probe_may_ask_another_split_than_the_tasks_own(task):
    from biomedclip.training.config import ProbeConfig
    from biomedclip.training.validation import open_probes

    settings = {"task": task, "data": str(resolve_root(f"sample://{task}")), "split": "val", "max_samples": 20}
    [probe] = open_probes([check_config(settings, ProbeConfig, "test")])
    assert probe.name == f"{task}/val"
    assert {row.split for row in probe.manifest.rows} == {"val"}
    assert 15 <= len(probe.manifest.rows) <= 20


def test_probes_are_checked_before_anything_is_trained(folders, tmp_path):
    def probe(**facts):
        return config(folders, validation={"probes": [facts]})

    with pytest.raises(ConfigError, match="there is no such file or folder"):
        train(probe(task="bccd", data=str(tmp_path / "nowhere")), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"task bcdd.*did you mean 'bccd'"):
        train(probe(task="bcdd", data=str(tmp_path)), tmp_path / "b")
    twice = [{"task": "bccd", "data": str(resolve_root("sample://bccd"))}] * 2
    with pytest.raises(ConfigError, match="bccd: is named twice"):
        train(config(folders, validation={"probes": twice}), tmp_path / "c")
    with pytest.raises(DataError):
        train(config(folders, continual={"zscl": {"path": str(tmp_path / "nowhere")}}), tmp_path / "d")


@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_a_spike_is_passed_over_and_counted(folders, tmp_path, monkeypatch, action):
    """A batch whose loss is a thousand times the others' leaves the weights as they were."""
    from biomedclip.training import module as training_module

    original = training_module.ContrastiveModule._loss

    def spiking(self, embedded, batch):
        loss = original(self, embedded, batch)
        if self.global_step == 5 and not getattr(self, "spiked", False):
            self.spiked = True
            loss = loss * 1000
            self.latest["loss"] = loss.detach()
        return loss

    monkeypatch.setattr(training_module.ContrastiveModule, "_loss", spiking)
    guard = {"action": action, "window": 6, "factor": 3, "snapshot_every_steps": 2}
    settings = config(folders, max_steps=8, guard=guard, checkpoints={"every_steps": 1, "keep_last": 20})
    run = train(settings, tmp_path / "run")
    assert f"is a spike, {action} (1)" in (run.folder / "log.txt").read_text()
    after = {step: weights(run.folder / "checkpoints" / f"step-{step:08d}") for step in range(2, 9)}
    # The sixth step brings the spike; the last snapshot is of the weights after the fourth.
    assert equal(after[6], after[5 if action == "skip" else 4])
    assert not equal(after[6], after[7])


@pytest.mark.slow
def test_too_many_spikes_in_a_row_end_the_run_with_the_remedy(folders, tmp_path, monkeypatch):
    from biomedclip.training.spikes import GuardSpikes

    monkeypatch.setattr(GuardSpikes, "is_spike", lambda self, loss: len(self.losses) >= 2)
    with pytest.raises(ConfigError, match=r"3 losses in a row are spikes.*lower optim.lr"):
        train(config(folders, max_steps=9, guard={"max_in_a_row": 2}), tmp_path / "run")


def test_a_longer_context_is_trained_and_exported(folders, tmp_path):
    from tiny_model import MODEL_CFG

    from biomedclip.models.export import export_open_clip

    cfg = json.loads(json.dumps(MODEL_CFG))
    cfg["text_cfg"]["context_length"] = 40
    torch.manual_seed(0)
    model = open_clip.CLIP(**cfg)
    model.visual.preprocess_cfg = open_clip.create_model_from_pretrained(f"local-dir:{folders / 'model'}")[
        0
    ].visual.preprocess_cfg
    start = export_open_clip(model, tmp_path / "model", model_cfg=cfg)
    settings = {"name": str(start), "context_length": 96}
    run = train(config(folders, model=settings, continual={"modx": {}, "vr_lwf": {"num_texts": 4}}), tmp_path / "run")
    trained, _ = open_clip.create_model_from_pretrained(f"local-dir:{run.final}")
    assert trained.positional_embedding.shape[0] == 96
    assert open_clip.get_tokenizer(f"local-dir:{run.final}")(["a"]).shape == (1, 96)
    assert not torch.equal(weights(run.final)["positional_embedding"], weights(run.start)["positional_embedding"])
