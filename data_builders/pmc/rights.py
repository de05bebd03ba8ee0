"""A figure's text and its `permissions` in, whether somebody else holds rights in it, and its own licence, out.

An article's licence covers what its authors made. A figure taken from another work is marked by words in its caption
(`Reproduced with permission from …`, `© 2017 Nature`), rarely by an element (2 of 300 figures looked at), so both are
read. The rule fails closed: words of permission or of another's copyright count, whoever is named, except where they
are about patients or name the article's own authors. `Adapted from` alone is a flag and not third party, because most
such figures were drawn anew.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from data_builders.pmc.licences import read_licence
from data_builders.pmc.text import normalise
from data_builders.pmc.xml_input import Element

_REUSED = (
    r"(?:reproduc|reprint|republish|re-?us|re-?print|re-?publish|adapt|modifi|redrawn|(?<!\w)us|taken|excerpt|extract"
    r"|publish|print|includ|provid|copied)(?:ed|e|es|d)?"
)
_OF_PEOPLE = (
    r"(?:the |their |his |her |our |all |both |this |each |these )*(?:patient|parent|participant|subject|famil|guardian"
    r"|volunteer|owner|model|individual|relative|legal|next of kin|mother|father|child|hospital|ethic|institution)"
)
_PERMISSION = re.compile(
    rf"\b(?:with|by|under)\s+(?:the |kind |special |written |prior |explicit |full |copyright |appropriate |due )*"
    rf"permissions?\b(?!\s+(?:of|from|by)\s+{_OF_PEOPLE})"
    rf"|\b{_REUSED}\b[^.;]{{0,80}}?\bpermissions?\b(?!\s+(?:of|from|by)\s+{_OF_PEOPLE})"
    r"|\bpermissions?\s+(?:was |were |has been |is )?(?:granted|obtained|conveyed|received)?\s*"
    r"(?:from|by|through|of)\s+(?:the )?(?:publisher|copyright|journal|elsevier|springer|wiley|nature|oxford|cambridge"
    r"|taylor|sage|american|acs|royal society|ieee|bmj|lippincott|wolters|mcgraw|macmillan|cell press|aaas)"
    r"|\ball rights reserved\b|\bused under licen[cs]e\b|\bcourtesy(?:\s+of|\s*:)",
    re.IGNORECASE,
)
_COPIED = re.compile(
    r"\b(?:reproduced|reprinted|republished|taken|copied|excerpted)\s(?:with\s\w+\s)?from\s+"
    r"(?!fig|table|panel|the same|supplement|above|our|a |an |the (?:same|left|right|top|bottom|area|region|site|box)"
    r"|the cent|mice|mouse|rats?\b|patient|subject|animal|participant|each|both|one|two|three|wild"
    r"|\w+ (?:mice|rats|patients)\b)",
    re.IGNORECASE,
)
_REFERENCE = re.compile(r"[\[(]\s*\(?\s*\d|\bet al\b|\b(?:19|20)\d\d\b|\bref(?:erence|s)?\b|https?://|\bwww\.", re.I)
_COPYRIGHT = re.compile(
    r"(?:©|\(c\)(?=\s*(?:19|20)\d\d)|\bcopyr(?:ight|ite)(?:ed)?\b|\bcopywrite\b)"
    r"(?!\s*(?:\d{4}\s*)?(?:©\s*)?(?:\d{4}\s*)?,?\s*(?:by\s+)?(?:the\s+)?author)",
    re.IGNORECASE,
)
_ADAPTED = re.compile(
    r"\b(?:adapted|modified|redrawn|reproduced|reprinted|derived)\s+(?:\w+\s+){0,2}?(?:from|after)\b", re.IGNORECASE
)
# One of its hints stands in whatever an expression matches, which spares most captions all of them.
_PERMISSION_HINTS = ("permission", "reserved", "under licen", "courtesy")
_COPYRIGHT_HINTS = ("©", "copyr", "copywr")
_COPYRIGHT_YEAR = re.compile(r"\(c\)\s*(?:19|20)\d\d")
"""Of a caption in lower case. `(c)` alone is a panel in every third caption."""
_COPIED_HINTS = ("reproduced", "reprinted", "republished", "taken from", "taken with", "copied", "excerpted")
_ADAPTED_HINTS = ("adapted", "modified", "redrawn", "reproduced", "reprinted", "derived")
_CREDIT = re.compile(
    r"\b(?:credits?|source|photo\w*|images?|illustrations?|artwork|drawing)\b[^:]{0,30}(?::|\bby\b)", re.I
)
_AUTHORS = re.compile(r"\bauthors?\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Rights:
    """Rights in one figure: `licence` is a code only where the figure states one of its own."""

    third_party: bool = False
    licence: str | None = None
    flags: tuple[str, ...] = ()


def words_of_others(text: str) -> bool:
    """Whether a caption says that another party holds rights in the figure, or that it was copied from elsewhere."""
    lower = text.lower()
    if _has(lower, _PERMISSION_HINTS) and _PERMISSION.search(text):
        return True
    hinted = _has(lower, _COPYRIGHT_HINTS) or ("(c)" in lower and _COPYRIGHT_YEAR.search(lower))
    if hinted and _COPYRIGHT.search(text):
        return True
    if not _has(lower, _COPIED_HINTS):
        return False
    # `taken from` is copying only where a source is named next; else it tells where a sample was taken.
    return any(_REFERENCE.search(text[match.end() : match.end() + 90]) for match in _COPIED.finditer(text))


def read_rights(
    text: str, attributions: list[Element], permissions: list[Element], article_holders: frozenset[str]
) -> Rights:
    """The rights in a figure, from its words, its `attrib` elements (credit lines) and its own `permissions`.

    `article_holders` are the article's own copyright statement and holder, normalised and lower-case: the publishers
    that repeat them at each figure say nothing new.
    """
    flags = []
    third_party = False
    if attributions:
        credits = normalise(" ".join("".join(node.itertext()) for node in attributions))
        text = f"{text} {credits}"
        third_party = _CREDIT.search(credits) is not None
        flags.append("has_attribution")
    third_party = third_party or words_of_others(text)
    if _has(text.lower(), _ADAPTED_HINTS) and _ADAPTED.search(text):
        flags.append("adapted")
    licence = None
    for element in permissions:
        stated = read_licence(element)
        if "xml_conflict" in stated.flags or "unrecognised" in stated.flags:
            third_party = True
        licence = licence or stated.code
        words = normalise(" ".join(element.itertext()))
        foreign = any(holder not in article_holders and not _AUTHORS.search(holder) for holder in read_holders(element))
        third_party = third_party or (stated.code is None and foreign) or _PERMISSION.search(words) is not None
    if permissions:
        flags.append("figure_permissions")
    return Rights(third_party, licence, tuple(flags))


def read_holders(permissions: Element | None) -> frozenset[str]:
    """The copyright statements and holders of a `permissions` element, normalised and lower-case."""
    if permissions is None:
        return frozenset()
    tags = ("copyright-statement", "copyright-holder")
    texts = (normalise("".join(node.itertext())).lower() for node in permissions if node.tag in tags)
    return frozenset(text for text in texts if text)


def _has(text: str, hints: tuple[str, ...]) -> bool:
    return any([hint in text for hint in hints])  # a list, because a generator costs more than the searches
