"""Scores of tasks that have no one class an image: several labels side by side, and options of each image.

`LabelScores` and `OptionScores` are what `scores.py` stores for them; here are their metrics as functions of sample
counts, and the tables of a result. A cell that is not stated takes no part; an option's index means nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.evaluation import metrics, multilabel, options
from biomedclip.evaluation.statistics import Statistic


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScores:
    """Scores of a task of several labels."""

    sample_ids: tuple[str, ...]
    group_ids: tuple[str, ...] | None
    labels: tuple[str, ...]
    truth: NDArray[np.int8]
    """(N, L): 1 present, 0 absent, -1 not stated."""
    cosines: NDArray[np.float32]
    """(N, L): cosine with the positive prompts less that with the negative ones."""
    logit_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionScores:
    """Scores of questions with options of their own."""

    sample_ids: tuple[str, ...]
    group_ids: tuple[str, ...] | None
    answer_texts: tuple[str, ...]
    sets: tuple[str, ...]
    """(N,) name of the sub-set each question is of."""
    sizes: NDArray[np.int64]
    """(N,) number of options."""
    answers: NDArray[np.int64]
    """(N,) place of the right one among its own options."""
    cosines: NDArray[np.float32]
    """(sum of sizes,)"""
    logit_scale: float


def label_statistics(scores: LabelScores) -> dict[str, Statistic]:
    """`auroc`, `auprc` and `macro_f1` at the threshold 0, where both prompts are equally near."""
    truth, cosines = scores.truth, scores.cosines

    def mean(metric: Callable[..., Any]) -> Statistic:
        return lambda w: multilabel.macro(truth, cosines, metric, w)

    return {
        "auroc": mean(metrics.auroc),
        "auprc": mean(metrics.average_precision),
        "macro_f1": partial(multilabel.macro_f1, truth, cosines, 0.0),
    }


def label_tables(scores: LabelScores) -> dict[str, Any]:
    """`per_class`, how many labels are undefined, and what guessing gets."""
    rows = multilabel.per_label(scores.truth, scores.cosines, scores.labels)
    shares = [row.positives / (row.positives + row.negatives) for row in rows if row.positives and row.negatives]
    return {
        "per_class": [
            {"class": row.label, "support": row.positives, "negatives": row.negatives, "auroc": _number(row.auroc),
             "auprc": _number(row.auprc), **_decisions(scores, c), **({"reason": row.reason} if row.reason else {})}
            for c, row in enumerate(rows)
        ],
        "n_undefined": sum(row.reason is not None for row in rows),
        "baselines": {
            "random": {"auroc": 0.5, **({"auprc": float(np.mean(shares))} if shares else {})},
            "majority": {"auroc": 0.5, "macro_f1": 0.0},
        },
    }  # fmt: skip


def _decisions(scores: LabelScores, label: int) -> dict[str, float | None]:
    """What follows of one label from calling it present at a margin of 0 and above."""
    stated = scores.truth[:, label] != multilabel.UNSTATED
    table = metrics.confusion(scores.truth[stated, label], scores.cosines[stated, label] >= 0, 2)
    recalls, precisions = metrics.recall_per_class(table), metrics.precision_per_class(table)
    named = {"precision": precisions[1], "sensitivity": recalls[1], "specificity": recalls[0],
             "f1": metrics.f1_per_class(table)[1]}  # fmt: skip
    return {name: _number(float(value)) for name, value in named.items()}


def option_statistics(scores: OptionScores) -> dict[str, Statistic]:
    """`accuracy` and `over_chance`."""
    credit = options.credit(scores.cosines, scores.sizes, scores.answers)
    return {
        "accuracy": lambda w: options.accuracy(credit, w),
        "over_chance": lambda w: options.over_chance(credit, scores.sizes, w),
    }


def option_tables(scores: OptionScores) -> dict[str, Any]:
    """Pooled accuracy and the mean over sub-sets, each by its name; and the baselines."""
    credit = options.credit(scores.cosines, scores.sizes, scores.answers)
    _, counts = np.unique(np.asarray(scores.answer_texts), return_counts=True)
    best = options.chosen(scores.cosines, scores.sizes)
    return {
        "pooled_and_macro": options.pooled_and_macro(credit, scores.sets),
        "macro_over_answers": options.macro_accuracy(credit, scores.answer_texts),
        "ties": int(((credit > 0) & (credit < 1)).sum()),
        "first_option_chosen": float((best == 0).mean()),
        "baselines": {
            "random": {"accuracy": float((1 / scores.sizes).mean()), "over_chance": 0.0},
            "majority": {"accuracy": float(counts.max() / counts.sum())},
        },
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
