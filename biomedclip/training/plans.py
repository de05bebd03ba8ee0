"""Which plan a run followed from which step on: `plans.json` in its folder.

Reads the config and the plan made from it; yields the plan that a run, or its continuation, follows. A continuation
must have the plan of before, or its step numbers would mean other samples; with permission another plan takes over at
the step of the checkpoint, its epochs beginning there, and the file says so. With the record any step's samples can be
worked out later (`biomedclip.training.seen`), also those that were taken back since: the record says which were
already gone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from biomedclip.errors import ConfigError
from biomedclip.files import write_json
from biomedclip.stream.metaclip import make_rule
from biomedclip.stream.pipes import UnindexedSource, expand_addresses
from biomedclip.stream.plan import Plan
from biomedclip.stream.rows import Rows, StreamSource
from biomedclip.training.config import DataConfig, TrainConfig

PLANS = "plans.json"

DATA_KEYS = ("data", "batch_size", "seed")
"""Keys of a config that its plan depends on."""


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """A plan that a run followed, and what it was made from."""

    first_step: int
    sha256: str
    config: dict[str, Any]
    """DATA_KEYS of the run's config."""
    withdrawn: dict[str, list[str]]
    """Source -> keys that had been taken back."""


def read_plans(run_folder: str | Path) -> list[PlanRecord]:
    """The plans of a run, by first step; empty where it kept none. Raises ConfigError where the file is damaged."""
    path = Path(run_folder) / PLANS
    if not path.exists():
        return []
    try:
        return [PlanRecord(**record) for record in json.loads(path.read_bytes())]
    except (ValueError, TypeError) as error:
        raise ConfigError(path, "is damaged", found=str(error)[:80], todo="restore it, or start a new run") from None


def settle_plan(
    run_folder: str | Path,
    config: TrainConfig,
    plan: Plan,
    rows: Sequence[Rows],
    *,
    step: int,
    allow_change: bool = False,
    write: bool = True,
) -> tuple[Plan, frozenset[str]]:
    """The plan that a run follows from `step` on, and the identities of those it may continue.

    `plan` is what the config and the data of today give. Raises ConfigError where that is another one than the run
    followed before and `allow_change` is not set. `write` is set in one process of a run only.
    """
    before = [record for record in read_plans(run_folder) if record.first_step <= step]
    if before:
        last = before[-1]
        same = plan.restarted(last.first_step) if last.first_step else plan
        if same.sha256 == last.sha256:
            return same, frozenset({same.sha256})
        if not allow_change:
            raise ConfigError(
                run_folder, "the data are not what the interrupted run read", found=_difference(last, config, rows),
                todo="restore them, or go on with these from a new epoch: --resume --allow-plan-change",
            )  # fmt: skip
        before = [record for record in before if record.first_step < step]
    plan = plan.restarted(step) if step else plan
    record = PlanRecord(step, plan.sha256, plan_config(config), withdrawn_keys(rows))
    if write:
        write_json(Path(run_folder) / PLANS, [asdict(one) for one in [*before, record]])
    return plan, frozenset({plan.sha256, *(one.sha256 for one in before[-1:])} if before else {plan.sha256})


def stream_sources(config: DataConfig) -> list[StreamSource]:
    """The sources of a config as the stream takes them. Raises DataError for a table of entries that is none."""
    return [
        StreamSource(**{**{name: value for name, value in dict(source).items() if name != "allow_pipe"},
                        "keep": make_rule(source.keep.metaclip) if source.keep else None})
        for source in config.sources
        if not source.is_unindexed
    ]  # fmt: skip


def unindexed_sources(config: DataConfig) -> list[UnindexedSource]:
    """The sources that webdataset reads from their beginning."""
    return [
        UnindexedSource(name=source.name, addresses=expand_addresses(source.addresses), weight=source.weight,
                        augmentation=source.augmentation, allow_pipe=source.allow_pipe)
        for source in config.sources
        if source.is_unindexed and not isinstance(source.weight, dict)
    ]  # fmt: skip


def plan_config(config: TrainConfig) -> dict[str, Any]:
    """What of a config its plan depends on, as JSON-able values."""
    values = config.model_dump(mode="json")
    return {key: values[key] for key in DATA_KEYS}


def withdrawn_keys(rows: Sequence[Rows]) -> dict[str, list[str]]:
    """Source -> keys taken back; sources without any are left out."""
    return {part.source.name: sorted(part.place.withdrawn) for part in rows if part.place.withdrawn}


def _difference(last: PlanRecord, config: TrainConfig, rows: Sequence[Rows]) -> str:
    """What changed, in words: keys of the config, else samples taken back, else the samples themselves."""
    changed = _changed_keys(last.config, plan_config(config))
    if changed:
        return f"other {', '.join(changed)}"
    gone = {name: len(keys) for name, keys in withdrawn_keys(rows).items() if keys != last.withdrawn.get(name, [])}
    if gone:
        return ", ".join(f"{count} samples of {name} taken back" for name, count in gone.items())
    return "the same config over other samples"


def _changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> list[str]:
    changed = []
    for key in new:
        if old.get(key) == new[key] or f"{above}{key}" == "data.fetch":
            continue
        if isinstance(new[key], Mapping) and isinstance(old.get(key), Mapping):
            changed += _changed_keys(old[key], new[key], f"{above}{key}.")
        else:
            changed.append(f"{above}{key}")
    return changed
