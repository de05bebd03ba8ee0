"""A recipe and a manifest to pairs: every row becomes a Pair with K captions, or a Drop with its reason.

Reads rows in order of sample id, the pictures through `biomedclip.layouts` and `biomedclip.images`, the captions from
`captions.py`; yields `Pair | Drop`, one for each row of the chosen splits and for each file the layout had to leave
out. Labels, label ids, group, split and the recipe's hash travel with the pair, so that a data set can be audited,
balanced and given soft targets after it was written. A group that lies in two splits would leak: the rows on the
training side are dropped, not the held-out ones.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from biomedclip.errors import ConfigError, DataError
from biomedclip.files import sha256_file, sha256_json
from biomedclip.images import BadImage, check_image
from biomedclip.layouts import read_bytes, read_manifest
from biomedclip.schema import SPLITS, Drop, LabelledImage, Manifest, Pair, Split
from data_builders.labels.captions import Refused, Speech, caption_row, prepare_speech
from data_builders.labels.fields import label_fields
from data_builders.labels.recipe import Recipe, layout_options, recipe_sha256

_MAX_KEY = 80


def read_labelled_set(recipe: Recipe, root: str | Path) -> Manifest:
    """The manifest of a recipe's data in `root`, label ids in the recipe's order.

    Raises DataError for data that is not what the recipe describes, ConfigError for a layout that is not.
    """
    manifest = read_manifest(recipe.layout["type"], root, name=recipe.name, **layout_options(recipe))
    return label_fields(recipe, manifest) if recipe.kind == "multi_field" else manifest


def check_expected(recipe: Recipe, manifest: Manifest) -> None:
    """Raise DataError where the counts of a split are not those of the recipe's `expect`, or more than those."""
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
    recipe: Recipe, manifest: Manifest, *, splits: Collection[str] | None = None
) -> Iterator[Pair | Drop]:
    """One Pair or Drop for each row of `splits` (None: all), after the drops of the layout itself.

    Rows without a split count as train. Raises ConfigError for a split the set does not have or a manifest of another
    kind, DataError where the counts are not the expected ones; a row never raises.
    """
    _check_kind(recipe, manifest)
    _check_splits(manifest, splits)
    check_expected(recipe, manifest)
    speech, digest, used = prepare_speech(recipe), recipe_sha256(recipe)[:16], set[str]()
    homes = _group_homes(manifest)
    yield from manifest.drops
    for row in chosen_rows(manifest, splits):
        split = _split(row)
        try:
            if row.group_id is not None and homes[row.group_id] != split:
                raise Refused("group_in_two_splits", f"{row.group_id} is also in {homes[row.group_id]}")
            yield _pair(speech, manifest, row, split, digest, used)
        except (Refused, BadImage) as refusal:
            yield Drop(source=recipe.name, item=row.sample_id, reason=refusal.reason, detail=refusal.detail)
        except DataError as error:
            # The row's own words may hold this machine's path, which the ledger must not depend on.
            yield Drop(source=recipe.name, item=row.sample_id, reason="unreadable_image", detail=error.wrong)


def chosen_rows(manifest: Manifest, splits: Collection[str] | None) -> list[LabelledImage]:
    """The rows of these splits, in the manifest's order."""
    return [row for row in manifest.rows if splits is None or _split(row) in splits]


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
            "licence_evidence": recipe.licence.evidence,
        },
        "attribution": [{
            "name": recipe.title, "citation": recipe.citation, "licence": recipe.licence.code,
            "url": recipe.licence.url or "",
        }],
    }  # fmt: skip


def sample_key(recipe: str, split: str, sample_id: str, used: set[str]) -> str:
    """`<recipe>-<split>-<slug>`, made unique among `used`, to which it is added.

    The slug is the sample id without its split and suffix; one that is too long, or that another sample id already
    turned into, ends in a hash of the sample id.
    """
    prefix = f"{recipe}-{split}-"
    stem = re.sub(r"\.[A-Za-z0-9]{1,5}$", "", sample_id)
    stem = stem.removeprefix(f"{split}/")
    slug = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-") or "image"
    key, attempt = f"{prefix}{slug}", 0
    while len(key) > _MAX_KEY or key in used:
        digest = hashlib.sha256(f"{sample_id}\n{attempt}".encode()).hexdigest()[:10]
        key = f"{prefix}{slug[: _MAX_KEY - len(prefix) - 11]}-{digest}"
        attempt += 1
    used.add(key)
    return key


def _pair(speech: Speech, manifest: Manifest, row: LabelledImage, split: Split, digest: str, used: set[str]) -> Pair:
    """The row's pair. Raises Refused, BadImage or DataError."""
    recipe = speech.recipe
    facts, captions = caption_row(speech, row)
    image = check_image(read_bytes(manifest, row))
    return Pair(
        key=sample_key(recipe.name, split, row.sample_id, used),
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
        group_id=row.group_id,
        flags=image.flags,
        sidecar={
            "sample_id": row.sample_id, "label_kind": recipe.kind, "negatives": list(facts.negative),
            "uncertain": list(row.uncertain), "recipe": recipe.name, "recipe_sha256": digest,
        },
    )  # fmt: skip


def _split(row: LabelledImage) -> Split:
    for split in SPLITS:
        if row.split == split:
            return split
    return "train"


def _group_homes(manifest: Manifest) -> Mapping[str, str]:
    """Group -> the split its rows may stay in: the most held-out one it occurs in."""
    homes: dict[str, str] = {}
    for row in manifest.rows:
        if row.group_id is not None:
            homes[row.group_id] = max(_split(row), homes.get(row.group_id, "train"), key=SPLITS.index)  # type: ignore[arg-type]
    return homes


def _check_kind(recipe: Recipe, manifest: Manifest) -> None:
    one = manifest.kind if manifest.kind in ("multi", "caption") else "single"
    if one != {"multi": "multi", "multi_field": "multi", "caption": "caption"}.get(recipe.kind, "single"):
        raise ConfigError(f"recipe {recipe.name}: kind", f"is {recipe.kind}, the data set's labels are not",
                          found=manifest.kind, todo="change kind, or the layout's label options")  # fmt: skip
    if unknown := [label for label in manifest.classes if label not in recipe.labels]:
        raise ConfigError(f"recipe {recipe.name}: classes", "do not hold a label of the data",
                          found=", ".join(unknown[:5]), todo="add it")  # fmt: skip


def _check_splits(manifest: Manifest, splits: Collection[str] | None) -> None:
    there: Sequence[str] = [split for split in SPLITS if any(_split(row) == split for row in manifest.rows)]
    for split in splits or ():
        if split not in there:
            raise ConfigError("source.splits", f"'{split}' is no split of {manifest.name}", found=", ".join(there),
                              todo="name splits that it has")  # fmt: skip
