"""Published keys to a model's keys, by the rules of its facts.

Reads `{key: tensor}` and a list of rules (the language stands in `biomedclip.models.zoo`), yields the renamed tensors
and a count of what was done. Rules work on tensors of the meta device too, so a file can be checked from its header.
A rule that finds nothing is an error: it is how a file of another model is told from the right one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from biomedclip.errors import CheckpointError
from biomedclip.models.zoo import Rule

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]


@dataclass(slots=True)
class Changes:
    """What the rules did to a file's keys."""

    renamed: int = 0
    """Keys of the model that have another name, or several sources, in the file."""
    dropped: list[str] = field(default_factory=list)
    """Keys of the file that were left out by a rule."""
    filled: list[str] = field(default_factory=list)
    """Keys of the model that came from a published constant."""


def convert(tensors: Mapping[str, Tensor], rules: Sequence[Rule], where: str) -> tuple[Tensors, Changes]:
    """The tensors under the model's keys, and what was changed. Raises CheckpointError naming `where` and the rule."""
    changes = Changes()
    result = dict(tensors)
    for rule in expand(rules):
        before = len(changes.dropped) + len(changes.filled)
        result, touched = _VERBS[rule.verb](result, rule, changes, where)
        if not touched and len(changes.dropped) + len(changes.filled) == before and not rule.optional:
            raise CheckpointError(
                where, f"has no key for the rule '{rule.verb}: {getattr(rule, rule.verb)}'",
                found=describe_keys(tensors), todo="check that it is this model's file",
            )  # fmt: skip
    changes.renamed = len([key for key in result if key not in tensors and key not in changes.filled])
    return result, changes


def describe_keys(tensors: Mapping[str, Tensor]) -> str:
    """Whose names a file's keys are, as far as they tell, and the first of them."""
    style = next(
        (name for pattern, name in _STYLES if any(re.search(pattern, key) for key in tensors)), "unknown names"
    )
    return f"{len(tensors)} keys, {style}, first {next(iter(tensors), 'none')}"


_STYLES = (
    (r"^module\.", "a training checkpoint of several devices"),
    (r"^(text|vision)_model\.(encoder|embeddings)\.", "transformers' CLIP or SigLIP"),
    (r"^visual\.trunk\.", "open_clip with a timm image tower"),
    (r"^visual\.(transformer|layer1)\.", "OpenAI's or open_clip's CLIP"),
    (r"^_orig_mod\.", "a compiled model"),
    (r"^model\.", "a Lightning checkpoint or a wrapper"),
)


def expand(rules: Sequence[Rule]) -> list[Rule]:
    """The rules with presets written out."""
    return [step for rule in rules for step in ([rule] if rule.preset is None else PRESETS[rule.preset])]


def _strip(tensors: Tensors, rule: Rule, changes: Changes, where: str) -> tuple[Tensors, bool]:
    prefix = rule.strip or ""
    touched = any(key.startswith(prefix) for key in tensors)
    return _rekey(tensors, lambda key: key.removeprefix(prefix), where), touched


def _rename(tensors: Tensors, rule: Rule, changes: Changes, where: str) -> tuple[Tensors, bool]:
    pattern = re.compile(rule.rename or "")
    touched = any(pattern.search(key) for key in tensors)
    return _rekey(tensors, lambda key: pattern.sub(rule.to or "", key), where), touched


def _drop(tensors: Tensors, rule: Rule, changes: Changes, where: str) -> tuple[Tensors, bool]:
    gone = _matching(tensors, rule.drop)
    changes.dropped += gone
    return {key: tensor for key, tensor in tensors.items() if key not in set(gone)}, bool(gone)


def _drop_arange(tensors: Tensors, rule: Rule, changes: Changes, where: str) -> tuple[Tensors, bool]:
    import torch

    gone = _matching(tensors, rule.drop_arange)
    for key in gone:
        row = tensors[key].flatten()
        if row.device.type != "meta" and not torch.equal(row, torch.arange(len(row), dtype=row.dtype)):
            raise CheckpointError(
                where, f"{key} is not 0, 1, 2, … and cannot be left out", found=row[:4].tolist(),
                todo="check that it is this model's file",
            )  # fmt: skip
    changes.dropped += gone
    return {key: tensor for key, tensor in tensors.items() if key not in set(gone)}, bool(gone)


