"""What a run, or a chain of runs, took away from what was known before: retention, backward transfer, the matrix.

Reads values of probes by phase and yields the numbers of continual learning. A phase is one run; R[t, i] is the value,
after phase t, on what phase i taught. Pure functions of numbers, so every report computes them alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biomedclip.errors import DataError
from biomedclip.files import split_lines

VALIDATION_FILE = "validation.jsonl"


def backward_transfer(matrix: ArrayLike) -> float:
    """BWT = mean over i < T of (R[T, i] - R[i, i]); below zero is forgetting. NaN for a single phase.

    Lopez-Paz and Ranzato 2017 (arXiv 1706.08840, section 2). `matrix` is (T, T): row after phase, column taught by.
    """
    values = _square(matrix)
    if len(values) < 2:
        return math.nan
    return float(np.mean(values[-1, :-1] - np.diagonal(values)[:-1]))


def average_value(matrix: ArrayLike) -> float:
    """ACC = mean over i of R[T, i], what is known at the end. Lopez-Paz and Ranzato 2017, section 2."""
    return float(np.mean(_square(matrix)[-1]))


def forgetting_measure(matrix: ArrayLike) -> float:
    """Mean over i < T of (max over t < T of R[t, i]) - R[T, i]. Chaudhry et al. 2018 (arXiv 1801.10112, equation 3)."""
    values = _square(matrix)
    if len(values) < 2:
        return math.nan
    best = [np.max(values[i:-1, i]) for i in range(len(values) - 1)]
    return float(np.mean(np.asarray(best) - values[-1, :-1]))


def retention(now: Mapping[str, float], start: Mapping[str, float]) -> dict[str, float]:
    """Value divided by the value at step 0, by probe; NaN where the start was 0."""
    return {name: now[name] / start[name] if start[name] else math.nan for name in now if name in start}


def forgetting_matrix(runs: Sequence[str | Path]) -> tuple[list[str], NDArray[np.float64]]:
    """(names of the runs, (T, T) matrix) of a chain of runs, in the order in which they were trained.

    What run i taught is what its validation calls `gain` probes; R[t, i] is their mean in the last validation of run
    t. Raises DataError where a run was not validated, or a later run does not probe what an earlier one taught.
    """
    folders = [Path(run) for run in runs]
    last = [_last_row(folder) for folder in folders]
    taught = [[name for name, role in row["roles"].items() if role == "gain"] for row in last]
    matrix = np.full((len(folders), len(folders)), np.nan)
    for t, row in enumerate(last):
        for i, names in enumerate(taught):
            if not names:
                raise DataError(folders[i], "has no probe of role gain", todo="add one to validation.probes")
            known = [row["values"][name] for name in names if name in row["values"]]
            if i <= t and len(known) < len(names):
                missing = next(name for name in names if name not in row["values"])
                raise DataError(folders[t], f"does not probe '{missing}', which {folders[i].name} taught",
                                todo="add it to validation.probes with role: retention")  # fmt: skip
            if len(known) == len(names):
                matrix[t, i] = np.mean(known)
    return [folder.name for folder in folders], matrix


def matrix_table(names: Sequence[str], matrix: NDArray[np.float64]) -> str:
    """The matrix as aligned plain text: a row after each run, a column for what each run taught."""
    width = max(12, *(len(name) for name in names))
    lines = ["after".ljust(width) + "".join(name.rjust(width + 2) for name in names)]
    for name, row in zip(names, matrix, strict=True):
        cells = ("" if math.isnan(value) else f"{value:.3f}" for value in row.tolist())
        lines.append(name.ljust(width) + "".join(cell.rjust(width + 2) for cell in cells))
    return "\n".join(lines)


def read_validation(folder: str | Path) -> list[dict[str, Any]]:
    """Rows of a run's validation.jsonl, oldest first; none where there is no file."""
    path = Path(folder) / VALIDATION_FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in split_lines(path.read_text(encoding="utf-8"))]


def _last_row(folder: Path) -> dict[str, Any]:
    rows = read_validation(folder)
    if not rows:
        raise DataError(folder, "holds no validation", todo="train with validation.probes")
    return rows[-1]


def _square(matrix: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(f"the matrix must be square, not of shape {values.shape}")
    return values
