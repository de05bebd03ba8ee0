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
    if not root.is_dir():
        raise DataError(root, "is not a folder", todo="name the folder that holds the class folders")
    files = [(relative, _refuse(root / relative, relative, exclude)) for relative in _walk(root)]
    with_splits = split is None and _has_splits(root, files, splits or {})
    pattern = _compile(group_pattern)
    rows, drops = [], []
    for relative, refused in files:
        parts = relative.split("/")
        depth = 3 if with_splits else 2
        reason = refused or ("not_in_a_class_folder" if len(parts) < depth else None)
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
    sizes = [(root / row.image.path).stat().st_size for row in rows]
    return make_manifest(name, root, rows, kind="single", classes=classes, drops=drops, content=sizes)


def _has_splits(root: Path, files: Sequence[tuple[str, str | None]], splits: dict[str, str]) -> bool:
    """Whether the first level is splits. Raises DataError where only some of its folders are called like one, because
    either reading would be silently wrong: a stray `masks/` would turn train and test into classes."""
    top = sorted({relative.split("/")[0] for relative, refused in files if not refused and "/" in relative})
    if not top:
        raise DataError(root, "holds no class folders with pictures", todo="put the pictures into one folder a class")
    names = {key.lower() for key in (*SPLIT_NAMES, *splits)}
    others = [folder for folder in top if folder.lower() not in names]
    if others and len(others) < len(top):
        found = f"{', '.join(folder for folder in top if folder not in others)} beside {', '.join(others[:3])}"
        raise DataError(root, "has folders called like splits beside others", found=found,
                        todo=f"exclude: ['{others[0]}/*'], or map it in splits, or give split")  # fmt: skip
    return not others


def _walk(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root).as_posix()
        # A hidden file is the file manager's, not the data set's.
        if path.is_file() and not any(p.startswith(".") for p in relative.split("/")):
            yield relative


def _refuse(path: Path, relative: str, exclude: Sequence[str]) -> str | None:
    if any(fnmatchcase(relative, glob) for glob in exclude):
        return "excluded"
    if Path(relative).suffix.lower() not in IMAGE_SUFFIXES:
        return "not_an_image_file"
    if path.is_symlink():
        return "symbolic_link"  # it could lead anywhere
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
