"""Compiling: captions say what the labels say and nothing else, the same on every run, and every row is counted."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run_command
from fresh_python import run_fresh
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from biomedclip.config import config_file, load_config
from biomedclip.errors import ConfigError, DataError
from biomedclip.images import check_image, encode_png, store_picture
from biomedclip.layouts.manifest import make_manifest
from biomedclip.schema import KEY_PATTERN, Drop, ImageRef, LabelledImage, Manifest, Pair
from biomedclip.shards import DatasetFolder, check_pair, verify
from data_builders.build import BuildConfig, build, write_names
from data_builders.labels.captions import (
    Refused,
    compose_captions,
    join_words,
    prepare_speech,
    settle_facts,
    with_article,
)
from data_builders.labels.compile import compile_pairs, read_labelled_set, sample_key
from data_builders.labels.recipe import Recipe, load_recipe
from data_builders.labels.splits import assign_splits

WIDER = {"pneumonia": {"opacity"}, "lobar": {"pneumonia", "opacity"}, "opacity": set(), "fracture": set()}
NAMES = {"opacity": {"haze", "shadow"}, "pneumonia": {"lungfire"}, "lobar": {"lobefire"}, "fracture": {"bonebreak"}}
FINDINGS: dict[str, Any] = {
    "name": "findings", "title": "Findings", "modality": "chest X-ray", "layout": {"type": "csv"}, "kind": "multi",
    "classes": [
        {"label": "opacity", "name": "haze", "synonyms": ["shadow"]},
        {"label": "pneumonia", "name": "lungfire", "parents": ["opacity"], "countable": False},
        {"label": "lobar", "name": "lobefire", "parents": ["pneumonia"], "countable": False},
        {"label": "fracture", "name": "bonebreak"},
    ],
    "templates": {
        "single": ["Chest X-ray showing {x}.", "{a_x} on a chest X-ray"],
        "many": ["Chest X-ray showing {list}."],
        "negative": ["Absent: {x}."], "uncertain": ["Possible: {x}."], "none": ["Chest X-ray, all clear."],
    },
    "uncertain": "hedge", "compose": {"negative_rate": 0.5, "parent_rate": 0.3}, "captions_per_image": 8,
    "licence": {"code": "CC0", "evidence": "made up"}, "citation": "nobody", "public_ids": True,
}  # fmt: skip


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(FINDINGS | changes)


def cells(**changes: Any) -> Recipe:
    single = {
        "name": "cells", "modality": "blood smear", "layout": {"type": "image_folder"}, "kind": "single",
        "classes": [{"label": "RBC", "name": "erythrocyte"}, {"label": "WBC", "name": "white cell"}],
        "templates": {"single": ["A blood smear of {a_x}.", "Blood smear: {x}."]}, "captions_per_image": 2,
    }  # fmt: skip
    return recipe(**(single | changes))


def row(labels: str = "", negatives: str = "", uncertain: str = "", **facts: Any) -> LabelledImage:
    said = {"labels": labels, "negatives": negatives, "uncertain": uncertain}
    values: dict[str, Any] = {name: tuple(text.split()) for name, text in said.items()}
    return LabelledImage(**{"sample_id": "a.png", "image": ImageRef(path="a.png"), **values, **facts})


def speak(found: Recipe, image: LabelledImage) -> tuple[str, ...]:
    speech = prepare_speech(found)
    return compose_captions(speech, image.sample_id, settle_facts(speech, image), image.attributes)


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (16, 16), value).save(buffer, "PNG")
    return buffer.getvalue()


def manifest(folder: Path, *rows: LabelledImage, **facts: Any) -> Manifest:
    for number, image in enumerate(rows):
        if not (folder / image.image.path).exists():
            (folder / image.image.path).parent.mkdir(parents=True, exist_ok=True)
            (folder / image.image.path).write_bytes(png(number))
    return make_manifest("set", folder, rows, **({"kind": "multi", "classes": list(WIDER)} | facts))


def only(items: list[Pair | Drop]) -> Drop:
    assert len(items) == 1
    assert isinstance(items[0], Drop)
    return items[0]


# What a caption says


def said(caption: str) -> dict[str, set[str]]:
    """The labels a caption asserts, denies and calls possible, read from its words alone."""
    parts = {"negatives": r"Absent: (.*?)\.", "uncertain": r"Possible: (.*?)\."}
    found = {}
    for part, pattern in parts.items():
        match = re.search(pattern, caption, re.IGNORECASE)
        found[part] = match[1] if match else ""
        caption = caption.replace(match[0], "") if match else caption
    found["labels"] = caption
    return {part: {label for label, names in NAMES.items() if any(n in text.lower() for n in names)}
            for part, text in found.items()}  # fmt: skip


STATES = st.fixed_dictionaries({label: st.sampled_from(["labels", "negatives", "uncertain", ""]) for label in WIDER})


@settings(max_examples=150, deadline=None)
@given(states=STATES, sample_id=st.text(st.characters(codec="utf-8"), min_size=1, max_size=12))
def test_no_caption_says_more_than_the_labels(states: dict[str, str], sample_id: str) -> None:
    stated = {
        part: {label for label in WIDER if states[label] == part} for part in ("labels", "negatives", "uncertain")
    }
    image = row(sample_id=sample_id, **{part: " ".join(sorted(labels)) for part, labels in stated.items()})
    wider = set().union(*(WIDER[label] for label in stated["labels"] | stated["uncertain"]))
    if not any(stated.values()):
        with pytest.raises(Refused, match="nothing_stated"):
            speak(recipe(), image)
        return
    captions = speak(recipe(), image)
    assert len(captions) == 8
    for caption in captions:
        spoken = said(caption)
        # A parent may be added to its child, and nothing else may.
        assert spoken["labels"] <= stated["labels"].union(*(WIDER[label] for label in stated["labels"]))
        assert spoken["uncertain"] <= stated["uncertain"]
        assert spoken["negatives"] <= stated["negatives"] - wider
        assert any(spoken.values()) or caption == "Chest X-ray, all clear."
        assert (caption == "Chest X-ray, all clear.") <= (stated["negatives"] == set(WIDER))
        assert "chest x-ray" in caption.lower()
        assert caption[0] == caption[0].upper()


def test_children_speak_of_parents_and_parents_never_of_children() -> None:
    rates = {"compose": {"parent_rate": 1.0}}
    assert all("lobefire (a type of lungfire)" in caption.lower() for caption in speak(recipe(**rates), row("lobar")))
    for caption in speak(recipe(**rates), row("opacity")):
        assert said(caption)["labels"] == {"opacity"}
    # A parent that is a label of its own needs no repeating.
    assert not any("type of haze" in caption for caption in speak(recipe(**rates), row("opacity pneumonia")))


def test_absence_is_said_only_of_explicit_negatives() -> None:
    rates = {"compose": {"negative_rate": 1.0}}
    assert not any("Absent" in caption for caption in speak(recipe(**rates), row("pneumonia")))
    assert all("Absent: bonebreak." in c for c in speak(recipe(**rates), row("pneumonia", "fracture")))
    assert speak(recipe(), row("", "fracture"))[0] == "Chest X-ray: Absent: bonebreak."


def test_all_clear_is_said_only_where_every_class_is_an_explicit_zero() -> None:
    assert set(speak(recipe(), row("", " ".join(WIDER)))) == {"Chest X-ray, all clear."}
    assert not any("all clear" in caption for caption in speak(recipe(), row("", "opacity pneumonia lobar")))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("hedge", {"uncertain": {"fracture"}, "labels": set(), "negatives": set()}),
     ("positive", {"uncertain": set(), "labels": {"fracture"}, "negatives": set()}),
     ("negative", {"uncertain": set(), "labels": set(), "negatives": {"fracture"}})],
)  # fmt: skip
def test_an_uncertain_label_is_what_the_policy_says(policy: str, expected: dict[str, set[str]], tmp_path: Path) -> None:
    found = recipe(uncertain=policy)
    for caption in speak(found, row(uncertain="fracture")):
        assert said(caption) == expected
    [pair] = compile_pairs(found, manifest(tmp_path, row(uncertain="fracture")))
    assert isinstance(pair, Pair)
    assert set(pair.labels) == expected["labels"]
    assert pair.sidecar["uncertain"] == ["fracture"]


def test_the_policy_drop_says_nothing_of_an_uncertain_label(tmp_path: Path) -> None:
    found = recipe(uncertain="drop")
    for caption in speak(found, row("opacity", "", "fracture")):
        assert said(caption)["labels"] == {"opacity"}
        assert "bonebreak" not in caption
    drop = only(list(compile_pairs(found, manifest(tmp_path, row(uncertain="fracture")))))
    assert (drop.reason, drop.detail) == ("nothing_stated", "only uncertain labels")


def test_at_most_so_many_classes_as_allowed_are_named_and_all_of_them_come_up() -> None:
    found = recipe(compose={"max_positive": 2}, captions_per_image=40)
    spoken = [said(caption)["labels"] for caption in speak(found, row("opacity pneumonia lobar fracture"))]
    assert {len(labels) for labels in spoken} == {2}
    assert set().union(*spoken) == set(WIDER)


def test_captions_of_an_image_differ_while_the_recipe_has_words() -> None:
    templates = {"single": [f"Blood smear {n} of {{x}}." for n in range(5)]}
    classes = [{"label": "RBC", "name": "red cell", "synonyms": ["erythrocyte", "corpuscle"]}]
    captions = speak(cells(templates=templates, classes=classes, captions_per_image=15), row("RBC"))
    assert len(set(captions)) == 15
    # The first round of the templates already meets every name.
    names = [re.sub(r"Blood smear \d of ", "", caption) for caption in captions]
    assert set(names[:5]) == {"red cell.", "erythrocyte.", "corpuscle."}


def test_attributes_and_definitions_are_spoken_of_where_they_are_known() -> None:
    found = cells(
        layout={"type": "csv", "attributes": ["stain"]},
        classes=[{"label": "RBC", "name": "red cell", "definition": "no nucleus"}, {"label": "WBC", "name": "white"}],
        templates={"single": ["Blood smear, {stain}: {x}.", "Blood smear of {x}: {definition}.", "Blood smear: {x}."]},
        captions_per_image=6,
    )
    known = set(speak(found, row("RBC", attributes={"stain": "Giemsa\n{x}", "patient": "Jane"})))
    assert known == {"Blood smear, Giemsa {x}: red cell.", "Blood smear of red cell: no nucleus.",
                     "Blood smear: red cell."}  # fmt: skip
    assert set(speak(found, row("WBC"))) == {"Blood smear: white."}


def test_no_parent_is_denied_while_a_child_is_uncertain_even_when_uncertain_labels_are_dropped() -> None:
    facts = settle_facts(prepare_speech(recipe(uncertain="drop")), row("fracture", "opacity", "pneumonia"))
    assert (facts.positive, facts.negative, facts.uncertain) == (("fracture",), (), ())


def test_words_are_joined_and_given_articles_as_in_english() -> None:
    assert join_words(["a", "b", "c"], "and") == "a, b and c"
    assert join_words(["a"], "or") == "a"
    phrases = ["erythrocyte", "platelet", "MRI scan", "CT scan", "ulcer", "unicellular body"]
    assert [with_article(phrase).split()[0] for phrase in phrases] == ["an", "a", "an", "a", "an", "a"]
    spoken = ["X-ray finding", "T-cell", "unidentified cell", "uterine fibroid", "union defect", "ulcer"]
    assert [with_article(phrase).split()[0] for phrase in spoken] == ["an", "a", "an", "a", "a", "an"]


# The same on every run


def test_captions_depend_on_recipe_sample_and_number_alone(tmp_path: Path) -> None:
    images = [
        row("opacity fracture", "lobar", sample_id=name, image=ImageRef(path=name)) for name in ("b.png", "a.png")
    ]
    together = {p.sidecar["sample_id"]: p.captions for p in compile_pairs(recipe(), manifest(tmp_path, *images))}
    assert together == {image.sample_id: speak(recipe(), image) for image in images}
    assert together["a.png"] != together["b.png"]
    assert speak(recipe(seed=1), images[0]) != speak(recipe(), images[0])
    # Fewer captions are the first of more.
    assert speak(recipe(captions_per_image=3), images[0]) == speak(recipe(), images[0])[:3]


def test_captions_are_the_same_in_another_process_with_another_hash_seed() -> None:
    script = (
        "import json, tests_recipe as t\n"
        "from biomedclip.schema import ImageRef, LabelledImage\n"
        "from data_builders.labels.captions import *\n"
        "from data_builders.labels.recipe import Recipe\n"
        "speech = prepare_speech(Recipe.model_validate(t.FINDINGS))\n"
        "image = LabelledImage(sample_id='a.png', image=ImageRef(path='a.png'), labels=('opacity', 'fracture'),"
        " negatives=('lobar',))\n"
        "print(json.dumps(compose_captions(speech, image.sample_id, settle_facts(speech, image))))"
    ).replace("import json, tests_recipe as t", f"import json, types; t = types.SimpleNamespace(FINDINGS={FINDINGS!r})")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONHASHSEED": "77"})  # fmt: skip
    assert tuple(json.loads(done.stdout)) == speak(recipe(), row("opacity fracture", "lobar"))


# Rows to pairs


def test_a_pair_carries_labels_ids_group_split_and_recipe(tmp_path: Path) -> None:
    image = row("fracture opacity", "lobar", group_id="patient 7", split="val", sample_id="val/x 1.PNG",
                image=ImageRef(path="val/x 1.PNG"))  # fmt: skip
    [pair] = compile_pairs(recipe(), manifest(tmp_path, image))
    assert isinstance(pair, Pair)
    check_pair(pair)
    assert pair.key == sample_key("findings", "val", "val/x 1.PNG")
    assert (pair.labels, pair.label_ids) == (("opacity", "fracture"), (0, 3))
    assert (pair.group_id, pair.split, pair.source, pair.licence) == ("patient 7", "val", "findings", "CC0")
    assert len(pair.captions) == 8
    assert pair.caption == pair.captions[0]
    assert pair.image == (tmp_path / "val/x 1.PNG").read_bytes()
    assert pair.sidecar["negatives"] == ["lobar"]
    assert re.fullmatch("[0-9a-f]{16}", pair.sidecar["recipe_sha256"])


@pytest.mark.parametrize("policy", ["hedge", "drop"])
def test_banned_classes_never_appear(policy: str, tmp_path: Path) -> None:
    ids = ["opacity", "pneumonia", "lobar", "fracture"]
    rows = [row(label, sample_id=f"{label}.png", image=ImageRef(path=f"{label}.png")) for label in ids]
    rows.append(row("fracture", "pneumonia", sample_id="no.png", image=ImageRef(path="no.png")))
    rows.append(row("fracture", "", "pneumonia", sample_id="maybe.png", image=ImageRef(path="maybe.png")))
    found = recipe(banned=["pneumonia"], uncertain=policy, compose={"negative_rate": 1.0, "parent_rate": 1.0})
    items = list(compile_pairs(found, manifest(tmp_path, *rows)))
    dropped = {item.item for item in items if isinstance(item, Drop) and item.reason == "banned_class"}
    assert dropped == {"pneumonia.png", "lobar.png", "maybe.png"}, "narrower classes are of the banned class too"
    captions = [caption for item in items if isinstance(item, Pair) for caption in item.captions]
    assert len(captions) == 3 * 8
    assert not any("lungfire" in caption or "lobefire" in caption for caption in captions)


def test_a_ban_also_holds_for_words_that_attributes_bring(tmp_path: Path) -> None:
    found = cells(banned=["WBC"], layout={"type": "csv", "attributes": ["note"]},
                  templates={"single": ["Blood smear of {x}.", "Blood smear, {note}: {x}."]})  # fmt: skip
    image = row("RBC", attributes={"note": "beside two White Cells"})
    single = manifest(tmp_path, image, kind="single", classes=["RBC", "WBC"])
    assert only(list(compile_pairs(found, single))).reason == "banned_class"


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (row(), "nothing_stated"),
        (row("opacity", "opacity"), "contradictory_labels"),
        (row("", "opacity", "opacity"), "contradictory_labels"),
    ],
)
def test_a_row_that_says_nothing_or_two_things_is_dropped(image: LabelledImage, reason: str, tmp_path: Path) -> None:
    assert only(list(compile_pairs(recipe(), manifest(tmp_path, image)))).reason == reason


def test_a_negative_without_words_for_it_is_dropped(tmp_path: Path) -> None:
    found = recipe(templates={**FINDINGS["templates"], "negative": []})
    assert only(list(compile_pairs(found, manifest(tmp_path, row("", "fracture"))))).reason == "no_template"


def test_images_that_cannot_be_used_are_dropped_with_their_reason(tmp_path: Path) -> None:
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)).save(noise, "PNG")
    contents = {"broken.png": noise.getvalue()[:500], "empty.png": b"", "text.png": b"no image", "good.png": png()}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    rows = [row("opacity", sample_id=name, image=ImageRef(path=name)) for name in [*contents, "gone.png"]]
    table = manifest(tmp_path, *rows)
    (tmp_path / "gone.png").unlink()
    items = list(compile_pairs(recipe(), table))
    assert [item.reason if isinstance(item, Drop) else "kept" for item in items] == [
        "broken_image", "empty_file", "unreadable_image", "kept", "not_an_image",
    ]  # fmt: skip
    assert not any(str(tmp_path) in item.detail for item in items if isinstance(item, Drop))


def test_a_group_in_two_splits_stays_in_the_held_out_one(tmp_path: Path) -> None:
    splits = {"a.png": "train", "b.png": "test", "c.png": "val", "d.png": "train"}
    rows = [row("opacity", sample_id=name, image=ImageRef(path=name), split=split,
                group_id="alone" if name == "d.png" else "shared") for name, split in splits.items()]  # fmt: skip
    items = list(compile_pairs(recipe(), manifest(tmp_path, *rows)))
    kept = [item.sidecar["sample_id"] for item in items if isinstance(item, Pair)]
    assert kept == ["b.png", "d.png"]
    assert {item.reason for item in items if isinstance(item, Drop)} == {"group_in_two_splits"}


def test_keys_are_unique_fit_and_say_nothing_whatever_the_sample_ids() -> None:
    ids = ["train/A.png", "train/a.png", "train/a.jpg", "é.png", "ü.png", "x" * 300 + "1.png", "x" * 300 + "2.png",
           "...", "patient-1234567/jane-doe.png"]  # fmt: skip
    keys = [sample_key("x" * 32, "train", sample_id) for sample_id in ids]
    assert len(set(keys)) == len(ids)
    assert all(KEY_PATTERN.fullmatch(key) for key in keys)
    assert all(re.fullmatch("x{32}-train-[0-9a-f]{16}", key) for key in keys)
    # The same file of another set has another key: the recipe's name is the salt.
    assert sample_key("a", "train", "1.png")[-16:] != sample_key("b", "train", "1.png")[-16:]


def test_only_the_chosen_splits_are_seen(tmp_path: Path) -> None:
    rows = [row("opacity", sample_id=s, image=ImageRef(path=f"{s}.png"), split=s) for s in ("train", "val", "test")]
    items = list(compile_pairs(recipe(), manifest(tmp_path, *rows), splits=["train", "val"]))
    assert [item.split for item in items if isinstance(item, Pair)] == ["train", "val"]
    with pytest.raises(ConfigError, match=r"'val' is no split of set \(found train\)"):
        list(compile_pairs(recipe(), manifest(tmp_path, rows[0]), splits=["val"]))


# Recipes to whole sets


def cell_folder(folder: Path) -> Path:
    for number in range(12):
        label = "RBC" if number % 3 else "WBC"
        path = folder / ("val" if number > 8 else "train") / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number * 20))
    (folder / "train" / "RBC" / "notes.txt").write_text("no image")
    return folder


def test_label_ids_are_in_the_recipes_order_not_the_alphabet(tmp_path: Path) -> None:
    found = cells(classes=[{"label": "WBC", "name": "white cell"}, {"label": "RBC", "name": "red cell"}])
    items = list(compile_pairs(found, read_labelled_set(found, cell_folder(tmp_path))))
    assert {(p.labels, p.label_ids) for p in items if isinstance(p, Pair)} == {(("WBC",), (0,)), (("RBC",), (1,))}
    assert [item.reason for item in items if isinstance(item, Drop)] == ["not_an_image_file"]


def test_counts_that_are_not_the_expected_ones_are_one_line(tmp_path: Path) -> None:
    found = cells(expect={"counts": {"train": {"RBC": 6, "WBC": 4}}})
    with pytest.raises(DataError, match=r"train: has not the 4 images of 'WBC' .* \(found 3\); get the whole set"):
        list(compile_pairs(found, read_labelled_set(found, cell_folder(tmp_path))))


def test_a_recipe_of_another_kind_or_with_missing_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kind: is multi, the data set's labels are not"):
        list(compile_pairs(recipe(classes=cells().model_dump()["classes"]),
                           read_labelled_set(cells(), cell_folder(tmp_path))))  # fmt: skip
    with pytest.raises(DataError, match="has a label that is not declared"):
        read_labelled_set(cells(classes=[{"label": "RBC", "name": "red cell"}]), tmp_path)


def test_a_multi_label_npz_compiles_with_explicit_zeros(tmp_path: Path) -> None:
    arrays = {"train_images": np.zeros((2, 8, 8), np.uint8), "train_labels": np.array([[1, 0, 0, 0], [0, 0, 0, 0]])}
    np.savez(tmp_path / "findings.npz", **arrays)
    found = recipe(layout={"type": "medmnist_npz", "kind": "multi", "splits": ["train"]})
    first, second = compile_pairs(found, read_labelled_set(found, tmp_path))
    assert isinstance(first, Pair)
    assert isinstance(second, Pair)
    assert first.sidecar["negatives"] == ["pneumonia", "lobar", "fracture"]
    assert set(second.captions) == {"Chest X-ray, all clear."}


# PneumoniaMNIST's training split takes seconds and shows nothing that its val split does not.
@pytest.mark.parametrize(
    ("name", "splits", "kept"), [("bccd", ["train", "val"], 732), ("pneumoniamnist", ["val"], 270)]
)
def test_the_demo_sets_build_and_every_image_is_counted(
    name: str, splits: list[str], kept: int, tmp_path: Path
) -> None:
    path = config_file(f"build/demo_{name}.yaml")
    assert load_config(path, BuildConfig).source.splits == ("train", "val"), "the test split stays out"
    config = load_config(path, BuildConfig, [f"source.splits={splits}"])
    manifest_json = build(config, tmp_path / "out")
    ledger = manifest_json["ledger"]
    assert ledger["seen"] == ledger["kept"] + sum(ledger["dropped"].values()) == kept
    assert verify(tmp_path / "out") == []
    index = DatasetFolder(tmp_path / "out").index.to_pylist()
    assert {r["split"] for r in index} == set(splits)
    assert manifest_json["provenance"]["recipe"]["name"] == name
    assert manifest_json["provenance"]["attribution"][0]["licence"] in ("MIT", "CC BY")
    assert build(config, tmp_path / "out") == manifest_json


def test_two_builds_have_equal_sums_and_another_image_another_fingerprint(tmp_path: Path) -> None:
    from data_builders.build import open_input

    folder, file = cell_folder(tmp_path / "cells"), tmp_path / "cells.yaml"
    file.write_text(json.dumps(cells().model_dump(mode="json")))
    config = BuildConfig.model_validate({
        "name": "cells", "licence": "commercial-derivatives",
        "source": {"kind": "labels", "root": str(folder), "recipe": str(file), "splits": ["train", "val"]},
    })  # fmt: skip
    for out in ("one", "two"):
        built = build(config, tmp_path / out)
    assert (tmp_path / "one/SHA256SUMS").read_bytes() == (tmp_path / "two/SHA256SUMS").read_bytes()
    assert built["ledger"] == {"seen": 13, "kept": 12, "dropped": {"not_an_image_file": 1}}
    before = open_input(config).fingerprint
    (folder / "train/WBC/0.png").write_bytes(png(255) + b" ")
    assert open_input(config).fingerprint != before
    file.write_text(json.dumps(cells(seed=5).model_dump(mode="json")))
    assert open_input(config).fingerprint != before


def test_open_set_counts_as_many_steps_as_rows(tmp_path: Path) -> None:
    from data_builders.build import open_input

    config = load_config(config_file("build/demo_bccd.yaml"), BuildConfig)
    source, steps = open_input(config), []
    items = list(source.items(lambda: steps.append(1)))
    assert len(items) == len(steps) == source.total == 732


# Nobody's name


def test_no_name_of_a_file_or_patient_leaves_the_compiler(tmp_path: Path) -> None:
    names = ["jane_doe_1.png", "jane_doe_2.png", "john_roe.png", "broken_jim.png", "jill_again.png"]
    table = "file,label,patient,split\n"
    owners = ["Doe, Jane", "Doe, Jane", "Roe, John", "Jim Poe", "Roe, John"]
    for number, (name, owner) in enumerate(zip(names, owners, strict=True)):
        (tmp_path / name).write_bytes(png(number) if "jim" not in name else b"no image")
        table += f'{name},RBC,"{owner}",{"test" if "jill" in name else "train"}\n'
    table += "gone_jack.png,RBC,Jack,train\n"
    (tmp_path / "rows.csv").write_text(table)
    layout = {"type": "csv", "table": "rows.csv", "image": "file", "label": "label", "group": "patient",
              "split": "split", "hash_group": False}  # fmt: skip
    file = tmp_path / "cells.yaml"
    file.write_text(json.dumps(cells(layout=layout, public_ids=False).model_dump(mode="json")))
    config = BuildConfig.model_validate({
        "name": "cells", "licence": "all",
        "source": {"kind": "labels", "root": str(tmp_path), "recipe": str(file), "splits": None},
    })  # fmt: skip
    build(config, tmp_path / "out")
    dataset = DatasetFolder(tmp_path / "out")
    reasons = [row["reason"] for row in dataset.ledger.to_pylist()]
    assert {"group_in_two_splits", "not_an_image", "missing_file"} <= set(reasons)
    samples = list(dataset.samples())
    said = repr((dataset.index.to_pylist(), dataset.ledger.to_pylist(), [s.json for s in samples]))
    said += "".join(s.caption for s in samples) + (tmp_path / "out/leakage.json").read_text()
    said += (tmp_path / "out/README.md").read_text()
    assert not re.search(r"jane|john|jim|jill|jack|doe|roe|poe", said, re.IGNORECASE)
    # Two images of one patient are still of one group, and who holds the images can find them again.
    assert len({sample.row["group_id"] for sample in samples}) == 2
    assert write_names(config, tmp_path / "names.csv") == 6
    found = {line["key"]: line for line in csv.DictReader((tmp_path / "names.csv").read_text().splitlines())}
    assert found[samples[0].key]["sample_id"] in names
    lost = {row["item"] for row in dataset.ledger.to_pylist() if row["status"] == "dropped"}
    assert lost <= set(found)


# Splits


def grouped(count: int, **facts: Any) -> list[LabelledImage]:
    return [row("opacity", sample_id=f"{n}.png", image=ImageRef(path=f"{n}.png"), group_id=f"p{n // 3}", **facts)
            for n in range(count)]  # fmt: skip


def test_a_set_without_splits_is_dealt_by_group_and_growth_moves_nobody(tmp_path: Path) -> None:
    found = recipe(split={"val": 0.2, "test": 0.3, "seed": 4})
    small = assign_splits(found, manifest(tmp_path, *grouped(300)))
    large = assign_splits(found, manifest(tmp_path, *grouped(900)))
    splits = {image.sample_id: image.split for image in large.rows}
    assert all(splits[image.sample_id] == image.split for image in small.rows)
    homes: dict[str, set[str]] = {}
    for image in large.rows:
        homes.setdefault(image.group_id or "", set()).add(image.split or "")
    assert all(len(found) == 1 for found in homes.values())
    shares = {split: sum(home == {split} for home in homes.values()) / 300 for split in ("train", "val", "test")}
    # Three standard deviations of 300 draws.
    assert shares == pytest.approx({"train": 0.5, "val": 0.2, "test": 0.3}, abs=0.087)
    other = assign_splits(recipe(split={"val": 0.2, "test": 0.3, "seed": 5}), manifest(tmp_path, *grouped(900)))
    assert {image.sample_id: image.split for image in other.rows} != splits


@pytest.mark.parametrize(("of", "expected"), [("unsplit", 0), ("train", 1), ("all", 2)])
def test_given_splits_are_dealt_anew_only_where_the_rule_says_so(of: str, expected: int, tmp_path: Path) -> None:
    rows = [replace(image, split="test" if n % 2 else "train", group_id=f"g{n}") for n, image in enumerate(grouped(60))]
    table = assign_splits(recipe(split={"val": 0.5, "of": of}), manifest(tmp_path, *rows))
    moved = {image.split for image, before in zip(table.rows, sorted(rows, key=lambda r: r.sample_id), strict=True)
             if before.split == "test" and image.split != "test"}  # fmt: skip
    vals = {before.split for image, before in zip(table.rows, sorted(rows, key=lambda r: r.sample_id), strict=True)
            if image.split == "val"}  # fmt: skip
    assert len(vals) == expected
    assert bool(moved) == (of == "all")


def test_images_are_never_dealt_one_by_one_unless_asked(tmp_path: Path) -> None:
    rows = [replace(image, group_id=None) for image in grouped(30)]
    with pytest.raises(
        ConfigError, match=r"needs the group of each image, and 30 have none \(found 0.png\).*by: image"
    ):
        assign_splits(recipe(split={"val": 0.5}), manifest(tmp_path, *rows))
    table = assign_splits(recipe(split={"val": 0.5, "by": "image"}), manifest(tmp_path, *rows))
    assert {image.split for image in table.rows} == {"train", "val"}


@pytest.mark.parametrize("split", [{"val": 0.0}, {"val": 0.6, "test": 0.5}, {"test": 1.0}])
def test_a_split_that_holds_out_nothing_or_everything_is_refused(split: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"split"):
        recipe(split=split)
    with pytest.raises(ValueError, match="copies of one picture"):
        recipe(split={"val": 0.5, "by": "image"}, groups_are_duplicates=True)


def test_expected_counts_are_those_of_the_given_splits(tmp_path: Path) -> None:
    expect = {"counts": {"train": {"RBC": 6, "WBC": 3}, "val": {"RBC": 2, "WBC": 1}}}
    found = cells(expect=expect, split={"val": 0.9, "of": "train", "by": "image"})
    table = read_labelled_set(found, cell_folder(tmp_path))
    assert sum(image.split == "val" for image in table.rows) > 3


# Any number of processes


def test_processes_give_the_same_pairs_in_the_same_order(tmp_path: Path) -> None:
    rows = [row("opacity fracture", sample_id=f"{n:03d}.png", image=ImageRef(path=f"{n:03d}.png")) for n in range(300)]
    table = manifest(tmp_path, *rows)
    (tmp_path / "007.png").write_bytes(b"no image")
    alone = list(compile_pairs(recipe(), table, pixels=True))
    assert alone == list(compile_pairs(recipe(), table, pixels=True, workers=2))
    assert len(alone) == 300
    assert sum(isinstance(item, Drop) for item in alone) == 1


def test_a_stored_array_row_is_what_checking_its_bytes_gives() -> None:
    random = np.random.default_rng(0)
    for shape in ((28, 28), (28, 28, 3), (28, 28, 4)):
        image = Image.fromarray(random.integers(0, 256, shape, np.uint8))
        assert store_picture(image) == check_image(encode_png(image))


# The commands


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and all output of a `data` command."""
    done = run_command("data", *arguments)
    return done.returncode, done.stdout + done.stderr


