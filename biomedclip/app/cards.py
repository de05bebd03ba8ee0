"""HTML of the page: figures as cards, numbers as bars, and the notices that every tab uses.

Reads what `biomedclip.page` reads; yields strings for Gradio's HTML component, which runs no script but shows
whatever it is given. So every word from a file goes through `to_text`, links open apart and tell nothing of the page,
and the look is in `page.css` beside this module, in the colours of Gradio's theme, light and dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from biomedclip.page.gallery import SampleFigure, thumbnail
from biomedclip.page.markup import shorten, to_text

RESEARCH_ONLY = "For research only, not for clinical use."


def write_notice(text: str, *, kind: str = "note") -> str:
    """One line in a box: `note` says what to do, `warning` what went wrong or must not be overlooked."""
    role = "alert" if kind == "warning" else "status"
    return f'<p class="bc-{kind}" role="{role}">{to_text(text)}</p>'


def write_empty(title: str, what_to_do: str, command: str = "") -> str:
    """What stands where there is nothing yet: a line, what to do, and the command for it."""
    code = f"<pre>{to_text(command)}</pre>" if command else ""
    return f'<div class="bc-empty"><h3>{to_text(title)}</h3><p>{to_text(what_to_do)}</p>{code}</div>'


def write_cards(figures: Sequence[SampleFigure], notes: Iterable[Sequence[str]] = ()) -> str:
    """Figures with caption, article and licence; `notes` are short facts shown above each caption."""
    facts = list(notes) or [()] * len(figures)
    cards = [_write_card(figure, chips) for figure, chips in zip(figures, facts, strict=True)]
    return f'<div class="bc-cards">{"".join(cards)}</div>'


def _write_card(figure: SampleFigure, chips: Sequence[str]) -> str:
    picture = thumbnail(figure.image)
    shown = f'<img alt="" src="{picture}">' if picture else '<div class="bc-broken">does not decode</div>'
    marks = "".join(f'<span class="bc-chip">{to_text(chip)}</span>' for chip in chips if chip)
    return (
        f"<figure>{shown}<figcaption>{f'<div>{marks}</div>' if marks else ''}"
        f'<div class="bc-caption" title="{to_text(shorten(figure.caption, 1500))}">{to_text(shorten(figure.caption))}'
        f'</div><div class="bc-origin">{_write_origin(figure)}</div>'
        f'<div class="bc-key" title="{to_text(figure.key)}">{to_text(figure.key)}</div></figcaption></figure>'
    )


def _write_origin(figure: SampleFigure) -> str:
    """Title, author, licence and source: what CC BY asks for."""
    credit = " ".join(part for part in (figure.authors, figure.year) if part)
    parts = [to_text(part) for part in (shorten(figure.title, 110), credit) if part]
    parts.append(f"<b>{to_text(figure.licence)}</b>")
    parts.append(link_apart(figure.link, figure.link_text) if figure.link else to_text(figure.source))
    return " · ".join(parts)


def link_apart(address: str, text: str) -> str:
    """A link that opens in a tab of its own and tells the other side nothing of this page."""
    return f'<a href="{to_text(address)}" target="_blank" rel="noopener noreferrer">{to_text(text)}</a>'


def write_facts(facts: Mapping[str, object]) -> str:
    """Names and values as a list of tiles."""
    tiles = "".join(f"<div><dt>{to_text(k)}</dt><dd>{to_text(v)}</dd></div>" for k, v in facts.items())
    return f'<dl class="bc-facts">{tiles}</dl>'


def write_rows(header: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "") -> str:
    """A table of plain values."""
    head = "".join(f'<th scope="col">{to_text(name)}</th>' for name in header)
    body = "".join("<tr>" + "".join(f"<td>{to_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    title = f"<caption>{to_text(caption)}</caption>" if caption else ""
    return f'<div class="bc-wide"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def write_frame(page: str, title: str) -> str:
    """An HTML page in a frame of its own: no script runs in it, and it reaches neither this page nor the network."""
    return f'<iframe class="bc-report" title="{to_text(title)}" sandbox="" srcdoc="{to_text(page)}"></iframe>'
