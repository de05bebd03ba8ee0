"""A labelled data set on disk, in any common layout, to one Manifest table; builders and evaluation share it.

`read_manifest("csv", root, table="labels.csv", image="file", label="finding")` gives the table, `read_bytes` and
`read_rgb` fetch the picture of a row. A layout is one function in one module here and one line in `LAYOUTS`. Where a
picture is no file of its own, `ImageRef.part` says what it is of the file as `<scheme>:<what>`, and `READERS` holds one
line a scheme: the reference alone, without the layout and its options, brings the picture back in any process.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from biomedclip import images
from biomedclip.errors import ConfigError, DataError
from biomedclip.layouts.arrow import read_arrow_picture, read_hf_dataset, read_parquet_picture
from biomedclip.layouts.dataset import read_dataset, read_sample
from biomedclip.layouts.dicoms import read_dicom_folder, read_dicom_picture
from biomedclip.layouts.folders import read_filename_pattern, read_image_folder
from biomedclip.layouts.hdf5 import read_hdf5, read_hdf5_picture
from biomedclip.layouts.listings import read_coco, read_coop, read_crop
from biomedclip.layouts.medmnist import read_medmnist, read_npz_picture
from biomedclip.layouts.published import read_chexpert, read_flair, read_medimeta
from biomedclip.layouts.tables import read_table
from biomedclip.layouts.tars import read_tar_member, read_webdataset
from biomedclip.layouts.volumes import read_volume_picture, read_volumes
from biomedclip.schema import LabelledImage, Manifest

LAYOUTS: dict[str, Callable[..., Manifest]] = {
    "chexpert_csv": read_chexpert,
    "coco_json": read_coco,
    "coop_json": read_coop,
    "csv": read_table,
    "dataset_folder": read_dataset,
    "dicom_folder": read_dicom_folder,
    "filename_pattern": read_filename_pattern,
    "flair_csv": read_flair,
    "hdf5": read_hdf5,
    "hf_dataset": read_hf_dataset,
    "image_folder": read_image_folder,
    "medimeta": read_medimeta,
    "medmnist_npz": read_medmnist,
    "volumes": read_volumes,
    "webdataset": read_webdataset,
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
    """The encoded picture of a row: the file's own bytes where it is a picture, else a lossless PNG.

    Raises DataError, naming the sample, where it cannot be read.
    """
    picture = read_picture(manifest, row)
    return picture if isinstance(picture, bytes) else images.encode_png(picture)


def read_rgb(manifest: Manifest, row: LabelledImage) -> Image.Image:
    """The picture of a row as 8-bit RGB, exactly as stored. Raises DataError, naming the sample."""
    picture = read_picture(manifest, row)
    if isinstance(picture, bytes):
        return images.read_rgb(picture, f"{manifest.root}: {row.sample_id}")
    return picture.convert("RGB")


def read_picture(manifest: Manifest, row: LabelledImage) -> bytes | Image.Image:
    """The picture of a row as it is stored: encoded bytes, or a picture where it has no encoding of its own.

    Raises DataError, naming the sample, where it cannot be read.
    """
    scheme, _, rest = (row.image.part or "file:").partition(":")
    return READERS[scheme](Path(manifest.root) / row.image.path, rest, f"{manifest.root}: {row.sample_id}")


def _read_file(path: Path, rest: str, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(where, f"cannot be read: {error.strerror}") from None


def _read_shard_image(path: Path, key: str, where: str) -> bytes:
    return read_sample(str(path.parent), key).image


READERS: dict[str, Callable[[Path, str, str], bytes | Image.Image]] = {
    "arrow": read_arrow_picture,
    "crop": read_crop,
    "dicom": read_dicom_picture,
    "file": _read_file,
    "hdf5": read_hdf5_picture,
    "npz": read_npz_picture,
    "parquet": read_parquet_picture,
    "shard": _read_shard_image,
    "tar": read_tar_member,
    "volume": read_volume_picture,
}
"""How each scheme of `ImageRef.part` is read: (file, what follows the scheme, where for messages) -> encoded bytes, or
a picture that has no encoding of its own. Every reader opens its file in the process that reads."""
