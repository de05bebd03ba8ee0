"""Cross-references of the running text in, the sentences that cite each figure out, with section and panel letters.

A mention is one sentence, because a paragraph of a results section cites many panels and only the sentence says which.
The paragraph is rendered once with a mark at each reference, cut into sentences, and each sentence goes to the figures
its marks name: one reference may name several (`rid="F1 F2"`), two with a dash between name all from one to the other,
and one that names a group names its figures. Captions are not mentions.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

from biomedclip.schema import Mention
from data_builders.pmc.text import MARK, render_text
from data_builders.pmc.xml_input import Element

_PARAGRAPHS = frozenset(
    ("p", "td", "th", "title", "list-item", "def", "term", "disp-quote", "fn", "verse-line", "label")
)
_NOT_BODY = frozenset(("caption", "fig", "fig-group", "label", "ref", "ref-list"))
_TITLED = frozenset(("sec", "app", "ack", "notes", "boxed-text", "glossary"))
_ROOTS = frozenset(("article", "sub-article", "response"))
_DASHES = re.compile(r"\s*(?:[-\u2010-\u2015\u2212~]|to|through|and through)\s*")

_LETTER = r"[A-Za-z](?![A-Za-z0-9])"
_AND = r"\s*(?:,\s*and\b|,|;|/|&|\band\b|\bor\b|\bto\b|[-\u2010-\u2015\u2212])\s*"
_LETTERS = rf"{_LETTER}(?:{_AND}{_LETTER})*"
_AFTER_NUMBER = re.compile(rf"\d\s*\(?({_LETTERS})")
_ONLY_LETTERS = re.compile(rf"\s*\(?({_LETTERS})\)?\s*")
_ENDS_IN_NUMBER = re.compile(r"\d\s*$")
_ENDS_IN_LETTER = re.compile(r"(?:\d\s*\(?|[,–-]\s*|^\s*)[A-Za-z]\)?\s*$")
_SINGLE_LETTER = re.compile(rf"(?<![A-Za-z]){_LETTER}")
_TAIL_STARTS = " (,;/&-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\xa0\u2009\n"
_TAIL_GLUED = re.compile(rf"({_LETTERS})|\(({_LETTERS})\)")
_CAPITALS = rf"[A-Z](?![A-Za-z0-9])(?:{_AND}[A-Z](?![A-Za-z0-9]))*"
_TAIL_SPACED = re.compile(rf"\s+(?:({_CAPITALS})(?=\s*(?:[,.;:)\]]|$))|\(({_LETTERS})\))")
_TAIL_MORE = re.compile(rf"({_AND}{_CAPITALS})(?=\s*(?:[,.;:)\]]|$))")
_RANGE = re.compile(r"([A-Za-z])\s*(?:[-\u2010-\u2015\u2212]|\bto\b)\s*([A-Za-z])(?![A-Za-z])")

_SENTENCE_END = re.compile(r"[.?!][)\]\"”’]*\s+(?=(?:\x01\d+\x02)?[(\[\"“‘]*(?:\x01\d+\x02)?[^\W a-z])")
_LAST_WORD = re.compile(r"(?<![\w.])[\w.]++$")
_ABBREVIATIONS = frozenset(
    "fig figs eq eqs eqn ref refs tab no nos al e.g i.e eg ie vs cf dr prof mr mrs ms st approx ca resp suppl supp"
    " supplementary vol sp spp subsp var cv inc ltd co corp p pp sec ext ed eds viz i.v i.p s.c i.m a.m p.m".split()
)
_NO_PANELS: frozenset[str] = frozenset()
_NUMBERED_LABEL = re.compile(r"(.*?)(\d+)\W*")


def collect_mentions(
    references: Iterable[Element], targets: Mapping[str, tuple[int, ...]], labels: Sequence[str | None]
) -> list[tuple[Mention, ...]]:
    """For each figure its mentions in reading order, one a sentence.

    `references` are the `xref` elements in document order; `targets` says which figures (by position in `labels`)
    an id names. Panel letters are upper-case and sorted.
    """
    # figure -> (paragraph, sentence) -> (text, section, letters)
    found: list[dict[tuple[int, int], tuple[str, str | None, set[str]]]] = [{} for _ in labels]
    sections: dict[Element, tuple[bool, str | None]] = {}
    for number, (block, cited) in enumerate(_group_by_paragraph(references, targets).items()):
        parent = block.getparent()
        if parent not in sections:
            sections[parent] = _locate(parent)
        in_body, section = sections[parent]
        if not in_body:
            continue
        text = render_text(block, None, {xref: i for i, xref in enumerate(cited)})
        for place, sentence in _marked_sentences(text):
            marks = [int(match[1]) for match in MARK.finditer(sentence)]
            plain = MARK.sub("", sentence)
            for mark in marks:
                for figure, letters in _cited_figures(cited[mark], targets, labels):
                    entry = found[figure].setdefault((number, place), (plain, section, set()))
                    entry[2].update(letters)
    return [
        tuple(
            Mention(text=text, section=section, panels=tuple(sorted(letters))) for text, section, letters in f.values()
        )
        for f in found
    ]


def split_sentences(text: str) -> Iterator[str]:
    """The sentences of a text, which joined by single spaces are the text; `Fig. 2`, `et al. 2010` do not end one."""
    start = 0
    for match in _SENTENCE_END.finditer(text):
        stop, end = match.span()
        if _ends_sentence(text, stop):
            yield text[start:end].rstrip()
            start = end
    if start < len(text):
        yield text[start:]


def _marked_sentences(text: str) -> Iterator[tuple[int, str]]:
    """The sentences of a text that hold a mark, and where they start: most ends of sentences need not be looked at."""
    ends = [match.span() for match in _SENTENCE_END.finditer(text)]
    mark, place = text.find("\x01"), 0
    while mark >= 0:
        place = bisect_left(ends, (mark, mark), place)
        first, last = place - 1, place
        # An end of a sentence stands before the mark, or the mark opens the sentence that follows it.
        while first >= 0 and not (ends[first][1] <= mark and _ends_sentence(text, ends[first][0])):
            first -= 1
        while last < len(ends) and not _ends_sentence(text, ends[last][0]):
            last += 1
        start = ends[first][1] if first >= 0 else 0
        stop = ends[last][1] if last < len(ends) else len(text)
        yield start, text[start:stop].rstrip() if last < len(ends) else text[start:]
        mark = text.find("\x01", stop)


def _ends_sentence(text: str, stop: int) -> bool:
    """Whether the mark at `stop`, which looks like the end of a sentence, is none of an abbreviation."""
    if text[stop] != ".":
        return True
    word = _LAST_WORD.search(text, max(0, stop - 16), stop)
    last = word[0].lower() if word else ""
    return not (last in _ABBREVIATIONS or (len(last) == 1 and last.isalpha()))


def read_panels(text: str, tail: str = "") -> frozenset[str]:
    """The panel letters a reference names: of `Fig. 2A–C` or of `Figure 2` followed by `A, C`; upper-case.

    What follows the reference counts only where it cannot be a word: `Fig. 2 a significant …` names no panel.
    """
    letters, ending = _panels_of_text(text)
    if not tail or ending is None or not (tail[0].isalpha() or tail[0] in _TAIL_STARTS):
        return letters
    if ending:
        match = _TAIL_MORE.match(tail) if letters else None
        return letters | _expand(ending + match[1]) if match else letters
    match = _TAIL_GLUED.match(tail) or _TAIL_SPACED.match(tail)
    return letters | _expand(match[1] or match[2]) if match else letters


@lru_cache(maxsize=8192)
def _panels_of_text(text: str) -> tuple[frozenset[str], str | None]:
    """The letters in a reference, and its last one; '' in place of that after a number, None after anything else."""
    only = _ONLY_LETTERS.fullmatch(text)
    letters = frozenset(c for listed in ([only[1]] if only else _AFTER_NUMBER.findall(text)) for c in _expand(listed))
    if _ENDS_IN_NUMBER.search(text):
        return letters, ""
    return letters, text.rstrip(" )")[-1:] if _ENDS_IN_LETTER.search(text) else None


@lru_cache(maxsize=8192)
def _expand(listed: str) -> frozenset[str]:
    """The letters of a list such as `A, c` or `B–D`, upper-case, ranges written out."""
    letters = {c.upper() for c in _SINGLE_LETTER.findall(listed)}
    for first, last in _RANGE.findall(listed):
        letters |= {chr(c) for c in range(ord(first.upper()), ord(last.upper()) + 1)}
    return frozenset(letters)


def _group_by_paragraph(
    references: Iterable[Element], targets: Mapping[str, tuple[int, ...]]
) -> dict[Element, list[Element]]:
    """Paragraph -> its references to figures, in reading order."""
    blocks: dict[Element, list[Element]] = {}
    for xref in references:
        rid = xref.get("rid") or ""
        if rid in targets or (" " in rid and any(part in targets for part in rid.split())):
            block = xref.getparent()
            while block is not None and block.tag not in _PARAGRAPHS:
                block = block.getparent()
            if block is not None:
                blocks.setdefault(block, []).append(xref)
    return blocks


def _locate(parent: Element | None) -> tuple[bool, str | None]:
    """Whether an element is running text, and the titles of the sections around it, outermost first."""
    titles: list[str] = []
    while parent is not None and parent.tag not in _ROOTS:
        if parent.tag in _NOT_BODY:
            return False, None
        if parent.tag in _TITLED:
            title = parent.find("title")
            if title is not None:
                titles.append(render_text(title))
        elif parent.tag == "abstract":
            titles.append("Abstract")
        parent = parent.getparent()
    return True, " > ".join(filter(None, reversed(titles))) or None


def _cited_figures(
    xref: Element, targets: Mapping[str, tuple[int, ...]], labels: Sequence[str | None]
) -> Iterator[tuple[int, frozenset[str]]]:
    """Each figure that a reference names, with the panel letters that are said of it."""
    figures = _targets_of(xref, targets)
    text = "".join(xref.itertext()) if len(xref) else xref.text or ""
    tail = xref.tail or ""
    panels = read_panels(text, tail) if len(figures) == 1 else _NO_PANELS
    for figure in figures:
        yield figure, panels
    if len(figures) > 1 and re.search(r"\d\s*(?:[-\u2010-\u2015\u2212]|to)\s*S?\d", text):
        yield from ((between, _NO_PANELS) for between in _between(figures[0], figures[-1], labels))
    following = xref.getnext() if 0 < len(tail) < 16 and _DASHES.fullmatch(tail) else None
    if figures and following is not None and following.tag == "xref":
        ends = _targets_of(following, targets)
        if ends and ends[0] == figures[-1]:
            last = read_panels("".join(following.itertext()))
            if len(panels) == len(last) == 1:
                yield ends[0], _expand(f"{min(panels)}-{min(last)}")
        elif ends:
            yield from ((between, _NO_PANELS) for between in _between(figures[-1], ends[0], labels))


def _targets_of(xref: Element, targets: Mapping[str, tuple[int, ...]]) -> list[int]:
    rids = (xref.get("rid") or "").split()
    if len(rids) == 1:
        return list(targets.get(rids[0], ()))
    return list(dict.fromkeys(figure for rid in rids for figure in targets.get(rid, ())))


def _between(first: int, last: int, labels: Sequence[str | None]) -> Iterator[int]:
    """Figures after `first` and before `last` whose labels count in the same series (`Figure 2`, not `Figure S1`)."""
    series = _series(labels[first])
    for figure in range(first + 1, last):
        if series is None or _series(labels[figure]) == series:
            yield figure


def _series(label: str | None) -> str | None:
    match = _NUMBERED_LABEL.fullmatch(label or "")
    return match[1].strip().lower() if match else None
