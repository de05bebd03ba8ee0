"""kill -9 of harvest, select and pack, again and again: what a rerun ends in has the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest

from biomedclip.files import sha256_file
from data_builders.pmc.harvest_folder import LOCK
from data_builders.pmc.plan import plan_source
from data_builders.pmc.plan_rules import PlanConfig
from data_builders.units import find_damage, read_units

KILLS = 50
KILLS_A_STEP = 5
SEED = 20261124
SAMPLE = Path(str(resources.files("data_builders"))) / "sample" / "pmc"


def steps(plan: Path, folder: Path) -> list[list[str]]:
    """The commands from a plan to a dataset, with units and shards so small that several end between two kills."""
    raw, selection, shards = str(folder / "raw"), str(folder / "selection.parquet"), str(folder / "shards")
    return [
        ["harvest", str(plan), "--source", "sample://pmc", "--out", raw, "--workers", "2"],
        ["select", raw, "--out", selection],
        ["pack", selection, "--out", shards, "--workers", "2", "--set", "name=pmc", "--set", "shards.max_samples=8"],
    ]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "biomedclip", "data", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def run_undisturbed(plan: Path, folder: Path) -> list[float]:
    """Seconds of each step."""
    seconds = []
    for arguments in steps(plan, folder):
        begun = time.monotonic()
        assert start(arguments).wait() == 0, arguments
        seconds.append(time.monotonic() - begun)
    return seconds


def run_killed(plan: Path, folder: Path, dice: random.Random, seconds: list[float], budget: int) -> list[int]:
    """Run all steps to their end, killing whole process groups at random moments; returns how often, by step."""
    kills = []
    for arguments, longest_s in zip(steps(plan, folder), seconds, strict=True):
        kills.append(0)
        while True:
            process = start(arguments)
            try:
                may_kill = kills[-1] < KILLS_A_STEP and sum(kills) < budget
                code = process.wait(dice.uniform(0.05, longest_s) if may_kill else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills[-1] += 1
                check_what_is_committed(folder)
                continue
            assert code == 0, arguments
            break
    return kills


def check_what_is_committed(folder: Path) -> None:
    """A unit exists, whole, or it does not."""
    if list((folder / "raw").glob("*[0-9].json")):
        assert [problem for unit in read_units(folder / "raw") for problem in find_damage(unit, verify=True)] == []


def sums(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK
    }


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_fifty_kills_end_in_the_bytes_of_an_undisturbed_run(tmp_path):
    plan = tmp_path / "plan.parquet"
    plan_source(str(SAMPLE), plan, PlanConfig(licence="commercial", unit_size=1))
    seconds = run_undisturbed(plan, tmp_path / "whole")
    expected, dice, kills = sums(tmp_path / "whole"), random.Random(SEED), [0, 0, 0]
    for number in range(KILLS):
        folder = tmp_path / f"round{number}"
        met = run_killed(plan, folder, dice, seconds, KILLS - sum(kills))
        kills = [before + more for before, more in zip(kills, met, strict=True)]
        assert sums(folder) == expected, f"round {number}, after {kills} kills"
        if sum(kills) == KILLS:
            break
    assert sum(kills) == KILLS
    assert min(kills) > 0, "every step was killed"
    assert not list(tmp_path.rglob(".tmp-*"))
