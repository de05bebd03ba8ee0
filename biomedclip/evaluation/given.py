"""A file of scores to a result like any other, and to a verdict on what was published about them.

Reads scores that somebody else made (score_files.py) for one task; yields a result with the same metrics, intervals and
record as a model's, so that it can be reported and compared, and with the published figures of the model it is named
for judged reproduced or not (reproduce.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from biomedclip.errors import ConfigError, DataError
from biomedclip.evaluation.answer_scores import LabelScores, OptionScores
from biomedclip.evaluation.config import EvaluateConfig
from biomedclip.evaluation.leakage import read_leakage
from biomedclip.evaluation.record import describe_run
from biomedclip.evaluation.reproduce import judge, names_of
from biomedclip.evaluation.results import TaskResult, write_result
from biomedclip.evaluation.score_files import Kind, read_given
from biomedclip.evaluation.scores import ClassScores, Scores, hash_scores, measure
from biomedclip.evaluation.tasks import Task, find_task
from biomedclip.files import sha256_json


def evaluate_given(
    config: EvaluateConfig, out: str | Path, *, kind: Kind | None = None, tasks: Mapping[str, Task] | None = None
) -> TaskResult:
    """The result of the one task of the config whose `data` is a file of scores, also written under `out`.

    Raises ConfigError for several tasks or an unknown one, DataError for a file that does not answer the task.
    """
    if len(config.tasks) != 1:
        raise ConfigError("--scores", "answer one task", found=", ".join(config.tasks), todo="name one --task")
    name = config.tasks[0]
    task = (tasks or {}).get(name) or find_task(name)
    given = read_given(config.data[name], task, kind)
    scores, wanted = given.scores, tuple(m for m in task.metrics.names if m not in given.undefined)
    if not wanted:
        raise DataError(config.data[name], f"{given.kind} have none of the metrics of {name}",
                        found=", ".join(task.metrics.names), todo="give scores")  # fmt: skip
    facts = measure(scores, wanted, by=task.bootstrap.by, resamples=config.bootstrap.n, level=config.bootstrap.level,
                    seed=config.seed)  # fmt: skip
    facts["metrics"] |= {m: _missing(len(scores.sample_ids), why) for m, why in given.undefined.items()}
    if given.kind == "predictions":
        for row in facts.get("per_class", ()):
            row |= dict.fromkeys({"auroc", "auprc"} & set(row))
    labels = _labels_of(scores)
    model = {"name": config.model_name or config.model, "given": given.kind, "logit_scale": scores.logit_scale,
             "fingerprint": f"scores:{hash_scores(scores)}", "preprocess": None, "precision": None}  # fmt: skip
    record = describe_run(
        task, model=model, labels=labels, groups=scores.group_ids, seed=config.seed,
        manifest_sha256=sha256_json([scores.sample_ids, labels]), warnings=_count_warnings(task, labels),
    )  # fmt: skip
    record["dataset"]["leakage"] = read_leakage(config.leakage.get(name))
    found = judge(
        task.published, names_of(config.published_as, config.model_name, config.model), facts["metrics"],
        n=len(labels), per_class=facts.get("per_class", ()), tolerance=config.tolerance,
    )  # fmt: skip
    if found:
        record["reproduction"] = found
    return write_result(out, record | facts | {"scores_sha256": hash_scores(scores)}, scores)


def _labels_of(scores: Scores) -> list[tuple[str, ...]]:
    if isinstance(scores, ClassScores):
        return [(scores.classes[c],) for c in scores.y.tolist()]
    if isinstance(scores, LabelScores):
        return [tuple(name for name, on in zip(scores.labels, row, strict=True) if on == 1) for row in scores.truth]
    if isinstance(scores, OptionScores):
        return [(text,) for text in scores.answer_texts]
    return [(str(i),) for i in scores.caption_ids.tolist()]


def _count_warnings(task: Task, labels: Sequence[Sequence[str]]) -> list[str]:
    expected = task.expect.n or sum(task.expect.classes.values())
    if expected and task.labels != "multi" and expected != len(labels):
        return [f"{len(labels):,} samples were given, the split has {expected:,}"]
    return []


def _missing(n: int, why: str) -> dict[str, Any]:
    return {"value": None, "ci_low": None, "ci_high": None, "ci_level": None, "ci_method": None, "n": n, "n_boot": 0,
            "redrawn": 0, "reason": why}  # fmt: skip
