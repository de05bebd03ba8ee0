"""A recipe: what a labelled image set is, and the words that turn its labels into captions.

Reads one YAML file of `recipes/` (or of the user) and yields a frozen `Recipe`, checked to the last key and the last
placeholder (`recipe_checks.py`). A recipe names no folder: where the images lie is said when it is compiled. Its words
are templates and class names written by people, so that a caption never says more than the label does; what a caption
says of an image is decided in `captions.py`. Paraphrases made offline by whatever means are read from a file beside the
recipe and become part of its identity; nothing is ever generated while a set is compiled.

Placeholders of a template: `{x}` a class name or synonym, `{a_x}` the same with its article, `{list}` several of them,
`{definition}` what the class looks like, `{modality}`, and every column named in the layout's `attributes`. Templates
of negative and uncertain findings take several classes in `{x}`, joined by "or". A recipe of several fields has
`{organ}`, `{a_organ}` and `{organ_definition}` for a field `organ`; one of ready captions has `{text}`.
"""

from __future__ import annotations

import difflib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from biomedclip.config import Config, check_config, read_yaml
from biomedclip.errors import ConfigError
from biomedclip.files import sha256_json
from data_builders.labels.recipe_checks import recipe_problems

State = Literal["positive", "negative", "uncertain", "unmentioned"]
Region = Literal[
    "abdomen", "blood", "bone", "bowel", "brain", "breast", "cervix", "chest", "eye", "heart", "joint", "kidney",
    "liver", "lymph", "nerve", "parasite", "pelvis", "prostate", "skin", "spine", "thyroid",
]  # fmt: skip


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
    normal: bool = False
    """Says that nothing is found: its absence is never said, and it excludes every finding that is not incidental."""
    incidental: bool = False
    """No disease, such as a support device: may stand beside a normal class."""

    @property
    def forms(self) -> tuple[str, ...]:
        """The name and its synonyms."""
        return (self.name, *self.synonyms)


class FieldEntry(Config):
    """One of the things said about an image of a multi-field set: organ, finding, stain. At most one class holds."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Its placeholder, and the first part of its labels: `organ=knee`."""
    column: str | None = None
    """The attribute of the manifest that holds the class; None: called like the field."""
    classes: tuple[ClassEntry, ...] = Field(min_length=1)
    optional: bool = False
    """Whether an image may have none; without this, an empty cell drops the image."""

    @property
    def source(self) -> str:
        """The manifest attribute that is read."""
        return self.column or self.name


class Templates(Config):
    """Sentences with placeholders, by what is known of an image."""

    single: tuple[str, ...] = ()
    """One class holds; the classes of several fields hold; an image comes with its caption."""
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


class Balance(Config):
    """How often images of rare classes are used; `compile.py` does the arithmetic."""

    mode: Literal["none", "uniform", "sqrt", "effective", "repeat"] = "none"
    """All alike; every class equally often; by the square root of its count; by the effective number of samples (Cui et
    al. 2019); repeat factors (Gupta et al. 2019)."""
    beta: float = Field(default=0.999, gt=0, lt=1)
    """Of `effective`."""
    threshold: float = Field(default=0.01, gt=0, le=1)
    """Of `repeat`: a class in a smaller share of the images than this is repeated."""
    cap: int | None = Field(default=None, ge=1)
    """At most so many images of a class."""


class SplitRule(Config):
    """Which images are held out of a set that does not say so itself. A group falls on one side by a hash of its id, so
    images that are added later move no other."""

    val: float = Field(default=0.0, ge=0, lt=1)
    test: float = Field(default=0.0, ge=0, lt=1)
    seed: int = 0
    of: Literal["unsplit", "train", "all"] = "unsplit"
    """Which images are dealt anew: those without a split, those and the training ones, or all whatever was given."""
    by: Literal["group", "image"] = "group"
    """`image` where each image is of another patient or object; elsewhere it puts one patient on both sides."""


