"""Progress as an argument: steps report to a `Progress`, and only the command line knows how it looks.

A step opens a task and advances it: `with progress("reading figures", total=120) as advance: advance(1)`. Libraries
and tests pass nothing and get `silent`; the command line passes `terminal`, a rich bar that falls back to plain lines
where the output is not a terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console


class Advance(Protocol):
    """Moves a task on by `steps`; `note` is shown beside the bar (a loss, a count)."""

    def __call__(self, steps: int = 1, note: str = "") -> None: ...


Progress = Callable[[str, "int | None"], AbstractContextManager[Advance]]
"""`progress(description, total)`; total None where it is not known."""


@contextmanager
def silent(description: str, total: int | None = None) -> Iterator[Advance]:
    """A Progress that shows nothing."""

    def advance(steps: int = 1, note: str = "") -> None:
        del steps, note

    yield advance


@contextmanager
def terminal(description: str, total: int | None = None) -> Iterator[Advance]:
    """A Progress that draws a bar on stderr, or a line every ten seconds where stderr is not a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    show = _bar if console.is_terminal else _lines
    with show(console, description, total) as advance:
        yield advance


@contextmanager
def _bar(console: Console, description: str, total: int | None) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}[/]"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            bar.advance(task, steps)
            if note:
                bar.update(task, note=note)

        yield advance
        bar.update(task, total=bar.tasks[0].completed)


@contextmanager
def _lines(console: Console, description: str, total: int | None) -> Iterator[Advance]:
    start = shown = time.monotonic()
    done, last = 0, ""

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, shown, last
        done, last = done + steps, note or last
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            console.print(f"  {description}: {done}/{total or '?'} {last}", highlight=False)

    yield advance
    console.print(f"  {description}: {done} done in {time.monotonic() - start:.1f} s {last}", highlight=False)
