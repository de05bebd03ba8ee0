"""An `Inspection` on a terminal, or as one page of HTML with the pictures and the boxes of their panels.

Captions, names and titles were written by strangers: on the terminal they are plain text, never markup, and without
control characters; on the page every word is escaped (`biomedclip.page`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from biomedclip.page import write_page
from biomedclip.page.gallery import article_link, thumbnail
from biomedclip.page.markup import link_to, shorten, to_text
from biomedclip.schema import Article
from data_builders.pmc.inspection import Inspection, LicenceView, SeenFigure, SeenPanel

if TYPE_CHECKING:
    from rich.console import Console

_CAPTION_CHARS = 240
_THUMBNAIL_PX = 720


def print_inspection(seen: Inspection, console: Console) -> None:
    """Print an inspection, figure by figure."""
    from rich.table import Table
    from rich.text import Text

    def block(rows: Iterator[tuple[str, str]]) -> None:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="dim", no_wrap=True, min_width=9)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(Text(name), Text(printable(value)))
        console.print(grid)

    title = seen.article.title if seen.article else ""
    console.print(Text.assemble((seen.article_id, "bold"), "  ", printable(title)))
    block(_article_rows(seen))
    for figure in seen.figures:
        colour = "green" if figure.status == "kept" else "yellow"
        head = Text.assemble((printable(figure.label or figure.item), "bold"), "  ", printable(figure.item), "  ")
        head.append(figure.status if figure.status == "kept" else f"dropped: {figure.reason}", colour)
        console.print(Text("\n") + head)
        block(_figure_rows(figure))


def printable(text: str) -> str:
    """The text without characters that could move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "�" for c in text)


def count_line(seen: Inspection) -> str:
    """`5 seen = 4 kept + 1 dropped (no_caption 1); 3 panels`."""
    reasons: dict[str, int] = {}
    for figure in seen.figures:
        if figure.reason is not None:
            reasons[figure.reason] = reasons.get(figure.reason, 0) + 1
    dropped, panels = sum(reasons.values()), sum(len(figure.panels) for figure in seen.figures)
    line = f"{len(seen.figures)} seen = {len(seen.figures) - dropped} kept + {dropped} dropped"
    if reasons:
        line += f" ({', '.join(f'{reason} {count}' for reason, count in reasons.items())})"
    return line + (f"; {panels} panels" if panels else "")


def _article_rows(seen: Inspection) -> Iterator[tuple[str, str]]:
    if seen.article is not None:
        yield "published", _publication(seen.article)
        yield "ids", _ids(seen.article)
        if seen.article.flags:
            yield "flags", ", ".join(seen.article.flags)
    if seen.licence is not None:
        yield from _licence_rows(seen.licence)
    yield "figures", count_line(seen)
    yield "looked at", seen.where
    for note in seen.notes:
        yield "note", note


def _publication(article: Article) -> str:
    authors = article.authors[0] + (" et al." if len(article.authors) > 1 else "") if article.authors else None
    kinds = [article.article_type, article.language and f"language {article.language}"]
    marks = [
        name for name, holds in (("retracted", article.is_retracted), ("manuscript", article.is_manuscript)) if holds
    ]
    return ", ".join(part for part in (authors, article.journal, article.published, *kinds, *marks) if part)


def _ids(article: Article) -> str:
    pmid = f"PMID {article.pmid}" if article.pmid else None
    return ", ".join(part for part in (article.article_id, pmid, article.doi and f"doi:{article.doi}") if part)


def _licence_rows(licence: LicenceView) -> Iterator[tuple[str, str]]:
    admitted = f"admitted by {', '.join(licence.presets)}" if licence.presets else "admitted by no preset"
    yield "licence", f"{licence.decision}: {admitted}"
    yield "  metadata", licence.metadata or "states none"
    yield "  XML link", "; ".join(licence.links) or "none"
    yield "  words", "; ".join(licence.words) or "none"
    if licence.flags:
        yield "  flags", ", ".join(licence.flags)


