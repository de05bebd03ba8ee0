"""The validation pairs of a run: which process reads which, and what their embeddings say together.

Reads the `val` split of the sources; yields batches of exact pixels and first captions, and the loss and recall@1 over
all of them. Several processes share the pairs: process r takes pairs r, r + W, r + 2W and so on, each pair is embedded
once, and its number travels with it, so that the numbers are those of one process. All must take as many batches, since
a strategy may exchange buffers with each; where pairs run out a process embeds its last one again, numbered -1, and it
is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from biomedclip.stream.plan import Pick
from biomedclip.stream.samples import Samples
from biomedclip.training.gather import gather_rows

PADDING = -1
_ROWS = 1024
"""Rows of the similarity matrix held at a time."""


class ValidationBatches:
    """This process's share of the first `max_samples` samples of a set of sources, decoded once."""

    def __init__(
        self, samples: Samples, batch_size: int, max_samples: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        places = [(number, row) for number, rows in enumerate(samples.rows) for row in range(len(rows))][:max_samples]
        self._places = [(number, *places[number]) for number in range(rank, len(places), world_size)]
        missing = -(-len(places) // world_size) - len(self._places)
        if missing:
            self._places += [(PADDING, *places[-1])] * missing
        self._samples, self._batch_size = samples, max(batch_size // world_size, 1)
        self._batches: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return -(-len(self._places) // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if not self._batches:
            for first in range(0, len(self._places), self._batch_size):
                self._batches.append(self._read(self._places[first : first + self._batch_size]))
            self._samples.close()
        return iter(self._batches)

    def _read(self, chosen: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
        self._samples.prepare([Pick(source, row, 0) for _, source, row in chosen])
        images, captions = zip(*(self._samples.read_exact(source, row) for _, source, row in chosen), strict=True)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        numbers = torch.tensor([number for number, _, _ in chosen])
        return {"image": pixels, "text": self._samples.tokenise(captions), "number": numbers}


def score_pairs(numbers: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor) -> dict[str, Tensor]:
    """Loss and recall@1 both ways over the pairs of all processes, from this process's rows; the same in each process.

    `numbers` (n,) says which pair a row is, -1 for one to leave out; `image` and `text` are (n, D) unit embeddings.
    Every process must bring as many rows.
    """
    with torch.autocast(image.device.type, enabled=False):
        return _score(numbers, image, text, logit_scale)


def _score(numbers: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor) -> dict[str, Tensor]:
    numbers, image, text = gather_rows(numbers), gather_rows(image), gather_rows(text)
    order = torch.argsort(numbers)
    order = order[numbers[order] != PADDING]
    image, text = image[order], text[order]
    count = len(image)
    own = torch.arange(count, device=image.device)
    row_sums, best_text = image.new_empty(count), own.clone()
    column_sums, highest, best_image = image.new_full((count,), -torch.inf), image.new_full((count,), -torch.inf), own
    for first in range(0, count, _ROWS):
        rows = slice(first, first + _ROWS)
        logits = logit_scale * image[rows] @ text.T
        row_sums[rows], best_text[rows] = logits.logsumexp(dim=1), logits.argmax(dim=1)
        column_sums = torch.logaddexp(column_sums, logits.logsumexp(dim=0))
        values, places = logits.max(dim=0)
        best_image = torch.where(values > highest, places + first, best_image)
        highest = torch.maximum(highest, values)
    positive = logit_scale * torch.linalg.vecdot(image, text)
    return {
        "val_loss": ((row_sums + column_sums) / 2 - positive).mean(),
        "val_image_to_text/recall@1": (best_text == own).float().mean(),
        "val_text_to_image/recall@1": (best_image == own).float().mean(),
    }
