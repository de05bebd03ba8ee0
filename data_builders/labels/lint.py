"""What is wrong with the words of a recipe, found before a single image is read.

Reads a `Recipe`, composes captions for made-up images of every class and of combinations, and yields one line a
problem. Each rule stands for a defect seen in published caption sets: prompts without a modality, a placeholder left in
a caption, ten sentences for one class and five for the other, two classes with the same words, sentences longer than
the text tower reads, words of another modality. An empty list means that nothing was found, not that the words are
true: definitions and synonyms are read by people.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from biomedclip.tokens import count_tokens
from data_builders.labels.captions import Facts, Refused, Speech, compose_captions, prepare_speech, word_pattern
from data_builders.labels.recipe import Recipe
from data_builders.labels.recipe_checks import PARTS, PLACEHOLDER

MAX_TOKENS = 75
"""CLIP's context of 77 without the start and end tokens."""

_RESIDUE = re.compile(r"[{}\[\]<>_|]|\b(?:None|nan|NaN|null|NULL|TODO)\b|\s{2,}|\s[.,;]|\.\.")
_NEGATION = re.compile(
    r"\b(?:no|not|without|never|neither|nor|absence of|absent|negative for|free of|lack of|non)\b", re.IGNORECASE
)
_MODALITIES = {
    "X-ray": r"x-?rays?|radiographs?|radiography|mammogra\w+",
    "CT": r"ct|computed tomography",
    "MRI": r"mri?|magnetic resonance",
    "ultrasound": r"ultrasound|ultrasonogra\w+|sonogra\w+|echocardiogra\w+",
    "fundus": r"fundus|fundoscop\w+|retinal photographs?",
    "OCT": r"oct|optical coherence tomography",
    "dermoscopy": r"dermoscop\w+|dermatoscop\w+",
    "endoscopy": r"endoscop\w+|colonoscop\w+|gastroscop\w+|laparoscop\w+",
    "microscopy": r"microscop\w+|micrographs?|histopatholog\w+|histolog\w+|h&e|smears?|cytolog\w+",
}
_PROBES = 24
"""Made-up images of each kind: with 6 captions each, 144 draws meet nearly every template and synonym."""


def lint_recipe(recipe: Recipe) -> list[str]:
    """One line for each problem, `<recipe>: <where>: <what>`; empty where nothing was found."""
    speech = prepare_speech(recipe)
    problems = [*_lint_words(recipe), *_lint_templates(recipe, speech), *_lint_bans(speech), *_lint_captions(speech)]
    return [f"{recipe.name}: {problem}" for problem in dict.fromkeys(problems)]


def _lint_words(recipe: Recipe) -> Iterator[str]:
    """Words of the classes: distinct, equally many, without residue, negations told apart."""
    owners: dict[str, str] = {}
    for entry in recipe.classes:
        phrases = [*entry.forms, *([entry.definition] if entry.definition else [])]
        for phrase in phrases:
            spelled = " ".join(phrase.lower().split())
            if spelled in owners:
                other = owners[spelled]
                what = "twice" if other == entry.label else f"also for '{other}'"
                yield f"classes.{entry.label}: says '{phrase}' {what}"
            owners[spelled] = entry.label
            if found := _RESIDUE.search(phrase):
                yield f"classes.{entry.label}: '{phrase}' holds {found[0]!r}"
    counts = {entry.label: len(entry.forms) for entry in recipe.classes}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{label} {count}" for label, count in counts.items())
        yield f"classes: unequal numbers of names and synonyms ({listed})"
    defined = [entry.label for entry in recipe.classes if entry.definition]
    if defined and len(defined) < len(recipe.classes):
        missing = ", ".join(entry.label for entry in recipe.classes if not entry.definition)
        yield f"classes: some have a definition and some not ({missing})"


def _lint_templates(recipe: Recipe, speech: Speech) -> Iterator[str]:
    for part in ("single", "many", "negative", "uncertain", "none"):
        templates = getattr(recipe.templates, part)
        for number, template in enumerate(templates):
            where = f"templates.{part}[{number}]"
            plain = PLACEHOLDER.sub(lambda found: recipe.modality if found[1] == "modality" else "x", template)
            if part in ("single", "many", "none") and not speech.modality.search(plain):
                yield f"{where}: names no modality ({', '.join(recipe.modality_forms)})"
            if found := _RESIDUE.search(PLACEHOLDER.sub("x", template)):
                yield f"{where}: holds {found[0]!r}"
            if templates.index(template) != number:
                yield f"{where}: repeats another template"


