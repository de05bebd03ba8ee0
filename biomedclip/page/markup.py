"""HTML text that is safe whoever wrote the words: the few forms that every page uses.

Whatever comes from outside (captions, titles, names, reasons) passes through `to_text` without exception; what these
functions return is escaped and may be joined.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def write_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of cells that are escaped already."""
    head = "".join(f"<th>{to_text(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def shorten(text: str | None, limit: int = 400) -> str:
    """At most `limit` characters on one line."""
    text = " ".join((text or "").split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def link_to(address: str, text: str) -> str:
    """A link that tells the other side nothing of this page."""
    return f'<a href="{to_text(address)}" rel="noreferrer">{to_text(text)}</a>'


def to_text(value: object) -> str:
    """Anything as HTML text that is also safe inside a quoted attribute."""
    return escape("" if value is None else str(value), quote=True)
