"""A labelled data set on disk, in any common layout, to one Manifest table; builders and evaluation share it.

`read_manifest("csv", root, table="labels.csv", image="file", label="finding")` gives the table, `read_bytes` and
`read_rgb` fetch the picture of a row. A layout is one function in one module here and one line in `LAYOUTS`.
"""

from __future__ import annotations

import difflib
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from biomedclip import images
from biomedclip.errors import ConfigError, DataError
from biomedclip.layouts.dataset import read_dataset, read_sample
from biomedclip.layouts.folders import read_image_folder
from biomedclip.layouts.medmnist import read_array, read_medmnist
from biomedclip.layouts.tables import read_table
from biomedclip.schema import LabelledImage, Manifest

LAYOUTS: dict[str, Callable[..., Manifest]] = {
    "csv": read_table,
    "dataset_folder": read_dataset,
    "image_folder": read_image_folder,
    "medmnist_npz": read_medmnist,
}


def read_manifest(layout: str, root: str | Path, *, name: str | None = None, **options: Any) -> Manifest:
    """The one table of a data set in the given layout; `options` are those of the layout's function.

    Raises ConfigError for an unknown layout or option, DataError where the data is not what the layout says.
    """
    if layout not in LAYOUTS:
        near = difflib.get_close_matches(layout, LAYOUTS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(LAYOUTS)}"
        raise ConfigError("layout.type", "is no layout", found=repr(layout), todo=hint)
    read, path = LAYOUTS[layout], Path(root)
    _check_options(layout, read, options)
    if not path.exists():
        raise DataError(path, "there is no such file or folder", todo="check the data folder")
    return read(path, name or path.stem, **options)


def _check_options(layout: str, read: Callable[..., Manifest], options: dict[str, Any]) -> None:
    parameters = list(inspect.signature(read).parameters.values())[2:]
    known = [parameter.name for parameter in parameters]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known options: {', '.join(known)}"
            raise ConfigError(f"layout.{option}", f"is no option of layout '{layout}'", todo=hint)
    hints = get_type_hints(read)
    for option, value in options.items():
        try:
            # A string is a sequence of strings too: `exclude: "*.png"` would exclude everything, letter by letter.
            TypeAdapter(hints[option]).validate_python(value)
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]["msg"]
            raise ConfigError(f"layout.{option}", wrong[0].lower() + wrong[1:], found=repr(value)[:60]) from None
    for parameter in parameters:
        if parameter.default is inspect.Parameter.empty and parameter.name not in options:
            raise ConfigError(f"layout.{parameter.name}", f"is missing; layout '{layout}' needs it")


def read_bytes(manifest: Manifest, row: LabelledImage) -> bytes:
    """The encoded picture of a row: the file's own bytes, or a lossless PNG of an array's row.

    Raises DataError, naming the sample, where it cannot be read.
    """
    path, part = Path(manifest.root) / row.image.path, row.image.part
    if part is None:
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{manifest.root}: {row.sample_id}", f"cannot be read: {error.strerror}") from None
    if path.suffix == ".tar":
        return read_sample(manifest.root, str(part)).image
    buffer = io.BytesIO()
    # Level 1 is a third of the time of the default for a tenth more bytes, on pictures of 28 pixels.
    _array_picture(manifest, row).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def read_rgb(manifest: Manifest, row: LabelledImage) -> Image.Image:
    """The picture of a row as 8-bit RGB, exactly as stored. Raises DataError, naming the sample."""
    if row.image.part is not None and Path(row.image.path).suffix != ".tar":
        return _array_picture(manifest, row).convert("RGB")
    return images.read_rgb(read_bytes(manifest, row), f"{manifest.root}: {row.sample_id}")


def _array_picture(manifest: Manifest, row: LabelledImage) -> Image.Image:
    split, _, number = str(row.image.part).rpartition("/")
    picture = read_array(str(Path(manifest.root) / row.image.path), f"{split}_images")[int(number)]
    if picture.dtype != "uint8" or picture.ndim not in (2, 3):
        raise DataError(f"{manifest.root}: {row.sample_id}", "is not an 8-bit picture",
                        found=f"{picture.dtype} {picture.shape}", todo="volumes need the volume layout")  # fmt: skip
    return Image.fromarray(picture)
