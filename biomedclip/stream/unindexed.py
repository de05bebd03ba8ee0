"""Sources that nothing can seek in: `pipe:` commands, standard input, `sftp://` and other schemes of webdataset.

Takes the addresses of tars that can only be read from their beginning, gives the part of every batch that they make up,
read by `webdataset` and then decoded, augmented and tokenised like all other samples. What the plan promises is not
promised here: nobody knows how many samples there are, a batch may hold two figures of one article, and a resumed run
reads the tars anew, in another order. The log and the dry run say so. A `pipe:` is a command for the shell, so it runs
only where the config allows it, and never under `WDS_SECURE=1`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from biomedclip.errors import ConfigError, DataError
from biomedclip.files import sha256_json
from biomedclip.images import BadImage
from biomedclip.stream.augment import augment
from biomedclip.stream.decode import Geometry, read_reduced
from biomedclip.stream.faults import BrokenImage, NoCaption
from biomedclip.stream.index import CAPTIONS, IMAGES
from biomedclip.stream.ledger import Unreadable
from biomedclip.stream.mixture import deal_slots
from biomedclip.stream.pipes import UnindexedSource
from biomedclip.stream.plan import draw_int
from biomedclip.stream.presets import augmentation_for
from biomedclip.stream.text import Tokenise

SHUFFLED = 1_000
"""Samples in memory from which a reading process draws the next one."""

MAX_BAD_RUN = 200
"""Samples in a row that may be unusable before the run stops."""


class UnindexedSamples(IterableDataset[dict[str, Any]]):
    """The parts of batches that unindexed sources make up: `count` samples of each step, over all processes."""

    def __init__(
        self,
        sources: Sequence[UnindexedSource],
        *,
        count: int,
        seed: int,
        geometry: Geometry,
        tokenise: Tokenise,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for source in sources:
            if any(address.startswith("pipe:") for address in source.addresses) and not source.allow_pipe:
                raise ConfigError(f"data.sources: {source.name}", "is a command for the shell",
                                  found=source.addresses[0], todo="set allow_pipe: true if you wrote it, or name "
                                  "https:// or s3:// addresses, which are indexed and resumed exactly")  # fmt: skip
            if "-" in source.addresses and world_size > 1:
                raise ConfigError(f"data.sources: {source.name}", "standard input belongs to one process",
                                  found=f"{world_size} processes", todo="use files or pipe: commands")  # fmt: skip
        if count < 1:
            raise ConfigError("data.sources", "unindexed sources have no place in a batch", found=f"{count} samples",
                              todo="raise their weight or batch_size")  # fmt: skip
        self.sources, self.count, self.seed = tuple(sources), count, seed
        self.geometry, self.tokenise = geometry, tokenise
        self.rank, self.world_size = rank, world_size
        self.first_step, self.max_steps = 0, 0
        """Steps that iterating yields, set by the loader."""
        if count % world_size:
            raise ConfigError("data.sources", "unindexed sources do not share a batch evenly between processes",
                              found=f"{count} for {world_size}", todo="change batch_size or weights")  # fmt: skip
        self._pattern = deal_slots([source.weight for source in sources])
        self._bad: list[Unreadable] = []
        self._step = 0

    @property
    def sha256(self) -> str:
        """Identity of what is read, for the loader's state."""
        return sha256_json([[s.name, list(s.addresses), s.weight, str(s.augmentation)] for s in self.sources])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker and any("-" in source.addresses for source in self.sources):
            raise ConfigError(
                "data.workers", "a reading process has no standard input", found=workers, todo="set it to 0"
            )
        reader, readers = self.rank * workers + number, self.world_size * workers
        streams = [self._stream(source, reader, readers) for source in self.sources]
        for step in range(self.first_step + number, self.max_steps, workers):
            self._step, self._bad = step, []
            first = step * self.count
            own = range(first + self.rank, first + self.count, self.world_size)
            slots = [int(self._pattern[slot % len(self._pattern)]) for slot in own]
            yield self._batch([(self.sources[source], *next(streams[source])) for source in slots])

    def _batch(self, found: Sequence[tuple[UnindexedSource, str, int, np.ndarray, str]]) -> dict[str, Any]:
        pixels = np.stack([image.transpose(2, 0, 1) for _, _, _, image, _ in found])
        return {
            "image": torch.from_numpy(pixels),
            "text": self.tokenise([caption for _, _, _, _, caption in found]),
            "article": torch.full((len(found),), -1, dtype=torch.int64),
            "key": [key for _, key, _, _, _ in found],
            "source": [source.name for source, _, _, _, _ in found],
            "epoch": torch.tensor([turn for _, _, turn, _, _ in found], dtype=torch.int64),
            "bad": self._bad,
            "notice": None,
        }

    def _stream(self, source: UnindexedSource, reader: int, readers: int) -> Iterator[tuple[str, int, np.ndarray, str]]:
        """Key, pass over the tars, pixels and caption of this reader's samples, without end."""
        in_a_row = 0
        for turn, sample in self._shuffled(source, reader, readers):
            key = str(sample.get("__key__", ""))
            try:
                image, caption = self._read(source, key, turn, sample)
            except (DataError, BadImage) as error:
                self._note(source, key, getattr(error, "reason", BrokenImage.reason), str(error))
                in_a_row += 1
                if in_a_row >= MAX_BAD_RUN:
                    raise DataError(source.name, f"{in_a_row} samples in a row cannot be used", found=str(error),
                                    todo="check what its tars hold") from None  # fmt: skip
                continue
            in_a_row = 0
            yield key, turn, image, caption

    def _read(self, source: UnindexedSource, key: str, turn: int, sample: dict[str, Any]) -> tuple[np.ndarray, str]:
        where = f"{source.name}: {key}"
        image = next((sample[suffix] for suffix in IMAGES if suffix in sample), None)
        text = next((sample[suffix] for suffix in CAPTIONS if suffix in sample), None)
        if image is None:
            raise BrokenImage(where, "has no picture", found=", ".join(k for k in sample if not k.startswith("__")))
        try:
            caption = (text or b"").decode().strip()
        except UnicodeDecodeError as error:
            raise NoCaption(where, "has no readable caption", found=str(error)[:80]) from None
        if not caption:
            raise NoCaption(where, "has no caption")
        change = augmentation_for(source.augmentation, None)
        picture = read_reduced(image, "jpg" if image[:3] == b"\xff\xd8\xff" else "", self.geometry, change, where)
        return augment(
            picture, self.geometry, change, facts=(self.seed, source.name, key, turn), caption=caption
        ), caption

    def _shuffled(self, source: UnindexedSource, reader: int, readers: int) -> Iterator[tuple[int, dict[str, Any]]]:
        from webdataset.filters import shuffle

        draws = random.Random(draw_int(self.seed, source.name, self.first_step, reader))  # noqa: S311
        mixed = shuffle(SHUFFLED, initial=SHUFFLED // 10, rng=draws)
        yield from mixed(self._in_order(source, reader, readers))

    def _in_order(self, source: UnindexedSource, reader: int, readers: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(pass, sample) of the tars that fall to this reader, over and over; of few tars, every n-th sample."""
        from webdataset.tariterators import tarfile_samples

        def skip(error: Exception) -> bool:
            self._note(source, "", "tar_unreadable", f"{source.name}: {error}")
            return True

        for turn in itertools.count():
            order = list(source.addresses)
            random.Random(draw_int(self.seed, source.name, self.first_step, turn)).shuffle(order)  # noqa: S311
            shared = len(order) < readers
            mine = order if shared else order[reader::readers]
            found = 0
            for sample in tarfile_samples(({"url": address} for address in mine), handler=skip):
                if not shared or found % readers == reader:
                    yield turn, sample
                found += 1
            if not found:
                raise DataError(
                    source.name, "gives no samples", found=self._bad[-1].detail if self._bad else "nothing",
                    todo="run its command by itself, or look whether its tars are there",
                )  # fmt: skip

    def _note(self, source: UnindexedSource, key: str, reason: str, detail: str) -> None:
        self._bad.append(Unreadable(self._step, -1, source.name, key, reason, detail[:500], -1, -1, ""))


def join_batches(planned: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """One batch of the samples of both; those that are not planned have no labels."""
    joined: dict[str, Any] = {"bad": [*planned["bad"], *other["bad"]], "notice": planned["notice"] or other["notice"]}
    for name, value in planned.items():
        if name in joined:
            continue
        if name == "labels":
            joined[name] = torch.cat([value, value.new_full((len(other["key"]), value.shape[1]), -1)])
        elif isinstance(value, torch.Tensor):
            joined[name] = torch.cat([value, other[name]])
        else:
            joined[name] = [*value, *other[name]]
    return joined
