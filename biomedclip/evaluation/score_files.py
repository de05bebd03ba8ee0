"""Files of scores that somebody else made: a CSV or an npz, one row a sample, to the scores that are stored here.

Nothing is guessed from values except whether they are probabilities (all within 0 and 1, and of one class an image,
summing to 1), which `kind` overrides. What a file cannot say is listed with the reason: predictions have no AUROC, and
cosines without the model's logit scale no calibration.

CSV: `label` (a class label; several joined by `|`) or, for several, `true:LABEL` columns of 1, 0 and blank (not
stated); `prediction` (likewise), or one column for each class, named by its label, or for two classes `score` of the
second; optional `sample_id` and `group_id`. npz: `y` (N,) class numbers or `truth` (N, L), one of `cosines`,
`probabilities`, `logits` (N, C) and `predictions` (N,) or (N, L), optional `sample_ids`, `group_ids`, `logit_scale`,
`classes`; or a score file that an evaluation here wrote, of any kind of task.
"""

from __future__ import annotations

import csv
import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biomedclip.errors import DataError
from biomedclip.evaluation.answer_scores import LabelScores, OptionScores
from biomedclip.evaluation.scores import ClassScores, RankScores, Scores, read_scores
from biomedclip.evaluation.tasks import Task

Kind = Literal["cosines", "probabilities", "logits", "predictions"]
OF_DECISIONS = ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "mcc", "kappa", "quadratic_kappa",
                "mean_absolute_error", "within_one")  # fmt: skip
