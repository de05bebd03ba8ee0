"""A task's data on disk to the manifest that is scored: the rows of its split, checked against what the task expects.

Reads a task and a folder in any layout; yields a manifest with a hash of its own. Labels nobody declared, classes that
are not there, repeated ids and other counts than expected are refused before a model is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from inspect import Parameter, signature
from pathlib import Path

from biomedclip.errors import DataError
from biomedclip.evaluation.answer_kinds import check_label_sets, read_options
from biomedclip.evaluation.tasks import Task
from biomedclip.files import sha256_json
from biomedclip.schema import LabelledImage, Manifest


def read_split(task: Task, root: str | Path) -> Manifest:
    """The manifest of the task's split, with a hash of its own. Raises DataError where the split is empty."""
    from biomedclip.layouts import LAYOUTS, read_manifest

    options = {key: value for key, value in task.layout.items() if key != "type"}
    declared = signature(LAYOUTS[task.layout["type"]]).parameters.get("classes")
    if task.classes and declared is not None and declared.default is Parameter.empty:
        # Files that hold numbers: what they mean is the order of the task's classes.
        options.setdefault("classes", [entry.label for entry in task.classes])
    whole = read_manifest(task.layout["type"], root, name=task.name, **options)
    return select_split(whole, task)


def read_other_split(task: Task, root: str | Path, split: str) -> Manifest:
    """The manifest of another split of the task's data, for whatever is learnt or chosen there."""
    # A layout that was told to read the task's own split alone must read this one.
    layout = task.layout | ({"splits": [split]} if isinstance(task.layout.get("splits"), list) else {})
    return read_split(task.model_copy(update={"split": split, "select_split": None, "layout": layout}), root)


def select_split(manifest: Manifest, task: Task) -> Manifest:
    """The rows of the task's split. Raises DataError where there are none, or not what the task asks about."""
    # Data without any split, of a task that has only one, is that one.
    undivided = task.select_split is None and all(row.split is None for row in manifest.rows)
    rows = tuple(row for row in manifest.rows if undivided or row.split == task.split)
    if not rows:
        found = ", ".join(sorted({str(row.split) for row in manifest.rows})) or "no rows"
        raise DataError(manifest.root, f"has nothing in split '{task.split}'", found=found, todo="check data and split")
    if task.kind == "zero_shot" and task.labels == "multi":
        check_label_sets(task, rows, manifest.root)
    elif task.kind == "zero_shot":
        _check_labels(task, rows, manifest.root)
    elif task.kind == "options":
        for row in rows:
            read_options(row, manifest.root)
    elif missing := [row.sample_id for row in rows if not (row.text or "").strip()]:
        raise DataError(manifest.root, f"{len(missing)} images have no caption", found=", ".join(missing[:3]))
    if repeated := [i for i, times in Counter(row.sample_id for row in rows).items() if times > 1]:
        raise DataError(manifest.root, "sample ids occur twice", found=", ".join(repeated[:3]))
    hashed = sha256_json([manifest.sha256, task.split, [row.sample_id for row in rows]])
    return replace(manifest, name=task.name, rows=rows, sha256=hashed)


def _check_labels(task: Task, rows: Sequence[LabelledImage], root: str) -> None:
    known = {entry.label for entry in task.classes}
    for row in rows:
        if len(row.labels) != 1 or row.labels[0] not in known:
            raise DataError(
                f"{root}: {row.sample_id}", f"needs one label of {', '.join(sorted(known))}",
                found=", ".join(row.labels) or "none",
            )  # fmt: skip
    absent = known - {row.labels[0] for row in rows}
    if absent:
        raise DataError(
            root, f"split '{task.split}' has no image of {', '.join(sorted(absent))}",
            todo="check the folder; metrics over classes that are not there would mean something else",
        )  # fmt: skip


def check_counts(task: Task, manifest: Manifest) -> list[str]:
    """Warnings about counts that the task allows. Raises DataError for those it does not."""
    counts: Counter[str] = Counter(label for row in manifest.rows for label in row.labels)
    expected = dict(task.expect.classes) or ({"samples": task.expect.n} if task.expect.n else {})
    if not expected:
        return ["nobody has counted this split: its size is not checked"]
    found = {key: counts[key] if task.expect.classes else len(manifest.rows) for key in expected}
    if found == expected:
        return []
    text = ", ".join(f"{key} {found[key]} of {expected[key]}" for key in expected)
    if not task.expect.verified:
        return [f"other counts than expected, which nobody has verified: {text}"]
    if not task.expect.subset or any(found[key] > expected[key] for key in expected):
        raise DataError(manifest.root, f"split '{task.split}' of {task.name} has other counts than expected",
                        found=text, todo="check that the data is complete")  # fmt: skip
    return [f"a part of the split: {text}; not comparable with results on all of it"]
