"""Prompts as they reach the tokenizer, and the accidents that are refused."""

import pytest

from biomedclip.errors import ConfigError
from biomedclip.evaluation.prompts import check_distinct, check_residue, compile_prompts, fill, list_warnings
from biomedclip.evaluation.tasks import find_task


def letters(texts):
    """A tokenizer that sees the first twelve letters only, in lower case."""
    return [[ord(c) for c in text.lower()[:12]] for text in texts]


def test_prompts_are_templates_times_names_in_class_order():
    prompts = compile_prompts(find_task("bccd"))
    assert list(prompts) == ["Platelets", "RBC", "WBC"]
    assert prompts["RBC"] == [
        "red blood cell",
        "a microscopy image of a red blood cell",
        "a light micrograph showing a red blood cell",
        "a red blood cell in a stained blood smear",
    ]


def test_synonyms_are_used_when_asked_for():
    plain, more = (compile_prompts(find_task("bccd"), "single", synonyms=s) for s in (False, True))
    assert plain["RBC"] == ["a microscopy image of a red blood cell"]
    assert more["RBC"][1] == "a microscopy image of an erythrocyte"


def test_an_unknown_prompt_set_is_met_with_the_nearest_one():
    with pytest.raises(ConfigError, match="did you mean 'biomedclip'"):
        compile_prompts(find_task("pneumoniamnist"), "biomedclipp")


def test_only_the_article_before_the_name_changes():
    assert fill("a view of a {}", "oval cell") == "a view of an oval cell"
    assert fill("a view of a {}", "cell") == "a view of a cell"
    assert fill("{} in a image", "oval cell") == "oval cell in a image"
    assert fill("pneumonia {}", "area") == "pneumonia area"


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_without_one_place_for_the_name_is_refused(template):
    with pytest.raises(ConfigError, match="once"):
        fill(template, "x")


@pytest.mark.parametrize(
    ("prompt", "meaning"),
    [
        ("an X-ray of {c}", "placeholder"),
        ("lungs with no no finding", "double negation"),
        ("no  finding", "stray spaces"),
        (" edema", "stray spaces"),
        ("an image of None", "missing"),
        ("", "."),
    ],
)
def test_residue_is_refused_with_the_sentence(prompt, meaning):
    with pytest.raises(ConfigError, match=meaning):
        check_residue({"a": ["fine"], "b": [prompt]}, "here")


def test_ordinary_sentences_pass():
    check_residue(
        {"a": ["no finding", "lungs without effusion; nothing else (AP view)", "no sign, not even nodules"]}, ""
    )
    with pytest.raises(ConfigError, match="no prompt"):
        check_residue({"a": []}, "here")


def test_classes_that_tokenise_alike_are_refused():
    with pytest.raises(ConfigError, match="left and right are the same to the tokenizer"):
        check_distinct({"left": ["chest X-ray: left"], "right": ["Chest X-Ray: right"]}, letters, "here")
    check_distinct({"left": ["left lung"], "right": ["right lung"]}, letters, "here")


def test_unequal_counts_and_shared_sentences_are_told():
    warnings = list_warnings({"a": ["x", "y"], "b": ["y"]})
    assert warnings == ["unequal prompt counts: a 2, b 1", "b and a share the prompt 'y'"]
    assert list_warnings({"a": ["x"], "b": ["y"]}) == []
