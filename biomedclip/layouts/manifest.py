"""Rows to a Manifest, with the checks that hold for every layout.

A layout module only says where pictures lie and what is known about each; order, duplicate rows, class names and the
hash are settled here once, so that two layouts of the same data differ in nothing else.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from biomedclip.errors import ConfigError, DataError
from biomedclip.files import sha256_json
from biomedclip.schema import SPLITS, Drop, LabelKind, LabelledImage, Manifest

SPLIT_NAMES = {
    "train": "train", "training": "train", "trn": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "tst": "test",
}  # fmt: skip
"""What data sets call their splits, in lower case."""


def make_manifest(
    name: str,
    root: str | Path,
    rows: Iterable[LabelledImage],
    *,
    kind: LabelKind,
    classes: Sequence[str] | None = None,
    drops: Iterable[Drop] = (),
    content: Sequence[Any] = (),
) -> Manifest:
    """A checked manifest, rows in order of sample id.

    `classes` gives the label ids; where it is None they are the labels found, sorted. `content` are facts of the
    pictures that come for free (file sizes, checksums of an archive): they enter the hash, so that embeddings cached
    under it do not outlive pictures that changed under the same names. Raises DataError for duplicate
    rows, labels that are not among `classes`, and a set without a row.
    """
    ordered = tuple(sorted(rows, key=lambda row: row.sample_id))
    drops = tuple(drops)
    if not ordered:
        reasons = Counter(drop.reason for drop in drops).most_common(3)
        raise DataError(root, "holds no labelled image in this layout",
                        found=", ".join(f"{count} {reason}" for reason, count in reasons) or None,
                        todo="check the folder and the layout's options")  # fmt: skip
    times = Counter(row.sample_id for row in ordered)
    if repeated := [sample_id for sample_id, count in times.items() if count > 1]:
        raise DataError(root, f"{len(repeated)} samples are listed twice", found=", ".join(repeated[:3]),
                        todo="remove the duplicate rows")  # fmt: skip
    spoken = {label for row in ordered for label in (*row.labels, *row.negatives, *row.uncertain)}
    known = tuple(classes) if classes is not None else tuple(sorted(spoken))
    for label in sorted(spoken - set(known)):
        sample = next(row.sample_id for row in ordered if label in (*row.labels, *row.negatives, *row.uncertain))
        near = difflib.get_close_matches(label, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"declared classes: {', '.join(known)}"
        raise DataError(f"{root}: {sample}", "has a label that is not declared", found=repr(label), todo=hint)
    facts = [kind, list(known), [_facts(row) for row in ordered], list(content)]
    return Manifest(
        name=name, root=str(root), kind=kind, classes=known, rows=ordered, drops=drops,
        sha256=sha256_json(facts),
    )  # fmt: skip


def _facts(row: LabelledImage) -> dict[str, Any]:
    """The row as JSON has it; `dataclasses.asdict` copies deeply, which is most of the time of 50,000 rows."""
    return {
        "sample_id": row.sample_id, "image": {"path": row.image.path, "part": row.image.part}, "labels": row.labels,
        "negatives": row.negatives, "uncertain": row.uncertain, "split": row.split, "group_id": row.group_id,
        "attributes": dict(row.attributes), "text": row.text,
    }  # fmt: skip


def hash_id(name: str, value: str) -> str:
    """16 hex digits that stand for an identifier of a patient, study or file in the data set called `name`.

    The name is the salt: the same patient gets other digits in another set, and equal ones on every machine.
    """
    return hashlib.sha256(f"{name}\n{value}".encode()).hexdigest()[:16]


def compile_pattern(pattern: str, option: str, *, groups: Iterable[str] = ()) -> re.Pattern[str]:
    """The regular expression of an option. Raises ConfigError where it is none, or lacks one of the named `groups`,
    or, where none is asked for, any group at all."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"layout.{option}", f"is no regular expression: {error}", found=repr(pattern)) from None
    for group in groups:
        if group not in compiled.groupindex:
            raise ConfigError(f"layout.{option}", f"has no group '{group}'", found=repr(pattern),
                              todo=f"put (?P<{group}>…) around the {group}")  # fmt: skip
    if compiled.groups < 1:
        raise ConfigError(f"layout.{option}", "has no group", found=repr(pattern), todo="put (…) around the id")
    return compiled


def name_split(text: str, where: str | Path, names: Mapping[str, str] | None = None) -> str:
    """`train`, `val` or `test` for what a data set writes; `names` adds its own words.

    Raises DataError for a word that is none of them.
    """
    known = SPLIT_NAMES | {key.lower(): value for key, value in (names or {}).items()} | {s: s for s in SPLITS}
    split = known.get(text.strip().lower())
    if split is None:
        raise DataError(where, "names no split", found=repr(text), todo=f"map it with splits: {{{text}: train}}")
    return split


def check_path(path: str, where: str | Path) -> str:
    """A relative path inside the root, with forward slashes. Raises DataError for one that leaves it."""
    posix = PurePosixPath(path.replace("\\", "/").strip())
    if posix.is_absolute() or ".." in posix.parts or not posix.parts:
        raise DataError(where, "names a file outside the data folder", found=repr(path),
                        todo="write paths relative to the folder")  # fmt: skip
    return posix.as_posix()
