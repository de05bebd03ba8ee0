"""Images and captions that a term reads beside the training batch: ZSCL's reference set, EWC's sample of the old.

Reads dataset folders through the stream's plan, so which images step t sees is a function of t alone: a resumed run
goes on with the images an uninterrupted one would have seen, and no state is kept for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from biomedclip.errors import ConfigError
from biomedclip.stream.loader import StreamLoader
from biomedclip.stream.rows import StreamSource
from biomedclip.stream.samples import Samples
from biomedclip.training.continual.config import EwcConfig, ReferenceConfig
from biomedclip.training.data import stream_sources
from biomedclip.training.gather import rank, world_size

if TYPE_CHECKING:
    from biomedclip.training.continual.terms import Surroundings


class ReferenceImages:
    """The images of a reference source, step by step, and captions spread over it."""

    def __init__(self, settings: ReferenceConfig, around: Surroundings) -> None:
        self.settings, self.around = settings, around
        source = StreamSource(name="reference", path=settings.path, split=settings.split)
        self._samples = _open(around, [source], settings.batch_size)
        self.texts = around.data.tokenise(_spread_captions(self._samples, settings.num_texts))
        """(M, L) token ids of up to `num_texts` different captions."""
        self._samples.close()
        self._batches: Iterator[dict[str, Any]] = iter(())
        self._next = -1

    def at(self, step: int) -> Tensor:
        """(b, 3, H, W) uint8 images of this process for a step."""
        if step != self._next:
            steps = range(step, self.around.config.max_steps)
            self._batches = _batches(self._samples, self.settings.batch_size, steps, self.around)
        self._next = step + 1
        images: Tensor = next(self._batches)["image"]
        return images


def fisher_batches(settings: EwcConfig, around: Surroundings, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(uint8 images, token ids) of the batches that EWC's Fisher information is estimated on."""
    sources = stream_sources(around.config.data)
    if settings.path is not None:
        sources = [StreamSource(name="ewc", path=settings.path)]
    size = around.config.batch_size
    samples = _open(around, sources, size)
    batches = _batches(samples, size, range(settings.batches), around)
    for batch in batches:
        yield batch["image"].to(device), batch["text"].to(device)
    samples.close()


def _open(around: Surroundings, sources: Sequence[StreamSource], batch_size: int) -> Samples:
    data, settings = around.data, around.config.data
    return Samples(
        sources, batch_size=batch_size, seed=around.config.seed, geometry=data.geometry, tokenise=data.tokenise,
        cache_bytes=settings.cache_mb * 1_000_000, fetch=settings.fetch,
    )  # fmt: skip


def _batches(samples: Samples, batch_size: int, steps: range, around: Surroundings) -> Iterator[dict[str, Any]]:
    # Ranks are known only once the processes have found each other, which is after the terms are built.
    samples.rank, samples.world_size = rank(), world_size()
    if batch_size % samples.world_size:
        raise ConfigError("continual", "a batch is not a multiple of the number of processes",
                          found=f"{batch_size} for {samples.world_size}")  # fmt: skip
    loader = StreamLoader(samples, max_steps=steps.stop, workers=around.config.data.workers)
    loader.delivered = steps.start
    return iter(loader)


def _spread_captions(samples: Samples, count: int) -> list[str]:
    places = [(source, row) for source, rows in enumerate(samples.rows) for row in range(len(rows))]
    chosen = np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int))
    return list(dict.fromkeys(samples.read_caption(*places[i]) for i in chosen.tolist()))
