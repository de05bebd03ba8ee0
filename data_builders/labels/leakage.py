"""The leakage gate: which training images show what a held-out image shows, and what is done about it.

Reads the pairs of a compiled set and compares them with the set's own val and test images, whether those are compiled
or not, and with any registered evaluation sets (hash files of `data_builders.contamination`, or dataset folders). Three
rules, strictest first: the same group, the same decoded pixels (which survives a change of container), and a
perceptual hash within a few bits (which survives scaling and JPEG). A perceptual hash of a picture of 28 pixels, or of
line art, is near that of many others, so small pictures are left out of that rule, shapes must agree, and a held-out
picture that is near very many training images is counted and not acted upon. No hash recognises a picture that was
turned, flipped or cropped: where a set has such copies, only a group id can say so. The training side goes, never the
held-out one.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from biomedclip.config import Config
from biomedclip.errors import DataError
from biomedclip.files import sha256_file
from biomedclip.images import BadImage
from biomedclip.layouts.manifest import hash_id
from biomedclip.schema import SPLITS, Drop, LabelledImage, Manifest, Pair
from biomedclip.shards import MANIFEST, DatasetFolder
from data_builders.contamination import read_hashes
from data_builders.engines import run_tasks
from data_builders.hamming import MAX_DISTANCE, distance, near_matches
from data_builders.labels.compile import group_name, read_checked, sample_key
from data_builders.labels.recipe import Recipe
from data_builders.labels.splits import audit_groups, split_of

REPORT = "leakage.json"
MAX_LISTED = 10_000
"""Matches named in the report; the counts are of all."""

_CHUNK = 256
_RULES = ("group", "pixels", "near")


class LeakageConfig(Config):
    """What counts as the same picture, compared with what, and what follows. A group in two splits is never kept on the
    training side, whatever the mode."""

    mode: Literal["off", "report", "drop", "fail"] = "drop"
    against: tuple[str, ...] = ()
    """Evaluation sets: hash files, or dataset folders, of which the val and test samples count where there are any."""
    held_out: bool = True
    """Compare with the val and test images of the set itself too."""
    max_distance: int = Field(default=4, ge=0, le=MAX_DISTANCE)
    """Bits in which perceptual hashes of one picture may differ."""
    min_side_px: int = Field(default=64, ge=1)
    """Smaller pictures are compared by pixels and groups alone."""
    max_aspect_change: float = Field(default=0.05, ge=0)
    max_matches: int = Field(default=100, ge=1)
    """A held-out picture near more images than this tells nothing: blank, or line art."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Print:
    """What is known of a picture that may be shown twice."""

    home: str
    """The split or the evaluation set it is in."""
    name: str
    """Its key, or a hash of its name in an evaluation set."""
    sha256: str | None = None
    pixels: str | None = None
    phash: int | None = None
    width: int | None = None
    height: int | None = None
    group: str | None = None
    """Source and group id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A picture of ours that is also in a held-out place."""

    rule: str
    other: Print
    distance: int | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """What the gate found: key -> the drop that follows, and the report as JSON."""

    drops: dict[str, Drop]
    report: dict[str, Any]


def needs_pixels(config: LeakageConfig, manifest: Manifest) -> bool:
    """Whether hashes of decoded pixels will be compared at all; they cost a whole decode of each picture."""
    return config.mode != "off" and (bool(config.against) or (config.held_out and _has_held_out(manifest)))


def refuse_crossing_groups(config: LeakageConfig, manifest: Manifest) -> None:
    """Raise DataError where the mode is `fail` and groups lie in two splits: known before a picture is read."""
    audit = audit_groups(manifest)
    if config.mode == "fail" and audit.crossing_groups:
        raise DataError(
            manifest.root, f"{audit.crossing_groups} groups lie in two splits", found=f"{audit.crossing_images} images",
            todo="deal the splits anew (recipe: split: {of: all, …}) or set source.leakage.mode=drop",
        )  # fmt: skip


