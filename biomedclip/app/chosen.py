"""The picture that a visitor chose: an upload or a bundled example, read with the limits of `pictures.py`.

Reads a path in the page's private folder or in the package, never one that a browser named; yields pictures, what is
said about them, and copies for the screen. Gradio's image component does not decode here: it would show neither DICOM
nor volumes, and it opens files before anybody has looked at their size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from biomedclip.app.cards import write_notice
from biomedclip.app.pictures import Picture, Source, parse_window
from biomedclip.errors import DataError
from biomedclip.windows import WINDOWS

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svs", ".dcm", ".dicom", ".ima", ".nii",
    ".nii.gz",
)  # fmt: skip
"""What an upload may be called; what it is, `pictures.py` says by its bytes."""
PREVIEW_PX = 640


@dataclass(frozen=True, slots=True)
class Chosen:
    """A file and the window for its grey, as `parse_window` takes it."""

    path: Path
    name: str
    window: str = ""

    def read(self, number: int = 0) -> tuple[Picture, Image.Image]:
        """Its picture, frame or slice of that number in order. Raises DataError where there is none to look at."""
        for place, picture in enumerate(self._source().read()):
            if place == number:
                if picture.image is None:
                    raise DataError(picture.name, picture.refused)
                return picture, picture.image
        raise DataError(self.name, f"has no picture {number + 1}", todo="choose another frame")

    def frames(self) -> list[int]:
        """Numbers of its frames or slices as the file counts them, empty where it holds one picture."""
        return [picture.frame for picture in self._source().read() if picture.frame is not None]

    def _source(self) -> Source:
        return Source(name=self.name, path=self.path, grey=parse_window(self.window or None))


def shrink(image: Image.Image, side_px: int = PREVIEW_PX) -> Image.Image:
    """A copy that is at most so large, for the screen; pictures of a few pixels are enlarged without smoothing."""
    longer = max(image.size)
    if longer * 4 <= side_px:
        factor = side_px // 2 // longer
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    copy = image.copy()
    copy.thumbnail((side_px, side_px))
    return copy


def describe(picture: Picture, image: Image.Image) -> str:
    """Name, size, frame and what was decided while it was read, as a notice."""
    frame = f"frame {picture.frame}" if picture.frame is not None else ""
    facts = (picture.name, f"{image.width} x {image.height} px", frame, picture.note)
    return write_notice(", ".join(fact for fact in facts if fact))


def list_windows() -> list[tuple[str, str]]:
    """(shown, value) of the windows that may be chosen."""
    presets = [(f"{name}: centre {c:g}, width {w:g} HU", name) for name, (c, w) in WINDOWS.items()]
    return [("as the file says", ""), ("its own percentiles", "percentile"), *presets]
