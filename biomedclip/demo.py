"""The whole story in one run: articles to shards, shards to a model, the model to a report.

Runs the configs `build/demo_*.yaml`, `train/demo.yaml` and `evaluate/demo.yaml` one after the other and keeps
everything under one folder: `data/` (three dataset folders), `run/` (the training run with its starting and its final
weights), `results/` (one JSON a model and task), `report.html` and `summary.json`. A finished step is recognised and
not done again, so an interrupted demo goes on where it was when it is run again.

The builder comes in as an argument: this package never imports `data_builders`, the command line joins the two.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biomedclip.config import Config, config_file, load_config
from biomedclip.errors import ConfigError
from biomedclip.files import write_json
from biomedclip.progress import Progress, silent
from biomedclip.shards import DatasetFolder

DATASETS = ("pmc", "bccd", "pneumoniamnist")
"""Datasets the demo builds, one config each."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Where the report and its numbers lie, and the table that the command prints."""

    report: Path
    summary: Path
    table: str


@dataclass(frozen=True, slots=True)
class Builder:
    """The builder as the command line hands it over: its config model, its function, its sample folders."""

    config: type[Config]
    build: Callable[..., dict[str, Any]]
    find_sample: Callable[[str], Path]


def run_demo(
    out: str | Path,
    builder: Builder,
    *,
    overrides: Sequence[str] = (),
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> DemoResult:
    """Run every step that is not done yet; returns where the report is. `overrides` change the train config.

    Raises ConfigError where `out` holds something that is not a demo.
    """
    out = Path(out)
    _check_folder(out)
    start = time.monotonic()
    say(f"[1/4] building shards from the bundled articles and image sets into {out / 'data'}")
    datasets = _build_datasets(out, builder, progress, say)
    say("[2/4] continual pretraining of a small CLIP on the streamed shards")
    train_result = _train(out, datasets, overrides, progress)
    say("[3/4] scoring the model before and after on images and articles it never saw")
    before = _evaluate(out, train_result.start, "before", datasets, builder, progress)
    after = _evaluate(out, train_result.final, "after", datasets, builder, progress)
    say("[4/4] writing the report")
    return _report(out, datasets, train_result, before, after, seconds=time.monotonic() - start)


def _check_folder(out: Path) -> None:
    known = {"data", "run", "results", "scores", "cache", "report.html", "summary.json"}
    if out.exists() and not out.is_dir():
        raise ConfigError(out, "is a file", todo="name a folder with --out")
    strange = sorted(path.name for path in out.iterdir() if path.name not in known) if out.exists() else []
    if strange:
        raise ConfigError(out, "holds other files", found=strange[0], todo="name an empty or a new folder with --out")


def _build_datasets(
    out: Path, builder: Builder, progress: Progress, say: Callable[[str], None]
) -> dict[str, DatasetFolder]:
    datasets = {}
    for name in DATASETS:
        config = load_config(config_file(f"build/demo_{name}.yaml"), builder.config)
        manifest = builder.build(config, out / "data" / name, progress=progress)
        ledger = manifest["ledger"]
        dropped = sum(ledger["dropped"].values())
        say(f"      {name}: {ledger['seen']:,} seen = {ledger['kept']:,} kept + {dropped:,} dropped")
        datasets[name] = DatasetFolder(out / "data" / name)
    return datasets


def _train(out: Path, datasets: Mapping[str, DatasetFolder], overrides: Sequence[str], progress: Progress) -> Any:
    from biomedclip.training.config import TrainConfig
    from biomedclip.training.train import train

    path = config_file("train/demo.yaml")
    names = [source.name for source in load_config(path, TrainConfig).data.sources]
    paths = [f"data.sources.{i}.path={datasets[name].folder}" for i, name in enumerate(names)]
    config = load_config(path, TrainConfig, [*paths, *overrides])
    return train(config, out / "run", resume=(out / "run").exists(), progress=progress)


def _evaluate(
    out: Path,
    weights: Path,
    name: str,
    datasets: Mapping[str, DatasetFolder],
    builder: Builder,
    progress: Progress,
) -> list[Any]:
    from biomedclip.evaluation.config import EvaluateConfig
    from biomedclip.evaluation.evaluate import evaluate

    data = {
        "bccd": builder.find_sample("sample://bccd"),
        "pneumoniamnist": builder.find_sample("sample://pneumoniamnist"),
        "article_retrieval": datasets["pmc"].folder,
    }
    overrides = [f"model={weights}", f"model_name={name}", *(f"data.{task}={path}" for task, path in data.items())]
    config = load_config(config_file("evaluate/demo.yaml"), EvaluateConfig, overrides)
    return evaluate(config, out, progress=progress)


def _report(
    out: Path,
    datasets: Mapping[str, DatasetFolder],
    train_result: Any,
    before: list[Any],
    after: list[Any],
    *,
    seconds: float,
) -> DemoResult:
    from biomedclip.evaluation.report import summarise, summary_table, write_report

    built = list(datasets.values())
    write_json(out / "summary.json", summarise(before, after, built) | {"seconds": round(seconds, 1)})
    write_report(
        out / "report.html",
        before=before,
        after=after,
        run=train_result.folder,
        datasets=built,
        title="What a small CLIP learned in one demo run",
        lede=(
            "Figures of PubMed Central articles and two labelled image sets became shards; a small CLIP with random"
            " weights was trained on them and scored before and after, on images and articles it never saw."
        ),
    )
    table = summary_table(json.loads((out / "summary.json").read_bytes()))
    return DemoResult(out / "report.html", out / "summary.json", table)
