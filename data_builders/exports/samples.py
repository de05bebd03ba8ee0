"""What all exports share: the samples in shard order, the settings, and the count of what became of them.

Indexes are read one shard at a time, so that memory does not depend on the size of a dataset; samples with a tombstone
never come out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pydantic import Field

from biomedclip.config import Config
from biomedclip.schema import INDEX_COLUMNS
from biomedclip.shards import DatasetFolder, Sample, read_tables

IMAGES = "images"
"""Folder of extracted pictures."""


class ExportConfig(Config):
    """How an export is laid out."""

    separator: str = Field(default="\t", min_length=1, max_length=1)
    """Of open_clip_csv; open_clip's own default is a tab."""
    max_samples: int = Field(default=10_000, ge=1)
    """In a tar or parquet file."""
    max_bytes: int = Field(default=500_000_000, ge=1)
    """In a tar or parquet file, about; whichever limit comes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export wrote, and what its README says of it."""

    splits: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> samples that the format cannot hold."""
    usage: str = ""
    """Markdown: how to load it, and what its fields hold."""
    data_files: dict[str, str] = field(default_factory=dict)
    """Split -> pattern of its files, for formats that `datasets` loads by the README."""


Advance = Callable[[], None]


def read_samples(dataset: DatasetFolder, split: str) -> Iterator[Sample]:
    """The samples of a split in shard order. Raises DataError where a shard is damaged."""
    for shard in dataset.manifest["shards"]:
        if shard["split"] != split:
            continue
        index = read_tables([dataset.folder / shard["name"].replace(".tar", ".parquet")], INDEX_COLUMNS)
        for batch in index.to_batches(1_000):
            for row in batch.to_pylist():
                if row["key"] not in dataset.withdrawn:
                    yield dataset.read(row)


def image_name(sample: Sample) -> str:
    """`images/<shard>/<key>.<encoding>`: a folder a shard, because millions of files in one are none's friend."""
    return f"{IMAGES}/{sample.row['shard'].removesuffix('.tar')}/{sample.key}.{sample.row['image_format']}"
