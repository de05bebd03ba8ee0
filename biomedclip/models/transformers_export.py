"""A loaded model as a folder that transformers reads: AutoModel, AutoProcessor, zero-shot pipeline.

Reads a model with its architecture, image steps and tokenizer; writes `config.json`, `model.safetensors`, the image
processor's and the tokenizer's files. CLIP's own towers become transformers' CLIPModel and SigLIP's a SiglipModel. A
ViT beside a BERT (BiomedCLIP, UniMed-CLIP) has no class there and brings `modeling_dual_encoder.py` with it. What
neither holds, or an image pipeline that no processor of transformers can say, is refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.errors import CheckpointError
from biomedclip.files import split_lines, write_bytes, write_json, write_text
from biomedclip.models.build import Parts
from biomedclip.models.preprocess import ImageTransform, open_clip_config

if TYPE_CHECKING:
    from torch import Tensor, nn

CODE_FILE = "modeling_dual_encoder.py"


def export_transformers(model: nn.Module, parts: Parts, folder: str | Path) -> Path:
    """Write a loaded model to `folder` in transformers' format and return it. Raises CheckpointError where transformers
    has no words for it."""
    from safetensors.torch import save

    folder = Path(folder)
    processor = image_processor_config(parts.transform, parts.where)
    tensors, config = _express(model, parts)
    if "auto_map" in config:
        code = (resources.files("biomedclip.models") / CODE_FILE).read_text(encoding="utf-8")
        write_text(folder / CODE_FILE, code)
        processor["processor_class"] = "VisionTextDualEncoderProcessor"
        _write_bert_tokenizer(parts, folder)
    elif config["model_type"] == "siglip":
        processor["image_processor_type"], processor["processor_class"] = "SiglipImageProcessor", "SiglipProcessor"
        _copy_tokenizer(parts, folder)
    else:
        processor["processor_class"] = "CLIPProcessor"
        _write_clip_tokenizer(config["text_config"]["max_position_embeddings"], folder)
    write_json(folder / "preprocessor_config.json", processor)
    write_bytes(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_json(folder / "config.json", config)
    return folder


def image_processor_config(transform: ImageTransform, where: str) -> dict[str, Any]:
    """transformers' words for the image steps. Raises CheckpointError where its processors cannot do them."""
    said = open_clip_config(transform)
    if said is None or said["resize_mode"] not in ("shortest", "squash") or said["size"][0] != said["size"][1]:
        raise CheckpointError(
            where, "has image steps that no processor of transformers can do", found=transform,
            todo="export it to open_clip, or keep using biomedclip.load",
        )  # fmt: skip
    side = said["size"][0]
    squash = said["resize_mode"] == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"height": side, "width": side} if squash else {"shortest_edge": side},
        "resample": 3 if said["interpolation"] == "bicubic" else 2, "do_center_crop": not squash,
        "crop_size": {"height": side, "width": side}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(said["mean"]), "image_std": list(said["std"]),
    }  # fmt: skip


def _express(model: nn.Module, parts: Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config, state = parts.architecture.config, model.state_dict()
    if parts.architecture.builder == "siglip":
        return _as_siglip(state, config)
    plain = parts.architecture.builder == "open_clip" and not set(config) - {"embed_dim", "vision_cfg", "text_cfg"}
    if plain and "hf_model_name" in config["text_cfg"]:
        bert = (parts.architecture.text_config or {}).get("model_type") == "bert"
        mlp = config["text_cfg"].get("hf_proj_type") == "mlp"
        pooled = config["text_cfg"].get("hf_pooler_type") == "cls_last_hidden_state_pooler"
        if bert and mlp and pooled:
            return _as_dual_encoder(model, state, parts)
    elif plain and isinstance(config["vision_cfg"].get("layers"), int) and _is_plain_clip(config):
        return _as_clip(state, config, parts.architecture.activation)
    raise CheckpointError(parts.where, "has towers that transformers cannot express", found=parts.architecture.builder,
                          todo="export it to open_clip, or keep using biomedclip.load")  # fmt: skip


_PLAIN_VISION = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
_PLAIN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}


def _is_plain_clip(config: Mapping[str, Any]) -> bool:
    return set(config["vision_cfg"]) <= _PLAIN_VISION and set(config["text_cfg"]) <= _PLAIN_TEXT


