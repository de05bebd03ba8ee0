"""Whatever a user names, to RGB pictures: files of any kind, folders, patterns, bundled examples.

Reads paths and yields one `Picture` for each still, frame or slice, or one that says in words why there is none: a
folder of a thousand files is not given up for one of them, and nothing is left out silently. What a file is, its first
bytes say, not its name. Two things are decided here and said in `note`: of a volume some axial slices are shown, by
percentiles of its grey, because NIfTI carries no window; slides are read at a reduced size. Other grey of more than 8
bits is refused without a window, because which values are black and white changes the answer.
"""

from __future__ import annotations

import difflib
import errno
import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from biomedclip.app.slides import TIFF_MARKS, read_large_tiff, tiff_size
from biomedclip.errors import ConfigError, DataError, MissingExtra
from biomedclip.images import MAX_PIXELS, BadImage, decode_deep, decode_rgb, has_several_frames
from biomedclip.layouts.scan import IMAGE_SUFFIXES, walk_files
from biomedclip.windows import WINDOWS, Grey, apply_window, scale

SAMPLE = "sample://"
MAX_FRAMES = 32
"""Frames taken of one file, evenly spread; a loop of ultrasound has hundreds that look alike."""
SLICES = 8
"""Axial slices taken of a volume, evenly spread over the middle three fifths of its length: ends are often empty."""
PERCENTILES = (0.5, 99.5)
MAX_FILE_BYTES = 1 << 30
"""Larger files are not read into memory; a TIFF of more than MAX_PIXELS is read in parts, and may be larger."""
LARGE_SIDE_PX = 1024
"""Shorter side that is kept of a slide or of a photograph above MAX_PIXELS."""