def _lint_bans(speech: Speech) -> Iterator[str]:
    """Words of banned classes in what may be said of the others."""
    if speech.banned_words is None:
        return
    for entry in speech.recipe.classes:
        if entry.label not in speech.banned:
            for phrase in (*entry.forms, entry.definition or ""):
                if found := speech.banned_words.search(phrase):
                    yield f"classes.{entry.label}: '{phrase}' says the banned {found[0]!r}"
    for part in ("single", "many", "negative", "uncertain", "none"):
        for number, template in enumerate(getattr(speech.recipe.templates, part)):
            if found := speech.banned_words.search(template):
                yield f"templates.{part}[{number}]: says the banned {found[0]!r}"


def _lint_captions(speech: Speech) -> Iterator[str]:
    """Whole captions: words of the class, length, double negation, words of another modality."""
    foreign = _foreign_modalities(speech.recipe)
    for where, labels, facts in _probes(speech):
        forms = word_pattern([
            phrase for label in labels for entry in [speech.entries[label]]
            for phrase in (*entry.forms, *([entry.definition] if entry.definition else []))
        ]) if labels else None  # fmt: skip
        for number in range(_PROBES):
            try:
                captions = compose_captions(speech, f"lint/{number}", facts, _attributes(speech.recipe, number))
            except Refused as refusal:
                if refusal.reason != "banned_class":
                    yield f"{where}: {refusal}"
                break
            for caption in captions:
                yield from (
                    f"{where}: {problem}: {caption!r}" for problem in _caption_problems(caption, forms, foreign)
                )


def _caption_problems(
    caption: str, forms: re.Pattern[str] | None, foreign: dict[str, re.Pattern[str]]
) -> Iterator[str]:
    if forms is not None and not forms.search(caption):
        yield "neither label, synonym nor definition is said"
    if (tokens := count_tokens(caption)) > MAX_TOKENS:
        yield f"{tokens} tokens, the text tower reads {MAX_TOKENS}"
    for sentence in re.split(r"(?<=[.!?])\s+|:\s+", caption):
        if len(_NEGATION.findall(sentence)) > 1:
            yield "double negation"
    for name, pattern in foreign.items():
        if found := pattern.search(caption):
            yield f"speaks of {name} ({found[0]!r})"


def _probes(speech: Speech) -> Iterator[tuple[str, tuple[str, ...], Facts]]:
    """(where, labels of which at least one must be said, facts) of made-up images."""
    recipe = speech.recipe
    labels = tuple(label for label in recipe.labels if label not in speech.banned)
    for label in labels:
        yield f"class '{label}'", (label,), Facts(positive=(label,))
    if recipe.kind != "multi":
        return
    for label in labels:
        yield f"no '{label}'", (label,), Facts(negative=(label,))
        if recipe.uncertain == "hedge":
            yield f"possible '{label}'", (label,), Facts(uncertain=(label,))
    if len(labels) > 1:
        yield "all classes together", labels, Facts(positive=labels)
        yield "all classes but one absent", labels, Facts(positive=labels[:1], negative=labels[1:])
        yield "no class", (), Facts(negative=labels, all_negative=True)


def _attributes(recipe: Recipe, number: int) -> dict[str, str]:
    """A stand-in value for each attribute in every other probe, so that both sorts of template are met."""
    return {column: column.replace("_", " ") for column in recipe.attributes} if number % 2 else {}


def _foreign_modalities(recipe: Recipe) -> dict[str, re.Pattern[str]]:
    """Modality -> its words, for those the recipe's own modality is not; empty where the recipe's is none we know."""
    patterns = {
        name: re.compile(rf"(?<![\w-])(?:{words})(?![\w-])", re.IGNORECASE) for name, words in _MODALITIES.items()
    }
    own = {name for name, pattern in patterns.items() if pattern.search(" ; ".join(recipe.modality_forms))}
    return {name: pattern for name, pattern in patterns.items() if name not in own} if own else {}
