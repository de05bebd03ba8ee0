"""What training does to the towers of an open_clip model without changing what is exported.

Locking (LiT), gradient checkpointing and patch dropout set the towers up once; smaller pictures in early stages and
shorter texts are a matter of a single call. A smaller picture needs fewer position embeddings: they are interpolated
from the model's own for that call, so the weights, the optimizer's state and every checkpoint keep their shapes. A
text's padding is cut where the tower cannot see it: attention that is causal or masks the padding gives the same
embedding without it.
"""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biomedclip.errors import ConfigError
from biomedclip.stream.text import bucket_by_length, token_lengths
from biomedclip.training.config import TowersConfig


def set_up_towers(model: nn.Module, settings: TowersConfig) -> None:
    """Lock, checkpoint and thin out the towers as the config says. Raises ConfigError where a tower cannot."""
    towers: Any = model
    with contextlib.redirect_stdout(io.StringIO()):  # open_clip prints how many layers it unlocks
        if settings.lock_image is not None:
            towers.lock_image_tower(unlocked_groups=settings.lock_image)
        if settings.lock_text is not None:
            towers.lock_text_tower(unlocked_layers=settings.lock_text)
    if settings.gradient_checkpointing:
        towers.set_grad_checkpointing(True)
    if settings.patch_dropout:
        _drop_patches(towers.visual, settings.patch_dropout)
    for stage in settings.stages:
        _check_stage(towers.visual, stage.size_px)


def frozen_positions(model: nn.Module, count: int) -> nn.Parameter | None:
    """The text tower's table of positions, whose first `count` rows are to stay; None where none are.

    Raises ConfigError where the tower has no such table, or locks it as a whole.
    """
    if not count:
        return None
    table = getattr(getattr(model, "text", model), "positional_embedding", None)
    if not isinstance(table, nn.Parameter) or not table.requires_grad:
        raise ConfigError(
            "towers.freeze_positions", "needs a text tower that trains a table of positions as CLIP's does",
            todo="leave it out",
        )  # fmt: skip
    if count > len(table):
        raise ConfigError("towers.freeze_positions", f"the text tower has {len(table)} positions", found=count)
    return table


def encode_image(model: nn.Module, pixels: Tensor, size_px: int | None = None) -> Tensor:
    """(b, D) embeddings, not yet normalised, of normalised pixels, shrunk to `size_px` first where it is given."""
    tower: Any = model
    if size_px is None or size_px == pixels.shape[-1]:
        return tower.encode_image(pixels)
    small = F.interpolate(pixels, size=(size_px, size_px), mode="bilinear", antialias=True, align_corners=False)
    name = _position_name(tower.visual)
    if name is None:
        return tower.encode_image(small)
    own = tower.visual.get_parameter(name)
    positions = resize_positions(own, _grid(pixels.shape[-1], tower.visual), _grid(size_px, tower.visual))
    found: Tensor = torch.func.functional_call(tower.visual, {name: positions}, (small,))
    return found


def resize_positions(positions: Tensor, grid: int, smaller: int) -> Tensor:
    """Position embeddings (..., prefix + grid², width) for another square grid, bicubic, as open_clip resizes them."""
    flat = positions.reshape(-1, positions.shape[-1])
    prefix = len(flat) - grid * grid
    image = flat[prefix:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(smaller, smaller), mode="bicubic", antialias=True, align_corners=False)
    rows = torch.cat([flat[:prefix], image.permute(0, 2, 3, 1).reshape(smaller * smaller, -1)])
    return rows.reshape(*positions.shape[:-2], *rows.shape)