_VOLUMES = (".nii", ".nii.gz")
_TAKEN = (*IMAGE_SUFFIXES, *_VOLUMES, ".dcm", ".dicom", ".ima", ".jfif", ".jpe", ".svs")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", *TIFF_MARKS)
_LIMIT = f"more than the {MAX_PIXELS // 1_000_000} million pixels that are decoded at once"
_WINDOW = "has grey of more than 8 bits and no window: say which values are black and white with --window"
_REASONS = {
    "not_an_image": "is no picture, whatever its name says",
    "broken_image": "is damaged",
    "deep_image": _WINDOW,
    "needs_window": _WINDOW,
    "bad_window": "has a window that is none; name one with --window",
    "window_hu_needs_ct": "is no CT, so that no window in HU applies; leave --window out, or give percentile",
    "image_bomb": f"has {_LIMIT}; save it smaller, or a slide as a pyramid: "
                  "vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg",
    "unsupported_tiff": "stores its pixels in a way that is not read here; save it again: "
                        "vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg",
    "broken_dicom": "is a damaged DICOM file",
    "deflate_bomb": "is a DICOM file that unpacks to more than is read",
    "no_pixels": "is a DICOM file without pixels",
    "not_a_picture": "is a DICOM file of another kind (a report, a plan, a segmentation)",
    "cut_short": "is a DICOM file with fewer pixels than it says",
    "unsupported_photometric": "is a DICOM file in colours that are not read here",
    "no_decoder": "is a DICOM file compressed in a way that no installed decoder reads",
    "not_three_dimensional": "is a volume of more or fewer than three dimensions; save one of its volumes",
    "not_grey": "is a volume of colours",
    "volume_bomb": "is a volume larger than is read at once",
    "broken_volume": "is a damaged volume",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture to look at, or the reason why there is none."""

    name: str
    """As the user would call its file."""
    image: Image.Image | None = None
    """8-bit RGB; None where `refused` says why."""
    frame: int | None = None
    """Which of the file's frames or axial slices, from 0; None where it has one."""
    note: str = ""
    refused: str = ""

    def read(self, at_least_px: int | None = None) -> Iterator[Picture]:
        """Itself, as a `Source` gives its pictures."""
        del at_least_px
        yield self


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file that was named or found."""

    name: str
    path: Path
    grey: Grey = field(default_factory=Grey)

    def read(self, at_least_px: int | None = None) -> Iterator[Picture]:
        """Its pictures, one at a time; one that says why there is none where it cannot be read.

        With `at_least_px` JPEGs are scaled while they are decoded, no smaller than that.
        """
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")  # A pipe would be waited for.
            with self.path.open("rb") as file:
                head, size = file.read(132), os.fstat(file.fileno()).st_size
            yield from self._read_kind(head, size, at_least_px)
        except OSError as error:
            yield self._refuse(f"cannot be opened: {(error.strerror or str(error)).lower()}")
        except BadImage as error:
            yield self._refuse(explain(error))
        except (DataError, MissingExtra) as error:
            found = f" ({error.found})" if error.found else ""
            yield self._refuse(f"{error.wrong}{found}" + (f"; {error.todo}" if isinstance(error, MissingExtra) else ""))

    def _read_kind(self, head: bytes, size: int, at_least_px: int | None) -> Iterator[Picture]:
        if not head:
            yield self._refuse("is empty")
        elif head[128:132] == b"DICM":
            yield from self._read_dicom()
        elif self.path.name.lower().endswith(_VOLUMES):
            yield from self._read_volume()
        elif head[:4] in TIFF_MARKS and _pixels(tiff_size(self.path)) > MAX_PIXELS:
            image, note = read_large_tiff(self.path, LARGE_SIDE_PX)
            yield Picture(name=self.name, image=image, note=note)
        elif size > MAX_FILE_BYTES:
            yield self._refuse(f"has {size >> 20:,} MiB, more than the {MAX_FILE_BYTES >> 20:,} that are read at once")
        else:
            image, note = self._decode(self.path.read_bytes(), at_least_px)
            yield Picture(name=self.name, image=image, note=note)

    def _decode(self, data: bytes, at_least_px: int | None) -> tuple[Image.Image, str]:
        try:
            return decode_rgb(data, at_least_px=at_least_px), _first_of_several(data)
        except BadImage as error:
            if error.reason == "deep_image" and (self.grey.window or self.grey.percentile):
                return show_deep(decode_deep(data), self.grey), _first_of_several(data)
            if error.reason != "image_bomb":
                raise
            image = decode_rgb(data, at_least_px=LARGE_SIDE_PX)
            return image, f"read at a reduced size, {image.width} x {image.height} px"

    def _read_dicom(self) -> Iterator[Picture]:
        from biomedclip.dicom import read_facts, render_frame

        facts = read_facts(self.path, self.grey)
        if facts.refused:
            raise BadImage(facts.refused)
        chosen = spread(0, facts.frames, MAX_FRAMES)
        note = f"{len(chosen)} of {facts.frames} frames" if len(chosen) < facts.frames else ""
        for frame in chosen:
            place = frame if facts.frames > 1 else None
            try:
                yield Picture(name=self.name, frame=place, note=note, image=render_frame(self.path, frame, self.grey))
            except BadImage as error:
                yield Picture(name=self.name, frame=place, refused=explain(error))

    def _read_volume(self) -> Iterator[Picture]:
        from biomedclip.layouts.volume_files import read_nifti_shape
        from biomedclip.layouts.volumes import read_volume_picture
        from biomedclip.windows import write_grey

        shape, refused = read_nifti_shape(self.path)
        if refused:
            raise BadImage(refused)
        grey = self.grey if self.grey.window or self.grey.percentile else Grey(percentile=PERCENTILES)
        first, last = shape[2] // 5, shape[2] - shape[2] // 5
        chosen = spread(first, last, SLICES)
        note = f"{len(chosen)} of {shape[2]} axial slices"
        note += ", grey by percentiles of the volume" if grey.percentile else ""
        for number in chosen:
            image = read_volume_picture(self.path, f"axial/{number}{write_grey(grey)}", self.name)
            yield Picture(name=self.name, frame=number, note=note, image=image.convert("RGB"))

    def _refuse(self, why: str) -> Picture:
        return Picture(name=self.name, refused=why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What was found, and how many files of folders were passed over because they are no pictures, by kind."""

    files: tuple[Source, ...]
    passed_over: dict[str, int]


def find_sources(named: Sequence[str], grey: Grey | None = None) -> Sources:
    """The files behind paths, folders (with all below), patterns and `sample://NAME`, in the order named.

    Raises ConfigError for a pattern or folder without pictures, an unknown sample and an address.
    """
    grey = grey or Grey()
    files: dict[str, Source] = {}
    passed_over: Counter[str] = Counter()
    for name in named:
        for shown, path in _expand(name, passed_over):
            files.setdefault(os.path.abspath(path), Source(name=shown, path=path, grey=grey))
    return Sources(files=tuple(files.values()), passed_over=dict(passed_over.most_common()))


def list_samples() -> dict[str, Path]:
    """The bundled example pictures by name; `examples/ATTRIBUTION.md` says whose they are."""
    folder = Path(str(resources.files("biomedclip.app"))) / "examples"
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in IMAGE_SUFFIXES}


