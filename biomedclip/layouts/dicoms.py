"""`dicom_folder`: a folder of DICOM files, labelled by a table or by where they lie.

Sample ids, group ids and the names of drops are hashes, because folders and files are so often called like patients;
the path itself stays in `ImageRef.path`, which never leaves the machine. What a row tells of a file is the allow-list
of `biomedclip.dicom`. How grey becomes 8 bits is part of the reference (`dicom:<frame>;window=…`), so that equal rows
are equal pixels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from biomedclip.dicom import DicomFacts, read_facts, render_frame
from biomedclip.errors import DataError
from biomedclip.images import BadImage
from biomedclip.layouts.joined import JoinedLabels
from biomedclip.layouts.manifest import check_path, hash_id, make_manifest
from biomedclip.layouts.scan import Found, refuse_file, walk_files
from biomedclip.layouts.tables import DEFAULT_VALUES, Columns, State
from biomedclip.schema import Drop, ImageRef, LabelKind, LabelledImage, Manifest
from biomedclip.windows import Grey, parse_grey, read_grey, write_grey

Match = Literal["path", "stem", "sop", "series", "study", "patient"]


def read_dicom_folder(
    root: Path,
    name: str,
    *,
    folder: str = "",
    exclude: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    kind: LabelKind | None = None,
    pattern: str | None = None,
    table: str | None = None,
    key: str | None = None,
    match: Match = "stem",
    label: str | None = None,
    label_columns: Sequence[str] = (),
    label_fields: Sequence[str] = (),
    label_separator: str | None = None,
    label_list: bool = False,
    values: Mapping[str, State] | None = None,
    names: Mapping[str, str] | None = None,
    split: str | None = None,
    splits: dict[str, str] | None = None,
    text: str | None = None,
    attributes: Sequence[str] = (),
    filter: Mapping[str, str | Sequence[str]] | None = None,
    duplicates: Literal["refuse", "drop"] = "refuse",
    encoding: str = "utf-8",
    window_hu: str | Sequence[float] | None = None,
    percentile: Sequence[float] | None = None,
    frames: Literal["all", "first", "middle"] = "all",
    group: Literal["patient", "study", "series", "file"] = "patient",
    burned_in: Literal["drop", "drop_possible", "keep"] = "drop",
) -> Manifest:
    """The manifest of a folder of DICOM files, one row a frame.

    Labels come from `pattern`, a regular expression over the path below `folder` with the named groups `label` and
    `split` (`^(?P<label>[^/]+)/`), or from `table`, whose column `key` names files by `match`: their relative path,
    their name without suffix, or their SOP instance, series, study or patient id; the further columns are those of
    layout `csv`, and so is `duplicates`. `window_hu` is a preset (`lung`) or [centre, width] for CT, instead of the
    files' own windows; `percentile` ([0.5, 99.5]) is for grey of more than 8 bits without any, which is dropped
    otherwise (`needs_window`). `group` says what a group is; its id is hashed. Files that state burned-in annotation
    are dropped, with `drop_possible` also those of kinds that commonly have it (ultrasound, secondary capture) unless
    they state they have none; the attribute `burned_in` says `yes` or `possible`. Every file that gives no picture is
    a drop with its reason. Raises DataError for a table that does not fit, ConfigError for labels from nowhere or two
    places.
    """
    meaning = Columns(
        label=label, label_columns=label_columns, label_fields=label_fields, label_separator=label_separator,
        label_list=label_list, values=values or DEFAULT_VALUES, names=names or {}, split=split, splits=splits,
        text=text, attributes=attributes, filter=filter or {},
    )  # fmt: skip
    start = root / check_path(folder, "layout.folder") if folder else root
    grey = parse_grey(window_hu, percentile)
    labels = JoinedLabels(root, name, meaning, pattern=pattern, table=table, key=key, duplicates=duplicates,
                          encoding=encoding)  # fmt: skip
    drops: list[Drop] = []
    rows: list[LabelledImage] = []
    sizes: list[int] = []
    for found in walk_files(start):
        item = hash_id(name, found.path)
        reason, facts = _read(start, found, exclude, grey, burned_in)
        said = labels.find(found.path, _key(match, found.path, facts)) if facts else None
        if reason or facts is None or said is None:
            drops.append(Drop(source=name, item=item, reason=reason or labels.reason))
            continue
        owner = _owner(facts, group, found.path)
        group_id = hash_id(name, owner) if owner else None
        chosen = {"all": range(facts.frames), "first": range(1), "middle": [facts.frames // 2]}[frames]
        for frame in chosen:
            rows.append(
                LabelledImage(
                    **{**said, "attributes": {**_attributes(facts), **said["attributes"]}, "group_id": group_id},
                    sample_id=f"{item}/{frame:04d}" if facts.frames > 1 else item,
                    image=ImageRef(path=found.path, part=f"dicom:{frame}{write_grey(grey)}"),
                )
            )
        sizes.append(found.size)
    return make_manifest(name, start, rows, kind=kind or labels.kind, classes=classes, drops=[*drops, *labels.drops()],
                         content=sizes)  # fmt: skip


def read_dicom_picture(path: Path, rest: str, where: str) -> Image.Image:
    """The frame `<number>[;window=c,w][;percentile=a,b]` of a DICOM file. Raises DataError with the reason."""
    frame, *options = rest.split(";")
    try:
        return render_frame(path, int(frame), read_grey(options))
    except BadImage as error:
        raise DataError(where, "gives no picture", found=str(error)) from None


def _read(
    start: Path, found: Found, exclude: Sequence[str], grey: Grey, burned_in: str
) -> tuple[str | None, DicomFacts | None]:
    """(why a file gives no row, what it says of itself)."""
    if refused := refuse_file(found, exclude, None):
        return refused, None
    try:
        facts = read_facts(start / found.path, grey)
    except BadImage as error:
        return error.reason, None
    if facts.refused:
        return facts.refused, facts
    barred = {"drop": ["burned_in_annotation"], "keep": [],
              "drop_possible": ["burned_in_annotation", "maybe_burned_in_annotation"]}[burned_in]  # fmt: skip
    return next((flag for flag in facts.flags if flag in barred), None), facts


def _attributes(facts: DicomFacts) -> dict[str, str]:
    flags = {"burned_in_annotation": ("burned_in", "yes"), "maybe_burned_in_annotation": ("burned_in", "possible"),
             "recognizable_face": ("face", "yes")}  # fmt: skip
    return {**facts.attributes, **dict(flags[flag] for flag in facts.flags)}


def _owner(facts: DicomFacts, group: str, path: str) -> str:
    """What the group id is a hash of; the next wider thing known where the file does not say."""
    known = {"file": path, "series": facts.series_uid, "study": facts.study_uid, "patient": facts.patient_id}
    order = list(known)
    wider = [f"{word} {known[word]}" for word in order[order.index(group) :] if known[word]]
    narrower = [f"{word} {known[word]}" for word in reversed(order[1 : order.index(group)]) if known[word]]
    return next(iter((*wider, *narrower)), "")


def _key(match: Match, path: str, facts: DicomFacts) -> str:
    stem = os.path.splitext(os.path.basename(path))[0]
    return {"path": path, "stem": stem, "sop": facts.sop_uid, "series": facts.series_uid, "study": facts.study_uid,
            "patient": facts.patient_id}[match]  # fmt: skip
