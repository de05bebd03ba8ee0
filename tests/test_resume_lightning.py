"""The loader in other loops, resumed at the exact batch: Lightning's Trainer, in one process and two, and Fabric."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from synthetic_shards import write_articles, write_colours
from test_loader import make_samples
from test_resume import facts, weave

from biomedclip.stream.loader import StreamLoader

STEPS = 7

pytestmark = pytest.mark.filterwarnings(
    # Lightning 2.6 compares with a class that torch 2.15 renames.
    "ignore:.*isinstance.treespec, LeafSpec.",
    # Our tests run on two cores; the advice is about speed.
    "ignore:The 'train_dataloader' does not have many workers",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    return write_colours(root / "colours"), write_articles(root / "articles")


class Seen(LightningModule):
    """One weight, trained on mean brightness; keeps what every step saw."""

    def __init__(self, *, checkpoint=None, save_at=0, stop_at=None, say=lambda step, rows: None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.checkpoint, self.save_at, self.stop_at, self.say = checkpoint, save_at, stop_at, say
        self.steps = {}

    def training_step(self, batch, index):
        self.steps[self.trainer.global_step] = facts(batch)
        self.say(self.trainer.global_step, facts(batch))
        return (self.weight * batch["image"].float().mean() / 255 - 1).square().mean()

    def on_train_batch_end(self, outputs, batch, index):
        if self.save_at and self.trainer.global_step == self.save_at:
            self.trainer.save_checkpoint(self.checkpoint)
        if self.trainer.global_step == self.stop_at:
            raise KeyboardInterrupt

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(root, **options):
    settings = dict(accelerator="cpu", devices=1, max_steps=STEPS, logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
                    default_root_dir=root, num_sanity_val_steps=0)  # fmt: skip
    return Trainer(**settings | options)


@pytest.mark.parametrize("workers", [0, 2])
def test_lightnings_trainer_resumes_at_the_exact_batch(tmp_path, folders, workers):
    whole = Seen()
    make_trainer(tmp_path).fit(whole, StreamLoader(make_samples(folders), max_steps=STEPS))
    assert list(whole.steps) == list(range(STEPS))
    stopped = Seen(checkpoint=tmp_path / "3.ckpt", save_at=3, stop_at=5)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer(tmp_path).fit(stopped, StreamLoader(make_samples(folders), max_steps=STEPS, workers=workers))
    rest = Seen()
    loader = StreamLoader(make_samples(folders), max_steps=STEPS, workers=workers)
    make_trainer(tmp_path).fit(rest, loader, ckpt_path=tmp_path / "3.ckpt", weights_only=True)
    assert list(rest.steps) == list(range(3, STEPS))
    assert {**{n: stopped.steps[n] for n in range(3)}, **rest.steps} == whole.steps
    assert torch.equal(rest.weight, whole.weight)


def test_fabric_saves_and_loads_the_loader_with_the_rest(tmp_path, folders):
    whole = [facts(batch) for batch in StreamLoader(make_samples(folders), max_steps=STEPS)]
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    samples = make_samples(folders, rank=fabric.global_rank, world_size=fabric.world_size)
    loader, seen = StreamLoader(samples, max_steps=STEPS, workers=1), []
    for batch in loader:
        seen.append(facts(fabric.to_device(batch)))
        if len(seen) == 3:
            fabric.save(tmp_path / "3.ckpt", {"loader": loader})
            break
    again = StreamLoader(make_samples(folders), max_steps=STEPS)
    fabric.load(tmp_path / "3.ckpt", {"loader": again})
    seen += [facts(fabric.to_device(batch)) for batch in again]
    assert seen == whole


def test_training_never_asks_lightning_how_many_steps_there_are(tmp_path, folders, monkeypatch):
    """The question makes Lightning 2.6 build the loader before its state is loaded, and start at the first sample."""
    from tiny_model import write_tiny_model

    from biomedclip.config import check_config
    from biomedclip.training.config import TrainConfig
    from biomedclip.training.train import train

    def asked(trainer):
        raise AssertionError("estimated_stepping_batches")

    monkeypatch.setattr(Trainer, "estimated_stepping_batches", property(asked))
    write_tiny_model(tmp_path / "model")
    values = {
        "model": {"name": str(tmp_path / "model")}, "max_steps": 2, "batch_size": 4, "threads": 1,
        "data": {"sources": [{"name": "colours", "path": str(folders[0])}]}, "schedule": {"warmup_steps": 1},
    }  # fmt: skip
    assert train(check_config(values, TrainConfig, "test"), tmp_path / "run").steps == 2


DISTRIBUTED = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import warnings
warnings.simplefilter("ignore")
from test_loader import make_samples
from test_resume_lightning import Seen, make_trainer
from biomedclip.stream.loader import StreamLoader

def main(root, devices, stop, checkpoint):
    root = Path(root)
    trainer = make_trainer(root, devices=devices, **(dict(strategy="ddp") if devices > 1 else {{}}))
    samples = make_samples((root / "colours", root / "articles"), rank=trainer.global_rank, world_size=devices)
    out = (root / f"seen-{{devices}}-{{stop}}-{{trainer.global_rank}}.jsonl").open("w")
    def say(step, rows):
        out.write(json.dumps([step, rows]) + "\\n")
        out.flush()
    module = Seen(checkpoint=root / "3.ckpt", save_at=3 if stop else 0, say=say)
    if stop:
        class Killed(type(module)):
            def on_train_batch_end(self, *arguments):
                super().on_train_batch_end(*arguments)
                if self.trainer.global_step == stop:
                    import os, signal
                    os.kill(os.getpid(), signal.SIGKILL)
        module.__class__ = Killed
    loader = StreamLoader(samples, max_steps=trainer.max_steps, workers=1)
    trainer.fit(module, loader, ckpt_path=checkpoint or None, weights_only=True)

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
"""


def read_seen(root, devices, stop):
    parts = []
    for rank in range(devices):
        lines = (root / f"seen-{devices}-{stop}-{rank}.jsonl").read_text().splitlines()
        parts.append([json.loads(line) for line in lines])
    assert all([step for step, _ in part] == [step for step, _ in parts[0]] for part in parts)
    return [step for step, _ in parts[0]], weave([[rows for _, rows in part] for part in parts])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_processes_killed_go_on_as_two_and_as_one_from_the_first_ones_state(tmp_path):
    folders = write_colours(tmp_path / "colours"), write_articles(tmp_path / "articles")
    script = tmp_path / "run.py"
    script.write_text(DISTRIBUTED.format(tests=str(Path(__file__).parent)))

    def run(devices, stop, checkpoint=""):
        command = [sys.executable, str(script), str(tmp_path), str(devices), str(stop), checkpoint]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)

    whole = json.loads(json.dumps([facts(b) for b in StreamLoader(make_samples(folders), max_steps=STEPS)]))
    assert run(2, 5).returncode != 0
    steps, before = read_seen(tmp_path, 2, 5)
    assert before == whole[: len(steps)]
    for devices in (2, 1):
        done = run(devices, 0, str(tmp_path / "3.ckpt"))
        assert done.returncode == 0, done.stderr[-2000:]
        assert read_seen(tmp_path, devices, 0) == (list(range(3, STEPS)), whole[3:])


def test_the_hash_of_a_sample_tells_pictures_apart(folders):
    batch = next(iter(StreamLoader(make_samples(folders), max_steps=1)))
    digests = {digest for _, digest, _, _ in facts(batch)}
    assert len(digests) == len(batch["key"])
    assert hashlib.sha256(b"").hexdigest() not in digests