def text_padding(model: nn.Module) -> int | None:
    """Id of the padding that may be cut from the end of texts without a change of their embeddings; None: nothing may.

    A tower of Hugging Face masks padding; CLIP's own is causal and reads the embedding at the end of the text. A tower
    that attends to padding, averages over it or takes the last position (SigLIP) needs it all.
    """
    text: Any = getattr(model, "text", None)
    if isinstance(masked := getattr(text, "attention_mask", None), bool):  # a BERT of ours, whose [PAD] is 0
        return 0 if masked and not text.mean_over_padding else None
    if text is None:
        causal = getattr(model, "attn_mask", None) is not None
        return 0 if causal and getattr(model, "text_pool_type", "argmax") in ("argmax", "eos") else None
    if hasattr(text, "config") and hasattr(text, "pooler"):
        return text.config.pad_token_id
    if getattr(text, "cls_emb", None) is None and hasattr(text, "positional_embedding"):
        causal = getattr(text, "attn_mask", None) is not None
        return text.pad_id if causal and text.pool_type in ("argmax", "eos", "first") else None
    return None


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """(b, D) embeddings, not yet normalised, of token ids whose padding may have been cut."""
    tower: Any = getattr(model, "text", model)
    table = getattr(tower, "positional_embedding", None)
    # A tower with a token of its own behind the text (CoCa's) has a position more than tokens, and is never cut.
    if table is None or getattr(tower, "cls_emb", None) is not None or tokens.shape[1] == len(table):
        return model.encode_text(tokens)  # type: ignore[operator]
    # open_clip's own towers add all positions and mask them all; a shorter text gets the first ones.
    length = tokens.shape[1]
    from open_clip.transformer import text_global_pool

    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))
    kind, end = (getattr(tower, f"text_{name}", None) or getattr(tower, name, None) for name in ("pool_type", "eos_id"))
    x = text_global_pool(x, tokens, kind, eos_token_id=end)
    if tower.text_projection is None:
        return x
    return tower.text_projection(x) if isinstance(tower.text_projection, nn.Linear) else x @ tower.text_projection


def split_by_length(texts: Tensor, padding: int, count: int) -> tuple[Tensor, list[Tensor]]:
    """Order of the (M, L) texts by length, and the texts in that order in up to `count` parts without shared padding.

    The parts are cut where padding in all is least, each length rounded up to a multiple of 8, which kernels prefer.
    """
    groups = bucket_by_length(token_lengths(texts, padding), count, multiple_of=8)
    return torch.cat([index for index, _ in groups]), [texts[index, :length] for index, length in groups]


def context_length(model: nn.Module) -> int:
    """Tokens that the text tower takes at most."""
    return int(getattr(model, "context_length", 0) or 77)


def _drop_patches(visual: Any, share: float) -> None:
    trunk: Any = getattr(visual, "trunk", None)
    if trunk is None and isinstance(getattr(visual, "patch_dropout", None), nn.Module):
        from open_clip.transformer import PatchDropout

        visual.patch_dropout = PatchDropout(share).train(visual.training)
    elif hasattr(trunk, "patch_drop"):
        from timm.layers import PatchDropout as TimmPatchDropout

        trunk.patch_drop = TimmPatchDropout(share, num_prefix_tokens=trunk.num_prefix_tokens).train(visual.training)
    else:
        raise ConfigError("towers.patch_dropout", "needs a vision transformer", found=type(trunk or visual).__name__)


def _position_name(visual: Any) -> str | None:
    if hasattr(visual, "positional_embedding"):
        return "positional_embedding"
    if isinstance(getattr(getattr(visual, "trunk", None), "pos_embed", None), nn.Parameter):
        return "trunk.pos_embed"
    return None


def _grid(size_px: int, visual: Any) -> int:
    return size_px // _patch(visual)


def _patch(visual: Any) -> int:
    patch = visual.patch_size if hasattr(visual, "patch_size") else visual.trunk.patch_embed.patch_size
    return int(patch[0] if isinstance(patch, tuple | list) else patch)


def _check_stage(visual: Any, size_px: int) -> None:
    full = visual.preprocess_cfg["size"]
    full = full if isinstance(full, int) else max(full)
    if size_px > full:
        raise ConfigError("towers.stages", f"a stage is larger than the model's {full} px", found=size_px)
    name = _position_name(visual)
    if name is None:
        if hasattr(visual, "attnpool"):
            raise ConfigError("towers.stages", "this image tower takes one size only", found=type(visual).__name__)
        return
    if size_px % _patch(visual):
        raise ConfigError(
            "towers.stages", f"size_px must be a multiple of the patch size {_patch(visual)}", found=size_px
        )
    if math.isqrt(visual.get_parameter(name).shape[-2]) != _grid(full, visual):
        raise ConfigError("towers.stages", "this image tower has no square grid of positions", found=name)
    if name.startswith("trunk"):
        # The trunk checks the size that it was built for; another grid of positions makes any size right.
        visual.trunk.patch_embed.strict_img_size = False
