"""Results on disk: one JSON per model and task, written once and never overwritten by another.

`write_result` puts a record under `results/<model>/<task>.json`; a second run that measures the same leaves it as it
is, and one that measures something else is put beside it, named by its hash, so that no published number can vanish
because somebody ran a command twice. `read_results` gives the records back in the order they were written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from biomedclip.errors import DataError
from biomedclip.evaluation.scores import Scores, write_scores
from biomedclip.files import sha256_json, write_json

SCHEMA = 1
_VOLATILE = ("time", "scores_file")


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One model on one task: the JSON record and where it and its scores lie."""

    record: Mapping[str, Any]
    path: Path
    scores_path: Path

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.record["task"])

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.record["model"]["name"])

    @property
    def metrics(self) -> Mapping[str, Mapping[str, Any]]:
        """{metric: value, ci_low, ci_high, ci_method, n, …}."""
        return self.record["metrics"]  # type: ignore[no-any-return]


def write_result(out: str | Path, record: Mapping[str, Any], scores: Scores) -> TaskResult:
    """Write `results/<model>/<task>.json` and `scores/<model>/<task>.npz` under `out`; returns the result.

    The record gets `schema`, `run_id` (hash of everything but time) and `time`.
    """
    out = Path(out)
    body = {"schema": SCHEMA, **{key: value for key, value in record.items() if key not in _VOLATILE}}
    run_id = sha256_json(body)[:16]
    model = slug(str(record["model"]["name"]))
    stem = str(record["task"])
    for name in (stem, f"{stem}-{run_id}"):
        path = out / "results" / model / f"{name}.json"
        scores_path = out / "scores" / model / f"{name}.npz"
        if not path.exists():
            break
        if read_result(path).record["run_id"] == run_id and scores_path.exists():
            return read_result(path)
    body |= {
        "run_id": run_id,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "scores_file": scores_path.relative_to(out).as_posix(),
    }
    write_scores(scores_path, scores)
    write_json(path, body)
    return TaskResult(body, path, scores_path)


def read_result(path: str | Path) -> TaskResult:
    """One result file. Raises DataError where it is not one of schema 1."""
    path = Path(path)
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(path, "is no result file", found=str(error)[:80]) from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise DataError(path, f"is not a result of schema {SCHEMA}", todo="evaluate the task again")
    return TaskResult(record, path, path.parents[2] / record["scores_file"])


def read_results(out: str | Path) -> list[TaskResult]:
    """All results under `out`, oldest first, by model and task where written in the same second."""
    results = [read_result(path) for path in sorted(Path(out).glob("results/*/*.json"))]
    return sorted(results, key=lambda result: str(result.record["time"]))


def write_skipped(out: str | Path, skipped: Mapping[str, str]) -> None:
    """Keep which tasks were not run and why, for the report's appendix; a task that has a result is not among them."""
    path = Path(out) / "skipped.json"
    known = read_skipped(out) | dict(skipped)
    done = {result.task for result in read_results(out)}
    write_json(path, {task: reason for task, reason in sorted(known.items()) if task not in done})


def read_skipped(out: str | Path) -> dict[str, str]:
    """{task: why it was skipped}; empty where nothing was."""
    try:
        return {str(k): str(v) for k, v in json.loads((Path(out) / "skipped.json").read_bytes()).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def slug(name: str) -> str:
    """A model name as a file name: `hf-hub:org/model` becomes `hf-hub-org-model`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
