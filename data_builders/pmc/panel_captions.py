"""A figure's caption in, its lead and one text for each panel out, by rules alone.

Journals mark panels in half a dozen ways (`(A)`, `A)`, `A.`, `A:`, `a,`, a bare bold letter, `Panel A`, `left panel`,
or the letter behind the words it belongs to), and ordinary prose is full of things that look the same: `vitamin (A)`,
`(same cells as in (b))`, `P (a)`, `A. thaliana`. So every style is read on its own: its markers become candidates with
a weight (where a marker stands says whether it opens a panel or only mentions one), and the heaviest sequence that
starts at A and never skips a letter wins. A caption whose markers form no such sequence names no panels; that is the
answer for most false markers, because `vitamin (A)` is seldom followed by a `(B)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

MAX_PANELS = 26
_MAX_MARKERS = 120
_BEAM = 64

_DASH = r"[-–—−‐‑]"
_SEPARATOR = rf"\s*(?:{_DASH}|,|;|&|/|\+|\band\b|\bto\b|\bor\b|\bthrough\b)\s*"
_SUB = r"(?:\s?(?:[ivx]{1,4}|[0-9]{1,2})|['′’]{1,2})?"
"""What may follow a letter: part i, 2 or a prime of a panel counts as the panel."""


def _letters_pattern(letter: str) -> str:
    one = rf"{letter}{_SUB}(?![A-Za-z0-9])"
    return rf"{one}(?:(?:{_SEPARATOR}|\s?,\s?and\s){one})*"


_WORD = r"(?:[Pp]anels?|[Ss]ub-?figures?|[Pp]arts?|[Ff]ig(?:ure|\.)?\s?\d{0,2})"
_BOUNDARY = r"(?:^|(?<=[.;:!?)\]”\"]\s)|(?<=[.;!?)\]]))"
"""Where a sentence or a list item can begin; styles without a bracket exist only here."""


@dataclass(frozen=True, slots=True)
class PanelCaptions:
    """A caption taken apart. `panels` maps a panel (`A`, or `left`) to its own words, in the caption's order."""

    lead: str
    """What stands before the first panel: usually the figure's title."""
    panels: Mapping[str, str] = field(default_factory=dict)
    tail: str = ""
    """Closing sentences that concern all panels: scale bars, error bars, abbreviations."""
    style: str = "none"
    confidence: float = 0.0
    """0 to 1: how much the markers look like markers. 0 where no panels were found."""

    @property
    def letters(self) -> tuple[str, ...]:
        """The panels in the order of the alphabet, or of the caption where they are named by position."""
        return tuple(self.panels) if self.style == "position" else tuple(sorted(self.panels))


@dataclass(frozen=True, slots=True)
class _Marker:
    start: int
    end: int
    letters: tuple[str, ...]
    weight: float
    """Per letter; at most 1."""


@dataclass(frozen=True, slots=True)
class _Chain:
    style: str
    mode: str
    markers: tuple[_Marker, ...]
    covered: frozenset[str]
    weight: float
    """Mean of the markers' weights by letter, times the trust in the style."""


# style -> (pattern with one group %s for the letters, trust). `leading` styles put the marker before the words.
_STYLES: dict[str, tuple[str, float]] = {
    "bracket": (rf"(?:{_WORD}\s)?[(\[]\s?(?:{_WORD}\s)?(%s)(?:[;,]\s[a-z][a-z ,-]{0, 40})?\s?[)\]](?:\s?:)?", 1.0),
    "half_bracket": (rf"(?:^|(?<=[\s;:.])){_WORD}?\s?(%s)\)(?:\s?:)?", 0.95),
    "period": (rf"{_BOUNDARY}(?:{_WORD}\s)?(%s)\.(?=\s|\()", 0.9),
    "colon": (rf"(?:^|(?<=[.;,:)]\s))(?:{_WORD}\s)?(%s)\s?(?::|=|\|)(?=\s)", 0.9),
    "dash": (rf"{_BOUNDARY}(?:{_WORD}\s)?(%s)\s?[–—-](?=\s)", 0.8),
    "comma": (rf"{_BOUNDARY}(?:and\s)?(%s),(?=\s)", 0.8),
    "word": (r"\b[Pp]anels?\s\(?(%s)\)?", 0.85),
    "bare": (rf"{_BOUNDARY}(%s)(?=\s+[A-Z(][A-Za-z0-9-])", 0.75),
}
_MODES = {"after": 1.0, "before": 0.9, "around": 0.6}
"""Where a panel's words are, seen from its marker, and the trust in such a reading. `around` is the last resort for
captions that mix both: every sentence that names the panel."""