def test_a_folder_of_ones_own_is_linted_compiled_and_verified_from_the_command_line(tmp_path: Path) -> None:
    folder, file, out = cell_folder(tmp_path / "cells"), tmp_path / "cells.yaml", tmp_path / "out"
    file.write_text(json.dumps(cells(public_ids=False, balance={"mode": "uniform"}).model_dump(mode="json")))
    assert run("lint", str(file)) == (0, f"{file}: nothing found in 2 classes of 1 recipe\n")
    command = ("compile", str(file), "--root", str(folder), "--out", str(out))
    assert run(*command) == (2, "error: --set: licence: is missing; add it\n")
    code, said = run(*command, "--set", "licence=commercial", "--names", str(tmp_path / "names.csv"))
    assert code == 0
    assert f"{out}: 10 seen, 9 kept\n        1 dropped: not_an_image_file" in said
    assert "classes    RBC 6, WBC 3\nbalanced   RBC 4, WBC 4 (uniform" in said
    assert "leakage    compared with val (3)" in said
    assert (tmp_path / "names.csv").read_text().count("\n") == 14
    assert run("verify", str(out))[0] == 0
    file.write_text(file.read_text().replace("erythrocyte", "erythrocyte [cell]"))
    code, said = run("lint", str(file))
    assert code == 2
    assert "cells: classes.RBC: 'erythrocyte [cell]' holds '['" in said
    assert (
        "context: is no text tower (found 'gpt'); use one of clip, bert" in run("lint", "bccd", "--context", "gpt")[1]
    )


