"""The samples of a mixture: what reading one takes, as columns by row, and what the plan needs of them.

Reads the sources that a config names (dataset folders of ours or foreign tars, here or at a URL), chooses their rows
(`biomedclip.stream.selection`) and yields one `Rows` and one source of the plan for each part. A balanced source has
several parts. Columns are read from the index when they are asked for, shard by shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from biomedclip.errors import ConfigError
from biomedclip.files import write_atomic
from biomedclip.predicates import check_predicate
from biomedclip.stream.captions import CaptionMix
from biomedclip.stream.columns import READ_COLUMNS, ShardIndex, hash_text
from biomedclip.stream.fetch import Fetcher
from biomedclip.stream.mixture import Weight, mixing_weights, scale_weight
from biomedclip.stream.order import Kin
from biomedclip.stream.parts import RowNumbers, Selection
from biomedclip.stream.plan import PlanSource
from biomedclip.stream.presets import Augmentation
from biomedclip.stream.selection import Choice, select_rows
from biomedclip.stream.source import Place, locate, open_shards
from biomedclip.stream.tars import FetcherHere

Value = TypeVar("Value", covariant=True)

_CAPTIONS_AT_ONCE = 256


class KeepRule(Protocol):
    """What a caption says of how often its sample shall be seen."""

    @property
    def sha256(self) -> str:
        """Identity of the rule."""

    def __call__(self, captions: Iterable[str]) -> np.ndarray:
        """(N,) probability of each caption that an epoch keeps its sample."""


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
    weight: Weight = 1.0
    split: str = "train"
    where: str | None = None
    """An SQL condition over the columns of the index; `article.<column>` are the facts of the sample's article."""
    caps: Mapping[str, int] = field(default_factory=dict)
    """`label` and `concept`: the most samples an epoch takes of each label or concept."""
    keep: KeepRule | None = None
    """How likely an epoch keeps a sample, by its first caption."""
    balance: bool | Literal["weights"] = False
    """True: every class (first label of a sample) takes the same share of the source, however many samples it has.
    `weights`: a sample is used as often as the class weights say that the data set was compiled with."""
    captions: CaptionMix | None = None
    """How often each kind of text is read; None for one of the captions, each as likely."""
    augmentation: str | Augmentation = "auto"
    """A preset of `biomedclip.stream.presets`, an augmentation, or `auto`: by each sample's modality."""

    @property
    def choice(self) -> Choice:
        """What of the source is used."""
        return Choice(split=self.split, where=self.where, caps=self.caps, balance=self.balance)


class Column(Sequence[Value]):
    """One column of the rows of a plan source, read from the index when asked for."""

    def __init__(self, index: ShardIndex, rows: RowNumbers, name: str) -> None:
        self._index, self._rows, self._name = index, rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        return self._index.value(int(self._rows[row]), self._name)

    def __iter__(self) -> Iterator[Any]:
        return (self[row] for row in range(len(self)))


class LabelIds(Column[tuple[int, ...]]):
    """Labels of the rows as ids of the mixture."""

    def __init__(self, index: ShardIndex, rows: RowNumbers, ids: Mapping[str, int]) -> None:
        super().__init__(index, rows, "labels")
        self._ids = ids

    def __getitem__(self, row: Any) -> Any:
        return tuple(self._ids[label] for label in super().__getitem__(row) or ())


class ArticleIds(Column[int]):
    """Articles of the rows as ids, equal in all sources; -1 for none."""

    def __init__(self, index: ShardIndex, rows: RowNumbers) -> None:
        super().__init__(index, rows, "article_id")

    def __getitem__(self, row: Any) -> Any:
        article = super().__getitem__(row)
        return -1 if article is None else hash_text(article)


@dataclass(frozen=True, slots=True)
class Rows:
    """What reading needs of the samples of one plan source, as columns, plus their labels as ids of the mixture."""

    place: Place
    source: StreamSource
    numbers: RowNumbers
    """Their rows in the index."""
    columns: Mapping[str, Sequence[Any]]
    labels: Sequence[tuple[int, ...]]
    articles: Sequence[int]
    most_labels: int
    """Of one sample of the source."""

    def __len__(self) -> int:
        return len(self.numbers)