def _transpose(tensors: Tensors, rule: Rule, changes: Changes, where: str) -> tuple[Tensors, bool]:
    found = set(_matching(tensors, rule.transpose))
    return {key: t.t().contiguous() if key in found else t for key, t in tensors.items()}, bool(found)


def _scalar(tensors: Tensors, rule: Rule, changes: Changes, where: str) -> tuple[Tensors, bool]:
    found = set(_matching(tensors, rule.scalar))
    for key in found:
        if tensors[key].numel() != 1:
            raise CheckpointError(where, f"{key} is not one number", found=tuple(tensors[key].shape))
    return {key: t.reshape(()) if key in found else t for key, t in tensors.items()}, bool(found)


def _concat(tensors: Tensors, rule: Rule, changes: Changes, where: str) -> tuple[Tensors, bool]:
    import torch

    pattern = re.compile(rule.concat or "")
    groups: dict[str, dict[str, str]] = {}
    result: Tensors = {}
    for key, tensor in tensors.items():
        match = pattern.search(key)
        if match is None:
            result[key] = tensor
            continue
        name = match.expand(rule.to or "")
        groups.setdefault(name, {})[match.group(rule.by or 0)] = key
        # The first part holds the place, so that the order of keys stays the file's.
        result.setdefault(name, tensor)
    for name, parts in groups.items():
        missing = [part for part in rule.order if part not in parts]
        if missing or len(parts) != len(rule.order):
            raise CheckpointError(
                where, f"{name} needs the parts {', '.join(rule.order)}", found=", ".join(parts.values()),
                todo="check that it is this model's file",
            )  # fmt: skip
        result[name] = torch.cat([tensors[parts[part]] for part in rule.order])
    return result, bool(groups)


def _select(tensors: Tensors, rule: Rule, changes: Changes, where: str) -> tuple[Tensors, bool]:
    found = set(_matching(tensors, rule.select))
    first, last = rule.rows or (0, 0)
    for key in found:
        if tensors[key].shape[0] < last:
            raise CheckpointError(where, f"{key} has fewer than {last} rows", found=tuple(tensors[key].shape))
    return {key: t[first:last].clone() if key in found else t for key, t in tensors.items()}, bool(found)


def _merge_lora(tensors: Tensors, rule: Rule, changes: Changes, where: str) -> tuple[Tensors, bool]:
    """Add scale · (B A) of each low-rank pair to its block of the base weight's rows.

    The pattern has groups (module, a|b, part); `to` names the base linear; `parts` says which of the equal blocks of
    rows each part adapts (`{q: 0, v: 2}` of a fused qkv).
    """
    pattern = re.compile(rule.merge_lora or "")
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for key in tensors:
        if match := pattern.search(key):
            pairs.setdefault((f"{match.expand(rule.to or '')}.weight", match.group(3)), {})[match.group(2)] = key
    result = dict(tensors)
    blocks = 3 if max(rule.parts.values()) > 0 else 1
    for (base, part), halves in pairs.items():
        if set(halves) != {"a", "b"} or base not in result or part not in rule.parts:
            raise CheckpointError(where, f"{base} lacks a half of its low-rank pair", found=", ".join(halves.values()))
        weight = result[base].clone()
        rows = weight.shape[0] // blocks
        start = rule.parts[part] * rows
        weight[start : start + rows] += rule.scale * (result.pop(halves["b"]) @ result.pop(halves["a"]))
        result[base] = weight
    return result, bool(pairs)


def _fill(tensors: Tensors, rule: Rule, changes: Changes, where: str) -> tuple[Tensors, bool]:
    import torch

    key = rule.fill or ""
    if key in tensors:
        return tensors, True
    changes.filled.append(key)
    return {**tensors, key: torch.tensor(rule.value)}, True