_OF_PROBABILITIES = ("ece", "ace", "brier", "nll")
_SMALLEST = 1e-37
"""Probabilities below are taken for this one: float32 holds its logarithm, and zeros stay tied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenScores:
    """Scores out of a file, what they were, and which metrics they cannot have."""

    scores: Scores
    kind: Kind
    undefined: Mapping[str, str] = field(default_factory=dict)
    """{metric: why}"""


def read_given(path: str | Path, task: Task, kind: Kind | None = None) -> GivenScores:
    """The scores of a CSV or npz file for a task. Raises DataError for a file that does not answer it."""
    path = Path(path)
    if path.suffix == ".npz":
        return _read_npz(path, task, kind)
    if path.suffix != ".csv":
        raise DataError(path, "must be a .csv or .npz of scores", todo="see docs/evaluation.md for the columns")
    if task.kind != "zero_shot":
        raise DataError(path, f"{task.kind} is not read from a table", todo="give the .npz that an evaluation wrote")
    return _read_csv(path, task, kind)


def _read_csv(path: Path, task: Task, kind: Kind | None) -> GivenScores:
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise DataError(path, "cannot be read", found=error.strerror) from None
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(table)
    except csv.Error as error:
        raise DataError(path, "is no CSV", found=str(error)) from None
    columns = list(table.fieldnames or ())
    if not rows:
        raise DataError(path, "has no rows")
    if ragged := [i for i, row in enumerate(rows) if None in row or None in row.values()]:
        raise DataError(f"{path}: line {ragged[0] + 2}", "has another number of cells than the head")
    labels = [entry.label for entry in task.classes]
    multi = task.labels == "multi"
    truth = _truth(path, rows, columns, labels, multi)
    facts: dict[str, Any] = {
        "sample_ids": [row["sample_id"] for row in rows] if "sample_id" in columns else None,
        "group_ids": [row["group_id"] for row in rows] if "group_id" in columns else None,
    }
    if "prediction" in columns:
        given = [_members(path, i, row["prediction"], labels, multi) for i, row in enumerate(rows)]
        values = np.zeros((len(rows), len(labels)))
        for i, members in enumerate(given):
            values[i, members] = 1
        return _build(path, task, truth, values, "predictions", **facts)
    if "score" in columns and len(labels) == 2 and not multi:
        score = _numbers(path, rows, ["score"])
        kind = kind or ("probabilities" if _within(score) else "logits")
        first = 1 - score if kind == "probabilities" else np.zeros_like(score)
        return _build(path, task, truth, np.concatenate([first, score], axis=1), kind, **facts)
    if lacking := [label for label in labels if label not in columns]:
        raise DataError(path, f"has no column of {', '.join(lacking)}", found=", ".join(columns),
                        todo="name one column for each class label, or `prediction`")  # fmt: skip
    return _build(path, task, truth, _numbers(path, rows, labels), kind, **facts)


def _truth(
    path: Path, rows: Sequence[Mapping[str, str]], columns: Sequence[str], labels: Sequence[str], multi: bool
) -> NDArray[np.int64]:
    """(N,) class numbers, or (N, L) of 1, 0 and -1."""
    named = [f"true:{label}" for label in labels]
    if multi and all(column in columns for column in named):
        known = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "": -1, "-1": -1}
        wrong = [(i, row[c]) for i, row in enumerate(rows) for c in named if row[c].strip() not in known]
        if wrong:
            raise DataError(f"{path}: line {wrong[0][0] + 2}", "truth must be 1, 0 or blank", found=wrong[0][1])
        return np.asarray([[known[row[c].strip()] for c in named] for row in rows], dtype=np.int64)
    if "label" not in columns:
        raise DataError(path, "has no column `label`", found=", ".join(columns), todo="say what is right for each row")
    members = [_members(path, i, row["label"], labels, multi) for i, row in enumerate(rows)]
    if not multi:
        return np.asarray([one[0] for one in members], dtype=np.int64)
    truth = np.zeros((len(rows), len(labels)), dtype=np.int64)
    for i, places in enumerate(members):
        truth[i, places] = 1
    return truth


def _members(path: Path, row: int, cell: str, labels: Sequence[str], multi: bool) -> list[int]:
    names = [name.strip() for name in (cell.split("|") if multi else [cell])]
    names = [name for name in names if name]
    unknown = [name for name in names if name not in labels]
    if unknown or (not multi and len(names) != 1):
        raise DataError(f"{path}: line {row + 2}", "names no class of the task", found=cell or "nothing",
                        todo=f"known: {', '.join(labels)}")  # fmt: skip
    return [labels.index(name) for name in names]


def _numbers(path: Path, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> NDArray[np.float64]:
    values = np.empty((len(rows), len(columns)))
    for i, row in enumerate(rows):
        try:
            values[i] = [float(row[column]) for column in columns]
        except ValueError:
            cells = ", ".join(row[column] for column in columns)
            raise DataError(f"{path}: line {i + 2}", "holds what is no number", found=cells[:60]) from None
    return values


def _read_npz(path: Path, task: Task, kind: Kind | None) -> GivenScores:
    try:
        # Opened here, because np.load leaves a file of its own open where the zip is broken.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(path, "is no npz of arrays", found=str(error)[:80]) from None
    if "format" in arrays:
        scores = read_scores(path)
        _check_kind(path, scores, task)
        return GivenScores(scores=scores, kind="cosines")
    names = [name for name in ("cosines", "probabilities", "logits", "predictions") if name in arrays]
    truth = arrays.get("truth" if task.labels == "multi" else "y")
    if len(names) != 1 or truth is None or task.kind != "zero_shot":
        raise DataError(path, "needs `y` or `truth`, and one of cosines, probabilities, logits, predictions",
                        found=", ".join(arrays))  # fmt: skip
    labels, values = [entry.label for entry in task.classes], arrays[names[0]]
    if names[0] == "predictions" and task.labels != "multi":
        if values.ndim != 1 or values.dtype.kind not in "iu" or not _in_range(values, len(labels)):
            raise DataError(path, f"predictions must be class numbers below {len(labels)}", found=values.dtype)
        values = np.eye(len(labels))[values]
    if "classes" in arrays:
        order = [str(name) for name in arrays["classes"].tolist()]
        if sorted(order) != sorted(labels) or values.ndim != 2 or values.shape[1] != len(order):
            raise DataError(path, "its classes are not the task's", found=", ".join(order))
        values = values[:, [order.index(label) for label in labels]]
        if task.labels == "multi":
            truth = truth[:, [order.index(label) for label in labels]]
        else:
            truth = np.asarray([labels.index(order[i]) for i in np.asarray(truth).tolist()])
    scale = float(arrays["logit_scale"]) if "logit_scale" in arrays else None
    ids = {
        key: [str(v) for v in arrays[key].tolist()] if key in arrays else None for key in ("sample_ids", "group_ids")
    }
    return _build(path, task, truth, values, kind or names[0], logit_scale=scale, **ids)  # type: ignore[arg-type]


def _check_kind(path: Path, scores: Scores, task: Task) -> None:
    """Raise DataError for a stored score file of another kind of task, or of other classes."""
    expected: type = {"options": OptionScores, "retrieval": RankScores}.get(
        task.kind, LabelScores if task.labels == "multi" else ClassScores
    )
    labels = tuple(entry.label for entry in task.classes)
    names = scores.classes if isinstance(scores, ClassScores) else getattr(scores, "labels", labels)
    if not isinstance(scores, expected) or tuple(names) != labels:
        raise DataError(path, f"does not answer {task.name}", found=f"{type(scores).__name__} of {', '.join(names)}")


def _build(
    path: Path, task: Task, truth: NDArray[Any], values: ArrayLike, kind: Kind | None, *,
    sample_ids: Sequence[str] | None, group_ids: Sequence[str] | None, logit_scale: float | None = None,
) -> GivenScores:  # fmt: skip
    """The scores as they are stored. Raises DataError for shapes or values that cannot be."""
    table, multi = np.asarray(values, dtype=np.float64), task.labels == "multi"
    shape = (len(truth), len(task.classes))
    if table.shape != shape or truth.shape != (shape if multi else shape[:1]):
        raise DataError(path, f"must have {shape[1]} scores a sample", found=f"{table.shape}, truth {truth.shape}")
    if bad := np.flatnonzero(~np.isfinite(table).all(axis=1)).tolist():
        raise DataError(path, f"{len(bad)} samples have scores that are not finite", found=f"row {bad[0]}")
    if not multi and not _in_range(truth, shape[1]):
        raise DataError(path, f"labels must be below {shape[1]}", found=truth.max(initial=0))
    ids = tuple(sample_ids) if sample_ids is not None else tuple(f"{i:06d}" for i in range(len(truth)))
    if len(set(ids)) != len(truth):
        raise DataError(path, "sample ids must be one a row and differ", found=f"{len(set(ids))} of {len(truth)}")
    if kind is None:
        kind = "probabilities" if _within(table) and (multi or _sums_to_one(table)) else "cosines"
    if kind == "probabilities" and not _within(table):
        raise DataError(path, "probabilities must lie within 0 and 1", found=f"{table.min():g} to {table.max():g}")
    undefined: dict[str, str] = {}
    names = task.metrics.names
    if kind == "predictions":
        allowed = ("macro_f1",) if multi else OF_DECISIONS
        undefined = {m: "predictions alone have no scores" for m in names if m not in allowed}
    elif kind == "cosines" and logit_scale is None:
        undefined = {m: "cosines without the model's logit scale are no probabilities"
                     for m in names if m in _OF_PROBABILITIES}  # fmt: skip
    facts: dict[str, Any] = {
        "sample_ids": ids, "group_ids": tuple(group_ids) if group_ids is not None else None,
        "cosines": _as_scores(table, kind, multi).astype(np.float32), "logit_scale": logit_scale or 1.0,
    }  # fmt: skip
    labels = tuple(entry.label for entry in task.classes)
    if multi:
        scores: Scores = LabelScores(labels=labels, truth=truth.astype(np.int8), **facts)
    else:
        scores = ClassScores(classes=labels, y=truth.astype(np.int64), **facts)
    return GivenScores(scores=scores, kind=kind, undefined=undefined)


def _as_scores(table: NDArray[np.float64], kind: Kind, multi: bool) -> NDArray[np.float64]:
    """Logits whose softmax, or sigmoid, gives probabilities back; a margin of 0 is the decision of several labels."""
    if kind == "probabilities":
        p = np.clip(table, _SMALLEST, 1)
        return np.log(p) - np.log(np.clip(1 - table, _SMALLEST, 1)) if multi else np.log(p)
    if kind == "predictions" and multi:
        return 2 * table - 1
    return table


def _in_range(values: NDArray[Any], size: int) -> bool:
    return bool(values.size == 0 or (values.min() >= 0 and values.max() < size))


def _within(table: NDArray[np.float64]) -> bool:
    return bool((table >= 0).all() and (table <= 1).all())


def _sums_to_one(table: NDArray[np.float64]) -> bool:
    return bool(np.abs(table.sum(1) - 1).max(initial=0) < 1e-3)
