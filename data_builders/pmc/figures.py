"""An `article` element in, its figures out: one entry a `fig`, with caption, graphics, group, language and rights.

A graphic belongs to the nearest of `fig`, `chem-struct-wrap` and `boxed-text` around it; what a formula, a table or a
supplementary file holds is no figure and is only counted. Pictures that say they are one (in `alternatives`, or with
one stem) become one panel, others become panels that share the caption. A figure that is filed twice (in the body and
in `floats-group`) is one, told by id and hrefs, and the fuller copy is kept. Figures of translations are returned with
the flag `subarticle_translation`, so that whoever leaves them out also counts them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace

from data_builders.pmc.front import normalise_language
from data_builders.pmc.media import rank_extension, split_extension
from data_builders.pmc.rights import Rights, read_rights
from data_builders.pmc.text import caption_text, render_text
from data_builders.pmc.xml_input import XML_LANG, Element, href_of

_CONTAINERS = frozenset(("fig", "chem-struct-wrap", "chem-struct-wrapper", "boxed-text"))
_COUNTED_AS = {
    # the nearest of these around a graphic that no figure holds -> what it is counted as
    **dict.fromkeys(("disp-formula", "inline-formula", "disp-formula-group"), "formula_graphics"),
    **dict.fromkeys(("table-wrap", "table", "td", "th", "table-wrap-foot"), "table_graphics"),
    **dict.fromkeys(("supplementary-material", "media"), "supplementary_graphics"),
}
_SOUGHT = ("fig", "chem-struct-wrap", "chem-struct-wrapper", "boxed-text", "graphic", "inline-graphic", "media")
_NAMES_OF_COUNTS = {
    "inline-graphic": "inline_graphics",
    "media": "media",
    "supplementary-material": "supplementary_files",
}
_SUBARTICLES = frozenset(("sub-article", "response"))
_THUMBNAIL = re.compile(r"thumb|small|preview|icon|low[-_ ]?res", re.IGNORECASE)
_RASTER_MIME = re.compile(r"(?:x-)?(?:jpe?g|png|gif|tiff?|webp|bmp)|", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: the href to use, and the others that show the same."""

    href: str
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the ancestors of a figure say of it."""

    language: str | None = None
    group_id: str | None = None
    group_caption: str | None = None
    group_elements: tuple[Element, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FoundFigure:
    """One `fig` (or other container) of the article, before it is split into one Figure a panel."""

    figure_id: str | None
    names: tuple[str, ...]
    """Every id by which a cross-reference may mean this figure, its group's included."""
    label: str | None
    caption: str
    panels: tuple[Panel, ...]
    around: Surroundings
    rights: Rights
    flags: tuple[str, ...]


@dataclass(slots=True)
class _Seen:
    """What figures of one article share."""

    groups: dict[Element, tuple[str, str]] = field(default_factory=dict)
    """`fig-group` -> its id and its text."""
    parents: dict[Element, Surroundings] = field(default_factory=dict)


@dataclass(slots=True)
class Survey:
    """The elements of interest of an article, from one walk over it."""

    containers: list[Element] = field(default_factory=list)
    graphics: dict[Element, list[Element]] = field(default_factory=dict)
    """Container -> the graphics it holds itself."""
    references: list[Element] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def survey_article(article: Element) -> Survey:
    """The figures, their graphics, cross-references, and counts of what is no figure: formula_graphics, media, …"""
    survey = Survey()
    for element in article.iter(*_SOUGHT, "supplementary-material", "xref"):
        tag = element.tag
        if tag == "xref":
            survey.references.append(element)
        elif tag in _CONTAINERS:
            survey.containers.append(element)
        elif tag == "graphic":
            _place_graphic(element, survey)
        elif next(element.iterancestors("ref-list"), None) is None:
            survey.counts[_NAMES_OF_COUNTS[tag]] += 1
    return survey


def find_figures(survey: Survey, article_holders: frozenset[str]) -> list[FoundFigure]:
    """The figures in document order, each once. Counts `merged_figures` in the survey."""
    found: list[FoundFigure] = []
    seen = _Seen()
    for element in survey.containers:
        graphics = survey.graphics.get(element, [])
        if element.tag == "fig" or graphics:
            _add_once(_read_figure(element, graphics, seen, article_holders), found, survey.counts)
    return _name_figures(found)


