"""What is known about a model trained here, as one JSON that its card is written from: `results.json`.

Reads a JSON file of this schema (`collect_record.py` puts it together from run folders and results); yields a
`TrainingRecord`. It lies beside the weights, so that the card of a model can be written again, and checked, without the
runs and the data that made it. Words that no file can know come from `CardNotes`, which the people who trained it fill.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from biomedclip.config import Config, check_config
from biomedclip.errors import ConfigError, DataError

RECORD_FILE = "results.json"
HIGHER_IS_BETTER = frozenset({
    "accuracy", "balanced_accuracy", "macro_f1", "mcc", "auroc", "auprc", "kappa", "recall@1", "recall@5", "recall@10",
})  # fmt: skip


class CardNotes(Config):
    """What only the people who trained a model know; the YAML of `biomedclip models card RUN --notes`."""

    title: str
    summary: str
    licence: str
    """Id as on the Hub, such as `apache-2.0` or `cc-by-nc-4.0`."""
    intended_use: str
    out_of_scope: str
    training_data: str
    """What the data are, in words; licences and counts come from the manifests."""
    consent: str
    """Consent and de-identification of the data."""
    population: str
    """Whom and what the data cover: countries, ages, modalities, languages."""
    limitations: tuple[str, ...] = Field(min_length=1)
    subgroups: str = "not measured"
    contact: str
    repo: str | None = None
    """Where it will be published or what `load` takes, for the example."""
    weights: str | None = None
    """Why the weights cannot be had, where they cannot."""
    text_licence: str | None = None
    """Of the sentences that a text tower learned from, where there was such a run: a text file carries none."""
    starting_point: str | None = None
    """Where the first weights came from, where the config's name says too little."""
    hardware: str | None = None
    """What trained it, where the run's own facts say too little."""
    targets: dict[str, float] = Field(default_factory=dict)
    """Task -> value of its primary metric that was aimed at before training."""


class Score(Config):
    """A metric with its interval."""

    value: float
    ci_low: float
    ci_high: float
    ci_method: str = "interval"
    n: int


class GroupScore(Config):
    """The primary metric within one subgroup or class; `value` is null where it is undefined there."""

    name: str
    n: int
    value: float | None
    ci_low: float | None = None
    ci_high: float | None = None


class Confusion(Config):
    """One kind of wrong answer."""

    truth: str
    answer: str
    count: int
    of: int
    """Images of that class."""


class TaskRecord(Config):
    """One task, scored with the trained weights and, where that was measured, with the ones training began from."""

    task: str
    title: str
    split: str
    primary: str
    metrics: dict[str, Score]
    start: Score | None = None
    """The primary metric at the starting point, on the same samples."""
    manifest_sha256: str
    num_groups: int | None = None
    """Units that the interval resamples together."""
    group: str | None = None
    """What such a unit is."""
    target: float | None = None
    majority: float | None = None
    """What the most frequent answer would get in the primary metric."""
    leakage: str = "not checked"
    classes: tuple[GroupScore, ...] = ()
    """Share of each class's images that are right."""
    attribute: str | None = None
    """What the subgroups are of."""
    subgroups: tuple[GroupScore, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    """Most frequent first."""
    worst_corruption: GroupScore | None = None

    @property
    def beats_start(self) -> bool | None:
        """Whether the interval lies above the starting point's; None where that was not measured."""
        if self.start is None:
            return None
        own = self.metrics[self.primary]
        if self.primary.rsplit("/", 1)[-1] in HIGHER_IS_BETTER:
            return own.ci_low > self.start.ci_high
        return own.ci_high < self.start.ci_low

    @property
    def reaches_target(self) -> bool | None:
        """Whether the value is as good as aimed at; None without a target."""
        if self.target is None:
            return None
        value = self.metrics[self.primary].value
        better = self.primary.rsplit("/", 1)[-1] in HIGHER_IS_BETTER
        return value >= self.target if better else value <= self.target


class SourceRecord(Config):
    """One dataset folder or file of sentences that was trained on."""

    name: str
    samples: int
    splits: dict[str, int] = Field(default_factory=dict)
    licences: dict[str, int]
    sha256: str
    """Of the hashes of its shards, or of a text file: equal bytes, equal hash."""


class RunRecord(Config):
    """One training run; a model may have gone through several."""

    task: str
    """`pretraining`, or what the config's `task` says."""
    config_sha256: str
    """Of config.yaml."""
    starts_from: str
    seed: int | None
    steps: int | None
    hours: float | None
    machine: str
    git_commit: str | None
    versions: dict[str, str] = Field(default_factory=dict)


class WeightsRecord(Config):
    """The weights that were scored."""

    file: str
    sha256: str
    bytes: int
    parameters: int
    fingerprint: str
    """Of the loaded tensors; results name it."""
    precision: Literal["float32", "float16"] = "float32"
    preprocess: str
    context: int


class TrainingRecord(Config):
    """The whole file."""

    schema_version: Annotated[int, Field(ge=1, le=1)] = 1
    name: str
    notes: CardNotes
    weights: WeightsRecord
    runs: Annotated[tuple[RunRecord, ...], Field(min_length=1)]
    """First to last."""
    sources: Annotated[tuple[SourceRecord, ...], Field(min_length=1)]
    tasks: Annotated[tuple[TaskRecord, ...], Field(min_length=1)]


def read_record(path: str | Path) -> TrainingRecord:
    """The record in a file. Raises DataError where it is none."""
    try:
        values: Any = json.loads(Path(path).read_bytes())
        return check_config(values, TrainingRecord, path)
    except (OSError, ValueError, ConfigError) as error:
        raise DataError(path, "is no record of a training", found=str(error)[:160],
                        todo="write it with: biomedclip models card RUN --notes … --results … --out results.json"
                        ) from None  # fmt: skip
