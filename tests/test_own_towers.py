"""Training released models whose towers open_clip cannot express: what a run leaves, and what is refused and why."""

import json

import pytest
import torch
from safetensors.torch import load_file
from synthetic_shards import write_colours

import biomedclip
from biomedclip.config import check_config
from biomedclip.errors import ConfigError
from biomedclip.models.build import Parts, assemble
from biomedclip.models.export import export_released
from biomedclip.models.preprocess import ImageTransform
from biomedclip.models.tokenise import make_tokenizer
from biomedclip.models.zoo import read_model
from biomedclip.training.config import ModelConfig, TrainConfig
from biomedclip.training.continual.vocabulary import random_sentences
from biomedclip.training.exports import find_form, find_weights
from biomedclip.training.towers import text_padding
from biomedclip.training.train import train
from biomedclip.training.wise import interpolate_folders

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[unused1]",
    "a",
    "of",
    "red",
    "green",
    "blue",
    "square",
    "picture",
]
CONFIG = {
    "embed_dim": 16,
    "vision": {
        "trunk": "vit_tiny_patch16_224", "image_size": 224, "projection": {"kind": "mlp", "bias": True},
        "options": {"patch_size": 56, "embed_dim": 16, "depth": 1, "num_heads": 2},
    },
    "text": {
        "context": 16, "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 32, "pool": "pooler", "projection": {"kind": "none"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def keep(tmp_path_factory):
    """A folder as a run or an export leaves it: KEEP's kind of model, of a few thousand weights."""
    root = tmp_path_factory.mktemp("keep")
    (root / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    released = read_model("keep")
    facts = released.model_copy(
        update={
            "architecture": released.architecture.model_copy(update={"config": CONFIG}),
            "tokenizer": released.tokenizer.model_copy(update={"context": 16}),
        }
    )
    companions = {"vocab.txt": root / "vocab.txt"}
    torch.manual_seed(0)
    parts = Parts(
        where="keep", architecture=facts.architecture, facts=facts, companions=companions,
        transform=ImageTransform(facts.preprocess.steps), tokenise=make_tokenizer(facts.tokenizer, companions, "keep"),
    )  # fmt: skip
    write_colours(root / "colours", per_class=4)
    export_released(assemble(parts)[0], parts, root / "model")
    return root


def settings(keep, **changes):
    values = {
        "model": {"name": str(keep / "model")},
        "data": {"sources": [{"name": "colours", "path": str(keep / "colours")}]},
        "max_steps": 3, "batch_size": 6, "micro_batch_size": 3, "optim": {"lr": 1e-2, "layer_decay": 0.8},
        "log_every_steps": 1, "checkpoints": {"every_steps": 2, "every_minutes": 0}, "threads": 1, "device": "cpu",
        "validation": {"every_steps": 3, "max_samples": 5},
        "continual": {"modx": {"weight": 1}, "l2_sp": {"weight": 1e-3}, "ema": {"decay": 0.5},
                      "vr_lwf": {"num_texts": 8, "num_words": 3}},
    }  # fmt: skip
    return check_config(values | changes, TrainConfig, "test")


@pytest.mark.slow
def test_a_bert_and_a_timm_trunk_are_trained_resumed_mixed_and_loaded_again(keep, tmp_path):
    run = train(settings(keep), tmp_path / "run")
    start, end = (load_file(find_weights(folder)) for folder in (run.start, run.final))
    assert start.keys() == end.keys()
    for tower in ("visual.trunk.blocks.0", "text.trunk.encoder.layer.0", "visual.head"):
        assert any(not torch.equal(start[name], end[name]) for name in end if name.startswith(tower)), tower
    model, _, tokenise = biomedclip.load(run.folder)
    assert all(torch.equal(tensor, end[name]) for name, tensor in model.state_dict().items())
    assert model.encode_text(tokenise(["a red square"])).shape == (1, 16)
    assert model.encode_image(torch.zeros(1, 3, 224, 224)).shape == (1, 16)
    again = train(settings(keep, model={"name": str(run.folder)}, max_steps=1), tmp_path / "again")
    assert torch.equal(load_file(find_weights(again.start))["logit_scale"], end["logit_scale"])
    half = interpolate_folders(run.start, run.final, 0.5, tmp_path / "half")
    mixed = biomedclip.load(half)[0].state_dict()
    name = "text.trunk.pooler.dense.weight"
    torch.testing.assert_close(mixed[name], (start[name] + end[name]) / 2)
    assert json.loads((half / "biomedclip_model.json").read_bytes())["name"] == "keep"


def test_the_padding_of_a_masked_bert_may_be_cut(keep):
    model, _, tokenise = biomedclip.load(keep / "model")
    tokens = tokenise(["a red square", "a picture of a blue square"])
    assert text_padding(model) == 0
    torch.testing.assert_close(model.encode_text(tokens[:, :9]), model.encode_text(tokens), rtol=1e-5, atol=1e-6)
    model.text.mean_over_padding = True
    assert text_padding(model) is None


def test_random_sentences_of_a_released_tokenizer_hold_words_only(keep):
    tokenise = biomedclip.load(keep / "model")[2]
    texts = random_sentences(tokenise, num_texts=200, num_words=5, seed=0)
    assert texts.shape == (200, 16)
    assert set(texts[:, 0].tolist()) == {WORDS.index("[CLS]")}
    assert set(texts[:, 6].tolist()) == {WORDS.index("[SEP]")}
    assert not texts[:, 7:].any()
    assert {WORDS[number] for number in texts[:, 1:6].unique().tolist()} == set(WORDS[6:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"context_length": 20},
            "model.context_length: cannot be changed: .* has towers that open_clip cannot",
        ),
        ({"preprocess": {"resize_mode": "squash"}}, "model.preprocess: cannot be changed"),
    ],
)
def test_changes_that_own_towers_cannot_take_are_refused(keep, changes, message):
    with pytest.raises(ConfigError, match=message):
        find_form(check_config({"name": str(keep / "model"), **changes}, ModelConfig, "test"))


@pytest.mark.parametrize("name", ["biovil", "medclip-vit", "flair"])
def test_models_with_image_steps_of_their_own_are_refused(name):
    with pytest.raises(ConfigError, match=f"model.name: {name}: takes pictures through steps of its own"):
        find_form(ModelConfig(name=name, init="random"))
