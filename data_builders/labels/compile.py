"""A recipe and a manifest to pairs: every row becomes a Pair with K captions, or a Drop with its reason.

Reads rows in order of sample id, the pictures through `biomedclip.layouts` and `biomedclip.images`, the captions from
`captions.py`; yields `Pair | Drop`, one for each row of the chosen splits and for each file the layout had to leave
out. Labels, label ids, group, split and the recipe's hash travel with the pair, so that a data set can be audited,
balanced and given soft targets after it was written. File names and group ids do not travel unless the recipe says that
they identify nobody: keys and groups are hashes. A row is a pure function of recipe, manifest and file, so any number
of processes gives the same pairs in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from biomedclip.errors import ConfigError, DataError
from biomedclip.files import sha256_file, sha256_json
from biomedclip.images import BadImage, CheckedImage, check_image, store_picture
from biomedclip.images import read_rgb as decode_rgb
from biomedclip.layouts import read_manifest, read_picture
from biomedclip.layouts.manifest import hash_id
from biomedclip.schema import SPLITS, Drop, LabelledImage, Manifest, Pair
from data_builders.contamination import hash_pixels
from data_builders.engines import run_tasks
from data_builders.labels.captions import Refused, Speech, caption_row, prepare_speech
from data_builders.labels.fields import label_fields
from data_builders.labels.recipe import Recipe, layout_options, recipe_sha256
from data_builders.labels.splits import assign_splits, conflicting_groups, group_homes, split_of

_SAFE_DETAILS = ("missing_field", "unknown_label")
"""Reasons of a layout whose details are words of a class column, which a typo is found by."""

_CHUNK = 256
"""Rows a worker is given at a time."""


def read_labelled_set(recipe: Recipe, root: str | Path) -> Manifest:
    """The manifest of a recipe's data in `root`, label ids in the recipe's order, splits dealt where the recipe deals.

    Raises DataError for data that is not what the recipe describes or expects, ConfigError for a layout that is not.
    """
    manifest = read_manifest(recipe.layout["type"], root, name=recipe.name, **layout_options(recipe))
    if recipe.kind == "multi_field":
        manifest = label_fields(recipe, manifest)
    check_expected(recipe, manifest)
    return assign_splits(recipe, manifest)


def check_expected(recipe: Recipe, manifest: Manifest) -> None:
    """Raise DataError where the counts of a given split are not those of the recipe's `expect`, or more than those."""
    if (expect := recipe.expect) is None:
        return
    counts = Counter((row.split or "train", label) for row in manifest.rows for label in row.labels)
    images = Counter(row.split or "train" for row in manifest.rows)
    found = [(split, "images", images[split], number) for split, number in expect.images.items()]
    found += [(split, f"images of '{label}'", counts[split, label], number)
              for split, expected in expect.counts.items() for label, number in expected.items()]  # fmt: skip
    for split, what, number, expected_number in found:
        if number > expected_number or (expect.exact and number < expected_number):
            raise DataError(
                f"{manifest.root}: {split}", f"has not the {expected_number} {what} that recipe '{recipe.name}' "
                "expects", found=str(number), todo="get the whole set, or change expect in a copy of the recipe",
            )  # fmt: skip


def compile_pairs(
    recipe: Recipe,
    manifest: Manifest,
    *,
    splits: Collection[str] | None = None,
    pixels: bool = False,
    workers: int = 1,
) -> Iterator[Pair | Drop]:
    """One Pair or Drop for each row of `splits` (None: all), after the drops of the layout and of whole groups.

    Rows without a split count as train. `pixels` adds the sha256 of the decoded pixels to the sidecars. Raises
    ConfigError for a split the set does not have or a manifest of another kind; a row never raises.
    """
    _check_kind(recipe, manifest)
    _check_splits(manifest, splits)
    for drop in manifest.drops:
        yield _private(recipe, drop)
    rows = []
    for row, refusal in _judge_groups(recipe, manifest, chosen_rows(manifest, splits)):
        if refusal is None:
            rows.append(row)
        else:
            yield _drop(recipe, row, refusal.reason, refusal.detail)
    tasks = [
        _Task(recipe, replace(manifest, rows=tuple(rows[first : first + _CHUNK]), drops=()), pixels)
        for first in range(0, len(rows), _CHUNK)
    ]
    for items in run_tasks(_compile_chunk, tasks, workers=workers, name=_name_task):
        yield from items


