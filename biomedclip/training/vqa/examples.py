"""Questions to tensors: who is trained on, who chooses, who is scored, and the words and answers that are known.

Reads a QuestionTable; yields splits and `Examples`. Words and answers come from the questions that are trained on and
from no others. Where the data has no validation split, images of the training split are held out with all their
questions, chosen by a hash of the image, so that every encoder and seed holds out the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from biomedclip.errors import ConfigError, DataError
from biomedclip.evaluation.vqa.normalise import normalise, tokens
from biomedclip.evaluation.vqa.questions import Question, QuestionTable
from biomedclip.training.vqa.module import CLOSED
from biomedclip.training.vqa.words import WordScores

UNKNOWN = 1
"""Id of a word that the training questions do not have; 0 is no word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Three tables; `carved` says that validation was taken out of training."""

    train: QuestionTable
    validation: QuestionTable
    test: QuestionTable
    carved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Words of training questions and answers of training questions, closed ones first."""

    words: tuple[str, ...]
    closed: tuple[str, ...]
    opened: tuple[str, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """All answers by index. One that is given to both types has two."""
        return self.closed + self.opened


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Tensors of N questions."""

    image: Tensor
    """(N,) index of the picture."""
    words: Tensor
    """(N, L)"""
    answer: Tensor
    """(N,) index, -1 for an answer that is not in the vocabulary."""
    kind: Tensor
    """(N,) 0 closed, 1 open."""
    start: Tensor
    """(N, answers + 1) scores by the question's words alone, the last of being open; (N, 0) where none are used."""
    cut: int = 0
    """Questions longer than L words."""


def divide(table: QuestionTable, share: float, fold: int = 0) -> Splits:
    """Training, validation and test questions. Raises DataError where one of them would be empty."""
    train, test = table.split("train"), table.split("test")
    if any(row.split == "validation" for row in table.rows):
        return Splits(train=train, validation=table.split("validation"), test=test, carved=False)
    groups = sorted({row.group for row in train.rows}, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    if len(groups) < 2:
        raise DataError(table.name, "needs two or more training images to hold one out", found=f"{len(groups)} image")
    size = max(1, round(share * len(groups)))
    held = set(groups[fold * size : (fold + 1) * size])
    if not held:
        raise ConfigError("data.validation_fold", "lies beyond the last image", found=fold,
                          todo=f"0 to {(len(groups) - 1) // size} with this share")  # fmt: skip
    return Splits(
        train=replace(train, rows=tuple(row for row in train.rows if row.group not in held)),
        validation=replace(train, rows=tuple(row for row in train.rows if row.group in held)), test=test, carved=True,
    )  # fmt: skip


def learn_vocabulary(rows: Sequence[Question]) -> Vocabulary:
    """The vocabulary of the questions that are trained on."""
    words = sorted({word for row in rows for word in tokens(row.question)})
    answers = {
        kind: sorted({normalise(r.answer) for r in rows if r.answer_type == kind}) for kind in ("closed", "open")
    }
    return Vocabulary(words=tuple(words), closed=tuple(answers["closed"]), opened=tuple(answers["open"]))


def encode(rows: Sequence[Question], vocabulary: Vocabulary, places: dict[str, int], max_words: int) -> Examples:
    """Tensors of the questions; `places` gives the index of each image."""
    ids = {word: i for i, word in enumerate(vocabulary.words, UNKNOWN + 1)}
    closed = {answer: i for i, answer in enumerate(vocabulary.closed)}
    opened = {answer: i for i, answer in enumerate(vocabulary.opened, len(closed))}
    words = torch.zeros(len(rows), max_words, dtype=torch.int64)
    cut = 0
    for i, row in enumerate(rows):
        found = [ids.get(word, UNKNOWN) for word in tokens(row.question)] or [UNKNOWN]
        cut += len(found) > max_words
        words[i, : min(len(found), max_words)] = torch.tensor(found[:max_words])
    answers = [(closed if row.answer_type == "closed" else opened).get(normalise(row.answer), -1) for row in rows]
    kinds = [CLOSED if row.answer_type == "closed" else 1 - CLOSED for row in rows]
    return Examples(image=torch.tensor([places[row.image] for row in rows]), words=words,
                    answer=torch.tensor(answers), kind=torch.tensor(kinds), start=torch.zeros(len(rows), 0),
                    cut=cut)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What one fit needs: rows to learn from with the vocabulary they give, and rows to answer."""

    vocabulary: Vocabulary
    train: Examples
    answered: tuple[Examples, ...]


def stage(train: Sequence[Question], answered: Sequence[Sequence[Question]], places: dict[str, int], max_words: int,
          *, words_first: bool) -> Stage:  # fmt: skip
    """Tensors of a fit on `train` that answers the other tables; vocabulary and word scores come from `train` alone."""
    vocabulary = learn_vocabulary(train)
    first, *rest = (encode(rows, vocabulary, places, max_words) for rows in (train, *answered))
    if words_first:
        scores = WordScores(train, first.answer, first.kind, len(vocabulary.answers))
        first = replace(first, start=scores.of_own())
        found = scores.of(*answered)
        rest = [replace(part, start=start) for part, start in zip(rest, found, strict=True)]
    return Stage(vocabulary=vocabulary, train=first, answered=tuple(rest))