def _figure_rows(figure: SeenFigure) -> Iterator[tuple[str, str]]:
    if figure.reason is not None:
        yield "reason", f"{figure.reason}: {figure.detail}" if figure.detail else figure.reason
    if figure.key:
        yield "key", figure.key
    if figure.caption is not None:
        yield "caption", shorten(figure.caption, _CAPTION_CHARS) or "none"
    if figure.graphic or figure.file:
        yield "graphic", f"{figure.graphic or '?'} -> {figure.file or 'no file of the article'}"
    if figure.width is not None and figure.image is not None:
        size = f"{figure.width} x {figure.height} px, {len(figure.image) / 1000:,.1f} kB as {figure.image_format}"
        yield "picture", size
    if figure.licence:
        yield "licence", figure.licence
    if figure.modality or figure.concepts:
        yield "concepts", f"{figure.modality or 'no modality'}: {', '.join(figure.concepts)}"
    if figure.flags:
        yield "flags", ", ".join(figure.flags)
    if figure.mentions is not None:
        yield "mentions", str(len(figure.mentions))
    for panel in figure.panels:
        yield f"panel {panel.letter}", _panel_text(panel)


def _panel_text(panel: SeenPanel) -> str:
    place = (
        "x".join(str(side) for side in (panel.box[2] - panel.box[0], panel.box[3] - panel.box[1])) if panel.box else ""
    )
    sure = f"confidence {panel.confidence:.2f}" if panel.confidence is not None else ""
    return ", ".join(part for part in (place and f"{place} px", sure, shorten(panel.caption, 120)) if part)


def write_inspection(path: str | Path, seen: Inspection) -> Path:
    """Write the page of an inspection and return its path."""
    title = f"{seen.article_id}: {seen.article.title}" if seen.article else seen.article_id
    head = (
        f"<header><h1>{to_text(seen.article.title if seen.article else seen.article_id)}</h1>"
        f"{_terms(_article_rows(seen))}{_article_link(seen)}</header>"
    )
    note = (
        "For research only; not for clinical use. Pictures are scaled; those of dropped figures are not in any dataset."
    )
    return write_page(path, title, [head, *map(_figure_section, seen.figures)], footer=note)


def _article_link(seen: Inspection) -> str:
    if seen.article is None:
        return ""
    address, text = article_link({"doi": seen.article.doi, "pmcid": seen.article.pmcid})
    return f"<p>{link_to(address, text)}</p>" if address else ""


def _terms(rows: Iterator[tuple[str, str]]) -> str:
    cells = "".join(
        f"<tr><th scope=row>{to_text(name.strip())}</th><td>{to_text(value)}</td></tr>" for name, value in rows
    )
    return f'<div class="wide"><table class="terms"><tbody>{cells}</tbody></table></div>'


def _figure_section(figure: SeenFigure) -> str:
    state = "kept" if figure.status == "kept" else f"dropped: {figure.reason}"
    rows = [row for row in _figure_rows(figure) if row[0] != "caption"]
    mentions = "".join(f"<li>{to_text(shorten(text, 400))}</li>" for text in figure.mentions or ())
    if mentions:
        mentions = f"<details><summary>Mentions</summary><ul>{mentions}</ul></details>"
    return (
        f'<section class="looked-at"><h2>{to_text(figure.label or figure.item)} '
        f'<span class="state {figure.status}">{to_text(state)}</span></h2>'
        f'<div class="pair"><div>{_picture(figure)}</div>'
        f"<div><p>{to_text(figure.caption or '')}</p>{_terms(iter(rows))}{mentions}</div></div></section>"
    )


def _picture(figure: SeenFigure) -> str:
    """The picture with the boxes of its panels; the reader sees at once what was cut."""
    address = thumbnail(figure.image, _THUMBNAIL_PX) if figure.image else ""
    if not address or not figure.width or not figure.height:
        return '<p class="note">no picture</p>'
    boxes = "".join(_box(panel, max(figure.width, figure.height)) for panel in figure.panels)
    name = to_text(f"{figure.label or figure.item}, {len(figure.panels)} panels")
    return (
        f'<svg class="picture" viewBox="0 0 {figure.width} {figure.height}" role="img" aria-label="{name}">'
        f'<image href="{address}" width="{figure.width}" height="{figure.height}"/>{boxes}</svg>'
    )


def _box(panel: SeenPanel, longer_side: int) -> str:
    if panel.box is None:
        return ""
    left, top, right, bottom = panel.box
    size = longer_side / 28
    tab_width, tab_height = size * (0.6 + 0.6 * len(panel.letter)), size * 1.3
    return (
        f'<rect class="panel" x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"/>'
        f'<rect class="tab" x="{left}" y="{top}" width="{tab_width:.0f}" height="{tab_height:.0f}"/>'
        f'<text class="tab" x="{left + size * 0.3:.0f}" y="{top + size:.0f}" style="font-size:{size:.0f}px">'
        f"{to_text(panel.letter)}</text>"
    )
