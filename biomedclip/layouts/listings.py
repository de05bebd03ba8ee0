"""`coop_json` and `coco_json`: json that lists pictures with their labels, or with boxes.

Both refuse what contradicts itself: a label id with two names, an annotation of a picture that is not listed. Boxes
may become pictures of their own (`crop:x,y,width,height`), cut when they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from biomedclip import images
from biomedclip.errors import DataError
from biomedclip.layouts.cells import load_json
from biomedclip.layouts.manifest import check_path, compile_pattern, make_manifest, name_split
from biomedclip.layouts.tables import file_size
from biomedclip.schema import Drop, ImageRef, LabelKind, LabelledImage, Manifest

Boxes = list[tuple[int, tuple[float, float, float, float] | None]]
"""(category id, box) of each annotation of a picture."""


def read_coop(
    root: Path,
    name: str,
    *,
    file: str,
    folder: str = "",
    classes: Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
    splits: dict[str, str] | None = None,
    kind: LabelKind = "single",
    group_pattern: str | None = None,
) -> Manifest:
    """The manifest of a CoOp split file: `{"train": [[path, label id, class name], …], "val": …, "test": …}`.

    `folder` holds the pictures; `names` renames classes. Raises DataError where an id has two names.
    """
    path = root / check_path(file, "layout.file")
    found = _load_file(path)
    if not isinstance(found, dict):
        raise DataError(path, "is no CoOp split file", found=type(found).__name__, todo="it has train, val and test")
    pattern = compile_pattern(group_pattern, "group_pattern") if group_pattern else None
    rows, drops, sizes = [], [], []
    spoken: dict[int, str] = {}
    for part, entries in found.items():
        split = name_split(str(part), path, splits)
        for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
            where = f"{path}: {part}[{number}]"
            if not (isinstance(entry, list) and [type(x) for x in entry] == [str, int, str]):
                raise DataError(where, "is not [path, label id, class name]", found=repr(entry)[:60])
            image, label_id, word = entry
            if spoken.setdefault(label_id, word) != word:
                raise DataError(where, f"calls label {label_id} '{word}', and an earlier row '{spoken[label_id]}'")
            relative = check_path(f"{folder}/{check_path(image, where)}" if folder else image, where)
            size = file_size(root / relative)
            if size is None:
                drops.append(Drop(source=name, item=relative, reason="missing_file", detail=f"{part}[{number}]"))
                continue
            match = pattern.search(relative) if pattern else None
            rows.append(
                LabelledImage(
                    sample_id=relative, image=ImageRef(path=relative), labels=((names or {}).get(word, word),),
                    split=split, group_id=match.group(1) if match else None,
                )
            )  # fmt: skip
            sizes.append(size)
    ordered = [(names or {}).get(spoken[key], spoken[key]) for key in sorted(spoken)]
    return make_manifest(name, root, rows, kind=kind, classes=classes or ordered, drops=drops, content=sizes)


def read_coco(
    root: Path,
    name: str,
    *,
    files: str | Mapping[str, str],
    folder: str | Mapping[str, str] = "",
    classes: Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
    crops: bool = False,
    min_crop_px: int = 8,
    exhaustive: bool = False,
    empty: str | None = None,
) -> Manifest:
    """The manifest of COCO json: the categories of a picture's annotations are its labels.

    `files` is the json, or one for each split, and so is `folder`. With `crops` each box is a picture of its own with
    one label, its picture being the group; boxes smaller than `min_crop_px` are dropped. With `exhaustive`, categories
    without an annotation are stated not to be there. Pictures without any annotation are dropped, unless `empty` is
    the label they get.
    """
    rows: list[LabelledImage] = []
    drops: list[Drop] = []
    sizes: list[int] = []
    known: dict[str, None] = {}
    for part, file in ({None: files} if isinstance(files, str) else dict(files)).items():
        path = root / check_path(file, "layout.files")
        start = folder if isinstance(folder, str) else folder.get(part or "", "")
        pictures, boxes, categories = _read_coco_tables(path)
        said = {key: (names or {}).get(word, word) for key, word in categories.items()}
        known |= dict.fromkeys(said.values())
        for key, image in pictures.items():
            where = f"{path}: image {key}"
            relative = check_path(f"{start}/{image}" if start else image, where)
            size = file_size(root / relative)
            if size is None:
                drops.append(Drop(source=name, item=relative, reason="missing_file", detail=f"image {key}"))
                continue
            split = name_split(part, path) if part else None
            there = boxes.get(key, [])
            if not there and empty is None:
                drops.append(Drop(source=name, item=relative, reason="no_annotation"))
                continue
            sizes.append(size)
            if crops:
                found = _cut_boxes(name, relative, split, there, said, min_crop_px, where)
                rows += [item for item in found if isinstance(item, LabelledImage)]
                drops += [item for item in found if isinstance(item, Drop)]
                continue
            labels = dict.fromkeys([said[category] for category, _ in there] or [empty or ""])
            rest = tuple(word for word in said.values() if word not in labels) if exhaustive else ()
            rows.append(LabelledImage(sample_id=relative, image=ImageRef(path=relative), labels=tuple(labels),
                                      negatives=rest, split=split))  # fmt: skip
    listed = [*known, *([empty] if empty and empty not in known else [])]
    return make_manifest(name, root, rows, kind="single" if crops else "multi", classes=classes or listed, drops=drops,
                         content=sizes)  # fmt: skip


def _read_coco_tables(path: Path) -> tuple[dict[int, str], dict[int, Boxes], dict[int, str]]:
    """Image id -> file, image id -> its (category, box), category id -> name."""
    found = _load_file(path)
    try:
        categories = {int(entry["id"]): str(entry["name"]) for entry in found["categories"]}
        pictures = {int(entry["id"]): str(entry["file_name"]) for entry in found["images"]}
        boxes: dict[int, Boxes] = {}
        for entry in found["annotations"]:
            box = entry.get("bbox")
            corners = (float(box[0]), float(box[1]), float(box[2]), float(box[3])) if box else None
            if entry["image_id"] not in pictures or entry["category_id"] not in categories:
                raise ValueError(f"annotation {entry.get('id')} of an image or category that is not listed")
            boxes.setdefault(int(entry["image_id"]), []).append((int(entry["category_id"]), corners))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise DataError(path, "is not COCO json", found=f"{type(error).__name__} {error}"[:80],
                        todo="it has images, annotations and categories") from None  # fmt: skip
    return pictures, boxes, categories


def _cut_boxes(
    name: str, relative: str, split: str | None, boxes: Boxes, said: Mapping[int, str], min_px: int, where: str
) -> list[LabelledImage | Drop]:
    found: list[LabelledImage | Drop] = []
    for number, (category, box) in enumerate(boxes):
        if box is None:
            raise DataError(where, "has an annotation without a box", todo="leave out layout.crops")
        x, y, width, height = (round(side) for side in box) if all(abs(v) < 1e9 for v in box) else (0, 0, 0, 0)
        if min(width, height) < min_px or x < 0 or y < 0:
            reason = "crop_too_small" if min(width, height) < min_px else "crop_outside"
            found.append(Drop(source=name, item=f"{relative}/{number}", reason=reason, detail=str(box)))
            continue
        found.append(
            LabelledImage(
                sample_id=f"{relative}/{number:03d}", labels=(said[category],), split=split, group_id=relative,
                image=ImageRef(path=relative, part=f"crop:{x},{y},{width},{height}"),
            )
        )  # fmt: skip
    return found


def read_crop(path: Path, rest: str, where: str) -> Image.Image:
    """The part `x,y,width,height` of a picture, cut where the picture ends. Raises DataError."""
    x, y, width, height = map(int, rest.split(","))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(where, f"cannot be read: {error.strerror}") from None
    picture = images.read_rgb(data, where)
    right, lower = min(x + width, picture.width), min(y + height, picture.height)
    if right <= x or lower <= y:
        raise DataError(where, "has a box outside its picture", found=f"{rest} in {picture.width}x{picture.height}")
    return picture.crop((x, y, right, lower))


def _load_file(path: Path) -> Any:
    try:
        return load_json(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}", todo="check the layout's file") from None
