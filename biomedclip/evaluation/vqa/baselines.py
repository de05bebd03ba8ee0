"""What can be answered without looking: the most frequent answer of a kind, the words of the question, another picture.

Reads the training and the scored split; yields one answer a question. A model that does not beat these has not used the
image. The majority answer knows whether a question is open or closed, as the data says, which makes it a hard one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from biomedclip.evaluation.vqa.normalise import normalise
from biomedclip.evaluation.vqa.questions import Question, QuestionTable

_MAX_ANSWERS = 1000
"""Answers the question-only classifier knows, most frequent first: as most VQA vocabularies."""


def answer_majority(train: QuestionTable, scored: QuestionTable) -> dict[str, str]:
    """The most frequent training answer of the question's content and answer type; of its answer type; of all."""
    keys: tuple[Callable[[Question], Hashable], ...] = (
        lambda row: (row.content_type, row.answer_type), lambda row: row.answer_type, lambda row: None
    )  # fmt: skip
    tables = [_most_frequent(train.rows, key) for key in keys]
    found = {}
    for row in scored.rows:
        votes = (table[key(row)] for table, key in zip(tables, keys, strict=True) if key(row) in table)
        found[row.question_id] = next(votes)
    return found


def _most_frequent(rows: Sequence[Question], key: Callable[[Question], Hashable]) -> dict[Hashable, str]:
    counts: dict[Hashable, Counter[str]] = {}
    for row in rows:
        counts.setdefault(key(row), Counter())[normalise(row.answer)] += 1
    # Ties go to the alphabet, so that the order of the file decides nothing.
    return {name: min(votes, key=lambda answer: (-votes[answer], answer)) for name, votes in counts.items()}


def answer_from_words(train: QuestionTable, scored: QuestionTable, *, seed: int = 0) -> dict[str, str]:
    """Answers of a logistic regression on the question's words and word pairs, one each for open and closed."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    found = answer_majority(train, scored)
    for kind in ("open", "closed"):
        known = [row for row in train.rows if row.answer_type == kind]
        asked = [row for row in scored.rows if row.answer_type == kind]
        frequent = {answer for answer, _ in Counter(normalise(r.answer) for r in known).most_common(_MAX_ANSWERS)}
        known = [row for row in known if normalise(row.answer) in frequent]
        if len({normalise(row.answer) for row in known}) < 2 or not asked:
            continue
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        classifier = make_pipeline(words, LogisticRegression(C=10.0, max_iter=300, random_state=seed))
        classifier.fit([row.question for row in known], [normalise(row.answer) for row in known])
        said = classifier.predict([row.question for row in asked])
        found |= {row.question_id: str(answer) for row, answer in zip(asked, said, strict=True)}
    return found


def shuffle_images(images: Sequence[str], seed: int = 0) -> NDArray[np.int64]:
    """(N,) for each of N questions the position of a question about another image, whose picture it is shown.

    A rotation of the images in random order: every image is shown as often as images allow, none to its own question.
    With one image there is no other, and it is shown.
    """
    names, first, place = np.unique(np.asarray(images), return_index=True, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    other = np.empty(len(names), dtype=np.int64)
    other[order] = np.roll(order, 1)
    return np.asarray(first[other[place]], dtype=np.int64)
