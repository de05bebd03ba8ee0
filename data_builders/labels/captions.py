"""What is known of an image to K sentences: a pure function of (recipe, sample id, k) and the labels.

Reads a manifest row; `caption_row` yields its facts and captions in two steps. `settle_facts` decides what may be
said: bans, the policy for uncertain labels, the hierarchy. `compose_captions` decides how: which template, which
synonym, what order. No random module takes part: every choice is a digit of a sha256 of (name, seed, sample id, k), so
the same recipe gives the same bytes on every machine and Python, whatever the order or the number of workers. The
templates of one image are taken in turn, not drawn, so K captions differ wherever the recipe has K different sentences.
A set that brings its own captions keeps them word for word: nothing in a caption is a separator here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from biomedclip.schema import LabelledImage
from data_builders.labels.recipe import ClassEntry, Recipe, all_ancestors
from data_builders.labels.recipe_checks import PLACEHOLDER

T = TypeVar("T")

_ALWAYS = frozenset({"x", "a_x", "list", "modality"})
"""Placeholders that every template of their kind can fill, whatever is known of the image."""

_RATE_STEPS = 1_000_000
# Letters whose names begin with a vowel: an MRI, a CT.
_VOWEL_NAMES = "AEFHILMNORSX"
_CONSONANT_SOUNDS = tuple("eu one once ubi unic unif unil unio uniq unit univ ura uri uro use usu ute".split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What captions of one image may speak of, as labels in the recipe's order."""

    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()
    all_negative: bool = False
    """Every class that is a finding is stated not to hold, also those that are not spoken of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speech:
    """A recipe with what is looked up for every image worked out once."""

    recipe: Recipe
    entries: Mapping[str, ClassEntry]
    label_ids: Mapping[str, int]
    ancestors: Mapping[str, frozenset[str]]
    banned: frozenset[str]
    """Banned labels and everything narrower, which is of a banned class too."""
    parents: Mapping[str, tuple[str, ...]]
    """Label -> the parents that may be spoken of."""
    normal: frozenset[str]
    """Labels that say that nothing is found."""
    incidental: frozenset[str]
    modality: re.Pattern[str]
    banned_words: re.Pattern[str] | None


class Refused(ValueError):
    """An image of which no caption may or can be made; `reason` is the ledger's word for it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Dice:
    """Numbers below a bound, all from a sha256 of the words it is made with, taken at the first throw."""

    def __init__(self, *words: object) -> None:
        self._words, self._state, self._value, self._room = words, b"", 0, 0
        self._orders: dict[tuple[int, int, int], tuple[list[int], Dice]] = {}

    def again(self) -> Dice:
        """Dice that will fall as these would from here; what either throws later changes nothing for the other."""
        if not self._state:
            self._shake()
        copy = object.__new__(Dice)
        copy._state, copy._value, copy._room, copy._orders = self._state, self._value, self._room, self._orders
        return copy

    def below(self, bound: int) -> int:
        """An integer in 0 .. bound - 1."""
        if self._room < bound:
            self._shake()
        self._room //= bound
        self._value, digit = divmod(self._value, bound)
        return digit

    def happens(self, rate: float) -> bool:
        """True in a share `rate` of all cases."""
        return self.below(_RATE_STEPS) < round(rate * _RATE_STEPS)

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All items in another order."""
        if not self._state:
            self._shake()
        key = (self._value, self._room, len(items))
        if key not in self._orders:
            # The captions of an image all ask for its order of the templates: worked out once, it is a look-up.
            rest = list(range(len(items)))
            order = [rest.pop(self.below(len(rest))) for _ in range(len(rest))]
            self._orders[key] = order, self.again()
        order, after = self._orders[key]
        self._state, self._value, self._room = after._state, after._value, after._room
        return [items[place] for place in order]

    def _shake(self) -> None:
        seed = self._state or "\n".join(map(str, self._words)).encode()
        self._state = hashlib.sha256(seed).digest()
        self._value, self._room = int.from_bytes(self._state, "big"), 1 << 192


def prepare_speech(recipe: Recipe) -> Speech:
    """The recipe, ready to be spoken."""
    ancestors = all_ancestors(recipe)
    banned = frozenset(label for label in recipe.labels if ({label} | ancestors[label]) & set(recipe.banned))
    entries = {entry.label: entry for entry in recipe.entries}
    return Speech(
        recipe=recipe,
        entries=entries,
        label_ids={label: number for number, label in enumerate(recipe.labels)},
        ancestors=ancestors,
        banned=banned,
        parents={label: tuple(parent for parent in entry.parents if parent not in banned)
                 for label, entry in entries.items()},
        normal=frozenset(entry.label for entry in recipe.entries if entry.normal),
        incidental=frozenset(entry.label for entry in recipe.entries if entry.incidental),
        modality=word_pattern(recipe.modality_forms),
        banned_words=word_pattern([form for label in banned for form in entries[label].forms]) if banned else None,
    )  # fmt: skip


def word_pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the phrases as whole words, in any case, also in the plural with s."""
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, phrases)) + r")s?(?!\w)", re.IGNORECASE)


