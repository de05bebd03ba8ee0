"""The labels of a multi-field set, which are spread over several columns of its table.

Reads a manifest whose rows carry the columns as attributes and yields the same manifest with labels `organ=knee`,
`finding=tear`, so that everything after (balance, soft targets, leakage) meets labels as of any other set. A cell that
names no class of its field is a dropped row with the nearest class in its detail, not an error: in a set of a million
images one misspelt cell should not end the build.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace

from biomedclip.errors import ConfigError
from biomedclip.layouts.manifest import make_manifest
from biomedclip.schema import Drop, Manifest
from data_builders.labels.captions import Refused
from data_builders.labels.recipe import FieldEntry, Recipe


def label_fields(recipe: Recipe, manifest: Manifest) -> Manifest:
    """The manifest with the labels of the recipe's fields, kind multi; rows without a readable one become drops.

    Raises ConfigError where the layout gives no such column at all.
    """
    known = {column for row in manifest.rows for column in row.attributes}
    for field in recipe.fields:
        if field.source not in known:
            raise ConfigError(
                f"recipe {recipe.name}: fields.{field.name}", f"is read from the column '{field.source}', which the "
                "layout does not give", found=", ".join(sorted(known)) or "none",
                todo="name it in layout.attributes",
            )  # fmt: skip
    rows, drops = [], list(manifest.drops)
    for row in manifest.rows:
        try:
            rows.append(replace(row, labels=field_labels(recipe, row.attributes)))
        except Refused as refusal:
            drops.append(Drop(source=recipe.name, item=row.sample_id, reason=refusal.reason, detail=refusal.detail))
    return make_manifest(manifest.name, manifest.root, rows, kind="multi", classes=recipe.labels, drops=drops,
                         content=[manifest.sha256])  # fmt: skip


def field_labels(recipe: Recipe, attributes: Mapping[str, str]) -> tuple[str, ...]:
    """Labels of one row, in the order of the fields. Raises Refused `missing_field` and `unknown_label`."""
    labels = []
    for field in recipe.fields:
        value = attributes.get(field.source, "").strip()
        if value:
            labels.append(f"{field.name}={_find_class(field, value)}")
        elif not field.optional:
            raise Refused("missing_field", field.name)
    return tuple(labels)


def _find_class(field: FieldEntry, value: str) -> str:
    known = [entry.label for entry in field.classes]
    if value in known:
        return value
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise Refused("unknown_label", f"{field.name} {value!r}{hint}")
