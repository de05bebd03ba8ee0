"""When two answers are the same: the normaliser of the VQA challenge, and tokens for the softer scores.

Antol et al. 2015 and the VQA v2 evaluation: lower case, punctuation out, articles out, number words to digits,
contractions with their apostrophe. Pure functions of a string, cached, since a test set repeats few answers often.
Chinese has no spaces, so each of its characters is a token.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import lru_cache

_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the"))
# Forms that are words of their own without the apostrophe (were, well, wed, shell, ill, its) stay as written.
_CONTRACTIONS = {
    word.replace("'", ""): word
    for word in (
        "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't isn't i'm i've might've"
        " mightn't must've mustn't needn't shan't should've shouldn't that's there's they'd they'll they're they've"
        " wasn't we've weren't what's where's who's won't would've wouldn't you'd you'll you're you've"
    ).split()
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!、，。？！；：（）'
_DIGIT_COMMA = re.compile(r"(\d),(\d)")
_LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)|\.(?!\d)")
_TOKEN = re.compile(r"[⺀-鿿豈-﫿]|[^\s⺀-鿿豈-﫿]+")


@lru_cache(maxsize=1 << 18)
def normalise(answer: str) -> str:
    """The answer in the form that exact match compares.

    A mark with a space beside it, or any mark in an answer with a thousands comma, is deleted; else it becomes a
    space, so that `x-ray` and `x ray` are one answer. Periods stay inside numbers only.
    """
    text = " ".join(answer.split())
    inside_number = _DIGIT_COMMA.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        if mark in out:
            beside = f"{mark} " in text or f" {mark}" in text
            out = out.replace(mark, "" if beside or inside_number else " ")
    words = _LONE_PERIOD.sub("", out).lower().split()
    words = [_NUMBERS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words)


@lru_cache(maxsize=1 << 18)
def tokens(answer: str) -> tuple[str, ...]:
    """Words of the normalised answer; each CJK character by itself."""
    return tuple(_TOKEN.findall(normalise(answer)))


@lru_cache(maxsize=1 << 18)
def token_scores(predicted: str, truth: str) -> tuple[float, float, float, float]:
    """Precision, recall, F1 and BLEU-1 of the predicted tokens, each in [0, 1]; 0 for an empty prediction.

    Precision and recall count a token as often as both sides have it (SQuAD, Rajpurkar et al. 2016); BLEU-1 is clipped
    unigram precision times the brevity penalty exp(1 - truth / predicted) of shorter answers (Papineni et al. 2002).
    """
    ours, theirs = tokens(predicted), tokens(truth)
    if not ours or not theirs:
        return (float(ours == theirs),) * 4
    shared = sum((Counter(ours) & Counter(theirs)).values())
    precision, recall = shared / len(ours), shared / len(theirs)
    f1 = 2 * precision * recall / (precision + recall) if shared else 0.0
    brevity = 1.0 if len(ours) >= len(theirs) else math.exp(1 - len(theirs) / len(ours))
    return precision, recall, f1, precision * brevity