_PATTERNS = {
    (style, upper): re.compile(pattern % _letters_pattern("[A-Z]" if upper else "[a-z]"))
    for style, (pattern, _) in _STYLES.items()
    for upper in (True, False)
}
_QUICK = re.compile(r"(?:^|[^A-Za-z0-9])[Bb]" + _SUB + r"(?![A-Za-z0-9])|[Aa]\s?[-–—−]\s?[A-Za-z](?![A-Za-z])")
"""No B and no range from A: no panels, which spares most captions everything below."""

_ONE = re.compile(rf"(?<![A-Za-z])([A-Za-z]){_SUB}(?![A-Za-z0-9])")
_JOIN = re.compile(rf"(?:{_SEPARATOR}|\s?,\s?and\s|\s?)$")
_REFERENCE = re.compile(
    r"(?:\b(?:in|of|as|from|see|with|than|for|also|by|panels?|figs?\.?|figures?|cells|shown|described|and|both)|[Ss]ee)\s*$"
)
_MEASURE = re.compile(r"\s*[=<>]|\s*[0-9.]+\s?[µμnm]m\b")
"""After `Scale bars: (A, B)`: sizes, not panels."""
_AFTER_MARK = re.compile(r"\s*(?:$|[.,;:)\]]|(?:and|or|but|respectively|versus|vs)\b)")
_CAPITAL = re.compile(r"\s*[A-Z][A-Za-z]*\s")
"""A capital after a marker begins a sentence, also where a title before it has no full stop."""
_BEFORE_OPENING = re.compile(r"(?:^|[.;:!?)\]”\"’'])\s*$")
_BEFORE_ITEM = re.compile(r"(?:,|\b(?:and|or|while|whereas|for))\s*$")
_SENTENCE = re.compile(
    r"(?<=[.!?])(?<!\b[Ff]ig\.)(?<!\b[Ff]igs\.)(?<!\bal\.)(?<!\bvs\.)(?<!\b[A-Za-z]\.)\s+(?=[A-Z(\[0-9])"
)
_TAIL = re.compile(
    r"^(?:scale[ -]?bars?|(?:all )?error bars?|abbreviations?|see also|data (?:are|represent|were)|bars?[:=]|"
    r"statistical|\*|n\.?s\.?[ ,:=]|for (?:all|each) panels?|in all panels?|all (?:scale|panels?|images)|"
    r"magnification)",
    re.IGNORECASE,
)
_POSITION = re.compile(
    r"\b(?P<name>left|right|middle|cent(?:er|re|ral)|top|bottom|upper|lower)"
    r"(?:[- ](?:hand|most))?(?:[- ]side)?\s(?:panel|figure|image|picture|plot|graph)\b"
    r"|(?:^|(?<=[.;]\s))(?P<word>left|right|middle|cent(?:er|re)|top|bottom|upper|lower)\s?:",
    re.IGNORECASE,
)
_POSITION_NAMES = {"upper": "top", "lower": "bottom", "center": "middle", "centre": "middle", "central": "middle"}
_POSITION_SETS = (("left", "right"), ("left", "middle", "right"), ("top", "bottom"), ("top", "middle", "bottom"))


def split_caption(caption: str) -> PanelCaptions:
    """The caption's lead, and the words of each panel it names; no panels where no plausible sequence is found.

    Panels come as upper-case letters, whatever the caption writes; a caption without letters that speaks of its left
    and right (top and bottom) panel has these names instead.
    """
    text = " ".join(caption.split())
    chain = _best_chain(text) if _QUICK.search(text) else None
    if chain is None:
        return _split_by_position(text)
    read = {"after": _texts_after, "before": _texts_before, "around": _texts_around}[chain.mode]
    panels, lead = read(text, chain)
    tail = ""
    if chain.mode == "after":
        last = chain.markers[-1].letters
        cut = {letter: _cut_tail(panels[letter]) for letter in last}
        panels.update({letter: own for letter, (own, _) in cut.items()})
        tail = cut[last[-1]][1]
    style = chain.style if chain.mode == "after" else f"{chain.style}-{chain.mode}"
    return PanelCaptions(lead, dict(sorted(panels.items())), tail, style, _confidence(chain, panels))


