"""Long-CLIP's objective against its dense formula in float64 with torch's own SVD, and what its recipe asks for."""

import pytest
import torch
from torch.nn import functional as F

from biomedclip.config import check_config, config_file, load_config
from biomedclip.errors import ConfigError
from biomedclip.stream.captions import first_sentence
from biomedclip.training.config import LossConfig, TrainConfig
from biomedclip.training.objectives.long_captions import rebuild
from biomedclip.training.objectives.objective import Objective
from biomedclip.training.terms import StepTensors

SIZE, WIDTH, KEPT = 14, 9, 4
SETTINGS = {"label_smoothing": 0.1, "short_captions": {"components": KEPT, "weight": 0.7}, "tile": 5}


def embeddings(dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    rows = (torch.randn(SIZE, WIDTH, generator=random, dtype=torch.float64) for _ in range(3))
    return [F.normalize(part, dim=1).to(dtype).requires_grad_() for part in rows]


def step(image, text, second, scale):
    return StepTensors(
        image=image, text=text, second_text=second, logit_scale=scale, batch={}, model=torch.nn.Identity(),
        normalise=lambda pixels: pixels, step=0,
    )  # fmt: skip


def objective():
    return Objective(check_config(SETTINGS, LossConfig, "test"))


def dense(image, text, second, scale, *, kept=KEPT, smoothing=0.1, weight=0.7):
    """The paper's formulas as its code has them: an SVD of the centred batch, cross entropy both ways."""

    def cross_entropy(rows, columns):
        logits, own = scale * rows @ columns.T, torch.arange(len(rows))
        one_way, other = (F.cross_entropy(table, own, label_smoothing=smoothing) for table in (logits, logits.T))
        return (one_way + other) / 2

    mean = image.mean(dim=0)
    components = torch.linalg.svd(image - mean, full_matrices=False)[2][:kept]
    coarse = (image - mean) @ components.T @ components + mean
    return cross_entropy(image, text) + weight * cross_entropy(coarse, second)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_the_loss_and_its_gradients_are_long_clips(scale):
    inputs = [*embeddings(), torch.tensor(scale, dtype=torch.float64, requires_grad=True)]
    loss, samples = objective()(step(*inputs))
    wanted = dense(*inputs)
    torch.testing.assert_close(loss, wanted, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(samples.mean(), loss.detach(), rtol=1e-11, atol=1e-11)
    assert not samples.requires_grad
    found, expected = (torch.autograd.grad(value, inputs) for value in (loss, wanted))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_the_gradient_of_the_components_counts():
    """A projector taken as a constant would give other gradients, so the test above would see it."""
    image, text, second = embeddings()
    scale = torch.tensor(14.3, dtype=torch.float64)
    loss, _ = objective()(step(image, text, second, scale))
    whole = torch.autograd.grad(loss, image)[0]
    mean = image.mean(dim=0)
    components = torch.linalg.svd(image - mean, full_matrices=False)[2][:KEPT].detach()
    coarse = (image - mean) @ components.T @ components + mean
    frozen = dense(image, text, second, scale, weight=0.0)
    logits = 14.3 * coarse @ second.T
    frozen = frozen + 0.35 * sum(
        F.cross_entropy(table, torch.arange(SIZE), label_smoothing=0.1) for table in (logits, logits.T)
    )
    assert frozen.item() == pytest.approx(loss.item(), rel=1e-9)
    assert float((torch.autograd.grad(frozen, image)[0] - whole).norm() / whole.norm()) > 1e-3


def test_gradients_stay_finite_where_two_kept_components_are_as_large():
    """Single vectors are not defined there, and torch's SVD gives NaN; the subspace is."""
    corners = torch.eye(WIDTH, dtype=torch.float64)[:3].repeat(2, 1) * torch.tensor([1.0, 1, 1, -1, -1, -1])[:, None]
    rows = torch.cat([corners, 0.1 * torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1)).double()])
    image = rows.requires_grad_()
    rebuild(image, image, 3).square().sum().backward()
    assert torch.isfinite(image.grad).all()


def test_a_batch_with_no_more_components_than_are_kept_is_itself():
    image = embeddings()[0]
    assert rebuild(image, image, WIDTH) is image
    assert rebuild(image[:4], image[:4], 3) is not image
    torch.testing.assert_close(rebuild(image[:4], image[:4], 3), image[:4])
    once = rebuild(image, image, KEPT)
    assert torch.linalg.matrix_rank((once - once.mean(dim=0)).detach()) == KEPT
    torch.testing.assert_close(rebuild(once, once, KEPT), once)


def test_bf16_embeddings_under_autocast_are_taken_as_float32():
    image, text, second = embeddings(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = objective()(step(image, text, second, torch.tensor(14.3)))
    wanted = dense(*(rows.double() for rows in (image, text, second)), 14.3)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_settings_that_do_not_go_together_are_refused():
    for wrong, message in (
        ({"name": "siglip", "label_smoothing": 0.1}, "label_smoothing needs name: clip"),
        ({"name": "alip", "short_captions": {}}, "short_captions needs name: clip"),
        ({"label_smoothing": 0.1, "same_article": "ignore"}, "label_smoothing spreads the target over all pairs"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_config(wrong, LossConfig, "test")
    with pytest.raises(ConfigError, match="needs samples with a short caption"):
        objective()(step(*embeddings()[:2], None, torch.tensor(1.0)))


@pytest.mark.parametrize(
    ("caption", "short"),
    [
        ("Axial CT shows a mass. The arrow marks it.", "Axial CT shows a mass."),
        ("Fig. 1. (A) Axial CT shows a mass. (B) Coronal CT.", "Fig. 1. (A) Axial CT shows a mass."),
        ("A lesion of 2.5 cm in the liver", "A lesion of 2.5 cm in the liver"),
        ("Edema. No effusion. Heart size is normal. Nothing else.", "Edema. No effusion."),
    ],
)
def test_the_short_caption_is_the_first_sentence(caption, short):
    assert first_sentence(caption) == short


def test_the_recipe_is_long_clips():
    config = load_config(config_file("train/longclip.yaml"), TrainConfig)
    assert config.loss.label_smoothing == 0.1
    assert config.loss.short_captions.components == 32
    assert config.loss.second_captions == "first_sentence"
    assert config.towers.freeze_positions == 20
    assert config.model.context_length == 4 * 77 - 3 * 20
