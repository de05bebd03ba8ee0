"""What lies beside a model's weights about how sure it may be: a temperature, a threshold, and which images it knows.

Reads `calibration.json` and `scope.safetensors` of a folder with weights; yields a `Calibration`. All of it was fitted
on validation splits by `biomedclip models calibrate`; nothing here fits. An image is outside of the model's scope where
it is further from the training images of every domain than that domain's own validation images are: the distance to
the k-th nearest reference embedding (Sun et al. 2022, section 3), divided by a quantile of the same distance on the
domain's validation split. Each domain has its own yardstick, because blood cells lie closer together than figures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from biomedclip.config import Config, check_config
from biomedclip.errors import CheckpointError, ConfigError
from biomedclip.files import sha256_file, write_bytes, write_json
from biomedclip.models.catalog import bundled_folder
from biomedclip.models.export import WEIGHTS_FILE
from biomedclip.models.hub import file_hash
from biomedclip.models.zoo import find_model

CALIBRATION_FILE, SCOPE_FILE = "calibration.json", "scope.safetensors"
MAX_BYTES = 500_000
"""Of both files together: they travel inside the package."""
Floats = NDArray[np.float32]


class TaskFit(Config):
    """One task's validation split before and after the temperature."""

    task: str
    split: str
    n: int
    manifest_sha256: str
    nll: tuple[float, float]
    """Negative log likelihood at the model's own scale, and divided by the temperature."""
    ece: tuple[float, float]
    accuracy: float


class Confidence(Config):
    """What the threshold of the top probability gives on validation."""

    target: float = Field(gt=0, le=1)
    """Share of right answers asked for among the sure ones."""
    accuracy: float
    """Share of right answers among the sure ones, found."""
    coverage: float
    """Share of answers that are sure."""
    n: int
    reached: bool


class Domain(Config):
    """One kind of images the model was trained on."""

    name: str
    references: int
    """Embeddings that are stored, of the training split."""
    validation: int
    """Images that gave the yardstick, of the validation split."""


class Scope(Config):
    """How the stored reference embeddings are to be used."""

    sha256: str
    """Of `scope.safetensors`."""
    k: int = Field(ge=1)
    quantile: float = Field(gt=0, lt=1)
    """Share of each domain's validation images that are inside."""
    domains: tuple[Domain, ...] = Field(min_length=1)


