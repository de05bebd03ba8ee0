"""Lint: one test for each defect it stands for, and none found in the project's own recipes."""

from __future__ import annotations

from typing import Any

import pytest

from data_builders.labels.lint import lint_recipe
from data_builders.labels.recipe import Recipe, load_recipe, recipe_names

CLASSES = [
    {"label": "normal", "name": "clear lungs", "synonyms": ["healthy lungs"]},
    {"label": "effusion", "name": "pleural effusion", "synonyms": ["fluid around the lung"]},
]
MULTI = {
    "single": ["A chest X-ray showing {x}."], "many": ["A chest X-ray showing {list}."], "negative": ["No {x}."],
    "uncertain": ["Possible {x}."], "none": ["A chest X-ray without an abnormality."],
}  # fmt: skip


def lint(**changes: Any) -> str:
    recipe = {
        "name": "lungs", "title": "Lungs", "modality": "chest X-ray", "modality_synonyms": ["chest radiograph"],
        "layout": {"type": "image_folder"}, "kind": "single", "classes": CLASSES, "captions_per_image": 2,
        "templates": {"single": ["A chest X-ray showing {x}."]},
        "licence": {"code": "CC0", "evidence": "made up"}, "citation": "nobody",
    } | changes  # fmt: skip
    return "\n".join(lint_recipe(Recipe.model_validate(recipe)))


def classes(**changes: Any) -> list[dict[str, Any]]:
    return [CLASSES[0], CLASSES[1] | changes]


@pytest.mark.parametrize("name", recipe_names())
def test_nothing_is_wrong_with_the_recipes_of_the_project(name: str) -> None:
    assert lint_recipe(load_recipe(name)) == []


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_nothing_is_wrong_with_a_good_recipe(kind: str) -> None:
    edema = {"label": "edema", "name": "pulmonary edema", "synonyms": ["lung edema"]}
    found = CLASSES if kind == "single" else [CLASSES[1], edema]
    assert lint(kind=kind, classes=found, templates=MULTI, uncertain="hedge") == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"templates": {"single": ["Showing {x}."]}}, "templates.single[0]: names no modality"),
        ({"templates": {"single": ["A chest X-ray showing {x}.", "A chest X-ray showing {x}."]}}, "repeats another"),
        ({"templates": {"single": ["A chest X-ray showing [CLS] {x}."]}}, "templates.single[0]: holds '['"),
        ({"templates": {"single": ["A chest X-ray showing None and {x}."]}}, "templates.single[0]: holds 'None'"),
        ({"templates": {"single": ["A chest X-ray , showing {x}."]}}, "templates.single[0]: holds ' ,'"),
        ({"classes": classes(name="pleural_effusion")}, "'pleural_effusion' holds '_'"),
        ({"classes": classes(synonyms=["Clear lungs"])}, "says 'Clear lungs' also for 'normal'"),
        ({"classes": classes(synonyms=["pleural effusion"])}, "says 'pleural effusion' twice"),
        ({"classes": classes(synonyms=["a", "b", "c"])}, "unequal numbers of names and synonyms (normal 2,"),
        ({"classes": classes(definition="fluid in the chest")}, "some have a definition and some not (normal)"),
        ({"templates": {"single": ["A chest X-ray showing {x}, " + "and on and on " * 25]}}, "the text tower reads 75"),
        ({"templates": {"single": ["No chest X-ray without {x}."]}}, "double negation"),
        ({"kind": "multi", "templates": MULTI, "classes": classes(name="absence of effusion")}, "double negation"),
        ({"templates": {"single": ["A chest X-ray and an MRI showing {x}."]}}, "speaks of MRI"),
        ({"banned": ["effusion"], "templates": {"single": ["A chest X-ray with {x} or a pleural effusion."]}},
         "says the banned 'pleural effusion'"),
    ],
)  # fmt: skip
def test_a_defect_is_found(changes: dict[str, Any], message: str) -> None:
    assert message in lint(**changes)


def test_every_line_begins_with_the_recipe_and_says_where() -> None:
    for line in lint(templates={"single": ["Showing {x} in an MRI."]}).splitlines():
        recipe, where, _ = line.split(": ", 2)
        assert recipe == "lungs"
        assert where.startswith(("templates.", "class"))


def test_words_of_a_banned_class_are_not_held_against_others() -> None:
    assert lint(banned=["effusion"]) == ""
