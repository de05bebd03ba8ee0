"""Class names times templates to prompts, and the checks that catch the classic prompt accidents.

Reads a Task and the name of one of its prompt sets; yields the exact sentences per class, in class order. Published
suites shipped prompts with unfilled braces, a migraine in a breast ultrasound and 10 prompts against 5, and nobody
saw; so unfilled braces, doubled spaces and negations, and two classes that a tokenizer cannot tell apart are errors
here, and unequal counts are a warning that the result file keeps.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from biomedclip.errors import ConfigError
from biomedclip.evaluation.tasks import Task

Tokenizer = Callable[[list[str]], Any]

_RESIDUE = (
    (re.compile(r"[{}<>\[\]]"), "an unfilled placeholder"),
    (re.compile(r"\b(?:no|without|not)\s+(?:no|without|not)\b", re.IGNORECASE), "a double negation"),
    (re.compile(r"\b(?:None|nan|null)\b"), "a value that was missing"),
    (re.compile(r"\s{2,}|^\s|\s$"), "stray spaces"),
)
_ARTICLE = re.compile(r"\b[aA] $")


def compile_prompts(task: Task, prompt_set: str = "default", *, synonyms: bool | None = None) -> dict[str, list[str]]:
    """{label: prompts}, in class order, without repetitions.

    `a {}` becomes `an {}` before a, e, i, o. Raises ConfigError for an unknown prompt set, a template without `{}`
    and residue in a prompt.
    """
    if prompt_set not in task.prompt_sets:
        near = difflib.get_close_matches(prompt_set, task.prompt_sets, n=1) or list(task.prompt_sets)
        raise ConfigError(f"task {task.name}", f"has no prompt set '{prompt_set}'", todo=f"did you mean '{near[0]}'?")
    chosen = task.prompt_sets[prompt_set]
    use_synonyms = task.ensemble.synonyms if synonyms is None else synonyms
    prompts: dict[str, list[str]] = {}
    for entry in task.classes:
        if chosen.per_class:
            sentences = list(chosen.per_class[entry.label])
        else:
            names = (entry.name, *entry.synonyms) if use_synonyms else (entry.name,)
            sentences = [fill(template, name) for name in names for template in chosen.templates]
        prompts[entry.label] = list(dict.fromkeys(sentences))
    check_residue(prompts, f"task {task.name}, prompt set {prompt_set}")
    return prompts


def compile_negatives(task: Task, prompt_set: str = "default") -> dict[str, list[str]]:
    """{label: prompts that say it is absent} of a task of several labels.

    A label that is itself an absence says its complement instead: "no no finding" is how published AUROCs came out
    below 0.1.
    """
    chosen = task.prompt_sets[prompt_set]
    prompts = {
        entry.label: [fill(t, entry.complement) for t in chosen.templates] if entry.complement
        else [fill(t, entry.name) for t in chosen.negative]
        for entry in task.classes
    }  # fmt: skip
    check_residue(prompts, f"task {task.name}, prompt set {prompt_set}, negatives")
    return prompts


def fill(template: str, name: str) -> str:
    """The template with the class name in its one `{}`. Raises ConfigError where it has none, or several."""
    if template.count("{}") != 1:
        raise ConfigError(f"template '{template}'", "must hold {} once", found=template.count("{}"))
    before, after = template.split("{}")
    if _ARTICLE.search(before) and name[:1].lower() in tuple("aeio"):
        before = before[:-1] + "n "
    return before + name + after


def check_residue(prompts: Mapping[str, Sequence[str]], where: str) -> None:
    """Raise ConfigError for a class without prompts, or a prompt with placeholders, double negation or stray spaces."""
    for label, sentences in prompts.items():
        if not sentences:
            raise ConfigError(where, f"class {label} has no prompt")
        for sentence in sentences:
            for pattern, meaning in _RESIDUE:
                if pattern.search(sentence) or not sentence:
                    raise ConfigError(where, f"a prompt of class {label} has {meaning}", found=repr(sentence))


def check_distinct(prompts: Mapping[str, Sequence[str]], tokenizer: Tokenizer, where: str) -> None:
    """Raise ConfigError where all prompts of two classes are the same to the tokenizer, so no image can tell them.

    Happens with names that differ only in case, punctuation or beyond the context length.
    """
    owner: dict[frozenset[tuple[int, ...]], str] = {}
    for label, sentences in prompts.items():
        tokens = frozenset(tuple(int(t) for t in row) for row in tokenizer(list(sentences)))
        if tokens in owner:
            raise ConfigError(
                where, f"classes {owner[tokens]} and {label} are the same to the tokenizer",
                found=repr(sentences[0]), todo="give them different names",
            )  # fmt: skip
        owner[tokens] = label


def list_warnings(prompts: Mapping[str, Sequence[str]]) -> list[str]:
    """What a reader of the result should know about the prompts: unequal counts, a sentence two classes share."""
    warnings = []
    counts = {label: len(sentences) for label, sentences in prompts.items()}
    if len(set(counts.values())) > 1:
        warnings.append(f"unequal prompt counts: {', '.join(f'{k} {v}' for k, v in counts.items())}")
    owner: dict[str, str] = {}
    for label, sentences in prompts.items():
        for sentence in sentences:
            if owner.setdefault(sentence, label) != label:
                warnings.append(f"{label} and {owner[sentence]} share the prompt {sentence!r}")
    return warnings
