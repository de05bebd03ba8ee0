"""Plain implementations of the released models' forward passes, written from their papers and public code.

Each is a function of a published state dict (or a module whose state dict has the published names) and shares no code
with `biomedclip.models`: what the towers give through the key rules is compared with it.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck, ResNet
from transformers import BertConfig, BertForMaskedLM, BertModel, SwinConfig, SwinModel

Tensors = dict[str, torch.Tensor]
BERT = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 512,
}  # fmt: skip


def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, so that no tensor can be left out or swapped unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
                tensor.copy_(1 + 0.2 * noise.abs())
            else:
                # Wide enough for a signal to pass a ResNet's ReLUs, narrow biases, so that inputs stay apart.
                gain = {4: 1.5, 2: 0.7}.get(tensor.ndim, 0.1)
                tensor.copy_(noise * gain / math.sqrt(tensor[0].numel() if tensor.ndim > 1 else 1))
    return module.eval()


def bert(**changes: int) -> BertModel:
    return BertModel(BertConfig(**(BERT | changes)))


def mean_of_three(model: BertModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """MedCLIP's, FLAIR's and RetiZero's pooling, padding and all."""
    states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return torch.stack([states[1], states[2], states[-1]]).permute(1, 0, 2, 3).mean(2).mean(1)


def resnet(width: int = 2048) -> ResNet:
    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=1000)


def unit(features: torch.Tensor) -> torch.Tensor:
    return features / features.norm(dim=-1, keepdim=True)


