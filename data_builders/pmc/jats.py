"""The bytes of one JATS article in, its facts and figures out: what `pairs` turns into pairs and drops.

Each figure is returned, whatever it lacks: one without caption has caption '', one without graphic has graphic None,
and figures of translated sub-articles carry a flag, because only whoever drops a figure can also count it. Text is the
article's own, in its own order; nothing is guessed where the XML is silent (a missing language stays None). The rooms
behind this door: `xml_input` (bytes to tree), `front` (article facts), `licences` and `rights`, `figures` (with
`text`), `mentions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from biomedclip.schema import Article, Figure, Mention
from data_builders.pmc.figures import FoundFigure, find_figures, survey_article
from data_builders.pmc.front import parse_article_id, read_article, read_retracted_ids
from data_builders.pmc.licences import XmlLicence, read_licence
from data_builders.pmc.mentions import collect_mentions
from data_builders.pmc.rights import read_holders
from data_builders.pmc.xml_input import BadXml, Element, read_article_element

__all__ = ["BadXml", "ParsedArticle", "parse_article"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedArticle:
    """One article: its facts, its figures in document order (one a graphic), and what its XML says of its licence."""

    article: Article
    figures: tuple[Figure, ...]
    licence: XmlLicence
    """`article.licence` is this code, which the metadata may yet contradict (`licences.decide_licence`)."""
    flags: tuple[str, ...] = ()
    """On the file: xml_recovered, encoding_repaired, unknown_entity; and the article's own flags."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What is no figure: inline_graphics, formula_graphics, table_graphics, supplementary_graphics, other_graphics,
    media, supplementary_files; and merged_figures, the second copies of figures."""
    retracts: tuple[str, ...] = ()
    """DOIs or other ids of the articles that this notice retracts."""


def parse_article(xml: bytes, *, article_id: str, fast: bool = True) -> ParsedArticle:
    """The facts and figures of one article; `article_id` is `PMC<id>.<version>`.

    `fast=False` parses the reference lists too, which changes the time and not the result. Raises
    BadXml with reason `empty_file`, `xml_error`, `xml_hostile` or `not_an_article`, and ValueError for another id.
    """
    pmcid, _ = parse_article_id(article_id)
    try:
        element, flags = read_article_element(xml, pmcid=pmcid, cut=fast)
        return _parse(element, article_id, flags)
    except RecursionError:
        raise BadXml("xml_hostile", "its elements are nested too deeply") from None


def _parse(element: Element, article_id: str, flags: set[str]) -> ParsedArticle:
    meta = element.find("front/article-meta")
    licence = read_licence(meta)
    article = read_article(element, article_id, licence.code, licence.url)
    survey = survey_article(element)
    holders = read_holders(meta.find("permissions")) if meta is not None else frozenset()
    found = find_figures(survey, holders)
    targets: dict[str, tuple[int, ...]] = {}
    for ordinal, figure in enumerate(found):
        for name in figure.names:
            targets[name] = (*targets.get(name, ()), ordinal)
    mentions = collect_mentions(survey.references, targets, [figure.label for figure in found])
    article = replace(article, flags=tuple(sorted({*article.flags, *flags})))
    file_flags = tuple(sorted(flags & {"xml_recovered", "encoding_repaired"}))
    figures = [
        figure
        for ordinal, entry in enumerate(found)
        for figure in _split_panels(entry, article_id, ordinal, mentions[ordinal], file_flags)
    ]
    return ParsedArticle(
        article=article,
        figures=tuple(figures),
        licence=licence,
        flags=article.flags,
        counts=dict(sorted(survey.counts.items())),
        retracts=read_retracted_ids(element) if "retraction_notice" in article.flags else (),
    )


def _split_panels(
    found: FoundFigure, article_id: str, ordinal: int, mentions: tuple[Mention, ...], file_flags: tuple[str, ...]
) -> list[Figure]:
    """One Figure a panel, or one without graphic where there is none."""
    return [
        Figure(
            article_id=article_id,
            figure_id=found.figure_id or f"fig@{ordinal}",
            ordinal=ordinal,
            label=found.label,
            caption=found.caption,
            graphic=panel.href if panel else None,
            panel_index=index,
            panel_count=len(found.panels) or 1,
            group_id=found.around.group_id,
            group_caption=found.around.group_caption,
            language=found.around.language,
            mentions=mentions,
            licence=found.rights.licence,
            third_party=found.rights.third_party,
            flags=(*found.flags, *file_flags),
            alternatives=panel.alternatives if panel else (),
        )
        for index, panel in enumerate(found.panels or (None,))
    ]
