"""TIFFs that are too large to decode whole, such as slides, at a reduced size and in bounded memory.

Reads a file's directories (pages and their sub-directories) and yields one RGB picture. A scanner stores a slide at
several sizes: the smallest one that is large enough is read. A file with one size is decoded band by band: the strips
or tiles of a band go to libtiff as a TIFF of their own, because Pillow decodes whole pages only, and each band is
averaged down before the next is read.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from biomedclip.images import MAX_PIXELS, BadImage, decode_rgb, decoding

TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_FLAT_PIXELS = 4_000_000_000
"""A level larger than this is not read through: at 50 to 100 million pixels a second it would take minutes."""

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOURS = 256, 257, 258, 259, 262
_STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANES = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _SUB = 322, 323, 324, 325, 330
# What says how pixels are encoded: predictor, colour map, extra samples, sample format, JPEG tables, chroma.
_KEPT = (_BITS, _COMPRESSION, _COLOURS, 266, _SAMPLES, _PLANES, 317, 320, 338, 339, 347, 530, 531, 532)
_MAX_PAGES = 64
_BAND_PIXELS = 1 << 23


def read_large_tiff(path: Path, at_least_px: int) -> tuple[Image.Image, str]:
    """The picture with a shorter side of at least `at_least_px` (where the file has it), and what was done, in words.

    Raises BadImage with reason `image_bomb` where a single strip or level is too large, `unsupported_tiff` for ways to
    store pixels that are not read here, or `broken_image`.
    """
    with decoding(), path.open("rb") as file:
        levels = find_levels(file)
        full = levels[0]
        wanted = [level for level in levels if min(_size(level)) >= at_least_px]
        level = min(wanted, key=_size) if wanted else max(levels, key=_size)
        width, height = _size(level)
        if width * height > MAX_FLAT_PIXELS:
            raise BadImage("image_bomb", f"{width}x{height} without a smaller level")
        factor = max(1, min(width, height) // at_least_px)
        while (width // factor) * (height // factor) > MAX_PIXELS:
            factor *= 2
        picture = _shrink(_bands(file, level), width, height, factor)
    share = _size(full)[0] / picture.width
    return picture, f"{_size(full)[0]} x {_size(full)[1]} px read at 1/{share:.0f}"


def tiff_size(path: Path) -> tuple[int, int]:
    """Width and height of the first page, without decoding. Raises BadImage `broken_image`."""
    with decoding(), path.open("rb") as file:
        return _size(_read_directory(file, _first_offset(file)))


def find_levels(file: BinaryIO) -> list[Any]:
    """Directories of the first picture in all its sizes, the first page's own first.

    Pages of another shape are other pictures (label, macro) and left out.
    """
    pages: list[Any] = []
    offset, seen = _first_offset(file), set()
    while offset and offset not in seen and len(pages) < _MAX_PAGES:
        seen.add(offset)
        page = _read_directory(file, offset)
        pages.append(page)
        offset = page.next
    subs = pages[0].get(_SUB, ())
    pages += [_read_directory(file, sub) for sub in (subs if isinstance(subs, tuple) else (subs,))[:_MAX_PAGES]]
    width, height = _size(pages[0])
    # Each halving rounds the sides, so that a level of 300 px may be off by a few parts in a thousand.
    return [pages[0], *(page for page in pages[1:] if _is_like(_size(page), width, height))]


def _is_like(size: tuple[int, int], width: int, height: int) -> bool:
    return size[0] <= width and abs(size[0] * height / (size[1] * width) - 1) < 0.02


def _size(directory: Any) -> tuple[int, int]:
    width, height = int(directory[_WIDTH]), int(directory[_HEIGHT])
    if width < 1 or height < 1:
        raise ValueError("a page without pixels")
    return width, height


def _first_offset(file: BinaryIO) -> int:
    file.seek(0)
    head = file.read(16)
    order = "little" if head[:2] == b"II" else "big"
    return int.from_bytes(head[8:16] if head[2:4] in (b"+\0", b"\0+") else head[4:8], order)  # type: ignore[arg-type]


def _read_directory(file: BinaryIO, offset: int) -> Any:
    file.seek(0)
    head = file.read(16)
    directory: Any = ImageFileDirectory_v2(head if head[2:4] in (b"+\0", b"\0+") else head[:8])
    file.seek(offset)
    directory.load(file)
    return directory


def _bands(file: BinaryIO, level: Any) -> Iterator[np.ndarray]:
    """(h, width, 3) uint8 of some rows after another, from the top."""
    if int(level.get(_PLANES, 1)) != 1 and int(level.get(_SAMPLES, 1)) > 1:
        raise BadImage("unsupported_tiff", "colours in separate planes")
    yield from (_tile_bands if _TILES in level else _strip_bands)(file, level)


def _tile_bands(file: BinaryIO, level: Any) -> Iterator[np.ndarray]:
    width, height = _size(level)
    across, down = int(level[_TILE_WIDTH]), int(level[_TILE_HEIGHT])
    if min(across, down) < 1 or across * down > MAX_PIXELS or down * width > MAX_PIXELS:
        raise BadImage("image_bomb", f"tiles of {across}x{down}")
    columns = -(-width // across)
    offsets, counts = level[_TILES], level[_TILE_BYTES]
    for row in range(-(-height // down)):
        band = np.empty((down, columns * across, 3), np.uint8)
        for column in range(columns):
            place = row * columns + column
            data = _read_bytes(file, offsets[place], counts[place])
            tile = decode_rgb(_wrap(level, [data], across, down, down)) if data else None
            # A tile of no bytes is background that the scanner did not store.
            band[:, column * across : (column + 1) * across] = 255 if tile is None else np.asarray(tile)
        yield band[: height - row * down, :width]


def _strip_bands(file: BinaryIO, level: Any) -> Iterator[np.ndarray]:
    width, height = _size(level)
    rows = min(int(level.get(_ROWS, height)), height)
    offsets, counts = _many(level[_STRIPS]), _many(level[_STRIP_BYTES])
    if rows * width > _BAND_PIXELS and int(level.get(_COMPRESSION, 1)) == 1:
        rows, offsets, counts = _split_raw(level, width, height, rows, offsets)
    if rows < 1 or rows * width > MAX_PIXELS:
        raise BadImage("image_bomb", f"strips of {width}x{rows}")
    together = max(1, _BAND_PIXELS // (rows * width))
    strips = -(-height // rows)
    for first in range(0, strips, together):
        chosen = range(first, min(first + together, strips))
        tall = min(height - first * rows, len(chosen) * rows)
        data = [_read_bytes(file, offsets[i], counts[i]) for i in chosen]
        yield np.asarray(decode_rgb(_wrap(level, data, width, tall, rows)))


def _split_raw(
    level: Any, width: int, height: int, rows: int, offsets: tuple[int, ...]
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Strips of uncompressed rows as thinner ones; many programs write a whole picture as one strip."""
    depths = _many(level.get(_BITS, 1))
    bits = sum(depths) if len(depths) > 1 else depths[0] * int(level.get(_SAMPLES, 1))
    stride = (width * bits + 7) // 8
    thin = max(1, _BAND_PIXELS // width)
    places, sizes = [], []
    for number, offset in enumerate(offsets):
        strip_rows = min(rows, height - number * rows)
        for start in range(0, strip_rows, thin):
            places.append(offset + start * stride)
            sizes.append(min(thin, strip_rows - start) * stride)
    if len(offsets) > 1 and rows % thin:
        raise BadImage("unsupported_tiff", f"uncompressed strips of {rows} rows")
    return thin, tuple(places), tuple(sizes)


def _many(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _read_bytes(file: BinaryIO, offset: int, count: int) -> bytes:
    if not 0 <= offset + count <= os.fstat(file.fileno()).st_size:
        raise BadImage("broken_image", "the file is cut short")
    file.seek(offset)
    return file.read(count)


def _wrap(level: Any, strips: list[bytes], width: int, height: int, rows: int) -> bytes:
    """A TIFF of these strips alone, with the level's way of storing pixels."""
    directory: Any = ImageFileDirectory_v2(prefix=level.prefix)
    for tag in _KEPT:
        if tag in level:
            directory.tagtype[tag] = level.tagtype[tag]
            directory[tag] = level[tag]
    directory[_WIDTH], directory[_HEIGHT], directory[_ROWS] = width, height, rows
    ends = np.cumsum([0, *map(len, strips)])
    for tag, values in ((_STRIPS, ends[:-1]), (_STRIP_BYTES, np.diff(ends))):
        directory.tagtype[tag] = 4
        directory[tag] = tuple(int(value) for value in values)
    buffer = io.BytesIO()
    # Pillow moves the offsets of strips behind the directory that it writes.
    directory.save(buffer)
    return buffer.getvalue() + b"".join(strips)


def _shrink(bands: Iterator[np.ndarray], width: int, height: int, factor: int) -> Image.Image:
    """All bands, averaged over squares of `factor` pixels; the last ones of a side may be of fewer."""
    picture = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    carried, done = np.empty((0, width, 3), np.uint8), 0
    for band in bands:
        rows = np.concatenate([carried, band]) if len(carried) else band
        done += len(band)
        whole = len(rows) if done >= height else len(rows) // factor * factor
        carried = rows[whole:]
        if whole:
            piece = Image.fromarray(np.ascontiguousarray(rows[:whole])).reduce(factor)
            picture.paste(piece, (0, -(-(done - len(carried) - whole) // factor)))
    return picture
