"""MetaCLIP's balancing: captions that say only what very many say are kept less often than those that say rare things.

Reads captions and a list of entries (MeSH terms, n-grams, any words worth knowing); yields how many captions say each
entry, and from those counts the probability that an epoch keeps a caption. An entry e said by c captions is kept with
p(e) = min(1, t / c), and a caption is kept where one of its entries is: P = 1 - product of (1 - p(e)); what says no
entry is dropped (Xu et al. 2024, "Demystifying CLIP data", section 3 and algorithm 1). The plan draws by that
probability and a hash of (seed, epoch, row), which is the same distribution as one draw for each entry, and needs no
generator and no rewritten shard.

Matching is MetaCLIP's: an entry counts where it stands between blanks, after `, . ; : ? ! `` ` have been set apart.
That is a look-up of runs of words and needs no automaton: the words of a caption are looked up as first words, of
which only a few begin longer entries.
"""

from __future__ import annotations

import csv
import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from biomedclip.config import Config
from biomedclip.errors import ConfigError, DataError
from biomedclip.files import sha256_file, write_atomic
from biomedclip.progress import Progress, silent
from biomedclip.shards import DatasetFolder

ENTRY_COLUMNS = {"entry": "string", "captions": "int64"}
"""Columns of the table of entries: the words, and the captions that say them."""

_APART = str.maketrans({sign: f" {sign} " for sign in ",.;:?!`"} | dict.fromkeys("\t\n\r", " "))
_FOLDED = b"lower"
_FORECAST_BY = 1_000_000
"""Captions whose matches are kept for the forecast: a thousandth off, and 24 million would be gigabytes."""


class MetaclipConfig(Config):
    """Which entries are balanced, and how strongly."""

    entries: str
    """The table that `biomedclip data entries` wrote: entries and the number of captions that say them."""
    most: Annotated[int, Field(ge=1)] | None = None
    """t itself: captions an entry may have before it is kept less often. MetaCLIP took 20,000 for 400 million."""
    tail: Annotated[float, Field(gt=0, le=1)] | None = None
    """t by the share of all matches that entries below it have, such as 0.06: needs no thought about the set's size."""

    @model_validator(mode="after")
    def _one_of_two(self) -> MetaclipConfig:
        if (self.most is None) == (self.tail is None):
            raise ValueError("needs either most or tail")
        return self


class KeepConfig(Config):
    """How often an epoch keeps a sample of a source."""

    metaclip: MetaclipConfig


class Entries:
    """Entries and the captions that say them. `lower`: neither captions nor entries have capitals."""

    def __init__(self, names: Iterable[str], *, lower: bool = True) -> None:
        spaced = (name.translate(_APART).strip() for name in names)
        self.names = tuple(dict.fromkeys(name.lower() if lower else name for name in spaced if name))
        self.lower = lower
        self._numbers = {name: number for number, name in enumerate(self.names)}
        lengths: dict[str, set[int]] = {}
        for name in self.names:
            first, *others = name.split(" ")
            if others:
                lengths.setdefault(first, set()).add(len(others) + 1)
        self._lengths = {first: tuple(sorted(found)) for first, found in lengths.items()}

    def __len__(self) -> int:
        return len(self.names)

    def match(self, caption: str) -> set[int]:
        """Numbers of the entries that a caption says."""
        words = (caption.lower() if self.lower else caption).translate(_APART).split(" ")
        numbers, lengths = self._numbers, self._lengths
        found = {numbers[word] for word in words if word in numbers}
        for place, word in enumerate(words):
            if word in lengths:
                for length in lengths[word]:
                    number = numbers.get(" ".join(words[place : place + length]))
                    if number is not None:
                        found.add(number)
        return found


@dataclass(frozen=True)
class MetaclipRule:
    """The probability that an epoch keeps a sample, by its caption. Raises nothing: any text has a probability."""

    entries: Entries
    probabilities: np.ndarray
    """(E,) of each entry."""
    sha256: str
    """Identity of the rule: equal entries, counts and t."""

    def __call__(self, captions: Iterable[str]) -> np.ndarray:
        """(N,) float32 probability of each caption; 0 where it says no entry."""
        return np.fromiter((1 - self._missed(caption) for caption in captions), dtype=np.float32)

    def _missed(self, caption: str) -> float:
        missed = 1.0
        for number in self.entries.match(caption):
            missed *= self._complements[number]
        return missed

    @cached_property
    def _complements(self) -> list[float]:
        found: list[float] = (1 - self.probabilities).tolist()
        return found


