"""The commands of `biomedclip vqa`: check a data set, answer its questions without training, score anybody's answers.

As thin as `cli.py`. Heads are trained by `biomedclip train` with a config whose task is `medvqa`, which comes here too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biomedclip.errors import ConfigError

if TYPE_CHECKING:
    from biomedclip.evaluation.vqa.questions import QuestionTable

vqa_app = typer.Typer(
    help="Questions about images: check data, rank answers without training, score answers.", no_args_is_help=True
)
DataArgument = Annotated[Path, typer.Argument(metavar="DATA", help="The folder of the data set, as published.")]
LayoutOption = Annotated[str, typer.Option("--layout", "-l", help="vqa_rad, vqa_rad_mevf, slake, path_vqa, vqa_med, "
                                           "pmc_vqa, omnimed_vqa, huggingface or jsonl.")]  # fmt: skip
LanguageOption = Annotated[str | None, typer.Option("--language", help="Only questions of this language: en, zh.")]
SplitOption = Annotated[str, typer.Option("--split", help="The split that is scored.")]
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
    resamples: ResamplesOption = 2000,
) -> None:
    """Score a file of answers: exact match, token scores, parts, ceiling, baselines, with intervals; as JSON."""
    from biomedclip.evaluation.vqa.datasets import read_questions
    from biomedclip.evaluation.vqa.score import read_answers

    table = read_questions(data, layout, language=language)
    found = _score(table, split, read_answers(answers), {}, resamples)
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False))


@vqa_app.command("rank", epilog="Example: biomedclip vqa rank data/rad --layout vqa_rad_mevf -m runs/demo -o rad")
def vqa_rank(
    data: DataArgument,
    model: Annotated[list[str], typer.Option("--model", "-m", help="What `biomedclip.load` takes; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of answers and results.")],
    layout: LayoutOption = "jsonl",
    language: LanguageOption = None,
    split: SplitOption = "test",
    resamples: ResamplesOption = 2000,
) -> None:
    """Answer by the nearest text, without training: statements, options, training answers; one row a model."""
    from biomedclip.progress import terminal

    typer.echo(rank_models(data, model, out, layout=layout, language=language, split=split, resamples=resamples,
                           progress=terminal))  # fmt: skip


def rank_models(
    data: Path, models: Sequence[str], out: Path, *, layout: str, language: str | None = None, split: str = "test",
    resamples: int = 2000, progress: Any = None,
) -> str:  # fmt: skip
    """Rank, score and write every model; returns the table."""
    from biomedclip.evaluation.embed import choose_device
    from biomedclip.evaluation.vqa.datasets import read_questions
    from biomedclip.evaluation.vqa.rank import rank_answers
    from biomedclip.files import write_json, write_text
    from biomedclip.models.load import load
    from biomedclip.progress import silent

    table = read_questions(data, layout, language=language)
    scored = table.split(split)
    known = [row.answer for row in table.rows if row.split == "train"]
    device = choose_device("auto")
    lines = ["| model | overall | open | closed | closed, another image |", "|---|---|---|---|---|"]
    for number, name in enumerate(models):
        if name.startswith("random:"):
            loaded = load(name.removeprefix("random:"), device=device, random_init=True)
        else:
            loaded = load(name, device=device)
        answers, shuffled = rank_answers(scored, known, *loaded, name=name, device=device, progress=progress or silent)
        found = _score(table, split, answers, {"shuffled_image": shuffled}, resamples)
        folder = out / f"{number}-{Path(name.replace(':', '-')).name}"
        rows = [{"question_id": key, "answer": said, "shuffled": shuffled[key]} for key, said in answers.items()]
        write_text(folder / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_json(folder / "results.json", {"model": name, "data": table.sha256, **found})
        cells = [found["metrics"], found["baselines"]["shuffled_image"]]
        lines.append(
            f"| {name} | {' | '.join(_cell(cells[0], m) for m in _METRICS)} | {_cell(cells[1], _METRICS[2])} |"
        )
    for baseline in ("majority", "question_words"):
        cell = found["baselines"][baseline]
        lines.append(f"| {baseline} | {' | '.join(_cell(cell, metric) for metric in _METRICS)} | |")
    text = "\n".join(lines)
    write_text(out / "table.md", text + "\n")
    return text


_METRICS = ("accuracy", "accuracy/open", "accuracy/closed")


def _cell(metrics: dict[str, Any], metric: str) -> str:
    entry = metrics.get(metric)
    if entry is None:
        return "–"
    bounds = "" if entry["low"] is None else f" [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
    return f"{100 * entry['value']:.1f}{bounds}"


def _score(
    table: QuestionTable, split: str, answers: dict[str, str], more: dict[str, dict[str, str]], resamples: int
) -> dict[str, Any]:
    """Scores, baselines and differences from them; baselines only where there is a training split."""
    from biomedclip.evaluation.vqa.baselines import answer_from_words, answer_majority
    from biomedclip.evaluation.vqa.score import bound_marks, compare_answers, mark_answers, score_answers

    scored = table.split(split)
    others = dict(more)
    train = table.split("train") if split != "train" and any(row.split == "train" for row in table.rows) else None
    if train is not None:
        others |= {"majority": answer_majority(train, scored), "question_words": answer_from_words(train, scored)}
    known = [row.answer for row in train.rows] if train else None
    found = score_answers(scored, answers, train_answers=known, resamples=resamples)
    return found | {
        "baselines": {name: bound_marks(scored, mark_answers(scored, one).exact, resamples=resamples)
                      for name, one in others.items()},
        "comparisons": compare_answers(scored, answers, others, resamples=resamples),
    }  # fmt: skip


def is_medvqa(config: Path) -> bool:
    """Whether a train config is one of answering heads: `task: medvqa`."""
    from biomedclip.config import read_yaml

    values = read_yaml(config)
    return isinstance(values, dict) and values.get("task") == "medvqa"


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
