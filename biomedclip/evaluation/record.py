"""What a result says beside its numbers: the task, its data and licence, the prompts, the model, the versions.

Reads a task and what was scored; yields the plain dictionary that results.py writes. A model's run and a file of given
scores share it, so that both can be compared, reported and held against published figures alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from biomedclip.evaluation.scores import RankScores
from biomedclip.evaluation.tasks import Task
from biomedclip.runs import git_commit, versions
from biomedclip.schema import Drop, LabelledImage

_NUM_EXAMPLES = 12
_LISTED_EXCLUSIONS = 50


def describe_run(
    task: Task, *, model: Mapping[str, Any], labels: Sequence[Sequence[str]], groups: Sequence[str] | None,
    manifest_sha256: str, drops: Sequence[Drop] = (), prompt_set: str | None = None,
    prompts: Mapping[str, Sequence[str]] | None = None, warnings: Sequence[str] = (), seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The part of the record that says what was measured, on what and with what; `labels` (N,) are each sample's."""
    counts = Counter(label for row in labels for label in row) if task.classes else Counter()
    asked = dict(prompts or {})
    return {
        "task": task.name,
        "suite": task.suite,
        "title": task.title,
        "kind": task.kind,
        "primary": task.metrics.primary,
        "model": dict(model),
        "dataset": {
            "split": task.split,
            "n": len(labels),
            "classes": [entry.label for entry in task.classes],
            "class_counts": [counts[entry.label] for entry in task.classes],
            "n_groups": len(set(groups)) if groups else None,
            "group": task.group,
            "manifest_sha256": manifest_sha256,
            "licence": task.licence,
            "citation": task.citation,
            "contamination": task.contamination,
            "verified": task.verified,
            "excluded": {
                "n": len(drops),
                "by_reason": dict(sorted(Counter(drop.reason for drop in drops).items())),
                "listed": [asdict(drop) for drop in drops[:_LISTED_EXCLUSIONS]],
            },
        },
        "prompt_set": prompt_set if asked else None,
        "prompt_source": task.prompt_sets[prompt_set].source if asked and prompt_set else None,
        "prompts": asked,
        "ensemble": task.ensemble.model_dump() if asked else None,
        "selection": {"split": task.select_split, "hparams": {}},
        "seed": seed,
        "published": [entry.model_dump() for entry in task.published],
        "warnings": list(warnings),
        "code": {"git": git_commit()},
        "versions": versions(),
    }


def choose_examples(scores: RankScores, rows: Sequence[LabelledImage]) -> list[dict[str, Any]]:
    """Queries spread evenly over the set, not picked: image, its caption, the caption the model put first."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(_NUM_EXAMPLES, len(rows))).round().astype(int))
    return [
        {
            "sample_id": rows[i].sample_id,
            "caption": rows[i].text,
            "top_sample_id": rows[scores.image_to_text_top[i]].sample_id,
            "top_caption": rows[scores.image_to_text_top[i]].text,
            "hit": bool(scores.caption_ids[scores.image_to_text_top[i]] == scores.caption_ids[i]),
            "rank": float(scores.image_to_text[i]),
        }
        for i in chosen
    ]
