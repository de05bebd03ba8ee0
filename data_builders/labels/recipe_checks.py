"""What is wrong between the keys of a recipe; pydantic has checked each key for itself.

Reads a recipe that is well formed key by key and yields one line a mistake, of which the first becomes the error. Every
mistake that would otherwise be met while a set is compiled is met here: unknown labels, placeholders nobody fills, and
classes for which no sentence can be made.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from biomedclip.schema import SPLITS

if TYPE_CHECKING:
    from data_builders.labels.recipe import ClassEntry, Recipe

PLACEHOLDER = re.compile(r"\{([a-z][a-z0-9_]*)\}")
PARTS = ("single", "many", "negative", "uncertain", "none")

_ALLOWED = {
    "single": {"x", "a_x", "definition", "modality"},
    "many": {"list", "modality"},
    "negative": {"x", "a_x", "modality"},
    "uncertain": {"x", "a_x", "modality"},
    "none": {"modality"},
}
_NEEDED = {"single": {"x", "a_x", "definition"}, "many": {"list"}, "negative": {"x", "a_x"}, "uncertain": {"x", "a_x"}}
_RESERVED = {"x", "a_x", "list", "definition", "modality", "text"}
_PERSONAL = re.compile(r"patient|person|name|birth|mrn|accession|(?:^|_)(?:id|uid)s?$|address|phone", re.IGNORECASE)
"""Columns that may identify a person and so are never spoken of; `sex` and `age` are not among them."""


def recipe_problems(recipe: Recipe) -> Iterator[str]:
    """One line a mistake, the plainest first."""
    yield from _shape_problems(recipe)
    yield from _label_problems(recipe)
    yield from _statement_problems(recipe)
    yield from _split_problems(recipe)
    if recipe.kind == "caption":
        yield from _placeholder_problems(recipe, "single", {"text", "modality"}, {"text"})
        return
    yield from _template_problems(recipe)
    yield from _paraphrase_problems(recipe)


def _shape_problems(recipe: Recipe) -> Iterator[str]:
    """Keys that a kind needs or cannot have."""
    if not isinstance(recipe.layout.get("type"), str):
        yield "layout needs a type"
    kind = recipe.kind
    if recipe.fields and kind != "multi_field":
        yield f"fields belong to the kind multi_field, and this is {kind}"
    if kind == "multi_field" and (not recipe.fields or recipe.classes):
        yield "a multi_field recipe has fields, each with its classes, and no classes of its own"
    if kind not in ("multi_field", "caption") and not recipe.classes:
        yield f"classes is empty, and the kind {kind} needs them"
    if kind == "caption" and (recipe.classes or recipe.paraphrases or recipe.banned):
        yield "a caption recipe has neither classes nor paraphrases nor bans: its captions come with the images"
    if kind == "multi_field":
        repeated = _repeated([field.name for field in recipe.fields])
        if repeated:
            yield f"fields: '{repeated}' appears twice"
        if all(field.optional for field in recipe.fields):
            yield "fields are all optional; one has to be there for every image"
        for field in recipe.fields:
            if field.name in _RESERVED:
                yield f"fields: '{field.name}' is a placeholder of its own; call the field otherwise"
    if recipe.values and "values" in recipe.layout:
        yield "values is given twice, in the recipe and in layout; keep one"
    taken = _RESERVED.union(name for field in recipe.fields for name in _field_names(field.name))
    if reserved := set(recipe.attributes) & taken:
        yield f"layout.attributes: '{sorted(reserved)[0]}' is a placeholder of its own; rename the column"


def _label_problems(recipe: Recipe) -> Iterator[str]:
    if repeated := _repeated(recipe.labels):
        yield f"classes: label '{repeated}' appears twice"
    for where, label in _named_labels(recipe):
        if label not in recipe.labels:
            yield f"{where} names the unknown label '{label}'; {_nearest(label, recipe.labels, 'labels')}"
    if (cycle := _cycle(recipe.entries)) is not None:
        yield f"classes: '{cycle}' is its own ancestor"
    if recipe.labels and set(recipe.banned) >= set(recipe.labels):
        yield "banned leaves no class"
    for field in recipe.fields:
        if all(f"{field.name}={entry.label}" in recipe.banned for entry in field.classes) and not field.optional:
            yield f"banned leaves no class of the field '{field.name}'"


def _statement_problems(recipe: Recipe) -> Iterator[str]:
    """Counts and facts that are said to be verified."""
    expect = recipe.expect
    for part, splits in (("images", expect.images), ("counts", expect.counts)) if expect else ():
        for split in splits:
            if split not in SPLITS:
                yield f"expect.{part}: '{split}' is no split; use {', '.join(SPLITS)}"
    if expect and not expect.images and not expect.counts:
        yield "expect says neither images nor counts"
    if expect and expect.verified and not expect.source:
        yield "expect.verified needs expect.source: where the numbers were counted or read"
    if recipe.verified and not recipe.source:
        yield "verified needs source: where class names and layout were read"


def _split_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.split is None:
        return
    if not 0 < recipe.split.val + recipe.split.test < 1:
        yield "split holds out nothing or everything; val and test are shares that leave some for training"
    if recipe.groups_are_duplicates and recipe.split.by == "image":
        yield "split.by image would put copies of one picture on both sides; say by: group"


def _named_labels(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(where, label) of every place that names a label of the recipe."""
    for entry in recipe.entries:
        yield from ((f"classes.{entry.label}.parents", parent) for parent in entry.parents)
    yield from (("banned", label) for label in recipe.banned)
    yield from (("paraphrases", label) for label in recipe.paraphrases)
    for split, counts in (recipe.expect.counts if recipe.expect else {}).items():
        yield from ((f"expect.counts.{split}", label) for label in counts)


