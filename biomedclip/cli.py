"""The command line: a thin door. Every command imports its work inside the function, so `--help` costs no torch.

All knobs are in the YAML configs; a command takes a config, an output folder and `--set key=value`. Results go to
stdout, talk goes to stderr. A BiomedclipError becomes one line and exit code 2 (the user must change something);
anything else keeps its traceback and exits with 1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from biomedclip import __version__
from biomedclip.app_commands import add_app_commands
from biomedclip.continual_commands import add_continual_commands
from biomedclip.data_commands import data_app
from biomedclip.errors import BiomedclipError, ConfigError, MissingExtra
from biomedclip.eval_commands import eval_app
from biomedclip.model_commands import models_app
from biomedclip.train_commands import runs_app
from biomedclip.vqa_commands import vqa_app

app = typer.Typer(
    name="biomedclip",
    help="Build, train, evaluate and load vision-language models for biomedical images.\n\n"
    "Start with: biomedclip demo. For research only; not for clinical use.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

app.add_typer(data_app, name="data")
app.add_typer(runs_app, name="runs")
app.add_typer(models_app, name="models")
app.add_typer(eval_app, name="eval")
app.add_typer(vqa_app, name="vqa")

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for everything the run writes.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the config; repeatable.")
]
PrintOption = Annotated[bool, typer.Option("--print-config", help="Print the resolved config and stop.")]


@app.callback(invoke_without_command=True)
def _global(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command(epilog="Example: biomedclip demo --out demo")
def demo(
    out: OutOption = Path("demo"),
    overrides: SetOption = None,
) -> None:
    """Real articles to shards, a small CLIP trained on them, and a report of what it learned: about 5 minutes."""
    from biomedclip.demo import Builder, run_demo
    from biomedclip.progress import terminal
    from data_builders.build import BuildConfig, build, resolve_root

    builder = Builder(config=BuildConfig, build=build, find_sample=resolve_root)
    result = run_demo(out, builder, overrides=overrides or (), progress=terminal, say=_say)
    typer.echo(result.table)
    typer.echo(f"\nreport   {result.report}\nnumbers  {result.summary}")


@app.command(epilog="Example: biomedclip build configs/build/demo_pmc.yaml --out shards/pmc")
def build(
    config: ConfigArgument, out: OutOption, overrides: SetOption = None, print_config: PrintOption = False
) -> None:
    """Turn PMC articles or a labelled image set into image-text shards with an index and a ledger."""
    from biomedclip.config import load_config
    from biomedclip.progress import terminal
    from data_builders.build import BuildConfig
    from data_builders.build import build as run

    settings = load_config(config, BuildConfig, overrides or ())
    if print_config:
        return _print_config(settings)
    manifest = run(settings, out, progress=terminal)
    ledger = manifest["ledger"]
    typer.echo(f"{out}: {ledger['seen']:,} seen, {ledger['kept']:,} kept")
    for reason, count in sorted(ledger["dropped"].items(), key=lambda item: -item[1]):
        typer.echo(f"  {count:>7,} dropped: {reason}")


@app.command(
    epilog="Example: biomedclip train configs/train/demo.yaml --out runs/demo --set data.sources.0.path=shards/pmc"
)
def train(
    config: ConfigArgument,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for everything the run writes.")] = None,
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    allow_plan_change: Annotated[
        bool, typer.Option("--allow-plan-change", help="With --resume: other data, from a new epoch on; recorded.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be read: steps, coverage, licences, bytes, hours.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: as JSON.")] = False,
    samples_s: Annotated[
        float | None, typer.Option("--samples-s", min=0.001, help="With --dry-run: a speed you have measured.")
    ] = None,
    print_config: PrintOption = False,
) -> None:
    """Continually pretrain a CLIP on streamed shards; a config of `task: medvqa` or `task: text` trains answering heads
    or a text tower instead."""
    from biomedclip.config import load_config
    from biomedclip.train_commands import read_task, train_text_tower
    from biomedclip.training.config import TrainConfig
    from biomedclip.vqa_commands import train_heads

    others = {"medvqa": train_heads, "text": train_text_tower}
    if train_other := others.get(read_task(config)):
        return train_other(config, out, overrides or (), resume=resume, show=print_config)
    settings = load_config(config, TrainConfig, overrides or ())
    if print_config:
        return _print_config(settings)
    if dry_run:
        from biomedclip.train_commands import print_forecast

        return print_forecast(settings, out, samples_s=samples_s, as_json=as_json)
    if out is None:
        raise ConfigError("--out", "is missing", todo="name the folder of the run: --out runs/first")
    from biomedclip.progress import terminal
    from biomedclip.training.train import train as run

    result = run(settings, out, resume=resume, allow_plan_change=allow_plan_change, progress=terminal)
    typer.echo(f"{result.final}: trained weights in open_clip's format")


@app.command(epilog="Example: biomedclip evaluate configs/evaluate/demo.yaml --out results --set model=runs/demo")
def evaluate(
    config: ConfigArgument, out: OutOption, overrides: SetOption = None, print_config: PrintOption = False
) -> None:
    """Score a model on tasks: zero-shot classification and retrieval, with intervals; a config of `task: medvqa` asks
    questions about images instead."""
    from biomedclip.config import load_config
    from biomedclip.evaluation.config import EvaluateConfig
    from biomedclip.progress import terminal
    from biomedclip.train_commands import read_task
    from biomedclip.vqa_commands import evaluate_questions

    if read_task(config) == "medvqa":
        return evaluate_questions(config, out, overrides or (), show=print_config)

    settings = load_config(config, EvaluateConfig, overrides or ())
    if print_config:
        return _print_config(settings)
    from biomedclip.evaluation.evaluate import evaluate as run
    from biomedclip.evaluation.report import results_table
    from data_builders.build import resolve_root

    # `sample://NAME` stands for data that comes with the project; only the builders know where that lies.
    data = {task: str(resolve_root(path)) for task, path in settings.data.items()}
    settings = settings.model_copy(update={"data": data})
    typer.echo(results_table(run(settings, out, progress=terminal)))


add_continual_commands(app)
add_app_commands(app)


@app.command(epilog="Example: biomedclip doctor")
def doctor() -> None:
    """Say what is installed, what is missing and the pip line for it; exit 2 where something is broken."""
    from biomedclip.doctor import EXTRAS, describe_machine, find_problems, list_packages

    packages = list_packages()
    for name, value in describe_machine().items():
        typer.echo(f"{name:<10} {value}")
    shown: set[str] = set()
    for extra in EXTRAS:
        members = [package for package in packages if package.extra == extra and package.name not in shown]
        shown |= {package.name for package in members}
        missing = [package.name for package in members if package.installed is None]
        state = "ready" if not missing else f"missing {', '.join(missing)}; run: pip install 'biomedclip[{extra}]'"
        typer.echo(f"\n{extra:<10} {state}")
        if present := ", ".join(f"{package.name} {package.installed}" for package in members if package.installed):
            typer.echo(f"           {present}")
    problems = find_problems(packages)
    for problem in problems:
        typer.echo(f"\nproblem    {problem}")
    if problems:
        raise typer.Exit(2)


def _print_config(settings: Any) -> None:
    import yaml

    typer.echo(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), nl=False)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _missing_extra(error: ModuleNotFoundError) -> MissingExtra | None:
    """The extra that brings a module, where it is one of ours; None for a defect in our own imports."""
    from biomedclip.doctor import list_packages

    module = (error.name or "").split(".")[0]
    names = {"cv2": "opencv-python-headless", "open_clip": "open_clip_torch", "sklearn": "scikit-learn"}
    wanted = names.get(module, module).replace("_", "-").lower()
    for package in list_packages():
        if package.name.replace("_", "-").lower() == wanted and package.installed is None:
            return MissingExtra(package.extra, module)
    return None


def main() -> None:
    """Run the command line; the one place where errors become exit codes."""
    # Threads of OpenMP that wait busily starve each other where other programs share the cores: 30 training steps of
    # the demo took 29 and 33 s with the default and 12 s with this, on 2 cores (docs/benchmarks).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(standalone_mode=True)
    except BiomedclipError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        missing = _missing_extra(error)
        if missing is None:
            raise
        typer.echo(f"error: {missing}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        # The reader of our output went away (`| head`); Python would complain again while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
