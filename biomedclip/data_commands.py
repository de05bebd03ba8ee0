"""The commands of `biomedclip data`: articles and labelled sets to shards, and what one does with shards afterwards.

As thin as `cli.py`, of which they are a part: every command imports its work inside the function, prints results to
stdout and leaves errors to `cli.main`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biomedclip.annotate_commands import annotate_app
from biomedclip.stream_commands import stream_app

data_app = typer.Typer(
    help="Plan a build over PubMed Central, estimate it, and verify what was built.", no_args_is_help=True
)
data_app.add_typer(annotate_app, name="annotate")
data_app.add_typer(stream_app)


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


@data_app.command(
    "harvest", epilog="Example: biomedclip data harvest plan.parquet --source mirror/ --out raw/ --workers 4"
)
def data_harvest(
    plan: Annotated[Path, typer.Argument(help="A plan made by `biomedclip data plan`.")],
    source: Annotated[str, typer.Option("--source", help="Where its articles are: as for `data plan`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of units; the same command again goes on.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="languages, third_party, panels.mode, client.contact, …"),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Units at a time; the bytes are the same.")] = 1,
    engine: Annotated[str, typer.Option("--engine", help="local (processes) or ray (a cluster).")] = "local",
    unit_slice: Annotated[
        str, typer.Option("--unit-slice", metavar="I/N", help="Only every Nth unit, from I: for SLURM arrays.")
    ] = "0/1",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again for what failed for a reason that may have passed.")
    ] = False,
) -> None:
    """Fetch the articles of a plan and turn their figures into units of pairs; each is counted, kept or dropped."""
    from biomedclip.config import read_overrides
    from biomedclip.progress import terminal
    from data_builders.pmc.harvest import HarvestConfig, harvest, parse_slice

    config = read_overrides(overrides or (), HarvestConfig)
    facts = harvest(plan, source, out, config, engine=engine, workers=workers, unit_slice=parse_slice(unit_slice),
                    retry_failed=retry_failed, progress=terminal)  # fmt: skip
    if retry_failed:
        typer.echo(f"{out}: {facts.retried:,} units retried" if facts.retried else f"{out}: nothing is left to retry")
    typer.echo(f"{out}: {facts.finished:,} of {facts.units:,} units, {facts.articles:,} articles read")
    typer.echo(f"{out}: {facts.seen:,} seen, {facts.kept:,} kept")
    for reason, count in facts.dropped.items():
        typer.echo(f"  {count:>9,} dropped: {reason}")
    if facts.retryable:
        typer.echo(f"  {facts.retryable:>9,} of these failed on the way: run it again with --retry-failed")
    for name in facts.left_to_others:
        typer.echo(f"  {name} is being built by another process")


@data_app.command(
    "select", epilog="Example: biomedclip data select raw/ --out selection.parquet --set where='width >= 224'"
)
def data_select(
    raws: Annotated[list[Path], typer.Argument(help="Folders of units, made by `biomedclip data harvest`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The selection: one parquet file.")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file with the same keys.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="where, filters.min_side_px, against, dedup.captions, …"),
    ] = None,
) -> None:
    """Say of every harvested pair whether it is taken, and if not, why: filters, SQL, duplicates, contamination."""
    from biomedclip.config import load_config, read_overrides
    from biomedclip.progress import terminal
    from data_builders.select import select
    from data_builders.selection import SelectConfig, describe_selection

    given = overrides or ()
    resolved = read_overrides(given, SelectConfig) if config is None else load_config(config, SelectConfig, given)
    typer.echo(f"{out}: {describe_selection(select(raws, out, resolved, progress=terminal))}")


@data_app.command(
    "pack", epilog="Example: biomedclip data pack selection.parquet --out shards/pmc --set name=pmc --workers 4"
)
def data_pack(
    selection: Annotated[Path, typer.Argument(help="A selection made by `biomedclip data select`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The dataset folder; the same command again goes on.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="name (required), shards.max_samples, shuffle_seed, …"),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Shards at a time; the bytes are the same.")] = 1,
    engine: Annotated[str, typer.Option("--engine", help="local (processes) or ray (a cluster).")] = "local",
) -> None:
    """Write the selected pairs, globally shuffled, as shards with index, ledger, articles, card and checksums."""
    from biomedclip.config import read_overrides
    from biomedclip.progress import terminal
    from data_builders.pack import PackConfig, pack

    config = read_overrides(overrides or (), PackConfig)
    manifest = pack(selection, out, config, engine=engine, workers=workers, progress=terminal)
    ledger = manifest["ledger"]
    typer.echo(f"{out}: {ledger['seen']:,} seen, {ledger['kept']:,} kept in {len(manifest['shards']):,} shards")
    for reason, count in sorted(ledger["dropped"].items(), key=lambda item: -item[1]):
        typer.echo(f"  {count:>9,} dropped: {reason}")


@data_app.command("hashes", epilog="Example: biomedclip data hashes chest-xray/ --layout image_folder -o chest.parquet")
def data_hashes(
    source: Annotated[Path, typer.Argument(help="A dataset folder, or an evaluation set in any layout.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The hash file: parquet, or csv by its name.")],
    layout: Annotated[
        str | None, typer.Option("--layout", help="image_folder, csv, medmnist_npz, …; none for a dataset folder.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Options of the layout, as in a suite.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What the set is called; by default its own name.")] = None,
) -> None:
    """Write the hashes of an evaluation set, by which `data select` finds its pictures in training data."""
    from biomedclip.config import parse_yaml
    from biomedclip.layouts import read_manifest
    from data_builders.contamination import write_hashes

    options = {key: parse_yaml(value) for key, _, value in (given.partition("=") for given in overrides or ())}
    count = write_hashes(source if layout is None else read_manifest(layout, source, **options), out, name=name)
    typer.echo(f"{out}: hashes of {count:,} pictures")


@data_app.command("mesh", epilog="Example: biomedclip data mesh pubmed26n*.xml.gz --out mesh.parquet")
def data_mesh(
    files: Annotated[
        list[Path], typer.Argument(help="PubMed's baseline and update files or efetch answers, in order.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The table: one parquet file.")],
) -> None:
    """Read MeSH terms out of PubMed's XML into a table by PMID; later files win over earlier ones."""
    from biomedclip.progress import terminal
    from data_builders.pmc.mesh import write_mesh

    facts = write_mesh(files, out, progress=terminal)
    typer.echo(f"{out}: {facts.citations:,} citations in {facts.files:,} files, {facts.articles:,} articles")
    typer.echo(f"  {facts.deleted:>9,} deleted\n  {facts.without_pmid:>9,} left out: without_pmid")


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