class Keep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = timm.models.VisionTransformer(
            img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=4, num_classes=0, init_values=1e-5
        )
        self.visual_head = nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 24))
        self.text = bert(hidden_size=24)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.04)))

    def image(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual_head(self.visual(images))

    def sentence(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.text(input_ids=ids, attention_mask=mask).pooler_output


class TextModel(nn.Module):
    """FLAIR's, RetiZero's and MedCLIP's text side; FLAIR's scales its features to length 1."""

    def __init__(self, head: str, scaled: bool) -> None:
        super().__init__()
        self.model, self.scaled, self.name = bert(), scaled, head
        self.add_module(head, _Projection(32, 16) if scaled else nn.Linear(32, 16, bias=False))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        features = mean_of_three(self.model, ids, mask)
        return getattr(self, self.name)(unit(features) if self.scaled else features)


class _Projection(nn.Module):
    def __init__(self, wide: int, narrow: int, bias: bool = False) -> None:
        super().__init__()
        self.projection = nn.Linear(wide, narrow, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.projection(features)


class _Side(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class _Pair(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))


class Flair(_Pair):
    def __init__(self) -> None:
        trunk = resnet()
        trunk.fc = nn.Identity()
        super().__init__(
            vision_model=_Side(model=trunk, projection_head_vision=_Projection(2048, 16)),
            text_model=TextModel("projection_head_text", scaled=True),
        )

    def image(self, images: torch.Tensor) -> torch.Tensor:
        return self.vision_model.projection_head_vision(unit(self.vision_model.model(images)))

    def sentence(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.text_model(ids, mask)


class _LoraQkv(nn.Module):
    """As in RetiZero: the query and value parts of a fused projection get a low-rank addition each."""

    def __init__(self, qkv: nn.Linear, rank: int) -> None:
        super().__init__()
        width = qkv.in_features
        self.qkv = qkv
        self.linear_a_q, self.linear_b_q = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        self.linear_a_v, self.linear_b_v = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(states).chunk(3, dim=-1)
        query = query + self.linear_b_q(self.linear_a_q(states))
        value = value + self.linear_b_v(self.linear_a_v(states))
        return torch.cat([query, key, value], dim=-1)


class RetiZero(_Pair):
    def __init__(self) -> None:
        vit = timm.models.VisionTransformer(
            img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=4, num_classes=0
        )
        for block in vit.blocks:
            block.attn.qkv = _LoraQkv(block.attn.qkv, rank=3)
        super().__init__(
            vision_model=_Side(model=_Side(lora_vit=vit), projection_head_vision=_Projection(32, 16)),
            text_model=TextModel("projection_head_text", scaled=True),
        )

    def image(self, images: torch.Tensor) -> torch.Tensor:
        return self.vision_model.projection_head_vision(unit(self.vision_model.model.lora_vit(images)))

    def sentence(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.text_model(ids, mask)


class MedClipResNet(_Pair):
    def __init__(self) -> None:
        trunk = resnet()
        trunk.fc = nn.Linear(2048, 16, bias=False)
        super().__init__(vision_model=_Side(model=trunk), text_model=TextModel("projection_head", scaled=False))

    def image(self, images: torch.Tensor) -> torch.Tensor:
        return self.vision_model.model(images)

    def sentence(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.text_model(ids, mask)


def swin() -> SwinModel:
    return SwinModel(SwinConfig(embed_dim=12, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8]))


def as_saved(model: nn.Module, prefix: str) -> Tensors:
    """The state dict in the names that transformers writes to a file, which are those of the published checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        held = load_file(Path(folder) / "model.safetensors")
    return {prefix + key: tensor.clone() for key, tensor in held.items()}


class MedClipViT(_Pair):
    def __init__(self) -> None:
        super().__init__(
            vision_model=_Side(model=swin(), projection_head=nn.Linear(96, 16, bias=False)),
            text_model=TextModel("projection_head", scaled=False),
        )

    def image(self, images: torch.Tensor) -> torch.Tensor:
        return self.vision_model.projection_head(self.vision_model.model(images).pooler_output)

    def sentence(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.text_model(ids, mask)

    def published(self) -> Tensors:
        rest = {k: v for k, v in self.state_dict().items() if not k.startswith("vision_model.model.")}
        return rest | as_saved(self.vision_model.model, "vision_model.model.")


class _CxrClip(_Pair):
    def sentence(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.text_encoder.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.text_projection(states[torch.arange(len(ids)), mask.sum(-1) - 1])


class CxrClipSwin(_CxrClip):
    def __init__(self) -> None:
        super().__init__(
            image_encoder=_Side(image_encoder=swin()), image_projection=_Projection(96, 16, bias=True),
            text_encoder=_Side(text_encoder=bert()), text_projection=_Projection(32, 16, bias=True),
        )  # fmt: skip

    def image(self, images: torch.Tensor) -> torch.Tensor:
        return self.image_projection(self.image_encoder.image_encoder(images).last_hidden_state[:, 0])

    def published(self) -> Tensors:
        rest = {k: v for k, v in self.state_dict().items() if not k.startswith("image_encoder.")}
        return rest | as_saved(self.image_encoder.image_encoder, "image_encoder.image_encoder.")


class CxrClipResNet(_CxrClip):
    def __init__(self) -> None:
        trunk = resnet()
        trunk.fc = nn.Identity()
        super().__init__(
            image_encoder=_Side(resnet=trunk), image_projection=_Projection(2048, 16, bias=True),
            text_encoder=_Side(text_encoder=bert()), text_projection=_Projection(32, 16, bias=True),
        )  # fmt: skip

    def image(self, images: torch.Tensor) -> torch.Tensor:
        return self.image_projection(self.image_encoder.resnet(images))


class _CxrBertHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense_to_hidden = nn.Linear(32, 16)
        self.LayerNorm = nn.LayerNorm(16, eps=1e-12)
        self.dense_to_output = nn.Linear(16, 16)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.dense_to_output(self.LayerNorm(F.gelu(self.dense_to_hidden(states))))


class BioVil(nn.Module):
    """Both halves of BioViL or, with `temporal`, of BioViL-T for one image; two files, as published."""

    def __init__(self, temporal: bool) -> None:
        super().__init__()
        self.encoder, self.temporal = _Side(encoder=resnet()), temporal
        wide = 2048
        if temporal:
            wide = 24
            self.encoder.backbone_to_vit = nn.Conv2d(2048, 12, 1, bias=False)
            self.encoder.missing_previous_emb = nn.Parameter(torch.zeros(1, 12, 1, 1))
            self.encoder.vit_pooler = _Side(norm_post=nn.LayerNorm(12))
        self.projector = _Side(
            model=nn.Sequential(nn.Conv2d(wide, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
        )
        self.text = BertForMaskedLM(BertConfig(**BERT))
        self.text.cls_projection_head = _CxrBertHead()

    def image(self, images: torch.Tensor) -> torch.Tensor:
        trunk = self.encoder.encoder
        x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(images))))
        x = trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(x))))
        if self.temporal:
            x = self.encoder.backbone_to_vit(x)
            count, _, tall, wide = x.shape
            x = torch.cat([x, self.encoder.missing_previous_emb.repeat(count, 1, tall, wide)], dim=1)
        return self.projector.model(x).mean(dim=(2, 3))

    def sentence(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.text.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.text.cls_projection_head(states[:, 0])

    def published(self) -> Tensors:
        """Under the prefixes that the zoo gives the two files."""
        held = {k: v for k, v in self.state_dict().items() if not k.startswith("text.")}
        text = {f"text.{key}": value for key, value in self.text.state_dict().items()}
        return {f"visual.{key}": value for key, value in held.items()} | text


def clip_resnet(state: Tensors, images: torch.Tensor, heads: int) -> torch.Tensor:
    """OpenAI's ModifiedResNet from its state dict: three convolutions, blurred strides, attention pooling."""

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.batch_norm(x, *(state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    x = F.relu(normed(F.conv2d(images, state["conv1.weight"], stride=2, padding=1), "bn1"))
    x = F.relu(normed(F.conv2d(x, state["conv2.weight"], padding=1), "bn2"))
    x = F.avg_pool2d(F.relu(normed(F.conv2d(x, state["conv3.weight"], padding=1), "bn3")), 2)
    for stage in range(1, 5):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in state:
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.relu(normed(F.conv2d(x, state[f"{name}.conv1.weight"]), f"{name}.bn1"))
            y = F.relu(normed(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2"))
            y = F.avg_pool2d(y, stride) if stride > 1 else y
            y = normed(F.conv2d(y, state[f"{name}.conv3.weight"]), f"{name}.bn3")
            if f"{name}.downsample.0.weight" in state:
                x = F.avg_pool2d(x, stride) if stride > 1 else x
                x = normed(F.conv2d(x, state[f"{name}.downsample.0.weight"]), f"{name}.downsample.1")
            x, block = F.relu(x + y), block + 1
    patches = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([patches.mean(1, keepdim=True), patches], dim=1) + state["attnpool.positional_embedding"]
    query, key, value = (
        F.linear(part, state[f"attnpool.{name}_proj.weight"], state[f"attnpool.{name}_proj.bias"])
        for name, part in (("q", tokens[:, :1]), ("k", tokens), ("v", tokens))
    )
    mixed = attend(query, key, value, heads, torch.zeros(1, 1, 1, tokens.shape[1]))
    return F.linear(mixed[:, 0], state["attnpool.c_proj.weight"], state["attnpool.c_proj.bias"])


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, mask: torch.Tensor) -> torch.Tensor:
    """Multi-head attention over (B, L, W) with an additive mask that broadcasts to (B, heads, Q, K)."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def layer_norm(state: Tensors, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(state: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def conch_image(state: Tensors, images: torch.Tensor, *, heads: int, pooler_heads: int, patch: int) -> torch.Tensor:
    """CONCH's image side: a pre-norm ViT, then one learned query over all its tokens."""
    trunk = "visual.trunk"
    x = F.conv2d(images, state[f"{trunk}.patch_embed.proj.weight"], state[f"{trunk}.patch_embed.proj.bias"], patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{trunk}.cls_token"].expand(len(x), -1, -1), x], dim=1) + state[f"{trunk}.pos_embed"]
    for index in range(sum(key.endswith("attn.qkv.weight") for key in state)):
        block = f"{trunk}.blocks.{index}"
        query, key, value = linear(state, f"{block}.attn.qkv", layer_norm(state, f"{block}.norm1", x, 1e-6)).chunk(
            3, -1
        )
        x = x + linear(state, f"{block}.attn.proj", attend(query, key, value, heads, torch.zeros(1)))
        inner = F.gelu(linear(state, f"{block}.mlp.fc1", layer_norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + linear(state, f"{block}.mlp.fc2", inner)
    x = layer_norm(state, f"{trunk}.norm", x, 1e-6)
    pool = "visual.attn_pool_contrast"
    keys = layer_norm(state, f"{pool}.ln_k", x, 1e-5)
    query = layer_norm(state, f"{pool}.ln_q", state[f"{pool}.query"], 1e-5).expand(len(x), -1, -1)
    biases = state[f"{pool}.attn.in_proj_bias"].chunk(3)
    query, key, value = (
        F.linear(part, state[f"{pool}.attn.{name}_proj_weight"], bias)
        for name, part, bias in zip("qkv", (query, keys, keys), biases, strict=True)
    )
    pooled = linear(state, f"{pool}.attn.out_proj", attend(query, key, value, pooler_heads, torch.zeros(1)))[:, 0]
    return layer_norm(state, "visual.ln_contrast", pooled, 1e-5) @ state["visual.proj_contrast"]


def conch_text(state: Tensors, ids: torch.Tensor, *, heads: int) -> torch.Tensor:
    """CONCH's text side. The mask of padding stands one position to the right of the tokens it belongs to."""
    x = state["text.token_embedding.weight"][ids]
    x = torch.cat([x, state["text.cls_emb"].expand(len(ids), 1, -1)], dim=1) + state["text.positional_embedding"]
    length = x.shape[1]
    mask = torch.full((length, length), -math.inf).triu(1).repeat(len(ids), 1, 1)
    for row, sentence in enumerate(ids):
        for position, token in enumerate(sentence):
            if token == 0:
                mask[row, :, position + 1] = -math.inf
    for index in range(sum(key.endswith("attn.in_proj_weight") and key.startswith("text.") for key in state)):
        block = f"text.transformer.resblocks.{index}"
        normed = layer_norm(state, f"{block}.ln_1", x, 1e-5)
        fused = F.linear(normed, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"])
        mixed = attend(*fused.chunk(3, -1), heads, mask.unsqueeze(1))
        x = x + linear(state, f"{block}.attn.out_proj", mixed)
        inner = F.gelu(linear(state, f"{block}.mlp.c_fc", layer_norm(state, f"{block}.ln_2", x, 1e-5)))
        x = x + linear(state, f"{block}.mlp.c_proj", inner)
    return layer_norm(state, "text.ln_final", x[:, -1], 1e-5) @ state["text.text_projection"]


def musk(
    state: Tensors, *, heads: int, images: torch.Tensor | None = None, ids: torch.Tensor | None = None
) -> torch.Tensor:
    """MUSK as a multiway transformer: expert A for an image, expert B for a text, chosen at every layer by name."""
    eps, expert = 1e-5, "A" if images is not None else "B"
    if images is not None:
        weight, bias = (state[f"beit3.vision_embed.proj.{part}"] for part in ("weight", "bias"))
        x = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
        x = torch.cat([state["beit3.vision_embed.cls_token"].expand(len(x), -1, -1), x], dim=1)
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    else:
        x, padding = state["beit3.text_embed.weight"][ids], ids == 1
    x = x + state[f"beit3.encoder.embed_positions.{expert}.weight"][2 : 2 + x.shape[1]]
    x = x * (1 - padding.float()).unsqueeze(-1)
    mask = torch.zeros(padding.shape).masked_fill(padding, -math.inf)[:, None, None, :]
    for index in range(sum(key.endswith("self_attn.q_proj.A.weight") for key in state)):
        layer = f"beit3.encoder.layers.{index}"
        normed = layer_norm(state, f"{layer}.self_attn_layer_norm.{expert}", x, eps)
        parts = (linear(state, f"{layer}.self_attn.{name}_proj.{expert}", normed) for name in "qkv")
        mixed = layer_norm(state, f"{layer}.self_attn.inner_attn_ln.{expert}", attend(*parts, heads, mask), eps)
        x = x + linear(state, f"{layer}.self_attn.out_proj.{expert}", mixed)
        normed = layer_norm(state, f"{layer}.final_layer_norm.{expert}", x, eps)
        inner = F.gelu(linear(state, f"{layer}.ffn.{expert}.fc1", normed))
        inner = layer_norm(state, f"{layer}.ffn.{expert}.ffn_layernorm", inner, eps)
        x = x + linear(state, f"{layer}.ffn.{expert}.fc2", inner)
    first = layer_norm(state, f"beit3.encoder.layer_norm.{expert}", x, eps)[:, 0]
    return linear(state, "vision_head" if images is not None else "language_head", first)


def clip(
    state: Tensors, *, heads: int, quick: bool, images: torch.Tensor | None = None, ids: torch.Tensor | None = None
) -> torch.Tensor:
    """OpenAI's CLIP from its state dict; `quick` is its approximation of GELU, x * sigmoid(1.702 x)."""

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x) if quick else F.gelu(x)

    side = "visual." if images is not None else ""
    if images is not None:
        weight = state["visual.conv1.weight"]
        x = F.conv2d(images, weight, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
        x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
        x = layer_norm(state, "visual.ln_pre", x + state["visual.positional_embedding"], 1e-5)
        mask = torch.zeros(1)
    else:
        x = state["token_embedding.weight"][ids] + state["positional_embedding"]
        mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
    for index in range(sum(key.startswith(f"{side}transformer.") and key.endswith("in_proj_weight") for key in state)):
        block = f"{side}transformer.resblocks.{index}"
        normed = layer_norm(state, f"{block}.ln_1", x, 1e-5)
        fused = F.linear(normed, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"])
        x = x + linear(state, f"{block}.attn.out_proj", attend(*fused.chunk(3, -1), heads, mask))
        inner = gelu(linear(state, f"{block}.mlp.c_fc", layer_norm(state, f"{block}.ln_2", x, 1e-5)))
        x = x + linear(state, f"{block}.mlp.c_proj", inner)
    if images is not None:
        return layer_norm(state, "visual.ln_post", x[:, 0], 1e-5) @ state["visual.proj"]
    x = layer_norm(state, "ln_final", x, 1e-5)
    return x[torch.arange(len(x)), ids.argmax(-1)] @ state["text_projection"]


def biomed_text(state: Tensors, ids: torch.Tensor, *, prefix: str, heads: int) -> torch.Tensor:
    """BiomedCLIP's and UniMed-CLIP's text side: [CLS] of a BERT under its mask, Linear, GELU, Linear."""
    held = {
        k.removeprefix(f"{prefix}transformer."): v for k, v in state.items() if k.startswith(f"{prefix}transformer.")
    }
    vocabulary, width = held["embeddings.word_embeddings.weight"].shape
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_attention_heads=heads,
        num_hidden_layers=sum(key.endswith("attention.self.query.weight") for key in held),
        intermediate_size=held["encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=len(held["embeddings.position_embeddings.weight"]),
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    held.pop("embeddings.position_ids", None)
    model.load_state_dict(held)
    first = model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state[:, 0]
    return F.gelu(first @ state[f"{prefix}proj.0.weight"].T) @ state[f"{prefix}proj.2.weight"].T
