"""A contact sheet of what an augmentation preset does: each picture as it is, and beside it as training would see it.

Reads a dataset folder, picture files or folders of them; writes one .html page that opens offline, or one .png. Views
are drawn by the same function, seed and epochs as in training, so what the sheet shows is what a run would see.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from biomedclip.errors import ConfigError, DataError
from biomedclip.files import write_bytes
from biomedclip.images import BadImage
from biomedclip.page import write_page
from biomedclip.page.markup import shorten, to_text
from biomedclip.progress import Progress, silent
from biomedclip.shards import MANIFEST, DatasetFolder
from biomedclip.stream.augment import augment
from biomedclip.stream.decode import Geometry, decode_exact, read_reduced
from biomedclip.stream.presets import Augmentation, augmentation_for, find_preset, names_side, preset_for

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp")
_GAP_PX, _LINE_PX, _CAPTION_CHARS = 6, 16, 110


@dataclass(frozen=True, slots=True)
class Original:
    """A picture to show: its bytes, and what training knows of it."""

    name: str
    data: bytes
    caption: str = ""
    modality: str | None = None


@dataclass(frozen=True, slots=True)
class SheetRow:
    """One line of the sheet: the pixels of evaluation, then views of training, all (S, S, 3) uint8."""

    original: Original
    preset: str
    exact: np.ndarray
    views: tuple[np.ndarray, ...]

    @property
    def note(self) -> str:
        """Which preset, and whether the caption forbids mirror images."""
        side = ", caption names a side: not mirrored" if names_side(self.original.caption) else ""
        return f"{self.original.name}: {self.preset}{side}"


@dataclass(frozen=True, slots=True)
class Sheet:
    """What was written, and the pictures that could not be read."""

    path: Path
    rows: int
    unreadable: tuple[str, ...]


def write_sheet(
    source: Path, out: Path, *, preset: str = "auto", samples: int = 8, views: int = 6, size_px: int = 224,
    seed: int = 0, progress: Progress = silent,
) -> Sheet:  # fmt: skip
    """Write a sheet of some pictures of `source`, chosen by seed. Raises ConfigError for a preset or a file name that
    is none, DataError for a source without pictures."""
    writers: dict[str, Callable[[Path, Sequence[SheetRow], str], None]] = {".html": _write_html, ".png": _write_png}
    if out.suffix not in writers:
        raise ConfigError(out, "is neither .html nor .png", todo="name one of the two with --out")
    setting = preset if preset == "auto" else find_preset(preset)
    rows, unreadable = [], []
    chosen = find_originals(source, samples, seed)
    with progress("pictures", len(chosen)) as advance:
        for original in chosen:
            try:
                rows.append(_row(original, preset, setting, Geometry(size_px=size_px), views, seed))
            except (DataError, BadImage) as error:
                unreadable.append(str(error))
            advance()
    if not rows:
        raise DataError(source, "has no picture that can be read", found=unreadable[0])
    writers[out.suffix](out, rows, f"Augmentation {preset} on {source.name}")
    return Sheet(out, len(rows), tuple(unreadable))


def find_originals(source: Path, count: int, seed: int) -> list[Original]:
    """Some pictures of a dataset folder, a folder of files, or a file; of each modality or label some."""
    if (source / MANIFEST).exists():
        return _from_dataset(DatasetFolder(source), count, seed)
    if not source.exists():
        raise DataError(source, "there is no such folder or file", todo="name a dataset folder or pictures")
    files = [source] if source.is_file() else [p for p in sorted(source.rglob("*")) if p.suffix.lower() in _PICTURES]
    if not files:
        raise DataError(source, "holds neither a dataset nor pictures")
    random.Random(seed).shuffle(files)  # noqa: S311  (a choice of pictures, not a secret)
    return [Original(file.name, file.read_bytes()) for file in files[:count]]


def _from_dataset(dataset: DatasetFolder, count: int, seed: int) -> list[Original]:
    rows = dataset.index.to_pylist()
    random.Random(seed).shuffle(rows)  # noqa: S311
    seen: dict[object, int] = {}
    ranked = []
    for row in rows:
        kind = (row["modality"], tuple(row["labels"] or ()))
        seen[kind] = seen.get(kind, 0) + 1
        ranked.append((seen[kind], row))
    ranked.sort(key=lambda item: item[0])
    found = []
    for _, row in ranked[:count]:
        sample = dataset.read(row)
        found.append(Original(sample.key, sample.image, sample.caption, row["modality"]))
    return found


def _row(
    original: Original, preset: str, setting: str | Augmentation, geometry: Geometry, views: int, seed: int
) -> SheetRow:
    change = augmentation_for(setting, original.modality)
    name = preset_for(original.modality) if preset == "auto" else preset
    image_format = "jpg" if original.data[:2] == b"\xff\xd8" else "other"
    picture = read_reduced(original.data, image_format, geometry, change, original.name)
    drawn = tuple(
        augment(picture, geometry, change, facts=(seed, "sheet", original.name, epoch), caption=original.caption)
        for epoch in range(views)
    )
    return SheetRow(original, name, decode_exact(original.data, geometry, original.name), drawn)


def _write_html(out: Path, rows: Sequence[SheetRow], title: str) -> None:
    blocks = []
    for row in rows:
        pictures = [_figure(row.exact, "as evaluation sees it", first=True)]
        pictures += [_figure(view, f"view {number + 1}") for number, view in enumerate(row.views)]
        caption = to_text(shorten(row.original.caption, 300))
        blocks.append(
            f'<section class="cluster"><h2>{to_text(row.note)}</h2><p class="note">{caption}</p>'
            f'<div class="sheet">{"".join(pictures)}</div></section>'
        )
    head = (
        f'<header><h1>{to_text(title)}</h1><p class="note">First in each row the picture as evaluation sees it, then '
        "as training would see it in its first epochs.</p></header>"
    )
    write_page(out, title, [head, *blocks], footer="For research only; not for clinical use.")


def _figure(pixels: np.ndarray, words: str, *, first: bool = False) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    style = ' style="outline: 2px solid"' if first else ""
    return f'<img src="data:image/jpeg;base64,{data}" alt="{to_text(words)}" title="{to_text(words)}"{style}>'


def _write_png(out: Path, rows: Sequence[SheetRow], title: str) -> None:
    side = rows[0].exact.shape[0]
    across = 1 + max(len(row.views) for row in rows)
    row_px = side + 2 * _LINE_PX + 2 * _GAP_PX
    width, top = across * (side + _GAP_PX) + _GAP_PX, 2 * _LINE_PX
    sheet = Image.new("RGB", (width, top + len(rows) * row_px), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    draw.text((_GAP_PX, _GAP_PX), f"{title}. First as evaluation sees it, then as training does.", "black", font)
    for place, row in enumerate(rows):
        y = top + place * row_px
        draw.text((_GAP_PX, y), row.note, "black", font)
        draw.text((_GAP_PX, y + _LINE_PX), shorten(row.original.caption, _CAPTION_CHARS), "dimgrey", font)
        for number, pixels in enumerate((row.exact, *row.views)):
            sheet.paste(Image.fromarray(pixels), (_GAP_PX + number * (side + _GAP_PX), y + 2 * _LINE_PX))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(out, buffer.getvalue())