class LicenceStatement(Config):
    """The licence of images and labels, and where that is stated."""

    code: str = Field(min_length=1)
    """As in `biomedclip.licences`: `CC BY`, `MIT`; another word, such as `not stated`, belongs to no open preset."""
    evidence: str = Field(min_length=1)
    url: str | None = None


class Access(Config):
    """What it takes to get the images."""

    kind: Literal["open", "registration", "credentialed", "request"]
    """A download; an account or form; training and a signed agreement; somebody's decision."""
    url: str = Field(pattern=r"^https?://")


class Expect(Config):
    """How many images the set holds, per split; a set that differs is not the one described here."""

    images: dict[str, int] = Field(default_factory=dict)
    """Split -> number of images."""
    counts: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Split -> label -> number of images with that label."""
    exact: bool = True
    """Whether a smaller number is wrong too; false where subsets of the set are in use."""
    verified: bool = False
    """Whether the numbers were counted in the data or read in the source's own metadata, rather than recalled."""
    source: str | None = None
    """Where they were counted or read."""


class Recipe(Config):
    """One labelled set as captions."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    """Begins every sample key, and is the pairs' `source`."""
    title: str = Field(min_length=1)
    modality: str = Field(min_length=1)
    modality_synonyms: tuple[str, ...] = ()
    """Other words a caption may use for the modality."""
    regions: tuple[Region, ...] = ()
    """Parts of the body that are shown; words of others are found by the lint. Empty: not looked for."""
    layout: dict[str, Any]
    """`type` names a layout of `biomedclip.layouts`, the other keys are its options (also `window` and `window_hu`)."""
    values: dict[str, State] = Field(default_factory=dict)
    """What a cell of a class column says: `{"1": positive, "0": negative, "-1": uncertain, "": unmentioned}`, which is
    also what layouts take where nothing is given."""
    kind: Literal["single", "multi", "ordinal", "multi_field", "caption"]
    """One class; any number; one of a scale; one of each field; no label but a caption. Any but `caption` may be
    hierarchical, by the classes' `parents`."""
    classes: tuple[ClassEntry, ...] = ()
    """In label-id order."""
    fields: tuple[FieldEntry, ...] = ()
    """Of `multi_field`, instead of classes."""
    templates: Templates = Templates()
    paraphrases: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Label -> further whole captions of images of this one class. In YAML also the name of a JSON file beside it."""
    uncertain: Literal["hedge", "positive", "negative", "drop"] = "drop"
    """What an uncertain label counts as: a hedged sentence, a positive, a negative, or nothing said at all."""
    compose: Compose = Compose()
    captions_per_image: int = Field(default=6, ge=1, le=100)
    banned: tuple[str, ...] = ()
    """Labels held out for zero-shot tests: no image of theirs is kept and no caption names them."""
    balance: Balance = Balance()
    split: SplitRule | None = None
    groups_are_duplicates: bool = False
    """Whether the images of a group are copies of one picture (augmentations), not of one patient: where their labels
    differ, none of them is kept."""
    public_ids: bool = False
    """Whether file names and group ids identify nobody, so that ledger, sidecar and index may hold them as they are;
    otherwise all of these hold hashes."""
    licence: LicenceStatement
    access: Access | None = None
    citation: str = Field(min_length=1)
    verified: bool = False
    """Whether class names and layout were compared with the data or the source's own description."""
    source: str | None = None
    """Where class names and layout are from."""
    seed: int = 0
    expect: Expect | None = None

    @property
    def entries(self) -> tuple[ClassEntry, ...]:
        """All classes in label-id order; those of fields with `<field>=` before their labels."""
        return self.classes or tuple(_qualify(field, entry) for field in self.fields for entry in field.classes)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels in label-id order."""
        return tuple(entry.label for entry in self.entries)

    @property
    def modality_forms(self) -> tuple[str, ...]:
        """The modality and its synonyms."""
        return (self.modality, *self.modality_synonyms)

    @property
    def attributes(self) -> tuple[str, ...]:
        """Columns, and named parts of file names, that templates may speak of as they are."""
        named = re.findall(r"\(\?P<(\w+)>", str(self.layout.get("pattern", "")))
        taken = {"label", "group", "split", *(field.source for field in self.fields)}
        return tuple(column for column in (*self.layout.get("attributes", ()), *named) if column not in taken)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for problem in recipe_problems(self):
            raise ValueError(problem)
        return self


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe of the project with this name, or of this file.

    Raises ConfigError for an unknown name (with the nearest known one) and for every mistake in the file.
    """
    path = recipe_path(name_or_path)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(path, "must hold `key: value` lines", found=type(values).__name__)
    if isinstance(values.get("paraphrases"), str):
        values["paraphrases"] = read_paraphrases(path.parent / values["paraphrases"])
    return check_config(values, Recipe, path)