def compose_panel_caption(captions: PanelCaptions, panel: str) -> str:
    """The caption of one panel: its own words, then the lead, because tokenizers cut what is long at the end.

    Raises KeyError for a panel that the caption does not name.
    """
    own = captions.panels[panel].strip()
    own = own[:1].upper() + own[1:]
    if own and own[-1] not in ".!?":
        own = own.rstrip(",;: ") + "."
    return " ".join(part for part in (own, captions.lead.strip()) if part)


def _best_chain(text: str) -> _Chain | None:
    chains = []
    for (style, upper), pattern in _PATTERNS.items():
        found = list(_find_markers(pattern, text, style))
        if not found:
            continue
        for mode, trust in _MODES.items() if style in ("bracket", "word") else (("after", 1.0),):
            markers = [_weigh(text, marker, style, mode) for marker in found]
            chain = _search(style, mode, _STYLES[style][1] * trust, markers)
            if chain is not None and _is_plausible(chain):
                # Upper and lower case compete on equal terms; a mixed caption is read by its commoner case.
                chains.append((len(chain.covered) * (0.35 + chain.weight), upper, chain))
    if any(upper and chain.mode == "after" and chain.weight >= 0.6 for _, upper, chain in chains):
        # Small letters then name parts inside the panels that capitals name.
        chains = [entry for entry in chains if entry[1]]
    return max(chains, key=lambda entry: (entry[0], entry[1]))[2] if chains else None


def _is_plausible(chain: _Chain) -> bool:
    """A single marker such as `regions (A-F)` must stand where a panel's does."""
    return chain.weight >= (0.25 if len(chain.markers) > 1 else 0.75)


def _find_markers(pattern: re.Pattern[str], text: str, style: str) -> Iterator[_Marker]:
    """Markers in order; `(A), (C) and (D)` and `(C)-(F)` are one marker."""
    pending: tuple[int, int, list[str], str] | None = None
    depth = _bracket_depths(text) if style not in ("bracket",) else None
    for count, match in enumerate(pattern.finditer(text)):
        if count >= _MAX_MARKERS:
            break
        if depth is not None and depth[match.start(1)] > 0:
            continue
        letters = _expand(match.group(1))
        if not letters:
            continue
        if pending is not None and style == "bracket":
            start, end, before, _ = pending
            between = text[end : match.start()]
            if _JOIN.fullmatch(between) and text[end - 1] not in ":." and min(letters) > max(before):
                if re.search(_DASH, between):
                    letters = tuple(map(chr, range(ord(before[-1]) + 1, ord(letters[0])))) + letters
                pending = (start, match.end(), [*before, *letters], between)
                continue
        if pending is not None:
            yield _Marker(pending[0], pending[1], tuple(dict.fromkeys(pending[2])), 0.0)
        pending = (match.start(), match.end(), list(letters), "")
    if pending is not None:
        yield _Marker(pending[0], pending[1], tuple(dict.fromkeys(pending[2])), 0.0)


def _bracket_depths(text: str) -> list[int]:
    depths, depth = [], 0
    for character in text:
        depth += (character in "([") - (character in ")]" and depth > 0)
        depths.append(depth)
    return depths


def _expand(group: str) -> tuple[str, ...]:
    """`A–C, e` as A, B, C, E; empty where a range runs backwards or a letter repeats."""
    letters: list[str] = []
    position = 0
    for match in _ONE.finditer(group):
        letter = match.group(1).upper()
        between = group[position : match.start()]
        if letters and re.search(rf"{_DASH}|\bto\b|\bthrough\b", between):
            if letter < letters[-1]:
                return ()
            letters += map(chr, range(ord(letters[-1]) + 1, ord(letter)))
        if not letters or letter != letters[-1]:
            letters.append(letter)
        position = match.end()
    return tuple(letters) if len(set(letters)) == len(letters) else ()


