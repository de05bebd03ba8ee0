"""Small folders of units for tests: coloured noise under captions, article by article, as a harvest leaves them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from synthetic_shards import encode

from biomedclip.images import check_image
from biomedclip.schema import Article, Drop, Pair
from data_builders.units import unit_name, write_unit

WORDS = "axial view of the left kidney after contrast with a small cyst in the lower pole seen from above".split()


def article(number: int, **changes: Any) -> Article:
    """An article of a number."""
    facts: dict[str, Any] = {
        "article_id": f"PMC{number}.1", "pmcid": number, "version": 1, "title": f"Article {number}", "licence": "CC BY",
        "licence_url": "https://creativecommons.org/licenses/by/4.0/", "doi": f"10.1/{number}", "journal": "J",
        "published": "2023-05", "language": "en", "authors": ("A. Author",),
    }  # fmt: skip
    return Article(**{**facts, **changes})


def pair(number: int, figure: int, **changes: Any) -> Pair:
    """A figure of an article: smooth noise of its own, under a caption of its own."""
    random = np.random.default_rng([number, figure])
    image = changes.pop("image", None) or encode(smooth(random), "JPEG")
    facts = check_image(image)
    words = random.permutation(WORDS).tolist()
    given: dict[str, Any] = {
        "key": f"pmc-{number}-v1-f{figure}-p0", "image": image, "image_format": facts.format, "width": facts.width,
        "height": facts.height, "caption": f"Figure {figure}: {' '.join(words)}.", "source": "pmc", "licence": "CC BY",
        "sha256": hashlib.sha256(image).hexdigest(), "phash": facts.phash, "article_id": f"PMC{number}.1",
        "figure_id": f"F{figure}", "group_id": f"PMC{number}", "sidecar": {"label": f"Figure {figure}"},
    }  # fmt: skip
    return Pair(**{**given, **changes})


def smooth(random: np.random.Generator, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """A picture with a hash of its own."""
    from PIL import Image

    small = random.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))


def write_raw(folder: Path, *units: Iterable[Article | Pair | Drop]) -> Path:
    """A folder of the given units."""
    for number, items in enumerate(units):
        write_unit(folder, unit_name(number), items, identity={})
    return folder


def articles(numbers: Iterable[int], figures: int = 4, **changes: Any) -> list[Article | Pair | Drop]:
    """Articles with figures, and a figure of each that could not be had."""
    items: list[Article | Pair | Drop] = []
    for number in numbers:
        items.append(article(number, **changes))
        items += [pair(number, figure) for figure in range(figures)]
        items.append(Drop(source="pmc", item="F99", reason="missing_graphic", article_id=f"PMC{number}.1"))
    return items
