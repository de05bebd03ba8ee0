"""The explain command: one file in, an explanation as a PNG out, its numbers on standard output.

Everything that can be wrong with what was asked (labels, the name to write, the file) is said before a model is loaded.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from biomedclip.app.pictures import Picture, find_sources, parse_window
from biomedclip.app.tables import printable
from biomedclip.errors import ConfigError, DataError
from biomedclip.files import write_bytes

if TYPE_CHECKING:
    from biomedclip.app.explain import Explanation


def write_explanation(
    out: Path, image: str, label: str, against: str | None = None, *, model: str, window: str | None = None,
    frame: int | None = None, as_json: bool = False, overwrite: bool = False,
) -> Explanation:  # fmt: skip
    """Write the explanation of a file's picture to `out` and say its numbers; returns it.

    Raises ConfigError for labels that ask nothing and for a name that is taken or no PNG, DataError for a file that
    holds no picture, CheckpointError as `biomedclip.load` does.
    """
    if out.suffix.lower() != ".png":
        raise ConfigError(out, "does not end in .png", todo="name a PNG with --out")
    if out.exists() and not overwrite:
        raise ConfigError(out, "exists already", todo="name another file, or give --overwrite")
    picture = find_picture(image, window, frame)

    from biomedclip.app.explain import check_labels, explain_picture
    from biomedclip.models.load import load

    label, against = check_labels(label, against)
    explanation = explain_picture(*load(model), picture.image, label, against)  # type: ignore[arg-type]
    buffer = io.BytesIO()
    explanation.overlay.save(buffer, "PNG")
    write_bytes(out, buffer.getvalue())
    if as_json:
        row = {"image": picture.name, "frame": picture.frame, "model": model, "picture": str(out)}
        sys.stdout.write(json.dumps(row | explanation.summary(), ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(_describe(picture, explanation, model, out))
    return explanation


def find_picture(image: str, window: str | None = None, frame: int | None = None) -> Picture:
    """The one picture that a file, pattern or sample stands for: of several frames or slices number `frame`, or the
    middle one. Raises ConfigError where it stands for several files, DataError where it holds no such picture."""
    files = find_sources([image], parse_window(window)).files
    if len(files) != 1:
        raise ConfigError(image, "stands for several files", found=len(files), todo="name one")
    pictures = list(files[0].read())
    usable = [picture for picture in pictures if picture.image is not None]
    if not usable:
        raise DataError(image, pictures[0].refused if pictures else "holds no picture")
    if frame is None:
        return usable[len(usable) // 2]
    for picture in usable:
        if (picture.frame or 0) == frame:
            return picture
    numbers = ", ".join(str(picture.frame or 0) for picture in usable)
    raise DataError(image, f"has no frame {frame} that is read", found=numbers, todo="name one of these with --frame")


def _describe(picture: Picture, explanation: Explanation, model: str, out: Path) -> str:
    frame = "" if picture.frame is None else f" [{picture.frame}]"
    note = f" ({picture.note})" if picture.note else ""
    lines = [f"{picture.name}{frame}{note}, {model}", *explanation.describe(), f"written: {out}"]
    return "".join(f"{printable(line)}\n" for line in lines)
