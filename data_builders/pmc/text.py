"""A JATS caption or paragraph in, one line of plain text out, with every word of it in order.

Block elements (`title`, `p`, `list-item`, …) are set apart by a space and inline ones by nothing, so `<bold>a</bold>M`
stays `aM` while `<title>Here</title><p>In` does not become `HereIn`. A superscript that follows a digit gets a caret:
10<sup>4</sup> is `10^4`, never `104`; ordinals (2nd) and degrees need none. Formulas become text through
`mathml`. What is not the caption (object ids, attributions, supplementary files filed inside it, lines that are only a
link) is left out and flagged, so that nothing disappears without a trace. One walker in Python does all of it: lxml's
serialiser in C was measured to be no faster on captions, whose inline elements have to be looked at anyway.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

from data_builders.pmc.mathml import render_math, strip_tex
from data_builders.pmc.xml_input import Element

MARK = re.compile("\x01(\\d+)\x02")
"""What stands where a marked element begins. XML forbids both characters, so no article can contain them."""

Marked: TypeAlias = Mapping[Element, int]

_MML = "{http://www.w3.org/1998/Math/MathML}math"
_BLOCKS = (
    *("p", "title", "subtitle", "label", "list", "list-item", "def-list", "def-item", "def", "term", "def-head"),
    *("term-head", "disp-formula", "disp-formula-group", "disp-quote", "statement", "sec", "boxed-text", "break"),
    *("verse-group", "verse-line", "preformat", "code", "table", "thead", "tbody", "tfoot", "tr", "td"),
    *("th", "fn", "fn-group", "caption", "speech", "speaker", "hr", "chem-struct-wrap", "array", "question"),
)
_SKIPPED = {
    # element -> flag to leave where it held something
    "object-id": "boilerplate_removed",
    "attrib": "attribution_removed",
    "supplementary-material": "supplement_removed",
    "media": "supplement_removed",
    "permissions": None,
    "alt-text": None,
    "long-desc": None,
    "graphic": None,
    "inline-graphic": "has_inline_graphic",
    "table-wrap": "table_removed",
    "inline-media": None,
    "processing-meta": None,
    "fig": None,
    "fig-group": None,
}
_RULES: dict[str, str] = {
    **dict.fromkeys(_BLOCKS, "block"),
    **dict.fromkeys(_SKIPPED, "skip"),
    "sup": "sup",
    "alternatives": "alternatives",
    "tex-math": "tex",
    _MML: "math",
    "math": "math",
    "mml:math": "math",
}
_NO_CARET = frozenset(("st", "nd", "rd", "th", "o", "º", "°"))
_INVISIBLE_CHARACTERS = "\u200b\u200c\u200d\u2060\ufeff\u00ad"
_INVISIBLE = {ord(character): None for character in _INVISIBLE_CHARACTERS}
_LINK = re.compile(r"(?:doi\s*:?\s*)?(?:https?://\S+|(?:doi\s*:\s*)10\.\d{4,9}/\S+|10\.\d{4,9}/\S+)\.?", re.IGNORECASE)

_COLOUR = r"colou?r(?:ed)?"
_FILE_TYPES = r"\(\s*(?:docx?|xlsx?|pptx?|pdf|tiff?|eps|zip|csv|avi|mp4|mov)"
_BOILERPLATE = re.compile(
    "|".join(
        (
            r"\bfull[- ]size image\b\.?",
            r"\(?\bview (?:larger|large) (?:version|image)\b[^.)]*\)?\.?",
            r"\bclick here (?:to view|for (?:additional|larger))\b[^.]*\.?",
            r"\bdownload (?:figure|asset|powerpoint slide)\b\.?(?:\s*open asset\.?)?",
            rf"[\[(]\s*(?:a )?(?:{_COLOUR} (?:version|figure|image)s?|figure in {_COLOUR})[^\])]*"
            rf"(?:available|viewed|online|www\.)[^\])]*[\])]\.?",
            rf"\b(?:a )?{_COLOUR} (?:version|image)s? of (?:this|the|these)? ?figures? (?:is|are|can be|may be)"
            r"[^.]*(?:online|at (?:https?://|www\.)\S+)[^.]*\.?",
            rf"\(?for interpretation of the references to {_COLOUR} in th(?:is|e) figure(?: legend)?,? "
            r"the reader is referred to the web version of th(?:is|e) article\.?\)?\.?",
            rf"{_FILE_TYPES}(?: file)?\s*\)(?=\s*\.?\s*$)\.?",
            r"\bdoi\s*:?\s*(?:https?://\S+|10\.\d{4,9}/\S+)\s*$",
        )
    ),
    re.IGNORECASE,
)
_BOILERPLATE_REACH = 300
"""Such phrases end a caption; in its middle the same words may be the author's."""
_BOILERPLATE_HINTS = (
    *("full size", "full-size", "view larg", "click here", "download", "viewed", "online", "web version", "doi"),
    *("www.", "available"),
)
"""One of these stands in every match but that of a file type, `(DOCX)`, which ends the caption."""
_FILE_TYPE = re.compile(_FILE_TYPES)


