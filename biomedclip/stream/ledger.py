"""Samples that a run could not read: at which step, why, and what was shown instead.

Takes them batch by batch; with a folder, appends each as a line of JSON to a file of its process, so that whoever asks
later what a step saw knows what the plan alone does not say. A resumed run drops the lines of steps it will do again
and passes over the samples of the others without trying them: a disk that works again must not make the rest of the
run another one. The counts are no part of the loader's state, which is the same on every process.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from biomedclip.files import explain_full_disk, split_lines, write_text

FOLDER = "unreadable"
"""Folder within a run's, with `rank-0.jsonl` and so on."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """One sample that was wanted at a step and could not be read."""

    step: int
    slot: int
    """Its place in the whole batch, over all processes; -1 where its source has no index."""
    source: str
    key: str
    reason: str
    """A word; `passed_over` samples keep the reason of the first time."""
    detail: str
    part: int
    """Number of the plan's source, -1 for none; with `row` its name in the plan."""
    row: int
    substitute: str
    """Key of the sample that was shown instead."""


class Ledger:
    """The unreadable samples of one process; with a folder, of all processes of the run before it was interrupted."""

    def __init__(
        self, folder: str | Path | None = None, *, plan_sha256: str = "", rank: int = 0, world_size: int = 1
    ) -> None:
        self.folder = Path(folder) / FOLDER if folder is not None else None
        self.plan_sha256, self.rank, self.world_size = plan_sha256, rank, world_size
        self.own = 0.0
        """How often this process met one; of the time before it began, its share of what all of them met."""
        self.counts: Counter[tuple[str, str]] = Counter()
        """(source, reason) -> how often one was met."""
        self.known: dict[tuple[int, int], tuple[str, str]] = {}
        """(part, row) -> reason and detail of samples that were unreadable before."""

    def rewind(self, step: int) -> None:
        """Go back to just before a step: what earlier steps met is read from the folder, the rest is forgotten."""
        if self.folder is None:
            return
        self.counts.clear()
        self.known.clear()
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            kept = [(entry, plan) for entry, plan in _read(path) if entry.step < step]
            # Each process rewrites its own file; those of processes that are no more fall to the first.
            if path == self._path or (self.rank == 0 and _rank_of(path) >= self.world_size):
                write_text(path, "".join(_line(entry, plan) for entry, plan in kept))
            for entry, plan in kept:
                self.counts[entry.source, entry.reason] += 1
                if plan == self.plan_sha256 and entry.part >= 0:  # rows of another plan are other samples
                    self.known[entry.part, entry.row] = (entry.reason, entry.detail)
        self.own = self.counts.total() / self.world_size

    def add(self, entries: Iterable[Unreadable]) -> None:
        """Count the entries and append them to this process's file."""
        lines = []
        for entry in entries:
            self.counts[entry.source, entry.reason] += 1
            self.own += 1
            lines.append(_line(entry, self.plan_sha256))
        if lines and self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with explain_full_disk(self._path.parent), self._path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))

    @property
    def by_reason(self) -> dict[str, int]:
        """Reason -> how often, over all sources."""
        counts: Counter[str] = Counter()
        for (_, reason), count in self.counts.items():
            counts[reason] += count
        return dict(sorted(counts.items()))

    @property
    def _path(self) -> Path | None:
        return self.folder / f"rank-{self.rank}.jsonl" if self.folder else None


def read_unreadable(run_folder: str | Path) -> list[Unreadable]:
    """All entries of a run, by step and slot. A last line that a kill cut short is left out."""
    paths = (Path(run_folder) / FOLDER).glob("rank-*.jsonl")
    return sorted((entry for path in paths for entry, _ in _read(path)), key=lambda e: (e.step, e.slot))


def _rank_of(path: Path) -> int:
    return int(path.stem.removeprefix("rank-"))


def _line(entry: Unreadable, plan: str) -> str:
    return json.dumps({**asdict(entry), "plan": plan}, ensure_ascii=False) + "\n"


def _read(path: Path) -> list[tuple[Unreadable, str]]:
    text = path.read_text(encoding="utf-8")
    rows: list[Mapping[str, object]] = [json.loads(line) for line in split_lines(text[: text.rfind("\n") + 1])]
    return [(Unreadable(**{k: v for k, v in row.items() if k != "plan"}), str(row["plan"])) for row in rows]  # type: ignore[arg-type]