def check_leaks(
    recipe: Recipe,
    manifest: Manifest,
    pairs: Sequence[Pair],
    config: LeakageConfig,
    *,
    drop_duplicates: bool = True,
    workers: int = 1,
) -> Gate:
    """The verdict on the pairs of a set.

    `drop_duplicates` keeps one of the pictures that a split has several times, in any mode: asked before leaks and
    conflicts were known, it would hide both. Raises DataError in mode `fail` where anything leaks, and for an
    evaluation set that cannot be read.
    """
    repeated = repeated_pairs(pairs) if drop_duplicates else set[str]()
    if config.mode == "off":
        drops = _drops(recipe, pairs, {}, set(), repeated)
        return Gate(drops, {"mode": "off", "dropped": _count(drops)})
    compared = _held_out_prints(recipe, manifest, pairs, config, workers)
    external = [_read_evaluation_set(path) for path in config.against]
    matches: dict[str, Match] = {}
    crowded = 0
    for place, split in enumerate(SPLITS[:-1]):  # nothing is more held out than test
        ours = [_print_of(pair) for pair in pairs if pair.split == split]
        theirs = [found for other in SPLITS[place + 1 :] for found in compared.get(other, ())]
        theirs += [found for prints in external for found in prints]
        found, skipped = find_matches(ours, theirs, config)
        matches |= {ours[row].name: match for row, match in found.items()}
        crowded += skipped
    conflicts = conflicting_pairs(pairs)
    report = _report(recipe, manifest, config, compared, external)
    rules = Counter(match.rule for match in matches.values())
    report["found"] = {rule: rules[rule] for rule in _RULES} | {
        "label_conflict": len(conflicts),
        "not_telling": crowded,
    }
    report["matches"] = [
        {"key": key, "rule": match.rule, "with": match.other.home, "sample": match.other.name,
         **({"distance": match.distance} if match.distance is not None else {})}
        for key, match in sorted(matches.items())[:MAX_LISTED]
    ]  # fmt: skip
    if config.mode == "fail" and matches:
        key, match = min(matches.items())
        raise DataError(
            manifest.root, f"{len(matches)} training images show held-out pictures",
            found=f"{key} like {match.other.name} of {match.other.home} by {match.rule}",
            todo="set source.leakage.mode=drop to leave them out, or report to list them in leakage.json",
        )  # fmt: skip
    if config.mode == "report":
        matches, conflicts = {}, set()
    drops = _drops(recipe, pairs, matches, conflicts, repeated)
    report["dropped"] = _count(drops)
    return Gate(drops, report)


def find_matches(ours: Sequence[Print], theirs: Sequence[Print], config: LeakageConfig) -> tuple[dict[int, Match], int]:
    """Row of `ours` -> its strictest match among `theirs`; and how many of `theirs` were near too many to tell."""
    found: dict[int, Match] = {}
    groups = {other.group: other for other in reversed(theirs) if other.group}
    hashes = {value: other for other in reversed(theirs) for value in (other.sha256, other.pixels) if value}
    for row, own in enumerate(ours):
        if own.group in groups:
            found[row] = Match(rule="group", other=groups[own.group])
            continue
        other = next((hashes[value] for value in (own.pixels, own.sha256) if value in hashes), None)
        if other is not None:
            found[row] = Match(rule="pixels", other=other)
    near, crowded = _near(ours, theirs, config)
    return near | found, crowded


def repeated_pairs(pairs: Iterable[Pair]) -> set[str]:
    """Keys of pairs whose very picture an earlier pair of their split has."""
    seen: set[tuple[str, str]] = set()
    repeated = set()
    for pair in pairs:
        picture = (pair.split, _picture(pair))
        if picture in seen:
            repeated.add(pair.key)
        seen.add(picture)
    return repeated


def _picture(pair: Pair) -> str:
    return str(pair.sidecar.get("pixels_sha256") or pair.sha256)


def conflicting_pairs(pairs: Iterable[Pair]) -> set[str]:
    """Keys of pairs whose very picture also occurs with other labels."""
    said: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    keys: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        picture = _picture(pair)
        said[picture].add(pair.labels)
        keys[picture].append(pair.key)
    return {key for picture, labels in said.items() if len(labels) > 1 for key in keys[picture]}


