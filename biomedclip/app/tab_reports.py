"""The tab that reads results folders: the table of all models and tasks, what changed between two, and the report.

Reads the result JSON and stored scores that `eval run` and `evaluate` wrote; yields HTML. The full report and other
HTML files of the folder are shown in a sandboxed frame, because whoever wrote them may have written anything; only
files inside of the folder are opened, wherever a link or a record points.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from biomedclip.app.cards import write_empty, write_frame, write_notice, write_rows
from biomedclip.app.holdings import Holdings
from biomedclip.errors import BiomedclipError, DataError
from biomedclip.evaluation.compare import Change, compare_results
from biomedclip.evaluation.markup import name_metric, round_value
from biomedclip.evaluation.overview import arrange, averages, matrix, write_overview
from biomedclip.evaluation.results import TaskResult, read_results, read_skipped

OVERVIEW = "Overview of all results"
MAX_REPORT_BYTES = 30_000_000


def read_folder(folder: Path) -> list[TaskResult]:
    """The results of a folder, oldest first. Raises DataError where there are none or one cannot be trusted."""
    results = read_results(folder)
    if not results:
        raise DataError(folder, "holds no results", todo="run `biomedclip eval run MODEL --out` with this folder")
    for result in results:
        if not result.scores_path.resolve().is_relative_to(folder.resolve()):
            raise DataError(result.path, "names scores outside of its folder", found=result.record["scores_file"])
    return results


def describe_results(folder: Path) -> str:
    """Tables of a results folder as HTML: every task by every model, averages, and what was skipped."""
    results = read_folder(folder)
    with _as_data(folder):
        table = arrange(results)
        rows, means = matrix(table), averages(table)
    parts = [write_rows(rows[0], rows[1:])]
    if len(means) > 1:
        parts.append(f"<h3>Averages</h3>{write_rows(means[0], means[1:])}")
    if skipped := read_skipped(folder):
        parts.append(f"<h3>Skipped</h3>{write_rows(('task', 'why'), skipped.items())}")
    return "".join(parts)


def compare_sets(first: Sequence[TaskResult], second: Sequence[TaskResult]) -> str:
    """What changed from the first model's results to the second's, as HTML. Raises DataError without a shared task."""
    with _as_data("compare"):
        rows = [_change_row(change) for change in compare_results(first, second, resamples=1000)]
    head = ("task", "metric", "before", "after", "difference", "95 % interval", "p (Holm)", "verdict")
    note = "Paired differences on the same samples; a verdict needs p < 0.05 after Holm's correction."
    return write_rows(head, rows) + write_notice(note)


def _change_row(change: Change) -> tuple[str, ...]:
    moved = ("", "", "")
    if not change.reason:
        moved = (f"{change.value:+.3f}", f"{change.low:+.3f} to {change.high:+.3f}", f"{change.p_holm:.3g}")
    return (change.task, name_metric(change.metric), round_value(change.first), round_value(change.second), *moved,
            change.verdict)  # fmt: skip


def list_reports(folder: Path) -> list[str]:
    """What can be opened: the overview, and HTML files of the folder and of its folders, by their relative paths."""
    found = [*folder.glob("*.html"), *folder.glob("*/*.html")]
    inside = [path for path in found if path.is_file() and path.resolve().is_relative_to(folder.resolve())]
    return [OVERVIEW, *sorted(path.relative_to(folder).as_posix() for path in inside)[:200]]


def read_report(folder: Path, name: str) -> str:
    """A report as HTML text. Raises DataError for a name that is not listed, and for files that are too large."""
    if name == OVERVIEW:
        read_folder(folder)
        with tempfile.TemporaryDirectory() as scratch, _as_data(folder):
            page, _ = write_overview(folder, scratch)
            return page.read_text(encoding="utf-8")
    if name not in list_reports(folder):
        raise DataError(name or "nothing", "is not a report of this folder", todo="choose one from the list")
    path = folder / name
    if path.stat().st_size > MAX_REPORT_BYTES:
        raise DataError(path, "is too large for a frame", found=f"{path.stat().st_size / 1e6:.0f} MB",
                        todo="open the file with a browser")  # fmt: skip
    return path.read_text(encoding="utf-8", errors="replace")


@contextmanager
def _as_data(where: str | Path) -> Iterator[None]:
    """Records are JSON of anybody's making: what they lack is an error of theirs."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise DataError(where, "holds a record that is no result of this project", found=repr(error)[:120],
                        todo="evaluate the task again") from None  # fmt: skip


def list_models(holdings: Holdings) -> dict[str, list[TaskResult]]:
    """{`folder / model`: results} over all folders that can be read, in the order they were written."""
    found: dict[str, list[TaskResult]] = {}
    for name, folder in holdings.results.items():
        try:
            results = read_folder(folder)
        except DataError:
            continue  # the table of that folder says why
        for result in results:
            label = result.model if len(holdings.results) == 1 else f"{name} / {result.model}"
            found.setdefault(label, []).append(result)
    return found


def add_reports_tab(holdings: Holdings, page: gr.Blocks) -> None:
    """Put the tab's components and events into the page that is being built."""
    if not holdings.results:
        gr.HTML(write_empty(
            "No results were given", "Score a model on data of yours and start the page with the folder:",
            "biomedclip eval run --model biomedclip-mini --images my_images --out results\n"
            "biomedclip app --results results",
        ))  # fmt: skip
        return
    names = list(holdings.results)
    name = gr.Dropdown(names, value=names[0], label="Results", elem_id="results-name", visible=len(names) > 1)
    table = gr.HTML(elem_id="results-table")
    gr.HTML("<h3>Before and after</h3>")
    with gr.Row(equal_height=True):
        before = gr.Dropdown([], label="Before", elem_id="results-before", min_width=160)
        after = gr.Dropdown([], label="After", elem_id="results-after", min_width=160)
        compare = gr.Button("Compare", elem_id="results-compare", min_width=120, scale=0)
    changes = gr.HTML(elem_id="results-changes")
    gr.HTML("<h3>Reports</h3>")
    with gr.Row(equal_height=True):
        report = gr.Dropdown([OVERVIEW], value=OVERVIEW, label="Report", elem_id="results-report", min_width=160)
        opened = gr.Button("Open", elem_id="results-open", min_width=120, scale=0)
    frame = gr.HTML(elem_id="results-frame")

    def change(name: str) -> tuple[Any, ...]:
        models = list(list_models(holdings))
        choices = [gr.Dropdown(models, value=models[end] if models else None) for end in (0, -1)]
        try:
            folder = holdings.results_folder(name)
            reports = gr.Dropdown(list_reports(folder), value=OVERVIEW)
            return describe_results(folder), reports, *choices, "", ""
        except BiomedclipError as error:
            return write_notice(str(error), kind="warning"), gr.Dropdown([OVERVIEW], value=OVERVIEW), *choices, "", ""

    def show_changes(first: str, second: str) -> str:
        models = list_models(holdings)
        if first not in models or second not in models or first == second:
            return write_notice("Choose two different models. One alone is compared with chance in the table above.")
        try:
            return compare_sets(models[first], models[second])
        except BiomedclipError as error:
            return write_notice(str(error), kind="warning")

    def show_report(name: str, wanted: str) -> str:
        try:
            return write_frame(read_report(holdings.results_folder(name), wanted), wanted)
        except BiomedclipError as error:
            return write_notice(str(error), kind="warning")

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
    gr.on([page.load, name.change], change, name, [table, report, before, after, changes, frame], **quiet)
    compare.click(show_changes, [before, after], changes, **quiet)
    opened.click(show_report, [name, report], frame, **quiet)
