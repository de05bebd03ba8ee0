"""Pictures to labels with probabilities, and a flag where they should not be believed.

Reads sources or pictures, in any number; yields one `Classified` for each picture, in their order. Groups of them go
through reading, preprocessing and the image tower in one thread a core, each tower call on one core: on 2 cores that
is faster than calls that share both, because cores never wait for each other. Probabilities are softmax(s z / T) over
the cosines z of the labels, or sigmoid for labels that hold side by side; s is the model's, T its calibration's.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from biomedclip.app.encoder import Encoder
from biomedclip.app.pictures import Picture, Source
from biomedclip.app.questions import Question
from biomedclip.evaluation.metrics import softmax
from biomedclip.evaluation.tasks import Ensemble
from biomedclip.evaluation.zero_shot import score_classes, score_labels
from biomedclip.progress import Advance, Progress, silent

if TYPE_CHECKING:
    import torch

Flag = Literal["", "uncertain", "out of scope"]

BATCH = 16
"""Pictures of one call of the tower, and files of one group: small, so that the bar moves and memory is bounded."""
MARGIN = 0.2
"""Without a calibration: two best labels closer than this are uncertain; of several labels, one within half of it of
0.5."""
_MAX_THREADS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Classified:
    """What was found for one picture; `refused` says why nothing was."""

    name: str
    frame: int | None = None
    probabilities: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """(C,) in the order of the labels; they add up to 1 unless labels hold side by side."""
    flag: Flag = ""
    reason: str = ""
    """Why it is flagged."""
    note: str = ""
    """What was decided while it was read."""
    refused: str = ""

    def best(self, count: int) -> list[int]:
        """Numbers of the likeliest labels, the best first; of equal ones the first in order."""
        return [int(i) for i in np.argsort(-self.probabilities, kind="stable")[:count]]


class Classifier:
    """A model and a question, with the prompts embedded once.

    `model` is an Encoder, or a name that makes one. Raises CheckpointError as `load` does, and ConfigError for labels
    that the model cannot tell apart.
    """

    def __init__(
        self, model: Encoder | str | Path, classes: Question | Mapping[str, Sequence[str]], *,
        ensemble: Ensemble | None = None, fast: bool = False,
    ) -> None:  # fmt: skip
        self.encoder = model if isinstance(model, Encoder) else Encoder(model, fast=fast, lite=True)
        question = classes if isinstance(classes, Question) else Question(
            prompts=classes, ensemble=ensemble or Ensemble()
        )  # fmt: skip
        question.check(self.encoder.tokenizer)
        self.question = question
        self.calibration = self.encoder.calibration
        self._positive = self._embed(question.prompts)
        self._negative = self._embed(question.negatives) if question.negatives else None

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the probabilities."""
        return self.question.labels

    def describe(self) -> str:
        """One sentence on how probabilities and flags of this classifier come about."""
        if self.calibration is not None:
            return (f"{self.encoder.name} is calibrated: temperature {self.calibration.temperature:.3g}; uncertain is a"
                    f" best label below {self.calibration.uncertain_below:.2f}.")  # fmt: skip
        rule = (f"a label within {MARGIN / 2:g} of even" if self._negative is not None
                else f"two best labels within {MARGIN:g} of each other")  # fmt: skip
        return (f"{self.encoder.name} is not calibrated: its probabilities may be too sure; uncertain is {rule}, and"
                " nothing says what is out of its scope.")  # fmt: skip

    def classify(
        self, items: Iterable[Source | Picture], *, total: int | None = None, progress: Progress = silent
    ) -> Iterator[Classified]:
        """What each picture shows, in order; what could not be read is among them, with the reason.

        `total` is how many items there are, for the bar. Raises DataError where an embedding is not finite.
        """
        with progress("classifying", total) as advance:
            yield from self._in_threads(iter(items), advance)

    def score(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """(N, C) probabilities of unit embeddings (N, D)."""
        scale = self.encoder.logit_scale / (self.calibration.temperature if self.calibration else 1.0)
        if self._negative is None:
            cosines = score_classes(vectors, self._positive, self.question.ensemble, self.encoder.logit_scale)
            return softmax(scale * cosines.astype(np.float64))
        margins = score_labels(vectors, self._positive, self._negative).astype(np.float64)
        return np.asarray(1 / (1 + np.exp(np.clip(-scale * margins, -700, 700))))

    def _embed(self, prompts: Mapping[str, Sequence[str]]) -> list[NDArray[np.float32]]:
        flat = [sentence for sentences in prompts.values() for sentence in sentences]
        ends = np.cumsum([len(sentences) for sentences in prompts.values()])[:-1]
        return np.split(self.encoder.embed_texts(flat), ends)

    def _in_threads(self, items: Iterator[Source | Picture], advance: Advance) -> Iterator[Classified]:
        import torch

        first = list(islice(items, BATCH + 1))
        if len(first) <= BATCH:
            yield from self._work(first)
            return advance(len(first))
        threads, before = min(_count_cores(), _MAX_THREADS), torch.get_num_threads()
        waiting: deque[tuple[int, Future[list[Classified]]]] = deque()
        groups = _group(first, items)
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                for group in groups:
                    waiting.append((len(group), pool.submit(self._work, group)))
                    if len(waiting) > 2 * threads:
                        yield from _take(waiting, advance)
                while waiting:
                    yield from _take(waiting, advance)
        finally:
            torch.set_num_threads(before)

    def _work(self, group: Sequence[Source | Picture]) -> list[Classified]:
        """A group through reading, preprocessing and the tower, by batches: a file may hold many pictures."""
        read = (self._prepare(picture) for item in group for picture in item.read(self.encoder.at_least_px))
        rows: list[Classified] = []
        while batch := list(islice(read, BATCH)):
            rows += self._judge(batch)
        return rows

    def _prepare(self, picture: Picture) -> tuple[Picture, torch.Tensor | None]:
        """The picture's facts without its pixels, and what the tower takes."""
        tensor = None if picture.image is None else self.encoder.prepare(picture.image)
        return replace(picture, image=None), tensor

    def _judge(self, batch: Sequence[tuple[Picture, torch.Tensor | None]]) -> Iterator[Classified]:
        """One row for each picture of a batch, read or not."""
        tensors = [tensor for _, tensor in batch if tensor is not None]
        shown: Iterator[tuple[NDArray[np.float64], Flag, str]] = iter(())
        if tensors:
            vectors = self.encoder.encode(tensors, [p.name for p, tensor in batch if tensor is not None])
            probabilities = self.score(vectors)
            shown = zip(probabilities, *self._flag(vectors, probabilities), strict=True)
        for picture, tensor in batch:
            if tensor is None:
                yield Classified(name=picture.name, frame=picture.frame, refused=picture.refused)
                continue
            row, flag, reason = next(shown)
            yield Classified(name=picture.name, frame=picture.frame, probabilities=row, flag=flag, reason=reason,
                             note=picture.note)  # fmt: skip

    def _flag(
        self, vectors: NDArray[np.float32], probabilities: NDArray[np.float64]
    ) -> tuple[list[Flag], list[str]]:  # fmt: skip
        """Flag and reason of each picture; out of scope comes before uncertain, because it says more."""
        known = self.calibration is not None and self.calibration.facts.scope is not None
        outside = self.calibration.outside(vectors) if known else np.zeros(len(vectors), bool)  # type: ignore[union-attr]
        flags: list[Flag] = []
        reasons = []
        for row, strange in zip(probabilities, outside, strict=True):
            reason = self._doubt(row)
            flags.append("out of scope" if strange else "uncertain" if reason else "")
            reasons.append("unlike the pictures that the model was trained on" if strange else reason)
        return flags, reasons

    def _doubt(self, row: NDArray[np.float64]) -> str:
        """Why the best label of a picture is uncertain; nothing where it is not."""
        if self._negative is not None:
            nearest = int(np.abs(row - 0.5).argmin())
            even = abs(row[nearest] - 0.5) < MARGIN / 2
            return f"{self.labels[nearest]} is about as likely as not" if even else ""
        second, best = np.sort(row)[-2:]
        if self.calibration is not None:
            floor = self.calibration.uncertain_below
            return f"{best:.2f} is below {floor:.2f}" if best < floor else ""
        return f"the two best labels are {best - second:.2f} apart" if best - second < MARGIN else ""


def _group(first: Sequence[Source | Picture], rest: Iterator[Source | Picture]) -> Iterator[list[Source | Picture]]:
    items = chain(first, rest)
    while group := list(islice(items, BATCH)):
        yield group


def _take(waiting: deque[tuple[int, Future[list[Classified]]]], advance: Advance) -> Iterator[Classified]:
    """The rows of the oldest group."""
    count, future = waiting.popleft()
    yield from future.result()
    advance(count)


def _count_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
