"""Recipes and compiled sets in a few lines of text, for the command line and the dataset card.

Reads recipes, or what the compiler left in a manifest's provenance, and yields plain lines. Imports nothing that a
table of names does not need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from data_builders.labels.recipe import Recipe, load_recipe, recipe_names

_MAX_CLASSES = 8
"""Classes named in one line; a set of 165 is a page."""


def recipes_table() -> str:
    """The recipes of the project as aligned plain text: name, modality, kind, images, licence, access, verified."""
    rows = [("name", "modality", "kind", "images", "licence", "access", "verified")]
    for name in recipe_names():
        recipe = load_recipe(name)
        rows.append((
            name, recipe.modality, recipe.kind, _images(recipe), recipe.licence.code,
            recipe.access.kind if recipe.access else "-", _verified(recipe),
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", "verified: classes and layout, and (if counted) the number of images, were compared "
                      "with the data or its publisher's own words"])  # fmt: skip


def compiled_lines(provenance: Mapping[str, Any]) -> Iterator[str]:
    """What classes, captions, balance and leakage of a compiled set come to; nothing for a set of another kind."""
    if (balance := provenance.get("balance")) is not None:
        yield from balance_lines(balance)
    if (leakage := provenance.get("leakage")) is not None:
        yield from leakage_lines(leakage)


def balance_lines(balance: Mapping[str, Any]) -> Iterator[str]:
    """Class counts of the training images and what they do to a batch, before and after balancing."""
    mode, counts, batch = balance["mode"], balance["class_counts"], balance["batch_size"]
    is_balanced = mode != "none" or "cap" in balance
    yield f"classes    {_counts(counts['before'])}"
    if is_balanced:
        yield f"balanced   {_counts(counts['after'])} ({mode}, where a training source says balance: weights)"
    for name in ("before", "after") if is_balanced else ("before",):
        entropy, collisions = balance["caption_entropy_bits"][name], balance["collisions"][name]
        yield (
            f"captions   {entropy:.2f} bits of entropy{f' {name} balancing' if is_balanced else ''}; of a batch of "
            f"{batch}, {collisions['same_labels']:.1f} others have the same labels and "
            f"{collisions['same_caption']:.1f} the same caption"
        )


def leakage_lines(leakage: Mapping[str, Any]) -> Iterator[str]:
    """What was compared with what, and what was found."""
    if leakage["mode"] == "off":
        yield "leakage    not looked for (leakage.mode is off)"
        return
    groups, found = leakage["groups"], leakage["found"]
    if groups["groups"]:
        text = f"{groups['crossing_groups']:,} of {groups['groups']:,} groups lie in two splits "
        text += f"({groups['crossing_images']:,} images)"
        if "conflict_groups" in groups:
            text += f", {groups['conflict_groups']:,} carry two labels ({groups['conflict_images']:,} images)"
        yield f"groups     {text}"
    others = ", ".join(f"{entry['name']} ({entry['images']:,})" for entry in leakage["compared_with"])
    if others:
        yield (
            f"leakage    compared with {others}: {found['group']:,} by group, {found['pixels']:,} by pixels, "
            f"{found['near']:,} by perceptual hash"
        )
    else:
        yield "leakage    nothing held out to compare with; name evaluation sets in leakage.against"


def _counts(counts: Mapping[str, float]) -> str:
    largest = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    shown = ", ".join(f"{label or 'no label'} {count:,.0f}" for label, count in largest[:_MAX_CLASSES])
    rest = len(largest) - _MAX_CLASSES
    return f"{shown}, and {rest} more" if rest > 0 else shown


def _images(recipe: Recipe) -> str:
    """The number of images the recipe expects; for a multi-label set its counts of labels do not say it."""
    expect = recipe.expect
    if expect is None:
        return "-"
    if expect.images:
        return f"{sum(expect.images.values()):,}"
    if expect.counts and recipe.kind in ("single", "ordinal"):
        return f"{sum(sum(counts.values()) for counts in expect.counts.values()):,}"
    return "-"


def _verified(recipe: Recipe) -> str:
    if recipe.verified and recipe.expect and not recipe.expect.verified:
        return "not the number"
    return "yes" if recipe.verified else "no"
