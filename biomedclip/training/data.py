"""The training mixture and its validation pairs as a LightningDataModule.

Reads the dataset folders that a config names and yields the loaders of `biomedclip.stream`. The training loader is
one long epoch of `max_steps` batches, sized, because Lightning resumes a loader without a length one batch late.
Validation reads exact pixels and first captions (`pair_validation`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from biomedclip.stream.decode import Geometry
from biomedclip.stream.loader import Samples, StreamLoader, StreamSource
from biomedclip.stream.text import Tokenise
from biomedclip.stream.unindexed import UnindexedSamples
from biomedclip.training.config import TrainConfig
from biomedclip.training.pair_validation import ValidationBatches
from biomedclip.training.plans import stream_sources, unindexed_sources


class StreamData(LightningDataModule):
    """Batches for one run: `train_loader` is the loader whose state the checkpoints hold."""

    def __init__(self, config: TrainConfig, geometry: Geometry, tokenise: Tokenise) -> None:
        super().__init__()
        self.config, self.geometry, self.tokenise = config, geometry, tokenise
        samples = Samples(
            stream_sources(config.data), batch_size=config.data.planned(config.batch_size), seed=config.seed,
            geometry=geometry, tokenise=tokenise, max_bad=config.data.max_bad,
            cache_bytes=config.data.cache_mb * 1_000_000,
            size_exponent=config.data.size_exponent, fetch=config.data.fetch,
        )  # fmt: skip
        samples.second_captions = config.loss.second_captions
        pinned = config.device != "cpu" and torch.cuda.is_available()
        self.train_loader = StreamLoader(
            samples, max_steps=config.max_steps, workers=config.data.workers, pin_memory=pinned,
            unindexed=self._unindexed(),
        )  # fmt: skip
        self.run_folder: Path | None = None
        """Where unreadable samples are noted; None: nowhere."""

    def setup(self, stage: str) -> None:
        """Take this process's slots of every batch."""
        if self.trainer is not None:
            samples = self.train_loader.samples
            samples.rank, samples.world_size = self.trainer.global_rank, self.trainer.world_size
            if unindexed := self.train_loader.unindexed:
                unindexed.rank, unindexed.world_size = samples.rank, samples.world_size
        if self.run_folder is not None:
            self.train_loader.keep_ledger(self.run_folder)

    def _unindexed(self) -> UnindexedSamples | None:
        config = self.config
        count = config.batch_size - config.data.planned(config.batch_size)
        return UnindexedSamples(
            unindexed_sources(config.data), count=count, seed=config.seed, geometry=self.geometry,
            tokenise=self.tokenise, world_size=config.devices * config.num_nodes,
        ) if count else None  # fmt: skip

    def train_dataloader(self) -> StreamLoader:
        """The training batches, from the step the loader's state says."""
        return self.train_loader

    def val_dataloader(self) -> ValidationBatches | list[Any]:
        """Exact batches of the sources' validation splits; none where validation is off or no source has one."""
        if not self.config.validation.every_steps:
            return []
        splits = self.train_loader.samples.splits
        sources = [
            StreamSource(name=source.name, path=source.path, split="val")
            for source in self.config.data.sources
            if splits.get(source.name, {}).get("val")
        ]
        if not sources:
            return []
        samples = Samples(
            sources, batch_size=1, seed=self.config.seed, geometry=self.geometry, tokenise=self.tokenise, cache_bytes=0,
            fetch=self.config.data.fetch,
        )  # fmt: skip
        train = self.train_loader.samples
        return ValidationBatches(
            samples, self.config.batch_size, self.config.validation.max_samples, rank=train.rank,
            world_size=train.world_size,
        )  # fmt: skip

    def teardown(self, stage: str) -> None:
        """Close the shards this process opened."""
        self.train_loader.samples.close()
