"""`chexpert_csv`, `flair_csv`, `medimeta`: tables in the words of those who published them.

Each turns its own columns into what `tables.read_table` knows, so that the checks are the same for all; only MedIMeta,
whose labels are ids that a second file explains, reads its rows itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml

from biomedclip.errors import DataError
from biomedclip.layouts.cells import parse_list, read_cells
from biomedclip.layouts.manifest import check_path, hash_id, make_manifest, name_split
from biomedclip.layouts.tables import DEFAULT_VALUES, Columns, State, file_size, read_table
from biomedclip.schema import Drop, ImageRef, LabelKind, LabelledImage, Manifest

CHEXPERT_FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
"""The columns of CheXpert's tables, in their order."""


def read_chexpert(
    root: Path,
    name: str,
    *,
    table: str | Mapping[str, str] = "train.csv",
    classes: Sequence[str] | None = None,
    kind: LabelKind = "multi",
    values: Mapping[str, State] | None = None,
    view: Literal["frontal", "lateral", "all"] = "frontal",
    prefix: str = "",
    folder: str = "",
    split: str | None = None,
    group_pattern: str = r"(patient\d+)",
    attributes: Sequence[str] = ("Sex", "Age", "Frontal/Lateral", "AP/PA"),
    encoding: str = "utf-8",
) -> Manifest:
    """The manifest of a CheXpert table: `Path`, four columns of facts, and 1, 0, -1 or nothing for each finding.

    Only `classes` of the 14 findings are read; -1 is uncertain and nothing is unmentioned unless `values` says
    otherwise. `view` keeps frontal or lateral pictures. `prefix` is what the paths begin with and the folder does not
    (`CheXpert-v1.0-small/`), `folder` the opposite. `group_pattern` finds the patient in the path; the group id is a
    hash of it. `kind: single` is for CheXpert-5x200, where each picture has one finding.
    """
    filter = {} if view == "all" else {"Frontal/Lateral": view.capitalize()}
    tables: str | Mapping[str, str] = {split: table} if split and isinstance(table, str) else table
    findings = classes or CHEXPERT_FINDINGS
    return read_table(
        root, name, table=tables, image="Path", label_columns=findings, classes=findings, kind=kind,
        values=values or DEFAULT_VALUES, filter=filter, prefix=prefix, folder=folder, group_pattern=group_pattern,
        hash_group=True, attributes=attributes, encoding=encoding,
    )  # fmt: skip


def read_flair(
    root: Path,
    name: str,
    *,
    table: str,
    classes: Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
    kind: LabelKind = "single",
    split: str | None = None,
    folder: str = "",
    prefix: str = "",
    group_pattern: str | None = None,
    encoding: str = "utf-8",
) -> Manifest:
    """The manifest of a FLAIR table: `image`, `atributes` (their spelling), `categories`, the last two lists in words.

    Rows without exactly one category are dropped unless `kind` is multi; attributes become the text attribute
    `atributes`, divided by commas. `split` names the only split, `names` renames categories.
    """
    tables: str | Mapping[str, str] = {split: table} if split else table
    manifest = read_table(
        root, name, table=tables, image="image", label="categories", label_list=True, classes=classes, names=names,
        kind=kind, attributes=["atributes"], folder=folder, prefix=prefix, group_pattern=group_pattern,
        encoding=encoding,
    )  # fmt: skip
    rows = []
    for row in manifest.rows:
        words = parse_list(row.attributes["atributes"], f"{root / table}: {row.sample_id}, column 'atributes'")
        rows.append(replace(row, attributes={"atributes": ", ".join(words)} if words else {}))
    return make_manifest(name, root, rows, kind=kind, classes=manifest.classes, drops=manifest.drops,
                         content=[manifest.sha256])  # fmt: skip