def _rekey(tensors: Tensors, change: Any, where: str) -> Tensors:
    result: Tensors = {}
    for key, tensor in tensors.items():
        name = change(key)
        if name in result:
            raise CheckpointError(
                where, f"two keys become {name}", found=key, todo="check that it is this model's file"
            )
        result[name] = tensor
    return result


def _matching(tensors: Tensors, pattern: str | None) -> list[str]:
    compiled = re.compile(pattern or "")
    return [key for key in tensors if compiled.search(key)]


_VERBS = {
    "strip": _strip, "rename": _rename, "drop": _drop, "drop_arange": _drop_arange, "transpose": _transpose,
    "scalar": _scalar, "concat": _concat, "select": _select, "merge_lora": _merge_lora, "fill": _fill,
}  # fmt: skip


def _renames(*pairs: tuple[str, str]) -> list[Rule]:
    return [Rule(rename=pattern, to=to) for pattern, to in pairs]


# transformers' CLIPModel to open_clip's CLIP (OpenAI's names). `pre_layrnorm` is spelled so there.
_HF_CLIP = (
    Rule(drop_arange=r"^(text|vision)_model\.embeddings\.position_ids$", optional=True),
    Rule(concat=r"^(.+\.self_attn)\.([qkv])_proj\.(weight|bias)$", to=r"\1.in_proj_\3", by=2, order=("q", "k", "v")),
    *_renames(
        (r"\.encoder\.layers\.(\d+)\.self_attn\.", r".encoder.layers.\1.attn."),
        (r"\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r".encoder.layers.\1.ln_\2."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
        (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
        (r"^text_model\.embeddings\.token_embedding\.weight$", "token_embedding.weight"),
        (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
        (r"^text_model\.final_layer_norm\.", "ln_final."),
        (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
        (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
        (r"^vision_model\.embeddings\.patch_embedding\.weight$", "visual.conv1.weight"),
        (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
        (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
        (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
        (r"^text_projection\.weight$", "text_projection"),
        (r"^visual_projection\.weight$", "visual.proj"),
    ),
    Rule(transpose=r"^(text_projection|visual\.proj)$"),
)
# A released state dict in OpenAI's names may carry three numbers of its TorchScript past.
_OPENAI = (
    Rule(drop=r"^(input_resolution|context_length|vocab_size)$", why="sizes, not weights", optional=True),
    Rule(drop=r"^attn_mask$", why="a buffer that open_clip computes", optional=True),
)
# transformers' SwinModel, as its checkpoints were saved, to timm's Swin, whose stages begin with the downsampling.
_HF_SWIN = (
    Rule(drop=r"\.attention\.self\.relative_position_index$", why="computed from the window", optional=True),
    Rule(
        concat=r"^(.+\.blocks\.\d+)\.attention\.self\.(query|key|value)\.(weight|bias)$", to=r"\1.attn.qkv.\3", by=2,
        order=("query", "key", "value"),
    ),
    *_renames(
        (r"\.attention\.self\.relative_position_bias_table$", ".attn.relative_position_bias_table"),
        (r"(\.blocks\.\d+)\.attention\.output\.dense\.", r"\1.attn.proj."),
        (r"(\.blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
        (r"(\.blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
        (r"(\.blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
        (r"(\.blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
        (r"\.encoder\.layers\.2\.downsample\.", ".encoder.layers.3.downsample."),
        (r"\.encoder\.layers\.1\.downsample\.", ".encoder.layers.2.downsample."),
        (r"\.encoder\.layers\.0\.downsample\.", ".encoder.layers.1.downsample."),
        (r"\.encoder\.layers\.(\d+)\.(blocks|downsample)\.", r".layers.\1.\2."),
        (r"\.embeddings\.patch_embeddings\.projection\.", ".patch_embed.proj."),
        (r"\.embeddings\.norm\.", ".patch_embed.norm."),
        (r"\.layernorm\.(weight|bias)$", r".norm.\1"),
    ),
)  # fmt: skip
PRESETS: dict[str, Sequence[Rule]] = {"hf-clip": _HF_CLIP, "hf-swin": _HF_SWIN, "openai": _OPENAI}