def render_text(element: Element, flags: set[str] | None = None, marked: Marked | None = None) -> str:
    """The text of an element on one line; a `MARK` with its number stands before each of `marked`. Adds to `flags`."""
    if not len(element):
        return normalise(element.text or "")
    pieces: list[str] = []
    _walk(element, pieces, set() if flags is None else flags, marked or {})
    return normalise("".join(pieces))


def normalise(text: str) -> str:
    """Text with runs of any whitespace as one space and without invisible characters."""
    text = " ".join(text.split())
    if text.isascii() or not any([character in text for character in _INVISIBLE_CHARACTERS]):
        return text
    return " ".join(text.translate(_INVISIBLE).split())


def caption_text(caption: Element, flags: set[str]) -> str:
    """The text of a `caption` element without what is not caption; '' where nothing is left.

    Flags added: `has_math`, `has_inline_graphic`, `attribution_removed`, `supplement_removed`, `table_removed`,
    `boilerplate_removed`.
    """
    blocks = [normalise(caption.text or "")]
    for child in caption:
        pieces: list[str] = []
        _walk_child(child, pieces, flags, {})
        blocks.append(normalise("".join(pieces)))
        blocks.append(normalise(child.tail or ""))
    blocks = [block for block in blocks if block]
    kept = [block for block in blocks if not _LINK.fullmatch(block)]
    if len(kept) < len(blocks):
        flags.add("boilerplate_removed")
    return remove_boilerplate(" ".join(kept), flags)


def remove_boilerplate(text: str, flags: set[str]) -> str:
    """A caption without the journal web page's phrases at its end; adds `boilerplate_removed` if it had any."""
    start = text.rfind(" ", 0, -_BOILERPLATE_REACH) + 1
    end = text[start:].lower()
    if not (_FILE_TYPE.search(end[-16:]) or any([hint in end for hint in _BOILERPLATE_HINTS])):
        return text
    shorter, count = _BOILERPLATE.subn(" ", text[start:])
    if not count:
        return text
    flags.add("boilerplate_removed")
    return " ".join((text[:start] + shorter).split())


def _walk(element: Element, pieces: list[str], flags: set[str], marked: Marked) -> None:
    if element.text:
        pieces.append(element.text)
    for child in element:
        _walk_child(child, pieces, flags, marked)
        if child.tail:
            pieces.append(child.tail)


def _walk_child(child: Element, pieces: list[str], flags: set[str], marked: Marked) -> None:
    rule = _RULES.get(child.tag)
    if rule is None:
        if child in marked:
            pieces.append(f"\x01{marked[child]}\x02")
        if isinstance(child.tag, str):
            _walk(child, pieces, flags, marked)
    elif rule == "sup":
        _walk_sup(child, pieces, flags, marked)
    elif rule == "block":
        pieces.append(" ")
        _walk(child, pieces, flags, marked)
        pieces.append(" ")
    elif rule == "skip":
        flag = _SKIPPED[child.tag]
        if flag is not None:
            flags.add(flag)
    elif rule == "math":
        flags.add("has_math")
        pieces.append(render_math(child))
    elif rule == "tex":
        flags.add("has_math")
        pieces.append(strip_tex("".join(child.itertext())))
    else:
        _walk_alternatives(child, pieces, flags, marked)


def _walk_sup(sup: Element, pieces: list[str], flags: set[str], marked: Marked) -> None:
    inner: list[str] = []
    _walk(sup, inner, flags, marked)
    text = "".join(inner)
    content = MARK.sub("", text).strip()
    before = next((piece[-1] for piece in reversed(pieces) if piece and piece[0] != "\x01"), "")
    if before.isdecimal() and any(map(str.isalnum, content)) and content not in _NO_CARET:
        pieces.append("^")
        text = text.lstrip()
    pieces.append(text)


def _walk_alternatives(element: Element, pieces: list[str], flags: set[str], marked: Marked) -> None:
    """One of the renderings: plain text before MathML before TeX; pictures say nothing."""
    for tags in (("textual-form",), (_MML, "math", "mml:math"), ("tex-math",)):
        for child in element:
            if child.tag in tags:
                if tags[0] == "textual-form":
                    _walk(child, pieces, flags, marked)
                else:
                    _walk_child(child, pieces, flags, marked)
                return
    _walk(element, pieces, flags, marked)
