"""`image_folder`: `<split>/<class>/picture` or `<class>/picture`; `filename_pattern`: the path says it all.

Files are taken in sorted order; a first level whose every folder is a split's name is taken for splits. Files that are
no pictures by name, and those an exclusion glob matches, are counted as drops, never guessed at; masks beside their
pictures (BUSI) are an error until they are excluded, because as pictures they would teach nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from biomedclip.errors import ConfigError, DataError
from biomedclip.layouts.manifest import SPLIT_NAMES, check_path, compile_pattern, hash_id, make_manifest, name_split
from biomedclip.layouts.scan import Found, check_masks, refuse_file, walk_files
from biomedclip.schema import Drop, ImageRef, LabelKind, LabelledImage, Manifest


def read_image_folder(
    root: Path,
    name: str,
    *,
    folder: str = "",
    exclude: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
    splits: dict[str, str] | None = None,
    split: str | None = None,
    kind: LabelKind = "single",
    group_pattern: str | None = None,
    hash_group: bool = False,
) -> Manifest:
    """The manifest of a folder of class folders; pictures may lie in further folders below their class.

    `folder` is where to begin; `exclude` are globs over the path from there; `names` renames folders to labels;
    `splits` maps folder names to splits, `split` names the only one; `kind` says single or ordinal; `group_pattern` is
    a regular expression whose first group, matched in the path, is the group id, as 16 hashed digits with `hash_group`.
    Raises DataError for masks that are not excluded, and for folders that can be read in two ways.
    """
    root = _start(root, folder)
    rows, drops = [], []
    files = [(found, refuse_file(found, exclude)) for found in walk_files(root)]
    taken = [found for found, reason in files if not reason]
    with_splits = split is None and _has_splits(root, taken, splits or {})
    check_masks(root, [found.path for found in taken])
    pattern = compile_pattern(group_pattern, "group_pattern") if group_pattern else None
    depth = 3 if with_splits else 2
    sizes = []
    for found, refused in files:
        parts = found.path.split("/")
        if reason := refused or ("not_in_a_class_folder" if len(parts) < depth else None):
            drops.append(Drop(source=name, item=found.path, reason=reason))
            continue
        label = parts[depth - 2]
        match = pattern.search(found.path) if pattern else None
        group = match.group(1) if match else None
        rows.append(
            LabelledImage(
                sample_id=found.path,
                image=ImageRef(path=found.path),
                labels=((names or {}).get(label, label),),
                split=name_split(parts[0], root / parts[0], splits) if with_splits else split,
                group_id=hash_id(name, group) if group and hash_group else group,
            )
        )
        sizes.append(found.size)
    return make_manifest(name, root, rows, kind=kind, classes=classes, drops=drops, content=sizes)


def read_filename_pattern(
    root: Path,
    name: str,
    *,
    pattern: str,
    folder: str = "",
    exclude: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
    splits: dict[str, str] | None = None,
    split: str | None = None,
    kind: LabelKind = "single",
    hash_group: bool = False,
    bits: bool = False,
    suffixes: Sequence[str] | None = None,
) -> Manifest:
    r"""The manifest of pictures whose path says what they are.

    `pattern` is a regular expression, searched in the path below `folder`, with the named groups `label` and, where
    the path says so, `group` and `split`; every other named group is an attribute. For PCam's `<id>_<label>.png`:
    `(?P<group>[^/]+)_(?P<label>[01])\.png$`. `names` renames labels (`0` -> normal), `splits` the words of the split,
    `split` names the only one. With `bits` the label is a row of 0 and 1 in the order of `classes`
    (WSSS4LUAD: `[1 0 1]`). `suffixes` are the endings of pictures (default: those that can be read). Pictures that the
    pattern does not match are counted as `no_pattern_match`.
    """
    root = _start(root, folder)
    expression = compile_pattern(pattern, "pattern", groups=["label"])
    if bits and not classes:
        raise ConfigError("layout.classes", "is missing; bits need the class of each", todo="list them in order")
    taken, rows, drops, sizes = [], [], [], []
    for found in walk_files(root):
        refused = refuse_file(found, exclude, *([[s.lower() for s in suffixes]] if suffixes else []))
        match = None if refused else expression.search(found.path)
        if refused or match is None:
            drops.append(Drop(source=name, item=found.path, reason=refused or "no_pattern_match"))
            continue
        taken.append(found.path)
        said = {key: value for key, value in match.groupdict().items() if value is not None}
        label, group, part = said.pop("label", ""), said.pop("group", None), said.pop("split", None)
        where = f"{root}: {found.path}"
        labels, negatives = _read_bits(label, classes or (), where) if bits else ((label,), ())
        rows.append(
            LabelledImage(
                sample_id=found.path, image=ImageRef(path=found.path),
                labels=tuple((names or {}).get(word, word) for word in labels), negatives=negatives,
                split=split or (name_split(part, where, splits) if part else None),
                group_id=hash_id(name, group) if group and hash_group else group, attributes=said,
            )
        )  # fmt: skip
        sizes.append(found.size)
    check_masks(root, taken)
    return make_manifest(name, root, rows, kind="multi" if bits else kind, classes=classes, drops=drops, content=sizes)


def _start(root: Path, folder: str) -> Path:
    start = root / check_path(folder, "layout.folder") if folder else root
    if not start.is_dir():
        raise DataError(start, "is not a folder", todo="name the folder that holds the pictures")
    return start


def _read_bits(label: str, classes: Sequence[str], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    digits = re.findall(r"[01]", label)
    if len(digits) != len(classes):
        raise DataError(where, f"has not one bit for each of {len(classes)} classes", found=repr(label))
    said = list(zip(classes, digits, strict=True))
    return tuple(word for word, bit in said if bit == "1"), tuple(word for word, bit in said if bit == "0")


def _has_splits(root: Path, taken: Sequence[Found], splits: Mapping[str, str]) -> bool:
    """Whether the first level is splits. Raises DataError where only some of its folders are called like one, because
    either reading would be silently wrong: a stray `masks/` would turn train and test into classes."""
    top = sorted({found.path.split("/")[0] for found in taken if "/" in found.path})
    if not top:
        raise DataError(root, "holds no class folders with pictures", todo="put the pictures into one folder a class")
    names = {key.lower() for key in (*SPLIT_NAMES, *splits)}
    others = [folder for folder in top if folder.lower() not in names]
    if others and len(others) < len(top):
        found = f"{', '.join(folder for folder in top if folder not in others)} beside {', '.join(others[:3])}"
        raise DataError(root, "has folders called like splits beside others", found=found,
                        todo=f"exclude: ['{others[0]}/*'], or map it in splits, or give split")  # fmt: skip
    return not others