def _near(ours: Sequence[Print], theirs: Sequence[Print], config: LeakageConfig) -> tuple[dict[int, Match], int]:
    """Row of `ours` -> its nearest match by perceptual hash and shape; and the number of crowded ones of `theirs`."""
    left, right = _by_hash(ours, config), _by_hash(theirs, config)
    if not left or not right:
        return {}, 0
    own = np.array(list(left), dtype=np.uint64)
    other = np.array(list(right), dtype=np.uint64)
    pairs: set[tuple[int, int]] = set()
    for i, j in near_matches(own, other, config.max_distance):
        pairs.update(zip(i.tolist(), j.tolist(), strict=True))
    if not pairs:
        return {}, 0
    i, j = np.array(sorted(pairs)).T
    bits = distance(own[i], other[j])
    left_rows, right_rows = list(left.values()), list(right.values())
    size = np.bincount(j, weights=[len(left_rows[place]) for place in i], minlength=len(other))
    crowded = size > config.max_matches
    found: dict[int, Match] = {}
    for a, b, d in sorted(zip(i.tolist(), j.tolist(), bits.tolist(), strict=True), key=lambda entry: entry[2]):
        if crowded[b]:
            continue
        for row in left_rows[a]:
            if row not in found:
                fits = next((o for o in right_rows[b] if _same_shape(ours[row], theirs[o], config)), None)
                if fits is not None:
                    found[row] = Match(rule="near", other=theirs[fits], distance=d)
    return found, sum(len(right_rows[b]) for b in np.flatnonzero(crowded))


def _by_hash(prints: Sequence[Print], config: LeakageConfig) -> dict[int, list[int]]:
    """Perceptual hash -> rows, of pictures large enough for it; a picture of unknown size is taken to be."""
    rows: dict[int, list[int]] = {}
    for row, found in enumerate(prints):
        side = min(found.width or config.min_side_px, found.height or config.min_side_px)
        if found.phash is not None and side >= config.min_side_px:
            rows.setdefault(found.phash, []).append(row)
    return rows


def _same_shape(own: Print, other: Print, config: LeakageConfig) -> bool:
    if not (own.width and own.height and other.width and other.height):
        return True
    change = abs(math.log(own.width * other.height / (own.height * other.width)))
    return change <= math.log1p(config.max_aspect_change)


def _print_of(pair: Pair) -> Print:
    return Print(
        home=pair.split, name=pair.key, sha256=pair.sha256, pixels=pair.sidecar.get("pixels_sha256"), phash=pair.phash,
        width=pair.width, height=pair.height, group=_group(pair.source, pair.group_id),
    )  # fmt: skip


def _group(source: str, group_id: str | None) -> str | None:
    return f"{source}\n{group_id}" if group_id else None


def _has_held_out(manifest: Manifest) -> bool:
    return any(split_of(row) != "train" for row in manifest.rows)


def _held_out_prints(
    recipe: Recipe, manifest: Manifest, pairs: Sequence[Pair], config: LeakageConfig, workers: int
) -> dict[str, list[Print]]:
    """Split -> the prints of its images: of the pairs, and of the splits that were not compiled, read for this."""
    if not config.held_out:
        return {}
    found: dict[str, list[Print]] = defaultdict(list)
    for pair in pairs:
        found[pair.split].append(_print_of(pair))
    rows = [row for row in manifest.rows if split_of(row) != "train" and split_of(row) not in found]
    tasks = [
        (recipe, replace(manifest, rows=tuple(rows[first : first + _CHUNK]), drops=()))
        for first in range(0, len(rows), _CHUNK)
    ]
    for prints in run_tasks(_print_rows, tasks, workers=workers, name=lambda task: task[0].name):
        for one in prints:
            found[one.home].append(one)
    return found


def _print_rows(task: tuple[Recipe, Manifest]) -> list[Print]:
    recipe, manifest = task
    return [found for row in manifest.rows for found in _print_row(recipe, manifest, row)]


