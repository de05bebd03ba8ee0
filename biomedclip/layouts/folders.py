"""`image_folder`: `<split>/<class>/picture`, `<class>/picture`, as ImageFolder users have it.

Folders are walked in sorted order; a first level whose every folder is a split's name is taken for splits. Files that
are no pictures by name, and those an exclusion glob matches (BUSI keeps its masks beside its images), are counted as
drops, never guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from biomedclip.errors import ConfigError, DataError
from biomedclip.layouts.manifest import SPLIT_NAMES, make_manifest, name_split
from biomedclip.schema import Drop, ImageRef, LabelledImage, Manifest

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"})


def read_image_folder(
    root: Path,
    name: str,
    *,
    exclude: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    splits: dict[str, str] | None = None,
    split: str | None = None,
    group_pattern: str | None = None,
) -> Manifest:
    """The manifest of a folder of class folders.

    `exclude` are globs over the relative path; `splits` maps folder names to splits, `split` names the only one;
    `group_pattern` is a regular expression whose first group, matched in the relative path, is the group id.
    """
    names = {key.lower() for key in (*SPLIT_NAMES, *(splits or {}))}
    top = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not top:
        raise DataError(root, "holds no class folders", todo="put the pictures into one folder a class")
    with_splits = split is None and all(folder.lower() in names for folder in top)
    pattern = _compile(group_pattern)
    rows, drops = [], []
    for relative in _walk(root):
        parts = relative.split("/")
        depth = 3 if with_splits else 2
        reason = _refuse(relative, exclude) or ("not_in_a_class_folder" if len(parts) < depth else None)
        if reason:
            drops.append(Drop(source=name, item=relative, reason=reason))
            continue
        found = pattern.search(relative) if pattern else None
        rows.append(
            LabelledImage(
                sample_id=relative,
                image=ImageRef(path=relative),
                labels=(parts[depth - 2],),
                split=name_split(parts[0], root / parts[0], splits) if with_splits else split,
                group_id=found.group(1) if found else None,
            )
        )
    return make_manifest(name, root, rows, kind="single", classes=classes, drops=drops)


def _walk(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root).as_posix()
        # A link could lead anywhere, and a hidden file is the file manager's, not the data set's.
        if path.is_file() and not path.is_symlink() and not any(p.startswith(".") for p in relative.split("/")):
            yield relative


def _refuse(relative: str, exclude: Sequence[str]) -> str | None:
    if any(fnmatchcase(relative, glob) for glob in exclude):
        return "excluded"
    if Path(relative).suffix.lower() not in IMAGE_SUFFIXES:
        return "not_an_image_file"
    return None


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError("layout.group_pattern", f"is no regular expression: {error}", found=repr(pattern)) from None
    if compiled.groups < 1:
        raise ConfigError("layout.group_pattern", "has no group", found=repr(pattern), todo="put (…) around the id")
    return compiled
