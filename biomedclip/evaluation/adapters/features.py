"""Labelled embeddings, and the one place where hyper-parameters are chosen: never on the split that is scored.

Reads cached embeddings with labels, split and groups; yields a `Choice`: the hyper-parameters that did best on a
validation split, or over folds of the support where there is none, with the whole table of what was tried. Published
few-shot numbers chose the best epoch and the best mixing weights on the test set; here a `Selection` that names the
scored split is refused, and where somebody allows it all the same the choice says so and the result is tagged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biomedclip.errors import ConfigError, DataError
from biomedclip.evaluation import metrics
from biomedclip.evaluation.calibration import negative_log_likelihood

Vectors = NDArray[np.float32]
Logits = NDArray[np.float64]
Params = Mapping[str, Any]
Candidates = Callable[["Features", "Features"], Iterator[tuple[Params, Logits]]]
"""`candidates(train, held_out)` yields every setting with its logits (N, C) on the held-out samples; settings come
in order of caution, since the first of equals is chosen."""
ChoiceMetric = Literal["balanced_accuracy", "accuracy", "auroc", "nll"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Embeddings of length 1 with labels. Raises DataError where arrays do not fit or are not finite."""

    vectors: Vectors
    """(N, D)"""
    y: NDArray[np.int64]
    """(N,) class index."""
    num_classes: int
    split: str
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.vectors) != len(self.y) or (self.groups is not None and len(self.groups) != len(self.y)):
            raise DataError(self.split, "has other numbers of embeddings, labels and groups",
                            found=f"{len(self.vectors)}, {len(self.y)}, {len(self.groups or ())}")  # fmt: skip
        bad = np.flatnonzero(~np.isfinite(self.vectors).all(axis=1))
        if bad.size:
            raise DataError(self.split, f"{bad.size} embeddings are not finite", found=f"rows {bad[:5].tolist()}")
        if len(self.y) and not (int(self.y.min()) >= 0 and int(self.y.max()) < self.num_classes):
            raise DataError(self.split, f"labels must be below {self.num_classes}", found=int(self.y.max()))

    def take(self, rows: ArrayLike) -> Features:
        """These rows only."""
        rows = np.asarray(rows, dtype=np.int64)
        groups = None if self.groups is None else tuple(self.groups[i] for i in rows)
        return replace(self, vectors=self.vectors[rows], y=self.y[rows], groups=groups)

    def one_hot(self) -> NDArray[np.float32]:
        """(N, C) labels as ones and zeros."""
        return np.eye(self.num_classes, dtype=np.float32)[self.y]

    def class_means(self) -> NDArray[np.float64]:
        """(C, D) mean of each class. Raises DataError for a class without samples, which has none."""
        counts = np.bincount(self.y, minlength=self.num_classes)
        if not counts.all():
            raise DataError(self.split, "a class has no sample to learn from", found=np.flatnonzero(counts == 0)[0])
        return (self.one_hot().astype(np.float64).T @ self.vectors) / counts[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen, by which metric, where. `table` holds every setting that was tried with its score."""

    hparams: Params = field(default_factory=dict)
    split: str | None = None
    """`val`, `folds of train`, or None where there was nothing to choose."""
    on_test: bool = False
    metric: str | None = None
    score: float | None = None
    table: tuple[tuple[Params, float], ...] = ()

    def describe(self) -> dict[str, Any]:
        """The `selection` part of a result, and `tags` that a report must show."""
        tags = {"tags": ["selected_on_test"]} if self.on_test else {}
        return {"split": self.split, "hparams": dict(self.hparams), "metric": self.metric, "score": self.score, **tags}


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """A fitted classifier on embeddings."""

    method: str
    logits: Callable[[Vectors], Logits]
    """(N, D) embeddings to (N, C) logits, ready for softmax."""
    choice: Choice = field(default_factory=Choice)

    def predict(self, vectors: Vectors) -> NDArray[np.int64]:
        """(N,) class of the largest logit."""
        return self.logits(vectors).argmax(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """How hyper-parameters are chosen: on `features`, or over folds of the support where that is None.

    Raises ConfigError where `features` are of the split that is scored, unless `allow_test`.
    """

    features: Features | None = None
    metric: ChoiceMetric = "balanced_accuracy"
    folds: int = 5
    """Folds keep a class's share, and the samples of a group together."""
    scored_split: str = "test"
    allow_test: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.on_test and not self.allow_test:
            raise ConfigError(
                "selection", f"would choose hyper-parameters on the split that is scored ('{self.scored_split}')",
                todo="name a validation split, or allow_test, which tags the result",
            )  # fmt: skip

    @property
    def on_test(self) -> bool:
        """Whether the choice is made on the split that is scored."""
        return self.features is not None and self.features.split == self.scored_split

    def choose(self, support: Features, candidates: Candidates) -> Choice:
        """The setting with the best mean score over the held-out parts, the first of equals.

        Raises DataError where no setting has a defined score.
        """
        scores: dict[tuple[tuple[str, Any], ...], list[float]] = {}
        for train, held_out in self._parts(support):
            for params, logits in candidates(train, held_out):
                scores.setdefault(tuple(params.items()), []).append(score_logits(held_out.y, logits, self.metric))
        table = tuple((dict(key), float(np.mean(values))) for key, values in scores.items())
        valid = [value for _, value in table if not np.isnan(value)]
        if not valid:
            raise DataError("selection", f"{self.metric} is undefined for every setting", todo="use a larger split")
        best = next(params for params, value in table if value == max(valid))
        where = self.features.split if self.features is not None else f"folds of {support.split}"
        return Choice(hparams=best, split=where, on_test=self.on_test, metric=self.metric, score=max(valid),
                      table=table)  # fmt: skip

    def _parts(self, support: Features) -> Iterator[tuple[Features, Features]]:
        if self.features is not None:
            yield support, self.features
            return
        for train, held_out in split_folds(support, self.folds, self.seed):
            yield support.take(train), support.take(held_out)


def score_logits(y: NDArray[np.int64], logits: Logits, metric: ChoiceMetric) -> float:
    """Higher is better, so `nll` is negated; NaN where it is undefined."""
    if metric == "nll":
        return -float(negative_log_likelihood(y, logits))
    if metric == "auroc":
        return float(metrics.macro_auroc(y, logits))
    table = metrics.confusion(y, logits.argmax(1), logits.shape[1])
    return float(metrics.balanced_accuracy(table) if metric == "balanced_accuracy" else np.trace(table) / table.sum())


def split_folds(features: Features, folds: int, seed: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(train, held-out) rows of each fold; a group never stands on both sides.

    Raises DataError where there are fewer groups, or samples of a class, than two, so that folds cannot be made.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    smallest = int(np.bincount(features.y, minlength=features.num_classes).min(initial=0))
    units = smallest
    if features.groups is not None:
        group = np.asarray(features.groups)
        units = min(len(np.unique(group[features.y == c])) for c in range(features.num_classes))
    count = min(folds, units)
    if count < 2:
        raise DataError(features.split, "a class has too few samples or groups for folds", found=units,
                        todo="give a validation split")  # fmt: skip
    if features.groups is None:
        parts = StratifiedKFold(count, shuffle=True, random_state=seed).split(features.vectors, features.y)
    else:
        parts = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(
            features.vectors, features.y, np.asarray(features.groups)
        )
    return [(train, held_out) for train, held_out in parts]


def zero_shot_logits(vectors: Vectors, text: Vectors, logit_scale: float) -> Logits:
    """(N, C) s f . w, in float64."""
    return logit_scale * (np.asarray(vectors, dtype=np.float64) @ np.asarray(text, dtype=np.float64).T)
