"""Everything for results.json: a row an encoder, what needs no picture beside it, and paired differences.

Reads the answers of all encoders and seeds; a row is the mean over seeds. References are the head without a picture,
the word scores that heads start from, and two that are told more than a head with `answer_type: guessed` is: the
majority answer (open or closed and the content, from the data) and a logistic regression on the question's words (open
or closed). To be above them with less knowledge is the harder thing; `knows` says it in every row.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from biomedclip.evaluation.comparisons import holm
from biomedclip.evaluation.vqa.baselines import answer_from_words, answer_majority
from biomedclip.evaluation.vqa.questions import QuestionTable
from biomedclip.evaluation.vqa.score import bound_marks, compare_marks, mark_answers, score_answers
from biomedclip.training.vqa.fit import Fitted, Plan

BLIND = "question_only"
WORDS = "words_first"
Marks = NDArray[np.float64]


def score_run(plan: Plan, table: QuestionTable, fitted: Mapping[str, Sequence[Fitted]]) -> dict[str, Any]:
    """The content of results.json."""
    config, splits = plan.config, plan.splits
    test, validation = splits.test, splits.validation
    fitting = splits.train.rows + (validation.rows if plan.final else ())
    learnt = QuestionTable(name=table.name, root=table.root, rows=fitting)
    earned = {
        name: np.asarray(np.mean([mark_answers(test, one.answers).exact for one in fits], axis=0))
        for name, fits in fitted.items()
    }
    told = "the data's type" if config.answer_type == "told" else "guesses the type"
    simple = {"majority": answer_majority(learnt, test), "question_words": answer_from_words(learnt, test)}
    knows = {"majority": "the data's type and content", "question_words": "the data's type"}
    if config.head.words_first:
        simple[WORDS], knows[WORDS] = _answer_from_start(plan), told
    marks = {name: mark_answers(test, answers).exact for name, answers in simple.items()}
    resamples = config.resamples
    known = [row.answer for row in fitting]
    rows = [
        {
            "encoder": name, "knows": told, "metrics": _mean_scores(test, earned[name], fits, resamples),
            "epochs": [one.epoch for one in fits], "validation": [one.validation for one in fits],
            "questions_per_s": [one.questions_per_s for one in fits],
            "first_seed": score_answers(test, fits[0].answers, train_answers=known, resamples=resamples),
        }
        for name, fits in fitted.items()
    ]  # fmt: skip
    ours = {name: one for name, one in earned.items() if name != BLIND}
    vocabulary = plan.last[0].vocabulary
    return {
        "data": _describe(plan, table, len(fitting)), "scored": config.scored,
        "vocabulary": {"words": len(vocabulary.words), "closed": len(vocabulary.closed),
                       "open": len(vocabulary.opened)},
        "head": config.head.model_dump(), "regions": config.regions, "answer_type": config.answer_type,
        "refit": plan.final is not None, "seeds": list(config.seeds), "rows": rows,
        "baselines": {name: {"knows": knows[name], "metrics": bound_marks(test, one, resamples=resamples)}
                      for name, one in marks.items()},
        "comparisons": _compare_all(test, ours, {BLIND: earned[BLIND], **marks}, resamples),
    }  # fmt: skip


def _describe(plan: Plan, table: QuestionTable, fitted: int) -> dict[str, Any]:
    splits, config = plan.splits, plan.config
    test = {row.group for row in splits.test.rows}
    seen = {row.group for row in splits.train.rows}
    if config.scored == "test":
        seen |= {row.group for row in splits.validation.rows}
    stages = [plan.choose, plan.final] if plan.final else [plan.choose]
    return {
        "name": table.name, "root": table.root, "sha256": table.sha256, "dropped": table.dropped,
        "notes": dict(table.notes), "train": len(splits.train.rows), "validation": len(splits.validation.rows),
        "test": len(splits.test.rows), "fitted": fitted, "validation_carved_by_image": splits.carved,
        "questions_cut": max(one.train.cut + sum(part.cut for part in one.answered) for one in stages),
        "test_images": len(test), "test_images_seen_in_training": len(test & seen),
    }  # fmt: skip


def _answer_from_start(plan: Plan) -> dict[str, str]:
    """The best word score of the type that the words suggest, or that is told: a head before training."""
    stage, scored = plan.last
    closed = len(stage.vocabulary.closed)
    opened = scored.kind != 0 if plan.config.answer_type == "told" else scored.start[:, -1] > 0.5
    scores = scored.start[:, :-1]
    columns = torch.arange(scores.shape[1]) >= closed
    if closed not in (0, scores.shape[1]):
        scores = scores.masked_fill(columns[None] != opened[:, None], -torch.inf)
    return {
        row.question_id: stage.vocabulary.answers[i]
        for row, i in zip(plan.splits.test.rows, scores.argmax(1).tolist(), strict=True)
    }


def _mean_scores(test: QuestionTable, earned: Marks, fits: Sequence[Fitted], resamples: int) -> dict[str, Any]:
    """Metrics of the mean over seeds, with each seed's, their standard deviation, and those with another image."""
    scores = bound_marks(test, earned, resamples=resamples)
    for metric, entry in scores.items():
        mask = np.asarray([metric == "accuracy" or metric.endswith(row.answer_type) for row in test.rows])
        entry["seeds"] = [float(mark_answers(test, one.answers).exact[mask].mean()) for one in fits]
        entry["sd"] = statistics.stdev(entry["seeds"]) if len(fits) > 1 else None
        entry["shuffled"] = float(np.mean([mark_answers(test, one.shuffled).exact[mask].mean() for one in fits]))
    return scores


def _compare_all(
    test: QuestionTable, ours: Mapping[str, Marks], references: Mapping[str, Marks], resamples: int
) -> list[dict[str, Any]]:
    """One family of tests, all encoders against all references: Holm adjusts over all of them."""
    family: list[dict[str, Any]] = []
    for name, earned in ours.items():
        family += [{"encoder": name, **row} for row in compare_marks(test, earned, references, resamples=resamples)]
    adjusted = holm([float("nan") if row["p"] is None else row["p"] for row in family])
    for row, p in zip(family, adjusted, strict=True):
        row["p_holm"] = None if p != p else p
    return family