def choose_panels(graphics: list[Element]) -> tuple[Panel, ...]:
    """One panel for each picture among the graphics of a figure, in order; its encodings best first."""
    pictures: dict[object, list[tuple[tuple[bool, int], str]]] = {}
    for graphic in graphics:
        href = href_of(graphic)
        if href is None:
            continue
        parent = graphic.getparent()
        together: object = parent if parent.tag == "alternatives" else split_extension(href.lower())[0]
        use = f"{graphic.get('specific-use', '')} {graphic.get('content-type', '')}"
        # A name without extension may become any file, so it is as good as the best.
        rank = rank_extension(href) if split_extension(href)[1] else 0
        pictures.setdefault(together, []).append(((_THUMBNAIL.search(use) is not None, rank), href))
    panels = []
    for encodings in pictures.values():
        ordered = list(dict.fromkeys(href for _, href in sorted(encodings, key=lambda item: item[0])))
        panels.append(Panel(ordered[0], tuple(ordered[1:])))
    return tuple(dict.fromkeys(panels))


def _place_graphic(graphic: Element, survey: Survey) -> None:
    """File a graphic under the figure it belongs to, or count it."""
    node = graphic.getparent()
    while node is not None:
        if node.tag in _CONTAINERS:
            survey.graphics.setdefault(node, []).append(graphic)
            return
        if node.tag in _COUNTED_AS:
            survey.counts[_COUNTED_AS[node.tag]] += 1
            return
        if node.tag == "ref-list":  # reference lists are not read, and most are cut off before the parse
            return
        node = node.getparent()
    survey.counts["other_graphics"] += 1


def _read_figure(
    element: Element, graphics: list[Element], seen: _Seen, article_holders: frozenset[str]
) -> FoundFigure:
    flags: list[str] = []
    if element.tag != "fig":
        flags.append("boxed_text" if element.tag == "boxed-text" else "chem_struct")
    outside = [graphic for graphic in graphics if next(graphic.iterancestors("caption", element.tag)).tag != "caption"]
    panels = choose_panels(outside or graphics)
    if not panels:
        panels, media_flag = _media_panels(element)
        flags += media_flag
    text_flags: set[str] = set()
    captions = _captions(element, graphics)
    around = _surroundings(element, captions, seen)
    caption = _join_captions(captions, around.language, text_flags)
    if not captions:
        # Old articles put the caption into plain paragraphs of the figure.
        caption = " ".join(filter(None, (render_text(p, text_flags) for p in element.findall("p"))))
        flags += ["caption_from_paragraph"] if caption else []
    label = element.find("label")
    if label is None:
        label = next((node for graphic in graphics if (node := graphic.find("label")) is not None), None)
    rights_nodes = list(element.iter("attrib", "permissions"))
    for group in around.group_elements:
        rights_nodes += [*group.findall("permissions"), *group.findall("attrib")]
    rights = read_rights(
        f"{around.group_caption} {caption}" if around.group_caption else caption,
        [node for node in rights_nodes if node.tag == "attrib"],
        [node for node in rights_nodes if node.tag == "permissions"],
        article_holders,
    )
    names = [element.get("id"), *(node.get("id") for node in (*graphics, *around.group_elements))]
    return FoundFigure(
        element.get("id") or None,
        tuple(dict.fromkeys(name for name in names if name)),
        (render_text(label) or None) if label is not None else None,
        caption,
        panels,
        around,
        rights,
        tuple(dict.fromkeys((*flags, *sorted(text_flags), *around.flags, *rights.flags))),
    )


def _media_panels(element: Element) -> tuple[tuple[Panel, ...], list[str]]:
    """For a figure without graphic: the pictures among its `media`, or the flag `media_only`."""
    media = list(element.iter("media"))
    pictures = [
        node
        for node in media
        if (node.get("mimetype") or "").lower() == "image"
        and _RASTER_MIME.fullmatch(node.get("mime-subtype") or "")
        and next(node.iterancestors("supplementary-material", "caption", element.tag)).tag == element.tag
    ]
    panels = choose_panels(pictures)
    if panels:
        return panels, ["graphic_from_media"]
    return (), ["media_only"] if media else []


def _captions(element: Element, graphics: list[Element]) -> list[Element]:
    own = element.findall("caption")
    if own:
        return own
    inside = [caption for graphic in graphics for caption in graphic.findall("caption")]
    return (
        inside
        or [
            caption
            for caption in element.iterfind(".//caption")
            if next(caption.iterancestors(*_CONTAINERS, *_COUNTED_AS)) is element
        ][:1]
    )


def _join_captions(captions: list[Element], language: str | None, flags: set[str]) -> str:
    """The captions as one; of several languages only those in `language`, with the flag `multilingual_caption`."""
    stated = {normalise_language(caption.get(XML_LANG)) for caption in captions}
    if len(captions) > 1 and len(stated) > 1:
        flags.add("multilingual_caption")
        captions = [caption for caption in captions if _language_of(caption) == language] or captions[:1]
    texts = [caption_text(caption, flags) for caption in captions]
    return " ".join(dict.fromkeys(filter(None, texts)))


