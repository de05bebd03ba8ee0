"""Every number about answers: exact match over all, open and closed questions, softer scores, parts, intervals, tests.

Reads a `QuestionTable` and one answer a question, whoever gave them; yields plain numbers for JSON. Three choices to
question. Open and closed are the data's own types, never a model's guess, so denominators are the same for everybody.
A question without an answer is a wrong answer, and counted. Everything is a ratio of sums over images, so that a
bootstrap over images is one matrix product.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.errors import DataError
from biomedclip.evaluation.comparisons import holm
from biomedclip.evaluation.statistics import Interval, Resampler, UnitSums, bootstrap, paired_bootstrap
from biomedclip.evaluation.vqa.normalise import normalise, token_scores
from biomedclip.evaluation.vqa.questions import Question, QuestionTable
from biomedclip.files import split_lines

Floats = NDArray[np.float64]
Answers = Mapping[str, str]
"""Question id -> answer."""
PARTS = ("content_type", "modality", "organ", "phrase_type")
_SOFT = ("token_precision", "token_recall", "token_f1", "bleu_1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What each question earned."""

    rows: tuple[Question, ...]
    exact: Floats
    """(N,) 1 where the normalised answer is the truth or an accepted alternative."""
    soft: Floats
    """(N, 4) token precision, recall, F1 and BLEU-1, of the best accepted answer by F1."""
    given: tuple[str, ...]
    """(N,) normalised predictions; empty where there was none."""
    unanswered: int


def mark_answers(table: QuestionTable, answers: Answers) -> Marks:
    """Marks of the answers. Raises DataError for answers to questions that the table does not have."""
    known = {row.question_id for row in table.rows}
    if strange := sorted(set(answers) - known):
        raise DataError("predictions", f"answer {len(strange):,} questions that are not in {table.name}",
                        found=", ".join(strange[:4]), todo="check split and ids")  # fmt: skip
    exact, soft, given = np.zeros(len(table.rows)), np.zeros((len(table.rows), 4)), []
    for i, row in enumerate(table.rows):
        answer = answers.get(row.question_id, "")
        given.append(normalise(answer))
        if row.question_id in answers:
            accepted = (row.answer, *row.also_accepted)
            exact[i] = any(given[-1] == normalise(truth) for truth in accepted)
            soft[i] = max((token_scores(answer, truth) for truth in accepted), key=lambda scores: scores[2])
    missing = sum(row.question_id not in answers for row in table.rows)
    return Marks(rows=table.rows, exact=exact, soft=soft, given=tuple(given), unanswered=missing)


