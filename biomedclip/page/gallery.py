"""Pictures of pages: thumbnails inside the page, each with its caption, licence and article.

Reads dataset folders; yields `SampleFigure`s and data URIs. Captions, titles and DOIs come from files that anybody
may have written, so nothing here is trusted: text is escaped where it becomes HTML, and a link is only made of a
DOI that looks like one, or of a PubMed Central id that PMC can have given out.
"""

from __future__ import annotations

import base64
import io
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from biomedclip.errors import DataError
from biomedclip.images import read_rgb
from biomedclip.page.markup import link_to, shorten, to_text
from biomedclip.shards import DatasetFolder

_DOI = re.compile(r"10\.\d{4,9}/\S+")
_SYNTHETIC_PMCID = 900_000_000
"""Ids from here on are this project's own, for articles without one; PMC counts up and is below 14 million."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFigure:
    """One picture to show, with what must be said beside it."""

    key: str
    image: bytes
    caption: str
    source: str
    licence: str
    split: str = ""
    title: str = ""
    authors: str = ""
    year: str = ""
    link: str | None = None
    link_text: str = ""


def choose_figures(dataset: DatasetFolder, count: int = 6, *, split: str | None = None, seed: int = 0) -> list[Any]:
    """`count` samples of a dataset as SampleFigures: of different articles or labels as far as there are enough.

    The choice is by seed, not by beauty.
    """
    rows = [row for row in dataset.index.to_pylist() if split in (None, row["split"])]
    random.Random(seed).shuffle(rows)  # noqa: S311  (a choice of pictures, not a secret)
    seen: dict[Any, int] = {}
    ranked = []
    for row in rows:
        kind = row["article_id"] or tuple(row["labels"] or ())
        seen[kind] = seen.get(kind, 0) + 1
        ranked.append((seen[kind], row))
    ranked.sort(key=lambda item: item[0])
    articles = read_articles(dataset)
    return [describe_sample(dataset, row, articles) for _, row in ranked[:count]]


def read_articles(dataset: DatasetFolder) -> dict[str, dict[str, Any]]:
    """{article_id: facts} of a dataset."""
    return {row["article_id"]: row for row in dataset.articles.to_pylist()}


def describe_sample(
    dataset: DatasetFolder, row: Mapping[str, Any], articles: Mapping[str, Mapping[str, Any]]
) -> SampleFigure:
    """The SampleFigure of an index row."""
    sample = dataset.read(row)
    return describe_article(row, sample.image, sample.caption, articles.get(row["article_id"] or "", {}))


def describe_article(row: Mapping[str, Any], image: bytes, caption: str, article: Mapping[str, Any]) -> SampleFigure:
    """The SampleFigure of a picture, from its row and the facts of its article, {} where it has none."""
    link, text = article_link(article)
    authors = list(article.get("authors") or [])
    return SampleFigure(
        key=row["key"], image=image, caption=caption, source=row["source"], licence=row["licence"],
        split=row["split"], title=article.get("title") or "", link=link, link_text=text,
        authors=(authors[0] + (" et al." if len(authors) > 1 else "")) if authors else "",
        year=str(article.get("published") or "")[:4],
    )  # fmt: skip


def article_link(article: Mapping[str, Any]) -> tuple[str | None, str]:
    """Address and text of the link to an article: its DOI, else its page at PMC, else none."""
    doi = (article.get("doi") or "").strip()
    if _DOI.fullmatch(doi):
        return f"https://doi.org/{quote(doi, safe='/:;().-_')}", f"doi:{doi}"
    pmcid = article.get("pmcid") or 0
    if 0 < pmcid < _SYNTHETIC_PMCID:
        return f"https://pmc.ncbi.nlm.nih.gov/articles/PMC{pmcid}/", f"PMC{pmcid}"
    return None, ""


def write_gallery(figures: Sequence[SampleFigure], heading: str, note: str) -> str:
    """A section of pictures with caption, licence and article; empty where there are none."""
    blocks = []
    for figure in figures:
        picture = thumbnail(figure.image)
        if picture:
            blocks.append(
                f'<figure><img alt="" src="{picture}"><figcaption>'
                f'<div class="text">{to_text(shorten(figure.caption))}</div>'
                f'<span class="origin">{describe_origin(figure)}</span></figcaption></figure>'
            )
    if not blocks:
        return ""
    return (
        f'<section id="samples">\n<h2>{to_text(heading)}</h2>\n<p class="note">{to_text(note)}</p>\n'
        f'<div class="gallery">{"".join(blocks)}</div>\n</section>'
    )


def describe_origin(figure: SampleFigure) -> str:
    """Title, author, licence and source as HTML: what CC BY asks for."""
    link = link_to(figure.link, figure.link_text) if figure.link else ""
    credit = " ".join(part for part in (figure.authors, figure.year) if part)
    parts = [to_text(part) for part in (shorten(figure.title, 110), credit, figure.licence) if part]
    return " · ".join([*parts, *([link] if link else [to_text(figure.source)])])


def find_thumbnails(datasets: Sequence[DatasetFolder], sample_ids: Sequence[str], side_px: int = 96) -> dict[str, str]:
    """{sample id: data URI} for those ids that are, or end in `/`, the key of a sample of one of the datasets."""
    wanted = {sample_id.rsplit("/", 1)[-1]: sample_id for sample_id in sample_ids}
    found = {}
    for dataset in datasets:
        for row in dataset.index.to_pylist():
            if row["key"] in wanted:
                found[wanted[row["key"]]] = thumbnail(dataset.read(row).image, side_px)
    return found


def thumbnail(image: bytes, side_px: int = 360) -> str:
    """A picture as a `data:image/jpeg` URI, at most `side_px` on its longer side; empty where it does not decode."""
    try:
        picture = read_rgb(image)
    except DataError:
        return ""
    picture.thumbnail((side_px, side_px))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