def make_rule(config: MetaclipConfig) -> MetaclipRule:
    """The rule that a config asks for. Raises DataError for a table that is none, ConfigError where nothing matched."""
    names, counts, lower = read_entries(Path(config.entries))
    if not counts.sum():
        raise ConfigError(config.entries, "has no entry that a caption says", todo="choose other terms")
    most = config.most if config.most is not None else most_of_tail(counts, config.tail or 1)
    identity = f"metaclip 1 {sha256_file(Path(config.entries))} {most}"
    probabilities = np.minimum(1.0, most / np.maximum(counts, 1))
    return MetaclipRule(Entries(names, lower=lower), probabilities, hashlib.sha256(identity.encode()).hexdigest())


def most_of_tail(counts: np.ndarray, tail: float) -> int:
    """t: the count of the entry at which entries, taken from the rarest up, have that share of all matches."""
    rising = np.sort(counts[counts > 0])
    reached = np.searchsorted(np.cumsum(rising), tail * rising.sum())
    return int(rising[min(int(reached), len(rising) - 1)])


def write_entries(path: Path, entries: Entries, counts: np.ndarray) -> None:
    """Write the table of entries, the most frequent first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    order = np.lexsort((np.arange(len(counts)), -counts))
    table = pa.table({"entry": [entries.names[number] for number in order], "captions": counts[order]})
    facts = {_FOLDED: b"yes" if entries.lower else b"no"}
    with write_atomic(path) as file:
        pq.write_table(table.replace_schema_metadata(facts), file, compression="zstd")


def read_entries(path: Path) -> tuple[list[str], np.ndarray, bool]:
    """Entries, captions that say them, and whether capitals were folded. Raises DataError for a file that is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    todo = "write one with: biomedclip data entries"
    try:
        table = pq.read_table(path)
        folded = (table.schema.metadata or {})[_FOLDED] == b"yes"
        return table["entry"].to_pylist(), table["captions"].to_numpy().astype(np.int64), folded
    except FileNotFoundError:
        raise DataError(path, "there is no such table of entries", todo=todo) from None
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(path, "is no table of entries", found=str(error)[:80], todo=todo) from None


def read_terms(source: str, datasets: Sequence[DatasetFolder] = ()) -> list[str]:
    """Terms to look for: lines of a .txt, a column `entry`, `term` or `ngram` of a .csv, .tsv or .parquet, or `mesh`.

    `mesh` are the MeSH terms of the datasets' own articles. Raises ConfigError for a file without terms.
    """
    if source == "mesh":
        found = {term for dataset in datasets for terms in dataset.articles["mesh"].to_pylist() for term in terms or ()}
        if not found:
            raise ConfigError("--terms mesh", "no article has MeSH terms", todo="build with mesh: a table of them")
        return sorted(found)
    path = Path(source)
    try:
        terms = (
            _read_column(path) if path.suffix in (".csv", ".tsv", ".parquet") else path.read_text("utf-8").split("\n")
        )
    except FileNotFoundError:
        raise ConfigError(path, "there is no such file", todo="name a file of terms, or mesh") from None
    except UnicodeDecodeError as error:
        raise ConfigError(path, f"is not UTF-8 at byte {error.start}", todo="save it as UTF-8") from None
    terms = [term.strip() for term in terms if term and term.strip()]
    if not terms:
        raise ConfigError(path, "holds no terms")
    return terms


