"""Filled tables of experts to a label for every sample: votes by cluster, then `annotations.parquet` in the dataset.

Reads one table an annotator (csv, or xlsx as Excel saves it) and the clustering that they were made for. A label counts
where more than half of those who wrote one for that cluster wrote it; a tie is nobody's word, stays null and is
reported, and so does every cluster that nobody labelled. Labels that differ in case or blanks are one; labels that
differ in a letter are kept apart and reported, because only a person knows whether they are a typo. The index itself is
never changed: its hash is in the manifest, so the labels lie beside it, and `DatasetFolder.index` joins them.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from biomedclip.annotation.clusters import read_assignment
from biomedclip.annotation.embeddings import Embeddings
from biomedclip.errors import ConfigError, DataError
from biomedclip.files import sha256_file, write_atomic
from biomedclip.layouts.cells import read_cells
from biomedclip.schema import ANNOTATION_COLUMNS
from biomedclip.shards import ANNOTATION_KEY, ANNOTATIONS, MANIFEST, arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa

VOTED = ("label", "secondary", "keep")
_YES, _NO = ("yes", "y", "true", "1", "keep"), ("no", "n", "false", "0", "drop")

Votes = dict[str, dict[str, list[str]]]
"""Field -> cluster -> one word an annotator who wrote one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """A cluster whose annotators disagree without a majority."""

    cluster: str
    field: str
    votes: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What was written, and what a person should look at."""

    samples: int
    """With a label."""
    of: int
    clusters: int
    """With a label."""
    of_clusters: int
    annotators: int
    labels: Mapping[str, int]
    """Label -> samples, the most frequent first."""
    agreement: float | None
    """Of the clusters that two or more labelled, the share on which all agree; None where there are none."""
    ties: tuple[Tie, ...]
    near_labels: tuple[str, ...]
    """Pairs of labels that look like one and its typo."""
    path: Path


def apply_labels(dataset: str | Path, tables: Sequence[str | Path], embeddings: str | Path) -> Applied:
    """Write what the tables say of the samples of a dataset folder, in place of what earlier tables said.

    Raises DataError where a table is not one for these clusters, names one twice or labels nothing, and where the
    embeddings are of another dataset.
    """
    if not tables:
        raise ConfigError("TABLE", "is missing", todo="name the filled table of each annotator")
    found = Embeddings(embeddings)
    folder = found.open_dataset(dataset).folder
    assigned = read_assignment(found)
    clusters = assigned["cluster"].to_pylist()
    sizes = Counter(clusters)
    votes = collect_votes([read_votes(Path(table), sizes) for table in tables])
    if not votes["label"]:
        raise DataError(tables[0], "labels no cluster", todo="fill the column `label`")
    decided, ties = decide(votes)
    _write(folder, found, assigned, decided, tables)
    labels: Counter[str] = Counter()
    for cluster, label in decided["label"].items():
        labels[label] += sizes[cluster]
    shared = [words for words in votes["label"].values() if len(words) > 1]
    return Applied(
        samples=sum(labels.values()), of=len(clusters), clusters=len(decided["label"]), of_clusters=len(sizes),
        annotators=len(tables), labels=dict(labels.most_common()), ties=tuple(ties), path=folder / ANNOTATIONS,
        agreement=sum(len(set(words)) == 1 for words in shared) / len(shared) if shared else None,
        near_labels=tuple(find_near_labels(votes)),
    )  # fmt: skip


def read_votes(path: Path, known: Mapping[str, int]) -> dict[str, dict[str, str]]:
    """Cluster -> field -> what one annotator wrote, empty cells left out.

    Raises DataError, naming the row, for a cluster that is not `known` or comes twice and for a `keep` that is neither
    yes nor no; and where the table has no such columns.
    """
    votes: dict[str, dict[str, str]] = {}
    for number, cells in read_cells(path, delimiter=_find_delimiter(path)):
        where = f"{path}: row {number}"
        missing = [column for column in ("cluster", "label") if column not in cells]
        if missing:
            raise DataError(path, f"has no column {missing[0]}", found=", ".join(cells)[:100],
                            todo="fill the table that `data annotate cluster` wrote")  # fmt: skip
        cluster = cells["cluster"].strip()
        if cluster not in known:
            raise DataError(where, "names a cluster that is not of this clustering", found=repr(cluster)[:40],
                            todo=_explain_stranger(cluster, known))  # fmt: skip
        if cluster in votes:
            raise DataError(where, "is the second row of its cluster", found=cluster, todo="remove one")
        votes[cluster] = {field: word for field in VOTED if (word := _read_cell(field, cells.get(field) or "", where))}
    if not votes:
        raise DataError(path, "has no row", todo="fill the table that `data annotate cluster` wrote")
    return votes


def _read_cell(field: str, cell: str, where: str) -> str:
    word = " ".join(cell.split())
    if field != "keep" or not word:
        return word
    if word.lower() not in (*_YES, *_NO):
        raise DataError(where, "has a `keep` that is neither yes nor no", found=repr(word)[:40], todo="write yes or no")
    return "yes" if word.lower() in _YES else "no"


def _find_delimiter(path: Path) -> str | None:
    """A semicolon where the header has more of them than commas, as Excel writes in half of Europe."""
    if path.suffix.lower() != ".csv" or not path.is_file():
        return None
    with path.open("rb") as file:
        header = file.readline(10_000)
    return ";" if header.count(b";") > header.count(b",") else None


def _explain_stranger(cluster: str, known: Mapping[str, int]) -> str:
    first = next(iter(known))
    if cluster.partition("-")[0] != first.partition("-")[0]:
        return f"the table was made for another clustering; those of the embeddings now begin with {first[:6]}"
    return "leave the column `cluster` as it was"


def collect_votes(tables: Sequence[Mapping[str, Mapping[str, str]]]) -> Votes:
    """The words of all annotators, in the spelling that most of them use."""
    spellings: dict[str, Counter[str]] = {}
    for table in tables:
        for words in table.values():
            for field in ("label", "secondary"):
                if field in words:
                    spellings.setdefault(words[field].casefold(), Counter())[words[field]] += 1
    usual = {folded: min(found.items(), key=lambda item: (-item[1], item[0]))[0] for folded, found in spellings.items()}
    votes: Votes = {field: {} for field in VOTED}
    for table in tables:
        for cluster, words in table.items():
            for field, word in words.items():
                votes[field].setdefault(cluster, []).append(word if field == "keep" else usual[word.casefold()])
    return votes


def decide(votes: Votes) -> tuple[dict[str, dict[str, str]], list[Tie]]:
    """Field -> cluster -> the word of more than half of those who wrote one, and the clusters without such a word."""
    decided: dict[str, dict[str, str]] = {field: {} for field in votes}
    ties = []
    for field, by_cluster in votes.items():
        for cluster, words in sorted(by_cluster.items()):
            counts = Counter(words)
            word, count = counts.most_common(1)[0]
            if 2 * count > len(words):
                decided[field][cluster] = word
            else:
                ties.append(Tie(cluster=cluster, field=field, votes=dict(sorted(counts.items()))))
    return decided, ties


def find_near_labels(votes: Votes) -> list[str]:
    """`'histopatology' (written 1 time) is close to 'histopathology' (5)`, the rarer first."""
    counts: Counter[str] = Counter()
    for field in ("label", "secondary"):
        for words in votes[field].values():
            counts.update(words)
    lines = []
    ordered = sorted(counts, key=lambda word: (counts[word], word))
    for place, word in enumerate(ordered):
        others = {other.casefold(): other for other in ordered[place + 1 :]}
        for near in difflib.get_close_matches(word.casefold(), others, n=3, cutoff=0.85):
            times = f"{counts[word]} time{'s' if counts[word] > 1 else ''}"
            lines.append(f"'{word}' (written {times}) is close to '{others[near]}' ({counts[others[near]]})")
    return lines


def _write(
    folder: Path, found: Embeddings, assigned: pa.Table, decided: Mapping[str, Mapping[str, str]],
    tables: Sequence[str | Path],
) -> None:  # fmt: skip
    """The side table of a dataset; its metadata say of which dataset, by which model and from which tables it is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    clusters = assigned["cluster"]
    keep = {cluster: word == "yes" for cluster, word in decided["keep"].items()}
    columns = {
        "key": assigned["key"],
        "cluster": clusters,
        "label": [decided["label"].get(cluster) for cluster in clusters.to_pylist()],
        "secondary": [decided["secondary"].get(cluster) for cluster in clusters.to_pylist()],
        "keep": [keep.get(cluster) for cluster in clusters.to_pylist()],
        "distance": assigned["distance"],
    }
    facts = {
        "dataset_sha256": sha256_file(folder / MANIFEST), "fingerprint": found.facts["fingerprint"],
        "tables": [sha256_file(table) for table in map(Path, tables)],
    }  # fmt: skip
    schema = arrow_schema(ANNOTATION_COLUMNS)
    table = pa.table(columns, schema=schema)
    with (
        write_atomic(folder / ANNOTATIONS) as file,
        pq.ParquetWriter(file, schema, compression="zstd", store_schema=False) as writer,
    ):
        writer.add_key_value_metadata({ANNOTATION_KEY: json.dumps(facts).encode()})
        writer.write_table(table)


def describe_applied(applied: Applied) -> list[str]:
    """Lines for the terminal: counts, then what a person should look at."""
    lines = [
        f"{applied.path}: {applied.samples:,} of {applied.of:,} samples labelled, {applied.clusters:,} of "
        f"{applied.of_clusters:,} clusters, {applied.annotators} annotators"
    ]
    lines += [f"  {count:>9,} {label}" for label, count in applied.labels.items()]
    if applied.agreement is not None:
        lines.append(f"  agreement {applied.agreement:.0%} of the clusters that two or more labelled")
    for tie in applied.ties:
        words = ", ".join(f"{word} {count}" for word, count in tie.votes.items())
        lines.append(f"  no majority: {tie.field} of {tie.cluster} ({words}); it stays empty")
    return lines + [f"  check: {line}" for line in applied.near_labels]
