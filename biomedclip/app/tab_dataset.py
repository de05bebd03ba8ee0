"""The tab that browses dataset folders: what was seen and kept, and the samples with captions, licences and splits.

Reads index, ledger and articles of a dataset folder and the few samples that are on the screen; yields HTML. The
funnel is counted from the ledger's own rows and not taken from the manifest, because it is there to be checked.
Fields are chosen from lists that the index itself names; nothing of what a visitor types becomes a query.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from biomedclip.app.cards import write_cards, write_empty, write_facts, write_notice
from biomedclip.app.holdings import Holdings
from biomedclip.errors import BiomedclipError, DataError
from biomedclip.page.bars import draw_bars, draw_drops
from biomedclip.page.gallery import describe_sample, read_articles
from biomedclip.page.markup import to_text
from biomedclip.shards import DatasetFolder, read_tables

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN = 12
"""Samples on one page."""
EVERY = ""
_MOST_LABELS = 300


@dataclass(frozen=True, slots=True)
class Fields:
    """What a sample must be to be shown; an empty field asks for nothing."""

    split: str = EVERY
    licence: str = EVERY
    source: str = EVERY
    label: str = EVERY
    words: str = ""
    """Part of its key, its article's id or its article's title, in any case."""


def describe_dataset(dataset: DatasetFolder) -> str:
    """Facts, funnel, licences and splits of a dataset as HTML. Raises DataError where its ledger does not add up."""
    seen, kept, dropped = count_ledger(dataset)
    index = dataset.index
    facts = {
        "samples": f"{len(index):,}", "articles": f"{len(dataset.articles):,}",
        "shards": f"{len(dataset.manifest['shards']):,}", "taken back": f"{len(dataset.withdrawn):,}",
    }  # fmt: skip
    line = f"{seen:,} seen = {kept:,} kept + {sum(dropped.values()):,} dropped"
    charts = [
        ("Licences", draw_bars(_count(index, "licence"), len(index), most=6)),
        ("Splits", draw_bars(dataset.splits, len(index))),
    ]
    sides = "".join(f"<div><h3>{to_text(name)}</h3>{chart}</div>" for name, chart in charts)
    return (
        f'{write_facts({name: value for name, value in facts.items() if value != "0"})}<div class="bc-twin"><div>'
        f'<h3>What was kept, and why the rest was not</h3><p class="bc-ledger">{line}</p>'
        f"{draw_drops(seen, kept, dropped)}</div><div>{sides}</div></div>"
    )


def count_ledger(dataset: DatasetFolder) -> tuple[int, int, dict[str, int]]:
    """(seen, kept, {reason: dropped}) from the ledger's rows. Raises DataError where the manifest says otherwise."""
    path = dataset.folder / "ledger.parquet"
    table = read_tables([path], {"status": "string", "reason": "string"})
    states = Counter(zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True))
    kept = sum(count for (status, _), count in states.items() if status == "kept")
    dropped = {str(reason): count for (status, reason), count in states.items() if status == "dropped"}
    told = dataset.manifest["ledger"]
    if (len(table), kept, dropped) != (told["seen"], told["kept"], dict(told["dropped"])):
        raise DataError(path, "does not agree with the manifest", found=f"{len(table)} rows, {kept} kept",
                        todo="run `biomedclip data verify` on the folder")  # fmt: skip
    return len(table), kept, dropped


def choose_rows(dataset: DatasetFolder, fields: Fields) -> pa.Table:
    """The index rows of samples that are as the fields ask, in shard order."""
    import pyarrow.compute as pc

    rows = dataset.index
    for column, wanted in (("split", fields.split), ("licence", fields.licence), ("source", fields.source)):
        if wanted:
            rows = rows.filter(pc.equal(rows[column], wanted))
    if fields.label:
        rows = rows.filter([fields.label in (labels or ()) for labels in rows["labels"].to_pylist()])
    if words := " ".join(fields.words.split()):
        titles = dict(zip(*(dataset.articles[name].to_pylist() for name in ("article_id", "title")), strict=True))
        words = words.casefold()
        pairs = zip(rows["key"].to_pylist(), rows["article_id"].to_pylist(), strict=True)
        rows = rows.filter([words in f"{key}\n{at or ''}\n{titles.get(at) or ''}".casefold() for key, at in pairs])
    return rows


def show_samples(dataset: DatasetFolder, rows: pa.Table, page: int) -> str:
    """One page of samples as cards; the sample that cannot be read is named in its place."""
    articles = read_articles(dataset)
    figures, notes, problems = [], [], []
    for row in rows.slice(page * SHOWN, SHOWN).to_pylist():
        try:
            figures.append(describe_sample(dataset, row, articles))
        except DataError as error:
            problems.append(str(error))
            continue
        notes.append((row["split"], *(row["labels"] or ())[:3], f"{row['width']} x {row['height']} px"))
    return "".join(write_notice(text, kind="warning") for text in problems) + write_cards(figures, notes)


