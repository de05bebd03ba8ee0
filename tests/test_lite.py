"""The bundled model in torch alone is open_clip's: the same tensors, the same ids, the same embeddings."""

import numpy as np
import pytest
import torch
from fresh_python import run_fresh

from biomedclip.app.encoder import Encoder
from biomedclip.evaluation.embed import fingerprint
from biomedclip.models import lite
from biomedclip.models.build import build_architecture
from biomedclip.models.lite import ClipTokens, fits, load_lite
from biomedclip.models.load import load
from biomedclip.models.zoo import read_model

MINI = "biomedclip-mini"
TEXTS = ["a chest X-ray", "Écran, β-amyloid &amp; 3 µm", "cells " * 90, ""]


@pytest.fixture(scope="module")
def both():
    return load_lite(MINI), load(MINI)


def test_tensors_have_the_same_names_and_bytes(both):
    (own, _, _), (theirs, _, _) = both
    assert list(dict(own.state_dict())) != []
    assert {name: (value.dtype, value.shape) for name, value in own.state_dict().items()} == {
        name: (value.dtype, value.shape) for name, value in theirs.state_dict().items()
    }
    # Vectors that a search has kept hold for both.
    assert fingerprint(own) == fingerprint(theirs)
    assert (own.context_length, own.vocab_size) == (theirs.context_length, theirs.vocab_size)


@pytest.mark.parametrize("size", [(64, 64), (63, 65), (97, 130)])
def test_pictures_are_embedded_alike_at_any_size(both, size):
    (own, _, _), (theirs, _, _) = both
    pictures = torch.randn(5, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for normalize in (False, True):
            found, wanted = own.encode_image(pictures, normalize), theirs.encode_image(pictures, normalize)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_sentences_are_cut_into_the_same_ids_and_embedded_alike(both):
    (own, _, ours), (theirs, _, tokenizer) = both
    assert torch.equal(ours(TEXTS), tokenizer(TEXTS))
    assert torch.equal(ours("one sentence"), tokenizer("one sentence"))
    assert torch.equal(ours(TEXTS, context_length=16), tokenizer(TEXTS, context_length=16))
    with torch.inference_mode():
        found, wanted = own.encode_text(ours(TEXTS), normalize=True), theirs.encode_text(tokenizer(TEXTS), True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert torch.equal(own.logit_scale, theirs.logit_scale)


def test_the_preprocessing_is_the_same(both):
    (own, transform, _), (theirs, other, _) = both
    picture = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    assert torch.equal(transform(picture), other(picture))
    assert own.visual.preprocess_cfg == theirs.visual.preprocess_cfg


def test_random_weights_of_the_architecture_give_the_same_as_well():
    architecture = read_model(MINI).architecture
    torch.manual_seed(0)
    theirs = build_architecture(architecture).eval()
    for module in theirs.modules():  # a norm that has seen nothing changes nothing
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    own = lite.build(architecture).eval()
    own.load_state_dict(theirs.state_dict())
    pictures, ids = torch.randn(2, 3, 70, 64), ClipTokens(77)(TEXTS)
    with torch.inference_mode():
        for found, wanted in (
            (own.encode_image(pictures), theirs.encode_image(pictures)),
            (own.encode_text(ids), theirs.encode_text(ids)),
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "quick_gelu"},
        {"builder": "siglip"},
        {"config": {"embed_dim": 8}},
        {"vision": {"timm_model_name": "tf_efficientnet_lite1"}},
        {"vision": {"timm_pool": "abs_attn"}},
        {"vision": {"timm_drop": 0.1}},
        {"text": {"no_causal_mask": True}},
    ],
)
def test_another_architecture_is_left_to_open_clip(change):
    architecture = read_model(MINI).architecture
    assert fits(architecture)
    config = dict(architecture.config)
    for part in ("vision", "text"):
        config[f"{part}_cfg"] = config[f"{part}_cfg"] | change.get(part, {})
    update = {"config": config} | {name: value for name, value in change.items() if name not in ("vision", "text")}
    assert not fits(architecture.model_copy(update=update))


def test_a_folder_and_other_models_are_left_to_open_clip(tmp_path):
    assert load_lite(tmp_path) is None
    assert load_lite("biomedclip-demo") is None
    assert load_lite("no-such-model") is None


def test_a_picture_is_classified_without_open_clip_timm_torchvision_or_transformers():
    said, loaded = run_fresh(
        "from biomedclip.cli import app\n"
        "app(['classify', 'sample://xray', '--labels', 'a chest X-ray,a blood cell'], standalone_mode=False)"
    )
    assert "a chest X-ray" in said
    heavy = {"open_clip", "timm", "torchvision", "transformers", "lightning", "scipy", "sklearn", "pandas"}
    assert loaded & heavy == set()


def test_a_fast_classifier_folds_these_towers_as_it_folds_open_clips():
    noise = list(torch.randn(4, 64, 64, 3, generator=torch.Generator().manual_seed(2)).mul(40).add(120).byte())
    own, theirs = (Encoder(MINI, fast=True, lite=lite) for lite in (True, False))
    assert [type(encoder.model).__name__ for encoder in (own, theirs)] == ["LiteClip", "CustomTextCLIP"]
    assert not [m for m in own.model.visual.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    np.testing.assert_allclose(own.encode(noise), theirs.encode(noise), atol=1e-5)
