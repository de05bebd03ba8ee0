"""DICOM files to facts that may be told and 8-bit RGB pictures; pydicom parses and decodes.

Reads one frame at a time: stored values, modality LUT or rescale, then a window to 8 bits, then MONOCHROME1 turned
over (PS3.3 C.11.1, C.11.2). The window is the recipe's, else the file's own (its VOI LUT, or its first window), else,
for at most 8 bits, the whole range; deeper grey without any is refused, because squeezing it would invent contrast and
cutting it would lose it. Pictures come as stored: neither turned nor mirrored, overlays are not drawn. What a file may
tell is an allow-list, `TELLABLE`; names, numbers and dates of patients stay here.
"""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from biomedclip.errors import MissingExtra
from biomedclip.images import MAX_PIXELS, BadImage
from biomedclip.windows import Grey, apply_window, scale

MAX_FRAMES = 100_000
MAX_INFLATED_BYTES = 1 << 30
"""What a deflated file may become; pydicom would inflate all of it before it looks."""

TELLABLE: dict[str, tuple[tuple[str, ...], str]] = {
    "modality": (("Modality",), r"[A-Z]{2,16}"),
    "body_part": (("BodyPartExamined",), r"[A-Z][A-Z _]{0,15}"),
    "view": (("ViewPosition",), r"[A-Z]{1,4}"),
    "laterality": (("ImageLaterality", "Laterality"), r"[LRBU]"),
    "sex": (("PatientSex",), r"[MFO]"),
    "age": (("PatientAge",), r"\d{3}[DWMY]"),
}
"""Attribute -> DICOM keywords, the first of which counts, and what a value must look like to be told: everything a
manifest may learn of a file."""

_IDENTIFIERS = ("PatientName", "PatientID", "OtherPatientIDs", "OtherPatientNames", "PatientBirthName",
                "PatientMotherBirthName", "AccessionNumber", "ReferringPhysicianName")  # fmt: skip
