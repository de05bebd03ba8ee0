"""Tasks: what is asked of a model, as data.

Reads `suites/*.yaml`, one file a suite, and yields frozen `Task` objects, checked to the last key: classes in label
order with the words that name them, prompt sets each with its source, metrics, the unit of the bootstrap, expected
counts, licence and what is known about contamination. A task names no folder: where its data lies is said when it is
run (`data: {bccd: DIR}`), so that one definition serves every machine. A task is added by adding YAML, no code.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from biomedclip.config import Config, check_config, parse_yaml
from biomedclip.errors import ConfigError

EnsembleMode = Literal["embed", "logit", "max", "lse", "prob", "none"]

CLASS_METRICS = (
    "balanced_accuracy", "accuracy", "auroc", "auroc_pairs", "auroc_micro", "auprc", "macro_f1", "weighted_f1", "mcc",
    "kappa", "quadratic_kappa", "mean_absolute_error", "within_one", "ece", "ace", "brier", "nll",
)  # fmt: skip
LABEL_METRICS = ("auroc", "auprc", "macro_f1")
OPTION_METRICS = ("accuracy", "over_chance")
RANK_METRICS = tuple(
    f"{direction}/{metric}"
    for direction in ("image_to_text", "text_to_image")
    for metric in (
        "recall@1",
        "recall@5",
        "recall@10",
        "full_recall@1",
        "full_recall@5",
        "full_recall@10",
        "mrr",
        "median_rank",
    )
)


class ClassName(Config):
    """One class: its label in the manifest and the words a prompt uses for it."""

    label: str
    name: str
    synonyms: tuple[str, ...] = ()
    positive: bool = False
    complement: str = ""
    """Labels that are themselves an absence ("no finding"): what is seen where they do not hold, said in words."""


class PromptSet(Config):
    """Either templates with one `{}` for the class name, or sentences written out for each label."""

    source: str
    """Who wrote these prompts: a paper, a repository, or this project."""
    templates: tuple[str, ...] = ()
    per_class: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    negative: tuple[str, ...] = ()
    """Several labels only: what is said where a label is absent, such as `no {}`."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if bool(self.templates) == bool(self.per_class):
            raise ValueError("give either templates or per_class")
        return self


class Ensemble(Config):
    """How the prompts of a class become one score (zero_shot.py has the formulas)."""

    mode: EnsembleMode = "embed"
    renorm: bool = True
    """embed only: scale the mean embedding back to length 1. Without it classes with alike prompts are favoured."""
    synonyms: bool = False
    """Fill the templates with the synonyms too."""


