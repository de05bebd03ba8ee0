"""Answers without training: the text nearest to the picture, among those that could answer.

Reads a table and any model of `biomedclip.load`; yields an answer a question. Yes/no questions compare a statement with
its negation (statements.py), questions that offer or list options rank those, all others rank the answers of the
training split, each embedded once by itself: embedding every answer behind every question would cost their product.
The true answer and its type are never looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biomedclip.errors import DataError
from biomedclip.evaluation.embed import embed_images, embed_texts
from biomedclip.evaluation.vqa.baselines import shuffle_images
from biomedclip.evaluation.vqa.normalise import normalise
from biomedclip.evaluation.vqa.questions import Question, QuestionTable, check_language, read_picture
from biomedclip.evaluation.vqa.statements import asks_yes_no, declare, describe, offered
from biomedclip.progress import Progress, silent

if TYPE_CHECKING:
    import torch

ANSWER_PROMPT = "an image of {}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What a question is ranked over: texts, and the answer each stands for."""

    texts: tuple[str, ...]
    answers: tuple[str, ...]


def candidates_of(row: Question, vocabulary: Sequence[str]) -> Candidates:
    """The candidates of a question; `vocabulary` are answers of the training split."""
    if not row.options and asks_yes_no(row.question):
        return Candidates(texts=declare(row.question), answers=("yes", "no"))
    options = row.options or offered(row.question)
    if options:
        return Candidates(texts=tuple(describe(row.question, one) for one in options), answers=tuple(options))
    return Candidates(texts=tuple(ANSWER_PROMPT.format(one) for one in vocabulary), answers=tuple(vocabulary))


def rank_answers(
    table: QuestionTable, train_answers: Sequence[str], model: torch.nn.Module, preprocess: Callable[..., Any],
    tokenizer: Callable[..., Any], *, name: str = "the model", batch_size: int = 64, workers: int = 0,
    device: str = "cpu", cache: str | Path | None = None, progress: Progress = silent,
) -> tuple[dict[str, str], dict[str, str]]:  # fmt: skip
    """(answers, answers with each question shown another image).

    Ties go to the first candidate. Raises DataError where a picture cannot be read or a question has no candidates,
    ConfigError for Chinese questions and a tokenizer that does not know them.
    """
    check_language(table, tokenizer, name)
    manifest = table.manifest()
    images = embed_images(model, preprocess, manifest, read=read_picture, batch_size=batch_size, workers=workers,
                          device=device, max_excluded=0.0, cache=cache, progress=progress)  # fmt: skip
    place = {image: i for i, image in enumerate(images.sample_ids)}
    seen = np.asarray([place[row.image] for row in table.rows])
    vocabulary = [one for one in dict.fromkeys(map(normalise, train_answers)) if one and one not in ("yes", "no")]
    asked = [candidates_of(row, vocabulary) for row in table.rows]
    if empty := [row.question_id for row, one in zip(table.rows, asked, strict=True) if not one.texts]:
        raise DataError(table.name, "has questions without options, and there is no training answer to rank",
                        found=", ".join(empty[:3]), todo="give a table with a training split")  # fmt: skip
    texts = list(dict.fromkeys(text for one in asked for text in one.texts))
    vectors = embed_texts(model, tokenizer, texts, device=device, progress=progress)
    at = {text: i for i, text in enumerate(texts)}
    shuffled = seen[shuffle_images([row.group for row in table.rows])]
    found: list[dict[str, str]] = []
    for shown in (seen, shuffled):
        answers = {}
        for row, one, image in zip(table.rows, asked, shown.tolist(), strict=True):
            nearest = int(np.argmax(vectors[[at[text] for text in one.texts]] @ images.vectors[image]))
            answers[row.question_id] = one.answers[nearest]
        found.append(answers)
    return found[0], found[1]
