"""Contact sheets: for each cluster its most central pictures, on pages that open offline.

Reads the dataset and the clusters' nearest samples; writes `<table>.html`, and further pages where there are many
clusters, beside the table that is to be filled. Pictures are small JPEGs inside the page: fifty clusters of sixteen are
about 4 MB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from biomedclip.page import write_page
from biomedclip.page.gallery import thumbnail
from biomedclip.page.markup import shorten, to_text
from biomedclip.progress import Progress, silent
from biomedclip.shards import DatasetFolder

_SIDE_PX = 144

SheetCluster = tuple[str, int, Sequence[str], Sequence[Mapping[str, Any]]]
"""Name, size, terms, and the index rows of the pictures to show."""


def write_sheets(
    table: Path,
    dataset: DatasetFolder,
    clusters: Sequence[SheetCluster],
    *,
    per_page: int = 50,
    progress: Progress = silent,
) -> list[Path]:
    """Write the pages of some clusters beside their table and return their paths."""
    starts = range(0, len(clusters), per_page)
    paths = [
        table.with_name(f"{table.stem}{'' if page == 0 else f'-{page + 1:02d}'}.html") for page in range(len(starts))
    ]
    with progress("contact sheets", len(clusters)) as advance:
        for page, start in enumerate(starts):
            blocks = []
            for cluster in clusters[start : start + per_page]:
                blocks.append(_block(dataset, cluster))
                advance()
            title = f"Clusters of {dataset.manifest['name']}"
            head = f"<header><h1>{to_text(title)}</h1>{_note(table, len(clusters))}{_links(paths, page)}</header>"
            write_page(paths[page], title, [head, *blocks], footer="For research only; not for clinical use.")
    return paths


def _note(table: Path, count: int) -> str:
    text = (
        f"{count} clusters, the largest first; of each the pictures nearest to its middle. Write what a cluster shows "
        f"into its row of {table.name}: label and secondary in your own words, always spelt alike; keep says yes or no."
    )
    return f'<p class="note">{to_text(text)}</p>'


def _links(paths: Sequence[Path], here: int) -> str:
    if len(paths) < 2:
        return ""
    links = [
        f"<b>{page + 1}</b>" if page == here else f'<a href="{to_text(path.name)}">{page + 1}</a>'
        for page, path in enumerate(paths)
    ]
    return f'<p class="note">Page {" ".join(links)}</p>'


def _block(dataset: DatasetFolder, cluster: SheetCluster) -> str:
    name, size, terms, rows = cluster
    pictures = []
    for row in rows:
        sample = dataset.read(row)
        words = to_text(f"{sample.key}: {shorten(sample.caption, 200)}")
        pictures.append(f'<img src="{thumbnail(sample.image, _SIDE_PX)}" alt="{words}" title="{words}">')
    return (
        f'<section class="cluster"><h2>{to_text(name)}</h2><p class="note">{size:,} pictures. '
        f'{to_text(", ".join(terms))}</p><div class="sheet">{"".join(pictures)}</div></section>'
    )
