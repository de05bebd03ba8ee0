"""What can be asked about training runs: before one, what it would read; after one, which step saw what.

As thin as `cli.py`, of which this is a part: every command imports its work inside the function.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biomedclip.errors import ConfigError

if TYPE_CHECKING:
    from biomedclip.training.config import TrainConfig

runs_app = typer.Typer(help="Ask a training run which samples it saw, and when.", no_args_is_help=True)


@runs_app.callback()
def _runs() -> None:
    """Keeps `seen` a command of its own: typer would take the place of a single one."""


@runs_app.command("seen", epilog="Example: biomedclip runs seen runs/first --article PMC7096069")
def runs_seen(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `biomedclip train` wrote.")],
    step: Annotated[int | None, typer.Option("--step", min=0, help="List the samples of this step.")] = None,
    article: Annotated[str | None, typer.Option("--article", help="List the steps that saw this article.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="List the steps that saw this sample.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Say which steps saw an article or a sample, or which samples a step saw, from the run's plan and ledger."""
    from dataclasses import asdict

    from biomedclip.training.seen import seen_at, seen_of

    if sum(asked is not None for asked in (step, article, key)) != 1:
        raise ConfigError("runs seen", "needs one of --step, --article and --key", todo="say which")
    found = seen_at(run, step) if step is not None else seen_of(run, article=article, key=key)
    for one in found:
        if as_json:
            typer.echo(json.dumps(asdict(one), ensure_ascii=False))
            continue
        instead = f"  instead of {one.instead_of} ({one.reason})" if one.instead_of else ""
        typer.echo(f"step {one.step:>8}  slot {one.slot:>5}  epoch {one.epoch:>3}  {one.source}  {one.key}"
                   f"  {one.article or '-'}{instead}")  # fmt: skip
    if not as_json:
        steps = len({one.step for one in found})
        typer.echo(f"{len(found):,} samples in {steps:,} steps" if found else "never seen", err=True)


def print_forecast(config: TrainConfig, out: Path | None, *, samples_s: float | None, as_json: bool) -> None:
    """Print what a run would read, as a table or as JSON."""
    from biomedclip.training.preflight import forecast_run

    found = forecast_run(config, samples_s=samples_s, out=out)
    if as_json:
        typer.echo(json.dumps(found.as_json(), ensure_ascii=False))
        return
    from biomedclip.training.preflight_table import forecast_text

    typer.echo(forecast_text(found))


def read_task(config: Path) -> str:
    """What a train config trains: its first key `task`, or '' for pretraining."""
    from biomedclip.config import read_yaml

    values = read_yaml(config)
    return str(values.get("task", "")) if isinstance(values, dict) else ""


def train_text_tower(config: Path, out: Path | None, overrides: Sequence[str], *, resume: bool, show: bool) -> None:
    """Train the text tower of a config and say how near it came to its teacher; `show` prints the config instead."""
    from biomedclip.config import load_config
    from biomedclip.training.text.config import TextTrainConfig

    settings = load_config(config, TextTrainConfig, overrides)
    if show:
        from biomedclip.runs import dump_config

        return typer.echo(dump_config(settings), nl=False)
    if out is None:
        raise ConfigError("--out", "is missing", todo="name the folder of the run: --out runs/text")
    from biomedclip.progress import terminal
    from biomedclip.training.text.train import train_text

    found = train_text(settings, out, resume=resume, progress=terminal)
    typer.echo(f"{found.final}: cosine to the teacher {found.cosine:.3f}, its nearest neighbour found in "
               f"{found.neighbours:.1%} of {found.held_out:,} held-out sentences")  # fmt: skip