@data_app.command(
    "compile", epilog="Example: biomedclip data compile bccd --root sample://bccd --out shards/bccd --set licence=all"
)
def data_compile(
    recipe: Annotated[
        str, typer.Argument(help="A recipe of the project (`biomedclip data recipes`), or a .yaml file.")
    ],
    root: Annotated[str, typer.Option("--root", help="The labelled set: its folder or file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The dataset folder to write.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="licence (required), source.splits, source.leakage.mode, …"),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes; the bytes are the same.")] = 1,
    names: Annotated[
        Path | None, typer.Option("--names", help="Also write key, sample id and group as csv; keep it to yourself.")
    ] = None,
) -> None:
    """Turn a labelled image set into image-text shards, by a recipe; see `biomedclip build` for a config file."""
    from biomedclip.config import read_overrides
    from biomedclip.progress import terminal
    from data_builders.build import BuildConfig, build, write_names
    from data_builders.labels.recipe import load_recipe
    from data_builders.labels.summary import compiled_lines

    source = {"kind": "labels", "recipe": recipe, "root": root}
    given = {"name": load_recipe(recipe).name, "source": source}
    config = read_overrides(overrides or (), BuildConfig, given=given)
    manifest = build(config, out, workers=workers, progress=terminal)
    if names is not None:
        typer.echo(f"{names}: {write_names(config, names):,} names")
    ledger = manifest["ledger"]
    typer.echo(f"{out}: {ledger['seen']:,} seen, {ledger['kept']:,} kept")
    for reason, count in sorted(ledger["dropped"].items(), key=lambda item: -item[1]):
        typer.echo(f"  {count:>7,} dropped: {reason}")
    typer.echo("\n".join(compiled_lines(manifest["provenance"])))


