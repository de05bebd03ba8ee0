"""Objectives in tiles against dense float64 references written from the formulas, open_clip, and 2 processes."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from biomedclip.config import check_config
from biomedclip.errors import ConfigError
from biomedclip.training.config import LossConfig
from biomedclip.training.gather import gather_rows
from biomedclip.training.objectives import softmax
from biomedclip.training.objectives.hopfield import cloob_losses, retrieve
from biomedclip.training.objectives.objective import Objective, alip_weights
from biomedclip.training.objectives.pairs import batch_pairs, caption_ids
from biomedclip.training.objectives.sigmoid import siglip_loss
from biomedclip.training.objectives.softmax import clip_loss, infoloob_loss
from biomedclip.training.terms import StepTensors

SIZE = 14
BATCH = {
    "labels": torch.tensor([[0, 1], [1, -1], [0, -1], [-1, -1], [1, 2], [0, 1], [3, -1]] * 2),
    "article": torch.tensor([4, 4, -1, -1, 7, 4, 7, 8, 9, 9, 9, -1, 4, 1]),
    "text": torch.tensor([[1, 2, 0], [1, 3, 0], [1, 2, 0], [5, 5, 5], [6, 0, 0], [7, 0, 0], [6, 0, 0]] * 2),
}
BATCH["text"][9:, 2] += 11
SCALES = [1.0, 14.3, 100.0]


def embeddings(size=SIZE, width=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(size, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return F.normalize(image, dim=1).to(dtype), F.normalize(text, dim=1).to(dtype)


def gradients(compute, *, scale=14.3, dtype=torch.float64, bias=None):
    """Loss and the gradients of image, text, logit scale (and bias)."""
    image, text = (rows.requires_grad_() for rows in embeddings(dtype=dtype))
    inputs = [image, text, *(torch.tensor(v, dtype=dtype, requires_grad=True) for v in (scale, bias) if v is not None)]
    loss = compute(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def agree(first, second, tolerance=1e-11):
    for ours, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def label_sets():
    return [{int(label) for label in row if label >= 0} for row in BATCH["labels"]]


def dense_overlap():
    """Jaccard overlaps of the label sets, counted one by one."""
    sets, table = label_sets(), torch.eye(SIZE, dtype=torch.float64)
    for i, a in enumerate(sets):
        for j, b in enumerate(sets):
            if i != j and a | b:
                table[i, j] = len(a & b) / len(a | b)
    return table


def dense_ignored(overlap, article=True, caption=True):
    rows, captions = BATCH["article"].tolist(), [tuple(row) for row in BATCH["text"].tolist()]
    table = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    for i in range(SIZE):
        for j in range(SIZE):
            same = (article and rows[i] == rows[j] >= 0) or (caption and captions[i] == captions[j])
            table[i, j] = i != j and same and overlap[i, j] == 0
    return table


def dense_clip(image, text, scale, *, targets=None, ignored=None, weights=None):
    logits = scale * image @ text.T
    targets = torch.eye(len(image), dtype=image.dtype) if targets is None else targets
    weights = torch.ones(len(image), dtype=image.dtype) if weights is None else weights
    loss = 0.0
    for table in (logits, logits.T):
        kept = table if ignored is None else table.masked_fill(ignored, -math.inf)
        log_p = table - torch.logsumexp(kept, dim=1, keepdim=True)
        loss = loss - (weights[:, None] * targets * log_p).sum() / len(image) / 2
    return loss


@pytest.fixture(params=["kept", "computed again"])
def logits(request, monkeypatch):
    """Whether the backward pass finds the logits or makes them."""
    if request.param == "computed again":
        monkeypatch.setattr(softmax, "kept_bytes", lambda rows: 0)


@pytest.mark.usefixtures("logits")
@pytest.mark.parametrize("tile", [0, 1, 4, 5, SIZE])
@pytest.mark.parametrize("scale", SCALES)
def test_clip_loss_and_its_gradients_are_open_clips_whatever_the_tile(tile, scale):
    from open_clip import ClipLoss

    ours = gradients(lambda i, t, s: clip_loss(i, t, s, tile=tile), scale=scale)
    agree(ours, gradients(ClipLoss(), scale=scale))


@pytest.mark.usefixtures("logits")
def test_gradients_can_be_taken_twice():
    inputs = [rows.requires_grad_() for rows in embeddings()]
    loss = clip_loss(*inputs, torch.tensor(14.3, dtype=torch.float64), tile=4)
    agree(torch.autograd.grad(loss, inputs, retain_graph=True), torch.autograd.grad(loss, inputs))


@pytest.mark.usefixtures("logits")
@pytest.mark.parametrize("tile", [3, 0])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_soft_targets_and_pairs_left_out_are_the_dense_formula(tile, strength):
    overlap = dense_overlap()
    targets = (1 - strength) * torch.eye(SIZE).double() + strength * overlap / overlap.sum(dim=1, keepdim=True)
    pairs = batch_pairs(
        BATCH, soft_targets=strength, same_article=True, same_caption=True, dtype=torch.float64, tile=tile or SIZE
    )
    wanted = gradients(lambda *x: dense_clip(*x, targets=targets, ignored=dense_ignored(overlap)))
    agree(gradients(lambda *x: clip_loss(*x, pairs=pairs, tile=tile)), wanted)


@pytest.mark.parametrize("known", [("article",), ("caption",), ("article", "caption")])
def test_pairs_of_one_article_or_caption_leave_the_loss(known):
    identity = torch.eye(SIZE)
    ignored = dense_ignored(identity, article="article" in known, caption="caption" in known)
    assert ignored.any()
    pairs = batch_pairs(BATCH, same_article="article" in known, same_caption="caption" in known)
    wanted = gradients(lambda *x: dense_clip(*x, ignored=ignored))
    agree(gradients(lambda *x: clip_loss(*x, pairs=pairs, tile=4)), wanted)
    # Two samples of one article alone in a batch have no negatives, so nothing is left to learn.
    two = {name: column[8:10] for name, column in BATCH.items()}
    image, text = embeddings(2)
    alone = clip_loss(image, text, torch.tensor(10.0), pairs=batch_pairs(two, same_article=True))
    assert float(alone) == pytest.approx(0.0, abs=1e-12)


def test_weights_multiply_the_loss_of_a_sample_in_both_directions():
    weights = torch.linspace(0.0, 1.5, SIZE, dtype=torch.float64)
    overlap = dense_overlap()
    targets, pairs = overlap / overlap.sum(dim=1, keepdim=True), batch_pairs(BATCH, soft_targets=1, dtype=torch.float64)
    for known, mine in (({}, {}), ({"targets": targets}, {"pairs": pairs})):
        wanted = gradients(lambda *x, k=known: dense_clip(*x, weights=weights, **k))
        agree(gradients(lambda *x, m=mine: clip_loss(*x, weights=weights, tile=4, **m)), wanted)


def test_float32_is_close_at_any_scale_and_bf16_embeddings_are_taken_as_float32():
    for scale in SCALES:
        wanted = gradients(dense_clip, scale=scale)
        found = gradients(lambda *x: clip_loss(*x, tile=4), scale=scale, dtype=torch.float32)
        agree([x.double() for x in found], wanted, tolerance=2e-5)
    image, text = embeddings(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = clip_loss(image, text, torch.tensor(100.0))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, dense_clip(image.float(), text.float(), 100.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [0, 5])
def test_siglip_loss_and_its_gradients_are_open_clips(tile):
    from open_clip.loss import SigLipLoss

    ours = gradients(lambda *x: siglip_loss(*x, tile=tile), scale=10.0, bias=-10.0)
    agree(ours, gradients(SigLipLoss(), scale=10.0, bias=-10.0))


def test_siglip_with_soft_targets_and_pairs_left_out_is_binary_cross_entropy():
    overlap = dense_overlap()
    targets = torch.where(torch.eye(SIZE) > 0, torch.ones(()).double(), 0.6 * overlap)
    kept = ~dense_ignored(overlap)

    def dense(image, text, scale, bias):
        logits = scale * image @ text.T + bias
        return F.binary_cross_entropy_with_logits(logits[kept], targets[kept], reduction="sum") / SIZE

    pairs = batch_pairs(BATCH, soft_targets=0.6, same_article=True, same_caption=True, dtype=torch.float64)
    ours = gradients(lambda *x: siglip_loss(*x, pairs=pairs, tile=4), scale=7.0, bias=-3.0)
    agree(ours, gradients(dense, scale=7.0, bias=-3.0))


def dense_loob(anchors, others, scale):
    logits = scale * anchors @ others.T
    own = torch.eye(len(logits), dtype=torch.bool)
    return (torch.logsumexp(logits.masked_fill(own, -math.inf), dim=1) - logits.diagonal()).mean()


@pytest.mark.usefixtures("logits")
def test_infoloob_leaves_the_own_pair_out_of_the_sum():
    def dense(image, text, scale):
        return (dense_loob(image, text, scale) + dense_loob(text, image, scale)) / 2 / scale.detach()

    for scale in SCALES:
        agree(gradients(lambda *x: infoloob_loss(*x, tile=4), scale=scale), gradients(dense, scale=scale))
    # A sample all of whose negatives are left out has no loss, and no NaN in its gradient.
    two = {name: column[8:10] for name, column in BATCH.items()}
    image, text = (rows.requires_grad_() for rows in embeddings(2))
    loss = infoloob_loss(image, text, torch.tensor(10.0), pairs=batch_pairs(two, same_article=True))
    loss.backward()
    assert loss.item() == 0.0
    assert not image.grad.any()


def test_cloob_is_infoloob_of_retrieved_patterns():
    def dense_retrieve(states, stored):
        return F.normalize(torch.softmax(8.0 * states @ stored.T, dim=1) @ stored, dim=1)

    def dense(image, text, scale):
        over_images = dense_loob(dense_retrieve(image, image), dense_retrieve(text, image), scale)
        return (
            over_images + dense_loob(dense_retrieve(text, text), dense_retrieve(image, text), scale)
        ) / scale.detach()

    ours = gradients(lambda i, t, s: cloob_losses(i, t, i, t, s, beta=8.0, tile=4)[0], scale=30.0)
    agree(ours, gradients(dense, scale=30.0))
    image, text = embeddings()
    torch.testing.assert_close(retrieve(image, text, 8.0), dense_retrieve(image, text))


def test_alip_trusts_samples_whose_captions_agree():
    cosines = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4], [0.0, 0.1, 0.9]])
    sample, first, second = alip_weights(cosines, torch.tensor([0.5, 0.3, 0.3]))
    assert sample.tolist() == pytest.approx([1.0, math.exp(-0.8), 1.0])
    assert first.tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert second.tolist() == pytest.approx([1.0, math.exp(-0.4), 1.0])


def step(batch=BATCH, second=None, dtype=torch.float64, bias=None, rows=slice(None)):
    image, text = (x[rows].clone().requires_grad_() for x in embeddings(dtype=dtype))
    return StepTensors(
        image=image, text=text, second_text=second, logit_scale=torch.tensor(14.3, dtype=dtype, requires_grad=True),
        logit_bias=bias, batch={name: column[rows] for name, column in batch.items()}, model=torch.nn.Identity(),
        normalise=lambda pixels: pixels, step=0,
    )  # fmt: skip


def test_alip_weighs_the_losses_of_both_captions_and_follows_their_means():
    objective = Objective(LossConfig(name="alip"))
    second = embeddings(seed=5)[1]
    tensors = step(second=second)
    loss, samples = objective(tensors)
    torch.testing.assert_close(samples.mean(), loss.detach())
    cosines = [
        (tensors.text * second).sum(1), (tensors.image * tensors.text).sum(1), (tensors.image * second).sum(1)
    ]  # fmt: skip
    means = torch.stack([c.mean() for c in cosines]).detach()
    torch.testing.assert_close(objective.means.double(), means, rtol=1e-5, atol=1e-6)
    sample, first, other = alip_weights(torch.stack(cosines).detach(), objective.means.double())
    wanted = dense_clip(tensors.image, tensors.text, 14.3, weights=sample * first)
    wanted = wanted + dense_clip(tensors.image, second, 14.3, weights=sample * other)
    torch.testing.assert_close(loss, wanted)
    objective(step(second=-second))
    assert objective.means[0] == pytest.approx(float(0.99 * means[0] - 0.01 * means[0]), rel=1e-4)
    with pytest.raises(ConfigError, match="two captions"):
        objective(step())


def test_siglip_without_a_bias_is_refused():
    with pytest.raises(ConfigError, match="logit bias"):
        Objective(LossConfig(name="siglip"))(step())
    with pytest.raises(ConfigError, match="hopfield_beta needs name: infoloob"):
        check_config({"hopfield_beta": 8.0}, LossConfig, "test")


def test_the_memory_of_the_loss_is_a_share_of_the_matrix(monkeypatch):
    """Counted in the shapes that torch allocates: nothing larger than a tile or the embeddings."""
    from torch.utils._python_dispatch import TorchDispatchMode

    assert softmax.kept_bytes(torch.zeros(1)) == 4096**2 * 4
    monkeypatch.setattr(softmax, "kept_bytes", lambda rows: 0)

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            for value in found if isinstance(found, tuple) else (found,):
                if isinstance(value, torch.Tensor):
                    self.seen = max(self.seen, value.numel())
            return found

    size, width, tile = 512, 8, 64
    image, text = (rows.float().requires_grad_() for rows in embeddings(size, width))
    batch = {"labels": torch.arange(size)[:, None] % 7, "article": torch.arange(size) // 3,
             "text": torch.arange(size)[:, None] % 50}  # fmt: skip
    bias = torch.tensor(-10.0, requires_grad=True)
    for compute in (clip_loss, infoloob_loss, lambda i, t, s, **k: siglip_loss(i, t, s, bias, **k)):
        with Largest() as largest:
            pairs = batch_pairs(batch, soft_targets=1.0, same_article=True, same_caption=True, tile=tile)
            compute(image, text, torch.tensor(10.0), pairs=pairs, tile=tile).backward()
        assert largest.seen <= max(size * width, tile * tile)


def test_captions_have_one_id_where_their_tokens_are_equal():
    tokens = torch.tensor([[1, 2, 0], [1, 2, 0], [2, 1, 0], [1, 0, 2], [1, 2, 3]])
    ids = caption_ids(tokens).tolist()
    assert ids[0] == ids[1]
    assert len(set(ids)) == 4
    assert min(ids) >= 0
    many = caption_ids(torch.from_numpy(np.random.default_rng(0).integers(0, 40, (20_000, 6))))
    assert len(torch.unique(many)) > 19_000


def test_gathering_in_one_process_is_the_identity():
    rows = torch.ones(3)
    assert gather_rows(rows) is rows


OBJECTIVES = {
    "plain": {},
    "facts": {"soft_targets": 0.7, "same_article": "ignore", "same_caption": "ignore", "tile": 4},
    "siglip": {"name": "siglip", "soft_targets": 0.5, "same_article": "ignore", "tile": 5},
    "infoloob": {"name": "infoloob", "same_article": "ignore"},
    "cloob": {"name": "infoloob", "hopfield_beta": 8.0},
    "alip": {"name": "alip"},
    "long captions": {"label_smoothing": 0.1, "short_captions": {"components": 3}, "tile": 4},
}


def objective_gradients(name, rows):
    """What one process with these rows of the batch contributes: loss and gradients."""
    second = embeddings(seed=5)[1][rows].clone().requires_grad_()
    bias = torch.tensor(-4.0, dtype=torch.float64, requires_grad=True)
    tensors = step(second=second, bias=bias, rows=rows)
    loss, samples = Objective(check_config(OBJECTIVES[name], LossConfig, "test"))(tensors)
    torch.testing.assert_close(samples.mean(), loss.detach())
    inputs = [tensors.image, tensors.text, second, tensors.logit_scale, bias]
    return loss.detach(), torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def run_rank(folder):
    """One process of two: stores what it computed."""
    rank, half = int(os.environ["RANK"]), SIZE // 2
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {name: objective_gradients(name, slice(rank * half, (rank + 1) * half)) for name in OBJECTIVES}
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_loss_and_the_gradients_of_one(tmp_path):
    """Averaged over processes, as strategies average them, both are those of one process with the whole batch."""
    here = str(Path(__file__).parent)
    script = f"import sys; sys.path.insert(0, {here!r}); import test_losses; test_losses.run_rank(sys.argv[1])"
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)],
                         env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"})
        for rank in range(2)
    ]  # fmt: skip
    assert [process.wait(100) for process in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name in OBJECTIVES:
        loss, (image, text, second, scale, bias) = objective_gradients(name, slice(None))
        (loss0, g0), (loss1, g1) = (rank[name] for rank in ranks)
        both = [(a + b) / 2 for a, b in zip((loss0, *g0[3:]), (loss1, *g1[3:]), strict=True)]
        # A row's gradient lives in one process; averaging over processes halves it there.
        rows = [torch.cat([a, b]) / 2 for a, b in zip(g0[:3], g1[:3], strict=True)]
        agree([*both, *rows], [loss, scale, bias, image, text, second], tolerance=1e-10)
