"""A question and an answer to the sentences that a caption could have been.

CLIP models saw captions, not questions, so `Is there a mass?` is asked as `There is a mass` against `There is no mass`.
Rules and no model: what no rule fits is asked as the question with `yes` or `no` behind it. Nothing looks at the true
answer, also not to tell yes/no questions from others.
"""

from __future__ import annotations

import re

_BE = ("is", "are", "was", "were")
_OTHER = ("does", "do", "did", "has", "have", "can", "could", "will", "would", "should")
_DETERMINERS = ("the", "this", "that", "these", "those", "there", "it", "they", "any")
_PHRASE = re.compile(r"^(?P<noun>\S+(?: (?:of|in) (?:the )?\S+)*) (?P<rest>.+)$")
_CHOICE = re.compile(r"(?P<first>[\w-]+(?: [\w-]+)?) or (?P<second>[\w-]+(?: [\w-]+)?)\s*\??$")


def asks_yes_no(question: str) -> bool:
    """Whether a question can be answered by yes or no: it begins with an auxiliary and offers no choice."""
    first = question.split(" ", 1)[0].lower()
    return first in (*_BE, *_OTHER) and offered(question) is None


def offered(question: str) -> tuple[str, str] | None:
    """The two answers that a question offers at its end (`... left or right?`), None where it offers none."""
    found = _CHOICE.search(question.lower())
    if found is None:
        return None
    # "on the left or the right": words of the sentence are no part of the answers; as many words as the other has.
    drop = ("the", "a", "an", "is", "are", "in", "on", "it", "this", "of", "more", "be")
    first, second = ([w for w in found[name].split() if w not in drop] for name in ("first", "second"))
    if not first or not second:
        return None
    return " ".join(first[-len(second) :]), " ".join(second)


def declare(question: str) -> tuple[str, str]:
    """(statement, its negation) of a yes/no question; the question with `yes` and `no` where no rule fits."""
    text = " ".join(question.split()).rstrip("?. ")
    words = text.split(" ")
    first = words[0].lower()
    if first not in (*_BE, *_OTHER) or len(words) < 3:
        return f"{text}? yes", f"{text}? no"
    second, rest = words[1].lower(), " ".join(words[2:])
    if second == "there" and first in _BE:
        bare = re.sub(r"^(an?|any|the)\s+", "", rest)
        return f"there {first} {re.sub(r'^any ', '', rest)}", f"there {first} no {bare}"
    if second in ("this", "that", "it", "they", "these", "those") and re.match(r"(an?|the|in|on|of|from)\b", rest):
        return f"{second} {first} {rest}", f"{second} {first} not {rest}"
    found = _PHRASE.match(rest) if second in _DETERMINERS else None
    if found is None:
        return f"{text}? yes", f"{text}? no"
    subject = f"{words[1]} {found['noun']}"
    return f"{subject} {first} {found['rest']}", f"{subject} {first} not {found['rest']}"


def describe(question: str, answer: str) -> str:
    """One of the options of a question as a text to rank."""
    return f"{question.strip()} {answer}"
