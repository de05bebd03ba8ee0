"""The commands of `biomedclip models`: list, look up, download, check, convert, export and describe models.

As thin as `cli.py`: every command imports its work inside the function and prints its result to stdout. `list` and
`info` need no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from biomedclip.models.training_record import TrainingRecord

models_app = typer.Typer(
    help="Released models and architectures: list, info, pull, verify, convert, export, calibrate, card.",
    epilog="Example: biomedclip models",
    invoke_without_command=True,
)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A model of the zoo, an alias, or its Hub id.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-pickle", help="Open a pickle that needs more than tensors: runs the code in it.")
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Use the local cache only.")]


@models_app.callback()
def _list_by_default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        models_list()


@models_app.command("list", epilog="Example: biomedclip models list --domain pathology")
def models_list(
    domain: Annotated[str | None, typer.Option("--domain", help="Only models of this domain.")] = None,
) -> None:
    """List released models with licence, access and domains, and the architectures shipped here."""
    from biomedclip.models.catalog import models_table

    typer.echo(models_table(domain))


@models_app.command("info", epilog="Example: biomedclip models info biomedclip")
def models_info(name: NameArgument) -> None:
    """Print a model's card: source, licence, preprocessing, tokenizer, authors' numbers, what is unverified."""
    from biomedclip.models.cards import released_card
    from biomedclip.models.zoo import require_model

    text = released_card(require_model(name))
    typer.echo(text.split("---\n", 2)[2].strip())


@models_app.command("pull", epilog="Example: biomedclip models pull biomedclip")
def models_pull(
    name: NameArgument,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also copy the files to this folder.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Another commit than the pinned one.")] = None,
) -> None:
    """Download all files of a model, companions included, and check what is pinned; afterwards it loads offline."""
    from biomedclip.models.hub import copy_file, fetch
    from biomedclip.models.zoo import require_model

    model = require_model(name)
    for file in model.files:
        path = fetch(model, file, revision=revision)
        if path is None:
            typer.echo(f"{file.paths[0]}: not published, not needed")
            continue
        checked = "sha256 as pinned" if file.sha256 and revision is None else "not pinned"
        if out is not None:
            path = copy_file(path, out / Path(file.paths[0]).name)
        typer.echo(f"{path}: {path.stat().st_size:,} bytes, {checked}")


@models_app.command("verify", epilog="Example: biomedclip models verify biomedclip")
def models_verify(
    target: Annotated[str, typer.Argument(metavar="NAME|PATH", help="A model, an export folder or a weights file.")],
    model: Annotated[str | None, typer.Option("--model", help="Of which model a file is.")] = None,
    offline: OfflineOption = False,
    trust_pickle: TrustOption = False,
) -> None:
    """Check files against what is pinned, and every key and shape against the model; exit 2 where one fails."""
    from biomedclip.errors import CheckpointError
    from biomedclip.models.load import Origin, find_parts
    from biomedclip.models.verify import verify_parts

    parts = find_parts(model or target, local_files_only=offline, checkpoint=target if model else None)
    if isinstance(parts, Origin):
        raise CheckpointError(target, "is a model of open_clip, which checks its own files", todo="load it")
    checks = verify_parts(parts, trust_pickle=trust_pickle)
    for check in checks:
        word = {True: "ok", False: "FAILED", None: "not pinned"}[check.passed]
        typer.echo(f"{word:<10} {check.what}: {check.found}")
    if any(check.passed is False for check in checks):
        raise typer.Exit(2)


@models_app.command("convert", epilog="Example: biomedclip models convert unimed-clip-b16 model.pt --out unimed")
def models_convert(
    name: NameArgument,
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE", help="Its published file, or a folder of files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    trust_pickle: TrustOption = False,
) -> None:
    """Turn a published checkpoint into a folder of safetensors that loads without pickles, optimizer or renaming."""
    from biomedclip.models.export import export_released
    from biomedclip.models.load import load_parts

    parts, (model, _, _) = load_parts(name, checkpoint=checkpoint, trust_pickle=trust_pickle)
    export_released(model, parts, out)
    typer.echo(str(model.load_report))
    typer.echo(f"{out}: loads with biomedclip.load({str(out)!r})")


@models_app.command("export", epilog="Example: biomedclip models export runs/demo --format transformers --out hf")
def models_export(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="Whatever `biomedclip.load` takes.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    form: Annotated[Literal["open_clip", "transformers"], typer.Option("--format", help="Who shall read it.")],
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", help="The model's file, where it is here.")] = None,
    push: Annotated[str | None, typer.Option("--push", metavar="REPO", help="Also upload it to this Hub id.")] = None,
    private: Annotated[bool, typer.Option("--private", help="The repository is private.")] = False,
    half: Annotated[
        bool, typer.Option("--half", help="Store matrices in half precision; they load as float32.")
    ] = False,
    trust_pickle: TrustOption = False,
) -> None:
    """Write a model as open_clip or transformers read it, and optionally push it to the Hub."""
    from biomedclip.errors import ConfigError
    from biomedclip.models.export import export_released
    from biomedclip.models.load import load_parts
    from biomedclip.models.push import check_may_push, push_folder
    from biomedclip.models.transformers_export import export_transformers

    if half and form == "transformers":
        raise ConfigError("--half", "goes with open_clip's format", todo="leave it out, or --format open_clip")
    options: dict[str, Any] = {} if checkpoint is None else {"checkpoint": checkpoint}
    parts, (model, _, _) = load_parts(source, trust_pickle=trust_pickle, **options)
    if push:
        check_may_push(parts, private=private)
    if form == "transformers":
        export_transformers(model, parts, out)
    else:
        export_released(model, parts, out, half=half)
    typer.echo(f"{out}: {form} format")
    if push:
        typer.echo(push_folder(out, push, private=private))


@models_app.command(
    "calibrate", epilog="Example: biomedclip models calibrate runs/demo --task bccd=data/bccd --data shards/bccd"
)
def models_calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Whatever `biomedclip.load` takes.")],
    tasks: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME=FOLDER", help="A classification task and its data.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option("--data", help="A dataset folder of a training domain; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write, by default that of the weights.")
    ] = None,
    accuracy: Annotated[
        float, typer.Option("--accuracy", min=0.5, max=1, help="Share of right answers among the sure ones.")
    ] = 0.98,
    quantile: Annotated[
        float, typer.Option("--quantile", min=0.5, max=0.9999, help="Share of validation images inside of the scope.")
    ] = 0.99,
) -> None:
    """Fit temperature, uncertainty threshold and scope on validation splits; test splits are never read."""
    from biomedclip.errors import CheckpointError, ConfigError
    from biomedclip.evaluation.fit_calibration import FitOptions, describe_fit, fit_calibration
    from biomedclip.models.load import load
    from biomedclip.progress import terminal

    given = dict(entry.partition("=")[::2] for entry in tasks or ())
    for name, folder in given.items():
        if not folder:
            raise ConfigError(f"--task {name}", "does not say where its data lies", todo=f"--task {name}=FOLDER")
    loaded = load(model)
    report: Any = loaded[0].load_report
    hashes = report.hashes()
    if len(hashes) != 1:
        raise CheckpointError(model, "is not one file of weights, which a calibration is for", found=len(hashes),
                              todo="export it first: biomedclip models export")  # fmt: skip
    weights = Path(next(iter(hashes)))
    found = fit_calibration(
        loaded, out or weights.parent, tasks=given, data=data or (), weights_sha256=hashes[str(weights)],
        progress=terminal, options=FitOptions(accuracy=accuracy, quantile=quantile),
    )  # fmt: skip
    typer.echo(describe_fit(found))


@models_app.command("card", epilog="Example: biomedclip models card runs/demo --notes notes.yaml --results results")
def models_card(
    target: Annotated[
        str, typer.Argument(metavar="NAME|RUN|JSON", help="A model of the zoo, a run (or its ema/), a record of one.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write; of a run, .json writes its record.")
    ] = None,
    notes: Annotated[
        Path | None, typer.Option("--notes", help="Of a run: YAML with intended_use, limitations, …")
    ] = None,
    results: Annotated[
        Path | None, typer.Option("--results", help="Of a run: folder of `biomedclip evaluate`.")
    ] = None,
    before: Annotated[
        Path | None, typer.Option("--before", help="Of a run: results of the weights it started from.")
    ] = None,
    scored: Annotated[
        str | None, typer.Option("--model", help="Of a run: the copy of its weights that was scored, if not its own.")
    ] = None,
) -> None:
    """Write a model's card; of a run only where nothing is missing: notes, data licences, results with intervals."""
    from biomedclip.files import write_json, write_text
    from biomedclip.models.calibration import CALIBRATION_FILE, read_calibration
    from biomedclip.models.own_cards import record_card
    from biomedclip.models.training_record import read_record

    if Path(target).is_dir():
        record = _collect_record(Path(target), notes, results, before, scored)
        if out is not None and out.suffix == ".json":
            write_json(out, record.model_dump(mode="json"))
            return typer.echo(str(out))
        text = record_card(record)
    elif target.endswith(".json"):
        beside = Path(target).parent
        known = read_calibration(beside) if (beside / CALIBRATION_FILE).is_file() else None
        text = record_card(read_record(target), calibration=known)
    else:
        text = _write_zoo_card(target)
    if out is None:
        return typer.echo(text, nl=False)
    write_text(out, text)
    typer.echo(str(out))


