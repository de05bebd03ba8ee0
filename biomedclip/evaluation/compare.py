"""What changed between two models, task by task, and whether it is more than noise.

Reads two sets of results with their stored scores; yields one row a task: the difference of the primary metric on the
very same samples, its paired interval, and p values adjusted by Holm over all rows. Scores of other samples, prompts
or definitions are not compared: the row then says what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from biomedclip.errors import DataError
from biomedclip.evaluation.comparisons import holm
from biomedclip.evaluation.markup import name_metric, round_value
from biomedclip.evaluation.results import TaskResult
from biomedclip.evaluation.scores import ClassScores, Scores, read_scores, statistics_of
from biomedclip.evaluation.statistics import Resampler, paired_bootstrap


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One task; `reason` says why there is no difference to speak of."""

    task: str
    metric: str
    first: float | None
    second: float | None
    value: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    p: float = float("nan")
    p_holm: float = float("nan")
    n: int = 0
    reason: str | None = None

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `no difference beyond noise` or why not compared."""
        if self.reason:
            return f"not compared: {self.reason}"
        if np.isnan(self.p_holm) or self.p_holm >= 0.05:
            return "no difference beyond noise"
        return "better" if self.value > 0 else "worse"


LOWER_IS_BETTER = ("ece", "ace", "brier", "nll", "mean_absolute_error", "median_rank")


def compare_results(
    first: Sequence[TaskResult], second: Sequence[TaskResult], *, resamples: int = 2000, seed: int = 0
) -> list[Change]:
    """One row for each task that both have, the newest result of each. Raises DataError where they share none."""
    ours, theirs = ({result.task: result for result in results} for results in (first, second))
    shared = [task for task in ours if task in theirs]
    if not shared:
        raise DataError("compare", "the two have no task in common",
                        found=f"{', '.join(ours) or 'none'} and {', '.join(theirs) or 'none'}")  # fmt: skip
    rows = [_compare(ours[task], theirs[task], resamples, seed) for task in shared]
    adjusted = holm([row.p for row in rows])
    return [_replace(row, p) for row, p in zip(rows, adjusted, strict=True)]


def _replace(row: Change, p: float) -> Change:
    from dataclasses import replace

    return replace(row, p_holm=p)


def _compare(a: TaskResult, b: TaskResult, resamples: int, seed: int) -> Change:
    metric = str(a.record["primary"])
    facts = {
        "task": a.task, "metric": metric, "first": _value(a.metrics, metric), "second": _value(b.metrics, metric)
    }  # fmt: skip
    for key, what in (("manifest_sha256", "the data"), ("split", "the split")):
        if a.record["dataset"][key] != b.record["dataset"][key]:
            return Change(**facts, reason=f"{what} is not the same")  # type: ignore[arg-type]
    if a.record["prompts"] != b.record["prompts"]:
        return Change(**facts, reason="the prompts are not the same")  # type: ignore[arg-type]
    scores, others = read_scores(a.scores_path), read_scores(b.scores_path)
    if scores.sample_ids != others.sample_ids or type(scores) is not type(others):
        return Change(**facts, reason="not the same samples could be read")  # type: ignore[arg-type]
    try:
        found = paired_bootstrap(
            statistics_of(scores, (metric,))[metric], statistics_of(others, (metric,))[metric],
            _resampler(scores, resamples, seed),
        )  # fmt: skip
    except ValueError as error:
        return Change(**facts, reason=str(error))  # type: ignore[arg-type]
    sign = -1.0 if metric.split("/")[-1] in LOWER_IS_BETTER else 1.0
    ends = sorted((sign * found.low, sign * found.high))
    return Change(**facts, value=sign * found.value, low=ends[0], high=ends[1], p=found.p,  # type: ignore[arg-type]
                  n=len(scores.sample_ids))  # fmt: skip


def _resampler(scores: Scores, resamples: int, seed: int) -> Resampler:
    y = scores.y if isinstance(scores, ClassScores) else None
    return Resampler(len(scores.sample_ids), y=y, groups=scores.group_ids, resamples=resamples, seed=seed)


def _value(metrics: Mapping[str, Mapping[str, float | None]], name: str) -> float | None:
    return metrics[name]["value"] if name in metrics else None


def comparison_table(rows: Sequence[Change]) -> str:
    """Aligned text: values, difference with interval, adjusted p and the verdict."""
    table = [("task", "metric", "A", "B", "B - A", "95 % interval", "p (Holm)", "")]
    for row in rows:
        interval = "" if row.reason else f"{row.low:+.3f} to {row.high:+.3f}"
        table.append((
            row.task, name_metric(row.metric), round_value(row.first), round_value(row.second),
            "" if row.reason else f"{row.value:+.3f}", interval, "" if row.reason else f"{row.p_holm:.3g}",
            row.verdict,
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table)
