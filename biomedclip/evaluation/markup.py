"""HTML text for measured numbers and their names: the forms that every section of the report uses.

Numbers are never typed: each stands in a `<data value="…">` element that holds the very number of the JSON record
while its text is rounded. Everything else is `biomedclip.page.markup`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from biomedclip.page.markup import to_text

Record = Mapping[str, Any]

_NAMES = {
    "balanced_accuracy": "balanced accuracy", "accuracy": "accuracy", "auroc": "AUROC", "auprc": "AUPRC",
    "macro_f1": "macro F1", "mcc": "MCC", "kappa": "Cohen's κ", "ece": "calibration error (ECE)",
    "brier": "Brier score", "nll": "negative log-likelihood",
}  # fmt: skip


def write_measured(entry: Record, task: str, stage: str, name: str) -> str:
    """A number with its interval."""
    text = write_number(entry["value"], task, stage, name)
    return f'{text}<span class="ci">{interval_text(entry)}</span>'


def write_number(value: float | None, task: str, stage: str, name: str) -> str:
    """The number itself as the machine-readable value, rounded as the text."""
    where = f'data-task="{to_text(task)}" data-stage="{stage}" data-metric="{to_text(name)}"'
    return f'<data value="{json.dumps(value)}" {where}>{round_value(value)}</data>'


def interval_text(entry: Record) -> str:
    """`0.953 to 0.995`."""
    if entry["ci_low"] is None:
        return "no interval"
    return f"{round_value(entry['ci_low'])} to {round_value(entry['ci_high'])}"


def chance_of(record: Record, name: str) -> float | None:
    """What random guessing gets on a metric; None where that is not known."""
    value = record["baselines"]["random"].get(name)
    return None if value is None else float(value)


def name_metric(name: str) -> str:
    """A metric as a reader says it: `image → text, recall@5`."""
    way, slash, metric = name.rpartition("/")
    if not slash:
        return _NAMES.get(name, name.replace("_", " "))
    arrow = {"image_to_text": "image → text", "text_to_image": "text → image"}.get(way, way)
    metric = re.sub(r"^full_recall@", "all right answers, recall@", metric)
    return f"{arrow}, {metric.replace('mrr', 'mean reciprocal rank').replace('_', ' ')}"


def round_value(value: float | None) -> str:
    """Three decimals; a dash for what is undefined."""
    return "–" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