def chosen_rows(manifest: Manifest, splits: Collection[str] | None) -> list[LabelledImage]:
    """The rows of these splits, in the manifest's order."""
    return [row for row in manifest.rows if splits is None or split_of(row) in splits]


def fingerprint_set(recipe: Recipe, manifest: Manifest) -> str:
    """Hex sha256 of the recipe, the manifest's rows, and the files: sizes, or the content where one holds many images.

    Sizes only for single images, because hashing a million files costs what building from them costs.
    """
    root, files = Path(manifest.root), {}
    for row in manifest.rows:
        if row.image.path not in files:
            path = root / row.image.path
            if row.image.part is not None and path.is_file():
                files[row.image.path] = sha256_file(path)
            else:
                files[row.image.path] = str(path.stat().st_size) if path.exists() else "missing"
    return sha256_json([recipe_sha256(recipe), manifest.sha256, files])


def describe_set(recipe: Recipe) -> dict[str, Any]:
    """What a dataset's manifest says of the recipe it was compiled from: hash, kind, classes, attribution."""
    return {
        "recipe": {
            "name": recipe.name, "title": recipe.title, "sha256": recipe_sha256(recipe), "kind": recipe.kind,
            "classes": {entry.label: entry.name for entry in recipe.entries}, "banned": list(recipe.banned),
            "licence_evidence": recipe.licence.evidence, "public_ids": recipe.public_ids,
        },
        "attribution": [{
            "name": recipe.title, "citation": recipe.citation, "licence": recipe.licence.code,
            "url": recipe.licence.url or "",
        }],
    }  # fmt: skip


def sample_key(recipe: str, split: str, sample_id: str) -> str:
    """`<recipe>-<split>-<16 hex digits>`, the digits a hash of recipe name and sample id.

    A key says nothing of the file's name and stays the same when the set grows. 64 bits: ten million samples have two
    equal keys with a chance of 3 in a million, and then the writer says so.
    """
    return f"{recipe}-{split}-{hash_id(recipe, sample_id)}"


