"""`biomedclip wise`, `forgetting` and `teach`: what is done around continual pretraining, before and after a run.

A thin door like the rest of the command line: each command imports its work inside the function.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_continual_commands(app: typer.Typer) -> None:
    """Register the commands of this module with the command line."""
    app.command(epilog="Example: biomedclip wise runs/mri --alpha 0.5 --out runs/mri/wise-0.5")(wise)
    app.command(epilog="Example: biomedclip forgetting runs/histology runs/mri")(forgetting)
    app.command(
        epilog="Example: biomedclip teach configs/train/bmca-cf.yaml --teacher ViT-L-14/openai --name vit-l --views 4"
    )(teach)


def wise(
    run: Annotated[Path, typer.Argument(help="A run folder, whose end is interpolated with its start.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the weights, in open_clip's format.")],
    alpha: Annotated[float, typer.Option("--alpha", help="0 is the start, 1 the end.")] = 0.5,
    start: Annotated[Path | None, typer.Option("--start", help="Other starting weights than the run's own.")] = None,
) -> None:
    """Interpolate a run's weights with those it started from (WiSE-FT): less new, more of the old."""
    from biomedclip.training.wise import interpolate_folders

    interpolate_folders(start or run / "start", run, alpha, out)
    typer.echo(f"{out}: {1 - alpha:g} x start + {alpha:g} x end, in open_clip's format")


def forgetting(
    runs: Annotated[list[Path], typer.Argument(help="Run folders in the order in which they were trained.")],
) -> None:
    """Show what each run of a chain taught and what later runs took away, from their validations."""
    from biomedclip.training.forgetting import (
        average_value,
        backward_transfer,
        forgetting_matrix,
        forgetting_measure,
        matrix_table,
    )

    names, matrix = forgetting_matrix(runs)
    typer.echo(matrix_table(names, matrix))
    typer.echo(f"\naverage at the end  {average_value(matrix):.3f}")
    if len(names) > 1:
        typer.echo(f"backward transfer   {backward_transfer(matrix):+.3f}")
        typer.echo(f"forgetting          {forgetting_measure(matrix):.3f}")


def teach(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The train config whose sources are embedded.")],
    teacher: Annotated[str, typer.Option("--teacher", help="Any model that `biomedclip.load` takes.")],
    name: Annotated[str, typer.Option("--name", help="What the config calls it: continual.stored.names.")],
    views: Annotated[int, typer.Option("--views", min=1, help="Augmentations stored of each sample.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; by default beside the shards.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the config; repeatable.")
    ] = None,
) -> None:
    """Store a teacher's embeddings beside the shards, so that training learns from it without running it."""
    from biomedclip.config import load_config
    from biomedclip.progress import terminal
    from biomedclip.training.config import TrainConfig
    from biomedclip.training.continual.stored import teach as run

    settings = load_config(config, TrainConfig, overrides or ())
    paths = run(settings, teacher, name=name, views=views, folder=out, progress=terminal)
    typer.echo(f"{len(paths)} files: {paths[0]} …")