def parse_window(text: str | None) -> Grey:
    """The grey that `--window` asks for: a preset, `CENTRE,WIDTH` in HU, or `percentile`. Raises ConfigError."""
    if text is None:
        return Grey()
    if text == "percentile":
        return Grey(percentile=PERCENTILES)
    if text in WINDOWS:
        return Grey(window=WINDOWS[text])
    try:
        centre, width = (float(part) for part in text.split(","))
        if width >= 1 and abs(centre) < 1e9 and width < 1e9:
            return Grey(window=(centre, width))
    except ValueError:
        pass
    raise ConfigError("--window", "is no window", found=repr(text),
                      todo=f"give CENTRE,WIDTH, percentile, or one of {', '.join(WINDOWS)}")  # fmt: skip


def explain(error: BadImage) -> str:
    """Why a picture is not shown and what to do, in words that follow the file's name."""
    said = _REASONS.get(error.reason, error.reason.replace("_", " "))
    return f"{said} ({error.detail})" if error.detail else said


def show_deep(values: np.ndarray, grey: Grey) -> Image.Image:
    """Grey of more than 8 bits, (H, W) as stored, under a window or percentiles of its own, as RGB."""
    if grey.window:
        shown = apply_window(values.astype(np.float64), *grey.window)
    else:
        low, high = np.percentile(np.nan_to_num(values), grey.percentile or PERCENTILES)
        shown = scale(values, float(low), float(high))
    return Image.fromarray(shown).convert("RGB")


def spread(first: int, last: int, count: int) -> list[int]:
    """At most `count` evenly spread numbers from `first` to before `last`."""
    length = last - first
    if length <= count:
        return list(range(first, last))
    return [first + (2 * i + 1) * length // (2 * count) for i in range(count)]


def _first_of_several(data: bytes) -> str:
    return "the first of several pictures in it" if has_several_frames(data) else ""


def _pixels(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _expand(name: str, passed_over: Counter[str]) -> Iterator[tuple[str, Path]]:
    if name.startswith(SAMPLE):
        yield name, _find_sample(name)
        return
    if "://" in name:
        raise ConfigError(
            name, "is an address, and nothing is downloaded here", todo="save the picture and name its file"
        )
    path = Path(name).expanduser()
    if path.is_dir():
        yield from _expand_folder(path, passed_over)
    elif glob.has_magic(name) and not path.exists():
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise ConfigError(name, "fits no file", todo="check the pattern, and quote it: '*.png'")
        for match in found:
            if os.path.isdir(match):
                yield from _expand_folder(Path(match), passed_over)
            else:
                yield match, Path(match)
    else:
        yield name, path


def _expand_folder(folder: Path, passed_over: Counter[str]) -> Iterator[tuple[str, Path]]:
    count = 0
    for found in walk_files(folder):
        path = folder / found.path
        if found.is_link:
            passed_over["link"] += 1
        elif path.name.lower().endswith(_TAKEN) or _is_picture(path):
            count += 1
            yield str(path), path
        else:
            passed_over[path.suffix.lower() or "no ending"] += 1
    if not count:
        raise ConfigError(folder, "holds no pictures", found=_count(passed_over), todo="name another folder")


def _is_picture(path: Path) -> bool:
    """Whether a file's first bytes are a picture's: DICOM files are often called by numbers alone."""
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError:
        return True  # Why it cannot be opened is said when it is read.
    return (head[128:] == b"DICM" and path.name != "DICOMDIR") or head.startswith(_MAGIC)


def _count(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in counts.most_common(5)) or "no files"


def _find_sample(name: str) -> Path:
    samples, wanted = list_samples(), name.removeprefix(SAMPLE)
    if wanted not in samples:
        near = difflib.get_close_matches(wanted, samples, n=1)
        raise ConfigError(name, "is no sample", todo=f"did you mean {SAMPLE}{near[0]}?" if near else
                          f"use one of {', '.join(SAMPLE + known for known in samples)}")  # fmt: skip
    return samples[wanted]