def key_names(recipe: Recipe, manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    """(key, sample id, group) of every row and every file left out, for those who hold the data and look for one."""
    for drop in manifest.drops:
        yield _private_name(recipe, drop.item), drop.item, ""
    for row in manifest.rows:
        yield sample_key(recipe.name, split_of(row), row.sample_id), row.sample_id, row.group_id or ""


def group_name(recipe: Recipe, group_id: str | None) -> str | None:
    """A group id as it leaves the compiler: hashed, unless the recipe's ids are public."""
    return group_id if recipe.public_ids or group_id is None else hash_id(recipe.name, group_id)


def read_checked(manifest: Manifest, row: LabelledImage, *, pixels: bool) -> tuple[CheckedImage, str | None]:
    """The row's picture, ready to be stored, and the sha256 of its pixels where asked. Raises BadImage, DataError."""
    picture = read_picture(manifest, row)
    if not isinstance(picture, bytes):
        return store_picture(picture), hash_pixels(np.asarray(picture.convert("RGB"))) if pixels else None
    image = check_image(picture)
    return image, hash_pixels(np.asarray(decode_rgb(image.data, row.sample_id))) if pixels else None


@dataclass(frozen=True, slots=True)
class _Task:
    """Some rows of a manifest, as a worker process is handed them."""

    recipe: Recipe
    manifest: Manifest
    pixels: bool


def _name_task(task: _Task) -> str:
    return f"{task.manifest.name}: {len(task.manifest.rows)} images"


def _compile_chunk(task: _Task) -> list[Pair | Drop]:
    speech, digest = prepare_speech(task.recipe), recipe_sha256(task.recipe)[:16]
    return [_compile_row(speech, task, row, digest) for row in task.manifest.rows]


def _compile_row(speech: Speech, task: _Task, row: LabelledImage, digest: str) -> Pair | Drop:
    try:
        return _pair(speech, task, row, digest)
    except (Refused, BadImage) as refusal:
        return _drop(task.recipe, row, refusal.reason, refusal.detail)
    except DataError as error:
        # The row's own words may hold this machine's path, which the ledger must not depend on.
        return _drop(task.recipe, row, "unreadable_image", error.wrong)


def _pair(speech: Speech, task: _Task, row: LabelledImage, digest: str) -> Pair:
    """The row's pair. Raises Refused, BadImage or DataError."""
    recipe, split = speech.recipe, split_of(row)
    facts, captions = caption_row(speech, row)
    image, pixels = read_checked(task.manifest, row, pixels=task.pixels)
    return Pair(
        key=sample_key(recipe.name, split, row.sample_id),
        image=image.data,
        image_format=image.format,
        width=image.width,
        height=image.height,
        caption=captions[0],
        captions=captions,
        source=recipe.name,
        licence=recipe.licence.code,
        sha256=image.sha256,
        phash=image.phash,
        split=split,
        modality=recipe.modality,
        labels=facts.positive,
        label_ids=tuple(speech.label_ids[label] for label in facts.positive),
        group_id=group_name(recipe, row.group_id),
        flags=image.flags,
        sidecar={
            "sample_id": row.sample_id if recipe.public_ids else None, "label_kind": recipe.kind,
            "negatives": list(facts.negative), "uncertain": list(row.uncertain), "recipe": recipe.name,
            "recipe_sha256": digest, "pixels_sha256": pixels,
        },
    )  # fmt: skip


def _judge_groups(
    recipe: Recipe, manifest: Manifest, rows: Sequence[LabelledImage]
) -> Iterator[tuple[LabelledImage, Refused | None]]:
    """Each row, and why it goes because of the company it keeps."""
    homes = group_homes(manifest)
    conflicting = conflicting_groups(manifest.rows) if recipe.groups_are_duplicates else set[str]()
    for row in rows:
        shown = group_name(recipe, row.group_id)
        if row.group_id in conflicting:
            yield row, Refused("label_conflict", f"copies in {shown} carry other labels")
        elif row.group_id is not None and homes[row.group_id] != split_of(row):
            yield row, Refused("group_in_two_splits", f"{shown} is also in {homes[row.group_id]}")
        else:
            yield row, None


def _drop(recipe: Recipe, row: LabelledImage, reason: str, detail: str) -> Drop:
    item = row.sample_id if recipe.public_ids else sample_key(recipe.name, split_of(row), row.sample_id)
    return Drop(source=recipe.name, item=item, reason=reason, detail=detail)


def _private(recipe: Recipe, drop: Drop) -> Drop:
    """A layout's drop without the names in it, unless those are public."""
    if recipe.public_ids:
        return drop
    detail = drop.detail if drop.reason in _SAFE_DETAILS else ""
    return Drop(source=drop.source, item=_private_name(recipe, drop.item), reason=drop.reason, detail=detail)


def _private_name(recipe: Recipe, item: str) -> str:
    return f"{recipe.name}-{hash_id(recipe.name, item)}"


def _check_kind(recipe: Recipe, manifest: Manifest) -> None:
    one = manifest.kind if manifest.kind in ("multi", "caption") else "single"
    if one != {"multi": "multi", "multi_field": "multi", "caption": "caption"}.get(recipe.kind, "single"):
        raise ConfigError(f"recipe {recipe.name}: kind", f"is {recipe.kind}, the data set's labels are not",
                          found=manifest.kind, todo="change kind, or the layout's label options")  # fmt: skip
    if unknown := [label for label in manifest.classes if label not in recipe.labels]:
        raise ConfigError(f"recipe {recipe.name}: classes", "do not hold a label of the data",
                          found=", ".join(unknown[:5]), todo="add it")  # fmt: skip


def _check_splits(manifest: Manifest, splits: Collection[str] | None) -> None:
    there: Sequence[str] = [split for split in SPLITS if any(split_of(row) == split for row in manifest.rows)]
    for split in splits or ():
        if split not in there:
            raise ConfigError("source.splits", f"'{split}' is no split of {manifest.name}", found=", ".join(there),
                              todo="name splits that it has")  # fmt: skip
