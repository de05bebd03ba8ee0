"""The samples of a step as one batch: `{"image": uint8 (B, 3, H, W), "text": int64 (B, L), ...}`.

Reads, for each pick of the plan, the sample's bytes by position; yields the batch of any step, which depends on the
step alone, not on who reads it or what was read before. A sample that cannot be read is replaced by another one that
the plan names, so every run replaces it by the same one, and is noted with its reason in the batch.

The batch is filled sample by sample where the training process will find it: in a reading process its memory is shared
from the start, so nothing is copied on the way. Normalisation is left to the device: a uint8 batch is a quarter of the
bytes, and casting on the host is the slower half of preprocessing.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from biomedclip.errors import ConfigError, DataError
from biomedclip.images import BadImage
from biomedclip.stream.augment import augment
from biomedclip.stream.captions import choose_caption, find_texts, first_sentence, sample_caption
from biomedclip.stream.decode import Geometry, decode_exact, read_reduced
from biomedclip.stream.faults import BrokenImage, NoCaption, WrongBytes
from biomedclip.stream.fetch import FetchConfig, Unreachable
from biomedclip.stream.ledger import Unreadable
from biomedclip.stream.plan import Pick, Plan
from biomedclip.stream.presets import augmentation_for
from biomedclip.stream.rows import Rows, StreamSource, read_rows
from biomedclip.stream.source import open_shards
from biomedclip.stream.tars import FetcherHere, RemoteShards, Shards
from biomedclip.stream.text import Tokenise

MAX_ATTEMPTS = 8
"""Substitutes tried for one unreadable sample before the run stops."""


class Samples(Dataset[dict[str, Any]]):
    """Batches of a plan by step. `read` is what a worker runs; it depends on the step alone."""

    def __init__(
        self,
        sources: Sequence[StreamSource],
        *,
        batch_size: int,
        seed: int,
        geometry: Geometry,
        tokenise: Tokenise,
        rank: int = 0,
        world_size: int = 1,
        max_bad: float = 0.05,
        cache_bytes: int = 256_000_000,
        size_exponent: float = 0.0,
        fetch: FetchConfig | None = None,
    ) -> None:
        if batch_size % world_size:
            raise ConfigError("batch_size", "is not a multiple of the number of processes",
                              found=f"{batch_size} for {world_size}")  # fmt: skip
        self._fetcher = FetcherHere(fetch or FetchConfig())
        try:
            self.rows, plan_sources, self.label_names = read_rows(sources, size_exponent, self._fetcher)
        finally:
            self._fetcher.close()  # nothing that a fork would share
        self.plan = Plan(plan_sources, batch_size=batch_size, seed=seed)
        self.seed, self.geometry, self.tokenise = seed, geometry, tokenise
        self.rank, self.world_size, self.max_bad = rank, world_size, max_bad
        self.max_labels = max((rows.most_labels for rows in self.rows), default=0)
        self._cache_bytes = cache_bytes
        self._cache: dict[tuple[int, int], np.ndarray] = {}
        self._shards: list[Shards] = [self._open(rows) for rows in self.rows]
        self._is_remote = any(isinstance(shards, RemoteShards) for shards in self._shards)
        self._prepared: set[int] = set()
        self.views: Mapping[str, int] = {}
        """Source -> number of different augmentations of each sample, where a teacher's embeddings were stored for so
        many; every epoch of other sources draws anew."""
        self.passed_over: Mapping[tuple[int, int], tuple[str, str]] = {}
        """(source, row) -> reason and detail of samples that are not tried, because the run could not read them."""
        self.second_captions: Literal["other", "first_sentence"] | None = None
        """Which `second_text` a batch holds too: another of each sample's captions (its own where it has one only), or
        the first sentence of the caption itself."""
        self.max_steps: int | None = None
        """Batches from here on are not asked for, so not read ahead either."""

    def warm(self, step: int) -> None:
        """Read now what reading from `step` on needs, so that each reading process is forked with it."""
        for pick in self._picks(step):
            rows = self.rows[pick.source]
            augmentation_for(rows.source.augmentation, rows.columns["modality"][pick.row])

    def _open(self, rows: Rows) -> Shards:
        mix = rows.source.captions
        members = ("image", "text", "json") if mix is not None and mix.needs_sidecar else ("image", "text")
        return open_shards(rows.place, rows.columns, self._fetcher, members)

    def __getitem__(self, step: int) -> dict[str, Any]:
        picks = self._picks(step)
        self._read_ahead(step)
        size = self.geometry.size_px
        pixels = _empty_pixels(len(picks), size)
        planes = pixels.numpy()
        captions: list[str] = []
        others: list[str] = []
        final: list[Pick] = []
        bad: list[Unreadable] = []
        for place, wanted in enumerate(picks):
            pick, image, caption = self._read(step, place, wanted, bad)
            cv2.split(image, list(planes[place]))  # into the batch itself, five times faster than numpy's transposition
            captions.append(caption)
            if self.second_captions:
                others.append(self._second_caption(pick, caption))
            final.append(pick)
        self._release(step, picks)
        second = {"second_text": self.tokenise(others)} if self.second_captions else {}
        return {
            **second,
            "image": pixels,
            "text": self.tokenise(captions),
            "labels": self._labels(final),
            "article": torch.tensor([self.rows[p.source].articles[p.row] for p in final], dtype=torch.int64),
            "key": [self._key(pick) for pick in final],
            "source": [self.rows[p.source].source.name for p in final],
            "epoch": torch.tensor([p.epoch for p in final], dtype=torch.int64),
            "bad": bad,
            "notice": self._fetcher.notice,
        }

    def read(self, pick: Pick) -> tuple[np.ndarray, str]:
        """Training pixels (H, W, 3) uint8 and caption of one sample. Raises DataError where it cannot be read."""
        rows, key = self.rows[pick.source], self._key(pick)
        where = f"{rows.place.where}: {key}"
        views = self.views.get(rows.source.name)
        epoch = pick.epoch % views if views else pick.epoch
        caption = self._training_caption(pick, key, epoch)
        change = augmentation_for(rows.source.augmentation, rows.columns["modality"][pick.row])
        image = self._cache.get((pick.source, pick.row))
        if image is None:
            data = self._bytes(pick, "image")
            promised = rows.columns["image_crc32"][pick.row]
            if promised is not None and zlib.crc32(data) != promised:
                raise WrongBytes(where, "has other bytes than its index says", todo="rebuild the dataset")
            image = read_reduced(data, rows.columns["image_format"][pick.row], self.geometry, change, where)
            self._remember(pick, image)
        facts = (self.seed, rows.source.name, key, epoch)
        return augment(image, self.geometry, change, facts=facts, caption=caption), caption

    def read_exact(self, source: int, row: int) -> tuple[np.ndarray, str]:
        """Evaluation pixels (H, W, 3) uint8 and first caption of one sample."""
        pick, rows = Pick(source, row, 0), self.rows[source]
        pixels = decode_exact(self._bytes(pick, "image"), self.geometry, rows.columns["key"][row])
        return pixels, self._captions(pick)[0]

    def read_caption(self, source: int, row: int) -> str:
        """First caption of one sample. Raises DataError where it cannot be read."""
        return self._captions(Pick(source, row, 0))[0]

    def _read(self, step: int, place: int, wanted: Pick, bad: list[Unreadable]) -> tuple[Pick, np.ndarray, str]:
        """The picked sample or the first readable substitute; each one that failed is added to `bad`."""
        pick, failed = wanted, list[tuple[Pick, tuple[str, str]]]()
        for attempt in range(MAX_ATTEMPTS):
            fault = self.passed_over.get((pick.source, pick.row))
            if fault is None:
                try:
                    image, caption = self.read(pick)
                except Unreachable:
                    raise  # passing over samples because a host is away would make two runs of one plan differ
                except (DataError, BadImage) as error:
                    fault = (getattr(error, "reason", BrokenImage.reason), str(error))
                else:
                    slot, shown = self.rank + place * self.world_size, self._key(pick)
                    for missed, (reason, detail) in failed:
                        source = self.rows[missed.source].source.name
                        bad.append(Unreadable(step, slot, source, self._key(missed), reason, detail, missed.source,
                                              missed.row, shown))  # fmt: skip
                    return pick, image, caption
            failed.append((pick, fault))
            pick = self.plan.substitute(wanted, attempt)
        raise DataError(
            self.rows[wanted.source].place.where, f"{MAX_ATTEMPTS} samples in a row cannot be read",
            found=failed[-1][1][1], todo="run: biomedclip build on it again, or check the disk",
        )  # fmt: skip

    def _key(self, pick: Pick) -> str:
        return str(self.rows[pick.source].columns["key"][pick.row])

    def _training_caption(self, pick: Pick, key: str, epoch: int) -> str:
        mix = self.rows[pick.source].source.captions
        if mix is None:
            return choose_caption(self._captions(pick), self.seed, key, epoch)
        columns = self.rows[pick.source].columns
        has_sidecar = mix.needs_sidecar and columns["json_offset"][pick.row] is not None
        try:
            sidecar = json.loads(self._bytes(pick, "json")) if has_sidecar else {}
            texts = find_texts(self._bytes(pick, "text").decode(), sidecar if isinstance(sidecar, dict) else {})
        except ValueError as error:
            where = f"{self.rows[pick.source].place.where}: {key}"
            raise NoCaption(where, "has no readable caption", found=str(error)[:80]) from None
        return sample_caption(texts, mix, self.seed, key, epoch)

    def _second_caption(self, pick: Pick, first: str) -> str:
        if self.second_captions == "first_sentence":
            return first_sentence(first)
        others = [caption for caption in self._captions(pick) if caption != first]
        return choose_caption(others, self.seed, "second", self._key(pick), pick.epoch) if others else first

    def _captions(self, pick: Pick) -> list[str]:
        columns = self.rows[pick.source].columns
        try:
            if columns["num_captions"][pick.row] > 1:
                return list(json.loads(self._bytes(pick, "json"))["captions"])
            return [self._bytes(pick, "text").decode()]
        except (ValueError, LookupError, TypeError) as error:
            where = f"{self.rows[pick.source].place.where}: {columns['key'][pick.row]}"
            raise NoCaption(where, "has no readable caption", found=str(error)[:80]) from None

    def _bytes(self, pick: Pick, member: str) -> bytes:
        return self._shards[pick.source].read(pick.row, member)

    def _picks(self, step: int) -> tuple[Pick, ...]:
        return self.plan.batch(step)[self.rank :: self.world_size]

    def _read_ahead(self, step: int) -> None:
        """Begin to fetch this step and the next ones that this process will be asked for."""
        if not self._is_remote:
            return
        worker = get_worker_info()
        stride = worker.num_workers if worker else 1
        for later in range(step, step + (self._fetcher.config.ahead + 1) * stride, stride):
            if later in self._prepared or (later > step and self.max_steps is not None and later >= self.max_steps):
                continue
            self._prepared.add(later)
            self.prepare(self._picks(later))

    def prepare(self, picks: Sequence[Pick]) -> None:
        """Begin to fetch these samples, the near ones of a shard together."""
        for source, rows in _by_source(picks).items():
            self._shards[source].prepare(rows)

    def _release(self, step: int, picks: Sequence[Pick]) -> None:
        self._prepared.discard(step)
        for source, rows in _by_source(picks).items():
            self._shards[source].release(rows)

    def _remember(self, pick: Pick, image: np.ndarray) -> None:
        if image.nbytes <= self._cache_bytes:
            self._cache_bytes -= image.nbytes
            self._cache[pick.source, pick.row] = image

    def _labels(self, picks: Sequence[Pick]) -> torch.Tensor:
        """(B, K) label ids of the mixture, -1 where a sample has fewer than K."""
        table = np.full((len(picks), self.max_labels), -1, dtype=np.int64)
        for place, pick in enumerate(picks if self.max_labels else ()):
            labels = self.rows[pick.source].labels[pick.row]
            table[place, : len(labels)] = labels
        return torch.from_numpy(table)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_prepared": set()}

    def close(self) -> None:
        """Close the shards and connections this process opened; reading opens them again."""
        self._prepared.clear()
        for shards in self._shards:
            shards.close()
        self._fetcher.close()

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """Rows (LEDGER_COLUMNS) of the samples that foreign tars hold and that cannot be used, or tars cut off."""
        places = {rows.source.name: rows.place for rows in self.rows}.values()
        return [row for place in places if place.ledger is not None for row in place.ledger.to_pylist()]

    @property
    def splits(self) -> dict[str, Mapping[str, int]]:
        """Source -> split -> samples, of all splits that the source has."""
        return {rows.source.name: rows.place.splits or {} for rows in self.rows}


def _empty_pixels(count: int, size_px: int) -> torch.Tensor:
    """(B, 3, H, W) uint8, in shared memory within a reading process: what torch would do later, by a copy."""
    shape = torch.Size((count, 3, size_px, size_px))
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(shape.numel())
    strides = (3 * size_px * size_px, size_px * size_px, size_px, 1)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape, strides)


def _by_source(picks: Sequence[Pick]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for pick in picks:
        rows.setdefault(pick.source, []).append(pick.row)
    return rows