def recipe_path(name_or_path: str | Path) -> Path:
    """The file of a recipe. Raises ConfigError for a name that is none of the project's."""
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")) or "/" in text or "\\" in text:
        return Path(text).expanduser()
    known = recipe_names()
    if text not in known:
        near = difflib.get_close_matches(text, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "see biomedclip data recipes, or give the path of a .yaml file"
        raise ConfigError("recipe", "is no recipe of this project", found=repr(text), todo=hint)
    return recipe_folder() / f"{text}.yaml"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the project, sorted."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def recipe_folder() -> Path:
    """The folder of the project's recipes."""
    return Path(str(resources.files("data_builders"))) / "labels" / "recipes"


def recipe_sha256(recipe: Recipe) -> str:
    """Hex sha256 of the recipe's values and paraphrases, whatever the file's comments and order of keys."""
    return sha256_json(recipe.model_dump(mode="json"))


def read_paraphrases(path: Path) -> dict[str, Any]:
    """Label -> captions of a JSON file; the shape of its values is checked with the recipe. Raises ConfigError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(path, f"cannot be read: {error.strerror}", todo="check paraphrases") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(path, f"is not JSON: {error}", todo='write {"label": ["caption", …]}') from None
    if not isinstance(found, dict):
        raise ConfigError(path, "is no object", found=type(found).__name__, todo='write {"label": ["caption", …]}')
    return found


def layout_options(recipe: Recipe) -> dict[str, Any]:
    """The options of `biomedclip.layouts.read_manifest` for the recipe's layout.

    Class names are given in label-id order, because some files hold indices into them; a layout that needs another
    order says so in `layout.classes`. Raises ConfigError where those are other classes.
    """
    options = {key: value for key, value in recipe.layout.items() if key != "type"}
    if recipe.values:
        options["values"] = dict(recipe.values)
    if not recipe.classes:
        return options
    options.setdefault("classes", list(recipe.labels))
    if set(options["classes"]) != set(recipe.labels):
        raise ConfigError(
            f"recipe {recipe.name}: layout.classes", "are not the labels of classes",
            found=", ".join(options["classes"]), todo="leave it out; the recipe's labels are used",
        )  # fmt: skip
    return options


def all_ancestors(recipe: Recipe) -> dict[str, frozenset[str]]:
    """Label -> every wider class, through all levels. Needs parents without a cycle."""
    parents = {entry.label: entry.parents for entry in recipe.entries}
    found: dict[str, frozenset[str]] = {}

    def climb(label: str) -> frozenset[str]:
        if label not in found:
            found[label] = frozenset(parents[label]).union(*(climb(parent) for parent in parents[label]))
        return found[label]

    return {label: climb(label) for label in parents}


def _qualify(field: FieldEntry, entry: ClassEntry) -> ClassEntry:
    return entry.model_copy(update={
        "label": f"{field.name}={entry.label}", "parents": tuple(f"{field.name}={p}" for p in entry.parents),
    })  # fmt: skip
