"""What an article's XML says about its licence, and whether that agrees with the metadata.

Read are the `license` elements of the article front: their link, `ali:license_ref`, `license-type` attribute, links
in the text, and the words themselves; where there is no such element, the copyright statement (PLOS articles before
2008). Each piece of evidence names at most one code. Evidence that disagrees is a conflict, never a vote: words that
say NonCommercial beside a CC BY link stop the article. A public domain waiver that speaks of the data only is not the
article's licence (about a fifth of real articles have one) and is left out, with a flag.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from biomedclip.licences import LICENCE_CLASSES
from data_builders.pmc.text import normalise
from data_builders.pmc.xml_input import Element, href_of

_LICENSE_REF = "{http://www.niso.org/schemas/ali/1.0/}license_ref"
_KNOWN_CODES = {code.replace(" ", "-").lower(): code for codes in LICENCE_CLASSES.values() for code in codes}

_URL = re.compile(
    r"creativecommons\.org/(?:(?:licen[cs]es|licen[cs]e)/(?P<parts>[a-z]+(?:-[a-z]+)*)(?:/(?P<version>\d\.\d))?"
    r"|publicdomain/(?P<domain>zero|mark))",
    re.IGNORECASE,
)
_MODIFIERS = (
    r"(?:[\s,/()–—-]*(?:(?:and\s+)?non[\s–-]*commercial|no[\s–-]*deriv(?:ative)?s?(?:\s+works?)?|share[\s–-]*alike))*"
)
_NAME = re.compile(
    rf"(?:creative\s+commons|\bcc\b)[\s,:(–—-]*(?:(?:public\s+)?licen[cs]e[s]?[\s,:(–—-]*)?attribution{_MODIFIERS}",
    re.IGNORECASE,
)
_SHORT_NAME = re.compile(
    r"\bcc[\s–-]*by(?P<parts>(?:[\s–/-]*\b(?:nc|nd|sa)\b|[–-]?(?:nc|nd|sa)\b)*)|\bcc[\s–-]*(?P<zero>0|zero)\b",
    re.IGNORECASE,
)
_PUBLIC_DOMAIN = re.compile(r"creative\s+commons\s+(?:cc0\s+)?public\s+domain\s+dedication", re.IGNORECASE)
_NONCOMMERCIAL = re.compile(
    r"(?<!commercial and )(?<!commercial or )(?<!both )\bnon[\s–-]*commercial(?!\s*(?:and|or|as well as)\s+commercial)",
    re.IGNORECASE,
)
_DATA_WAIVER = re.compile(
    r"(?:public domain (?:dedication )?waiver|public domain dedication|cc0|publicdomain/zero)"
    r"(?:(?!licen[cs]e)[^.;]|\.(?=\S)){0,200}?\b(?:appl(?:y|ies) to|for) (?:the |all |any )?(?:meta)?data\b"
    r"|\b(?:meta)?data\b(?:[^.;]|\.(?=\S)){0,120}?\b(?:available|released|dedicated|waived|licen[cs]ed)\b"
    r"(?:[^.;]|\.(?=\S)){0,120}?(?:public domain|cc0|publicdomain/zero)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[.;])\s+(?=[A-Z(])")
_ALL_RIGHTS = re.compile(r"\ball rights (?:are )?reserved\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class XmlLicence:
    """What one `permissions` element states. `code` is None where it states nothing, or contradicts itself."""

    code: str | None = None
    url: str | None = None
    """The Creative Commons link that names the code, with its version; None where only words do."""
    evidence: tuple[str, ...] = ()
    """Each piece as `source: text -> code`, for the ledger and for a person who looks into a conflict."""
    flags: tuple[str, ...] = ()
    """data_waiver, xml_conflict, all_rights_reserved, unrecognised, from_copyright_statement."""


def code_of_url(url: str) -> str | None:
    """The licence code of a Creative Commons URL in any spelling, version or jurisdiction; None for any other."""
    match = _URL.search(url)
    if match is None:
        return None
    if match["domain"]:
        return "CC0" if match["domain"].lower() == "zero" else None
    return _code_of_parts(set(match["parts"].lower().split("-")))


def normalise_code(code: str | None) -> str | None:
    """The spelling of biomedclip.licences for a code in another: `cc-by-nc` -> `CC BY-NC`; None for none.

    PMC's `NO-CC CODE` is none. A code we do not know comes back as it is, because it is a statement all the same.
    """
    text = normalise(code or "")
    if not text or text.upper() in ("NO-CC CODE", "NONE", "NULL"):
        return None
    key = re.sub(r"[\s_]+", "-", re.sub(r"\s*\(.*?\)|[\s-]+\d\.\d$", "", text)).lower()
    return _KNOWN_CODES.get(key, text)


def decide_licence(metadata_code: str | None, xml: XmlLicence) -> tuple[str | None, str | None]:
    """The article's licence code and None, or None and the reason: `licence_conflict` or `no_licence`.

    A side that states nothing does not disagree. Raises nothing.
    """
    code = normalise_code(metadata_code)
    if "xml_conflict" in xml.flags:
        return None, "licence_conflict"
    denied = metadata_code is not None and metadata_code.strip().upper() == "NO-CC CODE"
    if xml.code is None:
        if code is not None and "all_rights_reserved" in xml.flags:
            return None, "licence_conflict"
        return (code, None) if code else (None, "no_licence")
    if denied or (code is not None and code != xml.code):
        return None, "licence_conflict"
    return xml.code, None


def read_licence(scope: Element | None) -> XmlLicence:
    """What the licence statements below `scope` (an `article-meta`, or a figure's `permissions`) say.

    Only `permissions` that are the scope's own are read: those of a figure inside an abstract are not the article's.
    """
    if scope is None:
        return XmlLicence()
    places = [scope, *scope.findall("permissions")]
    found = [licence for place in places for licence in place.findall("license")]
    references = [r for place in places for r in place.findall(_LICENSE_REF)]
    evidence: list[tuple[str, str, str | None]] = []
    flags: set[str] = set()
    for licence in found:
        _read_statement(licence, evidence, flags)
    for reference in references:
        _add_link("license_ref", reference.text, evidence)
    if not any(code for *_, code in evidence):
        for place in places:
            for statement in place.findall("copyright-statement"):
                before = len(evidence)
                _read_statement(statement, evidence, flags, is_licence=False)
                if any(code for *_, code in evidence[before:]):
                    flags.add("from_copyright_statement")
    return _weigh(evidence, flags, stated=bool(found or references))


def _weigh(evidence: list[tuple[str, str, str | None]], flags: set[str], *, stated: bool) -> XmlLicence:
    codes = {code for *_, code in evidence if code}
    code = codes.pop() if len(codes) == 1 else None
    if codes and code is None:
        flags.add("xml_conflict")
    elif code is None and stated:
        flags.add("unrecognised")
    url = next((text for source, text, c in evidence if c and c == code and source != "words" and "/" in text), None)
    if code is not None:
        flags.discard("all_rights_reserved")
    pieces = tuple(dict.fromkeys(f"{source}: {text} -> {c or 'nothing'}" for source, text, c in evidence))
    return XmlLicence(code, url, pieces, tuple(sorted(flags)))


def _read_statement(
    element: Element, evidence: list[tuple[str, str, str | None]], flags: set[str], *, is_licence: bool = True
) -> None:
    """Add each piece of evidence of one `license` or `copyright-statement` as (source, text, code)."""
    kind = element.get("license-type") or ""
    links = [href for node in element.iter("ext-link", "uri") if (href := href_of(node))]
    references = [r.text for r in element.iter(_LICENSE_REF)]
    words = _words(element)
    said = _read_words(words)
    if said.waived:
        flags.add("data_waiver")
        about_data = {"CC0"} | {code_of_url(said.waived)}
        links = [link for link in links if code_of_url(link) not in about_data or link in said.kept]
    if re.fullmatch(r"(?:open[- ]?)?data(?:sets?)?", kind.strip(), re.IGNORECASE):
        flags.add("data_waiver")
        return
    _add_link("license@href", href_of(element), evidence)
    for reference in references:
        _add_link("license_ref", reference, evidence)
    for link in links:
        _add_link("link", link, evidence)
    kind_code = _code_of_type(kind)
    if kind_code:
        evidence.append(("license-type", kind, kind_code))
    evidence.extend(("words", text, code) for text, code in said.codes)
    _check_noncommercial(said.noncommercial, evidence)
    if is_licence and _ALL_RIGHTS.search(words):
        flags.add("all_rights_reserved")


@dataclass(frozen=True, slots=True)
class _Words:
    """What the words of a statement say: the part about the article, that about data only, and the codes named."""

    kept: str
    waived: str
    codes: tuple[tuple[str, str | None], ...]
    noncommercial: str | None


@lru_cache(maxsize=4096)
def _read_words(words: str) -> _Words:
    # Publishers repeat their statement word for word, so the cache answers nearly always.
    sentences = _SENTENCE_END.split(words)
    waived = [s for s in sentences if _DATA_WAIVER.search(s)]
    kept = [s for s in sentences if s not in waived]
    codes = tuple(pair for sentence in kept for pair in _codes_of_words(sentence))
    match = _NONCOMMERCIAL.search(" ".join(kept))
    return _Words(" ".join(kept), " ".join(waived), codes, match[0] if match else None)


def _words(element: Element) -> str:
    """The text of a statement without its `license_ref`, whose URL would run into the first word."""
    parts = [element.text or ""]
    for child in element:
        if child.tag != _LICENSE_REF:
            parts.append("".join(child.itertext()))
        parts.append(child.tail or "")
    return normalise(" ".join(parts))


def _add_link(source: str, url: str | None, evidence: list[tuple[str, str, str | None]]) -> None:
    url = (url or "").strip()
    if url:
        evidence.append((source, url, code_of_url(url)))


def _codes_of_words(text: str) -> list[tuple[str, str | None]]:
    """Each licence named in a sentence, by URL, short name or full name, as (what was read, code)."""
    found: list[tuple[str, str | None]] = []
    for match in _URL.finditer(text):
        found.append((match[0], code_of_url(match[0])))
    for match in _SHORT_NAME.finditer(text):
        parts = set(re.findall(r"nc|nd|sa", (match["parts"] or "").lower()))
        found.append((match[0], "CC0" if match["zero"] else _code_of_parts({"by"} | parts)))
    for match in _NAME.finditer(text):
        found.append((match[0], _code_of_parts(_parts_of_name(match[0]))))
    if _PUBLIC_DOMAIN.search(text):
        found.append(("public domain dedication", "CC0"))
    return found


def _parts_of_name(name: str) -> set[str]:
    squeezed = re.sub(r"[^a-z]", "", name.lower())
    marks = {"by": "attribution", "nc": "noncommercial", "nd": "noderiv", "sa": "sharealike"}
    return {part for part, word in marks.items() if word in squeezed}


def _code_of_type(kind: str) -> str | None:
    """The code of a `license-type` attribute (`cc-by-nc`, `creativeCommonsBy`, `CC BY`); None for `open-access`."""
    squeezed = re.sub(r"[^a-z0]", "", re.sub(r"\d\.\d", "", kind.lower()))
    if squeezed in ("cc0", "cczero", "creativecommonszero"):
        return "CC0"
    squeezed = re.sub(r"^(?:creativecommons|cc)(?:licen[cs]e)?", "cc:", squeezed)
    squeezed = squeezed.replace("attribution", "by").replace("noncommercial", "nc").replace("sharealike", "sa")
    squeezed = re.sub(r"noderiv(?:ative)?s?", "nd", squeezed)
    match = re.fullmatch(r"cc:by((?:nc|nd|sa)*)(?:licen[cs]e)?", squeezed)
    return _code_of_parts({"by", *re.findall("nc|nd|sa", match[1])}) if match else None


def _code_of_parts(parts: set[str]) -> str | None:
    if "by" not in parts or parts - {"by", "nc", "nd", "sa"} or {"nd", "sa"} <= parts:
        return None
    order = [part for part in ("nc", "sa", "nd") if part in parts]
    return "-".join(["CC BY", *(part.upper() for part in order)])


def _check_noncommercial(phrase: str | None, evidence: list[tuple[str, str, str | None]]) -> None:
    """Words that allow only non-commercial use, beside a licence that allows more, are evidence against it.

    They do not say which licence they mean, so they count as the one that is named, with NC added.
    """
    codes = {code for *_, code in evidence if code}
    if phrase and codes and not any("NC" in code for code in codes):
        for code in sorted(codes):
            if code.startswith("CC BY"):
                evidence.append(("words", phrase, code.replace("CC BY", "CC BY-NC", 1)))
