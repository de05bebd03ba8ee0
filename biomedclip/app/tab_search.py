"""The tab that finds figures of the given datasets by words or by a picture.

Reads what a visitor asks and the index of `search.py`, which is made when a dataset is searched for the first time and
kept in the cache; yields figures as cards with caption, article, licence and cosine. Words go before a picture where
both are there, because a picture stays in its field while words are tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from biomedclip.app.asked import say
from biomedclip.app.cards import write_cards, write_empty, write_notice
from biomedclip.app.chosen import SUFFIXES, Chosen
from biomedclip.app.holdings import Holdings
from biomedclip.errors import BiomedclipError, DataError
from biomedclip.progress import Advance, Progress, silent

_START = write_empty(
    "Nothing asked yet",
    "Say in a few words what the figure should show, or give a picture that it should look like. The first search of a "
    "dataset makes its index, which takes about a minute for ten thousand figures.",
)


def find_figures(
    holdings: Holdings, name: str, words: str, path: str | None, top: int, progress: Progress = silent
) -> str:
    """The figures that fit best as HTML. Raises DataError where neither words nor a picture are given."""
    words = words.strip()
    if not words and not path:
        raise DataError("search", "nothing was asked", todo="write a few words, or give a picture")
    index = holdings.index(name, progress)
    if words:
        hits, asked = index.search_text(words, top), f"“{words}”"
    else:
        _, image = Chosen(Path(str(path)), Path(str(path)).name).read()
        hits, asked = index.search_image(image, top), Path(str(path)).name
    notes = [(f"cosine {hit.score:.3f}", hit.split) for hit in hits]
    exact = "" if index.is_exact else " Only the likeliest were compared."
    line = f"{len(hits)} of {len(index):,} figures, those that fit {asked} best.{exact} A cosine is no probability."
    missing = f" {len(index.unreadable):,} pictures could not be read and cannot be found." if index.unreadable else ""
    return write_notice(line + missing) + write_cards(index.describe(hits), notes)


def show_progress(bar: gr.Progress) -> Progress:
    """Gradio's bar as a Progress."""

    @contextmanager
    def task(description: str, total: int | None = None) -> Iterator[Advance]:
        done = 0

        def advance(steps: int = 1, note: str = "") -> None:
            nonlocal done
            done += steps
            bar((done, total) if total else None, desc=f"{description} {note}".strip(), unit="figures")

        advance(0)
        yield advance

    return task


def add_search_tab(holdings: Holdings, page: gr.Blocks) -> None:
    """Put the tab's components and events into the page that is being built."""
    del page
    if not holdings.datasets:
        gr.HTML(write_empty(
            "No dataset was given", "Start the page with the folder that `biomedclip build` or `data pack` wrote:",
            "biomedclip build configs/build/demo_pmc.yaml --out shards/pmc\nbiomedclip app --dataset shards/pmc",
        ))  # fmt: skip
        return
    names = list(holdings.datasets)
    with gr.Row(equal_height=True):
        with gr.Column(scale=3, min_width=280):
            name = gr.Dropdown(names, value=names[0], label="Dataset", elem_id="search-name", visible=len(names) > 1)
            words = gr.Textbox(label="Words", placeholder="electron micrograph of a synapse", max_lines=1,
                               elem_id="search-words")  # fmt: skip
        with gr.Column(scale=2, min_width=240):
            upload = gr.File(label="Or a picture", file_types=list(SUFFIXES), height=84, elem_id="search-upload")
            top = gr.Slider(4, 48, value=12, step=4, label="Figures shown", elem_id="search-top")
    ask = gr.Button("Search", variant="primary", elem_id="search-ask")
    found = gr.HTML(_START, elem_id="search-found")

    def search(
        name: str, words: str | None, path: str | None, top: int, bar: gr.Progress = gr.Progress()  # noqa: B008
    ) -> str:  # fmt: skip
        try:
            return find_figures(holdings, name, words or "", path, int(top), show_progress(bar))
        except BiomedclipError as error:
            return say(error)

    def search_picture(name: str, path: str | None, top: int, bar: gr.Progress = gr.Progress()) -> str:  # noqa: B008
        return search(name, "", path, top, bar) if path else _START

    quiet: dict[str, Any] = {"api_visibility": "private"}
    gr.on([ask.click, words.submit], search, [name, words, upload, top], found, **quiet)
    upload.upload(search_picture, [name, upload, top], found, **quiet)