def _write_zoo_card(name: str) -> str:
    from biomedclip.models.cards import released_card
    from biomedclip.models.zoo import require_model

    return released_card(require_model(name))


def _collect_record(
    run: Path, notes: Path | None, results: Path | None, before: Path | None, scored: str | None
) -> TrainingRecord:
    from biomedclip.config import load_config
    from biomedclip.errors import ConfigError
    from biomedclip.evaluation.embed import fingerprint
    from biomedclip.models.collect_record import check_copy, collect_record, describe_weights, find_start, read_records
    from biomedclip.models.export import WEIGHTS_FILE
    from biomedclip.models.load import find_export, load
    from biomedclip.models.training_record import CardNotes

    if notes is None:
        keys = ", ".join(CardNotes.model_fields)
        raise ConfigError(
            "--notes", "is missing: a YAML of what no file of the run knows", todo=f"with the keys {keys}"
        )
    known = load_config(notes, CardNotes)
    if results is None:
        raise ConfigError("--results", "is missing: a card has numbers only from result files",
                          todo=f"run: biomedclip evaluate CONFIG -o results --set model={scored or run}")  # fmt: skip
    model, preprocess, tokenizer = load(scored or run)
    report: Any = model.load_report
    file = Path(next(iter(report.hashes())))
    if scored is not None:
        check_copy(find_export(run) / WEIGHTS_FILE, file)
    weights = describe_weights(
        file, fingerprint=fingerprint(model), parameters=sum(p.numel() for p in model.parameters()),
        preprocess=str(preprocess), context=tokenizer.context_length,  # type: ignore[attr-defined]
    )  # fmt: skip
    first = None if before is None else fingerprint(load(find_start(run))[0])
    return collect_record(
        run, known, read_records(results), weights=weights, start_fingerprint=first,
        before=None if before is None else read_records(before), name=scored,
    )  # fmt: skip
