"""Prompt learning and weight interpolation on small towers of CLIP's and BERT's kind."""

import numpy as np
import open_clip
import pytest
import torch
from tiny_model import MODEL_CFG

from biomedclip.errors import CheckpointError, ConfigError, DataError
from biomedclip.evaluation.adapters.features import Features, Selection
from biomedclip.evaluation.adapters.prompt_learning import (
    fit_prompts,
    fit_pseudo_labels,
    token_embedding,
    train_context,
)
from biomedclip.evaluation.adapters.wise import choose_point, sweep_weights
from biomedclip.models.interpolate import carrying, interpolate

NAMES = ["red cell", "white cell", "platelet"]
tokenizer = open_clip.SimpleTokenizer(context_length=16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return open_clip.CLIP(**MODEL_CFG)


def make(split, seed):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(3, 16))
    y = np.arange(30) % 3
    vectors = centres[y] + 0.3 * rng.normal(size=(30, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Features(vectors=vectors.astype(np.float32), y=y, num_classes=3, split=split)


def train(model, *, context="a photo of a", epochs=3, learning_rate=0.02, names=NAMES, tokens=tokenizer):
    return list(
        train_context(make("train", 1), model, tokens, names, context, epochs, learning_rate, 16, 0, 20.0, "cpu")
    )


def test_the_start_is_exactly_the_prompt_of_the_words(model):
    start = train(model, epochs=0)[0]
    with torch.no_grad():
        expected = model.eval().encode_text(tokenizer([f"a photo of a {n}." for n in NAMES]), normalize=True)
    assert start == pytest.approx(expected.numpy(), abs=1e-6)


def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = train(model, epochs=12)
    support = make("train", 1)

    def loss(w):
        return float(
            torch.nn.functional.cross_entropy(torch.tensor(20 * support.vectors @ w.T), torch.tensor(support.y))
        )

    assert loss(weights[-1]) < loss(weights[0])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.requires_grad for p in model.parameters())
    assert not model.token_embedding._forward_hooks


def test_the_epoch_is_chosen_on_validation_and_zero_is_among_them(model):
    facts = dict(model=model, tokenizer=tokenizer, class_names=NAMES, epochs=4, learning_rate=0.02, logit_scale=20.0)
    adapted = fit_prompts(make("train", 1), Selection(features=make("val", 2)), **facts)
    assert [params["epoch"] for params, _ in adapted.choice.table] == [0, 1, 2, 3, 4]
    assert adapted.logits(make("val", 2).vectors).shape == (30, 3)
    with pytest.raises(DataError, match="2 names"):
        fit_prompts(make("train", 1), Selection(features=make("val", 2)), **(facts | {"class_names": NAMES[:2]}))


def test_pitfall_18_pseudo_labels_do_not_come_from_the_scored_split(model):
    text = train(model, epochs=0)[0]
    facts = dict(model=model, tokenizer=tokenizer, class_names=NAMES, epochs=1, text=text, per_class=4)
    val = make("val", 2)
    with pytest.raises(ConfigError, match="are images of the split that is scored"):
        fit_pseudo_labels(make("test", 3), Selection(features=val), **facts)
    allowed = fit_pseudo_labels(make("test", 3), Selection(features=val, allow_test=True), **facts)
    assert allowed.choice.describe()["tags"] == ["selected_on_test"]
    fine = fit_pseudo_labels(make("train", 3), Selection(features=val), **facts)
    assert "tags" not in fine.choice.describe()


def test_a_context_that_is_no_words_of_its_own_is_refused(model):
    with pytest.raises(ConfigError, match="must hold words"):
        train(model, context="")
    with pytest.raises(ConfigError, match="must hold words"):
        train(model, context="very " * 30)


class BertTower(torch.nn.Module):
    """open_clip's HFTextEncoder keeps its tower in `text.transformer`, as here."""

    def __init__(self):
        super().__init__()
        from transformers import BertConfig, BertModel

        shape = BertConfig(vocab_size=49408, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=32, max_position_embeddings=16)  # fmt: skip
        self.text = torch.nn.Module()
        self.text.transformer = BertModel(shape)

    def encode_text(self, tokens):
        return self.text.transformer(input_ids=tokens).last_hidden_state[:, 0]


def test_a_tower_of_berts_kind_learns_too_and_one_without_tokens_is_refused():
    torch.manual_seed(0)
    tower = BertTower()
    weights = train(tower, epochs=5, learning_rate=20.0)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(
            tower.eval().encode_text(tokenizer([f"a photo of a {n}." for n in NAMES])), dim=-1
        )
    assert weights[0] == pytest.approx(expected.numpy(), abs=1e-5)
    assert not np.allclose(weights[0], weights[-1])
    with pytest.raises(CheckpointError, match="no token embedding"):
        token_embedding(torch.nn.Linear(2, 2))


def test_a_sweep_measures_the_line_and_gives_the_model_back():
    torch.manual_seed(0)
    a, b, own = (torch.nn.Linear(3, 2) for _ in range(3))
    kept = own.weight.detach().clone()
    curve = list(
        sweep_weights(
            lambda alpha: carrying(own, interpolate(a.state_dict(), b.state_dict(), alpha)),
            lambda: {"w": float(own.weight.detach()[0, 0])},
            alphas=(0, 0.5, 1),
        )
    )
    values = [value["w"] for _, value in curve]
    assert values == pytest.approx(
        [float(m.detach()) for m in (a.weight[0, 0], (a.weight + b.weight)[0, 0] / 2, b.weight[0, 0])]
    )
    assert torch.equal(own.weight, kept)


def test_a_point_is_chosen_on_validation_among_those_that_keep_enough():
    curve = [(0.0, {"in": 0.5, "out": 0.9}), (0.5, {"in": 0.7, "out": 0.85}), (1.0, {"in": 0.8, "out": 0.6})]
    assert choose_point(curve, "in", split="val").hparams == {"alpha": 1.0}
    found = choose_point(curve, "in", split="val", keep={"out": 0.8})
    assert (found.hparams, found.score) == ({"alpha": 0.5}, 0.7)
    with pytest.raises(DataError, match="no point keeps"):
        choose_point(curve, "in", split="val", keep={"out": 0.95})
    with pytest.raises(ConfigError, match="split that is scored"):
        choose_point(curve, "in", split="test")
    assert choose_point(curve, "in", split="test", allow_test=True).describe()["tags"] == ["selected_on_test"]
