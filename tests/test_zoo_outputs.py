"""Models in open_clip's and OpenAI's names: published names in, a plain CLIP's outputs out, activation included."""

import copy

import pytest
import timm
import torch
import tower_references as references
from checkpoint_layouts import shrunk
from small_models import load_small, pictures, same, sentences
from torch.nn import functional as F

from biomedclip.models.build import build_architecture
from biomedclip.models.catalog import list_names
from biomedclip.models.zoo import read_model

BASE = {768: 32, 2304: 96, 3072: 128, 512: 24, 1536: 72, 2048: 96, 49408: 60, 77: 9, 50: 5, 197: 5, 32: 16}
LARGE = {1024: 32, 3072: 96, 4096: 128, 768: 24, 2304: 72, 49408: 60, 77: 9, 117: 9, 257: 5, 577: 5}


def small_clip(name: str) -> tuple[dict, int, dict[int, int]]:
    """A model's open_clip config at small sizes, its image size, and what the published sizes became."""
    config = copy.deepcopy(read_model(name).architecture.config)
    large = config["vision_cfg"]["width"] == 1024
    patch = 14 if large else 16
    config["embed_dim"] = 24
    config["vision_cfg"] |= {"image_size": 2 * patch, "layers": 2, "width": 32, "patch_size": patch, "head_width": 8}
    return config, 2 * patch, LARGE if large else BASE


def kind(name: str) -> str:
    architecture = read_model(name).architecture
    config = architecture.config
    if architecture.builder != "open_clip" or "timm_model_name" in config["vision_cfg"]:
        return "other"
    if "hf_model_name" in config["text_cfg"]:
        return "bert"
    rules = read_model(name).keys.rules
    return "transformers" if any(rule.preset == "hf-clip" for rule in rules) else "openai"


def of_kind(wanted: str) -> list[str]:
    return [name for name in list_names() if kind(name) == wanted]


def eot_last() -> torch.Tensor:
    """Ids (3, 9) whose largest stands at the end of each text, as CLIP's end token does."""
    ids, mask = sentences(59)
    ids[torch.arange(3), mask.sum(1) - 1] = 59
    return ids


@pytest.mark.parametrize("name", of_kind("openai"))
def test_openai_s_layout_is_openai_s_clip(name):
    config, size, of = small_clip(name)
    config["text_cfg"] |= {"context_length": 9, "vocab_size": 60, "width": 24, "heads": 3, "layers": 2}
    tensors = shrunk(name, layers=2, of=of)
    model = load_small(name, config, tensors)
    plain = {key.removeprefix("module."): value for key, value in tensors.items()}
    quick = read_model(name).architecture.activation == "quick_gelu"
    images, ids = pictures(size), eot_last()
    with torch.no_grad():
        same(model.encode_image(images), references.clip(plain, heads=4, quick=quick, images=images))
        same(model.encode_text(ids), references.clip(plain, heads=3, quick=quick, ids=ids))
        other = references.clip(plain, heads=4, quick=not quick, images=images)
        assert (model.encode_image(images) - other).abs().max() > 1e-3, "the activation does not show"


@pytest.mark.parametrize("name", of_kind("bert"))
def test_a_clip_vit_with_biomedbert_and_two_linear_layers(name):
    config, size, of = small_clip(name)
    facts = read_model(name)
    wide = facts.architecture.text_config["hidden_size"]
    vision = facts.architecture.config["vision_cfg"]["width"]
    width = 32 if wide == vision else 24
    of = of | {30522: 60, 640: 28, 896: 28}
    text_config = facts.architecture.text_config | {
        "vocab_size": 60, "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 4 * width, "max_position_embeddings": of.get(512, 512),
    }  # fmt: skip
    tensors = shrunk(name, layers=2, of=of)
    tensors["module.text_encoder.proj.2.weight"] = torch.randn(24, (width + 24) // 2) / 5
    model = load_small(name, config, tensors, text_config=text_config)
    plain = {key.removeprefix("module."): value for key, value in tensors.items()}
    images, (ids, _) = pictures(size), sentences(60)
    with torch.no_grad():
        same(model.encode_image(images), references.clip(plain, heads=4, quick=True, images=images))
        same(model.encode_text(ids), references.biomed_text(plain, ids, prefix="text_encoder.", heads=4))


@pytest.mark.parametrize("name", ["biomedclip", pytest.param("quiltnet-b-16-pmb", marks=pytest.mark.slow)])
def test_a_timm_vit_with_pubmedbert(name):
    facts = read_model(name)
    config = copy.deepcopy(facts.architecture.config)
    config["embed_dim"], config["vision_cfg"]["timm_model_name"] = 24, "vit_tiny_patch16_224"
    text_config = facts.architecture.text_config | {
        "vocab_size": 60, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768,
        "max_position_embeddings": 24,
    }  # fmt: skip
    of = {768: 192, 2304: 576, 3072: 768, 512: 24, 640: 108, 30522: 60}
    tensors = shrunk(name, layers=12, of=of)
    model = load_small(name, config, tensors, text_config=text_config)
    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    trunk.load_state_dict(
        {k.removeprefix("visual.trunk."): v for k, v in tensors.items() if k.startswith("visual.trunk.")}
    )
    images, (ids, _) = pictures(224), sentences(60)
    with torch.no_grad():
        same(model.encode_image(images), F.linear(trunk(images), tensors["visual.head.proj.weight"]))
        same(model.encode_text(ids), references.biomed_text(tensors, ids, prefix="text.", heads=3))


@pytest.mark.slow
def test_echoclip_is_timm_s_convnext_beside_clip_s_text_tower():
    facts = read_model("echo-clip")
    torch.manual_seed(0)
    tensors = {
        key: value.clone()
        for key, value in references.shake(build_architecture(facts.architecture)).state_dict().items()
    }
    model = load_small("echo-clip", facts.architecture.config, tensors)
    trunk = timm.create_model("convnext_base", num_classes=0).eval()
    trunk.load_state_dict(
        {k.removeprefix("visual.trunk."): v for k, v in tensors.items() if k.startswith("visual.trunk.")}
    )
    images = pictures(224)
    ids = torch.zeros(2, 77, dtype=torch.int64)
    ids[0, :4], ids[1, :3] = torch.tensor([49406, 320, 1125, 49407]), torch.tensor([49406, 530, 49407])
    with torch.no_grad():
        same(model.encode_image(images), F.linear(trunk(images), tensors["visual.head.proj.weight"]))
        same(model.encode_text(ids), references.clip(tensors, heads=8, quick=False, ids=ids))
