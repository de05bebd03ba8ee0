import subprocess

import pytest

from biomedclip import doctor
from biomedclip.doctor import Package, find_problems, list_packages, version_key


def test_every_extra_of_the_project_is_listed():
    packages = list_packages()
    assert {"core", "build", "train", "eval", "app", "ray", "dev"} <= {p.extra for p in packages}
    lightning = [p for p in packages if p.name == "lightning"]
    assert "train" in {p.extra for p in lightning}
    assert {(p.floor, p.installed is None) for p in lightning} == {(">=2.6.4", False)}


@pytest.mark.parametrize(
    ("version", "key"), [("2.15.0+cu132", (2, 15, 0)), ("1.0rc1", (1, 0)), ("3", (3,)), ("dev", ())]
)
def test_versions_compare_by_number(version, key):
    assert version_key(version) == key


def test_an_old_package_is_a_problem_with_its_pip_line():
    problems = find_problems([Package("train", "lightning", ">=2.6.4", "2.6.3")])
    assert problems == [
        "lightning: is too old (found 2.6.3, needs >=2.6.4); run: pip install --upgrade 'lightning>=2.6.4'"
    ]
    assert not Package("train", "lightning", ">=2.6.4", "2.10.0").is_old


def test_a_missing_core_package_is_a_problem_and_a_missing_extra_is_not():
    assert "pip install 'typer>=0.15'" in find_problems([Package("core", "typer", ">=0.15", None)])[0]
    assert find_problems([Package("app", "gradio", ">=5", None)]) == []


def test_a_torchvision_that_does_not_fit_torch_is_named(monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "RuntimeError: operator torchvision::nms does not exist")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: done)
    packages = [Package("train", "torch", "", "2.13.0+cpu"), Package("train", "torchvision", "", "0.28.0")]
    (problem,) = find_problems(packages)
    assert "torchvision::nms does not exist" in problem
    assert "pip install --force-reinstall torch torchvision" in problem
