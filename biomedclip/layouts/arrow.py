"""`hf_dataset`: a set of the `datasets` library: a saved folder, the Hub's parquet files, or its name on the Hub.

`datasets` says what the columns are; rows are then read straight from the Arrow or parquet files, and each picture is
addressed in its file (`arrow:<column>/<row>`, `parquet:<column>/<row group>/<row>`), so that readers need no more than
pyarrow. A Hub set comes in the revision the recipe names and through the library's own cache, which lies in the data
folder; offline stays offline.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from biomedclip.errors import ConfigError, DataError, MissingExtra
from biomedclip.layouts.manifest import check_path, hash_id, make_manifest, name_split
from biomedclip.schema import Drop, ImageRef, LabelKind, LabelledImage, Manifest


def read_hf_dataset(
    root: Path,
    name: str,
    *,
    hub: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    parquet: Mapping[str, str] | None = None,
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

    `root` is a folder that `save_to_disk` wrote; with `parquet` it is a download of a Hub set's files, as a glob for
    each split (`{train: data/train-*.parquet}`); with `hub` (`owner/name`), `config` and `revision` (a commit, so that
    the data stays what it was) it is the folder that keeps the downloads. `image`, `label`, `text`, `group` and
    `attributes` are columns; the label is a ClassLabel, words, or a list of either; `names` renames labels. `splits`
    maps the set's split names, `split` names the only one. Pictures that are paths into somebody's disk instead of
    bytes are counted as `image_not_embedded`. Raises DataError for a set that cannot be opened, ConfigError for a
    column that is not there.
    """
    parts = _open_parquet(root, parquet) if parquet else _open(root, hub, config, revision)
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
        content.append([part, [os.path.getsize(path) for path in dataset.files]])
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
    return _picture_bytes(_open_table(path)[column][int(number)].as_py(), where)


def read_parquet_picture(path: Path, rest: str, where: str) -> bytes:
    """The encoded picture `<column>/<row group>/<row>` of a parquet file. Raises DataError."""
    column, group, number = rest.rsplit("/", 2)
    return _picture_bytes(_read_group(path, int(group), (column,))[column][int(number)].as_py(), where)


class _Part(NamedTuple):
    """One split: its columns and the files that hold its rows."""

    features: Mapping[str, Any]
    files: list[Path]


def _open_parquet(root: Path, globs: Mapping[str, str]) -> dict[str | None, _Part]:
    datasets = _import_datasets()
    parts: dict[str | None, _Part] = {}
    for split, glob in globs.items():
        files = sorted(root.glob(check_path(glob, "layout.parquet")))
        if not files:
            raise DataError(root, f"holds no file of split '{split}'", found=glob, todo="check layout.parquet")
        with _reading(files[0]):
            features = datasets.Features.from_arrow_schema(_parquet_file(files[0]).schema_arrow)
        parts[split] = _Part(features, files)
    return parts


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("build", "datasets") from None
    return datasets


def _open(root: Path, hub: str | None, config: str | None, revision: str | None) -> dict[str | None, _Part]:
    """Split -> its rows; the split is None where the set has none."""
    datasets = _import_datasets()
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
    parts = dict(found) if isinstance(found, datasets.DatasetDict) else {None: found}
    if chosen := [split for split, part in parts.items() if part._indices is not None]:
        raise DataError(
            root, "is a selection of a larger table", found=str(chosen[0]), todo="save it with save_to_disk"
        )
    return {
        split: _Part(part.features, [Path(file["filename"]) for file in part.cache_files])
        for split, part in parts.items()
    }


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
    root: Path, part: _Part, image: str, columns: Sequence[str], where: str
) -> Iterator[tuple[ImageRef, bool, dict[str, Any]]]:
    base = root.resolve()
    for file in part.files:
        path = file.resolve()
        if not path.is_relative_to(base):
            raise DataError(
                where, "has a file outside the data folder", found=str(path), todo="copy it into the folder"
            )
        for prefix, held, table in _tables(path, image, columns):
            cells = table.select(list(columns)).to_pylist() if columns else [{}] * len(held)
            for number, has_bytes in enumerate(held):
                ref = ImageRef(path=path.relative_to(base).as_posix(), part=f"{prefix}/{number}")
                yield ref, has_bytes, cells[number]


def _tables(path: Path, image: str, columns: Sequence[str]) -> Iterator[tuple[str, list[bool], Any]]:
    """(reference without the row, whether each row holds a picture, the columns) of each table of a file."""
    if path.suffix != ".parquet":
        table = _open_table(path)
        yield f"arrow:{image}", _have_bytes(table[image]), table
        return
    with _reading(path):
        facts = _parquet_file(path).metadata
    for number in range(facts.num_row_groups):
        group = facts.row_group(number)
        parts = [group.column(i) for i in range(group.num_columns)]
        written = next((part for part in parts if part.path_in_schema == f"{image}.bytes"), None)
        table = _read_group(path, number, tuple(dict.fromkeys(columns))) if columns else None
        if written is not None and written.statistics is not None and written.statistics.null_count == 0:
            held = [True] * group.num_rows  # as the file says, without reading a picture
        else:
            held = _have_bytes(_read_group(path, number, (image,))[image])
        yield f"parquet:{image}/{number}", held, table


def _have_bytes(column: Any) -> list[bool]:
    # Chunk by chunk: joined, the column's pictures would be copied into memory.
    return [held for chunk in column.chunks for held in chunk.field("bytes").is_valid().to_pylist()]


def _picture_bytes(cell: Any, where: str) -> bytes:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise DataError(where, "holds no picture", found=type(data).__name__)
    return data


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise MissingExtra("build", "pyarrow") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:  # pyarrow's own errors derive from these
        raise DataError(path, "cannot be read as Arrow or parquet", found=str(error)[:80],
                        todo="get the file again") from None  # fmt: skip


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from None
    return stat.st_mtime_ns, stat.st_size


def _open_table(path: Path) -> Any:
    return _map_table(str(path), _stamp(path))


@lru_cache(maxsize=16)
def _map_table(path: str, stamp: tuple[int, int]) -> Any:
    """The table, mapped and not read; a mapping may be shared between processes."""
    with _reading(Path(path)):
        import pyarrow as pa

        table = pa.ipc.open_stream(pa.memory_map(path)).read_all()
        # Offsets of a damaged file would be followed blindly, and end the process. Pictures are not read for this.
        table.validate(full=True)
        return table


def _parquet_file(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path)


def _read_group(path: Path, number: int, columns: tuple[str, ...]) -> Any:
    return _load_group(str(path), number, columns, _stamp(path))


@lru_cache(maxsize=2)
def _load_group(path: str, number: int, columns: tuple[str, ...], stamp: tuple[int, int]) -> Any:
    """Some columns of one row group; rows are read in order, so the last is the one that is wanted again."""
    with _reading(Path(path)):
        return _parquet_file(Path(path)).read_row_group(number, columns=list(columns))