def _as_clip(
    state: Mapping[str, Tensor], config: Mapping[str, Any], activation: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    vision, text = config["vision_cfg"], config["text_cfg"]
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        for name, part in _clip_key(key, tensor):
            tensors[name] = part.detach().cpu().contiguous().clone()
    hidden_act = "quick_gelu" if activation == "quick_gelu" else "gelu"
    width, hidden = text.get("width", 512), vision.get("width", 768)
    return tensors, {
        "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": config["embed_dim"],
        "logit_scale_init_value": 2.6592,
        "text_config": {
            "model_type": "clip_text_model", "hidden_size": width, "projection_dim": config["embed_dim"],
            "intermediate_size": int(width * text.get("mlp_ratio", 4)), "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8), "vocab_size": text.get("vocab_size", 49408),
            "max_position_embeddings": text.get("context_length", 77), "hidden_act": hidden_act,
            "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": hidden, "projection_dim": config["embed_dim"],
            "intermediate_size": int(hidden * vision.get("mlp_ratio", 4)), "num_hidden_layers": vision["layers"],
            "num_attention_heads": hidden // vision.get("head_width", 64), "image_size": vision.get("image_size", 224),
            "patch_size": vision.get("patch_size", 16), "hidden_act": hidden_act,
        },
    }  # fmt: skip


_CLIP_NAMES = (
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
    (r"^token_embedding\.weight$", "text_model.embeddings.token_embedding.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.weight$", "vision_model.embeddings.patch_embedding.weight"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # spelled so there
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.proj$", "visual_projection.weight"),
)


def _clip_key(key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """transformers' key(s) for one of open_clip's; the fused q, k, v become three."""
    name = key
    for pattern, to in _CLIP_NAMES:
        name = re.sub(pattern, to, name)
    if name in ("text_projection.weight", "visual_projection.weight"):
        tensor = tensor.t()
    fused = re.fullmatch(r"(.+\.self_attn)\.in_proj_(weight|bias)", name)
    if fused is None:
        return [(name, tensor)]
    return [
        (f"{fused.group(1)}.{letter}_proj.{fused.group(2)}", part)
        for letter, part in zip("qkv", tensor.chunk(3), strict=True)
    ]


def _as_siglip(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {}
    for key, tensor in state.items():
        name = re.sub(r"^visual\.trunk\.", "vision_model.", re.sub(r"^text\.trunk\.", "text_model.", key))
        value = tensor.reshape(1) if name in ("logit_scale", "logit_bias") else tensor
        tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, {
        "model_type": "siglip", "architectures": ["SiglipModel"],
        "text_config": {"model_type": "siglip_text_model", **config["text"]},
        "vision_config": {"model_type": "siglip_vision_model", **config["vision"]},
    }  # fmt: skip


_TIMM_NAMES = (
    (r"^visual\.trunk\.patch_embed\.proj\.", "vision.patch."),
    (r"^visual\.trunk\.blocks\.(\d+)\.(attn|mlp)\.", r"vision.blocks.\1."),
    (r"^visual\.trunk\.", "vision."),
    (r"^visual\.head\.proj\.", "vision.proj."),
)
_VIT_NAMES = (
    (r"^visual\.conv1\.", "vision.patch."),
    (r"^visual\.class_embedding$", "vision.cls_token"),
    (r"^visual\.positional_embedding$", "vision.pos_embed"),
    (r"^visual\.ln_pre\.", "vision.pre_norm."),
    (r"^visual\.ln_post\.", "vision.norm."),
    (r"^visual\.proj$", "vision.proj.weight"),
    (r"^visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.", r"vision.blocks.\1.norm\2."),
    (r"^visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$", r"vision.blocks.\1.qkv.\2"),
    (r"^visual\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"vision.blocks.\1.proj."),
    (r"^visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"vision.blocks.\1.fc1."),
    (r"^visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"vision.blocks.\1.fc2."),
)


def _as_dual_encoder(
    model: nn.Module, state: Mapping[str, Tensor], parts: Parts
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = parts.architecture.config
    visual: Any = model.visual
    names: tuple[tuple[str, str], ...]
    if config["vision_cfg"].get("timm_model_name"):
        vision, names = _describe_timm(visual, parts.where), _TIMM_NAMES
    elif set(config["vision_cfg"]) <= _PLAIN_VISION:
        vision, names = _describe_vit(config["vision_cfg"], parts.architecture.activation), _VIT_NAMES
    else:
        raise CheckpointError(parts.where, "has an image tower that the exported code cannot express",
                              todo="export it to open_clip")  # fmt: skip
    tensors = {}
    for key, tensor in state.items():
        name = re.sub(r"^text\.transformer\.", "text.", re.sub(r"^text\.proj\.", "text_proj.", key))
        for pattern, to in names:
            name = re.sub(pattern, to, name)
        value = tensor.t() if key == "visual.proj" else tensor
        if name == "vision.cls_token" or name == "vision.pos_embed":
            value = value.reshape(1, -1, vision["width"])
        tensors[name] = value.detach().cpu().contiguous().clone()
    text = {key: value for key, value in (parts.architecture.text_config or {}).items() if key != "model_type"}
    width = text["hidden_size"]
    module = CODE_FILE.removesuffix(".py")
    return tensors, {
        "model_type": "biomedclip_dual_encoder", "architectures": ["DualEncoder"],
        "projection_dim": config["embed_dim"], "vision": vision,
        "text": {**text, "hidden": (width + config["embed_dim"]) // 2},
        "auto_map": {
            "AutoConfig": f"{module}.DualEncoderConfig", "AutoModel": f"{module}.DualEncoder",
            "AutoModelForZeroShotImageClassification": f"{module}.DualEncoder",
        },
    }  # fmt: skip


def _describe_timm(visual: Any, where: str) -> dict[str, Any]:
    from timm.models.vision_transformer import VisionTransformer

    trunk = visual.trunk
    block: Any = trunk.blocks[0] if isinstance(trunk, VisionTransformer) else None
    plain = block is not None and trunk.global_pool == "token" and trunk.cls_token is not None and not (
        hasattr(block.ls1, "gamma") or trunk.reg_token is not None)  # fmt: skip
    if not plain:
        raise CheckpointError(where, "has an image tower that the exported code cannot express",
                              found=type(trunk).__name__, todo="export it to open_clip")  # fmt: skip
    return {
        "width": trunk.embed_dim, "layers": len(trunk.blocks), "heads": trunk.blocks[0].attn.num_heads,
        "hidden": trunk.blocks[0].mlp.fc1.out_features, "patch_size": trunk.patch_embed.patch_size[0],
        "image_size": trunk.patch_embed.img_size[0], "eps": trunk.norm.eps,
    }  # fmt: skip


def _describe_vit(vision: Mapping[str, Any], activation: str) -> dict[str, Any]:
    width = vision.get("width", 768)
    return {
        "width": width, "layers": vision.get("layers", 12), "heads": width // vision.get("head_width", 64),
        "hidden": int(width * vision.get("mlp_ratio", 4)), "patch_size": vision.get("patch_size", 16),
        "image_size": vision.get("image_size", 224), "eps": 1e-5, "patch_bias": False, "pre_norm": True,
        "quick_gelu": activation == "quick_gelu",
    }  # fmt: skip


def _write_clip_tokenizer(context: int, folder: Path) -> None:
    """CLIP's byte pairs as transformers' files; it spells the two special tokens with bars."""
    from transformers import CLIPTokenizer

    from biomedclip.tokens import END, START, clip_vocabulary

    vocabulary, merges = clip_vocabulary()
    bars = {START: "<|startoftext|>", END: "<|endoftext|>"}
    tokenizer = CLIPTokenizer(
        vocab={bars.get(token, token): number for token, number in vocabulary.items()},
        merges=merges,  # type: ignore[arg-type]
        model_max_length=context,
    )
    tokenizer.save_pretrained(str(folder))


def _write_bert_tokenizer(parts: Parts, folder: Path) -> None:
    from transformers import BertTokenizer

    if "vocab.txt" not in parts.companions:
        raise CheckpointError(parts.where, "was loaded without its vocab.txt", todo="load it with its vocabulary")
    words = split_lines(parts.companions["vocab.txt"].read_text(encoding="utf-8"))
    facts: Any = getattr(parts.tokenise, "facts", None)
    tokenizer = BertTokenizer(
        vocab={word: number for number, word in enumerate(words)}, do_lower_case=facts.lower,
        model_max_length=facts.context,
    )  # fmt: skip
    tokenizer.save_pretrained(str(folder))


def _copy_tokenizer(parts: Parts, folder: Path) -> None:
    for name, path in parts.companions.items():
        write_bytes(folder / name, path.read_bytes())
