"""Whether files are the published ones and fit the model: by bytes and by keys, without building towers in memory.

Reads the facts of a model and files on this disk; yields one line a check. Hashes are compared where they are pinned
and said to be unknown where they are not; keys and shapes are compared with the architecture on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from biomedclip.errors import CheckpointError
from biomedclip.models.build import Parts, build_architecture, check_keys, parameters_on_meta, quiet, read_weights
from biomedclip.models.hub import file_hash


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    what: str
    passed: bool | None
    """None where nothing is known to compare with."""
    found: str


def verify_parts(parts: Parts, *, trust_pickle: bool = False) -> list[Check]:
    """The checks of a model's files: hash and keys. A file that does not fit is a failed check, not an error."""
    checks = []
    for file in parts.weights:
        found = file_hash(file.path)
        passed = None if file.sha256 is None else found == file.sha256
        checks.append(Check(what=f"{Path(file.path).name} sha256", passed=passed, found=found))
    try:
        with quiet(), parameters_on_meta():
            model = build_architecture(parts.architecture)
        tensors, changes = read_weights(parts, trust_pickle=trust_pickle)
        where = ", ".join(str(file.path) for file in parts.weights)
        missing, extra = check_keys(model.state_dict(), tensors, parts.keys, where=where, name=parts.where)
    except CheckpointError as error:
        return [*checks, Check(what="keys", passed=False, found=str(error))]
    found = (
        f"{len(tensors)} tensors fit; {changes.renamed} renamed, {len(changes.dropped)} left out,"
        f" {len(changes.filled)} filled in, {len(missing)} missing and {len(extra)} left over as allowed"
    )
    return [*checks, Check(what="keys", passed=True, found=found)]
