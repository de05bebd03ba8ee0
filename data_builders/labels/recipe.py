"""A recipe: what a labelled image set is, and the words that turn its labels into captions.

Reads one YAML file of `recipes/` (or of the user) and yields a frozen `Recipe`, checked to the last key and the last
placeholder. A recipe names no folder: where the images lie is said when it is compiled. Its words are templates and
class names written by people, so that a caption never says more than the label does; what a caption says of an image is
decided in `captions.py`.

Placeholders of a template: `{x}` a class name or synonym, `{a_x}` the same with its article, `{list}` several of them,
`{definition}` what the class looks like, `{modality}`, and every column named in the layout's `attributes`. Templates
of negative and uncertain findings take several classes in `{x}`, joined by "or".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from biomedclip.config import Config, load_config
from biomedclip.errors import ConfigError
from biomedclip.files import sha256_json
from biomedclip.schema import SPLITS

PLACEHOLDER = re.compile(r"\{([a-z][a-z0-9_]*)\}")

_ALLOWED = {
    "single": {"x", "a_x", "definition", "modality"},
    "many": {"list", "modality"},
    "negative": {"x", "a_x", "modality"},
    "uncertain": {"x", "a_x", "modality"},
    "none": {"modality"},
}
_NEEDED = {"single": {"x", "a_x", "definition"}, "many": {"list"}, "negative": {"x", "a_x"}, "uncertain": {"x", "a_x"}}


class ClassEntry(Config):
    """One class: its label in the data, and the words for it."""

    label: str = Field(min_length=1)
    """As the manifest spells it."""
    name: str = Field(min_length=1)
    """As a sentence spells it: `red blood cell`."""
    synonyms: tuple[str, ...] = ()
    definition: str | None = None
    """What such an image shows, as a phrase: `only few microaneurysms`."""
    parents: tuple[str, ...] = ()
    """Labels of wider classes of the same recipe, which a caption may add; it never goes the other way."""
    countable: bool = True
    """Whether `{a_x}` puts an article before it: a platelet, but pneumonia."""

    @property
    def forms(self) -> tuple[str, ...]:
        """The name and its synonyms."""
        return (self.name, *self.synonyms)


class Templates(Config):
    """Sentences with placeholders, by what is known of an image."""

    single: tuple[str, ...] = Field(min_length=1)
    """One class holds."""
    many: tuple[str, ...] = ()
    """Several classes hold."""
    negative: tuple[str, ...] = ()
    """Classes stated not to hold; a sentence after the first, or the only one."""
    uncertain: tuple[str, ...] = ()
    """Classes stated to be uncertain, under the policy `hedge`."""
    none: tuple[str, ...] = ()
    """Every class is stated not to hold."""


class Compose(Config):
    """How much of what is known one caption of a multi-label image says."""

    max_positive: int = Field(default=4, ge=1)
    max_negative: int = Field(default=2, ge=1)
    max_uncertain: int = Field(default=2, ge=1)
    negative_rate: float = Field(default=0.3, ge=0, le=1)
    """Share of the captions with a positive or uncertain finding that also name findings which are stated absent."""
    parent_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of the class names that are followed by a wider class."""
    shuffle: bool = True
    """Name several classes in changing order; otherwise in that of the recipe."""


class LicenceStatement(Config):
    """The licence of images and labels, and where that is stated."""

    code: str = Field(min_length=1)
    """As in `biomedclip.licences`: `CC BY`, `MIT`; another word, such as `not stated`, belongs to no open preset."""
    evidence: str = Field(min_length=1)
    url: str | None = None


class Expect(Config):
    """How many images of each class the set holds, per split; a set that differs is not the one described here."""

    counts: dict[str, dict[str, int]]
    """Split -> label -> number of images with that label."""
    verified: bool = False
    """Whether the numbers were counted in the data, rather than read in a publication."""


