"""A task looked at without a model: files, counts, groups, licence, prompts, and a few pictures that open.

Reads a task and its data; yields text for a terminal. Whatever would stop an evaluation stops here too, with the same
line, and a file that cannot be opened is found among the first hundred before anything is loaded on a GPU.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from biomedclip.errors import DataError
from biomedclip.evaluation.prompts import compile_negatives, compile_prompts, list_warnings
from biomedclip.evaluation.selection import find_data
from biomedclip.evaluation.tasks import Task, find_task
from biomedclip.schema import Manifest

OPENED = 100


def describe_task(name: str, root: Path) -> str:
    """What the task is and what was found. Raises what an evaluation would raise for the same data."""
    from biomedclip.evaluation.splits import check_counts, read_split

    task = find_task(name)
    found, _ = find_data(None, (name,), root)
    manifest = read_split(task, found[name])
    warnings = check_counts(task, manifest)
    counts = Counter(label for row in manifest.rows for label in row.labels)
    groups = {row.group_id for row in manifest.rows if row.group_id}
    lines = [
        f"{task.name}: {task.title}, {task.modality}",
        f"data       {found[name]}, split '{task.split}': {len(manifest.rows):,} samples, "
        + (f"{len(groups):,} groups ({task.group})" if groups else "no groups: each sample counts as independent"),
        f"licence    {task.licence}",
        f"citation   {task.citation}",
        f"leakage    {task.contamination}",
        f"metrics    {', '.join(task.metrics.names)}",
        f"pictures   {open_some(manifest)}",
    ]
    lines += [f"class      {entry.label}: {entry.name}, {counts[entry.label]:,}" for entry in task.classes]
    lines += [f"dropped    {reason} {n:,}" for reason, n in Counter(drop.reason for drop in manifest.drops).items()]
    return "\n".join([*lines, *_prompt_lines(task), *(f"warning    {warning}" for warning in warnings)])


def open_some(manifest: Manifest) -> str:
    """How many of up to a hundred pictures, spread over the set, open. Raises DataError where none does."""
    from biomedclip.layouts import read_rgb

    step = max(1, len(manifest.rows) // OPENED)
    rows, bad = manifest.rows[::step][:OPENED], []
    for row in rows:
        try:
            read_rgb(manifest, row)
        except (DataError, OSError) as error:
            bad.append(str(error))
    if len(bad) == len(rows):
        raise DataError(manifest.root, f"none of {len(rows)} pictures opens", found=bad[0][:120])
    return f"{len(rows) - len(bad)} of {len(rows)} tried open" + (f"; first that does not: {bad[0]}" if bad else "")


def _prompt_lines(task: Task) -> list[str]:
    lines = []
    for name, prompt_set in task.prompt_sets.items():
        prompts = compile_prompts(task, name)
        lines.append(f"prompts    {name}, from {prompt_set.source}")
        lines += [f"           {label}: {' | '.join(texts)}" for label, texts in prompts.items()]
        if task.labels == "multi":
            lines += [f"           not {k}: {' | '.join(v)}" for k, v in compile_negatives(task, name).items()]
        lines += [f"warning    {name}: {warning}" for warning in list_warnings(prompts)]
    return lines
