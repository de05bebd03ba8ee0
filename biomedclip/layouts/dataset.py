"""`dataset_folder`: our own shards as a manifest, for retrieval on held-out articles and for scoring built sets.

The group of a row is its article where it has one, else the group the labelled set gave it; the text is the caption
stored in the shard, so what is scored is what was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from biomedclip.errors import DataError
from biomedclip.layouts.manifest import make_manifest
from biomedclip.schema import SPLITS, ImageRef, LabelKind, LabelledImage, Manifest
from biomedclip.shards import MANIFEST, TOMBSTONES, DatasetFolder, Sample


def read_dataset(
    root: Path,
    name: str,
    *,
    splits: Sequence[str] = SPLITS,
    kind: LabelKind = "caption",
    classes: Sequence[str] | None = None,
) -> Manifest:
    """The manifest of a dataset folder, restricted to `splits`. Raises DataError where the folder is not complete."""
    dataset = open_dataset(str(root))
    rows = []
    for row in dataset.index.to_pylist():
        if row["split"] in splits:
            rows.append(
                LabelledImage(
                    sample_id=row["key"],
                    image=ImageRef(path=row["shard"], part=f"shard:{row['key']}"),
                    labels=tuple(row["labels"] or ()),
                    split=row["split"],
                    group_id=row["article_id"] or row["group_id"],
                    attributes={key: row[key] for key in ("source", "modality", "licence") if row[key]},
                    text=dataset.read(row).caption,
                )
            )
    content = [shard["sha256"] for shard in dataset.manifest["shards"]]
    return make_manifest(name, root, rows, kind=kind, classes=classes, content=content)


def read_sample(root: str, key: str) -> Sample:
    """One sample of a dataset folder by key. Raises DataError where the folder has none of that key."""
    row = _rows(root, _stamp(root)).get(key)
    if row is None:
        raise DataError(f"{root}: {key}", "is not in this dataset", todo="read the manifest again")
    return open_dataset(root).read(row)


def open_dataset(root: str) -> DatasetFolder:
    """The dataset folder, opened once for as long as it is neither built anew nor purged."""
    return _open(root, _stamp(root))


def _stamp(root: str) -> tuple[int, ...]:
    paths = (Path(root) / MANIFEST, Path(root) / TOMBSTONES)
    return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in paths)


@lru_cache(maxsize=8)
def _open(root: str, stamp: tuple[int, ...]) -> DatasetFolder:
    return DatasetFolder(root)


@lru_cache(maxsize=8)
def _rows(root: str, stamp: tuple[int, ...]) -> dict[str, dict[str, object]]:
    return {row["key"]: row for row in _open(root, stamp).index.to_pylist()}