class Metrics(Config):
    """The headline metric and the others; averages over tasks are only ever taken over one metric."""

    primary: str
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All metrics, the primary one first."""
        return (self.primary, *(name for name in self.also if name != self.primary))


class BootstrapUnit(Config):
    """What is resampled: groups (patients, slides, articles), samples within their class, or single samples."""

    by: Literal["group", "class", "sample"] = "group"


class Expect(Config):
    """Counts the split should have; `subset` allows fewer (a shipped sample), `verified` says who counted."""

    n: int | None = None
    classes: dict[str, int] = Field(default_factory=dict)
    subset: bool = False
    verified: bool = False


class Published(Config):
    """A published result that a run can be held against."""

    model: str
    metric: str
    value: float
    n: int | None
    """Samples it was measured on; null where the source does not say."""
    prompt_set: str | None = None
    source: str
    verified: bool = False
    """Whether somebody read it in the source itself."""


class Task(Config):
    """One question asked of a model, on one split of one data set."""

    name: str
    suite: str
    title: str
    modality: str
    kind: Literal["zero_shot", "options", "retrieval"]
    labels: Literal["single", "multi", "ordinal"] = "single"
    closed: bool = True
    """Several labels: what a row does not name is absent. False: only what it denies is, the rest is not stated."""
    pool: Annotated[int, Field(ge=1)] | None = None
    """Rows are patches of the slide that is their group: a slide's score is the mean of its `pool` highest."""
    layout: dict[str, Any]
    """`type` names a layout of biomedclip.layouts, the other keys are its options."""
    split: str
    select_split: str | None = None
    """Where anything tuned (a threshold, a temperature) is chosen; never the split that is scored."""
    classes: tuple[ClassName, ...] = ()
    prompt_sets: dict[str, PromptSet] = Field(default_factory=dict)
    ensemble: Ensemble = Ensemble()
    metrics: Metrics
    bootstrap: BootstrapUnit = BootstrapUnit()
    group: str | None = None
    """What a group is, in words; None where the data does not say which samples belong together."""
    expect: Expect = Expect()
    verified: bool = True
    """Whether class list and layout were checked against the data or its makers' code."""
    licence: str
    citation: str
    contamination: str
    published: tuple[Published, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.select_split == self.split:
            raise ValueError(f"select_split must differ from split ('{self.split}'): nothing is chosen on scored data")
        if "type" not in self.layout:
            raise ValueError("layout needs a type")
        known = self._known_metrics()
        for name in self.metrics.names:
            if name not in known:
                raise ValueError(f"metric '{name}' is unknown for {self.kind};{_suggest(name, known)}")
        if self.kind == "zero_shot":
            self._check_classes()
        return self

    def _known_metrics(self) -> tuple[str, ...]:
        if self.kind == "zero_shot":
            return LABEL_METRICS if self.labels == "multi" else CLASS_METRICS
        return OPTION_METRICS if self.kind == "options" else RANK_METRICS

    def _check_classes(self) -> None:
        if self.pool and self.labels == "multi":
            raise ValueError("slides are pooled for classes that exclude each other, not for several labels")
        for key, prompts in self.prompt_sets.items():
            if self.labels == "multi" and not (prompts.negative and prompts.templates):
                raise ValueError(f"prompt set '{key}' needs templates and negative templates: each label is two")
        labels = [c.label for c in self.classes]
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"zero_shot needs two or more classes with different labels, not {labels}")
        if not self.prompt_sets:
            raise ValueError("zero_shot needs a prompt set")
        for key, prompts in self.prompt_sets.items():
            if prompts.per_class and set(prompts.per_class) != set(labels):
                raise ValueError(f"prompt set '{key}' must have one entry for each of {labels}")
        marked = [i for i, c in enumerate(self.classes) if c.positive]
        if marked and (len(labels) > 2 or marked != [1]):
            raise ValueError("the positive class must be the second of two: scores are of class 1 over class 0")
        unknown = set(self.expect.classes) - set(labels)
        if unknown:
            raise ValueError(f"expect names labels that are no class: {sorted(unknown)}")


def parse_suite(text: str, where: str) -> dict[str, Task]:
    """The tasks of one suite file. Raises ConfigError for anything a task cannot hold."""
    values = parse_yaml(text, where)
    if not isinstance(values, dict) or set(values) != {"suite", "tasks"} or not isinstance(values["tasks"], dict):
        raise ConfigError(where, "must hold `suite: NAME` and `tasks: {NAME: …}`")
    return {
        name: check_config({"name": name, "suite": values["suite"], **facts}, Task, f"{where}: {name}")
        for name, facts in values["tasks"].items()
    }


@cache
def load_tasks() -> dict[str, Task]:
    """Every task of this project by name. Raises ConfigError where two suites use one name."""
    tasks: dict[str, Task] = {}
    folder = resources.files("biomedclip.evaluation") / "suites"
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if not file.name.endswith(".yaml"):
            continue
        for name, task in parse_suite(file.read_text(encoding="utf-8"), file.name).items():
            if name in tasks:
                raise ConfigError(file.name, f"task {name} is also in suite {tasks[name].suite}", todo="rename one")
            tasks[name] = task
    return tasks


def find_task(name: str) -> Task:
    """The task of that name. Raises ConfigError with the nearest known name."""
    tasks = load_tasks()
    if name not in tasks:
        raise ConfigError(f"task {name}", "is not known", todo=_suggest(name, tuple(tasks)).strip())
    return tasks[name]


def _suggest(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" did you mean '{near[0]}'?" if near else f" known: {', '.join(known)}"
