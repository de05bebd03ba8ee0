"""Validation pairs dealt out to processes: each once, and the numbers of one process, whatever the order."""

import pytest
import torch
from torch.nn import functional as F

from biomedclip.training import pair_validation
from biomedclip.training.pair_validation import PADDING, ValidationBatches, score_pairs


class Places:
    """Stands for the samples of two sources of 4 and 3 rows."""

    rows = ([0] * 4, [0] * 3)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 9])
def test_every_pair_goes_to_one_process_and_all_take_as_many(world):
    parts = [ValidationBatches(Places(), 4, 99, rank=rank, world_size=world) for rank in range(world)]
    taken = sorted(number for part in parts for number, _, _ in part._places if number != PADDING)
    assert taken == list(range(7))
    assert len({len(part._places) for part in parts}) == len({len(part) for part in parts}) == 1
    every = {(0, row) for row in range(4)} | {(1, row) for row in range(3)}
    assert {place[1:] for part in parts for place in part._places} == every


def test_numbers_put_pairs_in_order_and_padding_counts_for_nothing(monkeypatch):
    random = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(7, 5, generator=random), dim=1) for _ in range(2))
    logits = 9.0 * image @ text.T
    own = torch.arange(7)
    wanted = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    monkeypatch.setattr(pair_validation, "_ROWS", 3)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 6])
    numbers = torch.tensor([0, 2, 4, 6, 1, 3, 5, PADDING])
    found = score_pairs(numbers, image[order], text[order], torch.tensor(9.0))
    torch.testing.assert_close(found["val_loss"], wanted)
    right = (logits.argmax(dim=1) == own).float().mean(), (logits.argmax(dim=0) == own).float().mean()
    assert 0 < right[0] < 1
    assert (found["val_image_to_text/recall@1"], found["val_text_to_image/recall@1"]) == right