class Recipe(Config):
    """One labelled set as captions."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    """Begins every sample key, and is the pairs' `source`."""
    title: str = Field(min_length=1)
    modality: str = Field(min_length=1)
    modality_synonyms: tuple[str, ...] = ()
    """Other words a caption may use for the modality."""
    layout: dict[str, Any]
    """`type` names a layout of `biomedclip.layouts`, the other keys are its options."""
    kind: Literal["single", "multi", "ordinal"]
    classes: tuple[ClassEntry, ...] = Field(min_length=1)
    """In label-id order."""
    templates: Templates
    uncertain: Literal["hedge", "positive", "negative", "drop"] = "drop"
    """What an uncertain label counts as: a hedged sentence, a positive, a negative, or nothing said at all."""
    compose: Compose = Compose()
    captions_per_image: int = Field(default=6, ge=1, le=100)
    banned: tuple[str, ...] = ()
    """Labels held out for zero-shot tests: no image of theirs is kept and no caption names them."""
    licence: LicenceStatement
    citation: str = Field(min_length=1)
    seed: int = 0
    expect: Expect | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels in label-id order."""
        return tuple(entry.label for entry in self.classes)

    @property
    def modality_forms(self) -> tuple[str, ...]:
        """The modality and its synonyms."""
        return (self.modality, *self.modality_synonyms)

    @property
    def attributes(self) -> tuple[str, ...]:
        """Columns that templates may speak of."""
        return tuple(self.layout.get("attributes", ()))

    @model_validator(mode="after")
    def _check(self) -> Self:
        for problem in _problems(self):
            raise ValueError(problem)
        return self


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe of the project with this name, or of this file.

    Raises ConfigError for an unknown name (with the nearest known one) and for every mistake in the file.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")) or "/" in text or "\\" in text:
        return load_config(Path(text).expanduser(), Recipe)
    known = recipe_names()
    if text not in known:
        near = difflib.get_close_matches(text, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(known)}, or the path of a .yaml file"
        raise ConfigError("recipe", "is no recipe of this project", found=repr(text), todo=hint)
    return load_config(_folder() / f"{text}.yaml", Recipe)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the project, sorted."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def recipe_sha256(recipe: Recipe) -> str:
    """Hex sha256 of the recipe's values, whatever the file's comments and order of keys."""
    return sha256_json(recipe.model_dump(mode="json"))


def all_ancestors(recipe: Recipe) -> dict[str, frozenset[str]]:
    """Label -> every wider class, through all levels. Needs parents without a cycle."""
    parents = {entry.label: entry.parents for entry in recipe.classes}
    found: dict[str, frozenset[str]] = {}

    def climb(label: str) -> frozenset[str]:
        if label not in found:
            found[label] = frozenset(parents[label]).union(*(climb(parent) for parent in parents[label]))
        return found[label]

    return {label: climb(label) for label in parents}


def _folder() -> Path:
    return Path(str(resources.files("data_builders"))) / "labels" / "recipes"


def _problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong between the keys of a recipe; pydantic has checked each for itself."""
    if not isinstance(recipe.layout.get("type"), str):
        yield "layout needs a type"
    if reserved := set(recipe.attributes) & set().union(*_ALLOWED.values()):
        yield f"layout.attributes: '{sorted(reserved)[0]}' is a placeholder of its own; rename the column"
    repeated = {label for label in recipe.labels if recipe.labels.count(label) > 1}
    if repeated:
        yield f"classes: label '{sorted(repeated)[0]}' appears twice"
    for where, label in _named_labels(recipe):
        if label not in recipe.labels:
            near = difflib.get_close_matches(label, recipe.labels, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"labels: {', '.join(recipe.labels)}"
            yield f"{where} names the unknown label '{label}'; {hint}"
    if (cycle := _cycle(recipe)) is not None:
        yield f"classes: '{cycle}' is its own ancestor"
    if set(recipe.banned) >= set(recipe.labels):
        yield "banned leaves no class"
    for split in recipe.expect.counts if recipe.expect else ():
        if split not in SPLITS:
            yield f"expect.counts: '{split}' is no split; use {', '.join(SPLITS)}"
    yield from _template_problems(recipe)


def _named_labels(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(where, label) of every place that names a label of the recipe."""
    for entry in recipe.classes:
        yield from ((f"classes.{entry.label}.parents", parent) for parent in entry.parents)
    yield from (("banned", label) for label in recipe.banned)
    for split, counts in (recipe.expect.counts if recipe.expect else {}).items():
        yield from ((f"expect.counts.{split}", label) for label in counts)


def _cycle(recipe: Recipe) -> str | None:
    """A label that is among its own ancestors; unknown parents have been reported by then."""
    parents = {entry.label: set(entry.parents) for entry in recipe.classes}
    for label, wider in parents.items():
        seen: set[str] = set()
        while wider:
            seen |= wider
            wider = set().union(*(parents.get(parent, set()) for parent in wider)) - seen
        if label in seen:
            return label
    return None


def _template_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.kind == "multi":
        needed = {"many": True, "negative": False, "uncertain": recipe.uncertain == "hedge"}
        for part, is_needed in needed.items():
            if is_needed and not getattr(recipe.templates, part):
                yield f"templates.{part} is empty, and a multi-label recipe that says so needs one"
    for part, allowed in _ALLOWED.items():
        allowed = allowed | set(recipe.attributes)
        for number, template in enumerate(getattr(recipe.templates, part)):
            used = set(PLACEHOLDER.findall(template))
            for name in sorted(used - allowed):
                near = difflib.get_close_matches(name, sorted(allowed), n=1)
                hint = f"did you mean '{{{near[0]}}}'?" if near else f"known: {', '.join(sorted(allowed))}"
                yield f"templates.{part}[{number}] has the unknown placeholder '{{{name}}}'; {hint}"
            if re.search(r"[{}]", PLACEHOLDER.sub("", template)):
                yield f"templates.{part}[{number}] has a brace that is no placeholder: {template!r}"
            if part in _NEEDED and not used & _NEEDED[part]:
                yield f"templates.{part}[{number}] names no class; use {{{sorted(_NEEDED[part])[-1]}}}"
    yield from _unspeakable(recipe)


def _unspeakable(recipe: Recipe) -> Iterator[str]:
    """Classes for which every template needs what they or some images lack; silence would be found only while built."""
    optional = set(recipe.attributes)
    for part in ("single", "many", "negative", "uncertain", "none"):
        templates = getattr(recipe.templates, part)
        if templates and all(set(PLACEHOLDER.findall(template)) & optional for template in templates):
            yield f"templates.{part} has only templates with an attribute; add one without, for images that lack it"
    plain = [
        template for template in recipe.templates.single
        if not set(PLACEHOLDER.findall(template)) & (optional | {"definition"})
    ]  # fmt: skip
    for entry in recipe.classes:
        if not plain and entry.definition is None:
            yield f"templates.single all need a definition, and '{entry.label}' has none"
