"""Lint: one test for each defect it stands for, and none found in the project's own recipes."""

from __future__ import annotations

from typing import Any

import pytest

from data_builders.labels.lint import estimate_pieces, lint_recipe
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
    return "\n".join(lint_recipe(_recipe(**changes)))


def _recipe(**changes: Any) -> Recipe:
    recipe = {
        "name": "lungs", "title": "Lungs", "modality": "chest X-ray", "modality_synonyms": ["chest radiograph"],
        "layout": {"type": "image_folder"}, "kind": "single", "classes": CLASSES, "captions_per_image": 2,
        "templates": {"single": ["A chest X-ray showing {x}."]},
        "licence": {"code": "CC0", "evidence": "made up"}, "citation": "nobody",
    } | changes  # fmt: skip
    return Recipe.model_validate(recipe)


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


OPACITY = {"paraphrases": {"normal": ["A chest X-ray with clear lungs, unremarkable."],
                           "effusion": ["A chest X-ray in which fluid around the lung is seen."]}}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regions": ["chest"], "classes": classes(synonyms=["fluid behind the knee"])},
         "classes.effusion: 'knee' belongs to joint, not to chest"),
        ({"regions": ["chest"], "templates": {"single": ["A chest X-ray showing {x} and a migraine."]}},
         "templates.single[0]: 'migraine' belongs to brain"),
        ({"templates": {"single": ["An chest X-ray showing {x}."]}}, "says 'An chest'"),
        ({"templates": {"single": ["Chest X-ray with a {x}."]}, "classes": classes(name="effusion")},
         "says 'a effusion'"),
        ({"captions_per_image": 6}, "only 2 of 6 captions of an image differ"),
        ({"paraphrases": {"effusion": ["A picture of fluid around the lung."]}},
         "paraphrases.effusion[0]: names no modality"),
        ({"paraphrases": {"effusion": ["A chest X-ray."]}}, "paraphrases.effusion[0]: neither label, synonym"),
        ({"paraphrases": {"effusion": ["A chest X-ray, pleural effusion."]}}, "unequal numbers (normal 0, effusion 1)"),
        ({"paraphrases": {"effusion": ["A chest X-ray, pleural effusion."] * 2}}, "repeats another paraphrase"),
        ({"paraphrases": {"effusion": ["A chest X-ray [CLS] pleural effusion."]}}, "holds '['"),
        ({"paraphrases": {"effusion": ["A chest X-ray and MRI, pleural effusion."]}}, "speaks of MRI"),
    ],
)  # fmt: skip
def test_further_defects_are_found(changes: dict[str, Any], message: str) -> None:
    assert message in lint(**changes)


def test_good_paraphrases_are_no_defect() -> None:
    assert lint(**OPACITY) == ""


def test_words_of_other_places_are_looked_for_only_where_the_place_is_said() -> None:
    assert "knee" not in lint(classes=classes(synonyms=["fluid behind the knee"]))


def test_a_class_of_two_fields_may_have_the_same_word_in_both() -> None:
    normal = {"label": "n", "name": "nothing abnormal", "countable": False}
    fields = [{"name": name, "classes": [normal, {"label": "x", "name": f"{name} disease", "countable": False}]}
              for name in ("lung", "heart")]  # fmt: skip
    templates = {"single": ["A chest X-ray with {lung} in the lungs and {heart} at the heart.", "Chest X-ray: {lung}."]}
    assert lint(kind="multi_field", classes=[], fields=fields, templates=templates) == ""
    residue = [fields[0], {"name": "heart", "classes": [normal, normal | {"label": "y"}]}]
    assert "fields.heart.y: says 'nothing abnormal' also for 'n'" in lint(
        kind="multi_field", classes=[], fields=residue, templates=templates)  # fmt: skip


def test_the_context_is_that_of_the_tower() -> None:
    long = {"single": ["A chest X-ray showing {x}, " + "with air and fluid, " * 22 + "seen."]}
    assert "the text tower reads 75" in lint(templates=long)
    recipe = {"templates": long, "captions_per_image": 2}
    found = "\n".join(lint_recipe(_recipe(**recipe), context="bert"))
    assert "the text tower reads" not in found
    longer = {"single": ["A chest X-ray showing {x}, " + "with air and fluid, " * 80 + "seen."]}
    assert "the text tower reads 254" in "\n".join(lint_recipe(_recipe(templates=longer), context="bert"))


def test_pieces_are_estimated_rather_too_many_than_too_few() -> None:
    assert estimate_pieces("An X-ray.") == 1 + 1 + 1 + 1 + 1
    assert estimate_pieces("immunohistochemistry") == 7


def test_the_lint_of_ready_captions_reads_the_sentences_around_them() -> None:
    found = lint(kind="caption", classes=[], templates={"single": ["{text} None.", "{text}"]})
    assert found == "lungs: templates.single[0]: holds 'None'"


def test_every_line_begins_with_the_recipe_and_says_where() -> None:
    for line in lint(templates={"single": ["Showing {x} in an MRI."]}).splitlines():
        recipe, where, _ = line.split(": ", 2)
        assert recipe == "lungs"
        assert where.startswith(("templates.", "class"))


def test_words_of_a_banned_class_are_not_held_against_others() -> None:
    assert lint(banned=["effusion"]) == ""