def list_choices(dataset: DatasetFolder) -> dict[str, list[tuple[str, str]]]:
    """{field: (shown, value) pairs} with counts, the commonest first; every list begins with `any`."""
    index = dataset.index
    counts: dict[str, Mapping[str, int]] = {name: _count(index, name) for name in ("split", "licence", "source")}
    counts["label"] = Counter(label for labels in index["labels"].to_pylist() for label in labels or ())
    return {
        name: [("any", EVERY)]
        + [
            (f"{value} ({count:,})", value)
            for value, count in sorted(found.items(), key=lambda item: (-item[1], item[0]))[:_MOST_LABELS]
        ]
        for name, found in counts.items()
    }


def _count(index: pa.Table, column: str) -> dict[str, int]:
    return dict(Counter(value for value in index[column].to_pylist() if value))


def add_dataset_tab(holdings: Holdings, page: gr.Blocks) -> None:
    """Put the tab's components and events into the page that is being built."""
    if not holdings.datasets:
        gr.HTML(write_empty(
            "No dataset was given", "Start the page with the folder that `biomedclip build` or `data pack` wrote:",
            "biomedclip build configs/build/demo_pmc.yaml --out shards/pmc\nbiomedclip app --dataset shards/pmc",
        ))  # fmt: skip
        return
    names = list(holdings.datasets)
    name = gr.Dropdown(names, value=names[0], label="Dataset", elem_id="dataset-name", visible=len(names) > 1)
    about = gr.HTML(elem_id="dataset-about")
    with gr.Row(elem_id="dataset-fields"):
        fields: list[Any] = [
            gr.Dropdown(
                [("any", EVERY)], value=EVERY, label=field.capitalize(), min_width=130, elem_id=f"field-{field}"
            )
            for field in ("split", "licence", "source", "label")
        ]
        fields.append(gr.Textbox(label="Words", placeholder="key, article or its title", min_width=160, max_lines=1,
                                 elem_id="field-words"))  # fmt: skip
    with gr.Row(elem_classes="bc-turn"):
        back = gr.Button("Previous", size="sm", min_width=90, scale=0)
        place = gr.HTML(elem_id="dataset-place")
        on = gr.Button("Next", size="sm", min_width=90, scale=0)
    samples = gr.HTML(elem_id="dataset-samples")
    number = gr.State(0)

    def show(name: str, *asked: Any) -> tuple[Any, ...]:
        *chosen, turn = asked
        try:
            dataset = holdings.dataset(name)
            rows = choose_rows(dataset, Fields(*(value or "" for value in chosen)))
            last = max(0, (len(rows) - 1) // SHOWN)
            turn = min(max(turn, 0), last)
            return show_samples(dataset, rows, turn), describe_place(len(rows), turn), turn
        except BiomedclipError as error:
            return write_notice(str(error), kind="warning"), "", 0

    def change(name: str) -> tuple[Any, ...]:
        try:
            dataset = holdings.dataset(name)
            lists = [gr.Dropdown(pairs, value=EVERY) for pairs in list_choices(dataset).values()]
            return describe_dataset(dataset), *lists, "", *show(name, EVERY, EVERY, EVERY, EVERY, "", 0)
        except BiomedclipError as error:
            empty = [gr.Dropdown([("any", EVERY)], value=EVERY)] * 4
            return write_notice(str(error), kind="warning"), *empty, "", "", "", 0

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal", "show_progress_on": samples}
    shown = [samples, place, number]
    gr.on([page.load, name.change], change, name, [about, *fields, *shown], **quiet)
    for field in fields[:4]:
        field.input(lambda *values: show(*values, 0), [name, *fields], shown, **quiet)
    fields[4].submit(lambda *values: show(*values, 0), [name, *fields], shown, **quiet)
    back.click(lambda *values: show(*values[:-1], values[-1] - 1), [name, *fields, number], shown, **quiet)
    on.click(lambda *values: show(*values[:-1], values[-1] + 1), [name, *fields, number], shown, **quiet)


def describe_place(count: int, page: int) -> str:
    """Which samples are on the screen, of how many."""
    if not count:
        return write_empty("No sample is like this", "Set a field back to “any”, or shorten the words.")
    first = page * SHOWN + 1
    return f'<p class="bc-place">{first:,} to {min(first + SHOWN - 1, count):,} of {count:,}</p>'
