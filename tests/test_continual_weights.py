"""Penalties on weights, Fisher information, averages, the teacher and its sentences, against numpy in float64."""

import copy

import numpy as np
import open_clip
import pytest
import torch
from tiny_model import MODEL_CFG, write_tiny_model
from torch import nn

from biomedclip.errors import CheckpointError, ConfigError
from biomedclip.training.continual.config import EmaConfig
from biomedclip.training.continual.teacher import FrozenTeacher
from biomedclip.training.continual.vocabulary import random_sentences
from biomedclip.training.continual.weights import estimate_fisher, ewc, l2_sp, trained_parameters
from biomedclip.training.ema import WeightAverage, changing_tensors, ema_decay


class Small(nn.Module):
    """A frozen layer, a trained one, batch norm with its buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.trained, self.norm = nn.Linear(3, 4), nn.Linear(4, 2), nn.BatchNorm1d(2)
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, x):
        return self.norm(self.trained(self.frozen(x)))


def moved(parameters):
    generator = np.random.default_rng(1)
    return {name: p.detach() + torch.tensor(generator.normal(size=tuple(p.shape))) for name, p in parameters.items()}


def test_l2_sp_is_half_the_squared_distance_of_what_is_trained():
    parameters = trained_parameters(Small())
    assert set(parameters) == {"trained.weight", "trained.bias", "norm.weight", "norm.bias"}
    anchors = moved(parameters)
    wanted = sum(((p.detach().numpy() - anchors[n].numpy()) ** 2).sum() for n, p in parameters.items()) / 2
    value = l2_sp(parameters, anchors)
    assert float(value.detach()) == pytest.approx(wanted, rel=1e-12)
    value.backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, parameter.detach() - anchors[name])


def test_fisher_is_the_mean_squared_gradient_of_batches_and_ewc_weighs_by_it():
    """The loss is a quadratic of the output, so its gradient is written out by hand."""
    model = nn.Linear(3, 2).double()
    generator = np.random.default_rng(2)
    batches = [
        (torch.tensor(generator.normal(size=(5, 3))), torch.tensor(generator.normal(size=(5, 2)))) for _ in range(4)
    ]
    kept = torch.full_like(model.weight, 7.0)
    model.weight.grad = kept.clone()
    fisher = estimate_fisher(model, batches, lambda batch: (model(batch[0]) - batch[1]).square().sum())
    weight, bias = model.weight.detach().numpy(), model.bias.detach().numpy()
    squares_w, squares_b = np.zeros_like(weight), np.zeros_like(bias)
    for x, y in batches:
        error = 2 * (x.numpy() @ weight.T + bias - y.numpy())
        squares_w += (error.T @ x.numpy()) ** 2
        squares_b += error.sum(0) ** 2
    np.testing.assert_allclose(fisher["weight"].numpy(), squares_w / 4, rtol=1e-5)
    np.testing.assert_allclose(fisher["bias"].numpy(), squares_b / 4, rtol=1e-5)
    assert torch.equal(model.weight.grad, kept)
    anchors = moved(trained_parameters(model))
    wanted = ((weight - anchors["weight"].numpy()) ** 2 * squares_w / 4).sum()
    wanted += ((bias - anchors["bias"].numpy()) ** 2 * squares_b / 4).sum()
    assert float(ewc(trained_parameters(model), anchors, fisher).detach()) == pytest.approx(wanted / 2, rel=1e-5)
    with pytest.raises(ValueError, match="at least one batch"):
        estimate_fisher(model, [], lambda batch: model.weight.sum())


def test_the_moving_average_is_the_recursion_and_holds_only_what_changes():
    model = Small()
    names = {"trained.weight", "trained.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}
    assert set(changing_tensors(model)) == names
    settings = EmaConfig(decay=0.9)
    average, wanted = WeightAverage(model), model.trained.weight.detach().numpy().copy()
    generator = np.random.default_rng(3)
    for step in range(1, 30):
        change = generator.normal(size=wanted.shape)
        with torch.no_grad():
            model.trained.weight += torch.tensor(change)
        decay = min(0.9, (1 + step) / (10 + step))
        assert ema_decay(step, settings) == pytest.approx(decay)
        wanted = decay * wanted + (1 - decay) * model.trained.weight.detach().numpy()
        average.move(model, 1 - ema_decay(step, settings))
    np.testing.assert_allclose(average.tensors["trained.weight"].numpy(), wanted, rtol=1e-5, atol=1e-6)
    own = model.trained.weight.detach().clone()
    with average.carried_by(model):
        np.testing.assert_allclose(model.trained.weight.detach().numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.trained.weight.detach(), own)


def test_the_ensemble_is_the_plain_mean_of_what_it_took_in():
    model = Small()
    states = [model.trained.weight.detach().clone()]
    average = WeightAverage(model)
    for _ in range(5):
        with torch.no_grad():
            model.trained.weight += 1.5
        states.append(model.trained.weight.detach().clone())
        average.move(model, 1 / (average.count + 1))
    torch.testing.assert_close(
        average.tensors["trained.weight"].double(), torch.stack(states).mean(0), rtol=1e-6, atol=0
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {seed: write_tiny_model(root / str(seed), seed=seed) for seed in (0, 1)}


def load(folder):
    return open_clip.create_model_from_pretrained(f"local-dir:{folder}")[0]


def test_the_teacher_is_loaded_when_asked_embeds_without_gradient_and_has_unit_rows(models):
    student = load(models[0])
    asked = []
    teacher = FrozenTeacher(lambda: asked.append(1) or load(models[1]).train(), student, name="t", precision="fp32")
    assert not asked
    pixels, texts = torch.randn(3, 3, 32, 32), open_clip.SimpleTokenizer(context_length=16)(["a", "b", "a"])
    image, text = teacher.embed(pixels, texts)
    reference = load(models[1])
    torch.testing.assert_close(image, reference.encode_image(pixels, normalize=True))
    torch.testing.assert_close(text, reference.encode_text(texts, normalize=True))
    assert not image.requires_grad
    assert not text.requires_grad
    teacher.embed(pixels, texts)
    assert asked == [1]
    assert teacher.logit_scale(pixels.device) == pytest.approx(1 / 0.07, rel=1e-5)


def test_a_teacher_with_another_normalisation_undoes_the_students(models):
    student = load(models[0])
    teacher_model = load(models[1])
    teacher_model.visual.preprocess_cfg = {
        **teacher_model.visual.preprocess_cfg,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.2, 0.1),
    }
    teacher = FrozenTeacher(lambda: teacher_model, student, name="t", precision="fp32")
    plain = torch.rand(2, 3, 32, 32)
    ours = (plain - 0.5) / 0.5
    theirs = (plain - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.2, 0.1]).view(3, 1, 1)
    wanted = teacher_model.encode_image(theirs, normalize=True)
    torch.testing.assert_close(teacher.embed_images(ours), wanted, rtol=1e-4, atol=1e-5)


def test_a_teacher_of_another_size_or_vocabulary_is_refused(models):
    student = load(models[0])
    other = load(models[1])
    other.visual.preprocess_cfg = {**other.visual.preprocess_cfg, "size": (64, 64)}
    with pytest.raises(CheckpointError, match="takes images of"):
        FrozenTeacher(lambda: other, student, name="t", precision="fp32").embed_images(torch.zeros(1, 3, 32, 32))
    config = copy.deepcopy(MODEL_CFG)
    config["text_cfg"]["context_length"] = 20
    longer = open_clip.CLIP(**config)
    longer.visual.preprocess_cfg = student.visual.preprocess_cfg
    with pytest.raises(CheckpointError, match="reads other tokens than the student"):
        FrozenTeacher(lambda: longer, student, name="t", precision="fp32").embed_images(torch.zeros(1, 3, 32, 32))


def test_random_sentences_are_the_same_for_a_seed_and_hold_words_between_the_marks():
    tokenizer = open_clip.SimpleTokenizer(context_length=20)
    texts = random_sentences(tokenizer, num_texts=300, num_words=10, seed=4)
    assert texts.shape == (300, 20)
    assert torch.equal(texts, random_sentences(tokenizer, num_texts=300, num_words=10, seed=4))
    assert not torch.equal(texts, random_sentences(tokenizer, num_texts=300, num_words=10, seed=5))
    assert set(texts[:, 0].tolist()) == {49406}
    assert set(texts[:, 11].tolist()) == {49407}
    assert set(texts[:, 12:].unique().tolist()) == {0}
    words = texts[:, 1:11]
    assert int(words.max()) < 49406
    assert len(words.unique()) > 2500  # spread over the vocabulary
    with pytest.raises(ConfigError, match=r"does not fit the text tower's 20 tokens \(found 19\); take at most 18"):
        random_sentences(tokenizer, num_texts=1, num_words=19, seed=0)
