"""What is wrong with the words of a recipe, found before a single image is read.

Reads a `Recipe`, composes captions for made-up images of every class and of combinations, and yields one line a
problem. Each rule stands for a defect seen in published caption sets: prompts without a modality, a placeholder left in
a caption, ten sentences for one class and five for the other, two classes with the same words, sentences longer than
the text tower reads, words of another modality or another part of the body. An empty list means that nothing was found,
not that the words are true: definitions and synonyms are read by people.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal

from biomedclip.errors import ConfigError
from biomedclip.tokens import count_tokens
from data_builders.labels.captions import (
    Facts,
    Refused,
    Speech,
    compose_captions,
    prepare_speech,
    with_article,
    word_pattern,
)
from data_builders.labels.lint_words import foreign_modalities, foreign_regions
from data_builders.labels.recipe import ClassEntry, Recipe
from data_builders.labels.recipe_checks import PARTS, PLACEHOLDER

Context = Literal["clip", "bert"]

MAX_TOKENS: dict[Context, int] = {"clip": 75, "bert": 254}
"""Contexts of 77 (CLIP) and 256 (BERT-like towers) without the start and end tokens."""

_RESIDUE = re.compile(r"[{}\[\]<>_|]|\b(?:None|nan|NaN|null|NULL|TODO)\b|\s{2,}|\s[.,;]|\.\.")
_NEGATION = re.compile(
    r"\b(?:no|not|without|never|neither|nor|absence of|absent|negative for|free of|lack of|non)\b", re.IGNORECASE
)
_ARTICLE = re.compile(r"(\ban?|(?:^|(?<=[.!?] ))An?) ([A-Za-z][\w&-]*)")
_MAX_REPEATED = 0.5
"""Share of an image's captions that may repeat others of it."""
_DRAWS = 720
"""Captions composed for all probes together, if there are few: each of 10 classes then meets 12 images of 6 captions,
which is nearly every template with every synonym."""


def lint_recipe(recipe: Recipe, *, context: Context = "clip") -> list[str]:
    """One line for each problem, `<recipe>: <where>: <what>`; empty where nothing was found.

    `context` is the text tower: `clip` counts its tokens, `bert` estimates them (`estimate_pieces`).
    """
    speech = prepare_speech(recipe)
    problems = [
        *_lint_words(recipe), *_lint_templates(speech), *_lint_paraphrases(speech, context), *_lint_bans(speech),
        *_lint_regions(recipe), *(_lint_captions(speech, context) if recipe.kind != "caption" else ()),
    ]  # fmt: skip
    return [f"{recipe.name}: {problem}" for problem in dict.fromkeys(problems)]


def read_context(text: str) -> Context:
    """A text tower by name. Raises ConfigError for an unknown one."""
    for context in MAX_TOKENS:
        if context == text:
            return context
    raise ConfigError("context", "is no text tower", found=repr(text), todo=f"use one of {', '.join(MAX_TOKENS)}")


