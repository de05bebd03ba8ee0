"""Sources to batches: `{"image": uint8 (B, 3, H, W), "text": int64 (B, L), ...}`, step by step of the plan.

Reads the indexes of the sources and, for each pick of the plan, the sample's bytes by position; yields
batches in plan order, whatever the number of workers. Its state is the number of batches delivered to the caller: a
worker may have read further, but what was not delivered is read again. A sample that cannot be read is counted by
reason and replaced by another one that the plan names, so a resumed run replaces it by the same one.

Normalisation is left to the device: a uint8 batch is a quarter of the bytes, and casting on the host is the slower
half of preprocessing.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info

from biomedclip.errors import ConfigError, DataError
from biomedclip.images import BadImage
from biomedclip.stream.decode import (
    Geometry,
    augment,
    decode_exact,
    find_preset,
    names_side,
    preset_for,
    read_reduced,
)
from biomedclip.stream.fetch import FetchConfig, Unreachable
from biomedclip.stream.plan import Pick, Plan
from biomedclip.stream.rows import StreamSource, read_rows
from biomedclip.stream.source import FetcherHere, RemoteShards, Shards, open_shards
from biomedclip.stream.text import Tokenise, choose_caption

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
        self.max_labels = max((len(labels) for rows in self.rows for labels in rows.labels), default=0)
        self._cache_bytes = cache_bytes
        self._cache: dict[tuple[int, int], Image.Image] = {}
        self._shards: list[Shards] = [open_shards(rows.place, rows.columns, self._fetcher) for rows in self.rows]
        self._is_remote = any(isinstance(shards, RemoteShards) for shards in self._shards)
        self._prepared: set[int] = set()
        self.views: Mapping[str, int] = {}
        """Source -> number of different augmentations of each sample, where a teacher's embeddings were stored for so
        many; every epoch of other sources draws anew."""
        self.max_steps: int | None = None
        """Batches from here on are not asked for, so not read ahead either."""

    def __getitem__(self, step: int) -> dict[str, Any]:
        picks = self._picks(step)
        self._read_ahead(step)
        images, captions, final, bad = [], [], [], []
        for wanted in picks:
            pick, image, caption, reasons = self._read(wanted)
            images.append(image)
            captions.append(caption)
            final.append(pick)
            bad += reasons
        self._release(step, picks)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return {
            "image": pixels,
            "text": self.tokenise(captions),
            "labels": self._labels(final),
            "article": torch.tensor([self.rows[p.source].articles[p.row] for p in final], dtype=torch.int64),
            "key": [self.rows[p.source].columns["key"][p.row] for p in final],
            "source": [self.rows[p.source].source.name for p in final],
            "epoch": torch.tensor([p.epoch for p in final], dtype=torch.int64),
            "bad": bad,
            "notice": self._fetcher.notice,
        }

    def read(self, pick: Pick) -> tuple[np.ndarray, str]:
        """Training pixels (H, W, 3) uint8 and caption of one sample. Raises DataError where it cannot be read."""
        rows = self.rows[pick.source]
        key, where = rows.columns["key"][pick.row], f"{rows.place.where}: {rows.columns['key'][pick.row]}"
        views = self.views.get(rows.source.name)
        epoch = pick.epoch % views if views else pick.epoch
        caption = choose_caption(self._captions(pick), self.seed, key, epoch)
        image = self._cache.get((pick.source, pick.row))
        if image is None:
            data = self._bytes(pick, "image")
            promised = rows.columns["image_crc32"][pick.row]
            if promised is not None and zlib.crc32(data) != promised:
                raise DataError(where, "has other bytes than its index says", todo="rebuild the dataset")
            image = read_reduced(data, rows.columns["image_format"][pick.row], self.geometry.size_px, where)
            self._remember(pick, image)
        preset = rows.source.augmentation
        change = find_preset(preset_for(rows.columns["modality"][pick.row]) if preset == "auto" else preset)
        facts = (self.seed, rows.source.name, key, epoch)
        return augment(image, self.geometry, change, facts=facts, may_mirror=not names_side(caption)), caption

    def read_exact(self, source: int, row: int) -> tuple[np.ndarray, str]:
        """Evaluation pixels (H, W, 3) uint8 and first caption of one sample."""
        pick, rows = Pick(source, row, 0), self.rows[source]
        pixels = decode_exact(self._bytes(pick, "image"), self.geometry, rows.columns["key"][row])
        return pixels, self._captions(pick)[0]

    def read_caption(self, source: int, row: int) -> str:
        """First caption of one sample. Raises DataError where it cannot be read."""
        return self._captions(Pick(source, row, 0))[0]

    def _read(self, wanted: Pick) -> tuple[Pick, np.ndarray, str, list[tuple[str, str, str]]]:
        """The picked sample or the first readable substitute, and (source, key, reason) of each one that failed."""
        pick, bad = wanted, []
        for attempt in range(MAX_ATTEMPTS):
            try:
                image, caption = self.read(pick)
            except Unreachable:
                raise  # passing over samples because a host is away would make two runs of one plan differ
            except (DataError, BadImage) as error:
                rows = self.rows[pick.source]
                bad.append((rows.source.name, rows.columns["key"][pick.row], str(error)))
                pick = self.plan.substitute(wanted, attempt)
            else:
                return pick, image, caption, bad
        raise DataError(
            self.rows[wanted.source].place.where, f"{MAX_ATTEMPTS} samples in a row cannot be read", found=bad[-1][2],
            todo="run: biomedclip build on it again, or check the disk",
        )  # fmt: skip

    def _captions(self, pick: Pick) -> list[str]:
        columns = self.rows[pick.source].columns
        try:
            if columns["num_captions"][pick.row] > 1:
                import json

                return list(json.loads(self._bytes(pick, "json"))["captions"])
            return [self._bytes(pick, "text").decode()]
        except (ValueError, LookupError, TypeError) as error:
            where = f"{self.rows[pick.source].place.where}: {columns['key'][pick.row]}"
            raise DataError(where, "has no readable caption", found=str(error)[:80]) from None

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

    def _remember(self, pick: Pick, image: Image.Image) -> None:
        size = image.width * image.height * 3
        if size <= self._cache_bytes:
            self._cache_bytes -= size
            self._cache[pick.source, pick.row] = image

    def _labels(self, picks: Sequence[Pick]) -> torch.Tensor:
        """(B, K) label ids of the mixture, -1 where a sample has fewer than K."""
        table = torch.full((len(picks), self.max_labels), -1, dtype=torch.int64)
        for place, pick in enumerate(picks):
            labels = self.rows[pick.source].labels[pick.row]
            table[place, : len(labels)] = torch.tensor(labels, dtype=torch.int64)
        return table

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


class StreamLoader:
    """Batches `start`, `start` + 1, ... of a run of `max_steps`; sized, and resumable by its state.

    Iterating continues where the state is, so `for batch in loader` after `load_state_dict` gives exactly the batches
    an uninterrupted run would have given next.
    """

    def __init__(self, samples: Samples, *, max_steps: int, workers: int = 0) -> None:
        self.samples, self.max_steps, self.workers = samples, max_steps, workers
        samples.max_steps = max_steps
        self.delivered = 0
        self.bad: Counter[str] = Counter()
        """Unreadable samples by source, each time one was met."""
        self.last_bad: str | None = None
        self.notices: list[str] = []
        """What somebody should know once: samples that cannot be used, a cache that is off."""
        self.on_notice: Callable[[str], None] | None = None
        for place in {rows.source.name: rows.place for rows in samples.rows}.values():
            self._note(place.notice)

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        steps = range(self.delivered, self.max_steps)
        loader: DataLoader[dict[str, Any]] = DataLoader(
            self.samples, batch_size=None, sampler=list(steps), num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
        )  # fmt: skip
        for batch in loader:
            self._note(batch.pop("notice"))
            self._count(batch.pop("bad"), len(batch["key"]))
            # Counted before it is handed over: a state taken while the caller works on it includes it.
            self.delivered += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Batches delivered, the identity of the plan they came from, and the unreadable samples so far."""
        return {"delivered": self.delivered, "plan_sha256": self.plan_sha256, "bad": dict(self.bad)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the state's batches. Raises ConfigError where the state is of another plan."""
        if state["plan_sha256"] != self.plan_sha256:
            raise ConfigError(
                "data",
                "is not what the interrupted run read: sources, their tombstones, weights, batch size or seed differ",
                todo="restore the old values or start a new run folder",
            )  # fmt: skip
        self.delivered, self.bad = int(state["delivered"]), Counter(state["bad"])

    @cached_property
    def plan_sha256(self) -> str:
        return self.samples.plan.sha256

    def _note(self, notice: str | None) -> None:
        if notice and notice not in self.notices:
            self.notices.append(notice)
            if self.on_notice:
                self.on_notice(notice)

    def _count(self, bad: Sequence[tuple[str, str, str]], size: int) -> None:
        for source, _, reason in bad:
            self.bad[source] += 1
            self.last_bad = reason
        seen = (self.delivered + 1) * size
        if bad and self.bad.total() > max(self.samples.max_bad * seen, MAX_ATTEMPTS):
            raise DataError(
                "data", f"{self.bad.total()} of {seen} samples cannot be read, more than {self.samples.max_bad:.0%}",
                found=self.last_bad, todo="rebuild the dataset or check the disk",
            )  # fmt: skip


def _by_source(picks: Sequence[Pick]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for pick in picks:
        rows.setdefault(pick.source, []).append(pick.row)
    return rows