def read_medimeta(
    root: Path,
    name: str,
    *,
    task: str | None = None,
    classes: Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
    split: str | None = None,
    splits: dict[str, str] | None = None,
    group: str | None = None,
    attributes: Sequence[str] = (),
) -> Manifest:
    """The manifest of a MedIMeta set: `info.yaml` and `annotations.csv`, whose first column is the path.

    `task` is one of the tasks in `info.yaml` (default: the only one); its label ids get the names written there, which
    `names` may rename. The split is the column `split`, else the given one, `original_split`, unless `split` names
    another. `group` is a column, default `patient_id` where there is one; ids are hashed. The kind is the task's:
    several labels are written as a list of bits.
    """
    info_path, path = root / "info.yaml", root / "annotations.csv"
    entry = _find_task(info_path, task)
    target = str(entry.get("task_target", ""))
    many = "MULTILABEL" in target.upper()
    kind: LabelKind = "multi" if many else "ordinal" if "ORDINAL" in target.upper() else "single"
    said = {str(key): str(word) for key, word in dict(entry["labels"]).items()}
    labels = [(names or {}).get(word, word) for word in said.values()]
    rows, drops, sizes = [], [], []
    for number, cells in read_cells(path):
        where = f"{path}: row {number}"
        image = next(iter(cells))
        column = next((c for c in (f"tasks/{entry['task_name']}", str(entry["task_name"])) if c in cells), None)
        if column is None:
            raise DataError(where, f"has no column of task '{entry['task_name']}'", found=", ".join(cells),
                            todo="check info.yaml against annotations.csv")  # fmt: skip
        split_column = split or next((c for c in ("split", "original_split") if c in cells), None)
        owner = group or ("patient_id" if "patient_id" in cells else None)
        Columns(split=split_column, splits=splits, group=owner, attributes=attributes).check(cells, where)
        relative = check_path(cells[image], where)
        size = file_size(root / relative)
        if size is None:
            drops.append(Drop(source=name, item=relative, reason="missing_file", detail=f"row {number}"))
            continue
        positive, negative = _read_task_label(cells[column], list(said), labels, many, f"{where}, column '{column}'")
        rows.append(
            LabelledImage(
                sample_id=relative, image=ImageRef(path=relative), labels=positive, negatives=negative,
                split=name_split(cells[split_column], where, splits) if split_column else None,
                group_id=hash_id(name, cells[owner]) if owner and cells[owner] else None,
                attributes={key: cells[key] for key in attributes},
            )
        )  # fmt: skip
        sizes.append(size)
    return make_manifest(name, root, rows, kind=kind, classes=classes or labels, drops=drops, content=sizes)


def _find_task(path: Path, task: str | None) -> Mapping[str, Any]:
    try:
        info = yaml.safe_load(path.read_text("utf-8"))
        tasks = {str(entry["task_name"]): entry for entry in info["tasks"]}
        usable = all(isinstance(entry["labels"], dict) and entry["labels"] for entry in tasks.values())
    except FileNotFoundError:
        raise DataError(path, "there is no such file", todo="name the folder of one MedIMeta set") from None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, RecursionError) as error:
        raise DataError(path, "is no info.yaml of MedIMeta", found=str(error)[:60].replace("\n", " ")) from None
    if not usable:
        raise DataError(path, "has a task without labels", todo="write `labels: {0: …, 1: …}`")
    if (task is None and len(tasks) != 1) or (task is not None and task not in tasks):
        wrong = "has several tasks" if task is None else f"has no task '{task}'"
        raise DataError(path, wrong, found=", ".join(tasks), todo="name one with layout.task")
    found: Mapping[str, Any] = tasks[task or next(iter(tasks))]
    return found


def _read_task_label(
    cell: str, ids: Sequence[str], labels: Sequence[str], many: bool, where: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if many:
        bits = parse_list(cell.replace(" ", ",") if "," not in cell else cell, where)
        if len(bits) != len(labels) or not set(bits) <= {"0", "1"}:
            raise DataError(where, f"has not one bit for each of {len(labels)} labels", found=cell)
        said = list(zip(labels, bits, strict=True))
        return tuple(word for word, bit in said if bit == "1"), tuple(word for word, bit in said if bit == "0")
    cell = cell.strip().removesuffix(".0")
    if cell not in ids:
        raise DataError(where, "is no label id of the task", found=repr(cell), todo=f"info.yaml has {', '.join(ids)}")
    return (labels[ids.index(cell)],), ()
