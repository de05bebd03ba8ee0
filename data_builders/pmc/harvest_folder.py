"""The folder of a harvest: what it is the harvest of, who may write in it, and what is finished there.

`harvest.json` names plan and rules by their hashes; any other plan or rules are refused. The folder is held by whoever
harvests all of it and shared by those who harvest a slice, and each unit is held by the one process that builds it, so
two builders never disturb each other. A lock ends with its process, however that ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import biomedclip
from biomedclip.errors import ConfigError, DataError
from biomedclip.files import TEMPORARY_PREFIX, remove_leftovers, sha256_file, sha256_json, write_json
from data_builders.build import NLM_NOTICE
from data_builders.locks import hold_lock
from data_builders.pmc.plan import PlanFacts
from data_builders.units import HARVEST, UnitRecord, find_damage, read_unit, unit_name

LOCK = ".lock"
"""In the folder: held by whoever harvests all of it, shared by those who harvest a slice. Units have one each."""

_ORPHAN_S, _GLANCE_S = 5.0, 0.5
"""A worker whose caller was killed ends at once, but perhaps not before a rerun asks for its unit: how long that waits,
and how long where the unit can be left to another process."""


def describe_harvest(
    plan: Path, rules: Mapping[str, Any], side_files: Mapping[str, str], facts: PlanFacts
) -> dict[str, Any]:
    """The content of harvest.json; `side_files` are hashes of files that the rules name."""
    resolved = {"licence": facts.config["licence"], **rules}
    when = f" of {facts.snapshot}" if facts.snapshot else ""
    return {
        "format": 1,
        "biomedclip": biomedclip.__version__,
        "config": resolved,
        "config_sha256": sha256_json([resolved, dict(side_files)]),
        "plan_sha256": sha256_file(plan),
        "plan": facts.config,
        "snapshot": facts.snapshot,
        "units": facts.units,
        "notices": [NLM_NOTICE.format(when=when)],
    }


@contextmanager
def claim_harvest(out: Path, identity: Mapping[str, Any], *, shared: bool) -> Iterator[None]:
    """Hold the folder, which is new or holds the same harvest. Raises ConfigError where it cannot be."""
    if out.exists() and not out.is_dir():
        raise ConfigError(out, "is a file", todo="name a folder")
    if out.exists() and not (out / HARVEST).exists():
        names = (path.name for path in out.iterdir() if not path.name.startswith((LOCK, TEMPORARY_PREFIX, HARVEST)))
        others = sorted(names)
        if others:
            raise ConfigError(out, "holds other files", found=others[0], todo="name an empty or a new folder")
    out.mkdir(parents=True, exist_ok=True)
    with hold_lock(out / LOCK, shared=shared) as is_ours:
        if not is_ours:
            raise ConfigError(out, "is being harvested by another process",
                              todo="wait for it, or give each process a --unit-slice")  # fmt: skip
        _check_identity(out, identity)
        if not shared:  # what killed processes left; beside others it would be mistaken for theirs, or they for us
            remove_leftovers(out, of=HARVEST)
            for path in out.glob(f"{LOCK}-*"):
                with hold_lock(path, keep=False):
                    pass
        yield


@contextmanager
def hold_unit(out: Path, name: str, *, or_skip: bool) -> Iterator[bool]:
    """Yield whether the unit is ours; False only with `or_skip`. Raises ConfigError where another process has it."""
    with hold_lock(out / f"{LOCK}-{name}", wait_s=_GLANCE_S if or_skip else _ORPHAN_S, keep=False) as is_ours:
        if not is_ours and not or_skip:
            raise ConfigError(out / name, "is being built by another process",
                              todo="wait for it, or give each process a --unit-slice")  # fmt: skip
        yield is_ours


def committed_unit(out: Path, name: str) -> UnitRecord | None:
    """The record of a unit whose files are all there; a unit that lost one is as if it had never been."""
    record = read_unit(out, name)
    return None if record is None or find_damage(record) else record


def unit_records(out: Path, number: int) -> list[UnitRecord]:
    """The committed records of a unit and its deltas."""
    records: list[UnitRecord] = []
    while (record := read_unit(out, unit_name(number, retry=len(records)))) is not None:
        records.append(record)
    return records


def _check_identity(out: Path, identity: Mapping[str, Any]) -> None:
    path = out / HARVEST
    if not path.exists():
        write_json(path, dict(identity))
        return
    try:
        stored = json.loads(path.read_bytes())
        parts = [part for part in ("plan", "config") if stored[f"{part}_sha256"] != identity[f"{part}_sha256"]]
    except (ValueError, TypeError, KeyError):
        raise DataError(path, "is damaged", todo="name another folder, or delete this one to harvest anew") from None
    if parts:
        raise ConfigError(out, f"holds the harvest of another {parts[0]}", found=stored[f"{parts[0]}_sha256"][:8],
                          todo="name another folder, or delete this one to harvest anew")  # fmt: skip