def estimate_pieces(text: str) -> int:
    """About how many word pieces a BERT vocabulary cuts a text into, rather too many than too few: one for each three
    letters of a word, one for each sign. (PubMedBERT keeps most medical words whole.)"""
    return sum(-(-len(word) // 3) if word[0].isalnum() else 1 for word in re.findall(r"\w+|[^\w\s]", text))


def _lint_words(recipe: Recipe) -> Iterator[str]:
    """Words of the classes: distinct within a field, equally many, without residue."""
    groups = [(f"fields.{field.name}", field.classes) for field in recipe.fields] or [("classes", recipe.classes)]
    for where, entries in groups:
        yield from _lint_entries(where, entries)


def _lint_entries(where: str, entries: Sequence[ClassEntry]) -> Iterator[str]:
    owners: dict[str, str] = {}
    for entry in entries:
        for phrase in _phrases(entry):
            spelled = " ".join(phrase.lower().split())
            if spelled in owners:
                other = owners[spelled]
                what = "twice" if other == entry.label else f"also for '{other}'"
                yield f"{where}.{entry.label}: says '{phrase}' {what}"
            owners[spelled] = entry.label
            if found := _RESIDUE.search(phrase):
                yield f"{where}.{entry.label}: '{phrase}' holds {found[0]!r}"
    counts = {entry.label: len(entry.forms) for entry in entries}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{label} {count}" for label, count in counts.items())
        yield f"{where}: unequal numbers of names and synonyms ({listed})"
    defined = [entry.label for entry in entries if entry.definition]
    if defined and len(defined) < len(entries):
        missing = ", ".join(entry.label for entry in entries if not entry.definition)
        yield f"{where}: some have a definition and some not ({missing})"


def _lint_templates(speech: Speech) -> Iterator[str]:
    for part, number, template in _templates(speech.recipe):
        where = f"templates.{part}[{number}]"
        plain = PLACEHOLDER.sub(lambda found: speech.recipe.modality if found[1] == "modality" else "x", template)
        if part in ("single", "many", "none") and "{text}" not in template and not speech.modality.search(plain):
            yield f"{where}: names no modality ({', '.join(speech.recipe.modality_forms)})"
        if found := _RESIDUE.search(PLACEHOLDER.sub("x", template)):
            yield f"{where}: holds {found[0]!r}"
        if getattr(speech.recipe.templates, part).index(template) != number:
            yield f"{where}: repeats another template"


def _lint_paraphrases(speech: Speech, context: Context) -> Iterator[str]:
    """Whole captions from elsewhere: each names modality and class, and every class has as many."""
    recipe = speech.recipe
    counts = {label: len(recipe.paraphrases.get(label, ())) for label in recipe.labels if label not in speech.banned}
    if recipe.paraphrases and len(set(counts.values())) > 1:
        yield f"paraphrases: unequal numbers ({', '.join(f'{label} {count}' for label, count in counts.items())})"
    foreign = foreign_modalities(recipe)
    for label, captions in recipe.paraphrases.items():
        pattern = word_pattern(_phrases(speech.entries[label]))
        for number, caption in enumerate(captions):
            where = f"paraphrases.{label}[{number}]"
            if not speech.modality.search(caption):
                yield f"{where}: names no modality ({', '.join(recipe.modality_forms)})"
            yield from (f"{where}: {what}" for what in _caption_problems(caption, pattern, foreign, context))
            if found := _RESIDUE.search(caption):
                yield f"{where}: holds {found[0]!r}"
            if captions.index(caption) != number:
                yield f"{where}: repeats another paraphrase"


def _lint_bans(speech: Speech) -> Iterator[str]:
    """Words of banned classes in what may be said of the others."""
    if speech.banned_words is None:
        return
    for where, phrase in _spoken(speech.recipe, speech.banned):
        if found := speech.banned_words.search(phrase):
            yield f"{where}: '{phrase}' says the banned {found[0]!r}"


def _lint_regions(recipe: Recipe) -> Iterator[str]:
    """Words of a part of the body that is not shown."""
    for where, phrase in _spoken(recipe, frozenset()) if recipe.regions else ():
        for word, region in foreign_regions(phrase, recipe.regions):
            yield f"{where}: '{word}' belongs to {region}, not to {', '.join(recipe.regions)}"


def _lint_captions(speech: Speech, context: Context) -> Iterator[str]:
    """Whole captions: words of the class, length, double negation, articles, repetition, words of other modalities."""
    foreign, probes = foreign_modalities(speech.recipe), list(_probes(speech))
    images = max(2, min(24, _DRAWS // (len(probes) * speech.recipe.captions_per_image)))
    for where, labels, facts in probes:
        pattern = word_pattern([p for label in labels for p in _phrases(speech.entries[label])]) if labels else None
        seen: set[str] = set()
        for number in range(images):
            try:
                captions = compose_captions(speech, f"lint/{number}", facts, _attributes(speech.recipe, number))
            except Refused as refusal:
                if refusal.reason != "banned_class":
                    yield f"{where}: {refusal}"
                break
            if 1 - len(set(captions)) / len(captions) > _MAX_REPEATED:
                yield f"{where}: only {len(set(captions))} of {len(captions)} captions of an image differ"
            seen |= set(captions)
        for caption in sorted(seen):
            yield from (
                f"{where}: {what}: {caption!r}" for what in _caption_problems(caption, pattern, foreign, context)
            )


def _caption_problems(
    caption: str, forms: re.Pattern[str] | None, foreign: dict[str, re.Pattern[str]], context: Context
) -> Iterator[str]:
    if forms is not None and not forms.search(caption):
        yield "neither label, synonym nor definition is said"
    limit = MAX_TOKENS[context]
    # No token is shorter than a letter, so most captions need no counting.
    if len(caption) > limit:
        tokens = count_tokens(caption) if context == "clip" else estimate_pieces(caption)
        if tokens > limit:
            yield f"{tokens} tokens, the text tower reads {limit}"
    for clause in re.split(r"(?<=[.!?,;:])\s+|\s+and\s+", caption):
        if len(_NEGATION.findall(clause)) > 1:
            yield "double negation"
    for article, word in _ARTICLE.findall(caption):
        right = with_article(word).split()[0]
        if article.lower() != right:
            yield f"says '{article} {word}'"
    for name, pattern in foreign.items():
        if found := pattern.search(caption):
            yield f"speaks of {name} ({found[0]!r})"


def _probes(speech: Speech) -> Iterator[tuple[str, tuple[str, ...], Facts]]:
    """(where, labels of which at least one must be said, facts) of made-up images."""
    recipe = speech.recipe
    labels = tuple(label for label in recipe.labels if label not in speech.banned)
    for label in labels:
        beside = _others(recipe, label, speech.banned)
        yield f"class '{label}'", (label, *beside), Facts(positive=(label, *beside))
    if recipe.kind != "multi":
        return
    findings = tuple(label for label in labels if label not in speech.normal)
    for label in findings:
        if recipe.templates.negative:
            yield f"no '{label}'", (label,), Facts(negative=(label,))
        if recipe.uncertain == "hedge":
            yield f"possible '{label}'", (label,), Facts(uncertain=(label,))
    if len(findings) > 1:
        yield "all classes together", findings, Facts(positive=findings)
        yield "all classes but one absent", findings, Facts(positive=findings[:1], negative=findings[1:])
    if recipe.templates.negative or recipe.templates.none:
        yield "no class", (), Facts(negative=findings, all_negative=True)


def _others(recipe: Recipe, label: str, banned: frozenset[str]) -> tuple[str, ...]:
    """One class of every other field, so that all templates of a multi-field recipe are met."""
    found = []
    for field in recipe.fields:
        if not label.startswith(f"{field.name}="):
            allowed = [f"{field.name}={entry.label}" for entry in field.classes]
            found += [other for other in allowed if other not in banned][:1]
    return tuple(found)


def _spoken(recipe: Recipe, banned: frozenset[str]) -> Iterator[tuple[str, str]]:
    """(where, text) of all words that may end up in captions of classes that are not banned."""
    for entry in recipe.entries:
        if entry.label not in banned:
            yield from ((f"classes.{entry.label}", phrase) for phrase in _phrases(entry))
    yield from ((f"templates.{part}[{number}]", template) for part, number, template in _templates(recipe))
    for label, captions in recipe.paraphrases.items():
        if label not in banned:
            yield from ((f"paraphrases.{label}[{number}]", caption) for number, caption in enumerate(captions))


def _templates(recipe: Recipe) -> Iterator[tuple[str, int, str]]:
    for part in PARTS:
        yield from ((part, number, template) for number, template in enumerate(getattr(recipe.templates, part)))


def _phrases(entry: ClassEntry) -> list[str]:
    return [*entry.forms, *([entry.definition] if entry.definition else [])]


def _attributes(recipe: Recipe, number: int) -> dict[str, str]:
    """A stand-in value for each attribute in every other probe, so that both sorts of template are met."""
    return {column: column.replace("_", " ") for column in recipe.attributes} if number % 2 else {}
