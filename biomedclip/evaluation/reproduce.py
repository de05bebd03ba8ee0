"""Is a published figure reproduced: the figures a task lists, held against a result of the model they belong to.

Reads the `published` entries of a task, the names a result goes by and its metrics; yields one verdict an entry that is
of this model. A figure is reproduced where ours differs by no more than a tolerance that is stated with it: half a
unit of the last printed digit (at least three decimals are taken as printed) for given scores, where only rounding
may come between, and `MODEL_TOLERANCE` for a model that was run, where decoding, resizing and precision may too. An
entry with another prompt set or number of samples is not comparable, and says why; whether the published figure lies
inside of our interval is told beside the verdict and does not decide it: a wide interval holds everything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from biomedclip.evaluation.tasks import Published

MODEL_TOLERANCE = 0.005
"""Half a point of a percentage: what another JPEG decoder and bicubic filter move on a set of some thousand images."""
_MIN_DECIMALS = 3


def rounding_tolerance(published: float) -> float:
    """Half a unit of the last decimal of the figure as it is written down, and of the third where it has fewer.

    A float does not keep trailing zeros, so 0.9 may have been printed as 0.900. The last bits of the division are
    allowed for.
    """
    decimals = len(f"{published!r}".partition(".")[2]) if "e" not in f"{published!r}" else _MIN_DECIMALS
    return 0.5 * 10.0 ** -max(decimals, _MIN_DECIMALS) + 1e-9


def judge(
    published: Sequence[Published], names: Sequence[str], metrics: Mapping[str, Mapping[str, Any]], *, n: int,
    prompt_set: str | None = None, per_class: Sequence[Mapping[str, Any]] = (), tolerance: float | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for each published figure of a model that goes by one of `names`.

    `model`, `metric`, `published`, `ours`, `difference`, `tolerance`, `inside_interval`, `verdict` (`reproduced`,
    `not reproduced` or `not comparable`), `reason` of the last, `source`. `tolerance` None is half a unit of the last
    digit of each. A metric `f1/RBBB` is the one of a class, looked up in `per_class`.
    """
    known = {_plain(name) for name in names}
    rows = []
    for entry in published:
        if _plain(entry.model) not in known:
            continue
        allowed = rounding_tolerance(entry.value) if tolerance is None else tolerance
        found = _find(entry.metric, metrics, per_class)
        row: dict[str, Any] = {
            "model": entry.model, "metric": entry.metric, "published": entry.value, "ours": found.get("value"),
            "difference": None, "tolerance": allowed, "inside_interval": None, "source": entry.source,
        }  # fmt: skip
        reason = _why_not(entry, found, n, prompt_set)
        if reason:
            rows.append(row | {"verdict": "not comparable", "reason": reason})
            continue
        difference = float(found["value"]) - entry.value
        low, high = found.get("ci_low"), found.get("ci_high")
        inside = None if low is None or high is None else bool(low <= entry.value <= high)
        verdict = "reproduced" if abs(difference) <= allowed else "not reproduced"
        rows.append(row | {"difference": difference, "inside_interval": inside, "verdict": verdict})
    return rows


def names_of(*names: str | None) -> tuple[str, ...]:
    """What a model goes by: the names given, and title, name and aliases of the released model they stand for."""
    from biomedclip.models.zoo import find_model

    given = [name for name in names if name]
    for name in tuple(given):
        released = find_model(name)
        if released is not None:
            given += [released.name, released.title, *released.aliases]
    return tuple(dict.fromkeys(given))


def _find(
    metric: str, metrics: Mapping[str, Mapping[str, Any]], per_class: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any]:
    if metric in metrics:
        return metrics[metric]
    name, _, label = metric.partition("/")
    row = next((row for row in per_class if row["class"] == label), {})
    return {"value": row.get(name)}


def _why_not(entry: Published, found: Mapping[str, Any], n: int, prompt_set: str | None) -> str | None:
    if found.get("value") is None:
        return str(found.get("reason") or f"{entry.metric} was not measured")
    if entry.n is not None and entry.n != n:
        return f"measured on {n:,} samples, published on {entry.n:,}"
    if entry.prompt_set is not None and prompt_set is not None and entry.prompt_set != prompt_set:
        return f"prompt set '{prompt_set}', published with '{entry.prompt_set}'"
    return None


def _plain(name: str) -> str:
    """Letters and digits only, in lower case: `Quilt-Net` is `QuiltNet`."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