def caption_row(speech: Speech, row: LabelledImage) -> tuple[Facts, tuple[str, ...]]:
    """What is said of an image, as labels and as sentences. Raises Refused as `settle_facts` and `compose_captions` do,
    and `no_caption` for an image without one in a set that brings its own."""
    if speech.recipe.kind == "caption":
        return Facts(), _native_captions(speech.recipe, row)
    facts = settle_facts(speech, row)
    return facts, compose_captions(speech, row.sample_id, facts, row.attributes)


def settle_facts(speech: Speech, row: LabelledImage) -> Facts:
    """What may be said of an image. Raises Refused `banned_class`, `contradictory_labels` or `nothing_stated`.

    Only explicit negatives are negatives. One that is wider than a positive or possible finding is contradicted by it
    and left unsaid, as is the doubt about a class that is wider than a positive; a banned class is never spoken of, and
    an image that shows or may show one is refused.
    """
    positive, negative, uncertain = set(row.labels), set(row.negatives), set(row.uncertain)
    if shown := (positive | uncertain) & speech.banned:
        raise Refused("banned_class", ", ".join(sorted(shown)))
    if both := (positive & (negative | uncertain)) | (negative & uncertain):
        raise Refused("contradictory_labels", ", ".join(sorted(both)))
    if beside := (positive | uncertain) - speech.normal - speech.incidental:
        if positive & speech.normal:
            raise Refused("contradictory_labels", f"normal, and {', '.join(sorted(beside))}")
        uncertain -= speech.normal  # a finding settles the doubt
    policy = speech.recipe.uncertain
    if policy == "positive":
        positive |= uncertain
    elif policy == "negative":
        negative |= uncertain
    if policy != "hedge":
        uncertain = set()
    all_negative = negative >= set(speech.entries) - speech.normal
    sure = set().union(*(speech.ancestors[label] for label in positive))
    wider = sure.union(*(speech.ancestors[label] for label in row.uncertain))
    negative -= wider | speech.banned | speech.normal
    uncertain -= sure | speech.normal
    if not positive | negative | uncertain:
        detail = "only uncertain labels" if row.uncertain else ""
        raise Refused("nothing_stated", detail)
    in_order = [sorted(labels, key=speech.label_ids.__getitem__) for labels in (positive, negative, uncertain)]
    return Facts(
        positive=tuple(in_order[0]), negative=tuple(in_order[1]), uncertain=tuple(in_order[2]),
        all_negative=all_negative,
    )  # fmt: skip


