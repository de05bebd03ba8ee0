"""The recipes: every file loads, says where its numbers come from, and the smallest one runs."""

import re

import pytest
import torch
from safetensors.torch import load_file
from synthetic_shards import write_colours

from biomedclip.config import config_file, load_config
from biomedclip.training.config import TrainConfig

NAMES = (
    "biomedclip", "bmca-full", "bmca-cf", "bmca-cb", "unimed-b16", "pubmedclip", "longclip", "modx", "vr-lwf", "zscl",
    "replay", "smoke", "demo", "mini", "mini_wide", "mini_research",
)  # fmt: skip
OURS = ("demo", "smoke", "mini", "mini_wide", "mini_research")
"""Follow no paper."""
PATHS = {name: config_file(f"train/{name}.yaml") for name in NAMES}


def test_these_are_all_recipes():
    found = {path.stem for path in PATHS["demo"].parent.glob("*.yaml")}
    assert {name for name in found if not name.startswith("medvqa_") and name != "mini_text"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_and_its_command_names_it(name):
    config = load_config(PATHS[name], TrainConfig)
    assert config.max_steps > 0
    text = PATHS[name].read_text()
    assert f"configs/train/{name}.yaml" in text
    assert re.search(r"^# hardware:", text, re.M)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OURS])
def test_a_recipe_says_where_each_number_comes_from(name):
    text = PATHS[name].read_text()
    assert "arXiv" in text
    for key in ("batch_size", "max_steps", "optim", "schedule"):
        start = re.search(rf"^{key}:", text, re.M).start()
        line = text[start:].splitlines()[0]
        before = text[:start].splitlines()[-1]
        words = r"paper|code|scripts|model card|ours|ZSCL|TiC-CLIP"
        assert re.search(words, line.partition("#")[2] + before), f"{name}: {line}"


def test_numbers_that_follow_from_a_papers_epochs_are_what_they_say():
    steps = {name: load_config(PATHS[name], TrainConfig) for name in ("bmca-full", "bmca-cf", "bmca-cb", "longclip")}
    assert steps["bmca-full"].max_steps == round(9 * 24_076_288 / 8192)
    assert steps["bmca-cf"].max_steps == round(36 * 6_000_000 / 8192)
    assert steps["bmca-cb"].max_steps == round(27 * 8_000_000 / 8192)
    assert abs(steps["longclip"].max_steps - 6 * 1_000_000 / 2048) < 1
    assert load_config(PATHS["unimed-b16"], TrainConfig).max_steps == round(10 * 5_280_000 / 8192)


@pytest.mark.slow  # open_clip and its list of models
def test_recipes_name_models_that_exist():
    from biomedclip.models.load import find_origin
    from biomedclip.models.zoo import find_model

    for name in NAMES:
        model = load_config(PATHS[name], TrainConfig).model
        if find_model(model.name) is None and not model.name.startswith("runs/"):
            find_origin(model.name, random_init=model.init == "random")


@pytest.mark.slow
def test_the_smoke_recipe_runs_and_batch_norm_stays_where_it_is_frozen(tmp_path):
    from biomedclip.training.train import train

    write_colours(tmp_path / "colours")
    config = load_config(PATHS["smoke"], TrainConfig, [f"data.sources.0.path={tmp_path / 'colours'}"])
    run = train(config, tmp_path / "run")
    continual = config.continual.model_copy(update={"freeze_batch_norm": True})
    held = train(config.model_copy(update={"continual": continual}), tmp_path / "held")
    assert run.steps == 4
    found = {path.name for path in run.folder.iterdir()}
    for folder, frozen in ((run, False), (held, True)):
        start, end = (load_file(path / "open_clip_model.safetensors") for path in (folder.start, folder.final))
        statistics = [name for name in start if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
        assert len(statistics) > 30
        assert all(torch.equal(start[name], end[name]) for name in statistics) == frozen
        trained = "visual.trunk.bn1.weight"
        assert not torch.equal(start[trained], end[trained])
    assert {"start", "final", "ema", "ensemble", "checkpoints", "metrics.csv", "done.json"} <= found
