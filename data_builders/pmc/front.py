"""The front matter of an article in, its facts (`schema.Article`) out.

Facts are taken from `article-meta` and `journal-meta` only, never from what is nested in sub-articles. The date is
that of publication: of the electronic and print dates the more precise, the electronic one where both are equally
precise; a collection's date only where there is neither; dates of preprints, submissions and of PMC's release only
where nothing else is stated. MeSH is not in JATS and is left empty.
"""

from __future__ import annotations

import re
from datetime import date
from functools import lru_cache

from biomedclip.schema import Article
from data_builders.pmc.text import normalise, render_text
from data_builders.pmc.xml_input import XML_LANG, Element

_MONTHS = {m: i for i, m in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split(), 1)}
_MONTH_NAMES = [m.title() for m in _MONTHS]
_MANUSCRIPT_ID = re.compile(
    r"(?:NIHMS|EMS|UKMS|HHMIMS|NIHPA|CAMS|NASA|DOE|VAPA|EPA|USDA|NIST|PAMS)-?\d+", re.IGNORECASE
)
_ARTICLE_ID = re.compile(r"PMC([1-9]\d*)\.([1-9]\d*)")
_ANY_PMCID = re.compile(r"(?:PMC)?0*(\d{1,12})(?:\.\d+)?", re.IGNORECASE | re.ASCII)
_ISO_DATE = re.compile(r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?", re.ASCII)
_YEAR = re.compile(r"\D*([12]\d{3})\D*", re.ASCII)
_TWO_DIGITS = re.compile(r"\d{1,2}", re.ASCII)
_PMC_ID_TYPES = ("pmcid", "pmc", "pmc-uid", "pmcaid")
_LANGUAGES = {
    "eng": "en",
    "fre": "fr",
    "fra": "fr",
    "ger": "de",
    "deu": "de",
    "spa": "es",
    "por": "pt",
    "ita": "it",
    "chi": "zh",
    "zho": "zh",
    "jpn": "ja",
    "rus": "ru",
    "pol": "pl",
    "kor": "ko",
    "tur": "tr",
}
_RETRACTED_TYPES = ("retracted-article", "retraction", "withdrawn-article", "withdrawal", "partial-retraction")
_RETRACTED_BY = ("retraction-forward", "retracted-by", "is-retracted-by", "withdrawal-forward", "partial-retraction")
_RETRACTED_TITLE = re.compile(r"^\W*(?:retracted(?:\s+article)?|withdrawn(?:\s+article)?)\s*[:\]–—-]", re.IGNORECASE)


def parse_article_id(article_id: str) -> tuple[int, int]:
    """The number and version of `PMC<id>.<version>`. Raises ValueError for anything else."""
    match = _ARTICLE_ID.fullmatch(article_id)
    if match is None:
        raise ValueError(f"article id: is not PMC<id>.<version> (found {article_id!r}); pass the folder's name")
    return int(match[1]), int(match[2])


def read_article(article: Element, article_id: str, licence: str | None, licence_url: str | None) -> Article:
    """The facts of an article element. Flags: `id_mismatch`, `retraction_notice`, `expression_of_concern`."""
    pmcid, version = parse_article_id(article_id)
    meta, journal_meta = article.find("front/article-meta"), article.find("front/journal-meta")
    flags: set[str] = set()
    if meta is None:
        flags.add("no_article_meta")
    ids = read_ids(meta)
    if any(ids.get(kind) for kind in _PMC_ID_TYPES) and read_pmcid(ids) != pmcid:
        flags.add("id_mismatch")
    title = _title(meta)
    published = read_date(meta)
    journal = _first_text(
        journal_meta, "journal-title-group/journal-title", "journal-title", "journal-title-group/abbrev-journal-title",
        "abbrev-journal-title", "journal-id",
    )  # fmt: skip
    doi = re.sub(r"^(?:https?://(?:dx\.)?doi\.org/|doi:\s*)", "", ids.get("doi", ""), flags=re.IGNORECASE) or None
    pmid = ids.get("pmid", "")
    return Article(
        article_id=article_id,
        pmcid=pmcid,
        version=version,
        title=title,
        licence=licence,
        licence_url=licence_url,
        pmid=int(pmid) if re.fullmatch(r"0*[1-9]\d{0,9}", pmid, re.ASCII) else None,
        doi=doi,
        journal=journal,
        publisher=_first_text(journal_meta, "publisher/publisher-name"),
        published=published,
        citation=_citation(meta, journal, published, doi),
        authors=_authors(meta),
        article_type=article.get("article-type") or None,
        language=normalise_language(article.get(XML_LANG)),
        keywords=_keywords(meta),
        is_retracted=_is_retracted(article, meta, title, flags),
        is_manuscript=bool(_MANUSCRIPT_ID.fullmatch(ids.get("manuscript", "")))
        or "nihms-submitted" in {_date_type(node)[0] for node in _children(meta, "pub-date")},
        flags=tuple(sorted(flags)),
    )


def read_ids(meta: Element | None) -> dict[str, str]:
    """`pub-id-type` -> id, the first of each type, of an `article-meta`."""
    ids: dict[str, str] = {}
    for node in _children(meta, "article-id"):
        ids.setdefault((node.get("pub-id-type") or "").lower(), normalise("".join(node.itertext())))
    return ids


def read_pmcid(ids: dict[str, str]) -> int | None:
    """The PMC number among ids of any age: `PMC123`, `123` or `PMC123.2`, as pmcid, pmc, pmc-uid or pmcaid."""
    for kind in _PMC_ID_TYPES:
        match = _ANY_PMCID.fullmatch(ids.get(kind, ""))
        if match:
            return int(match[1])
    return None


def read_retracted_ids(article: Element) -> tuple[str, ...]:
    """DOIs and other ids of the articles that this one, a notice, retracts."""
    meta = article.find("front/article-meta")
    kinds = ("retracted-article", "withdrawn-article", "partial-retraction-of")
    found = []
    for node in _children(meta, "related-article") + _children(meta, "related-object"):
        if (node.get("related-article-type") or "") in kinds:
            found.append(next((v for k, v in node.items() if k.endswith("}href")), "") or node.get("id", ""))
    return tuple(dict.fromkeys(text for text in found if text))


@lru_cache(maxsize=4096)
def normalise_language(tag: str | None) -> str | None:
    """The two-letter, lower-case language of an `xml:lang`: `EN`, `eng` and `en-US` are `en`."""
    primary = re.split(r"[-_]", (tag or "").strip().lower())[0]
    return _LANGUAGES.get(primary, primary) or None


def read_date(meta: Element | None) -> str | None:
    """The publication date as ISO text, as precise as it is stated; see the module for which date is taken."""
    best: tuple[tuple[int, int, int], str] | None = None
    for node in _children(meta, "pub-date"):
        text = _iso_date(node)
        if text is None:
            continue
        kind, medium = _date_type(node)
        key = (_date_group(kind), -text.count("-"), _MEDIUM_ORDER.get(medium, 1))
        if best is None or key < best[0]:
            best = key, text
    return best[1] if best else None


_MEDIUM_ORDER = {"electronic": 0, "": 1, "print": 2}


def _date_type(node: Element) -> tuple[str, str]:
    """(kind, medium) of a `pub-date` in the old spelling (`epub`, `ppub`) or the new (`pub` + format)."""
    kind = (node.get("pub-type") or node.get("date-type") or "").lower()
    medium = (node.get("publication-format") or "").lower()
    if kind in ("epub", "epub-ppub"):
        return "pub", "electronic"
    if kind == "ppub":
        return "pub", "print"
    return kind, {"online": "electronic", "electronic-print": "electronic"}.get(medium, medium)


def _date_group(kind: str) -> int:
    """0 for publication, 1 for a collection, 2 for dates that are no publication of this article."""
    if kind in ("pub", "", "epreprint-pub", "publication", "original-publication"):
        return 0
    return 1 if kind in ("collection", "cover", "ecorrected", "pub-collection") else 2


def _iso_date(node: Element) -> str | None:
    iso = _ISO_DATE.match(node.get("iso-8601-date") or "")
    parts = list(iso.groups()) if iso else [node.findtext(tag) for tag in ("year", "month", "day")]
    year = _YEAR.fullmatch(parts[0] or node.findtext("string-date") or "")
    if year is None:
        return None
    month_text, day_text = (parts[1] or "").strip(), (parts[2] or "").strip()
    month = int(month_text) if _TWO_DIGITS.fullmatch(month_text) else _MONTHS.get(month_text.lower()[:3], 0)
    if not 1 <= month <= 12:
        return year[1]
    day = int(day_text) if _TWO_DIGITS.fullmatch(day_text) else 0
    try:
        return date(int(year[1]), month, day).isoformat()
    except ValueError:
        return f"{year[1]}-{month:02d}"


def _children(meta: Element | None, tag: str) -> list[Element]:
    return [] if meta is None else meta.findall(tag)


def _first_text(scope: Element | None, *paths: str) -> str | None:
    if scope is None:
        return None
    for path in paths:
        found = scope.find(path)
        text = normalise("".join(found.itertext())) if found is not None else ""
        if text:
            return text
    return None


def _title(meta: Element | None) -> str:
    """The title and subtitle; footnote marks are left out. The title in another language is not taken."""
    if meta is None:
        return ""
    parts = []
    for path in ("title-group/article-title", "title-group/subtitle"):
        node = meta.find(path)
        if node is not None:
            for note in node.findall(".//xref[@ref-type='fn']") if len(node) else ():
                note.text = None
                for child in list(note):
                    note.remove(child)
            parts.append(render_text(node))
    title = ": ".join(part for part in parts if part)
    return re.sub(r"[:?!.]: ", lambda match: f"{match[0][0]} ", title)


def _authors(meta: Element | None) -> tuple[str, ...]:
    """`Given Surname` of each author, or the group's name, in order."""
    names = []
    for group in _children(meta, "contrib-group"):
        for contrib in group.findall("contrib"):
            if (contrib.get("contrib-type") or "author") not in ("author", "collab", "authors"):
                continue
            name = _name(contrib)
            if name:
                names.append(name)
    return tuple(names)


def _name(contrib: Element) -> str:
    for path in ("name", "name-alternatives/name", "name-alternatives/string-name", "string-name"):
        node = contrib.find(path)
        if node is not None:
            surname, given = node.findtext("surname"), node.findtext("given-names")
            text = f"{given or ''} {surname or ''}" if surname or given else " ".join(node.itertext())
            return normalise(f"{text} {node.findtext('suffix') or ''}" if surname or given else text)
    collab = contrib.find("collab")
    if collab is None:
        collab = contrib.find("collab-alternatives/collab")
    if collab is not None:
        institution = collab.find("institution") if not (collab.text or "").strip() else None
        own = [collab.text or ""] + [
            (normalise("".join(c.itertext())) if c.tag in _INLINE_OF_COLLAB else "") + (c.tail or "") for c in collab
        ]
        return normalise("".join(institution.itertext() if institution is not None else own))
    return "Anonymous" if contrib.find("anonymous") is not None else ""


_INLINE_OF_COLLAB = ("italic", "bold", "named-content", "institution", "sc", "styled-content")


def _keywords(meta: Element | None) -> tuple[str, ...]:
    words = []
    for group in _children(meta, "kwd-group"):
        if (group.get("kwd-group-type") or "").lower().startswith("abbr"):
            continue
        words += [render_text(node) for node in group.iter("kwd", "compound-kwd")]
    return tuple(dict.fromkeys(word for word in words if word))


def _citation(meta: Element | None, journal: str | None, published: str | None, doi: str | None) -> str | None:
    """`Journal. 2001 Nov 2;3(1):55-60. doi: 10.…`, the form of PMC's own metadata, of what is stated."""
    if meta is None or not journal:
        return None
    volume, issue = _first_text(meta, "volume") or "", _first_text(meta, "issue")
    first, last = _first_text(meta, "fpage"), _first_text(meta, "lpage")
    pages = _first_text(meta, "elocation-id") if first is None else first
    pages = f"{pages}-{last}" if first and last and last != first else pages
    when = ""
    if published:
        year, *rest = published.split("-")
        when = " ".join([year, *([_MONTH_NAMES[int(rest[0]) - 1]] if rest else []), *(str(int(d)) for d in rest[1:])])
    where = volume + (f"({issue})" if issue else "") + (f":{pages}" if pages else "")
    text = f"{journal.rstrip('.')}. " + ";".join(part for part in (when, where) if part)
    return text.rstrip(" .") + "." + (f" doi: {doi}" if doi else "")


def _is_retracted(article: Element, meta: Element | None, title: str, flags: set[str]) -> bool:
    """Whether the article is retracted, or is the notice that retracts one (then with flag `retraction_notice`)."""
    kind = (article.get("article-type") or "").lower()
    relations = {(n.get("related-article-type") or "").lower() for n in _children(meta, "related-article")}
    if "expression-of-concern" in kind or any("concern" in relation for relation in relations):
        flags.add("expression_of_concern")
    if kind in ("retraction", "withdrawal", "partial-retraction") or relations & {
        "retracted-article",
        "withdrawn-article",
    }:
        flags.add("retraction_notice")
        return True
    return kind in _RETRACTED_TYPES or bool(relations & set(_RETRACTED_BY)) or bool(_RETRACTED_TITLE.match(title))
