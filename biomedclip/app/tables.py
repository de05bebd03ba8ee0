"""What `classify` found, as people and programs read it: a table, JSON lines, a CSV file.

Names of files come from anywhere, so control characters in them are shown as signs and never reach a terminal.
Pictures that could not be read stay in JSON and CSV as rows with their reason, so that counts add up.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from biomedclip.app.classify import Classified
from biomedclip.app.pictures import Sources
from biomedclip.errors import DataError
from biomedclip.files import write_text

_COLOURS = {"uncertain": "yellow", "out of scope": "red"}
_WIDE = 160
"""Columns of a table that no terminal limits."""


class Report:
    """Collects rows for the table, or prints each at once as JSON; what was not read is kept for the end."""

    def __init__(self, labels: Sequence[str], top: int, *, as_json: bool = False, keeps_rows: bool = False) -> None:
        self.labels, self.top, self.as_json, self.keeps_rows = labels, top, as_json, keeps_rows
        self.rows: list[Classified] = []
        self.refused: list[Classified] = []
        self.classified = 0

    def add(self, row: Classified) -> None:
        """Take one row in."""
        if row.refused:
            self.refused.append(row)
        else:
            self.classified += 1
        if self.as_json:
            sys.stdout.write(json_line(row, self.labels, self.top) + "\n")
        if self.keeps_rows or not self.as_json:
            self.rows.append(row)

    def write_csv(self, path: Path) -> None:
        """All rows that were kept."""
        write_csv(path, self.rows, self.labels)

    def finish(self, sources: Sources, how: str) -> None:
        """Print the table, where its numbers come from, and what was left out. Raises DataError where all was."""
        if self.classified and not self.as_json:
            console = Console()
            print_table(self.rows, self.labels, self.top, console if console.is_terminal else Console(width=_WIDE))
            sys.stdout.write(f"\n{how}\nFor research only; not for clinical use.\n")
        for row in self.refused:
            frame = "" if row.frame is None else f" [{row.frame}]"
            sys.stderr.write(f"not read: {printable(row.name)}{frame} {printable(row.refused)}\n")
        if sources.passed_over:
            kinds = ", ".join(f"{number} {kind}" for kind, number in sources.passed_over.items())
            sys.stderr.write(f"passed over in folders, as no pictures: {kinds}\n")
        if not self.classified:
            raise DataError("images", "none could be classified", found=f"{len(self.refused)} not read",
                            todo="see the reasons above")  # fmt: skip


def json_row(row: Classified, labels: Sequence[str], top: int) -> dict[str, Any]:
    """A row as JSON: the `top` likeliest labels, or `error`."""
    found: dict[str, Any] = {"image": row.name, "frame": row.frame}
    if row.refused:
        return {**found, "error": row.refused}
    best = [{"label": labels[i], "probability": round(float(row.probabilities[i]), 6)} for i in row.best(top)]
    return {**found, "labels": best, "flag": row.flag, "reason": row.reason, "note": row.note}


def json_line(row: Classified, labels: Sequence[str], top: int) -> str:
    """A row as one line of JSON, in ASCII: names that are not UTF-8 survive."""
    return json.dumps(json_row(row, labels, top))


def write_csv(path: Path, rows: Iterable[Classified], labels: Sequence[str]) -> None:
    """All probabilities, one row a picture: image, frame, best, flag, reason, note, error, `p:LABEL` for each label."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["image", "frame", "best", "flag", "reason", "note", "error", *(f"p:{label}" for label in labels)])
    for row in rows:
        frame = "" if row.frame is None else row.frame
        best = "" if row.refused else labels[row.best(1)[0]]
        numbers = ["" for _ in labels] if row.refused else [f"{p:.6f}" for p in row.probabilities]
        writer.writerow([printable(row.name), frame, best, row.flag, row.reason, row.note, row.refused, *numbers])
    write_text(path, buffer.getvalue())


def print_table(rows: Sequence[Classified], labels: Sequence[str], top: int, console: Console) -> None:
    """The pictures that were read, with their likeliest labels and flags."""
    shown = [row for row in rows if not row.refused]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("image", overflow="fold", min_width=12)
    for number in range(min(top, len(labels))):
        table.add_column("label" if number == 0 else f"{number + 1}.", overflow="fold")
    table.add_column("flag", no_wrap=True)
    has_notes = any(row.note for row in shown)
    if has_notes:
        table.add_column("note", overflow="fold", style="dim")
    for row in shown:
        name = printable(row.name) + ("" if row.frame is None else f" [{row.frame}]")
        best = [Text(f"{row.probabilities[i]:.2f} {labels[i]}") for i in row.best(top)]
        flag = Text(row.flag, style=_COLOURS.get(row.flag, ""))
        table.add_row(Text(name), *best, flag, *([Text(row.note)] if has_notes else []))
    console.print(table)


def printable(name: str) -> str:
    """A name with a sign in the place of each control character and each byte that is no UTF-8."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)
