"""The pictures of a data set as heads see them: features kept once, or pixels with a bound on memory, and grey copies.

Reads a QuestionTable and an encoder; yields `Pictures`. A picture is one or more regions: the whole, and the tiles of a
K x K grid, each encoded by itself, so that an encoder of 224 pixels sees a tile of a large radiograph at twice the
resolution. Features of a frozen encoder are computed once and kept on disk under the encoder's hash. Pixels of a
fine-tuned tower are kept up to a budget; what does not fit is read and preprocessed again when a batch asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from biomedclip.evaluation.embed import choose_device, embed_images
from biomedclip.evaluation.vqa.questions import QuestionTable, read_picture
from biomedclip.files import sha256_json
from biomedclip.progress import Progress
from biomedclip.schema import LabelledImage, Manifest
from biomedclip.training.vqa.config import VqaEncoderConfig, VqaTrainConfig
from biomedclip.training.vqa.encoders import load_encoder

_MARK = "@region"
"""Between an image and the number of its region in the ids of a manifest of regions."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """All pictures of a data set: features or pixels, and grey copies where they are asked for."""

    features: Tensor | None
    """(N, R, D); None where a tower makes them of `pixels` in every step."""
    pixels: Pixels | None = None
    grey: Tensor | None = None
    """(N, 1, S, S) uint8."""
    width: int = 0
    """D."""
    regions: int = 1
    """R."""


def blind_pictures(count: int, regions: int) -> Pictures:
    """Zeros in the place of features."""
    return Pictures(features=torch.zeros(count, regions, 8), width=8, regions=regions)


def look_at(
    config: VqaTrainConfig, encoder: VqaEncoderConfig, table: QuestionTable, cache: Path, progress: Progress
) -> tuple[Pictures, Callable[[], nn.Module | None]]:
    """Pictures, and what makes a fresh tower for each fit: None where it is frozen."""
    manifest = table.manifest()
    grey = read_grey(manifest, config.head.autoencoder_px) if config.head.autoencoder else None
    regions = count_regions(config.regions)
    model, preprocess = load_encoder(encoder)
    if encoder.tower == "fine_tuned":
        pixels = Pixels(manifest, preprocess, config.regions, budget_mb=config.pixels_mb, workers=config.workers)
        with torch.inference_mode():
            width = model.encode_image(pixels(torch.tensor([0]))[0]).shape[1]  # type: ignore[operator]
        pictures = Pictures(features=None, pixels=pixels, grey=grey, width=width, regions=regions)
        return pictures, lambda: load_encoder(encoder)[0].requires_grad_(True).train()
    device = choose_device(config.device)
    found = embed_images(
        model.to(device), preprocess, region_manifest(manifest, config.regions), read=RegionReader(config.regions),
        device=device, max_excluded=0.0, batch_size=config.embed_batch_size, workers=config.workers,
        cache=config.features or cache, progress=progress,
    )  # fmt: skip
    vectors = torch.from_numpy(np.array(found.vectors)).view(len(manifest.rows), regions, -1)
    return Pictures(features=vectors, grey=grey, width=vectors.shape[2], regions=regions), lambda: None


def count_regions(side: int) -> int:
    """The whole picture, and with a side of 2 or more its side x side tiles."""
    return 1 if side == 1 else 1 + side * side


def cut_region(picture: Image.Image, number: int, side: int) -> Image.Image:
    """Region `number` of a picture: 0 is the whole, 1 to side² its tiles row by row, of one pixel at least."""
    if number == 0:
        return picture
    row, column = divmod(number - 1, side)
    width, height = picture.size
    left, top = column * width // side, row * height // side
    right, bottom = (column + 1) * width // side, (row + 1) * height // side
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def region_manifest(manifest: Manifest, side: int) -> Manifest:
    """A row a region, those of one picture one after another."""
    if side == 1:
        return manifest
    rows = tuple(
        replace(row, sample_id=f"{row.sample_id}{_MARK}{number}")
        for row in manifest.rows for number in range(count_regions(side))
    )  # fmt: skip
    return replace(manifest, rows=rows, sha256=sha256_json([manifest.sha256, side]))


@dataclass
class RegionReader:
    """Reads the region that a row of `region_manifest` names; the last picture is kept for its next region."""

    side: int
    last: tuple[str, Image.Image] | None = None

    def __call__(self, manifest: Manifest, row: LabelledImage) -> Image.Image:
        """The region, 8-bit RGB. Raises DataError for a picture that cannot be read."""
        name, mark, number = row.sample_id.rpartition(_MARK)
        if not mark:
            return read_picture(manifest, row)
        if self.last is None or self.last[0] != name:
            self.last = name, read_picture(manifest, replace(row, sample_id=name))
        return cut_region(self.last[1], int(number), self.side)


class Pixels:
    """Preprocessed pictures by number, the first that fit into `budget_mb` kept in memory, all others read again."""

    def __init__(
        self, manifest: Manifest, preprocess: Callable[..., Tensor], side: int, *, budget_mb: int, workers: int = 0
    ) -> None:
        self.manifest, self.preprocess, self.side = manifest, preprocess, side
        self.left = budget_mb << 20
        self.kept: dict[int, Tensor] = {}
        self.pool = ThreadPoolExecutor(workers) if workers else None

    def __call__(self, index: Tensor) -> Tensor:
        """(B, R, 3, H, W) of the pictures with these numbers. Raises DataError for one that cannot be read."""
        numbers = index.tolist()
        missing = [number for number in dict.fromkeys(numbers) if number not in self.kept]
        read = list(self.pool.map(self._read, missing) if self.pool else map(self._read, missing))
        found = dict(zip(missing, read, strict=True))
        for number, pixels in found.items():
            size = pixels.numel() * pixels.element_size()
            if size <= self.left:
                self.kept[number] = pixels
                self.left -= size
        return torch.stack([found[n] if n in found else self.kept[n] for n in numbers])

    def _read(self, number: int) -> Tensor:
        picture: Any = read_picture(self.manifest, self.manifest.rows[number])
        parts = [cut_region(picture, region, self.side) for region in range(count_regions(self.side))]
        return torch.stack([self.preprocess(part) for part in parts])


def read_grey(manifest: Manifest, size_px: int) -> Tensor:
    """(N, 1, S, S) grey pictures, uint8."""
    arrays = [np.asarray(read_picture(manifest, row).convert("L").resize((size_px, size_px))) for row in manifest.rows]
    return torch.from_numpy(np.stack(arrays))[:, None]