def _read_column(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        return [str(term) for term in table[_term_column(path, table.column_names)].to_pylist() if term is not None]
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        column = _term_column(path, rows.fieldnames or ())
        return [row[column] for row in rows]


def _term_column(path: Path, columns: Iterable[str]) -> str:
    for name in ("entry", "term", "ngram"):
        if name in columns:
            return name
    raise ConfigError(path, "has no column entry, term or ngram", found=", ".join(columns))


def read_captions(dataset: DatasetFolder, split: str = "train") -> Iterator[str]:
    """The captions of a split in index order; only they are read, not the pictures beside them."""
    columns = ("shard", "text_offset", "text_size", "split")
    rows: Mapping[str, list[Any]] = dataset.index.select(columns).to_pydict()
    shard, file = None, -1
    try:
        for name, offset, size, where in zip(*(rows[column] for column in columns), strict=True):
            if where != split:
                continue
            if name != shard:
                if file >= 0:
                    os.close(file)
                shard, file = name, os.open(dataset.folder / name, os.O_RDONLY)
            yield os.pread(file, size, offset).decode(errors="replace")
    except OSError as error:
        raise DataError(dataset.folder / str(shard), "cannot be read", found=error.strerror) from None
    finally:
        if file >= 0:
            os.close(file)


@dataclass(frozen=True, slots=True)
class EntryCounts:
    """What a count found: the entries, those said at all, and t for the wanted tail."""

    entries: int
    said: int
    most: int
    forecasts: tuple[Forecast, ...]


@dataclass(frozen=True, slots=True)
class Forecast:
    """What an epoch keeps of a dataset's captions, before anything is trained; shares are of all captions."""

    dataset: str
    captions: int
    kept: float
    """Expected share."""
    unmatched: float
    """Share of captions that say no entry: they are never kept."""


class _Matches:
    """Matches of every so many-th caption of a dataset, end to end: enough to forecast by."""

    def __init__(self, captions: int) -> None:
        self._step = max(captions // _FORECAST_BY, 1)
        self.captions = 0
        self._numbers, self._ends = array("i"), array("q")

    def add(self, found: set[int]) -> None:
        if self.captions % self._step == 0:
            self._numbers.extend(found)
            self._ends.append(len(self._numbers))
        self.captions += 1

    def forecast(self, name: str, probabilities: np.ndarray) -> Forecast:
        missed = np.log1p(-np.minimum(probabilities, 1 - 1e-12))
        sums = np.concatenate([[0.0], np.cumsum(missed[np.array(self._numbers, dtype=np.int64)])])
        ends = np.array(self._ends, dtype=np.int64)
        starts = np.concatenate([[0], ends])[: len(ends)]
        kept = 1 - np.exp(sums[ends] - sums[starts])
        return Forecast(name, self.captions, float(kept.mean()), float((ends == starts).mean()))


def count_entries(
    folders: Sequence[Path], terms: Sequence[str], out: Path, *, tail: float = 0.06, lower: bool = True,
    split: str = "train", progress: Progress = silent,
) -> EntryCounts:  # fmt: skip
    """Count the entries over the captions of datasets, write the table, and forecast what `tail` would keep.

    Raises ConfigError for terms that no caption says, DataError for a dataset that cannot be read.
    """
    datasets = [DatasetFolder(folder) for folder in folders]
    entries = Entries((term for source in terms for term in read_terms(source, datasets)), lower=lower)
    counts = [0] * len(entries)
    matches = {}
    for dataset in datasets:
        size = dataset.splits.get(split, 0)
        if not size:
            raise DataError(dataset.folder, f"has no samples of split '{split}'", found=", ".join(dataset.splits))
        matches[str(dataset.folder)] = seen = _Matches(size)
        with progress(f"captions of {dataset.folder.name}", size) as advance:
            for caption in read_captions(dataset, split):
                found = entries.match(caption)
                for number in found:
                    counts[number] += 1
                seen.add(found)
                advance()
    counted = np.array(counts, dtype=np.int64)
    if not counted.sum():
        raise ConfigError("--terms", "no caption says any of the terms", found=f"{len(entries):,} terms")
    write_entries(out, entries, counted)
    most = most_of_tail(counted, tail)
    probabilities = np.minimum(1.0, most / np.maximum(counted, 1))
    forecasts = tuple(seen.forecast(name, probabilities) for name, seen in matches.items())
    return EntryCounts(len(entries), int((counted > 0).sum()), most, forecasts)
