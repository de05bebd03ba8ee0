"""Captions that say nothing: rules on the text alone, each a `CaptionRule` with a reason of its own.

The limits were set on 8,472 real captions (ROCO and the open-access XML of 86 publishers): the defaults refuse 6 of
those, bare labels and `X-ray 05-2013.`, and are meant for what all of PubMed Central brings along: `Figure 2`, `See
text for details`, tables of numbers, a sentence pasted a dozen times.
"""

from __future__ import annotations

import re

from pydantic import Field

from biomedclip.config import Config
from data_builders.filters import CaptionRule

_WORDS = re.compile(r"[^\W_]+")
_NO_LETTERS = re.compile(r"[\W\d_]+")
# The same for ASCII, which most captions are: translating takes a tenth of the time.
_ASCII = [chr(code) for code in range(128)]
_ASCII_WORDS = str.maketrans({c: c.lower() if c.isalnum() else " " for c in _ASCII})
_ASCII_LETTERS = str.maketrans({c: None for c in _ASCII if not c.isalpha()})
_MIN_SEQUENCES = 10
"""Shorter captions repeat themselves for good reasons: `(A) Left eye. (B) Right eye.`"""

_LABEL_WORDS = frozenset(
    "additional appendix available box caption chart click color colour cont continued data details diagram download "
    "extended fig figs figure figures file for full graph graphic graphical here abstract image images in information "
    "larger legend main more movie new of online open page panel panels photo photograph picture plate scheme see "
    "size supplemental supplementary supporting tab table text the title to untitled version video view and".split()
)
_NUMBER = re.compile(r"[a-z]{0,2}\d+[a-z]?|[a-z]|[ivx]{2,4}")
"""`2`, `S1`, `3b`, `A`, `iv`: the numbering of a label."""


class CaptionConfig(Config):
    """What a caption must be to be kept; None switches a rule off."""

    max_words: int | None = Field(default=None, ge=1)
    """Longer ones are whole paragraphs; only 1 caption in 1,000 has more than 430 words."""
    boilerplate: bool = True
    """Refuse captions of nothing but a label and words about the page, such as `Figure 2. See text.`"""
    min_letter_share: float | None = Field(default=0.4, ge=0, le=1)
    """Letters of any script over all characters that are no blanks; real captions have .96 in the middle."""
    max_repeated_share: float | None = Field(default=0.5, ge=0, le=1)
    """Three-word sequences that were there before, over all; the most repetitive real caption has .47."""


def make_caption_rules(config: CaptionConfig) -> tuple[CaptionRule, ...]:
    """The rules of a config, in the order in which they are asked."""
    rules = []
    if config.max_words is not None:
        rules.append(max_caption_words(config.max_words))
    if config.boilerplate:
        rules.append(no_boilerplate())
    if config.min_letter_share is not None:
        rules.append(min_letter_share(config.min_letter_share))
    if config.max_repeated_share is not None:
        rules.append(max_repeated_share(config.max_repeated_share))
    return tuple(rules)


def max_caption_words(count: int) -> CaptionRule:
    """Refuses `caption_too_long`: more than `count` words between blanks."""
    return CaptionRule("caption_too_long", lambda caption: len(caption.split()) > count)


def no_boilerplate() -> CaptionRule:
    """Refuses `caption_boilerplate`: a label, its number and words about the page, and nothing of the picture."""

    def refuses(caption: str) -> bool:
        return all(word in _LABEL_WORDS or _NUMBER.fullmatch(word) for word in _words(caption))

    return CaptionRule("caption_boilerplate", refuses)


def min_letter_share(share: float) -> CaptionRule:
    """Refuses `caption_not_text`: a smaller share of letters among the characters that are no blanks."""

    def refuses(caption: str) -> bool:
        letters = caption.translate(_ASCII_LETTERS) if caption.isascii() else _NO_LETTERS.sub("", caption)
        return len(letters) < share * len("".join(caption.split()))

    return CaptionRule("caption_not_text", refuses)


def max_repeated_share(share: float) -> CaptionRule:
    """Refuses `caption_repetitive`: of ten or more three-word sequences a larger share that was there before."""

    def refuses(caption: str) -> bool:
        words = _words(caption)
        count = len(words) - 2
        if count < _MIN_SEQUENCES:
            return False
        # A sequence that was there before begins with a word that was: most captions are settled by their words.
        if len(words) - len(set(words)) <= share * count:
            return False
        return count - len(set(zip(words, words[1:], words[2:], strict=False))) > share * count

    return CaptionRule("caption_repetitive", refuses)


def _words(caption: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    if caption.isascii():
        return caption.translate(_ASCII_WORDS).split()
    return _WORDS.findall(caption.lower())
