"""Pages: HTML files that need nothing but a browser, whoever writes them.

`markup.py` escapes, `charts.py` draws, `gallery.py` brings pictures, `page.css` is the look; `write_page` makes one
file of sections, without script, font, style sheet or picture from outside. Its own Content-Security-Policy forbids
them, so a page opens offline, by mail and in ten years, and nothing that a stranger wrote into a caption can run.
Stands above the torch line, because builders write pages too.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from biomedclip import __version__
from biomedclip.files import write_text
from biomedclip.page.markup import to_text

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_page(path: str | Path, title: str, sections: Iterable[str], *, footer: str = "") -> Path:
    """Write a page of sections, HTML that is escaped already, and return its path; empty sections are left out."""
    style = (resources.files("biomedclip.page") / "page.css").read_text(encoding="utf-8")
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="biomedclip {to_text(__version__)}">\n'
        f"<title>{to_text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer>Written by biomedclip {to_text(__version__)}. {to_text(footer)}</footer>\n</body>\n</html>\n"
    )
    write_text(path, page)
    return Path(path)
