"""Run folders: what is written, what is refused, what survives a kill."""

import json
import subprocess

import pytest
from pydantic import BaseModel

from biomedclip import runs
from biomedclip.config import read_yaml
from biomedclip.errors import ConfigError


class Settings(BaseModel):
    name: str = "µ-scale"
    lr: float = 1e-4
    steps: tuple[int, ...] = (1, 2)


def test_a_run_folder_records_config_versions_seed_and_ends_with_its_marker(tmp_path):
    folder = tmp_path / "run"
    run = runs.open_run(folder, kind="train", config=Settings(), seed=7)
    facts = runs.read_facts(folder)
    assert facts["kind"] == "train"
    assert facts["seed"] == 7
    assert facts["versions"]["python"].count(".") == 2
    assert "biomedclip" in facts["versions"]
    assert Settings.model_validate(read_yaml(folder / "config.yaml")) == Settings()
    assert not runs.is_done(folder)
    run.log("half way")
    run.finish({"loss": 0.5})
    done = json.loads((folder / "done.json").read_text())
    assert done["loss"] == 0.5
    assert done["kind"] == "train"
    assert done["seconds"] >= 0
    assert runs.is_done(folder)
    lines = (folder / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["started train", "half way", "done"]


def test_a_folder_that_holds_a_run_is_never_overwritten_unasked(tmp_path):
    runs.open_run(tmp_path, kind="train", config=Settings())
    with pytest.raises(ConfigError, match=r"unfinished run.*resume"):
        runs.open_run(tmp_path, kind="train", config=Settings())
    with pytest.raises(ConfigError, match="another kind"):
        runs.open_run(tmp_path, kind="evaluate", config=Settings(), resume=True)
    resumed = runs.open_run(tmp_path, kind="train", config=Settings(), resume=True)
    assert resumed.resumed
    resumed.finish({})
    with pytest.raises(ConfigError, match="a finished run"):
        runs.open_run(tmp_path, kind="train", config=Settings())


def test_resume_in_an_empty_folder_starts_a_run(tmp_path):
    assert not runs.open_run(tmp_path / "new", kind="train", config=Settings(), resume=True).resumed


def test_a_broken_run_file_says_so(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json: is not JSON"):
        runs.open_run(tmp_path, kind="train", config=Settings())


def test_metrics_are_read_back_as_numbers_and_cut_to_the_step_a_resume_continues_from(tmp_path):
    columns = ("step", "loss", "val/recall")
    file = runs.MetricsFile(tmp_path, columns)
    for step in (10, 20, 30):
        file.add({"step": step, "loss": 1 / step})
    file.add({"step": 30, "val/recall": 0.25})
    rows = runs.read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 30, 30]
    assert rows[1] == {"step": 20, "loss": pytest.approx(0.05), "val/recall": None}
    with (tmp_path / "metrics.csv").open("a") as half_written:
        half_written.write("40,0.0")
    assert len(runs.read_metrics(tmp_path)) == 4
    again = runs.MetricsFile(tmp_path, columns, after_step=20)
    again.add({"step": 30, "loss": 0.5})
    assert [(row["step"], row["loss"]) for row in runs.read_metrics(tmp_path)] == [
        (10, pytest.approx(0.1)),
        (20, pytest.approx(0.05)),
        (30, 0.5),
    ]


def test_a_folder_without_metrics_has_none(tmp_path):
    assert runs.read_metrics(tmp_path) == []


def test_the_commit_is_gits_own_answer_also_from_packed_refs_and_worktrees(tmp_path):
    def git(*words, cwd):
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false", *words]
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()

    clone = tmp_path / "clone"
    clone.mkdir()
    git("init", "-q", cwd=clone)
    assert runs.git_commit(clone) is None
    git("commit", "-q", "--allow-empty", "-m", "one", cwd=clone)
    head = git("rev-parse", "HEAD", cwd=clone)
    assert runs.git_commit(clone) == head
    git("worktree", "add", "-q", str(tmp_path / "tree"), cwd=clone)
    assert runs.git_commit(tmp_path / "tree") == head
    git("pack-refs", "--all", cwd=clone)
    assert runs.git_commit(clone) == head
    git("checkout", "-q", "--detach", cwd=clone)
    assert runs.git_commit(clone) == head
    assert runs.git_commit(tmp_path) is None
