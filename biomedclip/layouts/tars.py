"""`webdataset`: somebody's tar files, a picture and its label files under one key.

Only headers are scanned, and each picture is addressed by where its bytes lie (`tar:<offset>,<size>`), so that reading
one is a seek, nothing is ever extracted, and no member's name becomes a path. Links, devices and sparse members are
counted as drops; compressed tars have no places to seek to and are refused.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

from biomedclip.errors import DataError
from biomedclip.layouts.manifest import hash_id, make_manifest, name_split
from biomedclip.layouts.scan import IMAGE_SUFFIXES, walk_files
from biomedclip.schema import Drop, ImageRef, LabelKind, LabelledImage, Manifest

MAX_TEXT_BYTES = 1 << 20
"""A label or caption of more is refused before it is read."""

_DAMAGED = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError)


class _Member(NamedTuple):
    offset: int
    size: int


class TarMember(NamedTuple):
    """A member that belongs to a sample: its name, split at the first dot of its last part, and where its bytes lie."""

    name: str
    key: str
    suffix: str
    """In lower case, without the dot."""
    offset: int
    size: int
    plain: bool
    """False for links, devices and sparse members."""


class TarScan:
    """The members of a tar from its headers alone, and how it ends: see `damage` when the iteration is over.

    `file` is anything that seeks and reads. tarfile takes whatever is no header for the end of the archive, which is
    how half a tar gets lost in silence; so what stands there is looked at.
    """

    def __init__(self, file: Any, size: int) -> None:
        self._file, self._size = file, size
        self.damage: str | None = None
        """`cut_off`: the file ends within a member; `not_a_header`: something else stands where a member or the end
        was due. None: the members are all there."""
        self.detail = ""
        self.ended = False
        """Whether the archive's own end mark is there; many writers that were interrupted leave only this out."""

    def __iter__(self) -> Iterator[TarMember]:
        try:
            archive = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115  (the file is the caller's)
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile remembers all of them
                if member.offset_data + member.size > self._size:
                    self.damage, self.detail = "cut_off", f"{member.name} ends beyond byte {self._size}"
                split = split_name(member.name)
                if split and not member.isdir():
                    plain = member.isreg() and not member.issparse()
                    yield TarMember(member.name, *split, member.offset_data, member.size, plain)
        except _DAMAGED as error:
            if isinstance(error, DataError):
                raise
            at_end = "end of data" in str(error) or self._file.tell() >= self._size
            self.damage = self.damage or ("cut_off" if at_end else "not_a_header")
            self.detail = self.detail or str(error)[:80]
            return
        if not self.damage:
            self._check_end(archive.offset)

    def _check_end(self, offset: int) -> None:
        self._file.seek(offset)
        rest = self._file.read(tarfile.BLOCKSIZE)
        self.ended = len(rest) == tarfile.BLOCKSIZE and not any(rest)
        if self.ended or not rest:
            return
        self.damage = "cut_off" if len(rest) < tarfile.BLOCKSIZE else "not_a_header"
        self.detail = f"{self._size - offset} bytes after byte {offset} are no member"


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix in lower case) of a member's name, split at the first dot of its last part, as webdataset does.

    None for names without a dot and for hidden files, which belong to no sample.
    """
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem or not suffix:
        return None
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def read_webdataset(
    root: Path,
    name: str,
    *,
    classes: Sequence[str] | None = None,
    label: Literal["cls", "json", "txt"] | None = None,
    label_key: str = "label",
    names: Mapping[str, str] | None = None,
    kind: LabelKind | None = None,
    text: Literal["txt", "json"] | None = None,
    text_key: str = "caption",
    group_key: str | None = None,
    hash_group: bool = False,
    attributes: Sequence[str] = (),
    split: str | None = None,
    splits: Mapping[str, str] | None = None,
    exclude: Sequence[str] = (),
) -> Manifest:
    """The manifest of a folder of .tar files, or of one of them.

    `label` says which member of a sample holds its label: `cls`, an index into `classes`; `txt`, the label in words;
    `json`, the value of `label_key`, in words, as an index, or as a list of either. `names` renames labels. `text`
    says where the caption is: the `txt` member or `text_key` of the json. `group_key` and `attributes` are keys of the
    json. `splits` maps globs over the tar's path to splits (`{"train-*.tar": train}`), `split` names the only one.
    Samples without a picture, or without what they need, are counted as drops. Raises DataError for a damaged tar,
    labels outside `classes`, and keys that occur twice.
    """
    base = root if root.is_dir() else root.parent
    tars = [found.path for found in walk_files(root)] if root.is_dir() else [root.name]
    rows: list[LabelledImage] = []
    drops: list[Drop] = []
    content: list[Any] = []
    for tar in tars:
        if any(fnmatchcase(tar, glob) for glob in exclude) or not tar.endswith((".tar", ".tar.gz", ".tgz", ".tar.zst")):
            continue
        home = _find_split(tar, base / tar, split, splits or {})
        content.append([tar, (base / tar).stat().st_size])
        for key, members, reason in _read_samples(base / tar):
            item = f"{tar}/{key}"
            image = next((suffix for suffix in members if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES), None)
            reason = reason or (None if image else "no_image") or _lacks(members, label, text)
            if reason or image is None:
                drops.append(Drop(source=name, item=item, reason=reason or "no_image"))
                continue
            where = f"{base / tar}: {key}"
            words, record = _read_texts(base / tar, members, where)
            said = _read_label(label, words, record, label_key, classes, names or {}, where)
            caption = words.get("txt") if text == "txt" else _value(record, text_key, where) if text else None
            group = _value(record, group_key, where) if group_key else None
            rows.append(
                LabelledImage(
                    sample_id=item,
                    image=ImageRef(path=tar, part="tar:{},{}".format(*members[image])),
                    labels=said,
                    split=home,
                    group_id=hash_id(name, group) if group and hash_group else group,
                    attributes={word: _value(record, word, where) for word in attributes},
                    text=caption,
                )
            )
    inferred: LabelKind = "caption" if label is None else "multi" if any(len(r.labels) != 1 for r in rows) else "single"
    return make_manifest(name, base, rows, kind=kind or inferred, classes=classes, drops=drops, content=content)


def read_tar_member(path: Path, rest: str, where: str) -> bytes:
    """The bytes `<offset>,<size>` of a tar. Raises DataError where the file is shorter."""
    offset, size = map(int, rest.split(","))
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise DataError(where, f"cannot be read: {error.strerror}") from None
    if len(data) < size:
        raise DataError(where, "is cut short", found=f"{len(data)} of {size} bytes", todo="download the tar again")
    return data


def _find_split(tar: str, where: Path, split: str | None, splits: Mapping[str, str]) -> str | None:
    for glob, word in splits.items():
        if fnmatchcase(tar, glob):
            return name_split(word, "layout.splits")
    if splits:
        raise DataError(where, "belongs to no split", found=tar, todo="add a glob to splits, or exclude it")
    return split


def _read_samples(path: Path) -> Iterator[tuple[str, dict[str, _Member], str | None]]:
    """(key, suffix -> member, why it is dropped) of each sample, in the order of the tar."""
    if not path.name.endswith(".tar"):
        raise DataError(path, "is compressed; its members cannot be read one by one", todo="unpack it to a .tar")
    found: dict[str, tuple[dict[str, _Member], str | None]] = {}
    with path.open("rb") as file:
        scan = TarScan(file, path.stat().st_size)
        for member in scan:
            members, reason = found.get(member.key, ({}, None))
            if not member.plain:
                reason = "not_a_plain_member"
            if member.suffix in members:
                raise DataError(f"{path}: {member.key}", "occurs twice", found=member.name, todo="write the tar anew")
            members[member.suffix] = _Member(member.offset, member.size)
            found[member.key] = (members, reason)
    if scan.damage:
        raise DataError(path, "cannot be read as tar", found=scan.detail, todo="download it again")
    for key, (members, reason) in found.items():
        yield key, members, reason


def _lacks(members: Mapping[str, _Member], label: str | None, text: str | None) -> str | None:
    if label and label not in members:
        return "no_label"
    if text and text not in members:
        return "no_caption"
    big = any(member.size > MAX_TEXT_BYTES for suffix, member in members.items() if suffix in ("cls", "txt", "json"))
    return "text_too_long" if big else None


def _read_texts(path: Path, members: Mapping[str, _Member], where: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The text members by suffix, and the json member's object."""
    words = {}
    for suffix in ("cls", "txt", "json"):
        if suffix in members:
            try:
                words[suffix] = read_tar_member(path, "{},{}".format(*members[suffix]), where).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}.{suffix}", "is not UTF-8", found=f"byte {error.object[error.start]:#x}"
                ) from None
    if "json" not in words:
        return words, {}
    try:
        record = json.loads(words["json"])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}.json", f"is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}.json", "is not an object", found=type(record).__name__)
    return words, record


def _value(record: Mapping[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise DataError(
            f"{where}.json", f"has no key '{key}'", found=", ".join(list(record)[:9]), todo="name one it has"
        )
    return "" if record[key] is None else str(record[key])


def _read_label(
    label: str | None,
    words: Mapping[str, str],
    record: Mapping[str, Any],
    key: str,
    classes: Sequence[str] | None,
    names: Mapping[str, str],
    where: str,
) -> tuple[str, ...]:
    if label is None:
        return ()
    if label == "json":
        _value(record, key, where)
        said = record[key] if isinstance(record[key], list) else [record[key]]
    else:
        said = [words[label].strip()]
    found = []
    for word in said:
        if label == "cls" or isinstance(word, int):
            number = int(word) if str(word).isdecimal() else -1
            if not 0 <= number < len(classes or ()):
                raise DataError(f"{where}.{label}", f"is no index into {len(classes or ())} classes", found=repr(word),
                                todo="give all class names, in index order")  # fmt: skip
            found.append((classes or ())[number])
        else:
            found.append(names.get(str(word), str(word)))
    return tuple(found)