def test_the_table_of_recipes_lists_each_one_without_heavy_imports() -> None:
    script = (
        "from data_builders.labels.summary import recipes_table\n"
        "from data_builders.labels.recipe import recipe_names\nrows = recipes_table().splitlines()\n"
        "assert [row.split()[0] for row in rows[1:len(recipe_names()) + 1]] == recipe_names()\n"
        "print(*rows[0].split())"
    )
    said, loaded = run_fresh(script)
    assert said == "name modality kind images licence access verified\n"
    assert loaded & {"torch", "pyarrow", "PIL", "numpy"} == set()


def test_masks_beside_the_images_of_busi_are_ledger_rows_and_never_samples(tmp_path: Path) -> None:
    found = load_recipe("busi").model_copy(update={"expect": None})
    for number, label in enumerate(("benign", "malignant", "normal")):
        folder = tmp_path / "Dataset_BUSI_with_GT" / label
        folder.mkdir(parents=True)
        (folder / f"{label} (1).png").write_bytes(png(number * 50))
        for mask in ("_mask", "_mask_1"):
            (folder / f"{label} (1){mask}.png").write_bytes(png(255))
    items = list(compile_pairs(found, read_labelled_set(found, tmp_path)))
    assert sorted(item.labels[0] for item in items if isinstance(item, Pair)) == ["benign", "malignant", "normal"]
    assert [item.reason for item in items if isinstance(item, Drop)] == ["excluded"] * 6