def score_answers(
    table: QuestionTable, answers: Answers, *, train_answers: Sequence[str] | None = None, resamples: int = 2000,
    level: float = 0.95, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """All numbers of one set of answers, with percentile intervals over images.

    `metrics`: accuracy, accuracy/open, accuracy/closed, and token_precision, token_recall, token_f1 and bleu_1 of open
    questions. `parts`: accuracy by content type (a question of two types counts in both), modality, organ and phrase
    type. `unseen_answer_ceiling`: the accuracy of a model
    that answers every question whose answer is among `train_answers`, and no other. `paraphrase_consistency`: the share
    of pairs that ask the same of one image and have the same truth, which got one answer.
    """
    marks = mark_answers(table, answers)
    resampler = Resampler(len(marks.rows), groups=[row.group for row in marks.rows], resamples=resamples, seed=seed)
    masks = _masks(marks.rows)
    statistics = {name: _ratio(marks.exact, mask, resampler) for name, mask in masks.items()}
    opened = masks.get("accuracy/open", np.zeros(len(marks.rows), dtype=bool))
    if opened.any():
        statistics |= {name: _ratio(marks.soft[:, i], opened, resampler) for i, name in enumerate(_SOFT)}
    intervals = bootstrap(statistics, resampler, level=level)
    sizes = {name: int(mask.sum()) for name, mask in masks.items()} | dict.fromkeys(_SOFT, int(opened.sum()))
    entries = {name: _entry(float(statistics[name](None)), sizes[name], intervals[name]) for name in statistics}
    parts: dict[str, dict[str, Any]] = {}
    for name in list(entries):
        kind, _, value = name.partition("=")
        if value:
            parts.setdefault(kind, {})[value] = entries.pop(name)
    return {
        "n": len(marks.rows), "images": resampler.num_units, "unanswered": marks.unanswered,
        "types_inferred": sum(row.type_inferred for row in marks.rows), "metrics": entries, "parts": parts,
        "unseen_answer_ceiling": None if train_answers is None else ceiling(marks.rows, train_answers),
        "paraphrase_consistency": consistency(marks), "interval": f"{resampler.name()}, by image, {level:g}",
        "resamples": resamples, "seed": seed,
    }  # fmt: skip


def bound_marks(table: QuestionTable, earned: Floats, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """accuracy, accuracy/open and accuracy/closed of (N,) marks in the table's order, with intervals over images."""
    resampler = Resampler(len(table.rows), groups=[row.group for row in table.rows], resamples=resamples, seed=seed)
    masks = {name: mask for name, mask in _masks(table.rows).items() if "=" not in name}
    statistics = {name: _ratio(earned, mask, resampler) for name, mask in masks.items()}
    intervals = bootstrap(statistics, resampler)
    return {
        name: _entry(float(one(None)), int(masks[name].sum()), intervals[name]) for name, one in statistics.items()
    }  # fmt: skip


def ceiling(rows: Sequence[Question], train_answers: Sequence[str]) -> dict[str, float]:
    """Share of questions, by type, whose normalised answer is among the answers of the training split."""
    known = {normalise(answer) for answer in train_answers}
    hits = np.asarray([any(normalise(a) in known for a in (row.answer, *row.also_accepted)) for row in rows])
    types = np.asarray([row.answer_type for row in rows])
    found = {"overall": float(hits.mean())}
    return found | {kind: float(hits[types == kind].mean()) for kind in ("open", "closed") if (types == kind).any()}


def consistency(marks: Marks) -> dict[str, float | int] | None:
    """Share of paraphrase pairs with one answer, and their number; None where the data links no paraphrases."""
    asked: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row, given in zip(marks.rows, marks.given, strict=True):
        if row.phrase_id is not None:
            asked[(row.phrase_id, row.group, normalise(row.answer))].append(given)
    pairs = same = 0
    for answers in asked.values():
        for i, first in enumerate(answers):
            pairs += len(answers) - i - 1
            same += sum(first == second for second in answers[i + 1 :])
    return {"value": same / pairs, "pairs": pairs} if pairs else None


def compare_answers(
    table: QuestionTable, reference: Answers, others: Mapping[str, Answers], *, resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """Accuracy of `reference` less that of each other, over all, open and closed questions, paired, by image.

    p values are Holm-adjusted over all comparisons made here. An interval that excludes zero says more than chance.
    """
    theirs = {name: mark_answers(table, answers).exact for name, answers in others.items()}
    return compare_marks(table, mark_answers(table, reference).exact, theirs, resamples=resamples, seed=seed)


def compare_marks(
    table: QuestionTable, ours: Floats, others: Mapping[str, Floats], *, resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """As `compare_answers`, of (N,) marks in the table's order; those of several seeds are their means."""
    resampler = Resampler(len(table.rows), groups=[row.group for row in table.rows], resamples=resamples, seed=seed)
    masks = {name: mask for name, mask in _masks(table.rows).items() if "=" not in name}
    found: list[dict[str, Any]] = []
    for other, theirs in others.items():
        for name, mask in masks.items():
            row: dict[str, Any] = {"against": other, "metric": name, "n": int(mask.sum())}
            try:
                difference = paired_bootstrap(_ratio(theirs, mask, resampler), _ratio(ours, mask, resampler), resampler)
            except ValueError as error:
                found.append(row | {"p": math.nan, "reason": str(error)})
                continue
            found.append(row | {"difference": difference.value, "low": difference.low, "high": difference.high,
                                "p": difference.p})  # fmt: skip
    for row, adjusted in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p_holm"] = None if math.isnan(adjusted) else adjusted
        row["p"] = None if math.isnan(row["p"]) else row["p"]
    return found


def _masks(rows: Sequence[Question]) -> dict[str, NDArray[np.bool_]]:
    """Which questions each number is about: `accuracy`, `accuracy/open`, `content_type=PRES`, ..."""
    masks = {"accuracy": np.ones(len(rows), dtype=bool)}
    types = np.asarray([row.answer_type for row in rows])
    masks |= {f"accuracy/{kind}": types == kind for kind in ("open", "closed") if (types == kind).any()}
    for part in PARTS:
        values = [_kinds(row, part) for row in rows]
        for value in sorted(set().union(*values)):
            masks[f"{part}={value}"] = np.asarray([value in found for found in values])
    return masks


def _kinds(row: Question, part: str) -> frozenset[str]:
    """The values of a part that a question counts for; VQA-RAD gives some questions two content types."""
    text = getattr(row, part)
    return frozenset(text.split(", ") if part == "content_type" else [text]) - {""}


def _ratio(earned: Floats, mask: NDArray[np.bool_], resampler: Resampler) -> UnitSums:
    """Mean of what the masked questions earned, from sums over images."""
    # Without a map every image has one question, and question i is unit i.
    unit = np.arange(len(earned)) if resampler.unit_of is None else resampler.unit_of
    sums = np.bincount(unit, weights=earned * mask, minlength=resampler.num_units)
    sizes = np.bincount(unit, weights=mask.astype(float), minlength=resampler.num_units)
    return UnitSums(np.stack([sums, sizes], axis=1), _divide)


def _divide(sums: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[:, 0] / sums[:, 1], dtype=np.float64)


def _entry(value: float, n: int, interval: Interval) -> dict[str, Any]:
    if math.isnan(interval.low):
        return {"value": value, "n": n, "low": None, "high": None, "reason": interval.reason}
    return {"value": value, "n": n, "low": interval.low, "high": interval.high}


def read_answers(path: str | Path) -> dict[str, str]:
    """Question id -> answer from a JSON object, a JSON list or JSON lines of {question_id, answer (or text)}.

    Raises DataError for what is none of these, for an answer without an id, and for an id with two answers.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text) if text.lstrip()[:1] == "[" or path.suffix == ".json" else None
        rows = [json.loads(line) for line in split_lines(text) if line.strip()] if value is None else value
    except OSError as error:
        raise DataError(path, "cannot be read", found=error.strerror) from None
    except ValueError as error:
        raise DataError(path, "is neither JSON nor JSON lines", found=str(error)[:100]) from None
    if isinstance(rows, dict):
        return {str(key): str(answer) for key, answer in rows.items()}
    answers: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        fields = row if isinstance(row, dict) else {}
        key, answer = fields.get("question_id", fields.get("qid")), fields.get("answer", fields.get("text"))
        if key is None or answer is None:
            raise DataError(f"{path}:{number}", "needs question_id and answer", found=str(row)[:80])
        if str(key) in answers:
            raise DataError(f"{path}:{number}", "answers a question again", found=str(key), todo="keep one of them")
        answers[str(key)] = str(answer)
    return answers
