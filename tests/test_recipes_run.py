"""Every recipe, shrunk to a tiny model on tiny shards: its dry run, and three steps of its own loss and methods."""

import hashlib
import json
import math

import numpy as np
import open_clip
import pytest
import torch
import yaml
from synthetic_shards import encode
from tiny_model import MODEL_CFG
from typer.testing import CliRunner

from biomedclip.cli import app
from biomedclip.config import config_file, load_config
from biomedclip.models.export import export_open_clip
from biomedclip.runs import read_metrics
from biomedclip.schema import Pair
from biomedclip.shards import DatasetWriter
from biomedclip.training.config import TrainConfig
from biomedclip.training.train import train

pytestmark = pytest.mark.slow  # a second or two each
NAMES = (
    "biomedclip", "bmca-full", "bmca-cf", "bmca-cb", "unimed-b16", "pubmedclip", "longclip", "modx", "vr-lwf", "zscl",
    "replay", "smoke", "demo",
)  # fmt: skip
LONG = "Axial CT shows a mass in the left lobe. " + "The arrow marks a vessel beside it, number {}. " * 9


def write_figures(folder, count=12):
    """Figures of four articles with long captions, labels, concepts and what the recipes' caption mixes ask for."""
    with DatasetWriter(folder, name=folder.name) as writer:
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (48, 48, 3), dtype=np.uint8)
            data = encode(pixels, "JPEG")
            writer.add(
                Pair(
                    key=f"{folder.name}-{number}", image=data, image_format="jpg", width=48, height=48, licence="CC BY",
                    caption=LONG.format(*range(number, number + 9)), source=folder.name, phash=0,
                    sha256=hashlib.sha256(data).hexdigest(), article_id=f"PMC{number % 4}.1", figure_id=str(number),
                    concepts=("Clinical Imaging",) if number % 3 else ("Plots and Charts",), label_ids=(number % 2,),
                    labels=(("benign", "malignant")[number % 2],), modality="CT",
                    sidecar={"mentions": [{"text": "as figure one shows"}]},
                )
            )  # fmt: skip
        writer.finish(provenance={}, card=lambda manifest: "made-up figures")
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model of CLIP's text length with a few thousand weights, and shards."""
    root = tmp_path_factory.mktemp("recipes")
    write_figures(root / "figures")
    torch.manual_seed(0)
    config = {**MODEL_CFG, "text_cfg": {**MODEL_CFG["text_cfg"], "context_length": 77}}
    model = open_clip.CLIP(**config)
    model.visual.preprocess_cfg = {
        "size": (32, 32), "mode": "RGB", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0,
    }  # fmt: skip
    export_open_clip(model, root / "model", model_cfg=config)
    return root


def shrink(name, places):
    """What `--set` changes of a recipe: model, places, sizes and steps, none of what it does."""
    values = yaml.safe_load(config_file(f"train/{name}.yaml").read_text())
    changes = {
        "model.name": places / "model", "model.init": "pretrained", "max_steps": 3, "batch_size": 8, "threads": 1,
        "schedule.warmup_steps": 1, "data.workers": 0, "log_every_steps": 1, "device": "cpu",
        "checkpoints.every_steps": 2, "checkpoints.every_minutes": 0,
    }  # fmt: skip
    if values.get("micro_batch_size"):
        changes["micro_batch_size"] = 4
    for number, _ in enumerate(values["data"]["sources"]):
        changes[f"data.sources.{number}.path"] = places / "figures"
    methods = values.get("continual", {})
    if "zscl" in methods:
        changes |= {"continual.zscl.path": places / "figures", "continual.zscl.batch_size": 4}
    if "short_captions" in values.get("loss", {}):
        changes["loss.short_captions.components"] = 3
    if "ensemble" in methods:
        changes["continual.ensemble.every_steps"] = 1
    return [f"{key}={value}" for key, value in changes.items()]


@pytest.mark.parametrize("name", NAMES)
def test_the_dry_run_of_a_recipe_counts_its_steps(name, places):
    command = ["train", str(config_file(f"train/{name}.yaml")), "--dry-run", "--json", "--samples-s", "10"]
    for change in shrink(name, places):
        command += ["--set", change]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["steps"], found["batch_size"], found["shown"]) == (3, 8, 24)
    assert sum(source["shown"] for source in found["sources"]) == 24


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains(name, places, tmp_path):
    config = load_config(config_file(f"train/{name}.yaml"), TrainConfig, shrink(name, places))
    found = train(config, tmp_path / "run")
    rows = read_metrics(found.folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    methods = config.continual.model_dump(exclude_none=True) if config.continual else {}
    for method in {"modx", "vr_lwf", "zscl", "l2_sp"} & methods.keys():
        assert any(row[f"loss/{method}"] > 0 for row in rows), method
    for copy in {"ema", "ensemble"} & methods.keys():
        assert (found.folder / copy / "open_clip_model.safetensors").exists()
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{found.final}")
    assert model.context_length == (config.model.context_length or 77)
