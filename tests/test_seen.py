"""Which step saw what, after the run: against the batches themselves, over substitutes, purges and changed plans."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from synthetic_shards import write_articles, write_colours
from tiny_model import write_tiny_model
from typer.testing import CliRunner

from biomedclip import cli
from biomedclip.config import check_config
from biomedclip.errors import BiomedclipError, ConfigError, DataError
from biomedclip.shards import DatasetFolder
from biomedclip.training.checkpoints import list_checkpoints
from biomedclip.training.config import TrainConfig
from biomedclip.training.plans import PLANS, read_plans
from biomedclip.training.seen import seen_at, seen_of, steps_done
from biomedclip.training.train import train
from data_builders.purge import purge, read_withdrawals


def damage(folder: Path, keys: set[str]) -> None:
    for row in DatasetFolder(folder).index.to_pylist():
        if row["key"] in keys:
            with (folder / row["shard"]).open("r+b") as file:
                file.seek(row["image_offset"])
                file.write(b"\0" * row["image_size"])


def config(root: Path, **changes) -> TrainConfig:
    values = {
        "model": {"name": str(root / "model")},
        "data": {
            "sources": [
                {"name": "colours", "path": str(root / "colours")},
                {"name": "articles", "path": str(root / "articles")},
            ],
            "max_bad": 0.5,
        },
        "max_steps": 8, "batch_size": 8, "optim": {"lr": 1e-4}, "log_every_steps": 1,
        "checkpoints": {"every_steps": 2, "keep_last": 9}, "threads": 1,
    }  # fmt: skip
    return check_config(values | changes, TrainConfig, "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_colours(root / "colours")
    write_articles(root / "articles")
    write_tiny_model(root / "model")
    damage(root / "articles", {"pmc1-2", "pmc4-0"})
    return root


@pytest.fixture(scope="module")
def run(root, tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """A finished run, and the keys that each of its steps gave to the model."""
    from biomedclip.stream.loader import StreamLoader

    keys, deliver = [], StreamLoader.__iter__

    def listen(self):
        for batch in deliver(self):
            keys.append(batch["key"])
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamLoader, "__iter__", listen)
        folder = train(config(root), tmp_path_factory.mktemp("runs") / "a").folder
    return folder, keys[:8]


def test_a_step_saw_what_the_loader_delivered_substitutes_included(run):
    folder, keys = run
    assert steps_done(folder) == 8
    found = [seen_at(folder, step) for step in range(8)]
    assert [[one.key for one in step] for step in found] == keys
    replaced = [one for step in found for one in step if one.instead_of]
    assert {one.instead_of for one in replaced} == {"pmc1-2", "pmc4-0"}
    assert all(one.reason and one.source == "articles" for one in replaced)
    with pytest.raises(ConfigError, match="did not do step 8"):
        seen_at(folder, 8)


def test_the_steps_of_an_article_are_those_whose_batches_held_it(run):
    folder, keys = run
    for article in ("PMC0", "PMC1.1", "PMC4"):
        prefix = article.lower().partition(".")[0]
        wanted = [(step, slot, key) for step, batch in enumerate(keys) for slot, key in enumerate(batch)
                  if key.startswith(f"{prefix}-")]  # fmt: skip
        found = seen_of(folder, article=article)
        assert [(one.step, one.slot, one.key) for one in found] == wanted
        assert all(one.article == f"{article.partition('.')[0]}.1" for one in found)
    assert seen_of(folder, key="pmc1-2") == []
    assert [one.step for one in seen_of(folder, key=keys[5][3])] == [
        s for s, batch in enumerate(keys) if keys[5][3] in batch
    ]
    with pytest.raises(DataError, match="no such sample"):
        seen_of(folder, article="PMC77")


def test_the_command_lists_steps_samples_and_json(run):
    folder, keys = run
    runner = CliRunner()
    table = runner.invoke(cli.app, ["runs", "seen", str(folder), "--step", "2"])
    assert table.exit_code == 0
    assert all(key in table.stdout for key in keys[2])
    lines = runner.invoke(cli.app, ["runs", "seen", str(folder), "--article", "PMC0", "--json"]).stdout.splitlines()
    assert {json.loads(line)["article"] for line in lines} == {"PMC0.1"}
    for wrong in (["--step", "1", "--key", "x"], []):
        done = runner.invoke(cli.app, ["runs", "seen", str(folder), *wrong])
        assert isinstance(done.exception, BiomedclipError)


def copy_of(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "data"))


def interrupted(settings: TrainConfig, folder: Path, step: int) -> Path:
    """A run as a kill after its checkpoint of a step leaves it."""
    train(settings, folder)
    for checkpoint in list_checkpoints(folder):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    (folder / "done.json").unlink()
    return folder


def test_a_changed_plan_is_refused_and_with_permission_takes_over_at_its_step(root, tmp_path):
    data = copy_of(root, tmp_path)
    folder = interrupted(config(data), tmp_path / "run", 4)
    before = [seen_at(folder, step) for step in range(4)]
    changed = config(data, seed=5)
    with pytest.raises(ConfigError, match=r"seed differ.*--allow-plan-change"):
        train(changed, folder, resume=True)
    with pytest.raises(ConfigError, match="optim differ"):
        train(config(data, optim={"lr": 1e-5}), folder, resume=True, allow_plan_change=True)
    purge(data / "articles", read_withdrawals("PMC3", reason="retracted"))
    with pytest.raises(ConfigError, match="4 samples of articles taken back"):
        train(config(data), folder, resume=True)
    train(changed, folder, resume=True, allow_plan_change=True)
    plans = read_plans(folder)
    assert [plan.first_step for plan in plans] == [0, 4]
    assert plans[1].withdrawn == {"articles": [f"pmc3-{n}" for n in range(4)]}
    # What was taken back since is still found where it was seen, and nowhere later.
    assert [seen_at(folder, step) for step in range(4)] == before
    later = [one for step in range(4, 8) for one in seen_at(folder, step)]
    assert {one.epoch for one in seen_at(folder, 4)} == {0}
    assert not [one for one in later if one.article == "PMC3.1"]
    steps = [one.step for one in seen_of(folder, article="PMC3")]
    assert steps == [one.step for step in before for one in step if one.article == "PMC3.1"] != []
    assert train(changed, folder, resume=True).steps == 8


def test_a_run_with_a_changed_plan_is_resumed_by_the_plan_it_has_now(root, tmp_path):
    data = copy_of(root, tmp_path)
    folder = interrupted(config(data), tmp_path / "run", 2)
    changed = config(data, seed=5)
    whole = train(changed, folder, resume=True, allow_plan_change=True)
    seen = [seen_at(folder, step) for step in range(8)]
    for checkpoint in list_checkpoints(folder):
        if checkpoint.name > "step-00000006":
            shutil.rmtree(checkpoint)
    (folder / "done.json").unlink()
    again = train(changed, folder, resume=True)
    assert again.loss == pytest.approx(whole.loss, abs=0)
    assert [seen_at(folder, step) for step in range(8)] == seen
    assert len(read_plans(folder)) == 2


def test_runs_without_a_plan_or_with_other_data_say_so(run, root, tmp_path):
    folder = Path(shutil.copytree(run[0], tmp_path / "run"))
    text = (folder / PLANS).read_text()
    (folder / PLANS).write_text(text.replace('"batch_size": 8', '"batch_size": 4'))
    with pytest.raises(DataError, match="other samples than when it was trained"):
        seen_at(folder, 0)
    (folder / PLANS).write_text(text[:40])
    with pytest.raises(ConfigError, match="is damaged"):
        seen_at(folder, 0)
    (folder / PLANS).unlink()
    with pytest.raises(ConfigError, match="keeps no plan"):
        seen_of(folder, article="PMC1")
    with pytest.raises(ConfigError, match="no training run"):
        seen_at(tmp_path, 0)
