"""Recipes: every mistake is one line that names the key; the project's own are whole and match the sample data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from biomedclip.errors import ConfigError
from biomedclip.licences import licence_class
from data_builders.build import resolve_root
from data_builders.labels.compile import check_expected, read_labelled_set
from data_builders.labels.recipe import Recipe, all_ancestors, load_recipe, recipe_names, recipe_sha256


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
    assert recipe.captions_per_image >= 6


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
