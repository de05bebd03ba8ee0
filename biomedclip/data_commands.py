"""The commands of `biomedclip data`: articles and labelled sets to shards, and what one does with shards afterwards.

As thin as `cli.py`, of which they are a part: every command imports its work inside the function, prints results to
stdout and leaves errors to `cli.main`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(
    help="Plan a build over PubMed Central, estimate it, and verify what was built.", no_args_is_help=True
)


@data_app.command("plan", epilog="Example: biomedclip data plan mirror/ --out plan.parquet --set licence=commercial")
def data_plan(
    source: Annotated[
        str, typer.Argument(help="A copy of the PMC bucket, a mirror of oa_package, an https URL, a table.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan: one parquet file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="licence (required), since, until, limit, …")
    ] = None,
    only: Annotated[
        Path | None, typer.Option("--only", help="A diff made by `biomedclip data diff`: plan its articles alone.")
    ] = None,
) -> None:
    """Freeze which article versions will be built: one parquet with every row planned, or left out for a reason."""
    from biomedclip.config import read_overrides
    from biomedclip.progress import terminal
    from data_builders.pmc.diff import changed_articles
    from data_builders.pmc.plan import plan_source
    from data_builders.pmc.plan_rules import PlanConfig

    articles = None if only is None else changed_articles(only)
    facts = plan_source(source, out, read_overrides(overrides or (), PlanConfig), only=articles, progress=terminal)
    typer.echo(f"{out}: {facts.seen:,} article versions seen, {facts.planned:,} planned in {facts.units:,} units")
    for reason, count in sorted(facts.excluded.items(), key=lambda item: -item[1]):
        typer.echo(f"  {count:>9,} left out: {reason}")


@data_app.command("estimate", epilog="Example: biomedclip data estimate plan.parquet --set requests_per_s=500")
def data_estimate(
    plan: Annotated[Path, typer.Argument(help="A plan made by `biomedclip data plan`.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A rate you have measured, such as cores=16.")
    ] = None,
) -> None:
    """Say articles, requests, bytes, hours and disk of a plan before anything is downloaded."""
    from biomedclip.config import read_overrides
    from data_builders.pmc.estimate import Rates, estimate_plan

    found = estimate_plan(plan, read_overrides(overrides or (), Rates))
    typer.echo(f"articles   {found.articles:,} in {found.units:,} units, up to {found.pictures:,} figures")
    typer.echo(f"requests   {found.requests:,}, {found.download_bytes / 1e9:,.1f} GB to download")
    typer.echo(f"disk       {found.disk_bytes / 1e9:,.1f} GB while building, {found.dataset_bytes / 1e9:,.1f} GB after")
    typer.echo(
        f"time       {found.hours:,.1f} h (line {found.network_hours:,.1f} h, one core {found.cpu_hours:,.1f} h)"
    )
    typer.echo("\n".join(f"  assumed  {line}" for line in found.assumptions))


@data_app.command("diff", epilog="Example: biomedclip data diff old.articles.parquet new.articles.parquet -o d.parquet")
def data_diff(
    old: Annotated[Path, typer.Argument(help="An inventory, an article table, or a copy of the bucket.")],
    new: Annotated[Path, typer.Argument(help="The same of a later day.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The diff: one parquet file.")],
) -> None:
    """Say which article versions are new, changed, withdrawn or under another licence between two days."""
    from data_builders.pmc.diff import diff_tables

    facts = diff_tables(old, new, out)
    for kind, count in facts.counts.items():
        typer.echo(f"{count:>9,} {kind}")
    if facts.tables == "inventories":
        typer.echo("inventories know no licences and retractions: compare article tables before a purge", err=True)


@data_app.command("verify", epilog="Example: biomedclip data verify shards/pmc")
def data_verify(folder: Annotated[Path, typer.Argument(help="A dataset folder.")]) -> None:
    """Check every byte, key and count of a dataset folder; exit 2 where something is not as its manifest says."""
    from biomedclip.shards import DatasetFolder, verify

    problems = verify(folder)
    if problems:
        typer.echo("\n".join(problems))
        raise typer.Exit(2)
    typer.echo(f"{folder}: {len(DatasetFolder(folder)):,} samples, every byte and count as promised")