_NO_PICTURES = {"SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "RTRECORD", "SR", "KO", "PR", "AU", "DOC", "ECG", "REG", "FID"}
_OFTEN_BURNED_IN = {"US", "IVUS", "ES", "SC", "OT", "XA", "RF", "GM", "XC"}
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_COLOURS = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"}
_GREYS = {"MONOCHROME1", "MONOCHROME2"}
_PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomFacts:
    """What one file says of itself. The identifiers are for grouping and joining, hashed; they enter no manifest."""

    frames: int
    attributes: dict[str, str]
    flags: tuple[str, ...]
    """`burned_in_annotation`, `maybe_burned_in_annotation`, `recognizable_face`."""
    refused: str | None
    """Why no picture can be made of it with the asked `Grey`, as the ledger's word."""
    patient_id: str
    study_uid: str
    series_uid: str
    sop_uid: str


def read_facts(path: Path, grey: Grey | None = None) -> DicomFacts:
    """What a file says of itself, without decoding its pixels.

    Raises BadImage with reason `not_dicom`, `broken_dicom` or `deflate_bomb`.
    """
    dataset, pixel_bytes = read_header(path)
    with _parsing():
        refused = _refuse(dataset, pixel_bytes, grey or Grey())
        return DicomFacts(
            frames=_frames(dataset) if refused is None else 0,
            attributes=_tell(dataset),
            flags=_flags(dataset),
            refused=refused,
            patient_id=str(dataset.get("PatientID") or "").strip(),
            study_uid=str(dataset.get("StudyInstanceUID") or ""),
            series_uid=str(dataset.get("SeriesInstanceUID") or ""),
            sop_uid=str(dataset.get("SOPInstanceUID") or ""),
        )


def render_frame(path: Path, frame: int = 0, grey: Grey | None = None) -> Image.Image:
    """One frame (from 0) as 8-bit RGB.

    Raises BadImage with the reasons of `read_facts`, or `no_pixels`, `not_a_picture`, `image_bomb`, `cut_short`,
    `unsupported_photometric`, `no_decoder`, `needs_window`, `bad_window`, `window_hu_needs_ct`, `no_such_frame`.
    """
    grey = grey or Grey()
    dataset, pixel_bytes = read_header(path)
    with _parsing():
        if refused := _refuse(dataset, pixel_bytes, grey):
            raise BadImage(refused, path.name if refused == "no_pixels" else "")
        if not 0 <= frame < _frames(dataset):
            raise BadImage("no_such_frame", f"{frame} of {_frames(dataset)}")
        stored = _decode(path, dataset, frame)
        photometric = dataset.PhotometricInterpretation
        if photometric in _GREYS:
            picture = _to_grey(stored, dataset, frame, grey)
            return Image.fromarray(255 - picture if photometric == "MONOCHROME1" else picture).convert("RGB")
        if photometric == "PALETTE COLOR":
            from pydicom.pixels import apply_color_lut

            coloured = apply_color_lut(stored, dataset)[..., :3]
            return Image.fromarray(_to_bytes(coloured, 8 * coloured.dtype.itemsize))
        return Image.fromarray(_to_bytes(stored, int(dataset.BitsStored)))


@contextmanager
def _parsing() -> Iterator[None]:
    """Turn what pydicom and its plugins raise for a damaged file into BadImage `broken_dicom`, warnings kept quiet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that break the standard, which most archives hold
            yield
    except BadImage:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, EOFError, MemoryError, ArithmeticError,
            RuntimeError, AssertionError, struct.error, zlib.error) as error:  # fmt: skip
        raise BadImage("broken_dicom", f"{type(error).__name__} {error}".split("\n")[0][:120]) from None


def read_header(path: Path) -> tuple[Any, int | None]:
    """Everything before the pixels, and how many bytes they have: None where there are none, -1 where unsaid.

    The data set holds names and numbers of patients: take out what is needed and pass on nothing else. Raises BadImage
    as `read_facts` does.
    """
    stat = path.stat() if path.exists() else None
    if stat is None:
        raise BadImage("not_dicom", "there is no such file")
    return _load_header(str(path), (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=4)
def _load_header(path: str, stamp: tuple[int, int]) -> tuple[Any, int | None]:
    try:
        from pydicom.filereader import read_file_meta_info, read_partial
        from pydicom.uid import DeflatedExplicitVRLittleEndian
    except ImportError:
        raise MissingExtra("build", "pydicom") from None
    pixel_bytes: list[int] = []

    def stop(tag: int, vr: str | None, length: int) -> bool:
        if tag in _PIXEL_TAGS:
            pixel_bytes.append(-1 if length == 0xFFFFFFFF else length)
        return tag in _PIXEL_TAGS

    with _parsing():
        with open(path, "rb") as file:
            if file.read(132)[128:] != b"DICM":
                raise BadImage("not_dicom", "has no DICM mark")
        if read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            _check_inflated(path)
        with open(path, "rb") as file:
            # Private elements of megabytes are skipped, not read.
            dataset = read_partial(file, stop_when=stop, defer_size=1 << 20)
        return dataset, pixel_bytes[0] if pixel_bytes else None


def _check_inflated(path: str) -> None:
    unpacker, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    from pydicom.filereader import _read_file_meta_info, read_preamble

    with open(path, "rb") as file:
        read_preamble(file, False)
        _read_file_meta_info(file)
        while data := file.read(1 << 16):
            while data:
                total += len(unpacker.decompress(data, 1 << 20))
                data = unpacker.unconsumed_tail
                if total > MAX_INFLATED_BYTES:
                    raise BadImage("deflate_bomb", f"more than {MAX_INFLATED_BYTES >> 20} MiB")


def _frames(dataset: Any) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def _refuse(dataset: Any, pixel_bytes: int | None, grey: Grey) -> str | None:
    """Why no picture can be made of the file, before anything is decoded."""
    modality = str(dataset.get("Modality") or "")
    if modality in _NO_PICTURES:
        return "not_a_picture"
    if pixel_bytes is None or "Rows" not in dataset or "Columns" not in dataset:
        return "no_pixels"
    rows, columns, frames = int(dataset.Rows), int(dataset.Columns), _frames(dataset)
    if rows * columns > MAX_PIXELS or not 1 <= frames <= MAX_FRAMES:
        return "image_bomb"
    if not rows * columns:
        return "no_pixels"
    photometric, samples = str(dataset.get("PhotometricInterpretation")), int(dataset.get("SamplesPerPixel") or 1)
    if photometric not in _COLOURS | _GREYS | {"PALETTE COLOR"} or (samples == 3) != (photometric in _COLOURS):
        return "unsupported_photometric"
    said = rows * columns * frames * samples * int(dataset.BitsAllocated) // 8
    if photometric == "YBR_FULL_422":
        said = said * 2 // 3
    if 0 <= pixel_bytes < said and not _syntax(dataset).is_encapsulated:
        return "cut_short"
    if not _has_decoder(dataset):
        return "no_decoder"
    if photometric not in _GREYS:
        return None
    if grey.window:
        return None if modality == "CT" and _find(dataset, 0, "RescaleSlope") is not None else "window_hu_needs_ct"
    deep = int(dataset.BitsStored) > 8
    has_window = _find(dataset, 0, "WindowWidth") is not None or _find(dataset, 0, "VOILUTSequence") is not None
    return None if has_window or not deep or grey.percentile else "needs_window"


def _syntax(dataset: Any) -> Any:
    syntax = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if syntax is None:
        raise BadImage("broken_dicom", "does not say its transfer syntax")
    return syntax


def _has_decoder(dataset: Any) -> bool:
    from pydicom.pixels import get_decoder

    try:
        return bool(get_decoder(_syntax(dataset)).is_available)
    except NotImplementedError:
        return False


def _decode(path: Path, dataset: Any, frame: int) -> np.ndarray:
    """The stored values of one frame; colours as RGB."""
    from pydicom import dcmread
    from pydicom.pixels import pixel_array
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    if _frames(dataset) > 1 and _syntax(dataset) != DeflatedExplicitVRLittleEndian:
        return np.asarray(pixel_array(path, index=frame))  # reads no more of the file than the frame
    # The whole file, which also mends files that are written otherwise than they say.
    return np.asarray(pixel_array(dcmread(path), index=frame if _frames(dataset) > 1 else None))


def _to_bytes(values: np.ndarray, bits: int) -> np.ndarray:
    """Colour samples of any depth as 8 bits: no window is defined for them, so the scale is that of the type."""
    if bits <= 8 and values.dtype == np.uint8:
        return values
    return (values >> (bits - 8)).astype(np.uint8)


def _to_grey(stored: np.ndarray, dataset: Any, frame: int, grey: Grey) -> np.ndarray:
    values = _to_modality(stored, dataset, frame)
    if grey.window:
        return apply_window(values, *grey.window)
    if luts := _find(dataset, frame, "VOILUTSequence"):
        table, bits = _lut(luts[0], dataset)
        return scale(_look_up(np.rint(values).astype(np.int64), luts[0], table), 0, 2**bits - 1)
    if (width := _first(_find(dataset, frame, "WindowWidth"))) is not None:
        centre = _first(_find(dataset, frame, "WindowCenter"))
        function = _find(dataset, frame, "VOILUTFunction") or "LINEAR"
        try:
            return apply_window(values, float(centre), float(width), str(function).upper())
        except (ValueError, TypeError) as error:
            raise BadImage("bad_window", str(error)[:80]) from None
    bits, signed = int(dataset.BitsStored), int(dataset.get("PixelRepresentation") or 0)
    if bits > 8 or stored.dtype.kind == "f":
        if grey.percentile is None:
            raise BadImage("needs_window", f"{bits} bits")
        padding = dataset.get("PixelPaddingValue")
        there = values[stored != padding] if isinstance(padding, int) and (stored != padding).any() else values
        low, high = np.percentile(np.nan_to_num(there), grey.percentile)
        return scale(values, float(low), float(high))
    ends = np.array([-(1 << bits >> 1), (1 << bits >> 1) - 1] if signed else [0, (1 << bits) - 1])
    low, high = _to_modality(ends, dataset, frame)
    return scale(values, float(min(low, high)), float(max(low, high)))


def _to_modality(stored: np.ndarray, dataset: Any, frame: int) -> np.ndarray:
    """Stored values in the unit of the modality: HU for CT."""
    if luts := _find(dataset, frame, "ModalityLUTSequence"):
        return _look_up(stored.astype(np.int64), luts[0], _lut(luts[0], dataset)[0])
    slope, intercept = _find(dataset, frame, "RescaleSlope"), _find(dataset, frame, "RescaleIntercept")
    if slope is None and intercept is None:
        return stored
    return stored.astype(np.float64) * float(1 if slope is None else slope) + float(intercept or 0)


def _find(dataset: Any, frame: int, keyword: str) -> Any:
    """A value of the frame: of its own functional groups, those all frames share, or the file (PS3.3 C.7.6.16)."""
    groups = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    for group in (*groups, *list(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]):
        for name in ("FrameVOILUTSequence", "PixelValueTransformationSequence"):
            for item in group.get(name) or []:
                if item.get(keyword) not in (None, ""):
                    return item.get(keyword)
    value = dataset.get(keyword)
    return None if value is None or value == "" else value


def _first(value: Any) -> Any:
    """The first of the values a file offers (a viewer's default window)."""
    return next(iter(value), None) if isinstance(value, list | tuple) or hasattr(value, "append") else value


def _lut(item: Any, dataset: Any) -> tuple[np.ndarray, int]:
    """A lookup table's entries and their bits. pydicom's own lookup wraps around where 8-bit entries meet 12-bit
    pixels, which is what mammography has."""
    data, bits = item["LUTData"].value, int(item.LUTDescriptor[2])
    if isinstance(data, bytes):
        order = "<" if dataset.original_encoding[1] else ">"
        count = int(item.LUTDescriptor[0]) or 1 << 16
        return np.frombuffer(data, "u1" if bits == 8 and len(data) < 2 * count else f"{order}u2"), bits
    return np.atleast_1d(np.asarray(data)), bits


def _look_up(values: np.ndarray, item: Any, table: np.ndarray) -> np.ndarray:
    return table[np.clip(values - int(item.LUTDescriptor[1]), 0, len(table) - 1)]


def _tell(dataset: Any) -> dict[str, str]:
    """What may be told, where it looks as it should and is no part of an identifier."""
    secret = {word for key in _IDENTIFIERS for word in re.split(r"\W+", str(dataset.get(key) or "").upper()) if word}
    told = {}
    for name, (keywords, pattern) in TELLABLE.items():
        value = next((str(dataset.get(keyword)).strip() for keyword in keywords if dataset.get(keyword)), "")
        if re.fullmatch(pattern, value) and not (len(value) > 1 and secret & set(re.split(r"\W+", value))):
            told[name] = value
    if "age" in told and told["age"][3] == "Y":
        told["age"] = min(told["age"], "090Y")  # above 89, an age identifies (HIPAA safe harbor)
    return told


def _flags(dataset: Any) -> tuple[str, ...]:
    flags = []
    stated = str(dataset.get("BurnedInAnnotation") or "").upper()
    capture = str(dataset.get("SOPClassUID") or "").startswith(_SECONDARY_CAPTURE)
    if stated == "YES":
        flags.append("burned_in_annotation")
    elif stated != "NO" and (capture or str(dataset.get("Modality")) in _OFTEN_BURNED_IN):
        flags.append("maybe_burned_in_annotation")
    if str(dataset.get("RecognizableVisualFeatures") or "").upper() == "YES":
        flags.append("recognizable_face")
    return tuple(flags)
