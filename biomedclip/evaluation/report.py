"""The report: results before and after as one HTML file that needs nothing but a browser.

Reads result records, the run folder and the dataset folders; `sections.py` writes the parts, `biomedclip.page` makes
one file of them that opens offline. `summarise` gives the same numbers for programs, `results_table` and
`summary_table` for terminals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from biomedclip.evaluation.appendix import write_appendix
from biomedclip.evaluation.markup import Record, chance_of, interval_text, round_value
from biomedclip.evaluation.results import TaskResult
from biomedclip.evaluation.sections import (
    LIMITS,
    SHOWN_METRICS,
    count_ledgers,
    write_confusions,
    write_funnels,
    write_header,
    write_headline,
    write_learning,
    write_limits,
    write_retrieved,
    write_tiles,
)
from biomedclip.page import write_page
from biomedclip.page.gallery import SampleFigure, choose_figures, write_gallery
from biomedclip.shards import DatasetFolder


def write_report(
    path: str | Path,
    *,
    after: Sequence[TaskResult],
    before: Sequence[TaskResult] = (),
    title: str = "What the model learned",
    lede: str = "",
    run: str | Path | None = None,
    datasets: Sequence[DatasetFolder] = (),
    figures: Sequence[SampleFigure] | None = None,
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write the page and return its path.

    `run` is the folder of the training run (loss curve, config, seed, versions); `figures` are chosen from `datasets`
    by seed where not given; `facts` are further short lines under the title. Raises DataError where a ledger does not
    add up, because a funnel that leaks must not be shown.
    """
    after_by, before_by = _by_task(after), _by_task(before)
    if figures is None:
        figures = [figure for dataset in datasets for figure in choose_figures(dataset, 6 if dataset.articles else 3)]
    sections = [
        write_header(title, lede, run, after, facts or {}),
        write_tiles(before_by, after_by),
        write_headline(before_by, after_by),
        write_learning(run),
        write_confusions(before_by, after_by),
        write_retrieved(after_by, datasets),
        write_gallery(figures, "What it was shown", "Samples chosen by seed, with the caption the model read."),
        write_funnels(datasets),
        write_limits(after),
        write_appendix(before_by, after_by, datasets, run),
    ]
    return write_page(path, title, sections, footer=LIMITS[0])


def summarise(
    before: Sequence[TaskResult], after: Sequence[TaskResult], datasets: Sequence[DatasetFolder] = ()
) -> dict[str, Any]:
    """`tasks.<name>.{before,after}.<metric>.{value,ci_low,ci_high,n}` and `ledger.{seen,kept,dropped}`."""
    tasks: dict[str, dict[str, Any]] = {}
    for stage, results in (("before", before), ("after", after)):
        for result in results:
            tasks.setdefault(result.task, {})[stage] = {
                name: {key: result.metrics[name][key] for key in ("value", "ci_low", "ci_high", "n")}
                for name in SHOWN_METRICS[result.record["kind"]]
                if name in result.metrics
            }
    return {"tasks": tasks, "ledger": count_ledgers(datasets)}


def results_table(results: Sequence[TaskResult]) -> str:
    """Results as aligned plain text, one row a shown metric."""
    rows = [("task", "metric", "value", "95 % interval", "chance", "n")]
    for result in results:
        for name in SHOWN_METRICS[result.record["kind"]]:
            if name in result.metrics:
                entry, chance = result.metrics[name], chance_of(result.record, name)
                rows.append((result.task, name, round_value(entry["value"]), interval_text(entry), round_value(chance),
                             str(entry["n"])))  # fmt: skip
    return _align(rows)


def reproduction_table(results: Sequence[TaskResult]) -> str:
    """Published figures of the scored models, ours beside them and the verdict; empty where there are none."""
    rows = [("published figure of", "metric", "published", "ours", "tolerance", "verdict")]
    for result in results:
        for entry in result.record.get("reproduction", ()):
            why = f": {entry['reason']}" if "reason" in entry else ""
            rows.append((f"{entry['model']} on {result.task}", entry["metric"], f"{entry['published']:g}",
                         "–" if entry["ours"] is None else f"{entry['ours']:.4f}", f"{entry['tolerance']:.2g}",
                         entry["verdict"] + why))  # fmt: skip
    return _align(rows) if len(rows) > 1 else ""


def summary_table(summary: Record) -> str:
    """What `summarise` returned as aligned plain text: before and after with intervals."""
    rows = [("task", "metric", "before", "", "after", "", "n")]
    for task, stages in summary["tasks"].items():
        for name, entry in stages.get("after", {}).items():
            old = stages.get("before", {}).get(name)
            first = (round_value(old["value"]), interval_text(old)) if old else ("", "")
            rows.append((task, name, *first, round_value(entry["value"]), interval_text(entry), str(entry["n"])))
    ledger = summary["ledger"]
    line = f"{ledger['seen']:,} figures and images seen = {ledger['kept']:,} kept + {ledger['dropped']:,} dropped"
    return f"{_align(rows)}\n\n{line}"


def _by_task(results: Iterable[TaskResult]) -> dict[str, Record]:
    return {result.task: result.record for result in results}


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = 2  # task and metric; numbers are set to the right
    cells = [[cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
             for row in rows]  # fmt: skip
    return "\n".join("  ".join(row).rstrip() for row in cells)
