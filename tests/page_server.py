"""The page for tests: small folders to show, and the command in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from test_report import class_scores, describe

from biomedclip.evaluation.results import write_result
from biomedclip.files import write_json


def write_results(root: Path, *models: str) -> Path:
    """A results folder of made-up scores on blood cells, one set a model, each model better than the one before."""
    for place, model in enumerate(models or ("before", "after")):
        scores = class_scores(0.3 * place)
        result = write_result(root, describe("bccd", model, scores) | {"suite": "microscopy"}, scores)
        # Results of one second are in the order of their names; these are as old as they stand here.
        write_json(result.path, {**result.record, "time": f"2026-11-{place + 1:02}T12:00:00+00:00"})
    return root


@contextmanager
def serving(*arguments: str, temporary: Path, seconds: float = 240) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, process) of `biomedclip app --port 0` with these arguments; its private folder lies in `temporary`.

    The process is interrupted as by Ctrl-C at the end, and what it said is in `process.said`.
    """
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    said = temporary / "said.txt"
    with said.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "biomedclip", "app", "--port", "0", *arguments], text=True, env=environment,
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield _wait_for_address(process, said, time.monotonic() + seconds), process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            process.kill()


def _wait_for_address(process: subprocess.Popen[str], said: Path, until: float) -> str:
    while time.monotonic() < until and process.poll() is None:
        if found := re.search(r"http://\S+", said.read_text()):
            return found.group()
        time.sleep(0.1)
    raise AssertionError(f"the page did not start: {said.read_text()}")
