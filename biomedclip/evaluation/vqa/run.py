"""Models without training on the questions of a data set, and anybody's answers: scored, written, one table.

Reads a data set and models; writes for each model `answers.jsonl` and `results.json` in a folder of its own, and
`table.md` over all models that were scored on the same questions into this output folder, in this call or before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from biomedclip.errors import ConfigError, DataError
from biomedclip.evaluation.embed import choose_device
from biomedclip.evaluation.vqa.baselines import answer_from_words, answer_majority
from biomedclip.evaluation.vqa.datasets import LAYOUTS, read_questions
from biomedclip.evaluation.vqa.questions import QuestionTable
from biomedclip.evaluation.vqa.score import bound_marks, compare_answers, mark_answers, score_answers
from biomedclip.files import write_json, write_text
from biomedclip.progress import Progress, silent

METRICS = ("accuracy", "accuracy/open", "accuracy/closed")
RANDOM = "random:"
"""Before an architecture: its random weights, the row that every other must beat."""


def rank_models(
    data: Path, models: Sequence[str], out: Path, *, layout: str, language: str | None = None, split: str = "test",
    phrase_type: str | None = None, resamples: int = 2000, progress: Progress = silent,
) -> str:  # fmt: skip
    """The table of all models scored in `out`. Raises DataError where the data cannot be asked."""
    from biomedclip.evaluation.vqa.rank import rank_answers
    from biomedclip.models.load import load

    table = read_questions(data, layout, language=language)
    scored = table.split(split).worded(phrase_type)
    known = [row.answer for row in table.rows if row.split == "train"]
    device = choose_device("auto")
    for name in models:
        loaded = load(name.removeprefix(RANDOM), device=device, random_init=name.startswith(RANDOM))
        answers, shuffled = rank_answers(scored, known, *loaded, name=name, device=device, progress=progress)
        found = score_with_baselines(table, scored, answers, {"shuffled_image": shuffled}, resamples)
        folder = out / (re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model")
        rows = [{"question_id": key, "answer": said, "shuffled": shuffled[key]} for key, said in answers.items()]
        write_text(folder / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_json(folder / "results.json", {"model": name, "data": scored.sha256, **found})
    text = models_table(out, scored.sha256)
    write_text(out / "table.md", text + "\n")
    return text


def run_suite(root: Path | None, model: str, out: Path, *, progress: Progress = silent) -> str:
    """`eval run --suite medvqa`: the tables of all data sets in `root`, each in a folder named as its layout."""
    if root is None or not root.is_dir():
        raise ConfigError("--data-root", "is missing" if root is None else "there is no such folder",
                          todo="name the folder that holds one folder a data set")  # fmt: skip
    found = [layout for layout in LAYOUTS if (root / layout).is_dir()]
    if not found:
        raise ConfigError("--data-root", "has no folder named as a layout of questions", found=str(root),
                          todo=f"one of {', '.join(LAYOUTS)}")  # fmt: skip
    parts = [
        f"{layout}\n{rank_models(root / layout, [model], out / 'medvqa' / layout, layout=layout, progress=progress)}"
        for layout in found
    ]
    return "\n\n".join(parts)


def score_with_baselines(
    table: QuestionTable, scored: QuestionTable, answers: Mapping[str, str], more: Mapping[str, Mapping[str, str]],
    resamples: int,
) -> dict[str, Any]:  # fmt: skip
    """Scores of answers to the `scored` questions of `table`, with baselines and differences from them.

    Majority and words need a training split, and that its questions are not the scored ones.
    """
    others = dict(more)
    learnable = any(row.split == "train" for row in table.rows) and all(row.split != "train" for row in scored.rows)
    train = table.split("train") if learnable else None
    if train is not None:
        others |= {"majority": answer_majority(train, scored), "question_words": answer_from_words(train, scored)}
    known = [row.answer for row in train.rows] if train else None
    found = score_answers(scored, answers, train_answers=known, resamples=resamples)
    return found | {
        "baselines": {name: bound_marks(scored, mark_answers(scored, one).exact, resamples=resamples)
                      for name, one in others.items()},
        "comparisons": compare_answers(scored, answers, others, resamples=resamples),
    }  # fmt: skip


def models_table(out: Path, data_hash: str) -> str:
    """Models as rows, from every results.json in `out` about these questions."""
    results = []
    for path in sorted(out.glob("*/results.json")):
        try:
            results.append(json.loads(path.read_bytes()))
        except ValueError as error:
            raise DataError(path, "is not JSON", found=str(error), todo="delete it and score the model again") from None
    results = [one for one in results if one["data"] == data_hash]
    lines = ["| model | overall | open | closed | closed, another image |", "|---|---|---|---|---|"]
    for one in results:
        shuffled = _cell(one["baselines"].get("shuffled_image", {}), "accuracy/closed")
        cells = [_cell(one["metrics"], metric) for metric in METRICS]
        lines.append(f"| {one['model']} | {' | '.join(cells)} | {shuffled} |")
    for baseline in ("majority", "question_words"):
        if baseline in results[0]["baselines"]:
            cells = [_cell(results[0]["baselines"][baseline], metric) for metric in METRICS]
            lines.append(f"| {baseline} | {' | '.join(cells)} | |")
    return "\n".join(lines)


def _cell(metrics: Mapping[str, Any], metric: str) -> str:
    entry = metrics.get(metric)
    if entry is None:
        return "–"
    bounds = "" if entry["low"] is None else f" [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
    return f"{100 * entry['value']:.1f}{bounds}"
