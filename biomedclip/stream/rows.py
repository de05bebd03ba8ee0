"""The samples of a mixture as columns, and what the plan needs of them.

Reads the sources that a config names (dataset folders of ours or foreign tars, here or at a URL) and yields, for each
source of the plan, the columns that reading a sample takes. A balanced source becomes several sources of the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from biomedclip.errors import ConfigError, DataError
from biomedclip.stream.plan import PlanSource, mixing_weights
from biomedclip.stream.presets import Augmentation
from biomedclip.stream.source import FetcherHere, Place, locate

_READ_COLUMNS = ("key", "shard", "image_offset", "image_size", "image_format", "image_crc32", "text_offset",
                 "text_size", "json_offset", "json_size", "num_captions", "modality")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSource:
    """One source of a training mixture, restricted to a split; `weight` is its share of every batch.

    `path` is a dataset folder of ours, here or at a URL, or the address of foreign WebDataset tars, as `shards` is a
    list of such addresses; see `biomedclip.stream.source`.
    """

    name: str
    path: str | Path = ""
    shards: tuple[str, ...] = ()
    article_key: str | None = None
    """Foreign tars: the key of a sample's json that names its article."""
    article_pattern: str | None = None
    """Foreign tars: a regular expression that finds the article in a sample's key."""
    weight: float = 1.0
    split: str = "train"
    balance: bool | Literal["weights"] = False
    """True: every class (first label of a sample) takes the same share of the source, however many samples it has.
    `weights`: a sample is used as often as the class weights say that the data set was compiled with."""
    augmentation: str | Augmentation = "auto"
    """A preset of `biomedclip.stream.presets`, an augmentation, or `auto`: by each sample's modality."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What reading needs of the samples of one plan source, as columns, plus their labels as ids of the mixture."""

    place: Place
    source: StreamSource
    columns: dict[str, list[Any]]
    labels: list[tuple[int, ...]]
    articles: list[int]

    def __len__(self) -> int:
        return len(self.labels)


def read_rows(
    sources: Sequence[StreamSource], size_exponent: float, fetcher: FetcherHere
) -> tuple[list[Rows], list[PlanSource], list[str]]:
    """The samples of a mixture, the plan's view of them, and the names of the label ids.

    A balanced source becomes one plan source per class, or per distinct class weight. A label's id is its place among
    all `source: label` names, so that two sets with a class `normal` do not share it. Raises DataError for a missing
    folder or an empty split.
    """
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError("data.sources", "two sources have one name", found=", ".join(names), todo="rename one")
    places = [
        locate(source.path, source.shards, source.name, fetcher.open(), article_key=source.article_key,
               article_pattern=source.article_pattern)
        for source in sources
    ]  # fmt: skip
    tables = [_read_split(source, place) for source, place in zip(sources, places, strict=True)]
    label_names = sorted(
        {f"{s.name}: {label}" for s, table in zip(sources, tables, strict=True) for label in _known(table["labels"])}
    )
    articles = sorted({a for table in tables for a in table["article_id"] if a is not None})
    label_ids = {name: number for number, name in enumerate(label_names)}
    article_ids = {name: number for number, name in enumerate(articles)}
    rows, plan_sources = [], []
    sizes = [len(table["key"]) for table in tables]
    weights = mixing_weights([source.weight for source in sources], sizes, size_exponent)
    for source, place, table, weight in zip(sources, places, tables, weights, strict=True):
        for part, (share, members) in _parts(source, place, table).items():
            taken = {column: [values[i] for i in members] for column, values in table.items()}
            groups = tuple(taken["article_id"])
            plan_sources.append(PlanSource(name=part, weight=weight * share, groups=groups))
            labels = [tuple(label_ids[f"{source.name}: {x}"] for x in names or ()) for names in taken["labels"]]
            columns = {column: taken[column] for column in _READ_COLUMNS}
            numbers = [article_ids.get(a, -1) for a in groups]
            rows.append(Rows(place, source, columns, labels, numbers))
    return rows, plan_sources, label_names


def _read_split(source: StreamSource, place: Place) -> dict[str, list[Any]]:
    index = place.table.select([*_READ_COLUMNS, "article_id", "labels", "split"])
    table: dict[str, list[Any]] = index.to_pydict()
    chosen = [i for i, split in enumerate(table["split"]) if split == source.split]
    if not chosen:
        found = ", ".join(sorted(set(table["split"]))) or "no samples"
        raise DataError(place.where, f"has no samples of split '{source.split}'", found=found)
    return {column: [values[i] for i in chosen] for column, values in table.items()}


def _parts(source: StreamSource, place: Place, table: Mapping[str, list[Any]]) -> dict[str, tuple[float, list[int]]]:
    """Plan source name -> share of the source and rows: all of it, or a part per class or weight to be balanced."""
    if not source.balance:
        return {source.name: (1.0, list(range(len(table["key"]))))}
    parts: dict[str, list[int]] = {}
    if source.balance == "weights":
        # Samples of one weight are used equally often: shuffled together, no class of them needs slots of its own.
        weights = _stored_weights(place, table["labels"])
        for i, weight in enumerate(weights):
            parts.setdefault(f"{source.name}/{weight:g}", []).append(i)
        whole = sum(weights)
        return {name: (sum(weights[i] for i in rows) / whole, rows) for name, rows in sorted(parts.items())}
    for i, labels in enumerate(table["labels"]):
        parts.setdefault(f"{source.name}/{labels[0] if labels else ''}", []).append(i)
    return {name: (1 / len(parts), rows) for name, rows in sorted(parts.items())}


def _stored_weights(place: Place, labels: Sequence[Sequence[str] | None]) -> list[float]:
    """The weight of each sample: the largest class weight of its labels. Raises DataError where the set has none."""
    manifest = place.dataset.manifest if place.dataset else {}
    balance = manifest.get("provenance", {}).get("balance")
    if not balance:
        raise DataError(place.where, "was compiled without class weights", todo="build it from a recipe with balance, "
                        "or use balance: true")  # fmt: skip
    weights = balance["class_weights"]
    # A class that the training images lacked when the set was compiled has no weight, and is used as it comes.
    return [max(weights.get(label, 1.0) for label in names or ("",)) for names in labels]


def _known(column: Sequence[Sequence[str] | None]) -> set[str]:
    return {label for labels in column for label in labels or ()}
