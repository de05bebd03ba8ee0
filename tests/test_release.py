"""What a release must keep true: one version, a current changelog, configs that load, a wheel with everything in it."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import biomedclip
from biomedclip.config import load_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(ROOT.glob("configs/*/*.yaml"))


def test_the_top_of_the_changelog_is_the_version():
    versions = re.findall(r"^## \[?([0-9][^\]\s]*)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert versions[0] == biomedclip.__version__


def config_model(path):
    from biomedclip.evaluation.config import EvaluateConfig
    from biomedclip.evaluation.vqa.config import VqaEvaluateConfig
    from biomedclip.train_commands import read_task
    from biomedclip.training.config import TrainConfig
    from biomedclip.training.text.config import TextTrainConfig
    from biomedclip.training.vqa.config import VqaTrainConfig
    from data_builders.build import BuildConfig

    return {
        ("build", ""): BuildConfig, ("train", ""): TrainConfig, ("evaluate", ""): EvaluateConfig,
        ("train", "text"): TextTrainConfig, ("train", "medvqa"): VqaTrainConfig,
        ("evaluate", "medvqa"): VqaEvaluateConfig,
    }[path.parent.name, read_task(path)]  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_config_loads_and_opens_with_its_four_lines(path):
    load_config(path, config_model(path))
    lines = path.read_text().splitlines()
    heads = [line.split(":")[0] for line in lines if line.startswith("# ") and ":" in line]
    assert {"# command", "# hardware", "# time", "# expected"} <= set(heads[:8])
    assert "XX" not in "".join(lines[:8])
    command = next(line for line in lines if line.startswith("# command"))
    assert f"configs/{path.parent.name}/{path.name}" in command


def test_there_are_configs_for_each_stage():
    assert {path.parent.name for path in CONFIGS} >= {"build", "train", "evaluate"}


def test_constraints_meet_the_floors_of_pyproject():
    from biomedclip.doctor import version_key

    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for requirement in needed:
        name, _, floor = requirement.partition(">=")
        if not name.startswith("biomedclip") and name not in ("gradio", "ray"):
            version = {k.lower().replace("_", "-"): v for k, v in pinned.items()}[name.lower().replace("_", "-")]
            assert version_key(version) >= version_key(floor or "0"), requirement


@pytest.mark.slow
def test_the_wheel_holds_both_packages_the_sample_and_the_configs(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in [*CONFIGS]:
        assert f"biomedclip/configs/{path.relative_to(ROOT / 'configs').as_posix()}" in names
    for package in ("biomedclip", "data_builders"):
        tracked = subprocess.run(
            ["git", "ls-files", package], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert set(tracked) <= names
    assert "biomedclip/models/mini/open_clip_model.safetensors" in names, "the bundled model is missing"
    assert wheel.stat().st_size < 45_000_000


def test_the_project_names_no_machine_path_and_no_workplace():
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.yaml", "*.toml", "Makefile", ".ci/run", "*.txt"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    allowed = {"tests/test_release.py"}
    for name in tracked:
        if name not in allowed and (ROOT / name).exists():
            text = (ROOT / name).read_text(errors="replace")
            assert not re.search(r"/work/|/tmp/seed|/root/|farm-bench", text), name
