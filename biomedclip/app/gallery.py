"""What a search found as one HTML file: pictures, captions, article ids, licences and links, for a browser or a mail.

Reads a `SearchIndex` and its hits; writes a page of `biomedclip.page`, so that nothing in it runs or is fetched.
Captions, titles and ids come from files that anybody may have written and are escaped without exception. A picture
that no longer decodes keeps its place, with its text.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from biomedclip.app.search import Hit, SearchIndex
from biomedclip.page import write_page
from biomedclip.page.gallery import SampleFigure, describe_origin, thumbnail
from biomedclip.page.markup import shorten, to_text

if TYPE_CHECKING:
    from PIL import Image

_SHOWN = 180
"""Characters of a caption under a picture, about five lines; the whole of a longer one opens with a click."""
_FOOTER = "For research only; not for clinical use. Each picture stands under the licence that its line names."


def write_gallery_page(
    path: str | Path, index: SearchIndex, hits: Sequence[Hit], asked: str, *, picture: Image.Image | None = None
) -> Path:
    """Write the page of what was found for `asked` and return its path; `picture` is what was asked with.

    Raises DataError where a shard cannot be read.
    """
    blocks = [
        _write_hit(rank, hit, figure)
        for rank, (hit, figure) in enumerate(zip(hits, index.describe(hits), strict=True), start=1)
    ]
    body = f'<section id="hits">\n<div class="gallery">{"".join(blocks)}</div>\n</section>'
    return write_page(path, f"Figures: {shorten(asked, 60)}", [_write_head(index, hits, asked, picture), body],
                      footer=_FOOTER)  # fmt: skip


def _write_head(index: SearchIndex, hits: Sequence[Hit], asked: str, picture: Image.Image | None) -> str:
    facts = {
        "shown": f"{len(hits):,} of {len(index):,} figures", "dataset": str(index.dataset.manifest["name"]),
        "model": index.encoder.name, "score": "cosine of the embeddings",
    }  # fmt: skip
    listed = "".join(f"<div><dt>{to_text(k)}</dt><dd>{to_text(v)}</dd></div>" for k, v in facts.items())
    shown = f'<div class="sheet"><img alt="" src="{encode_picture(picture)}"></div>' if picture else ""
    return f'<header><h1>{to_text(shorten(asked, 200))}</h1>{shown}<dl class="facts">{listed}</dl></header>'


def _write_hit(rank: int, hit: Hit, figure: SampleFigure) -> str:
    picture = thumbnail(figure.image)
    shown = f'<img alt="" src="{picture}">' if picture else '<p class="warning">The picture does not decode.</p>'
    named = " · ".join(to_text(part) for part in (hit.article, hit.figure or hit.key) if part)
    caption = " ".join(hit.caption.split())
    text = f'<div class="text">{to_text(shorten(caption, _SHOWN))}</div>'
    if len(caption) > _SHOWN:
        text += f"<details><summary>Whole caption</summary>{to_text(caption)}</details>"
    return (
        f'<figure id="{to_text(hit.key)}">{shown}<figcaption><div><b>{rank}</b> · '
        f'<data value="{hit.score:.6f}">{hit.score:.3f}</data> · {named}</div>{text}'
        f'<span class="origin">{describe_origin(figure)}</span></figcaption></figure>'
    )


def encode_picture(picture: Image.Image) -> str:
    """A picture in memory as a data URI."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return thumbnail(buffer.getvalue())
