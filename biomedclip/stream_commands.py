"""The commands of `biomedclip data` that look at samples as training will: what augmentation does, what words they say.

As thin as `cli.py`: every command imports its work inside the function and prints its result to stdout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

stream_app = typer.Typer()


@stream_app.command(
    "augmentations", epilog="Example: biomedclip data augmentations shards/pmc --preset radiology --out sheet.html"
)
def data_augmentations(
    source: Annotated[
        Path | None, typer.Argument(help="A dataset folder, a folder of pictures or a picture; none lists the presets.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The sheet: .html or .png.")] = Path("augmentations.html"),
    preset: Annotated[
        str, typer.Option("--preset", help="auto (by each sample's modality), a preset's name, or a .yaml file.")
    ] = "auto",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Pictures to show.")] = 8,
    views: Annotated[int, typer.Option("--views", min=1, help="Views of each.")] = 6,
    size: Annotated[int, typer.Option("--size", min=16, help="Side of a view in pixels: the model's.")] = 224,
    seed: Annotated[int, typer.Option("--seed", help="Of the choice of pictures and of the views.")] = 0,
) -> None:
    """Show what an augmentation preset does to real samples; without any, list the presets and their settings."""
    from biomedclip.stream.presets import PRESETS, describe_preset

    if source is None:
        for name in sorted(PRESETS):
            settings = ", ".join(f"{key} {value}" for key, value in describe_preset(name).items())
            typer.echo(f"{name:<13} {settings or 'nothing: the pixels of evaluation'}")
        return
    from biomedclip.progress import terminal
    from biomedclip.stream.augment_sheet import write_sheet

    sheet = write_sheet(source, out, preset=preset, samples=samples, views=views, size_px=size, seed=seed,
                        progress=terminal)  # fmt: skip
    typer.echo(f"{sheet.path}: {sheet.rows} pictures, {views} views of each")
    for reason in sheet.unreadable:
        typer.echo(f"left out: {reason}", err=True)


@stream_app.command("entries", epilog="Example: biomedclip data entries shards/pmc --terms mesh --out entries.parquet")
def data_entries(
    folders: Annotated[list[Path], typer.Argument(metavar="SET...", help="Dataset folders.")],
    terms: Annotated[
        list[str],
        typer.Option("--terms", help="mesh (of the sets' articles), a .txt, or a .csv or .parquet; repeatable."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The table of entries: one parquet file.")],
    tail: Annotated[
        float, typer.Option("--tail", min=0.0001, max=1, help="Share of matches that rare entries have: sets t.")
    ] = 0.06,
    split: Annotated[str, typer.Option("--split", help="Whose captions are counted.")] = "train",
    case: Annotated[bool, typer.Option("--case", help="Capitals matter.")] = False,
) -> None:
    """Count how many captions say each term, for MetaCLIP's balancing, and forecast what an epoch would keep."""
    from biomedclip.progress import terminal
    from biomedclip.stream.metaclip import count_entries

    found = count_entries(folders, terms, out, tail=tail, lower=not case, split=split, progress=terminal)
    typer.echo(f"{out}: {found.entries:,} entries, {found.said:,} of them said; tail {tail:g} is t = {found.most:,}")
    for forecast in found.forecasts:
        typer.echo(
            f"  {forecast.dataset}: an epoch keeps {forecast.kept * forecast.captions:,.0f} of {forecast.captions:,} "
            f"captions ({forecast.kept:.1%}); {forecast.unmatched:.1%} say no entry and are never kept"
        )
    typer.echo(f"in the train config: keep: {{metaclip: {{entries: {out}, tail: {tail:g}}}}}")