@data_app.command("lint", epilog="Example: biomedclip data lint bccd")
def data_lint(
    recipe: Annotated[str, typer.Argument(help="A recipe of the project, a .yaml file, or `all`.")],
    context: Annotated[str, typer.Option("--context", help="The text tower that will read: clip or bert.")] = "clip",
) -> None:
    """Say what is wrong with the words of a recipe, before an image is read; exit 2 where something is."""
    from data_builders.labels.lint import lint_recipe, read_context
    from data_builders.labels.recipe import load_recipe, recipe_names

    tower = read_context(context)
    recipes = [load_recipe(name) for name in (recipe_names() if recipe == "all" else [recipe])]
    problems = [problem for found in recipes for problem in lint_recipe(found, context=tower)]
    if problems:
        typer.echo("\n".join(problems))
        raise typer.Exit(2)
    typer.echo(f"{recipe}: nothing found in {sum(len(found.labels) for found in recipes):,} classes of {len(recipes)} "
               f"recipe{'s' if len(recipes) > 1 else ''}")  # fmt: skip


@data_app.command("recipes", epilog="Example: biomedclip data recipes")
def data_recipes() -> None:
    """List the recipes of the project: name, modality, kind, images, licence, access."""
    from data_builders.labels.summary import recipes_table

    typer.echo(recipes_table())


@data_app.command("sentences", epilog="Example: biomedclip data sentences articles.tar.gz --recipes --out words.txt")
def data_sentences(
    articles: Annotated[list[Path], typer.Argument(metavar="ARTICLES…", help="JATS files, folders or tars of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The text file to write, a sentence a line.")],
    recipes: Annotated[bool, typer.Option("--recipes", help="Add the class names of all recipes.")] = False,
) -> None:
    """Write the sentences of articles, for a text tower that learns from a sentence encoder (`task: text`)."""
    from data_builders.sentences import write_sentences

    counts = write_sentences(articles, out, recipes=recipes)
    typer.echo(f"{out}: {counts['sentences']:,} sentences")
    for reason, count in sorted(counts.items()):
        if reason != "sentences":
            typer.echo(f"  {count:>9,} {reason}")


@data_app.command("report", epilog="Example: biomedclip data report shards/pmc --out report.html")
def data_report(
    folder: Annotated[Path, typer.Argument(help="A dataset folder, or a folder of units.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page: one HTML file.")],
    seed: Annotated[int, typer.Option("--seed", help="Another one shows other samples.")] = 0,
) -> None:
    """Write what a dataset holds as one page: funnel, licences, modalities, sizes, captions, random samples."""
    from data_builders.data_report import write_data_report

    survey = write_data_report(folder, out, seed=seed)
    typer.echo(f"{out}: {survey.kept:,} samples out of {survey.seen:,} seen, of {survey.articles_kept:,} articles")


@data_app.command(
    "inspect", epilog="Example: biomedclip data inspect PMC999000007 --source sample://pmc --html it.html"
)
def data_inspect(
    article: Annotated[str, typer.Argument(help="PMC123 or PMC123.1.")],
    source: Annotated[
        str,
        typer.Option("--source", "-s", help="A copy of the bucket, oa_package, https URL, dataset or unit folder."),
    ],
    html: Annotated[Path | None, typer.Option("--html", help="Also write one page with the pictures.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="licence, third_party, panels.mode, … as in a build."),
    ] = None,
) -> None:
    """Show one article as the builder sees it: licence decision, each figure's file, panels and fate, and why."""
    from rich.console import Console

    from biomedclip.config import read_overrides
    from data_builders.pmc.inspection import InspectConfig
    from data_builders.pmc.inspection_folders import inspect_article
    from data_builders.pmc.inspection_views import print_inspection, write_inspection

    seen = inspect_article(article, source, read_overrides(overrides or (), InspectConfig))
    # The page first: a reader such as `| head` may end the command while it prints.
    page = write_inspection(html, seen) if html is not None else None
    print_inspection(seen, Console(highlight=False))
    if page is not None:
        typer.echo(f"\n{page}: the same with pictures")


@data_app.command(
    "export", epilog="Example: biomedclip data export shards/pmc --schema hf_parquet --out exports/parquet"
)
def data_export(
    folder: Annotated[Path, typer.Argument(help="A dataset folder.")],
    schema: Annotated[str, typer.Option("--schema", help="biomedica, open_clip_csv, hf_parquet or llava_jsonl.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new or empty folder.")],
    csv_separator: Annotated[
        str, typer.Option("--csv-separator", help="Of open_clip_csv; open_clip's default is a tab.")
    ] = "\t",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="max_samples, max_bytes of a file.")
    ] = None,
) -> None:
    """Write a dataset in the format of BIOMEDICA, open_clip's csv, `datasets` or LLaVA."""
    from biomedclip.config import check_config, read_overrides
    from biomedclip.progress import terminal
    from data_builders.exports.run import export
    from data_builders.exports.samples import ExportConfig

    config = read_overrides(overrides or (), ExportConfig).model_dump() | {"separator": csv_separator}
    facts = export(folder, out, schema, check_config(config, ExportConfig, "--csv-separator"), progress=terminal)
    splits = ", ".join(f"{split} {count:,}" for split, count in facts["splits"].items())
    typer.echo(f"{out}: {facts['samples']:,} samples as {schema} ({splits}), {facts['withdrawn']:,} taken back before")
    for reason, count in facts["dropped"].items():
        typer.echo(f"  {count:>9,} dropped: {reason}")