def _language_of(element: Element) -> str | None:
    node: Element | None = element
    while node is not None:
        language = node.get(XML_LANG)
        if language:
            return normalise_language(language)
        node = node.getparent()
    return None


def _surroundings(element: Element, captions: list[Element], seen: _Seen) -> Surroundings:
    """What the ancestors say. Of captions in several languages English is taken, or else the first."""
    languages = [language for caption in captions if (language := normalise_language(caption.get(XML_LANG)))]
    language = "en" if "en" in languages else next(iter(languages), None)
    language = language or normalise_language(element.get(XML_LANG))
    parent = element.getparent()
    if parent not in seen.parents:
        seen.parents[parent] = _read_ancestors(parent, seen.groups)
    around = seen.parents[parent]
    return replace(around, language=language) if language and language != around.language else around


def _read_ancestors(parent: Element, groups: dict[Element, tuple[str, str]]) -> Surroundings:
    """The surroundings that all figures of one parent share."""
    language: str | None = None
    flags: list[str] = []
    found_groups: list[Element] = []
    node: Element | None = parent
    while node is not None:
        tag = node.tag
        language = language or normalise_language(node.get(XML_LANG))
        if tag == "fig-group":
            found_groups.append(node)
        elif tag in _SUBARTICLES:
            kind = node.get("article-type") or node.get("response-type") or tag
            flags.append("subarticle_" + re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_"))
        elif tag == "abstract" and "graphical" in (node.get("abstract-type") or ""):
            flags.append("graphical_abstract")
        node = node.getparent()
    for group in found_groups:
        if group not in groups:
            groups[group] = group.get("id") or f"group@{len(groups)}", _group_text(group)
    return Surroundings(
        language,
        groups[found_groups[0]][0] if found_groups else None,
        " ".join(filter(None, (groups[group][1] for group in reversed(found_groups)))) or None,
        tuple(found_groups),
        tuple(dict.fromkeys(flags)),
    )


def _group_text(group: Element) -> str:
    """Label and caption of a `fig-group`; the label alone says nothing and is left out."""
    captions = " ".join(filter(None, (caption_text(node, set()) for node in group.findall("caption"))))
    label = group.find("label")
    return " ".join(filter(None, (render_text(label) if label is not None else "", captions))) if captions else ""


def _add_once(figure: FoundFigure, found: list[FoundFigure], counts: Counter[str]) -> None:
    """Append a figure, or merge it with the copy that is there already."""
    for place, other in enumerate(found):
        if _is_same(figure, other):
            counts["merged_figures"] += 1
            best, rest = (figure, other) if _fullness(figure) > _fullness(other) else (other, figure)
            if best.around.group_id is None and rest.around.group_id is not None:
                best = replace(best, around=replace(rest.around, language=best.around.language))
            rights = Rights(
                best.rights.third_party or rest.rights.third_party,
                best.rights.licence or rest.rights.licence,
                best.rights.flags,
            )
            names = tuple(dict.fromkeys((*other.names, *figure.names)))
            found[place] = replace(best, names=names, rights=rights, label=best.label or rest.label)
            return
    found.append(figure)


def _is_same(one: FoundFigure, other: FoundFigure) -> bool:
    if one.figure_id != other.figure_id:
        return False
    hrefs, other_hrefs = ({panel.href for panel in figure.panels} for figure in (one, other))
    if one.figure_id is None:
        return bool(hrefs) and hrefs == other_hrefs and (one.caption == other.caption)
    return hrefs == other_hrefs or not hrefs or not other_hrefs


def _fullness(figure: FoundFigure) -> tuple[bool, int]:
    return bool(figure.panels), len(figure.caption)


def _name_figures(found: list[FoundFigure]) -> list[FoundFigure]:
    """The figures with ids that are stable and unique: `fig@<ordinal>` for none, `<id>@<ordinal>` for a second one."""
    used: set[str] = set()
    named = []
    for ordinal, figure in enumerate(found):
        name, flags = figure.figure_id, figure.flags
        if name is None:
            name, flags = f"fig@{ordinal}", (*flags, "id_missing")
        elif name in used:
            name, flags = f"{name}@{ordinal}", (*flags, "id_repeated")
        used.add(name)
        named.append(figure if name == figure.figure_id else replace(figure, figure_id=name, flags=flags))
    return named
