"""Task definitions: what the shipped suites say and what a suite file may not say."""

import pytest

from biomedclip.config import config_file, load_config
from biomedclip.errors import ConfigError
from biomedclip.evaluation.config import EvaluateConfig
from biomedclip.evaluation.prompts import compile_prompts
from biomedclip.evaluation.tasks import find_task, load_tasks, parse_suite
from biomedclip.layouts import LAYOUTS

SUITE = """
suite: microscopy
tasks:
  cells:
    title: Cells
    modality: microscopy
    kind: zero_shot
    layout: {type: image_folder}
    split: test
    select_split: val
    classes: [{label: a, name: red cell}, {label: b, name: white cell}]
    prompt_sets: {default: {source: here, templates: ["a {}"]}}
    metrics: {primary: accuracy}
    licence: MIT
    citation: none
    contamination: none known
"""


def test_the_three_shipped_tasks_are_complete():
    tasks = load_tasks()
    assert {"bccd", "pneumoniamnist", "article_retrieval"} <= set(tasks)
    for name, task in tasks.items():
        assert task.name == name
        assert task.layout["type"] in LAYOUTS
        assert task.licence
        assert task.contamination
        for prompt_set in task.prompt_sets:
            assert all(compile_prompts(task, prompt_set).values())
            assert task.prompt_sets[prompt_set].source
    assert tasks["bccd"].bootstrap.by == tasks["article_retrieval"].bootstrap.by == "group"


def test_the_shipped_config_loads_and_names_known_tasks():
    config = load_config(config_file("evaluate/demo.yaml"), EvaluateConfig)
    assert [find_task(name).name for name in config.tasks] == list(config.tasks)
    assert set(config.data) == set(config.tasks)


def test_an_unknown_task_is_met_with_the_nearest_one():
    with pytest.raises(ConfigError, match="did you mean 'pneumoniamnist'"):
        find_task("pneumonia_mnist")


def test_a_correct_suite_is_read():
    task = parse_suite(SUITE, "x.yaml")["cells"]
    assert [c.name for c in task.classes] == ["red cell", "white cell"]
    assert task.metrics.names == ("accuracy",)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("split: test\n", "splitt: test\n", "did you mean 'split'"),
        ("primary: accuracy", "primary: acuracy", "did you mean 'accuracy'"),
        ("primary: accuracy", "primary: image_to_text/recall@1", "unknown for zero_shot"),
        ("select_split: val", "select_split: test", "nothing is chosen on scored data"),
        ("label: b", "label: a", "different labels"),
        ('templates: ["a {}"]', "per_class: {a: [x]}", "one entry for each"),
        ('templates: ["a {}"]', 'templates: ["a {}"], per_class: {a: [x], b: [y]}', "either templates or per_class"),
        ("{label: a, name: red cell}", "{label: a, name: red cell, positive: true}", "second of two"),
        ("licence: MIT", "licence: MIT\n    expect: {classes: {c: 1}}", "no class"),
        ("{type: image_folder}", "{root: x}", "layout needs a type"),
        ("tasks:", "task:", "must hold"),
    ],
)
def test_what_a_task_cannot_be_is_refused_with_its_name(old, new, message):
    assert old in SUITE
    with pytest.raises(ConfigError, match=message) as caught:
        parse_suite(SUITE.replace(old, new), "x.yaml")
    assert str(caught.value).startswith("x.yaml")
