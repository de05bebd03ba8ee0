"""kill -9 at any moment, again and again: what a rerun ends in has the bytes of an undisturbed run."""

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
from data_builders.pmc.plan import plan_source
from data_builders.pmc.plan_rules import PlanConfig
from data_builders.units import find_damage, read_units

KILLS = 50
SEED = 20261124
SAMPLE = Path(str(resources.files("data_builders"))) / "sample" / "pmc"


def steps(plan: Path, folder: Path) -> list[list[str]]:
    """The commands from a plan to its end, with units so small that several commit between two kills."""
    raw = str(folder / "raw")
    return [["harvest", str(plan), "--source", "sample://pmc", "--out", raw, "--workers", "2"]]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "biomedclip", "data", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def run_undisturbed(plan: Path, folder: Path) -> float:
    """Seconds of all steps."""
    begun = time.monotonic()
    for arguments in steps(plan, folder):
        assert start(arguments).wait() == 0, arguments
    return time.monotonic() - begun


def run_killed(plan: Path, folder: Path, dice: random.Random, longest_s: float, budget: int) -> int:
    """Run all steps to their end, killing whole process groups at random moments; returns how often."""
    kills = 0
    for arguments in steps(plan, folder):
        while True:
            process = start(arguments)
            try:
                code = process.wait(dice.uniform(0.05, longest_s) if kills < budget else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
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
        if path.is_file() and not path.name.startswith(".lock")
    }


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_fifty_kills_end_in_the_bytes_of_an_undisturbed_run(tmp_path):
    plan = tmp_path / "plan.parquet"
    plan_source(str(SAMPLE), plan, PlanConfig(licence="commercial", unit_size=1))
    whole = run_undisturbed(plan, tmp_path / "whole")
    expected, dice, kills, rounds = sums(tmp_path / "whole"), random.Random(SEED), 0, 0
    while kills < KILLS:
        folder = tmp_path / f"round{rounds}"
        kills += run_killed(plan, folder, dice, 0.9 * whole / len(steps(plan, folder)), KILLS - kills)
        assert sums(folder) == expected, f"round {rounds}, after {kills} kills"
        rounds += 1
    assert not list(tmp_path.rglob(".tmp-*"))
    assert rounds > 1, "kills met both the beginning and the end"
