"""The commands of every day: classify pictures, search figures, explain a label, open the page.

As thin as `cli.py`: the work is in `biomedclip.app`. They need no config file, because a picture and a few words are
all that a user has at hand; the bundled model `biomedclip-mini` answers without a network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biomedclip.errors import ConfigError

MINI = "biomedclip-mini"

ModelOption = Annotated[str, typer.Option("--model", "-m", help="What `biomedclip.load` takes; mini comes with us.")]
WindowOption = Annotated[
    str | None, typer.Option("--window", help="Deep grey as 8 bits: lung, bone, …, CENTRE,WIDTH, or percentile.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")]
FastOption = Annotated[
    bool, typer.Option("--fast", help="Decode JPEGs at reduced size: faster, pixels differ a little.")
]


def add_app_commands(app: typer.Typer) -> None:
    """Put `classify`, `search`, `explain` and `app` beside the other commands."""
    app.command("classify", epilog='Example: biomedclip classify sample://xray --labels "normal,pneumonia"')(classify)
    app.command("search", epilog='Example: biomedclip search shards/pmc "electron micrograph of a synapse"')(search)
    app.command("explain", epilog='Example: biomedclip explain sample://xray --label "pneumonia" -o why.png')(explain)
    app.command("app", epilog="Example: biomedclip app --dataset shards/pmc --results results")(page)


def classify(
    images: Annotated[list[str], typer.Argument(metavar="IMAGES…", help="Files, folders, globs, or sample://NAME.")],
    labels: Annotated[
        str | None, typer.Option("--labels", "-l", help='Labels with commas: "normal,pneumonia".')
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Labels and prompts of a task: biomedclip eval tasks.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A YAML file: label -> one prompt or several.")
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template", help="A prompt of --labels, {} stands for the label; repeatable. Default: three neutral ones."
        ),
    ] = None,
    window: WindowOption = None,
    model: ModelOption = MINI,
    top: Annotated[int, typer.Option("--top", min=1, help="Labels shown for each image.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on standard output.")] = False,
    csv: Annotated[Path | None, typer.Option("--csv", help="Also write all probabilities as a table.")] = None,
    fast: FastOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Say which label fits each picture best: JPEG, PNG, TIFF, DICOM or NIfTI; for research only.

    A flag says which answers not to believe: "uncertain" or "out of scope" by the model's calibration; where it has
    none, "uncertain" where the two best labels lie within 0.2 of each other. What cannot be read is listed at the end.
    """
    from biomedclip.app.pictures import find_sources, parse_window
    from biomedclip.app.questions import read_question
    from biomedclip.progress import terminal

    if csv is not None and csv.exists() and not overwrite:
        raise ConfigError(csv, "exists already", todo="name another file, or give --overwrite")
    question = read_question(labels, task, prompts, template)
    sources = find_sources(images, parse_window(window))

    from biomedclip.app.classify import Classifier
    from biomedclip.app.tables import Report

    classifier = Classifier(model, question, fast=fast)
    report = Report(classifier.labels, top, as_json=as_json, keeps_rows=csv is not None)
    for row in classifier.classify(sources.files, total=len(sources.files), progress=terminal):
        report.add(row)
    if csv is not None:
        report.write_csv(csv)
    report.finish(sources, classifier.describe())


def search(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="A folder of shards that build or pack wrote.")],
    query: Annotated[str | None, typer.Argument(metavar="QUERY", help="Words that the figure should fit.")] = None,
    image: Annotated[str | None, typer.Option("--image", "-i", help="A picture instead of words.")] = None,
    window: WindowOption = None,
    model: ModelOption = MINI,
    top: Annotated[int, typer.Option("--top", min=1, help="Figures shown.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on standard output.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with the pictures.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Find figures of a dataset by words or by a picture; the index is made once and grows with the dataset."""
    from biomedclip.app.search_figures import search_figures
    from biomedclip.progress import terminal

    search_figures(
        dataset, query, image, model=model, top=top, window=window, as_json=as_json, html=html, overwrite=overwrite,
        progress=terminal,
    )  # fmt: skip


def explain(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A file, or sample://NAME.")],
    label: Annotated[str, typer.Option("--label", "-l", help="The words whose evidence is looked for.")],
    against: Annotated[
        str | None, typer.Option("--against", help="What it is not: evidence against these words.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture that is written (PNG).")] = Path(
        "explanation.png"
    ),
    window: WindowOption = None,
    frame: Annotated[int | None, typer.Option("--frame", min=0, help="Of several; default: the middle one.")] = None,
    model: ModelOption = MINI,
    as_json: Annotated[bool, typer.Option("--json", help="The numbers as JSON on standard output.")] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Show where in a picture the evidence for a label lies, as a picture; for research only.

    The map is checked: its hottest tenth is hidden, and the fall of the cosine compared with hiding the same shape at
    40 random places. A map that is not clearly better than chance is written all the same, and says so.
    """
    from biomedclip.app.explain_file import write_explanation

    write_explanation(
        out, image, label, against, model=model, window=window, frame=frame, as_json=as_json, overwrite=overwrite
    )


def page(
    dataset: Annotated[list[Path] | None, typer.Option("--dataset", "-d", help="Folders of shards to browse.")] = None,
    results: Annotated[list[Path] | None, typer.Option("--results", "-r", help="Folders of results to browse.")] = None,
    model: ModelOption = MINI,
    host: Annotated[
        str, typer.Option("--host", help="Another address than this machine's own opens it to others.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 7860,
    max_upload_mb: Annotated[int, typer.Option("--max-upload-mb", min=1, help="Larger uploads are refused.")] = 50,
) -> None:
    """Open a local page: classify, search, browse a dataset, read reports. Nothing leaves this machine."""
    from biomedclip.app.holdings import open_holdings
    from biomedclip.app.serve import open_page

    holdings = open_holdings(dataset or (), results or (), model)
    open_page(holdings, host=host, port=port, max_upload_mb=max_upload_mb, say=typer.echo,
              warn=lambda text: typer.echo(text, err=True))  # fmt: skip
