"""What is asked of a picture: labels, and the prompts that stand for them.

Reads labels as typed, a task of the suites or a file of prompts; yields a frozen `Question` that a classifier embeds
once. Labels as typed fill three neutral templates, because a model that learned from sentences knows a bare word less
well; tasks and prompt files say their own words. What a model cannot answer is refused here, in one line: no label or
one, two that are the same to a reader, and (once the tokenizer is known) two that are the same to the model.
"""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from biomedclip.config import read_yaml
from biomedclip.errors import ConfigError
from biomedclip.evaluation.prompts import (
    Tokenizer,
    check_distinct,
    check_residue,
    compile_negatives,
    compile_prompts,
    fill,
)
from biomedclip.evaluation.tasks import Ensemble, find_task

TEMPLATES = ("{}", "an image of {}", "a medical image showing {}")
"""The prompts of a bare label: the mean of their embeddings stands for it. Chosen as words, measured on nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Labels and the sentences that stand for each."""

    prompts: Mapping[str, Sequence[str]]
    negatives: Mapping[str, Sequence[str]] | None = None
    """For labels that hold side by side: what is said where one is absent. None where one label fits."""
    ensemble: Ensemble = field(default_factory=Ensemble)
    where: str = "labels"
    """What the user gave, for messages."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in order."""
        return tuple(self.prompts)

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise ConfigError where two labels are the same to the tokenizer, or a label and its absence."""
        check_distinct(self.prompts, tokenizer, self.where)
        for label, absent in (self.negatives or {}).items():
            check_distinct({label: self.prompts[label], f"the absence of {label}": absent}, tokenizer, self.where)


def read_question(
    labels: str | None, task: str | None, prompts: Path | None, templates: Sequence[str] | None
) -> Question:
    """The question that exactly one of the three asks. Raises ConfigError for none, several, and stray templates."""
    given = [
        name for name, value in (("--labels", labels), ("--task", task), ("--prompts", prompts)) if value is not None
    ]
    if len(given) != 1:
        raise ConfigError("labels", "must come from one of --labels, --task and --prompts",
                          found=" and ".join(given) or "none", todo='such as --labels "normal,pneumonia"')  # fmt: skip
    if templates and labels is None:
        raise ConfigError("--template", f"goes with --labels; {given[0]} has prompts of its own", todo="leave it out")
    if labels is not None:
        return ask_labels(labels, templates or TEMPLATES)
    return ask_task(task) if task is not None else ask_prompts(Path(prompts or ""))


def ask_labels(labels: str | Sequence[str], templates: Sequence[str] = TEMPLATES) -> Question:
    """The question of labels with commas between them (or in a list); a label with a comma stands in double quotes."""
    where = "--labels"
    names = next(csv.reader([labels], skipinitialspace=True), []) if isinstance(labels, str) else list(labels)
    names = check_labels([" ".join(name.split()) for name in names], where)
    prompts = {name: list(dict.fromkeys(fill(template, name) for template in templates)) for name in names}
    check_residue(prompts, where)
    return Question(prompts=prompts, where=where)


def ask_task(name: str) -> Question:
    """The question of a task of the suites, in its own words: its first prompt set and its way to join prompts."""
    task = find_task(name)
    if task.kind != "zero_shot":
        raise ConfigError(f"task {name}", f"is of kind {task.kind}, which has no labels to choose from",
                          todo="list tasks: biomedclip eval tasks")  # fmt: skip
    prompt_set = next(iter(task.prompt_sets))
    negatives = compile_negatives(task, prompt_set) if task.labels == "multi" else None
    return Question(prompts=compile_prompts(task, prompt_set), negatives=negatives, ensemble=task.ensemble,
                    where=f"task {name}")  # fmt: skip


def ask_prompts(path: Path) -> Question:
    """The question of a YAML file of `label: prompt` or `label: [prompt, …]`."""
    values: Any = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(path, "must hold `label: prompt` lines", found=type(values).__name__)
    prompts = {}
    for label, said in values.items():
        sentences = [said] if isinstance(said, str) else said
        if not isinstance(label, str) or not isinstance(sentences, list) or not all(
            isinstance(sentence, str) for sentence in sentences
        ):  # fmt: skip
            raise ConfigError(path, f"the prompts of {label!r} are no text or list of texts", found=repr(said)[:60],
                              todo="put quotes around words such as 'yes' and numbers")  # fmt: skip
        prompts[label] = list(dict.fromkeys(sentences))
    check_labels(list(prompts), str(path))
    check_residue(prompts, str(path))
    return Question(prompts=prompts, where=str(path))


def check_labels(labels: Sequence[str], where: str) -> list[str]:
    """The labels, where there are two or more different ones. Raises ConfigError otherwise."""
    if not any(label.strip() for label in labels):
        raise ConfigError(where, "names no label", todo='name two or more: "normal,pneumonia"')
    seen: dict[str, str] = {}
    for number, label in enumerate(labels, 1):
        if not label.strip():
            raise ConfigError(where, f"label {number} of {len(labels)} is empty", todo="remove the comma too many")
        same = " ".join(unicodedata.normalize("NFKC", label).casefold().split())
        if same in seen:
            again = f"'{label}'" if label == seen[same] else f"'{seen[same]}' and '{label}'"
            raise ConfigError(where, "names a label twice", found=again, todo="leave one out")
        seen[same] = label
    if len(labels) == 1:
        raise ConfigError(where, "is one label, which would always be certain", found=f"'{labels[0]}'",
                          todo="say what else it could be, with a comma between")  # fmt: skip
    return list(labels)
