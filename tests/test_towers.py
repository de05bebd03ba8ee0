"""Our towers against other implementations: published names in, through the zoo's rules, equal embeddings out."""

from __future__ import annotations

import copy

import pytest
import torch
import tower_references as references
from checkpoint_layouts import shrunk
from small_models import load_small, pictures, same, sentences
from torch.nn import functional as F

from biomedclip.errors import ConfigError
from biomedclip.models.build import build_architecture
from biomedclip.models.convert import convert
from biomedclip.models.zoo import read_model

SMALL_BERT = {**references.BERT}
SMALL_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 4}
SMALL_SWIN = {"embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
SMALL_RESNET = {"layers": [1, 1, 1, 1]}


def small_config(name: str, **changes) -> dict:
    """The zoo's config of a model with other sizes, and nothing else changed."""
    config = copy.deepcopy(read_model(name).architecture.config)
    for section, values in changes.items():
        if isinstance(values, dict):
            options = config[section].get("options", {}) | values.get("options", {})
            config[section] = config[section] | values | ({"options": options} if options else {})
        else:
            config[section] = values
    return config


CASES = {
    "keep": (
        references.Keep, 32,
        {"embed_dim": 24, "vision": {"image_size": 32, "options": SMALL_VIT},
         "text": SMALL_BERT | {"hidden_size": 24}},
    ),
    "flair": (references.Flair, 64, {"embed_dim": 16, "vision": {"options": SMALL_RESNET}, "text": SMALL_BERT}),
    "retizero": (
        references.RetiZero, 32,
        {"embed_dim": 16, "vision": {"image_size": 32, "options": SMALL_VIT}, "text": SMALL_BERT},
    ),
    "medclip-resnet": (
        references.MedClipResNet, 64, {"embed_dim": 16, "vision": {"options": SMALL_RESNET}, "text": SMALL_BERT},
    ),
    "medclip-vit": (
        references.MedClipViT, 224, {"embed_dim": 16, "vision": {"options": SMALL_SWIN}, "text": SMALL_BERT},
    ),
    "cxr-clip-swin-mcc": (
        references.CxrClipSwin, 224, {"embed_dim": 16, "vision": {"options": SMALL_SWIN}, "text": SMALL_BERT},
    ),
    "cxr-clip-r50-mcc": (
        references.CxrClipResNet, 64, {"embed_dim": 16, "vision": {"options": SMALL_RESNET}, "text": SMALL_BERT},
    ),
    "biovil": (
        lambda: references.BioVil(temporal=False), 64,
        {"embed_dim": 16, "vision": {"options": SMALL_RESNET}, "text": SMALL_BERT},
    ),
    "biovil-t": (
        lambda: references.BioVil(temporal=True), 64,
        {"embed_dim": 16, "vision": {"temporal_dim": 12, "options": SMALL_RESNET}, "text": SMALL_BERT},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_embeddings_are_those_of_another_implementation(name):
    make, size, changes = CASES[name]
    reference = references.shake(make())
    tensors = reference.published() if hasattr(reference, "published") else reference.state_dict()
    model = load_small(name, small_config(name, **changes), tensors)
    images, (ids, mask) = pictures(size), sentences()
    with torch.no_grad():
        same(model.encode_image(images), reference.image(images))
        # One sentence at a time: the published averages count the padding of a batch.
        alone = [
            reference.sentence(ids[i : i + 1, : mask[i].sum()], mask[i : i + 1, : mask[i].sum()]) for i in range(3)
        ]
        same(model.encode_text(ids), torch.cat(alone))
        torch.testing.assert_close(model.encode_text(ids, normalize=True).norm(dim=-1), torch.ones(3))
    expected = getattr(reference, "logit_scale", None)
    assert model.logit_scale.item() == pytest.approx(expected.item() if expected is not None else 0.0)
    assert model.logit_bias is None


@pytest.mark.parametrize("name", ["medclip-vit", "retizero"])
def test_the_published_average_over_padding_can_be_asked_for(name):
    make, _, changes = CASES[name]
    reference = references.shake(make())
    config = small_config(name, **(changes | {"text": SMALL_BERT | {"mean_over_padding": True}}))
    tensors = reference.published() if hasattr(reference, "published") else reference.state_dict()
    model = load_small(name, config, tensors)
    ids, mask = sentences()
    with torch.no_grad():
        same(model.encode_text(ids), reference.sentence(ids, mask))
        assert (model.encode_text(ids)[2] - model.encode_text(ids[2:, :3])[0]).abs().max() > 1e-3


@pytest.mark.parametrize("attended", [False, True])
def test_pmc_clip_with_and_without_the_mask_of_padding(attended):
    bert = references.shake(references.bert())
    options = {"layers": [1, 1, 1, 1], "width": 8, "heads": 4}
    config = small_config(
        "pmc-clip", embed_dim=16, vision={"image_size": 64, "options": options},
        text=SMALL_BERT | {"attention_mask": attended},
    )  # fmt: skip
    shapes = build_architecture(read_model("pmc-clip").architecture.model_copy(update={"config": config})).visual
    image = {key: tensor.clone() for key, tensor in references.shake(shapes, seed=3).state_dict().items()}
    projection = torch.randn(32, 16, generator=torch.Generator().manual_seed(4)) / 8
    tensors = {f"visual.{key}": tensor for key, tensor in image.items()}
    tensors |= {f"text.trunk.{key}": tensor for key, tensor in bert.state_dict().items()}
    model = load_small("pmc-clip", config, tensors | {"text.head.proj.weight": projection})
    images, (ids, mask) = pictures(64), sentences()
    with torch.no_grad():
        same(model.encode_image(images), references.clip_resnet(image, images, heads=4))
        states = bert(input_ids=ids, attention_mask=mask if attended else torch.ones_like(mask)).last_hidden_state
        same(model.encode_text(ids), states[:, 0] @ projection)
    assert model.logit_scale.item() == pytest.approx(4.4292)


def test_conch_is_a_vit_with_one_query_and_a_causal_text_with_a_class_token_behind():
    of = {768: 32, 512: 16, 2304: 96, 3072: 128, 1536: 48, 32007: 60, 785: 5, 128: 10}
    tensors = shrunk("conch", layers=2, of=of, special={})
    config = {
        "embed_dim": 16,
        "vision": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "heads": 4, "pooler_heads": 2},
        "text": {"context": 9, "vocab_size": 60, "width": 32, "layers": 2, "heads": 4},
    }
    model = load_small("conch", config, tensors)
    images, (ids, _) = pictures(32), sentences(60)
    with torch.no_grad():
        same(model.encode_image(images), references.conch_image(tensors, images, heads=4, pooler_heads=2, patch=16))
        same(model.encode_text(ids), references.conch_text(tensors, ids, heads=4))
        features = model.visual.embed_features(images)
        torch.testing.assert_close(features @ tensors["visual.proj_contrast"], model.encode_image(images))


def test_musk_s_two_towers_are_the_two_experts_of_one_multiway_transformer():
    of = {1024: 32, 4096: 128, 64010: 60, 579: 7}
    special = {"beit3.encoder.embed_positions.B.weight": (20, 32)}
    tensors = shrunk("musk", layers=2, of=of, special=special)
    config = {
        "width": 32, "layers": 2, "heads": 4, "image_size": 32, "patch_size": 16, "vocab_size": 60, "positions": 20,
        "context": 9,
    }  # fmt: skip
    model = load_small("musk", config, tensors)
    images, (ids, _) = pictures(32), sentences(60)
    ids = torch.where(ids == 0, 1, ids)
    with torch.no_grad():
        same(model.encode_image(images), references.musk(tensors, heads=4, images=images))
        same(model.encode_text(ids), references.musk(tensors, heads=4, ids=ids))
        torch.testing.assert_close(model.encode_text(ids[2:, :3])[0], model.encode_text(ids)[2], rtol=1e-4, atol=1e-6)


def test_lora_is_merged_exactly():
    rows, wide, rank = 6, 4, 2
    a, b = torch.randn(rank, wide), torch.randn(rows // 3, rank)
    base = torch.randn(rows, wide)
    prefix = "vision_model.model.lora_vit.blocks.0.attn.qkv."
    zero = {"linear_a_v": torch.zeros(rank, wide), "linear_b_v": torch.zeros(rows // 3, rank)}
    tensors = {f"{prefix}qkv.weight": base, f"{prefix}linear_a_q.weight": a, f"{prefix}linear_b_q.weight": b}
    tensors |= {f"{prefix}{name}.weight": value for name, value in zero.items()}
    rules = [rule for rule in read_model("retizero").keys.rules if rule.merge_lora or "visual.trunk" in (rule.to or "")]
    rules += [rule for rule in read_model("retizero").keys.rules if rule.to == ".attn.qkv."]
    rules.sort(key=lambda rule: rule.verb == "merge_lora")
    merged = convert(tensors, rules, "retizero")[0]["visual.trunk.blocks.0.attn.qkv.weight"]
    assert torch.equal(merged[:2], base[:2] + b @ a)
    assert torch.equal(merged[2:], base[2:])


@pytest.mark.parametrize("name", ["keep", "retizero", "cxr-clip-swin-mcc", "biovil-t"])
def test_an_embedding_does_not_depend_on_its_neighbours(name):
    _, size, changes = CASES[name]
    torch.manual_seed(0)
    config = small_config(name, **changes)
    model = build_architecture(read_model(name).architecture.model_copy(update={"config": config})).eval()
    images, (ids, mask) = pictures(size), sentences()
    with torch.no_grad():
        together, texts = model.encode_image(images), model.encode_text(ids)
        torch.testing.assert_close(model.encode_image(images[1:])[0], together[1], rtol=1e-3, atol=1e-5)
        for row in range(3):
            alone = model.encode_text(ids[row : row + 1, : mask[row].sum()])[0]
            torch.testing.assert_close(alone, texts[row], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["keep", "retizero", "biovil"])
def test_half_precision_changes_little(name):
    _, size, changes = CASES[name]
    torch.manual_seed(0)
    config = small_config(name, **changes)
    model = build_architecture(read_model(name).architecture.model_copy(update={"config": config})).eval()
    images, (ids, _) = pictures(size), sentences()
    with torch.no_grad():
        image, text = model.encode_image(images, normalize=True), model.encode_text(ids, normalize=True)
        half = model.to(torch.bfloat16)
        found = half.encode_image(images.bfloat16(), normalize=True), half.encode_text(ids, normalize=True)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    assert (found[0].float() * image).sum(-1).min() > 0.99
    assert (found[1].float() * text).sum(-1).min() > 0.99


def test_a_model_of_our_towers_trains_locks_and_checkpoints_like_open_clip_s():
    _, size, changes = CASES["keep"]
    config = small_config("keep", **changes)
    torch.manual_seed(0)
    model = build_architecture(read_model("keep").architecture.model_copy(update={"config": config}))
    model.set_grad_checkpointing(True)
    model.train()
    images, (ids, _) = pictures(size), sentences()
    image, text, scale = model(images, ids[:2])
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(2))
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    F.cross_entropy(scale * image @ text.T, torch.arange(2)).backward()
    assert all(p.grad is not None for n, p in model.visual.named_parameters())
    model.lock_image_tower()
    assert not any(p.requires_grad for p in model.visual.parameters())
    model.lock_text_tower(freeze_layer_norm=False)
    free = {name.split(".")[-2] for name, p in model.text.named_parameters() if p.requires_grad}
    assert free == {"LayerNorm"}
    model.lock_text_tower()
    assert not any(p.requires_grad for p in model.text.parameters())
    with pytest.raises(ConfigError, match="can only be locked as a whole"):
        model.lock_text_tower(unlocked_layers=2)


def test_a_locked_resnet_can_keep_its_running_means():
    _, size, changes = CASES["biovil"]
    config = small_config("biovil", **changes)
    torch.manual_seed(0)
    model = build_architecture(read_model("biovil").architecture.model_copy(update={"config": config}))
    model.lock_image_tower(freeze_bn_stats=True)
    before = {key: value.clone() for key, value in model.visual.state_dict().items()}
    model.train()
    model.encode_image(pictures(size))
    assert all(torch.equal(value, before[key]) for key, value in model.visual.state_dict().items())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("keep", {"vision": {"pool": "mean"}}, "vision.pool"),
        ("keep", {"text": {"pooling": "cls"}}, "text.pooling: unknown key; did you mean 'pool'?"),
        ("biovil", {"vision": {"image_size": "big"}}, "vision.image_size"),
        ("musk", {"width": None}, "width"),
    ],
)
def test_a_wrong_config_names_its_entry(name, change, message):
    with pytest.raises(ConfigError) as caught:
        build_architecture(read_model(name).architecture.model_copy(update={"config": small_config(name, **change)}))
    assert message in str(caught.value)
