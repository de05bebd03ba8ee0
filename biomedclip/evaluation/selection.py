"""Which tasks a command means and where their data lies: suites, names, and a user's own folder of pictures.

Reads names and a data root; yields tasks and {task: folder}. The data of a task is in DATA_ROOT/<task name>; where it
is not, the task is skipped with the reason, because nobody has all sets, and a list of what is missing beats a stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from biomedclip.config import check_config
from biomedclip.errors import ConfigError, DataError
from biomedclip.evaluation.tasks import Task, find_task, load_tasks, parse_suite


def is_file(suite: str | None) -> bool:
    """Whether `--suite` names a suite file of the user's own."""
    return suite is not None and suite.endswith((".yaml", ".yml"))


def choose_tasks(suite: str | None, names: Sequence[str]) -> list[Task]:
    """The tasks of a suite, or those named, or all. Raises ConfigError for an unknown suite or task.

    A suite that ends in `.yaml` is a file of tasks, written as those in `suites/` are.
    """
    if suite is not None and is_file(suite):
        try:
            own = parse_suite(Path(suite).read_text(encoding="utf-8"), suite)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(suite, "cannot be read", found=str(error)[:80]) from None
        if unknown := [name for name in names if name not in own]:
            raise ConfigError(f"task {unknown[0]}", f"is not in {suite}", todo=f"one of {', '.join(own)}")
        return [own[name] for name in names] if names else list(own.values())
    if names:
        return [find_task(name) for name in names]
    suites = sorted({task.suite for task in load_tasks().values()})
    if suite is not None and suite not in suites:
        raise ConfigError(f"suite {suite}", "is not known", todo=f"one of {', '.join(suites)}")
    return [task for task in load_tasks().values() if suite in (None, task.suite)]


def find_data(suite: str | None, names: Sequence[str], root: Path | None) -> tuple[dict[str, str], dict[str, str]]:
    """({task: folder}, {task: why it is skipped}). Raises ConfigError where nothing is left, or a named task is not."""
    if root is None:
        raise ConfigError("--data-root", "is missing", todo="name the folder that holds one folder a task")
    if not root.is_dir():
        raise ConfigError("--data-root", "there is no such folder", found=str(root))
    tasks = choose_tasks(suite, names)
    found = {task.name: str(root / task.name) for task in tasks if (root / task.name).exists()}
    skipped = {task.name: f"no data in {root / task.name}" for task in tasks if task.name not in found}
    if names and skipped:
        raise ConfigError("--data-root", f"has no data of {', '.join(skipped)}", found=str(root),
                          todo=f"put it in {root / next(iter(skipped))}")  # fmt: skip
    if not found:
        raise ConfigError("--data-root", "has no folder named as a task of the suite", found=str(root),
                          todo=f"such as {root / tasks[0].name}")  # fmt: skip
    return found, skipped


def folder_task(images: Path, templates: Sequence[str]) -> Task:
    """A task of a folder of class folders, the folders' names being the classes.

    Underscores are read as spaces. Raises ConfigError for no template, DataError for fewer than two class folders.
    """
    if not templates:
        raise ConfigError("--template", "is missing", todo='say how a class is described: --template "a photo of {}"')
    if not images.is_dir():
        raise ConfigError("--images", "there is no such folder", found=str(images))
    labels = sorted(entry.name for entry in images.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(labels) < 2:
        raise DataError(images, "needs two or more class folders", found=", ".join(labels) or "none")
    name = "".join(c if c.isalnum() else "_" for c in images.resolve().name.lower()).strip("_") or "folder"
    facts = {
        "name": f"own_{name}", "suite": "own", "title": f"Own pictures: {images.name}", "modality": "own pictures",
        "kind": "zero_shot", "layout": {"type": "image_folder", "split": "test"}, "split": "test",
        "classes": [{"label": label, "name": label.replace("_", " ")} for label in labels],
        "prompt_sets": {"default": {"source": "the command line", "templates": list(templates)}},
        "metrics": {"primary": "balanced_accuracy",
                    "also": ["accuracy", "auroc", "auprc", "macro_f1", "mcc", "ece", "brier", "nll"]},
        "bootstrap": {"by": "class"}, "licence": "the owner's", "citation": "own pictures",
        "contamination": "Not known. Pictures of one patient in several files are taken for independent.",
    }  # fmt: skip
    return check_config(facts, Task, "--images")


def tasks_table(tasks: Sequence[Task]) -> str:
    """Aligned text, one row a task."""
    rows = [("task", "suite", "kind", "classes", "expected", "counts", "licence")]
    for task in tasks:
        kind = task.kind if task.labels == "single" else f"{task.kind}, {task.labels}"
        kind += ", slides" if task.pool else ""
        n = task.expect.n or sum(task.expect.classes.values())
        checked = "verified" if task.verified and task.expect.verified and n else "unverified"
        rows.append((task.name, task.suite, kind.replace("zero_shot", "zero-shot"), str(len(task.classes) or "-"),
                     f"{n:,}" if n else "-", checked, task.licence[:40]))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"{len(tasks)} tasks"])
