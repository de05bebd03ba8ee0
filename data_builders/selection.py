"""What a selection is configured by, and what its file says of itself: the record between select and pack.

A selection is one parquet with a row for every pair seen; its metadata hold the config, the folders of units it was
made from, the funnel and the hash of all that was decided on. `data_builders.select` writes it, `data_builders.pack`
turns it into a dataset folder, and any reader of parquet can look into it.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from biomedclip.config import Config
from biomedclip.errors import ConfigError, DataError
from biomedclip.predicates import check_predicate
from data_builders.caption_quality import CaptionConfig
from data_builders.dedup import REASONS as DUPLICATE_REASONS
from data_builders.dedup import DedupConfig
from data_builders.filters import RuleConfig
from data_builders.hamming import DEFAULT_DISTANCE, MAX_DISTANCE
from data_builders.units import PAIR_COLUMNS

REASONS = (
    "excluded_article", "where", "licence_not_allowed", "other_language", "image_too_small", "image_too_elongated",
    "caption_too_short", "caption_too_long", "caption_boilerplate", "caption_not_text", "caption_repetitive",
    "no_date", "contaminated", "duplicate_key", *DUPLICATE_REASONS,
)  # fmt: skip
"""Why a pair is not selected, in the order in which it is asked; the first that applies is the one that counts."""

SELECTION_COLUMNS: dict[str, str] = {
    **PAIR_COLUMNS,
    "raw": "int32",
    "dup_cluster": "int64",
    "matches": "list<string>",
    "reason": "string",
}
"""Columns of a selection: the pair's, with its final split; `raw` is the position of its folder in `Selection.raws`,
`matches` says which samples of evaluation sets it shows, `reason` is null where it is selected."""

SELECTION_KEY = "biomedclip_selection"
SELECTION_FORMAT = 1


class TimeSplit(Config):
    """Splits by the day of publication, so that a model is tested on what was published after all it has seen."""

    val_from: str | None = None
    """First day of `val`: 2024, 2024-07 or 2024-07-01. A pair's missing month or day counts as the first."""
    test_from: str | None = None
    """First day of `test`."""

    @field_validator("val_from", "test_from")
    @classmethod
    def _check_date(cls, value: str | None) -> str | None:
        try:
            return None if value is None else datetime.date.fromisoformat(first_day(value)).isoformat()
        except ValueError:
            raise ValueError("must be a date such as 2024, 2024-07 or 2024-07-01") from None

    @model_validator(mode="after")
    def _check_order(self) -> TimeSplit:
        if self.val_from is None and self.test_from is None:
            raise ValueError("needs val_from, test_from or both")
        if self.val_from and self.test_from and self.val_from >= self.test_from:
            raise ValueError("val_from must be before test_from")
        return self


class SelectConfig(Config):
    """What a selection takes, and what it leaves out."""

    exclude_articles: str | None = None
    """A text file with one article a line to leave out: PMC id with or without version, or DOI; # begins a comment."""
    where: str | None = None
    """A DuckDB condition over PAIR_COLUMNS and `article` (a struct of article facts, such as article.journal)."""
    licence: Literal["commercial-derivatives", "commercial", "noncommercial", "all"] | None = None
    """Narrows the preset that the pairs were harvested under."""
    languages: tuple[str, ...] | None = None
    """Primary language tags of articles to keep; one whose language nothing states is kept."""
    filters: RuleConfig = RuleConfig()
    captions: CaptionConfig = CaptionConfig()
    split_by_time: TimeSplit | None = None
    """None keeps the split of the pair: of an article by a hash of its identity, of a labelled set as it says."""
    against: tuple[str, ...] = ()
    """Hash files of evaluation sets, see `biomedclip data hashes`."""
    contaminated: Literal["drop", "flag"] = "drop"
    against_distance: int = Field(default=DEFAULT_DISTANCE, ge=0, le=MAX_DISTANCE)
    """Bits in which perceptual hashes may differ from those of an evaluation set."""
    dedup: DedupConfig = DedupConfig()
    allow_unfinished: bool = False
    """Select from folders whose harvest still owes units of its plan."""

    @field_validator("where")
    @classmethod
    def _check_where(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                check_predicate(value)
        except ConfigError as error:
            raise ValueError(f"{error.wrong}; {error.todo}") from None
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """One folder of units, as a selection saw it."""

    path: str
    """Relative to the selection's own folder."""
    name: str
    sha256: str
    """Of the hashes of all its units: equal pairs, equal hash."""
    units: list[tuple[str, int]]
    """Name and number of pairs, in the order of the selection's rows."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What its harvest.json says of notices, snapshot, licence preset and languages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a selection file says of itself."""

    biomedclip: str
    config: dict[str, Any]
    identity: str
    """Hex sha256 of config, pairs, hash files and exclusion list: equal identity, equal decisions."""
    raws: list[Raw]
    seen: int
    selected: int
    reasons: dict[str, int]
    """Of the rows that are not selected, in the order of REASONS."""
    splits: dict[str, int]
    clusters: int
    """Of duplicates, among the pairs that were compared."""
    contamination: dict[str, dict[str, int]]
    """Evaluation set -> pairs that show one of its samples, samples that are shown, and matches by kind."""
    sha256: dict[str, str]
    """Of the files that the config names."""


def read_selection(path: str | Path) -> Selection:
    """What a selection file says of itself. Raises DataError where it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    todo = "make one with: biomedclip data select"
    try:
        facts = json.loads((pq.read_metadata(path).metadata or {})[SELECTION_KEY.encode()])
        if facts.pop("format") != SELECTION_FORMAT:
            raise DataError(path, f"is not of format {SELECTION_FORMAT}", todo=todo)
        raws = [Raw(**{**raw, "units": [tuple(unit) for unit in raw["units"]]}) for raw in facts.pop("raws")]
        return Selection(raws=raws, **facts)
    except FileNotFoundError:
        raise DataError(path, "there is no such file", todo=todo) from None
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError):
        raise DataError(path, "is no selection", todo=todo) from None


def describe_selection(selection: Selection) -> str:
    """The funnel of a selection as lines of text."""
    lines = [f"{selection.seen:,} pairs seen, {selection.selected:,} selected"]
    lines += [f"  {count:>9,} left out: {reason}" for reason, count in selection.reasons.items()]
    lines += [f"  {count:>9,} in {split}" for split, count in selection.splits.items()]
    if selection.clusters:
        lines.append(f"  {selection.clusters:>9,} clusters of duplicates")
    for name, found in selection.contamination.items():
        lines.append(f"  {found['pairs']:>9,} show one of {found['samples']:,} samples of {name}")
    return "\n".join(lines)


def first_day(date: str) -> str:
    """An ISO date whose missing month or day is the first."""
    return date + {4: "-01-01", 7: "-01"}.get(len(date), "")
