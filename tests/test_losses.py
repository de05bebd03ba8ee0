"""Objectives against float64 references written from the formulas, and against open_clip."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from biomedclip.training.losses import clip_loss, same_article, soft_targets


def embeddings(size=7, width=5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(size, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return F.normalize(image, dim=1).to(dtype), F.normalize(text, dim=1).to(dtype)


def reference(image, text, scale, targets, ignore=None):
    """The loss in plain numpy: -sum_j t_ij log softmax_j, averaged over rows, both ways, halved."""
    logits = scale * np.asarray(image, dtype=np.float64) @ np.asarray(text, dtype=np.float64).T
    if ignore is not None:
        logits = np.where(ignore, -np.inf, logits)

    def half(rows):
        log_sums = [np.log(np.sum(np.exp(row - row.max()))) + row.max() for row in rows]
        total = 0.0
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                if targets[i, j]:
                    total -= targets[i, j] * (value - log_sums[i])
        return total / len(rows)

    return (half(logits) + half(logits.T)) / 2


def test_clip_loss_and_its_gradients_are_open_clips():
    from open_clip import ClipLoss

    gradients = []
    for compute in (clip_loss, ClipLoss()):
        image, text = (x.requires_grad_() for x in embeddings(dtype=torch.float64))
        scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
        loss = compute(image, text, scale)
        loss.backward()
        gradients.append((loss.detach(), image.grad, text.grad, scale.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_clip_loss_is_the_formula(scale):
    image, text = embeddings()
    found = clip_loss(image, text, torch.tensor(scale))
    assert float(found) == pytest.approx(reference(image, text, scale, np.eye(7)), rel=1e-5)


def test_soft_target_loss_is_the_formula_and_the_identity_gives_plain_clip():
    image, text = embeddings()
    targets = soft_targets(torch.tensor([[0], [1], [0], [-1], [-1], [0], [1]]))
    found = clip_loss(image, text, torch.tensor(10.0), targets=targets)
    assert float(found) == pytest.approx(reference(image, text, 10.0, targets.double().numpy()), rel=1e-5)
    plain = clip_loss(image, text, torch.tensor(10.0))
    torch.testing.assert_close(clip_loss(image, text, torch.tensor(10.0), targets=torch.eye(7)), plain)


def test_ignored_pairs_leave_the_loss():
    image, text = embeddings()
    ignore = same_article(torch.tensor([4, 4, -1, -1, 7, 4, 7]))
    found = clip_loss(image, text, torch.tensor(10.0), ignore=ignore)
    assert float(found) == pytest.approx(reference(image, text, 10.0, np.eye(7), ignore.numpy()), rel=1e-5)
    # Two samples of one article alone in a batch have no negatives, so nothing is left to learn.
    assert float(clip_loss(image[:2], text[:2], torch.tensor(10.0), ignore=ignore[:2, :2])) == pytest.approx(0.0)


def test_soft_loss_with_ignored_pairs_stays_finite_in_its_gradients():
    image, text = (x.requires_grad_() for x in embeddings())
    targets = soft_targets(torch.tensor([[0], [0], [-1], [-1], [1], [1], [-1]]))
    loss = clip_loss(
        image, text, torch.tensor(100.0), targets=targets, ignore=same_article(torch.tensor([-1, -1, 3, 3, -1, -1, 3]))
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(image.grad).all()


def test_targets_are_row_normalised_jaccard_overlaps():
    label_sets = [{0, 1}, {1}, {1, 2, 3}, set(), {0, 1}, set()]
    table = torch.full((6, 3), -1)
    for row, labels in enumerate(label_sets):
        table[row, : len(labels)] = torch.tensor(sorted(labels))
    expected = np.eye(6)
    for i, a in enumerate(label_sets):
        for j, b in enumerate(label_sets):
            if i != j and a | b:
                expected[i, j] = len(a & b) / len(a | b)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(soft_targets(table).numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(soft_targets(table, 0.3).numpy(), 0.7 * np.eye(6) + 0.3 * expected, rtol=1e-6)


def test_without_labels_or_strength_targets_are_the_identity():
    for table, strength in (
        (torch.full((4, 2), -1), 1.0),
        (torch.zeros(4, 0, dtype=torch.int64), 1.0),
        (torch.zeros(4, 1, dtype=torch.int64), 0.0),
    ):
        assert torch.equal(soft_targets(table, strength), torch.eye(4))


def test_only_different_figures_of_one_known_article_are_ignored():
    found = same_article(torch.tensor([3, -1, 3, -1, 5]))
    assert found.nonzero().tolist() == [[0, 2], [2, 0]]
