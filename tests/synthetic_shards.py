"""Small dataset folders for tests: coloured squares whose caption names the colour, and figures of made-up articles."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from biomedclip.schema import Pair
from biomedclip.shards import DatasetWriter

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def write_colours(folder: Path, *, per_class: int = 6, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """A labelled set of `per_class` pictures of each colour and split, with two captions each."""
    with DatasetWriter(folder, name="colours") as writer:
        for split in splits:
            for label, (name, colour) in enumerate(COLOURS.items()):
                for number in range(per_class):
                    writer.add(
                        colour_pair(f"{split}-{name}-{number}", name, colour, split, label, number, source="colours")
                    )
        writer.finish(provenance={}, card=lambda manifest: "made-up colours")
    return folder


def write_articles(folder: Path, *, articles: int = 5, figures: int = 4) -> Path:
    """Unlabelled figures, `figures` of each article, written article by article as a builder does."""
    with DatasetWriter(folder, name="articles") as writer:
        for article in range(articles):
            for number in range(figures):
                key = f"pmc{article}-{number}"
                random = np.random.default_rng([article, number])
                pixels = random.integers(0, 256, (50 + number, 70, 3), dtype=np.uint8)
                data = encode(pixels, "JPEG")
                writer.add(
                    Pair(
                        key=key, image=data, image_format="jpg", width=70, height=50 + number, licence="CC BY",
                        caption=f"Figure {number} of article {article}: noise.", source="articles", phash=0,
                        sha256=hashlib.sha256(data).hexdigest(), article_id=f"PMC{article}.1", figure_id=str(number),
                    )
                )  # fmt: skip
        writer.finish(provenance={}, card=lambda manifest: "made-up articles")
    return folder


def write_captions(folder: Path, captions: Sequence[str], sidecars: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Grey squares with these captions, in order, and what their .json holds besides."""
    with DatasetWriter(folder, name="captions") as writer:
        for number, caption in enumerate(captions):
            data = encode(np.full((24, 24, 3), number % 256, dtype=np.uint8), "PNG")
            writer.add(
                Pair(
                    key=f"sample-{number}", image=data, image_format="png", width=24, height=24, caption=caption,
                    licence="CC0", source="captions", sha256=hashlib.sha256(data).hexdigest(), phash=0,
                    sidecar=sidecars[number] if sidecars else {},
                )
            )  # fmt: skip
        writer.finish(provenance={}, card=lambda manifest: "made-up captions")
    return folder


def colour_pair(
    key: str, name: str, colour: tuple[int, int, int], split: str, label: int, number: int, *, source: str
) -> Pair:
    """One square of a colour with a little noise of its own."""
    noise = np.random.default_rng([number, label, split == "val"]).integers(-30, 30, (24, 24, 3))
    data = encode((np.array(colour) + noise).clip(0, 255).astype(np.uint8), "PNG")
    captions = (f"a {name} square", f"square of {name} colour")
    return Pair(
        key=key, image=data, image_format="png", width=24, height=24, caption=captions[0], captions=captions,
        source=source, licence="CC0", sha256=hashlib.sha256(data).hexdigest(), phash=0, split=split,  # type: ignore[arg-type]
        labels=(name,), label_ids=(label,), modality="photograph",
    )  # fmt: skip


def encode(pixels: np.ndarray, kind: str) -> bytes:
    """The pixels as the bytes of a picture file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()