def _template_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.kind == "multi_field":
        fields = {name for field in recipe.fields for name in _field_names(field.name)}
        yield from _placeholder_problems(recipe, "single", fields | {"modality"}, fields)
        yield from _unspeakable(recipe)
        return
    if not recipe.templates.single:
        yield "templates.single is empty; write a sentence with {x}"
    if recipe.kind == "multi":
        needed = {"many": True, "negative": False, "uncertain": recipe.uncertain == "hedge"}
        for part, is_needed in needed.items():
            if is_needed and not getattr(recipe.templates, part):
                yield f"templates.{part} is empty, and a multi-label recipe that says so needs one"
    for part in PARTS:
        yield from _placeholder_problems(recipe, part, _ALLOWED[part], _NEEDED.get(part, set()))
    yield from _unspeakable(recipe)


def _placeholder_problems(recipe: Recipe, part: str, own: set[str], needed: set[str]) -> Iterator[str]:
    """Unknown placeholders, stray braces, and templates that name no class, of one part."""
    allowed = own | set(recipe.attributes)
    for number, template in enumerate(getattr(recipe.templates, part)):
        where, used = f"templates.{part}[{number}]", set(PLACEHOLDER.findall(template))
        for name in sorted(used - allowed):
            near = difflib.get_close_matches(name, sorted(allowed), n=1)
            hint = f"did you mean '{{{near[0]}}}'?" if near else f"known: {', '.join(sorted(allowed))}"
            yield f"{where} has the unknown placeholder '{{{name}}}'; {hint}"
        if personal := [name for name in sorted(used - own) if _PERSONAL.search(name)]:
            yield f"{where} speaks of '{personal[0]}', which may identify a person; leave it out"
        if re.search(r"[{}]", PLACEHOLDER.sub("", template)):
            yield f"{where} has a brace that is no placeholder: {template!r}"
        if needed and not used & needed:
            yield f"{where} names no class; use {{{sorted(needed)[-1]}}}"


def _unspeakable(recipe: Recipe) -> Iterator[str]:
    """Classes for which every template needs what they or some images lack; silence would be found only while built."""
    missing = set(recipe.attributes) | {
        name for field in recipe.fields if field.optional for name in _field_names(field.name)
    }
    for part in PARTS:
        templates = getattr(recipe.templates, part)
        if templates and all(set(PLACEHOLDER.findall(template)) & missing for template in templates):
            yield f"templates.{part} has only templates with an attribute; add one without, for images that lack it"
    if recipe.kind == "multi_field" and not recipe.templates.single:
        yield f"templates.single is empty; write a sentence with {{{recipe.fields[0].name}}}"
    needs = {"definition"} if recipe.classes else {f"{field.name}_definition" for field in recipe.fields}
    if all(set(PLACEHOLDER.findall(template)) & (missing | needs) for template in recipe.templates.single):
        for entry in recipe.entries:
            if entry.definition is None:
                yield f"templates.single all need a definition, and '{entry.label}' has none"


def _paraphrase_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.paraphrases and recipe.kind == "multi_field":
        yield "paraphrases belong to recipes with classes, not with fields"
    for label, captions in recipe.paraphrases.items():
        for number, caption in enumerate(captions):
            if not caption.strip() or re.search(r"[{}]", caption):
                yield f"paraphrases.{label}[{number}] is empty or has a brace: {caption!r}"


def _field_names(field: str) -> tuple[str, str, str]:
    return field, f"a_{field}", f"{field}_definition"


def _repeated(words: Sequence[str]) -> str | None:
    return min((word for word in words if words.count(word) > 1), default=None)


def _nearest(word: str, known: Iterable[str], what: str) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean '{near[0]}'?" if near else f"{what}: {', '.join(known)}"


def _cycle(entries: Sequence[ClassEntry]) -> str | None:
    """A label that is among its own ancestors; unknown parents have been reported by then."""
    parents = {entry.label: set(entry.parents) for entry in entries}
    for label, wider in parents.items():
        seen: set[str] = set()
        while wider:
            seen |= wider
            wider = set().union(*(parents.get(parent, set()) for parent in wider)) - seen
        if label in seen:
            return label
    return None
