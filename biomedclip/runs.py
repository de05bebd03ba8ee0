"""A run folder: what was run, with what, what came of it, and whether it is complete.

    config.yaml    the resolved config: `biomedclip train --config OUT/config.yaml` repeats the run
    run.json       kind, seed, versions, git commit, machine, when it started
    metrics.csv    one row a logged step
    log.txt        what happened, a line each with its time
    done.json      written last: its presence means the run is complete; holds the summary

Every kind of run (build, train, evaluate, demo) writes one through this module. `metrics.csv` and `log.txt` are the
only files that grow in place; a resumed run first cuts `metrics.csv` back to the step it continues from.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from biomedclip.errors import ConfigError
from biomedclip.files import remove_leftovers, write_json, write_text

PACKAGES = (
    "biomedclip", "torch", "torchvision", "open_clip_torch", "timm", "lightning", "transformers", "numpy", "pillow",
    "simplejpeg", "pyarrow", "safetensors", "scikit-learn", "monai",
)  # fmt: skip
"""Packages whose versions can change a result."""

CONFIG, FACTS, METRICS, LOG, DONE = "config.yaml", "run.json", "metrics.csv", "log.txt", "done.json"


@dataclass(slots=True)
class Run:
    """An open run folder."""

    folder: Path
    kind: str
    resumed: bool = False
    started: float = field(default_factory=time.monotonic)

    def log(self, line: str) -> None:
        """Append a line with the time to log.txt."""
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {line}\n")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write done.json: the summary and the seconds since the run was opened. The last act of a run."""
        self.log("done")
        write_json(self.folder / DONE, {"kind": self.kind, "seconds": self.seconds, **summary})

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since this process opened the run."""
        return round(time.monotonic() - self.started, 1)


def open_run(folder: str | Path, *, kind: str, config: BaseModel, seed: int | None = None, resume: bool = False) -> Run:
    """Start a run in `folder`, or continue one.

    Raises ConfigError where the folder holds another run and `resume` is not set, or where a run to be resumed is of
    another kind. A resumed run keeps its run.json and notes what differs in the log.
    """
    folder = Path(folder)
    facts = read_facts(folder)
    if facts and not resume:
        state = "a finished run" if is_done(folder) else "an unfinished run"
        raise ConfigError(folder, f"holds {state}", todo="resume it, choose another folder, or delete this one")
    if facts and facts["kind"] != kind:
        raise ConfigError(folder, f"holds a run of another kind than {kind}", found=facts["kind"])
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    run = Run(folder, kind, resumed=bool(facts))
    if facts:
        (folder / DONE).unlink(missing_ok=True)
        run.log(f"resumed with {', '.join(_changes(facts['versions'], versions())) or 'the same versions'}")
        return run
    write_text(folder / CONFIG, dump_config(config))
    write_json(
        folder / FACTS,
        {
            "kind": kind,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": seed,
            "command": sys.argv,
            "git_commit": git_commit(),
            "versions": versions(),
            "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        },
    )
    run.log(f"started {kind}")
    return run


def is_done(folder: str | Path) -> bool:
    """Whether the folder holds a complete run."""
    return (Path(folder) / DONE).exists()


def read_facts(folder: str | Path) -> dict[str, Any] | None:
    """The content of run.json; None where the folder holds no run. Raises ConfigError where it is not JSON."""
    path = Path(folder) / FACTS
    if not path.exists():
        return None
    try:
        facts: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(path, "is not JSON", found=str(error), todo="choose another run folder") from None
    return facts


def dump_config(config: BaseModel) -> str:
    """A config as YAML that reads back as the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit(start: str | Path | None = None) -> str | None:
    """Commit of the clone this package runs from, read from its .git; None for an installed package."""
    root = Path(start) if start else Path(__file__).resolve().parent.parent
    git = root / ".git"
    if git.is_file():
        # A worktree's .git is a file that names its folder; refs are in the folder that `commondir` names.
        git = (root / git.read_text().removeprefix("gitdir:").strip()).resolve()
    if not (git / "HEAD").is_file():
        return None
    common = git / "commondir"
    shared = (git / common.read_text().strip()).resolve() if common.is_file() else git
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
        return head
    ref = head.removeprefix("ref: ")
    for folder in (git, shared):
        if (folder / ref).is_file():
            return (folder / ref).read_text().strip()
    packed = shared / "packed-refs"
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {ref}")), None)


class MetricsFile:
    """metrics.csv of a run: a fixed set of columns, one row a logged step, `step` first.

    Rows beyond `after_step` are cut off when it is opened, because the run will write them again.
    """

    def __init__(self, folder: str | Path, columns: tuple[str, ...], *, after_step: int = 0) -> None:
        self.path, self.columns = Path(folder) / METRICS, columns
        kept = [row for row in read_metrics(folder) if int(row["step"] or 0) <= after_step]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore", restval="")
        writer.writeheader()
        for row in kept:
            cells: dict[str, Any] = {k: "" if v is None else v for k, v in row.items()}
            writer.writerow(cells | {"step": int(row["step"] or 0)})
        write_text(self.path, text.getvalue())

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; missing columns stay empty. The row is on disk when this returns."""
        cells = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(cells)


def read_metrics(folder: str | Path) -> list[dict[str, float | None]]:
    """Rows of a run's metrics.csv as numbers, empty cells as None; no rows where there is no file.

    A last line that a kill cut short is left out.
    """
    path = Path(folder) / METRICS
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [
        {name: float(cell) if cell else None for name, cell in row.items()}
        for row in csv.DictReader(io.StringIO(whole))
    ]


def _changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    return [f"{name} {old.get(name)} -> {new.get(name)}" for name in new if old.get(name) != new[name]]
