"""Captions: pure, never more than the labels, never against one another; and the defects of published caption sets.

The second half names one defect after another that was read in the label-to-caption scripts of published models; each
is a way in which a caption set can be wrong without anybody noticing.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from PIL import Image

from biomedclip.errors import ConfigError
from biomedclip.images import check_image
from biomedclip.layouts.manifest import make_manifest
from biomedclip.schema import Drop, ImageRef, LabelledImage, Pair
from data_builders.labels.captions import Facts, Refused, caption_row, prepare_speech, settle_facts
from data_builders.labels.compile import compile_pairs, read_labelled_set
from data_builders.labels.fields import field_labels, label_fields
from data_builders.labels.lint import lint_recipe
from data_builders.labels.recipe import Recipe, load_recipe, recipe_names

# Words that hold none of the others, so that what a caption says can be read back from it.
NAMES = {"clear": "clearfilm", "shadow": "shadowing", "lobar": "lobefire", "edema": "waterlung", "wire": "pacewire"}
PARENTS = {"lobar": ["shadow"], "edema": ["shadow"]}
FILM: dict[str, Any] = {
    "name": "film", "title": "Film", "modality": "chest X-ray", "layout": {"type": "csv"}, "kind": "multi",
    "classes": [{"label": label, "name": name, "synonyms": [f"{name} sign"], "parents": PARENTS.get(label, []),
                 "normal": label == "clear", "incidental": label == "wire"} for label, name in NAMES.items()],
    "templates": {
        "single": ["Chest X-ray showing {x}.", "{a_x} on a chest X-ray.", "Chest X-ray: {x}."],
        "many": ["Chest X-ray showing {list}.", "Chest X-ray: {list}."],
        "negative": ["Absent is {x}.", "Absent are {x}."], "uncertain": ["Possibly {x}."],
        "none": ["Chest X-ray, all quiet."],
    },
    "uncertain": "hedge", "compose": {"negative_rate": 0.5, "parent_rate": 0.4}, "captions_per_image": 6,
    "licence": {"code": "CC0", "evidence": "made up"}, "citation": "nobody",
}  # fmt: skip
KNEE: dict[str, Any] = {
    "name": "scan", "title": "Scan", "modality": "MRI", "layout": {"type": "csv"}, "kind": "multi_field",
    "fields": [
        {"name": "organ", "column": "Region", "classes": [{"label": "kn", "name": "knee"},
                                                          {"label": "hp", "name": "hip"}]},
        {"name": "finding", "classes": [{"label": "tear", "name": "torn meniscus", "definition": "a bright line"},
                                        {"label": "normal", "name": "nothing abnormal", "countable": False,
                                         "definition": "even dark tissue"}]},
        {"name": "stain", "optional": True, "classes": [{"label": "gd", "name": "gadolinium"}]},
    ],
    "templates": {"single": ["MRI of the {organ} with {a_finding}.", "MRI, {finding}: {finding_definition}.",
                             "MRI after {stain}, {organ}."]},
    "captions_per_image": 4, "licence": {"code": "CC0", "evidence": "made up"}, "citation": "nobody",
}  # fmt: skip
NATIVE: dict[str, Any] = {
    "name": "told", "title": "Told", "modality": "fundus photograph", "layout": {"type": "csv"}, "kind": "caption",
    "licence": {"code": "CC0", "evidence": "made up"}, "citation": "nobody",
}  # fmt: skip


def film(**changes: Any) -> Recipe:
    return Recipe.model_validate(FILM | changes)


def row(labels: str = "", negatives: str = "", uncertain: str = "", **facts: Any) -> LabelledImage:
    said = {"labels": labels, "negatives": negatives, "uncertain": uncertain}
    values: dict[str, Any] = {name: tuple(text.split()) for name, text in said.items()}
    return LabelledImage(**{"sample_id": "a.png", "image": ImageRef(path="a.png"), **values, **facts})


def speak(recipe: Recipe, image: LabelledImage) -> tuple[str, ...]:
    return caption_row(prepare_speech(recipe), image)[1]


def said(captions: tuple[str, ...]) -> dict[str, set[str]]:
    """What all captions together assert, deny and call possible, read from their words alone."""
    found: dict[str, set[str]] = {"labels": set(), "negatives": set(), "uncertain": set()}
    for caption in captions:
        rest = caption
        for part, pattern in (("negatives", r"absent (?:is|are) ([^.]*)\."), ("uncertain", r"possibly ([^.]*)\.")):
            for match in re.finditer(pattern, rest, re.IGNORECASE):
                found[part] |= {label for label, name in NAMES.items() if name in match[1].lower()}
                rest = rest.replace(match[0], "")
        found["labels"] |= {label for label, name in NAMES.items() if name in rest.lower()}
    return found


STATES = st.fixed_dictionaries({label: st.sampled_from(["labels", "negatives", "uncertain", ""]) for label in NAMES})


@settings(max_examples=200, deadline=None)
@given(states=STATES, sample_id=st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
       policy=st.sampled_from(["hedge", "positive", "negative", "drop"]))  # fmt: skip
def test_captions_never_contradict_labels_or_one_another(states: dict[str, str], sample_id: str, policy: str) -> None:
    stated = {
        part: {label for label in NAMES if states[label] == part} for part in ("labels", "negatives", "uncertain")
    }
    image = row(sample_id=sample_id, **{part: " ".join(sorted(labels)) for part, labels in stated.items()})
    recipe = film(uncertain=policy)
    try:
        captions = speak(recipe, image)
    except Refused as refusal:
        event(refusal.reason)
        return
    spoken = said(captions)
    asserted, denied, doubted = spoken["labels"], spoken["negatives"], spoken["uncertain"]
    above = {"shadow"} if asserted & {"lobar", "edema"} else set()
    positive = stated["labels"] | (stated["uncertain"] if policy == "positive" else set())
    negative = stated["negatives"] | (stated["uncertain"] if policy == "negative" else set())
    assert asserted <= positive | above, "a child may speak of its parent, nothing else is added"
    assert denied <= negative, "absence only where the data says zero"
    assert not denied & (asserted | doubted | above), "no caption denies what another asserts"
    assert not doubted & (asserted | above), "nor doubts it"
    assert doubted <= stated["uncertain"]
    assert "clear" not in denied, "nobody says that no normality is seen"
    if "clear" in asserted:
        assert asserted <= {"clear", "wire"}
    assert captions == speak(recipe, image), "the same for the same recipe and sample"


def test_a_normal_image_may_show_a_device_and_nothing_else() -> None:
    assert speak(film(), row("clear wire"))
    for image in (row("clear edema"), row("clear", "", "lobar")):
        with pytest.raises(Refused, match="contradictory_labels: normal, and"):
            speak(film(), image)


def test_a_parent_that_follows_from_a_child_is_not_doubted() -> None:
    facts = settle_facts(prepare_speech(film()), row("lobar", "", "shadow edema"))
    assert (facts.positive, facts.uncertain) == (("lobar",), ("edema",))


def test_all_findings_absent_is_all_quiet_although_the_normal_class_is_no_finding() -> None:
    assert set(speak(film(), row("", "shadow lobar edema wire"))) == {"Chest X-ray, all quiet."}


# Several fields


def scan(**attributes: str) -> LabelledImage:
    return row(attributes=attributes)


def test_the_columns_of_a_multi_field_set_become_labels(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(KNEE)
    assert recipe.labels == ("organ=kn", "organ=hp", "finding=tear", "finding=normal", "stain=gd")
    rows = [row(sample_id=name, image=ImageRef(path=name), attributes=facts) for name, facts in {
        "a": {"Region": "kn", "finding": "tear", "stain": "gd"}, "b": {"Region": "hp", "finding": "normal"},
        "c": {"Region": "hp", "finding": "taer"}, "d": {"Region": "", "finding": "tear"},
    }.items()]  # fmt: skip
    found = label_fields(recipe, make_manifest("scan", tmp_path, rows, kind="caption"))
    assert found.kind == "multi"
    assert [image.labels for image in found.rows] == [("organ=kn", "finding=tear", "stain=gd"),
                                                      ("organ=hp", "finding=normal")]  # fmt: skip
    assert [(drop.item, drop.reason, drop.detail) for drop in found.drops] == [
        ("c", "unknown_label", "finding 'taer'; did you mean 'tear'?"), ("d", "missing_field", "organ")]  # fmt: skip
    with pytest.raises(ConfigError, match="is read from the column 'Region', which the layout does not give"):
        label_fields(recipe, make_manifest("scan", tmp_path, [row(attributes={"finding": "tear"})], kind="caption"))


def test_captions_of_several_fields_speak_of_those_that_are_known() -> None:
    recipe = Recipe.model_validate(KNEE)
    known = {"Region": "kn", "finding": "tear"}
    labels = field_labels(recipe, known)
    plain = speak(recipe, row(" ".join(labels)))
    assert set(plain) == {"MRI of the knee with a torn meniscus.", "MRI, torn meniscus: a bright line."}
    stained = speak(recipe, row("organ=hp finding=normal stain=gd"))
    assert set(stained) == {"MRI of the hip with nothing abnormal.", "MRI, nothing abnormal: even dark tissue.",
                            "MRI after gadolinium, hip."}  # fmt: skip


def test_a_multi_field_set_and_a_captioned_set_compile_from_their_tables(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "t.csv").write_text("file,Region,finding,words\na.png,kn,tear,Case _dr_ 1\n")
    layout = {"type": "csv", "table": "t.csv", "image": "file"}
    recipe = Recipe.model_validate(KNEE | {"layout": {**layout, "attributes": ["Region", "finding"]}, "fields": [
        field | {"optional": False} for field in KNEE["fields"][:2]],
        "templates": {"single": ["MRI of the {organ} with {a_finding}."]}})  # fmt: skip
    [pair] = compile_pairs(recipe, read_labelled_set(recipe, tmp_path))
    assert isinstance(pair, Pair)
    assert (pair.caption, pair.labels) == ("MRI of the knee with a torn meniscus.", ("organ=kn", "finding=tear"))
    assert pair.label_ids == (0, 2)
    told = Recipe.model_validate(NATIVE | {"layout": {**layout, "text": "words"}})
    [pair] = compile_pairs(told, read_labelled_set(told, tmp_path))
    assert isinstance(pair, Pair)
    assert (pair.captions, pair.labels) == (("Case _dr_ 1",), ())


# Paraphrases


def test_paraphrases_are_further_sentences_for_images_of_one_class() -> None:
    recipe = film(paraphrases={"edema": ["A chest X-ray in which waterlung fills both bases."]}, captions_per_image=9)
    assert "A chest X-ray in which waterlung fills both bases." in speak(recipe, row("edema"))
    assert not any("both bases" in caption for caption in speak(recipe, row("edema wire")))
    assert not any("both bases" in caption for caption in speak(recipe, row("lobar")))


# The ten defects of published label-to-caption scripts, and what is done about each


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 10, 10)).save(buffer, "PNG")
    return buffer.getvalue()


def pairs(folder: Path, recipe: Recipe, *rows: LabelledImage, **facts: Any) -> list[Pair | Drop]:
    for image in rows:
        (folder / image.image.path).write_bytes(png())
    kind = "multi" if recipe.kind == "multi" else "single"
    return list(compile_pairs(recipe, make_manifest("set", folder, rows, kind=kind, classes=recipe.labels),
                              **facts))  # fmt: skip


def cells(**changes: Any) -> Recipe:
    return film(**{
        "name": "cells", "modality": "blood smear", "kind": "single",
        "classes": [{"label": "RBC", "name": "red cell"}, {"label": "WBC", "name": "white cell"}],
        "templates": {"single": ["A blood smear of {a_x}.", "Blood smear: {x}."]}, "captions_per_image": 2, **changes,
    })  # fmt: skip


def test_defect_1_same_sentences_are_no_false_negatives_because_label_ids_travel(tmp_path: Path) -> None:
    rows = [row("RBC", sample_id=name, image=ImageRef(path=name)) for name in ("a.png", "b.png", "c.png", "d.png")]
    found = [pair for pair in pairs(tmp_path, cells(), *rows) if isinstance(pair, Pair)]
    assert len({pair.caption for pair in found}) < len(found), "captions of one class do repeat"
    assert {pair.label_ids for pair in found} == {(0,)}, "and the loss can see that they are of one class"


def test_defect_2_banned_categories_are_enforced_in_images_and_captions(tmp_path: Path) -> None:
    rows = [row(label, sample_id=f"{label}.png", image=ImageRef(path=f"{label}.png")) for label in ("RBC", "WBC")]
    found = pairs(tmp_path, cells(banned=["WBC"]), *rows)
    assert [item.reason for item in found if isinstance(item, Drop)] == ["banned_class"]
    assert not any("white cell" in c for item in found if isinstance(item, Pair) for c in item.captions)


@pytest.mark.parametrize("name", ["flair_retina", "jsiec1000"])
def test_defect_2_the_recipes_of_the_retina_hold_out_what_the_zero_shot_tests_ask(name: str) -> None:
    recipe = load_recipe(name)
    banned = {recipe.entries[recipe.labels.index(label)].name for label in recipe.banned}
    assert {"macular hole", "retinitis pigmentosa"} <= banned


def test_defect_3_images_of_a_test_split_never_become_training_pairs(tmp_path: Path) -> None:
    rows = [row("RBC", sample_id=f"{split}.png", image=ImageRef(path=f"{split}.png"), split=split, group_id=group)
            for split, group in (("train", "p1"), ("test", "p2"))]  # fmt: skip
    twin = row("RBC", sample_id="twin.png", image=ImageRef(path="twin.png"), split="train", group_id="p2")
    found = pairs(tmp_path, cells(), *rows, twin, splits=("train",))
    assert [item.split for item in found if isinstance(item, Pair)] == ["train"]
    assert [item.reason for item in found if isinstance(item, Drop)] == ["group_in_two_splits"]


def test_defect_4_whole_test_sets_say_so_and_splits_are_part_of_every_pair(tmp_path: Path) -> None:
    [pair] = pairs(tmp_path, cells(), row("RBC", split="test"))
    assert isinstance(pair, Pair)
    assert pair.split == "test"


def test_defect_5_foreign_words_missing_modalities_and_unequal_prompts_are_linted() -> None:
    classes = [{"label": "b", "name": "benign lesion", "synonyms": ["benign mass"]},
               {"label": "m", "name": "lesion (migraine)"}]  # fmt: skip
    breast = {"modality": "breast ultrasound", "regions": ["breast"], "kind": "single", "classes": classes}
    problems = "\n".join(lint_recipe(film(**breast, templates={"single": ["Symmetrical shape, {x}."]})))
    assert "'migraine' belongs to brain, not to breast" in problems
    assert "templates.single[0]: names no modality (breast ultrasound)" in problems
    assert "unequal numbers of names and synonyms (b 2, m 1)" in problems


def test_defect_5_every_caption_names_the_modality() -> None:
    recipe = cells(templates={"single": ["{x}.", "Shown is {a_x}."]})
    assert all("blood smear" in caption.lower() for caption in speak(recipe, row("RBC")))


def test_defect_5_all_prompts_of_a_class_are_used_not_the_first_alone() -> None:
    templates = {"single": [f"Blood smear {n} with {{x}}." for n in range(5)]}
    first = {speak(cells(templates=templates), row("RBC", sample_id=f"{n}.png"))[0] for n in range(60)}
    assert len(first) == 5


def test_defect_6_a_mistyped_key_is_an_error_with_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "film.yaml"
    path.write_text("name: film\ncaptions_per_imag: 3\n")
    with pytest.raises(ConfigError, match="captions_per_imag: unknown key; did you mean 'captions_per_image'"):
        load_recipe(path)


def test_defect_7_png_bytes_are_not_called_jpg(tmp_path: Path) -> None:
    [pair] = pairs(tmp_path, cells(), row("RBC", sample_id="lie.jpg", image=ImageRef(path="lie.jpg")))
    assert isinstance(pair, Pair)
    assert (pair.image_format, check_image(pair.image).format) == ("png", "png")


def test_defect_8_labels_stay_beside_the_captions(tmp_path: Path) -> None:
    [pair] = pairs(tmp_path, film(), row("edema", "wire", "lobar"))
    assert isinstance(pair, Pair)
    assert (pair.labels, pair.label_ids) == (("edema",), (3,))
    assert pair.sidecar["negatives"] == ["wire"]
    assert pair.sidecar["uncertain"] == ["lobar"]


@pytest.mark.parametrize("text", ["Fig_dr_2: a scar.", "left eye ._chexpert_ 3", "no_radimagenet_or_chestxray8_"])
def test_defect_9_native_captions_are_never_cut_at_what_looks_like_a_separator(text: str) -> None:
    recipe = Recipe.model_validate(NATIVE)
    assert speak(recipe, row(text=f"  {text}\n")) == (text,)
    wrapped = Recipe.model_validate(NATIVE | {"templates": {"single": ["Fundus photograph. {text}"]}})
    assert speak(wrapped, row(text=text)) == (f"Fundus photograph. {text}",)


def test_defect_9_an_image_without_its_caption_is_refused_not_filled_with_a_sentinel() -> None:
    with pytest.raises(Refused, match="no_caption"):
        speak(Recipe.model_validate(NATIVE), row(text=" "))


def test_defect_10_the_patient_stays_with_the_image(tmp_path: Path) -> None:
    rows = [row("RBC", sample_id=f"{n}.png", image=ImageRef(path=f"{n}.png"), group_id="patient 7") for n in range(2)]
    found = [item for item in pairs(tmp_path, cells(), *rows) if isinstance(item, Pair)]
    assert len({pair.group_id for pair in found}) == 1
    assert found[0].group_id
    open_ids = [p for p in pairs(tmp_path, cells(public_ids=True), *rows) if isinstance(p, Pair)]
    assert open_ids[0].group_id == "patient 7"


# The project's own recipes


@pytest.mark.parametrize("name", [name for name in recipe_names() if load_recipe(name).kind == "multi"])
def test_no_recipe_of_the_project_lets_a_normal_image_have_findings(name: str) -> None:
    recipe = load_recipe(name)
    normal = [entry.label for entry in recipe.entries if entry.normal]
    others = [entry.label for entry in recipe.entries if not entry.normal and not entry.incidental]
    for label in normal:
        with pytest.raises(Refused, match="contradictory_labels"):
            settle_facts(prepare_speech(recipe), LabelledImage(sample_id="a", image=ImageRef(path="a"),
                                                               labels=(label, others[0])))  # fmt: skip


def test_facts_are_empty_for_images_that_bring_their_caption() -> None:
    assert caption_row(prepare_speech(Recipe.model_validate(NATIVE)), row(text="An eye."))[0] == Facts()