def _weigh(text: str, marker: _Marker, style: str, mode: str) -> _Marker:
    """The marker with its weight: near 1 where it stands as a panel's marker does, near 0 for a mention."""
    before, after = text[max(0, marker.start - 24) : marker.start], text[marker.end : marker.end + 32]
    closed = bool(_AFTER_MARK.match(after)) and text[marker.end - 1] != ":"
    opening = marker.start == 0 or bool(_BEFORE_OPENING.search(before))
    item = bool(_BEFORE_ITEM.search(before))
    mention = not item and not opening and bool(_REFERENCE.search(before))
    if mode == "around":
        weight = 0.4 if mention else 0.9
    elif mode == "before":
        weight = (0.85 if closed and not opening else 0.05) * (0.2 if mention else 1.0)
    elif opening:
        weight = 0.15 if closed else 1.0
    elif _CAPITAL.match(after):
        weight = 0.5 if mention else 0.9
    else:
        weight = (0.6 if item else 0.4) * (0.15 if closed else 1.0) * (0.6 if mention else 1.0)
    if _MEASURE.match(after):
        weight *= 0.1
    return _Marker(marker.start, marker.end, marker.letters, weight)


def _search(style: str, mode: str, trust: float, markers: list[_Marker]) -> _Chain | None:
    """The chain of markers that covers A to N without a hole, with most letters and then most weight; None below two.

    A beam over the markers in text order: each may open panels only if its first letter is the next that is missing
    and all of its letters are still free.
    """
    states: dict[int, tuple[float, tuple[_Marker, ...]]] = {0: (0.0, ())}
    for marker in markers:
        mask = sum(1 << (ord(letter) - 65) for letter in marker.letters)
        lowest = mask & -mask
        grown = dict(states)
        for covered, (weight, chain) in states.items():
            if covered & mask or (~covered & (covered + 1)) != lowest or marker.weight < 0.04:
                continue
            candidate = (weight + marker.weight * len(marker.letters), (*chain, marker))
            if candidate[0] > grown.get(covered | mask, (-1.0, ()))[0]:
                grown[covered | mask] = candidate
        if len(grown) > _BEAM:
            best = sorted(grown, key=lambda key: (key.bit_count(), grown[key][0]), reverse=True)[: _BEAM - 1]
            grown = {0: (0.0, ()), **{key: grown[key] for key in best}}
        states = grown
    whole = [key for key in states if key & (key + 1) == 0 and key.bit_count() > 1]
    if not whole:
        return None
    best_key = max(whole, key=lambda key: key.bit_count() * 0.35 + states[key][0])
    weight, best_chain = states[best_key]
    letters = frozenset(chr(65 + bit) for bit in range(best_key.bit_length()))
    return _Chain(style, mode, best_chain, letters, trust * weight / len(letters))


def _texts_after(text: str, chain: _Chain) -> tuple[dict[str, str], str]:
    """Words after each marker, up to the next; a range's own sub-markers divide its words further.

    Markers inside a sentence (`Levels after (a) saline or (b) MA`) share what the sentence says before the first.
    """
    panels: dict[str, str] = {}
    ends = [*(marker.start for marker in chain.markers[1:]), len(text)]
    sentences = [0, *(match.end() for match in _SENTENCE.finditer(text))]
    lead_end = chain.markers[0].start
    heads: dict[int, str] = {}
    for marker, end in zip(chain.markers, ends, strict=True):
        words = text[marker.end : end]
        sentence = max(start for start in sentences if start <= marker.start)
        if sentence not in heads:
            head = text[sentence : marker.start].strip()
            heads[sentence] = "" if _is_opening(text, marker, head) else head
            if marker is chain.markers[0] and heads[sentence]:
                lead_end = sentence
        parts = _divide_group(words, marker.letters, chain.style) if len(marker.letters) > 1 else None
        for letter in marker.letters:
            panels[letter] = f"{heads[sentence]} {_trim(parts[letter] if parts else words)}".strip()
    return panels, text[:lead_end].strip()


def _is_opening(text: str, marker: _Marker, head: str) -> bool:
    return not head or bool(_BEFORE_OPENING.search(head) or _CAPITAL.match(text[marker.end : marker.end + 32]))


def _texts_around(text: str, chain: _Chain) -> tuple[dict[str, str], str]:
    """For each panel the sentences that name it, and as lead all sentences that name none."""
    sentences = _SENTENCE.split(text)
    named: list[set[str]] = [set() for _ in sentences]
    panels: dict[str, str] = {}
    for upper in (True, False):
        for sentence, names in zip(sentences, named, strict=True):
            for marker in _find_markers(_PATTERNS[chain.style, upper], sentence, chain.style):
                names.update(chain.covered.intersection(marker.letters))
    for letter in sorted(chain.covered):
        panels[letter] = " ".join(words for words, names in zip(sentences, named, strict=True) if letter in names)
    return panels, " ".join(words for words, names in zip(sentences, named, strict=True) if not names)


