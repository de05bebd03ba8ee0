"""Recipes: every mistake is one line that names the key; the project's own are whole and match the sample data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from biomedclip.errors import ConfigError, DataError
from biomedclip.layouts import read_manifest
from biomedclip.licences import is_allowed, licence_class
from data_builders.build import resolve_root
from data_builders.labels.compile import check_expected, read_labelled_set
from data_builders.labels.recipe import (
    Recipe,
    all_ancestors,
    layout_options,
    load_recipe,
    recipe_folder,
    recipe_names,
    recipe_sha256,
)
from data_builders.labels.recipe_page import BEGIN, END, recipe_table, write_page


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "name": "lungs", "title": "Lungs", "modality": "chest X-ray", "layout": {"type": "image_folder"},
        "kind": "single",
        "classes": [{"label": "opacity", "name": "lung opacity"},
                    {"label": "pneumonia", "name": "pneumonia", "parents": ["opacity"]}],
        "templates": {"single": ["A chest X-ray showing {x}."]},
        "licence": {"code": "CC0", "evidence": "made up"}, "citation": "nobody",
    } | changes  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "lungs.yaml"
    path.write_text(yaml.safe_dump(facts(**changes)))
    return path


def test_a_recipe_file_becomes_a_frozen_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert recipe.labels == ("opacity", "pneumonia")
    assert recipe.uncertain == "drop"
    with pytest.raises(ValidationError):
        recipe.seed = 3  # type: ignore[misc]


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'pneumoniamnist'"):
        load_recipe("pneumonia_mnist")


def test_an_unknown_key_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lungs.yaml: modalty: unknown key; did you mean 'modality'\?"):
        load_recipe(write(tmp_path, modalty="x"))


MULTI = {"single": ["A chest X-ray of {x}."], "many": ["A chest X-ray of {list}."], "negative": ["No {x}."]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"templates": {"single": ["X-ray of {y}."]}}, r"templates.single\[0\] has the unknown placeholder '{y}'"),
        ({"templates": {"single": ["X-ray of {a_xx}, {x}."]}}, "did you mean '{a_x}'"),
        ({"templates": {"single": ["X-ray of {x} {0}."]}}, "a brace that is no placeholder"),
        ({"templates": {"single": ["A chest X-ray."]}}, "names no class"),
        ({"templates": {"single": []}}, "templates.single is empty"),
        ({"templates": {"single": ["{definition} in X-ray"]}}, "all need a definition, and 'opacity' has none"),
        ({"layout": {"type": "csv", "attributes": ["view"]}, "templates": {"single": ["{view} of {x}"]}},
         "only templates with an attribute"),
        ({"layout": {"type": "csv", "attributes": ["x"]}}, "is a placeholder of its own"),
        ({"layout": {}}, "layout needs a type"),
        ({"banned": ["pneumona"]}, "unknown label 'pneumona'; did you mean 'pneumonia'"),
        ({"banned": ["pneumonia", "opacity"]}, "banned leaves no class"),
        ({"expect": {"counts": {"training": {}}}}, "'training' is no split"),
        ({"expect": {"counts": {"train": {"edema": 3}}}}, "expect.counts.train names the unknown label 'edema'"),
        ({"kind": "multi"}, "templates.many is empty"),
        ({"kind": "multi", "uncertain": "hedge", "templates": MULTI}, "templates.uncertain is empty"),
        ({"kind": "many"}, "kind: "),
        ({"kind": "multi_field"}, "a multi_field recipe has fields, each with its classes"),
        ({"kind": "multi_field", "classes": [], "templates": {"single": ["MRI of {x}."]}, "fields": [
            {"name": "organ", "classes": [{"label": "a", "name": "a"}]}]}, "has the unknown placeholder '{x}'"),
        ({"kind": "multi_field", "classes": [], "fields": [
            {"name": "list", "classes": [{"label": "a", "name": "a"}]}]}, "'list' is a placeholder of its own"),
        ({"kind": "multi_field", "classes": [], "fields": [
            {"name": "organ", "optional": True, "classes": [{"label": "a", "name": "a"}]}]}, "fields are all optional"),
        ({"fields": [{"name": "organ", "classes": [{"label": "a", "name": "a"}]}]}, "fields belong to the kind"),
        ({"classes": []}, "classes is empty, and the kind single needs them"),
        ({"kind": "caption"}, "a caption recipe has neither classes nor paraphrases nor bans"),
        ({"layout": {"type": "csv", "attributes": ["patient_name"]},
          "templates": {"single": ["X-ray of {x}, {patient_name}.", "X-ray of {x}."]}}, "which may identify a person"),
        ({"values": {"1": "positive"}, "layout": {"type": "csv", "values": {}}}, "values is given twice"),
        ({"values": {"1": "positiv"}}, "values.1: "),
        ({"verified": True}, "verified needs source"),
        ({"expect": {"images": {"train": 3}, "verified": True}}, "expect.verified needs expect.source"),
        ({"expect": {"exact": True}}, "expect says neither images nor counts"),
        ({"access": {"kind": "free", "url": "https://x.org"}}, "access.kind: "),
        ({"access": {"kind": "open", "url": "x.org"}}, "access.url: "),
        ({"balance": {"mode": "squared"}}, "balance.mode: "),
        ({"balance": {"beta": 1.0}}, "balance.beta: "),
        ({"regions": ["lung"]}, "regions.0: "),
        ({"uncertain": "hegde"}, "did you mean 'hedge'"),
        ({"name": "Lungs 1"}, "name: "),
        ({"captions_per_image": 0}, "captions_per_image: "),
        ({"classes": [{"label": "a", "name": "a"}, {"label": "a", "name": "b"}]}, "label 'a' appears twice"),
        ({"classes": [{"label": "a", "name": "a", "parents": ["b"]}, {"label": "b", "name": "b", "parents": ["a"]}]},
         "'a' is its own ancestor"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("{", r"\{")) as error:
        load_recipe(write(tmp_path, **changes))
    assert len(str(error.value).splitlines()) == 1


def test_ancestors_reach_through_all_levels() -> None:
    classes = [{"label": "finding", "name": "finding"}, {"label": "opacity", "name": "opacity", "parents": ["finding"]},
               {"label": "edema", "name": "edema", "parents": ["opacity"]}]  # fmt: skip
    recipe = Recipe.model_validate(facts(classes=classes))
    assert all_ancestors(recipe) == {"finding": set(), "opacity": {"finding"}, "edema": {"opacity", "finding"}}


def test_the_hash_follows_the_values_not_the_spelling(tmp_path: Path) -> None:
    plain, path = recipe_sha256(load_recipe(write(tmp_path))), tmp_path / "again.yaml"
    path.write_text("# a comment\n" + yaml.safe_dump(dict(reversed(facts(seed=0).items())), sort_keys=False))
    assert recipe_sha256(load_recipe(path)) == plain
    assert recipe_sha256(load_recipe(write(tmp_path, seed=1))) != plain


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_of_the_project_is_named_like_its_file_and_licensed(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert licence_class(recipe.licence.code) != "none"
    assert recipe.captions_per_image >= 6 or recipe.kind == "caption"
    assert recipe.access is not None
    assert recipe.source, "says where classes and layout are from, if only from memory"
    assert recipe.regions or recipe.kind == "caption"


@pytest.mark.parametrize("name", recipe_names())
def test_the_layout_of_a_recipe_of_the_project_has_the_options_that_it_names(name: str) -> None:
    recipe = load_recipe(name)
    # Options are checked before the folder, so that only the folder is left to be wrong.
    with pytest.raises(DataError, match="there is no such file or folder"):
        read_manifest(recipe.layout["type"], "/nowhere", name=name, **layout_options(recipe))


@pytest.mark.parametrize("name", recipe_names())
def test_a_licence_that_was_only_recalled_opens_no_preset(name: str) -> None:
    licence = load_recipe(name).licence
    if re.search(r"recalled|not read|no licence was read|none stated|look at", licence.evidence):
        assert not is_allowed(licence.code, "noncommercial")


def test_the_project_has_recipes_for_every_modality_and_kind() -> None:
    recipes = [load_recipe(name) for name in recipe_names()]
    assert len(recipes) >= 45
    assert {recipe.kind for recipe in recipes} == {"single", "multi", "ordinal", "multi_field", "caption"}
    words = " ; ".join(form for recipe in recipes for form in recipe.modality_forms)
    asked = ("X-ray", "CT", "MRI", "ultrasound", "histopathology", "fundus", "OCT", "dermoscopy", "endoscopy",
             "blood smear", "stool microscopy")  # fmt: skip
    assert not [modality for modality in asked if modality not in words]
    assert any(entry.parents for recipe in recipes for entry in recipe.entries)


MEDMNIST = json.loads((Path(__file__).parent / "data" / "medmnist_facts.json").read_text())


@pytest.mark.parametrize("name", [name for name in MEDMNIST if not name.startswith("_")])
def test_recipes_of_medmnist_say_what_the_medmnist_package_says(name: str) -> None:
    recipe, facts = load_recipe(name), MEDMNIST[name]
    assert list(recipe.labels) == facts["labels"], "label ids are indices, so the order is a fact"
    assert recipe.expect is not None
    slices = recipe.layout.get("slices", 1)
    assert recipe.expect.images == {split: number * slices for split, number in facts["n_samples"].items()}
    assert f"{recipe.licence.code} 4.0" == facts["license"]
    assert recipe.verified
    assert recipe.expect.verified


def test_the_page_of_recipes_holds_the_table_of_today() -> None:
    page = (recipe_folder() / "README.md").read_text()
    assert f"{BEGIN}\n{recipe_table()}\n{END}" in page, "run data_builders.labels.recipe_page.write_page()"


def test_the_page_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_page(page)
    assert page.read_text() == f"before\n{BEGIN}\n{recipe_table()}\n{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(DataError, match="has not both marks"):
        write_page(page)


def test_paraphrases_are_read_from_the_file_beside_the_recipe_and_are_part_of_it(tmp_path: Path) -> None:
    plain = recipe_sha256(load_recipe(write(tmp_path)))
    (tmp_path / "told.json").write_text('{"pneumonia": ["A chest X-ray with pneumonia at the base."]}')
    told = load_recipe(write(tmp_path, paraphrases="told.json"))
    assert told.paraphrases == {"pneumonia": ("A chest X-ray with pneumonia at the base.",)}
    (tmp_path / "told.json").write_text('{"pneumonia": ["A chest X-ray with pneumonia at the top."]}')
    assert len({plain, recipe_sha256(told), recipe_sha256(load_recipe(write(tmp_path, paraphrases="told.json")))}) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "told.json: cannot be read"), ("[1]", "told.json: is no object"), ("{", "told.json: is not JSON"),
     ('{"pneumona": []}', "paraphrases names the unknown label 'pneumona'; did you mean 'pneumonia'"),
     ('{"pneumonia": "A chest X-ray"}', "paraphrases.pneumonia: should be a valid"),
     ('{"pneumonia": ["A {x}"]}', r"paraphrases.pneumonia\[0\] is empty or has a brace")],
)  # fmt: skip
def test_a_broken_paraphrase_file_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "told.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, paraphrases="told.json"))


def test_values_reach_the_layout_and_labels_are_given_in_order(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, values={"yes": "positive", "no": "negative"}))
    assert layout_options(recipe) == {"values": {"yes": "positive", "no": "negative"},
                                      "classes": ["opacity", "pneumonia"]}  # fmt: skip
    other = load_recipe(write(tmp_path, layout={"type": "hdf5", "classes": ["opacity", "fracture"]}))
    with pytest.raises(ConfigError, match=r"layout\.classes: are not the labels of classes"):
        layout_options(other)


def test_named_parts_of_file_names_may_be_spoken_of(tmp_path: Path) -> None:
    layout = {"type": "filename_pattern", "pattern": r"(?P<label>\w+)-(?P<group>\d+)-(?P<view>\w+)\.png"}
    templates = {"single": ["A {view} chest X-ray of {x}.", "A chest X-ray of {x}."]}
    assert load_recipe(write(tmp_path, layout=layout, templates=templates)).attributes == ("view",)


@pytest.mark.parametrize(
    ("name", "counts"),
    [("bccd", {"train": 518, "val": 214, "test": 176}), ("pneumoniamnist", {"train": 2426, "val": 270, "test": 624})],
)
def test_the_sample_sets_are_what_their_recipes_say(name: str, counts: dict[str, int]) -> None:
    recipe = load_recipe(name)
    manifest = read_labelled_set(recipe, resolve_root(f"sample://{name}"))
    check_expected(recipe, manifest)
    assert {split: sum(row.split == split for row in manifest.rows) for split in counts} == counts
    assert manifest.classes == recipe.labels


def test_the_sample_of_pneumoniamnist_is_balanced_and_repeats_nothing_for_training() -> None:
    import numpy as np

    path = resolve_root("sample://pneumoniamnist") / "pneumoniamnist.npz"
    with np.load(path, allow_pickle=False) as arrays:
        pixels = {split: [image.tobytes() for image in arrays[f"{split}_images"]] for split in ("train", "val", "test")}
        counts = {split: np.bincount(arrays[f"{split}_labels"].ravel()).tolist() for split in pixels}
    assert counts == {"train": [1213, 1213], "val": [135, 135], "test": [234, 390]}
    assert len({*pixels["train"], *pixels["val"]}) == 2426 + 270
    assert not {*pixels["train"], *pixels["val"]} & set(pixels["test"])
    assert path.stat().st_size < 2_500_000