def read_rows(
    sources: Sequence[StreamSource],
    size_exponent: float,
    fetcher: FetcherHere,
    *,
    withdrawn: Mapping[str, frozenset[str]] | None = None,
) -> tuple[list[Rows], list[PlanSource], list[str]]:
    """The samples of a mixture, the plan's view of them, and the names of the label ids.

    `withdrawn` are the keys taken back from each source when a plan was made, to make it again after others were.

    A balanced source becomes one plan source per class, or per distinct class weight. A label's id is its place among
    all `source: label` names, so that two sets with a class `normal` do not share it. Raises DataError for a missing
    folder or an empty split, ConfigError for a `where` that is none.
    """
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError("data.sources", "two sources have one name", found=", ".join(names), todo="rename one")
    opened = fetcher.open()
    places = [find_place(source, opened) for source in sources]
    if withdrawn is not None:
        places = [
            replace(place, withdrawn=withdrawn.get(source.name, frozenset()))
            for source, place in zip(sources, places, strict=True)
        ]
    selections = [
        select_rows(place, source.name, source.choice, opened.config.folder)
        for source, place in zip(sources, places, strict=True)
    ]
    label_names = sorted(
        f"{source.name}: {label}"
        for source, selection in zip(sources, selections, strict=True)
        for label in selection.labels
    )
    label_ids = {name: number for number, name in enumerate(label_names)}
    rows, plan_sources = [], []
    weights = mixing_weights([source.weight for source in sources], [len(s) for s in selections], size_exponent)
    for source, place, selection, weight in zip(sources, places, selections, weights, strict=True):
        own = {label: label_ids[f"{source.name}: {label}"] for label in selection.labels}
        keep = _read_keep(source, place, selection, fetcher)
        done = 0
        for part in selection.parts:
            index = place.index
            columns = {column: Column[Any](index, part.rows, column) for column in READ_COLUMNS}
            rows.append(Rows(place, source, part.rows, columns, LabelIds(index, part.rows, own),
                             ArticleIds(index, part.rows), selection.most_labels))  # fmt: skip
            plan_sources.append(
                PlanSource(
                    name=part.name, weight=scale_weight(weight, part.share), bounds=bounds_of(index, part.rows),
                    kin=partial(_kin_of, index, part.rows), content=selection.sha256, caps=part.caps,
                    keep=None if keep is None else keep[done : done + len(part.rows)],
                )
            )  # fmt: skip
            done += len(part.rows)
    return rows, plan_sources, label_names


def find_place(source: StreamSource, fetcher: Fetcher) -> Place:
    """Where a source lies. Raises DataError where there is none, ConfigError for a `where` that is no condition."""
    wanted = check_predicate(source.where, f"data.sources: {source.name}: where") if source.where is not None else ()
    return locate(source.path, source.shards, source.name, fetcher, article_key=source.article_key,
                  article_pattern=source.article_pattern, articles="article" in wanted)  # fmt: skip


def bounds_of(index: ShardIndex, rows: RowNumbers) -> np.ndarray:
    """(S + 1,) where the chosen rows of each shard begin among all chosen rows, and their number."""
    if isinstance(rows, range):
        return np.clip(index.bounds - rows.start, 0, len(rows))
    found: np.ndarray = np.searchsorted(rows, index.bounds).astype(np.int64)
    return found


def index_rows(rows: RowNumbers, places: np.ndarray) -> np.ndarray:
    """(N,) rows of the index at places among the chosen rows."""
    return places + rows.start if isinstance(rows, range) else rows[places]


def _kin_of(index: ShardIndex, rows: RowNumbers, places: np.ndarray) -> Kin:
    return index.kin(index_rows(rows, places))


def _read_keep(source: StreamSource, place: Place, selection: Selection, fetcher: FetcherHere) -> np.ndarray | None:
    """(N,) keep-probabilities of the rows of all parts, end to end; read from the cache folder where they are known."""
    if source.keep is None:
        return None
    path = fetcher.config.folder / "keep" / f"{selection.sha256[:32]}-{source.keep.sha256[:32]}.npy"
    with suppress(OSError, ValueError):
        stored: np.ndarray = np.load(path, allow_pickle=False)
        if len(stored) == len(selection):
            return stored
    keep = np.concatenate([source.keep(_captions(place, part.rows, fetcher)) for part in selection.parts])
    keep = keep.astype(np.float32)
    with suppress(OSError), write_atomic(path) as file:
        np.save(file, keep, allow_pickle=False)
    return keep


def _captions(place: Place, rows: RowNumbers, fetcher: FetcherHere) -> Iterator[str]:
    """The first caption of each row, in order."""
    columns = {name: Column[Any](place.index, rows, name) for name in READ_COLUMNS}
    shards = open_shards(place, columns, fetcher, ("text",))  # a hundredth of the bytes
    try:
        for first in range(0, len(rows), _CAPTIONS_AT_ONCE):
            some = range(first, min(first + _CAPTIONS_AT_ONCE, len(rows)))
            shards.prepare(some)
            for row in some:
                yield shards.read(row, "text").decode(errors="replace")
            shards.release(some)
    finally:
        shards.close()