def _divide_group(words: str, letters: tuple[str, ...], style: str) -> dict[str, str] | None:
    """For `(C-E) Diagrams of (C) x, (D) y and (E) z`: what C, D and E share and their own part; None without such."""
    inner: list[_Marker] = []
    position = 0
    for upper in (True, False):
        pattern = _PATTERNS[style, upper]
        inner = []
        position = 0
        for marker in _find_markers(pattern, words, style):
            wanted = letters[position] if position < len(letters) else None
            closed = _AFTER_MARK.match(words[marker.end : marker.end + 32])
            if marker.letters == (wanted,) and not closed:
                inner.append(marker)
                position += 1
        if position == len(letters):
            break
    if position != len(letters):
        return None
    shared = words[: inner[0].start].strip(" :,;")
    ends = [*(marker.start for marker in inner[1:]), len(words)]
    return {
        letter: f"{shared} {_trim(words[marker.end : end])}"
        for letter, marker, end in zip(letters, inner, ends, strict=True)
    }


def _texts_before(text: str, chain: _Chain) -> tuple[dict[str, str], str]:
    """Words before each marker, back to the one before it; the first panel begins at its sentence's start."""
    panels: dict[str, str] = {}
    first = chain.markers[0]
    start = max((match.end() for match in _SENTENCE.finditer(text, 0, first.start)), default=0)
    lead = text[:start].strip()
    starts = [start, *(marker.end for marker in chain.markers[:-1])]
    for marker, begin in zip(chain.markers, starts, strict=True):
        for letter in marker.letters:
            panels[letter] = _trim(re.sub(r"^\s*(?:[,;.:]|\band\b)*\s*(?:and\b)?", "", text[begin : marker.start]))
    rest = text[chain.markers[-1].end :].strip(" .,;")
    if rest:
        # What follows the last marker speaks of all panels as often as of the last one.
        lead = f"{lead} {rest}".strip()
    return panels, lead


def _trim(words: str) -> str:
    words = words.strip().strip(":;,|–—- ").strip()
    return re.sub(r"[\s,;]+(?:and|or|while|whereas)$", "", words)


def _cut_tail(words: str) -> tuple[str, str]:
    """The last panel's own words, and the closing sentences that are about the whole figure."""
    sentences = _SENTENCE.split(words)
    for index in range(1, len(sentences)):
        if _TAIL.match(sentences[index]):
            return " ".join(sentences[:index]), " ".join(sentences[index:])
    return words, ""


def _confidence(chain: _Chain, panels: Mapping[str, str]) -> float:
    """The chain's weight, less where panels are left without words of their own or are implausibly many."""
    wordless = sum(len(words.split()) < 2 for words in panels.values())
    confidence = chain.weight * (1 - 0.6 * wordless / len(panels))
    gaps = [second.start - first.end for first, second in pairwise(chain.markers)]
    if gaps and max(gaps) < 12:
        confidence *= 0.8  # may be a list of abbreviations instead of panels
    return round(min(confidence, 1.0), 3)


def _split_by_position(text: str) -> PanelCaptions:
    """Panels that the caption calls left and right, or top and bottom; each name may open only one."""
    found: dict[str, int] = {}
    for match in _POSITION.finditer(text):
        name = (match["name"] or match["word"]).lower()
        found.setdefault(_POSITION_NAMES.get(name, name), match.start())
    if tuple(sorted(found)) not in {tuple(sorted(names)) for names in _POSITION_SETS}:
        return PanelCaptions(text)
    names = sorted(found, key=lambda name: found[name])
    starts = [_sentence_start(text, found[name]) for name in names]
    if len(set(starts)) < len(starts):
        return PanelCaptions(text[: starts[0]].strip(), dict.fromkeys(names, text[starts[0] :]), "", "position", 0.4)
    ends = [*starts[1:], len(text)]
    panels = {name: text[start:end].strip() for name, start, end in zip(names, starts, ends, strict=True)}
    panels[names[-1]], tail = _cut_tail(panels[names[-1]])
    return PanelCaptions(text[: starts[0]].strip(), panels, tail, "position", 0.6)


def _sentence_start(text: str, position: int) -> int:
    return max((match.end() for match in re.finditer(r"[.;:]\s+", text[:position])), default=0)