@data_app.command("purge", epilog="Example: biomedclip data purge shards/pmc --diff diff.parquet")
def data_purge(
    folder: Annotated[Path, typer.Argument(help="A dataset folder.")],
    diff: Annotated[Path | None, typer.Option("--diff", help="What `biomedclip data diff` wrote.")] = None,
    articles: Annotated[
        str | None, typer.Option("--articles", help="PMC ids, DOIs or keys with commas, or a file with one a line.")
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why, with --articles.")] = "retracted",
    stated: Annotated[str | None, typer.Option("--stated", help="Since when that is known, with --articles.")] = None,
) -> None:
    """Take samples back without rewriting shards: retracted, removed, or no longer under an admitted licence."""
    from biomedclip.errors import ConfigError
    from data_builders.purge import purge, purge_by_diff, read_withdrawals

    if diff is not None and articles is None:
        facts = purge_by_diff(folder, diff)
    elif articles is not None and diff is None:
        facts = purge(folder, read_withdrawals(articles, reason=reason, stated=stated))
    else:
        raise ConfigError("data purge", "needs --diff or --articles, one of them")
    typer.echo(f"{folder}: {facts.samples:,} samples taken back ({facts.withdrawn:,} in all, {facts.left:,} left)")
    for why, count in facts.reasons.items():
        typer.echo(f"  {count:>9,} {why}")
    for text, names in (("not in this dataset", facts.absent), ("out of date, harvest them again", facts.outdated)):
        if names:
            more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
            typer.echo(f"{text}: {', '.join(names[:10])}{more}")


@data_app.command("repair", epilog="Example: biomedclip data repair shards/pmc --selection selection.parquet")
def data_repair(
    folder: Annotated[Path, typer.Argument(help="A dataset folder or a folder of units.")],
    selection: Annotated[
        Path | None, typer.Option("--selection", help="What the dataset was packed from: needed for shards and tables.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Shards at a time.")] = 1,
) -> None:
    """Make missing or changed files again, byte for byte; exit 2 where something is left, with what to run."""
    from biomedclip.progress import terminal
    from data_builders.repair import repair

    found = repair(folder, selection=selection, workers=workers, progress=terminal)
    for name in found.repaired:
        typer.echo(f"{folder / name}: repaired")
    if found.left:
        typer.echo("\n".join(found.left))
        raise typer.Exit(2)
    if not found.damaged:
        typer.echo(f"{folder}: nothing is damaged")


@data_app.command("verify", epilog="Example: biomedclip data verify shards/pmc")
def data_verify(folder: Annotated[Path, typer.Argument(help="A dataset folder.")]) -> None:
    """Check every byte, key and count of a dataset folder; exit 2 where something is not as its manifest says."""
    from biomedclip.shards import DatasetFolder, verify

    problems = verify(folder)
    if problems:
        typer.echo("\n".join(problems))
        raise typer.Exit(2)
    typer.echo(f"{folder}: {len(DatasetFolder(folder)):,} samples, every byte and count as promised")
