"""The commands of `biomedclip vqa`: check a data set, answer its questions without training, score anybody's answers.

As thin as `cli.py`. Heads are trained by `biomedclip train` with a config whose task is `medvqa`, which comes here too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from biomedclip.errors import ConfigError

vqa_app = typer.Typer(
    help="Questions about images: check data, rank answers without training, score answers.", no_args_is_help=True
)
DataArgument = Annotated[Path, typer.Argument(metavar="DATA", help="The folder of the data set, as published.")]
LayoutOption = Annotated[str, typer.Option("--layout", "-l", help="vqa_rad, vqa_rad_mevf, slake, path_vqa, vqa_med, "
                                           "pmc_vqa, omnimed_vqa, huggingface or jsonl.")]  # fmt: skip
LanguageOption = Annotated[str | None, typer.Option("--language", help="Only questions of this language: en, zh.")]
SplitOption = Annotated[str, typer.Option("--split", help="The split that is scored.")]
PhraseOption = Annotated[
    str | None, typer.Option("--phrase-type", help="Only questions worded so: freeform or para of VQA-RAD.")
]
ResamplesOption = Annotated[int, typer.Option("--resamples", min=100, help="Bootstrap resamples, over images.")]


@vqa_app.command("check", epilog="Example: biomedclip vqa check data/slake --layout slake --language en")
def vqa_check(data: DataArgument, layout: LayoutOption = "jsonl", language: LanguageOption = None) -> None:
    """Say what a data set holds: questions by split and type, images, rows left out and repaired. No model."""
    from collections import Counter

    from biomedclip.evaluation.vqa.datasets import read_questions

    table = read_questions(data, layout, language=language)
    typer.echo(f"{len(table.rows) + len(table.drops):,} rows = {len(table.rows):,} kept + {len(table.drops):,} dropped")
    for reason, count in {**table.dropped, **table.notes}.items():
        typer.echo(f"  {count:>7,} {reason}")
    counts = Counter((row.split or "(none)", row.answer_type) for row in table.rows)
    for (split, kind), count in sorted(counts.items()):
        typer.echo(f"  {split:<12} {kind:<7} {count:>7,}")
    typer.echo(f"{len({row.group for row in table.rows}):,} images")


@vqa_app.command("score", epilog="Example: biomedclip vqa score data/rad answers.jsonl --layout vqa_rad_mevf")
def vqa_score(
    data: DataArgument,
    answers: Annotated[Path, typer.Argument(metavar="ANSWERS", help="JSON lines of question_id and answer.")],
    layout: LayoutOption = "jsonl",
    language: LanguageOption = None,
    split: SplitOption = "test",
    phrase_type: PhraseOption = None,
    resamples: ResamplesOption = 2000,
) -> None:
    """Score a file of answers: exact match, token scores, parts, ceiling, baselines, with intervals; as JSON."""
    from biomedclip.evaluation.vqa.datasets import read_questions
    from biomedclip.evaluation.vqa.run import score_with_baselines
    from biomedclip.evaluation.vqa.score import read_answers

    table = read_questions(data, layout, language=language)
    scored = table.split(split)
    said, worded = read_answers(answers), scored.worded(phrase_type)
    if phrase_type is not None:
        # A file of answers to the whole split is a good one for a part of it; strange ids stay and are refused.
        others = {row.question_id for row in scored.rows} - {row.question_id for row in worded.rows}
        said = {key: answer for key, answer in said.items() if key not in others}
    found = score_with_baselines(table, worded, said, {}, resamples)
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False))


@vqa_app.command("rank", epilog="Example: biomedclip vqa rank data/rad --layout vqa_rad_mevf -m runs/demo -o rad")
def vqa_rank(
    data: DataArgument,
    model: Annotated[list[str], typer.Option("--model", "-m", help="What `biomedclip.load` takes; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of answers and results.")],
    layout: LayoutOption = "jsonl",
    language: LanguageOption = None,
    split: SplitOption = "test",
    phrase_type: PhraseOption = None,
    resamples: ResamplesOption = 2000,
) -> None:
    """Answer by the nearest text, without training: statements, options, training answers; one row a model."""
    from biomedclip.evaluation.vqa.run import rank_models
    from biomedclip.progress import terminal

    typer.echo(rank_models(data, model, out, layout=layout, language=language, split=split, phrase_type=phrase_type,
                           resamples=resamples, progress=terminal))  # fmt: skip


def train_heads(config: Path, out: Path | None, overrides: Sequence[str], *, resume: bool, show: bool) -> None:
    """Train the heads of a config and print the table; `show` prints the resolved config instead."""
    from biomedclip.config import load_config
    from biomedclip.training.vqa.config import VqaTrainConfig

    settings = load_config(config, VqaTrainConfig, overrides)
    if show:
        from biomedclip.runs import dump_config

        return typer.echo(dump_config(settings), nl=False)
    if out is None:
        raise ConfigError("--out", "is missing", todo="name the folder of the run: --out runs/vqa")
    from biomedclip.progress import terminal
    from biomedclip.training.vqa.train import train_answers

    typer.echo(train_answers(settings, out, resume=resume, progress=terminal))


def evaluate_questions(config: Path, out: Path, overrides: Sequence[str], *, show: bool) -> None:
    """Let the models of an evaluate config answer without training and print the table; `show` prints the config."""
    from biomedclip.config import load_config
    from biomedclip.evaluation.vqa.config import VqaEvaluateConfig

    settings = load_config(config, VqaEvaluateConfig, overrides)
    if show:
        from biomedclip.runs import dump_config

        return typer.echo(dump_config(settings), nl=False)
    from biomedclip.evaluation.vqa.run import rank_models
    from biomedclip.progress import terminal

    typer.echo(rank_models(Path(settings.root).expanduser(), settings.models, out, layout=settings.layout,
                           language=settings.language, split=settings.split, phrase_type=settings.phrase_type,
                           resamples=settings.resamples, progress=terminal))  # fmt: skip