def compose_captions(
    speech: Speech, sample_id: str, facts: Facts, attributes: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """The K captions of an image. Raises Refused `no_template` where the recipe has no words for what is known, and
    `banned_class` where an attribute names a banned class."""
    known = {column: " ".join((attributes or {}).get(column, "").split()) for column in speech.recipe.attributes}
    own = Dice(speech.recipe.name, speech.recipe.seed, sample_id)
    captions = tuple(
        compose_caption(speech, sample_id, k, facts, known, own.again())
        for k in range(speech.recipe.captions_per_image)
    )
    if speech.banned_words is not None:
        for caption in captions:
            if found := speech.banned_words.search(caption):
                raise Refused("banned_class", f"a caption says {found[0]!r}")
    return captions


def compose_caption(
    speech: Speech, sample_id: str, k: int, facts: Facts, attributes: Mapping[str, str], own: Dice
) -> str:
    """Caption `k` of an image; `own` are the image's dice, the same for each of its captions."""
    recipe = speech.recipe
    dice = Dice(recipe.name, recipe.seed, sample_id, k)
    sentences = []
    if facts.positive:
        sentences.append(_positive(speech, facts.positive, attributes, k, own, dice))
    elif facts.all_negative and recipe.templates.none:
        template, _ = _take(recipe.templates.none, attributes, k, own)
        sentences.append(_fill(template, {"modality": recipe.modality, **attributes}))
    said_none = bool(sentences) and not facts.positive
    if facts.uncertain:
        chosen = _choose(facts.uncertain, recipe.compose.max_uncertain, recipe, dice)
        sentences.append(_any_of(speech, recipe.templates.uncertain, chosen, attributes, k, own, dice))
    must = not sentences
    if facts.negative and not said_none and (must or _adds_negative(recipe, dice)):
        chosen = _choose(facts.negative, recipe.compose.max_negative, recipe, dice)
        sentences.append(_any_of(speech, recipe.templates.negative, chosen, attributes, k, own, dice))
    text = " ".join([*(_end(sentence) for sentence in sentences[:-1]), sentences[-1]])
    if not speech.modality.search(text):
        text = f"{recipe.modality}: {text}"
    return text[0].upper() + text[1:]


@lru_cache(maxsize=4096)
def with_article(phrase: str) -> str:
    """`a` or `an` and the phrase, by sound as far as spelling tells it."""
    first = phrase.split()[0]
    if (len(first) > 1 and first.isupper()) or first[1:2] == "-":  # spelled out: an MRI, an X-ray
        vowel = first[0].upper() in _VOWEL_NAMES
    else:
        vowel = first[0].lower() in "aeiou" and not first.lower().startswith(_CONSONANT_SOUNDS)
    return f"{'an' if vowel else 'a'} {phrase}"


def join_words(words: Sequence[str], conjunction: str) -> str:
    """`a, b and c`."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {conjunction} {words[-1]}"


def _native_captions(recipe: Recipe, row: LabelledImage) -> tuple[str, ...]:
    """The caption that came with the image, in each of the recipe's sentences or else alone."""
    text = " ".join((row.text or "").split())
    if not text:
        raise Refused("no_caption")
    known = {column: " ".join(row.attributes.get(column, "").split()) for column in recipe.attributes}
    values = {"text": text, "modality": recipe.modality, **known}
    usable = [t for t in recipe.templates.single if all(values[name] for name in PLACEHOLDER.findall(t))]
    captions = dict.fromkeys(_fill(template, values) for template in usable or ("{text}",))
    return tuple(captions)[: recipe.captions_per_image]


def _positive(
    speech: Speech, labels: tuple[str, ...], attributes: Mapping[str, str], k: int, own: Dice, dice: Dice
) -> str:
    recipe = speech.recipe
    if recipe.fields:
        return _of_fields(speech, labels, attributes, k, own, dice)
    chosen = _choose(labels, recipe.compose.max_positive, recipe, dice)
    values = {"modality": recipe.modality, **attributes}
    if len(chosen) > 1:
        template, turn = _take(recipe.templates.many, attributes, k, own)
        names = [_with_parent(speech, label, _form(speech, label, turn, own), labels, dice) for label in chosen]
        return _fill(template, {**values, "list": join_words(names, "and")})
    entry = speech.entries[chosen[0]]
    if entry.definition is not None:
        values["definition"] = entry.definition
    whole = recipe.paraphrases.get(entry.label, ()) if len(labels) == 1 else ()
    template, turn = _take((*recipe.templates.single, *whole) if whole else recipe.templates.single, values, k, own)
    form = _form(speech, entry.label, turn, own)
    spoken = _with_parent(speech, entry.label, form, labels, dice)
    return _fill(template, {**values, "x": spoken, "a_x": with_article(spoken) if entry.countable else spoken})


def _of_fields(
    speech: Speech, labels: tuple[str, ...], attributes: Mapping[str, str], k: int, own: Dice, dice: Dice
) -> str:
    """A sentence on the classes of several fields; a template is used where all fields that it names are known."""
    recipe = speech.recipe
    entries = {label.partition("=")[0]: speech.entries[label] for label in labels}
    known = {"modality": recipe.modality, **attributes}
    for name, entry in entries.items():
        known |= {name: entry.name, f"a_{name}": entry.name, f"{name}_definition": entry.definition or ""}
    template, turn = _take(recipe.templates.single, known, k, own)
    for name, entry in entries.items():
        form = _form(speech, entry.label, turn, own)
        spoken = _with_parent(speech, entry.label, form, labels, dice)
        known |= {name: spoken, f"a_{name}": with_article(spoken) if entry.countable else spoken}
    return _fill(template, known)


def _any_of(
    speech: Speech, templates: tuple[str, ...], labels: list[str], attributes: Mapping[str, str],
    k: int, own: Dice, dice: Dice,
) -> str:  # fmt: skip
    """A sentence on classes joined by "or": absent ones, or possible ones."""
    template, turn = _take(templates, attributes, k, own)
    forms = [_form(speech, label, turn, own) for label in labels]
    with_articles = [
        with_article(form) if speech.entries[label].countable else form
        for form, label in zip(forms, labels, strict=True)
    ]
    words = {"x": join_words(forms, "or"), "a_x": join_words(with_articles, "or")}
    return _fill(template, {**attributes, **words, "modality": speech.recipe.modality})


def _take(templates: tuple[str, ...], values: Mapping[str, str], k: int, own: Dice) -> tuple[str, int]:
    """The template whose turn it is for caption k, among those whose values are known, and the turn of its wording.

    The order is the image's own; the second number goes on by one with each template and shifts with each round, so
    that a template meets all synonyms before a caption repeats.
    """
    usable: Sequence[str] = templates
    if optional := _optional_names(templates):
        usable = [t for t, names in zip(templates, optional, strict=True) if all(values.get(name) for name in names)]
    if not usable:
        raise Refused("no_template", "no template of the recipe fits what is known of the image")
    place, turn = k % len(usable), k // len(usable)
    return own.shuffled(usable)[place], place + turn


@lru_cache(maxsize=4096)
def _optional_names(templates: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Placeholders of each template that not every image or class can fill; empty where no template has one."""
    names = tuple(tuple(n for n in PLACEHOLDER.findall(template) if n not in _ALWAYS) for template in templates)
    return names if any(names) else ()


def _form(speech: Speech, label: str, turn: int, own: Dice) -> str:
    forms = speech.entries[label].forms
    return forms[(own.below(len(forms)) + turn) % len(forms)]


def _with_parent(speech: Speech, label: str, form: str, said: tuple[str, ...], dice: Dice) -> str:
    """The class name, now and then with a wider class that the caption does not name anyway."""
    parents = [parent for parent in speech.parents[label] if parent not in said]
    if not parents or not dice.happens(speech.recipe.compose.parent_rate):
        return form
    return f"{form} (a type of {speech.entries[parents[dice.below(len(parents))]].name})"


def _choose(labels: tuple[str, ...], limit: int, recipe: Recipe, dice: Dice) -> list[str]:
    """At most `limit` of the labels."""
    if len(labels) == 1:
        return list(labels)
    chosen = dice.shuffled(labels)[:limit]
    return chosen if recipe.compose.shuffle else [label for label in labels if label in chosen]


def _adds_negative(recipe: Recipe, dice: Dice) -> bool:
    return bool(recipe.templates.negative) and dice.happens(recipe.compose.negative_rate)


def _fill(template: str, values: Mapping[str, str]) -> str:
    return PLACEHOLDER.sub(lambda found: values[found[1]], template).strip()


def _end(sentence: str) -> str:
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."