def _print_row(recipe: Recipe, manifest: Manifest, row: LabelledImage) -> Iterator[Print]:
    """The row's print; none where its picture cannot be read, as nothing can leak into that."""
    try:
        image, pixels = read_checked(manifest, row, pixels=True)
    except (BadImage, DataError):
        return
    yield Print(
        home=split_of(row), name=sample_key(recipe.name, split_of(row), row.sample_id), sha256=image.sha256,
        pixels=pixels, phash=image.phash, width=image.width, height=image.height,
        group=_group(recipe.name, group_name(recipe, row.group_id)),
    )  # fmt: skip


def fingerprint_sets(config: LeakageConfig) -> list[str]:
    """The sha256 of each registered evaluation set: of the hash file, or of the dataset folder's manifest.

    Raises DataError where there is none.
    """
    return [sha256_file(_file_of(path)) for path in config.against]


def _file_of(path: str) -> Path:
    inside = Path(path) / MANIFEST
    found = inside if Path(path).is_dir() else Path(path)
    if not found.is_file():
        raise DataError(path, "is neither a hash file nor a finished dataset folder", todo="check leakage.against")
    return found


def _read_evaluation_set(path: str) -> list[Print]:
    """The prints of a registered evaluation set. Sample names are hashed: they may be somebody's. Raises DataError."""
    if Path(path).is_dir():
        folder = DatasetFolder(path)
        rows = folder.index.to_pylist()
        held_out = [row for row in rows if row["split"] != "train"] or rows
        return [
            Print(home=str(folder.manifest["name"]), name=row["key"], sha256=row["sha256"], phash=row["phash"],
                  width=row["width"], height=row["height"], group=_group(row["source"], row["group_id"]))
            for row in held_out
        ]  # fmt: skip
    return [
        Print(home=row["set"], name=hash_id(row["set"], row["sample"] or ""), sha256=row["sha256"],
              pixels=row["pixels_sha256"], phash=row["phash"], width=row["width"], height=row["height"])
        for row in read_hashes(path).to_pylist()
    ]  # fmt: skip


def _count(drops: dict[str, Drop]) -> dict[str, int]:
    return dict(sorted(Counter(drop.reason for drop in drops.values()).items()))


def _drops(
    recipe: Recipe, pairs: Sequence[Pair], matches: dict[str, Match], conflicts: set[str], repeated: set[str]
) -> dict[str, Drop]:
    drops = {}
    for pair in pairs:
        if pair.key in conflicts:
            reason, detail = "label_conflict", "the same picture carries other labels"
        elif pair.key in matches:
            match = matches[pair.key]
            reason, detail = f"leaked_{match.rule}", f"{match.other.name} of {match.other.home}"
        elif pair.key in repeated:
            reason, detail = "duplicate_image", ""
        else:
            continue
        item = pair.sidecar.get("sample_id") or pair.key
        drops[pair.key] = Drop(source=recipe.name, item=str(item), reason=reason, detail=detail)
    return drops


def _report(
    recipe: Recipe, manifest: Manifest, config: LeakageConfig, compared: dict[str, list[Print]],
    external: Sequence[list[Print]],
) -> dict[str, Any]:  # fmt: skip
    """What was compared with what, and what the group ids say on their own."""
    audit = asdict(audit_groups(manifest))
    if not recipe.groups_are_duplicates:  # images of one patient may well have other labels
        audit = {name: value for name, value in audit.items() if not name.startswith("conflict")}
    sets = [
        {"name": split, "kind": "split", "images": len(compared[split])} for split in SPLITS[1:] if split in compared
    ]
    for path, prints in zip(config.against, external, strict=True):
        sets.append({
            "name": ", ".join(sorted({found.home for found in prints})),
            "kind": "dataset" if Path(path).is_dir() else "hash_file", "images": len(prints),
            "sha256": sha256_file(_file_of(path)),
        })  # fmt: skip
    rules = config.model_dump(mode="json", exclude={"mode", "against"})
    return {"mode": config.mode, "rules": rules, "compared_with": sets, "groups": audit}