class CalibrationFacts(Config):
    """The content of `calibration.json`."""

    weights_sha256: str
    """Of the weights file this was fitted for."""
    temperature: float = Field(gt=0)
    uncertain_below: float = Field(ge=0, le=1)
    confidence: Confidence
    tasks: tuple[TaskFit, ...]
    scope: Scope | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A model's calibration, ready for use."""

    facts: CalibrationFacts
    references: Floats | None = None
    """(R, D) unit embeddings of training images; None where no scope was fitted."""
    domain_of: NDArray[np.int32] | None = None
    """(R,) which of `facts.scope.domains` each belongs to."""
    yardsticks: Floats | None = None
    """(S,) distance at the stated quantile, one a domain."""

    @property
    def temperature(self) -> float:
        """Divides logits before the softmax."""
        return self.facts.temperature

    @property
    def uncertain_below(self) -> float:
        """Top probability, after the temperature, under which an answer is called uncertain."""
        return self.facts.uncertain_below

    def scope_scores(self, embeddings: Floats) -> Floats:
        """(N,) minus the distance to the nearest domain in units of its yardstick: under -1 is outside.

        `embeddings` (N, D) are unit vectors. Raises CheckpointError where no scope was fitted or D is another.
        """
        if self.references is None or self.domain_of is None or self.yardsticks is None or self.facts.scope is None:
            raise CheckpointError("calibration", "has no scope: no reference images were given when it was fitted")
        vectors = np.asarray(embeddings, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.references.shape[1]:
            raise CheckpointError("scope", "is of another model: its embeddings have another length",
                                  found=vectors.shape, todo=f"(N, {self.references.shape[1]})")  # fmt: skip
        ratios = np.stack([
            kth_distance(vectors, self.references[self.domain_of == number], self.facts.scope.k) / yardstick
            for number, yardstick in enumerate(self.yardsticks)
        ])  # fmt: skip
        return (-ratios.min(0)).astype(np.float32)

    def outside(self, embeddings: Floats) -> NDArray[np.bool_]:
        """(N,) whether an image is unlike all that the model was trained on."""
        return self.scope_scores(embeddings) < -1


def kth_distance(vectors: Floats, references: Floats, k: int) -> Floats:
    """(N,) distance from unit vectors (N, D) to their k-th nearest of (R, D), the furthest where R is below k."""
    place = min(k, len(references)) - 1
    found = np.empty(len(vectors), dtype=np.float32)
    for start in range(0, len(vectors), 4096):
        cosines = vectors[start : start + 4096] @ references.T
        kth = -np.partition(-cosines, place, axis=1)[:, place]
        found[start : start + 4096] = np.sqrt(np.maximum(2 - 2 * kth, 0))
    return found


def read_calibration(model: str | Path) -> Calibration | None:
    """The calibration beside a model's weights, by the name or folder that `biomedclip.load` takes; None where there is
    none. Raises CheckpointError where a file is broken or belongs to other weights."""
    folder = _find_folder(model)
    if folder is None or not (folder / CALIBRATION_FILE).is_file():
        return None
    path = folder / CALIBRATION_FILE
    facts = _read_facts(path)
    weights = folder / WEIGHTS_FILE
    if weights.is_file() and file_hash(weights) != facts.weights_sha256:
        raise CheckpointError(path, "was fitted for other weights than those beside it", found=facts.weights_sha256,
                              todo=f"run: biomedclip models calibrate {folder}")  # fmt: skip
    if facts.scope is None:
        return Calibration(facts=facts)
    return Calibration(facts=facts, **_read_scope(folder / SCOPE_FILE, facts.scope))


def write_calibration(
    folder: str | Path, facts: CalibrationFacts, *, references: Floats, domain_of: NDArray[np.int32], yardsticks: Floats
) -> Calibration:
    """Write both files and return what they give when they are read again; embeddings are stored in half precision.

    `facts.scope.sha256` is filled in here. Raises ConfigError where the files would be larger than they may be.
    """
    from safetensors.numpy import save

    folder = Path(folder)
    if facts.scope is None:
        raise ConfigError(folder, "a calibration is written with its scope", todo="give the references")
    packed = save({"references": references.astype(np.float16), "domain_of": domain_of, "yardsticks": yardsticks})
    if len(packed) > MAX_BYTES - 20_000:
        raise ConfigError(
            folder, f"the reference embeddings would be larger than {MAX_BYTES:,} bytes", found=f"{len(packed):,}",
            todo="keep fewer of them",
        )  # fmt: skip
    (folder / CALIBRATION_FILE).unlink(missing_ok=True)
    write_bytes(folder / SCOPE_FILE, packed)
    scope = facts.scope.model_copy(update={"sha256": sha256_file(folder / SCOPE_FILE)})
    facts = facts.model_copy(update={"scope": scope})
    write_json(folder / CALIBRATION_FILE, facts.model_dump(mode="json"))
    return Calibration(facts=facts, **_read_scope(folder / SCOPE_FILE, scope))


def _find_folder(model: str | Path) -> Path | None:
    """The folder that holds the model's weights; None for what comes from elsewhere."""
    from biomedclip.models.load import find_export

    text = str(model)
    path = Path(text.removeprefix("local-dir:"))
    # A folder that is called like a model is named by a path, as `load` has it.
    named = not isinstance(model, Path) and not text.startswith("local-dir:") and not ("/" in text and path.exists())
    facts = find_model(text) if named else None
    if facts is not None:
        return bundled_folder(facts.source.folder) if facts.source.folder else None
    return find_export(path) if path.is_dir() else None


def _read_facts(path: Path) -> CalibrationFacts:
    try:
        values: Any = json.loads(path.read_bytes())
        return check_config(values, CalibrationFacts, path)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(path, "is no calibration", found=str(error)[:120], todo="fit it again") from None


def _read_scope(path: Path, scope: Scope) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        data = path.read_bytes()
        arrays = load(data)
        references, domain_of, yardsticks = (arrays[name] for name in ("references", "domain_of", "yardsticks"))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            path, "holds no reference embeddings", found=str(error)[:80], todo="fit it again"
        ) from None
    if sha256_file(path) != scope.sha256:
        raise CheckpointError(path, f"is not the file {CALIBRATION_FILE} names", todo="fit it again")
    counts = tuple(int((domain_of == number).sum()) for number in range(len(scope.domains)))
    wanted = tuple(domain.references for domain in scope.domains)
    fits = (
        references.ndim == 2 and domain_of.shape == references.shape[:1] and yardsticks.shape == (len(wanted),)
        and counts == wanted and np.isfinite(references).all() and (yardsticks > 0).all()
    )  # fmt: skip
    if not fits:
        raise CheckpointError(path, f"does not hold what {CALIBRATION_FILE} says",
                              found=f"{references.shape}, {counts} a domain", todo="fit it again")  # fmt: skip
    wide = references.astype(np.float32)
    wide /= np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return {"references": wide, "domain_of": domain_of, "yardsticks": yardsticks}
