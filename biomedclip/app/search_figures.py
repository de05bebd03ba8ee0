"""The search command: words or a picture in; a table, JSON lines or a page out.

Everything that can be wrong with what was asked (no query or two, the page's name, the picture, the folder) is said
before a model is loaded. Standard output holds the answer alone; what cannot be searched is counted on standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from biomedclip.app.explain_file import find_picture
from biomedclip.app.pictures import Picture
from biomedclip.app.tables import printable
from biomedclip.errors import ConfigError, DataError
from biomedclip.page.markup import shorten
from biomedclip.progress import Progress, silent
from biomedclip.shards import DatasetFolder

if TYPE_CHECKING:
    from biomedclip.app.search import Hit, SearchIndex

_WIDE = 160
"""Columns of a table that no terminal limits."""
_CAPTION = 240


def search_figures(
    folder: Path, query: str | None, image: str | None = None, *, model: str, top: int = 10, window: str | None = None,
    as_json: bool = False, html: Path | None = None, overwrite: bool = False, progress: Progress = silent,
) -> list[Hit]:  # fmt: skip
    """Print the figures of a dataset folder that fit best, write the page where one is named, and return the hits.

    Raises ConfigError where there is not exactly one query and where the page exists, DataError where the folder is no
    dataset or the picture cannot be read, CheckpointError as `biomedclip.load` does.
    """
    asked = (query or "").strip()
    if bool(asked) == (image is not None):
        found = f"{asked!r} and {image}" if asked else None if query is None else "an empty one"
        raise ConfigError("query", "must be words or a picture, one of the two", found=found,
                          todo='give "…" or --image FILE')  # fmt: skip
    if html is not None and html.exists() and not overwrite:
        raise ConfigError(html, "exists already", todo="name another file, or give --overwrite")
    dataset = DatasetFolder(folder)
    if not len(dataset):
        raise DataError(folder, "has no samples to search", todo="name another dataset, or build it again")
    picture = find_picture(image, window) if image is not None else None

    from biomedclip.app.search import open_index

    index = open_index(dataset, model, progress=progress)
    hits = index.search_text(asked, top) if picture is None else index.search_image(picture.image, top)  # type: ignore[arg-type]
    if html is not None:
        from biomedclip.app.gallery import write_gallery_page

        shown = asked if picture is None else f"Like {_name(picture)}"
        write_gallery_page(html, index, hits, shown, picture=picture.image if picture else None)
    _say(index, hits, picture, model, html, as_json)
    return hits


def _say(
    index: SearchIndex, hits: Sequence[Hit], picture: Picture | None, model: str, html: Path | None, as_json: bool
) -> None:
    if as_json:
        sys.stdout.write("".join(json.dumps(hit.to_json()) + "\n" for hit in hits))
    else:
        console = Console()
        print_hits(hits, console if console.is_terminal else Console(width=_WIDE))
        asked = f"Like {_name(picture)}: " if picture else ""
        sys.stdout.write(
            printable(f"{asked}{len(hits):,} of {len(index):,} figures of {index.dataset.folder}, {model}") + "\n"
            "Scores are cosines. For research only; not for clinical use.\n"
        )
        if html is not None:
            sys.stdout.write(f"written: {printable(str(html))}\n")
    if index.unreadable:
        key, why = next(iter(index.unreadable.items()))
        sys.stderr.write(
            printable(f"not searched, unreadable: {len(index.unreadable):,} pictures, {key}: {why}") + "\n"
        )


def print_hits(hits: Sequence[Hit], console: Console) -> None:
    """The hits as a table, the best first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("score", justify="right", no_wrap=True)
    for name in ("figure", "article"):
        table.add_column(name, overflow="fold", min_width=8)
    table.add_column("licence", no_wrap=True)
    table.add_column("caption", overflow="fold", ratio=1, min_width=24)
    for hit in hits:
        cells = (hit.figure or hit.key, hit.article or hit.source, hit.licence, shorten(hit.caption, _CAPTION))
        table.add_row(f"{hit.score:.3f}", *(Text(printable(cell)) for cell in cells))
    console.print(table)


def _name(picture: Picture) -> str:
    return picture.name + ("" if picture.frame is None else f" [{picture.frame}]")
