"""The commands of `biomedclip data annotate`: embed, cluster, and apply what experts wrote.

As thin as `cli.py`: every command imports its work inside the function and prints its result to stdout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

annotate_app = typer.Typer(
    help="Label pictures by the cluster: embed them, group them, let experts name the groups, write the labels back.",
    epilog="Example: biomedclip data annotate embed shards/pmc --model runs/demo --out emb",
    no_args_is_help=True,
)
_Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; repeatable.")]


@annotate_app.command("embed", epilog="Example: biomedclip data annotate embed shards/pmc --model runs/demo --out emb")
def annotate_embed(
    folder: Annotated[Path, typer.Argument(help="A dataset folder.")],
    model: Annotated[str, typer.Option("--model", help="A run or checkpoint folder, or an open_clip name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the embeddings.")],
    overrides: _Set = None,
) -> None:
    """Embed every picture of a dataset with a model; interrupted, run it again and it goes on."""
    from biomedclip.annotation.config import EmbedConfig
    from biomedclip.annotation.embeddings import embed_folder
    from biomedclip.config import read_overrides
    from biomedclip.progress import terminal

    config = read_overrides(overrides or (), EmbedConfig, given={"model": model})
    facts = embed_folder(folder, out, config, progress=terminal).facts
    left = f", {len(facts['excluded']):,} could not be read" if facts["excluded"] else ""
    typer.echo(f"{out}: {facts['n']:,} embeddings of {facts['dim']} dimensions, {facts['dtype']}{left}")


@annotate_app.command("cluster", epilog="Example: biomedclip data annotate cluster emb --out clusters.csv")
def annotate_cluster(
    embeddings: Annotated[Path, typer.Argument(metavar="EMB", help="Folder of embeddings.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The table to fill, csv; contact sheets go beside it.")],
    dataset: Annotated[Path | None, typer.Option("--dataset", help="The dataset folder, where it has moved.")] = None,
    overrides: _Set = None,
) -> None:
    """Group embeddings; write a table for experts to fill and contact sheets of each cluster's central pictures."""
    from biomedclip.annotation.clusters import cluster_embeddings
    from biomedclip.annotation.config import ClusterConfig
    from biomedclip.config import read_overrides
    from biomedclip.progress import terminal

    config = read_overrides(overrides or (), ClusterConfig)
    facts = cluster_embeddings(embeddings, out, config, dataset=dataset, progress=terminal)
    sizes = f"{facts.smallest:,} to {facts.largest:,} each"
    typer.echo(f"{facts.table}: {facts.clusters:,} clusters of {facts.images:,} pictures, {sizes}")
    more = f" and {len(facts.sheets) - 1:,} more pages" if len(facts.sheets) > 1 else ""
    typer.echo(f"{facts.sheets[0]}: what they look like{more}")
    typer.echo("fill label, secondary and keep (yes or no), then run: biomedclip data annotate apply")


@annotate_app.command("apply", epilog="Example: biomedclip data annotate apply shards/pmc clusters.csv emb")
def annotate_apply(
    folder: Annotated[Path, typer.Argument(help="The dataset folder.")],
    paths: Annotated[
        list[Path], typer.Argument(metavar="TABLE... EMB", help="Each annotator's table, and the folder of embeddings.")
    ],
) -> None:
    """Write what the filled tables say of each cluster to all of its samples, by majority where there are several."""
    from biomedclip.annotation.labels import apply_labels, describe_applied
    from biomedclip.errors import ConfigError

    folders, tables = [path for path in paths if path.is_dir()], [path for path in paths if not path.is_dir()]
    if len(folders) != 1:
        raise ConfigError(
            "EMB", "must be one folder of embeddings", found=len(folders), todo="name it after the tables"
        )
    typer.echo("\n".join(describe_applied(apply_labels(folder, tables, folders[0]))))
