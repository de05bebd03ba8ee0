"""`hf_dataset`: a data set of the `datasets` library, saved to a folder or from the Hub.

`datasets` opens it and says what its columns are; rows are then read straight from the Arrow files, memory-mapped, and
each picture is addressed as `arrow:<column>/<row>` of its file, so that readers need no more than pyarrow. A Hub set
comes in the revision the recipe names and through the library's own cache, which lies in the data folder; offline stays
offline.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from biomedclip.errors import ConfigError, DataError, MissingExtra
from biomedclip.layouts.manifest import hash_id, make_manifest, name_split
from biomedclip.schema import Drop, ImageRef, LabelKind, LabelledImage, Manifest


def read_hf_dataset(
    root: Path,
    name: str,
    *,
    hub: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    image: str = "image",
    label: str | None = None,
    names: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    kind: LabelKind | None = None,
    text: str | None = None,
    group: str | None = None,
    hash_group: bool = False,
    attributes: Sequence[str] = (),
    split: str | None = None,
    splits: dict[str, str] | None = None,
) -> Manifest:
    """The manifest of a `datasets` data set.

    `root` is a folder that `save_to_disk` wrote; with `hub` (`owner/name`), `config` and `revision` (a commit, so that
    the data stays what it was) it is the folder that keeps the downloads. `image`, `label`, `text`, `group` and
    `attributes` are columns; the label is a ClassLabel, words, or a list of either; `names` renames labels. `splits`
    maps the set's split names, `split` names the only one. Pictures that are paths into somebody's disk instead of
    bytes are counted as `image_not_embedded`. Raises DataError for a set that cannot be opened, ConfigError for a
    column that is not there.
    """
    parts = _open(root, hub, config, revision)
    rows: list[LabelledImage] = []
    drops: list[Drop] = []
    content: list[Any] = []
    known: list[str] = []
    for part, dataset in parts.items():
        features = dataset.features
        where = f"{hub or root}: {part or 'rows'}"
        _check_columns(features, [image, label, text, group, *attributes], image, where)
        words = _class_names(features[label]) if label else None
        known += [word for word in words or () if word not in known]
        home = split or (name_split(part, where, splits) if part else None)
        columns = [column for column in (label, text, group, *attributes) if column]
        content.append([part, [os.path.getsize(file["filename"]) for file in dataset.cache_files]])
        for number, (ref, has_bytes, cells) in enumerate(_read_rows(root, dataset, image, columns, where)):
            sample_id = f"{part or 'rows'}/{number:07d}"
            if not has_bytes:
                drops.append(Drop(source=name, item=sample_id, reason="image_not_embedded"))
                continue
            said = _read_label(cells[label], words, names or {}, f"{where}, row {number}") if label else ()
            owner = str(cells[group]) if group and cells[group] is not None else None
            rows.append(
                LabelledImage(
                    sample_id=sample_id, image=ref, labels=said, split=home,
                    group_id=hash_id(name, owner) if owner and hash_group else owner,
                    attributes={c: "" if cells[c] is None else str(cells[c]) for c in attributes},
                    text=str(cells[text]) if text and cells[text] is not None else None,
                )
            )  # fmt: skip
    inferred: LabelKind = "single" if label and all(len(row.labels) == 1 for row in rows) else "multi"
    listed = [(names or {}).get(word, word) for word in known] or None
    return make_manifest(name, root, rows, kind=kind or (inferred if label else "caption"), classes=classes or listed,
                         drops=drops, content=content)  # fmt: skip


def read_arrow_picture(path: Path, rest: str, where: str) -> bytes:
    """The encoded picture `<column>/<row>` of an Arrow file. Raises DataError."""
    column, _, number = rest.rpartition("/")
    cell = _open_table(path)[column][int(number)].as_py()
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise DataError(where, "holds no picture", found=type(data).__name__)
    return data


def _open(root: Path, hub: str | None, config: str | None, revision: str | None) -> dict[str | None, Any]:
    """Split -> data set; the split is None where the set has none."""
    try:
        import datasets
    except ImportError:
        raise MissingExtra("build", "datasets") from None
    if hub and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub):
        raise ConfigError("layout.hub", "is no name of a Hub data set", found=repr(hub), todo="write owner/name")
    if hub and not revision:
        raise ConfigError("layout.revision", "is missing; a Hub set without one is another set tomorrow",
                          todo="give the commit of the data set's page")  # fmt: skip
    try:
        if hub:
            found = datasets.load_dataset(hub, config, revision=revision, cache_dir=str(root.resolve()))
        else:
            found = datasets.load_from_disk(str(root.resolve()))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, LookupError, AttributeError) as error:
        todo = "check its name, or download it where there is a network" if hub else "save it with save_to_disk"
        raise DataError(hub or root, "cannot be opened as a data set", found=str(error).split("\n")[0][:120],
                        todo=todo) from None  # fmt: skip
    return dict(found) if isinstance(found, datasets.DatasetDict) else {None: found}


def _check_columns(features: Mapping[str, Any], named: Sequence[str | None], image: str, where: str) -> None:
    for column in named:
        if column and column not in features:
            raise ConfigError(where, f"has no column '{column}'", found=", ".join(features), todo="name one it has")
    if type(features[image]).__name__ != "Image":
        raise ConfigError(where, f"column '{image}' holds no images", found=type(features[image]).__name__,
                          todo="name the column with layout.image")  # fmt: skip


def _class_names(feature: Any) -> list[str] | None:
    """Names of a ClassLabel or of a list of them; None for any other column."""
    inner = getattr(feature, "feature", feature)
    return list(inner.names) if type(inner).__name__ == "ClassLabel" else None


def _read_label(cell: Any, words: Sequence[str] | None, names: Mapping[str, str], where: str) -> tuple[str, ...]:
    found = []
    for value in cell if isinstance(cell, list) else [cell]:
        if words is not None:
            if value is None or not 0 <= value < len(words):  # -1 is how the library writes `unknown`
                raise DataError(where, f"has no label of {len(words)} classes", found=str(value))
            value = words[value]
        if value is None or str(value).strip() == "":
            raise DataError(where, "has no label", todo="filter the set before it is saved")
        found.append(names.get(str(value), str(value)))
    return tuple(found)


def _read_rows(
    root: Path, dataset: Any, image: str, columns: Sequence[str], where: str
) -> Iterator[tuple[ImageRef, bool, dict[str, Any]]]:
    if dataset._indices is not None:
        raise DataError(
            where, "is a selection of a larger table", todo="save it with save_to_disk, which writes it out"
        )
    base = root.resolve()
    for file in dataset.cache_files:
        path = Path(file["filename"]).resolve()
        if not path.is_relative_to(base):
            raise DataError(
                where, "has a file outside the data folder", found=str(path), todo="copy it into the folder"
            )
        table = _open_table(path)
        # Chunk by chunk: joined, the column's pictures would be copied into memory.
        has_bytes = [held for chunk in table[image].chunks for held in chunk.field("bytes").is_valid().to_pylist()]
        cells = table.select(list(columns)).to_pylist() if columns else [{}] * table.num_rows
        for number in range(table.num_rows):
            ref = ImageRef(path=path.relative_to(base).as_posix(), part=f"arrow:{image}/{number}")
            yield ref, has_bytes[number], cells[number]


def _open_table(path: Path) -> Any:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from None
    return _map_table(str(path), (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=16)
def _map_table(path: str, stamp: tuple[int, int]) -> Any:
    """The table, mapped and not read; a mapping may be shared between processes."""
    try:
        import pyarrow as pa
    except ImportError:
        raise MissingExtra("build", "pyarrow") from None
    try:
        return pa.ipc.open_stream(pa.memory_map(path)).read_all()
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise DataError(path, "cannot be read as Arrow", found=str(error)[:80], todo="save the set again") from None
