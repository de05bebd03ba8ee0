"""Which split an image belongs to, and which images may be in none: what follows from splits, groups and labels alone.

Reads a manifest before any picture is read. Three rules, all over whole groups: a set without splits is dealt by a hash
of the group id, so that a set that grows keeps its old splits; a group in two splits stays in the more held-out one;
and where a group is copies of one picture, copies that carry different labels are all refused, because nobody can know
which label is true.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from biomedclip.errors import ConfigError
from biomedclip.schema import SPLITS, LabelledImage, Manifest, Split
from data_builders.labels.recipe import Recipe, SplitRule


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAudit:
    """Groups that break a rule, counted over a whole manifest, dropped or not."""

    groups: int
    """Distinct group ids."""
    crossing_groups: int
    """Groups in more than one split."""
    crossing_images: int
    """All images of those groups, on either side."""
    conflict_groups: int
    """Groups whose images carry different labels."""
    conflict_images: int


def split_of(row: LabelledImage) -> Split:
    """The row's split; a row without one counts as training."""
    for split in SPLITS:
        if row.split == split:
            return split
    return "train"


def assign_splits(recipe: Recipe, manifest: Manifest) -> Manifest:
    """The manifest with the splits of the recipe's rule. Raises ConfigError where an image to be dealt has no group."""
    if (rule := recipe.split) is None:
        return manifest
    dealt = [row for row in manifest.rows if _is_dealt(rule, row)]
    if rule.by == "group" and (lost := [row.sample_id for row in dealt if row.group_id is None]):
        raise ConfigError(
            f"recipe {recipe.name}: split", f"needs the group of each image, and {len(lost)} have none",
            found=lost[0],
            todo="give the layout a group (patient, slide, field), or by: image where each image is of another patient",
        )  # fmt: skip
    rows = tuple(
        replace(row, split=_draw_split(recipe.name, rule, row)) if _is_dealt(rule, row) else row
        for row in manifest.rows
    )
    return replace(manifest, rows=rows)


def group_homes(manifest: Manifest) -> Mapping[str, Split]:
    """Group -> the split its rows may stay in: the most held-out one it occurs in."""
    homes: dict[str, Split] = {}
    for row in manifest.rows:
        if row.group_id is not None:
            homes[row.group_id] = max(split_of(row), homes.get(row.group_id, "train"), key=SPLITS.index)
    return homes


def conflicting_groups(rows: Iterable[LabelledImage]) -> set[str]:
    """Groups whose rows carry different labels."""
    said: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for row in rows:
        if row.group_id is not None:
            said[row.group_id].add(tuple(sorted(row.labels)))
    return {group for group, labels in said.items() if len(labels) > 1}


def audit_groups(manifest: Manifest) -> GroupAudit:
    """What is wrong with the groups of a manifest, in numbers."""
    sizes = Counter(row.group_id for row in manifest.rows if row.group_id is not None)
    splits: dict[str, set[str]] = defaultdict(set)
    for row in manifest.rows:
        if row.group_id is not None:
            splits[row.group_id].add(split_of(row))
    crossing = [group for group, found in splits.items() if len(found) > 1]
    conflicting = conflicting_groups(manifest.rows)
    return GroupAudit(
        groups=len(sizes),
        crossing_groups=len(crossing), crossing_images=sum(sizes[group] for group in crossing),
        conflict_groups=len(conflicting), conflict_images=sum(sizes[group] for group in conflicting),
    )  # fmt: skip


def _is_dealt(rule: SplitRule, row: LabelledImage) -> bool:
    return rule.of == "all" or row.split is None or (rule.of == "train" and split_of(row) == "train")


def _draw_split(name: str, rule: SplitRule, row: LabelledImage) -> Split:
    owner = row.group_id if rule.by == "group" else row.sample_id
    digest = hashlib.sha256(f"{name}\n{rule.seed}\n{owner}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < rule.test:
        return "test"
    return "val" if place < rule.test + rule.val else "train"
