"""Engines: task order, dead workers, errors and interrupts, on local processes and on a Ray cluster of two nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from biomedclip.errors import ConfigError, DataError, MissingExtra
from data_builders.engines import run_tasks


def square(number: int) -> int:
    time.sleep(0.02 * (3 - number % 4))  # later tasks end before earlier ones
    return number * number


def refuse_three(number: int) -> int:
    if number == 3:
        raise DataError("unit 3", "is refused", found="a three", todo="leave it out")
    return number


def kill_self(task: tuple[int, str]) -> int:
    number, folder = task
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    (Path(folder) / str(number)).touch()
    return number


def write_pid_and_sleep(task: tuple[int, str]) -> int:
    number, folder = task
    (Path(folder) / f"{number}.pid").write_text(str(os.getpid()))
    time.sleep(60)
    return number


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_the_tasks(workers):
    assert list(run_tasks(square, iter(range(9)), workers=workers)) == [n * n for n in range(9)]


def test_no_tasks_and_fewer_tasks_than_workers():
    assert list(run_tasks(square, [], workers=3)) == []
    assert list(run_tasks(square, [2], workers=3)) == [4]


def test_one_worker_is_this_very_process():
    assert list(run_tasks(lambda _: os.getpid(), [1], workers=1)) == [os.getpid()]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_task_keeps_its_kind_and_its_words(workers):
    with pytest.raises(DataError, match=r"^unit 3: is refused \(found a three\); leave it out$"):
        list(run_tasks(refuse_three, range(6), workers=workers))


def test_a_dead_worker_is_named_by_its_task_and_the_others_finish_theirs(tmp_path):
    tasks = [(number, str(tmp_path)) for number in range(8)]
    with pytest.raises(DataError, match=r"^unit 2: its worker process died; if memory ran out use fewer workers"):
        list(run_tasks(kill_self, tasks, workers=3, name=lambda task: f"unit {task[0]}"))
    done = sorted(int(path.name) for path in tmp_path.iterdir())
    assert {0, 1} <= set(done) <= {0, 1, 3, 4}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_an_interrupted_or_killed_caller(tmp_path, kind):
    script = (
        "import signal, sys; sys.path.insert(0, 'tests')\n"
        # A shell's background jobs ignore Ctrl-C, and so would all that they start.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from test_engines import write_pid_and_sleep\nfrom data_builders.engines import run_tasks\n"
        "if __name__ == '__main__':\n"
        f"    list(run_tasks(write_pid_and_sleep, [(n, {str(tmp_path)!r}) for n in range(4)], workers=2))\n"
    )
    path = tmp_path / "run.py"
    path.write_text(script)
    caller = subprocess.Popen(
        [sys.executable, str(path)], cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": "tests:."},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    pids = [int(pid.read_text() or 0) for pid in tmp_path.glob("*.pid")]
    assert len(pids) == 2
    caller.send_signal(kind)
    _, errors = caller.communicate(timeout=30)
    assert caller.returncode == (-kind if kind == signal.SIGKILL else -signal.SIGINT)
    if kind == signal.SIGINT:
        assert errors.rstrip().endswith("KeyboardInterrupt")
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))


def test_leaving_the_results_early_ends_the_workers(tmp_path):
    results = run_tasks(square, range(1000), workers=2)
    assert next(results) == 0
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 10


def test_bad_arguments_are_one_line(monkeypatch):
    with pytest.raises(ConfigError, match=r"^engine: is unknown \(found 'dask'\); use one of local, ray$"):
        run_tasks(square, [1], engine="dask")
    with pytest.raises(ConfigError, match="workers: must be at least 1"):
        run_tasks(square, [1], workers=0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'biomedclip\[ray\]'"):
        run_tasks(square, [1], engine="ray")
