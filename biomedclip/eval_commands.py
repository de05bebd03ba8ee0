"""The commands of `biomedclip eval`: run suites or a folder of pictures, list and check tasks, compare, report.

As thin as `cli.py`: every command imports its work inside the function and prints its result to stdout. `tasks` and
`check` need no torch; `check` says what is wrong with data and prompts before a GPU is paid for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from biomedclip.errors import ConfigError

eval_app = typer.Typer(
    help="Suites of tasks: run, tasks, check, compare, report.", epilog="Example: biomedclip eval tasks",
    no_args_is_help=True,
)  # fmt: skip
ModelOption = Annotated[str, typer.Option("--model", "-m", help="A run folder, checkpoint, zoo or open_clip name.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder of results; nothing in it is overwritten.")]
SuiteOption = Annotated[
    str | None,
    typer.Option("--suite", "-s", help="All tasks of this suite (see `eval tasks`), or a .yaml of your own."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Any key of an evaluation config, such as calibration=true.")
]
ResultsArgument = Annotated[Path, typer.Argument(metavar="RESULTS", help="A folder that `--out` named.")]


@eval_app.command("run", epilog="Example: biomedclip eval run -m runs/demo --suite microscopy --data-root ~/data")
def eval_run(
    model: ModelOption,
    out: OutOption = Path("results"),
    suite: SuiteOption = None,
    task: Annotated[list[str] | None, typer.Option("--task", "-t", help="One task; may be repeated.")] = None,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", "-d", help="The data of task NAME is in DATA_ROOT/NAME.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Your own pictures: one sub-folder a class, named as the class.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option("--template", help="With --images: a prompt with {} for the class name.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option("--scores", help="No model is run: a .csv or .npz of scores or predictions of one task."),
    ] = None,
    given: Annotated[
        str | None, typer.Option("--given", help="What --scores holds: cosines, probabilities, logits or predictions.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Also write report.html and .md here.")] = None,
    overrides: SetOption = None,
) -> None:
    """Score a model on a suite, on tasks, on your own folder of pictures, or measure a file of scores.

    Tasks whose data is not in DATA_ROOT are skipped, listed at the end, and stand in the report's appendix. With
    --scores the model is only a name: the figures that the task lists for it are judged reproduced or not.
    """
    from biomedclip.config import read_overrides
    from biomedclip.evaluation.config import EvaluateConfig
    from biomedclip.evaluation.selection import choose_tasks, find_data, folder_task, is_file
    from biomedclip.progress import terminal

    if suite == "medvqa":
        from biomedclip.evaluation.vqa.run import run_suite

        return typer.echo(run_suite(data_root, model, out, progress=terminal))

    if scores is not None:
        if images or data_root or not (task or suite):
            raise ConfigError("--scores", "goes with one --task", todo="leave out --images and --data-root")
        return _measure_given(model, out, suite, task or (), scores, given, report, overrides or ())
    skipped: dict[str, str] = {}
    if images is not None:
        if suite or task or data_root:
            raise ConfigError("--images", "stands alone", todo="leave out --suite, --task and --data-root")
        own = folder_task(images, template or ())
        found, extra = {own.name: str(images)}, {own.name: own}
    else:
        if template:
            raise ConfigError("--template", "goes with --images; a task's prompts are its own", todo="name --images")
        found, skipped = find_data(suite, task or (), data_root)
        extra = {one.name: one for one in choose_tasks(suite, ())} if is_file(suite) else {}
    settings = read_overrides(
        overrides or (), EvaluateConfig, given={"model": model, "tasks": list(found), "data": found}
    )
    from biomedclip.evaluation.evaluate import evaluate
    from biomedclip.evaluation.report import reproduction_table, results_table
    from biomedclip.evaluation.results import write_skipped

    results = evaluate(settings, out, progress=terminal, tasks=extra)
    write_skipped(out, skipped)
    typer.echo(results_table(results))
    if judged := reproduction_table(results):
        typer.echo(judged)
    for name, reason in skipped.items():
        typer.echo(f"skipped    {name}: {reason}")
    if report is not None:
        _write(out, report)


def _measure_given(
    model: str, out: Path, suite: str | None, names: Sequence[str], scores: Path, kind: str | None,
    report: Path | None, overrides: Sequence[str],
) -> None:  # fmt: skip
    from typing import get_args

    from biomedclip.config import read_overrides
    from biomedclip.evaluation.config import EvaluateConfig
    from biomedclip.evaluation.given import evaluate_given
    from biomedclip.evaluation.report import reproduction_table, results_table
    from biomedclip.evaluation.score_files import Kind
    from biomedclip.evaluation.selection import choose_tasks

    if kind is not None and kind not in get_args(Kind):
        raise ConfigError("--given", "is not known", found=kind, todo=f"one of {', '.join(get_args(Kind))}")
    tasks = {one.name: one for one in choose_tasks(suite, names)}
    settings = read_overrides(
        overrides,
        EvaluateConfig,
        given={"model": model, "tasks": list(tasks), "data": dict.fromkeys(tasks, str(scores))},
    )
    result = evaluate_given(settings, out, kind=kind, tasks=tasks)  # type: ignore[arg-type]
    typer.echo(results_table([result]))
    typer.echo(reproduction_table([result]))
    if report is not None:
        _write(out, report)


@eval_app.command("tasks", epilog="Example: biomedclip eval tasks --suite pathology")
def eval_tasks(suite: SuiteOption = None) -> None:
    """List tasks: suite, kind, classes, expected size, whether counts are verified, licence."""
    from biomedclip.evaluation.selection import choose_tasks, tasks_table

    typer.echo(tasks_table(choose_tasks(suite, ())))


@eval_app.command("check", epilog="Example: biomedclip eval check bccd --data-root ~/data")
def eval_check(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Name of a task (see `eval tasks`).")],
    data_root: Annotated[Path, typer.Option("--data-root", "-d", help="The data is in DATA_ROOT/TASK.")],
) -> None:
    """Check a task's files, counts, licence and prompts without a model."""
    from biomedclip.evaluation.check import describe_task

    typer.echo(describe_task(task, data_root))


@eval_app.command("compare", epilog="Example: biomedclip eval compare results/before results/after")
def eval_compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Results of the first model.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Results of the second model.")],
    resamples: Annotated[int, typer.Option("--resamples", min=100, help="Paired bootstrap resamples.")] = 2000,
) -> None:
    """Say what changed from A to B on the same samples, and whether it is more than noise (Holm-adjusted)."""
    from biomedclip.evaluation.compare import compare_results, comparison_table
    from biomedclip.evaluation.results import read_results

    typer.echo(comparison_table(compare_results(read_results(first), read_results(second), resamples=resamples)))


@eval_app.command("report", epilog="Example: biomedclip eval report results --out report")
def eval_report(
    results: ResultsArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of report.html and report.md.")] = Path("report"),
) -> None:
    """Write one self-contained HTML page and a Markdown file from all results in a folder."""
    _write(results, out)


def _write(results: Path, out: Path) -> None:
    from biomedclip.evaluation.overview import write_overview

    for path in write_overview(results, out):
        typer.echo(f"wrote {path}")
