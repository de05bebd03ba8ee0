"""A text tower that reads longer captions, made from one that reads short ones.

Reads an open_clip model and the wanted number of tokens; changes its position table in place and yields the model's
config with the new length. CLIP's 77 positions are trained on captions of about 20 tokens, so the first 20 are kept as
they are and the others are spread over the new length (Long-CLIP); BERT-family towers have 512 trained positions, of
which more are simply used.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from biomedclip.errors import ConfigError

KEPT_POSITIONS = 20
"""Positions that CLIP trained well (Zhang et al. 2024, arXiv 2403.15378, section 3.1)."""


def stretch_positions(table: Tensor, length: int, *, keep: int = KEPT_POSITIONS) -> Tensor:
    """(length, W) position embeddings from (n, W): the first `keep` unchanged, the rest spread linearly over the rest.

    New position q >= keep lies at keep + (q - keep) / f of the old table, f = (length - keep) / (n - keep), between
    two old positions, or beyond the last along the last difference. 77 to 248 gives f = 4 and with it the
    knowledge-preserved stretching of Long-CLIP (Zhang et al. 2024, section 3.1, and code: 4 x 77 - 3 x 20 = 248, the
    last three beyond the table). A shorter length takes the first rows.
    """
    old = len(table)
    if length <= old:
        return table[:length].clone()
    factor = (length - keep) / (old - keep)
    places = keep + torch.arange(length - keep, dtype=torch.float64, device=table.device) / factor
    lower = places.floor().long().clamp(max=old - 2)
    share = (places - lower)[:, None]
    wide = table.double()
    stretched = wide[lower] + share * (wide[lower + 1] - wide[lower])
    return torch.cat([wide[:keep], stretched]).to(table.dtype)


def set_context_length(
    model: Any, model_cfg: Mapping[str, Any], length: int, *, keep: int = KEPT_POSITIONS
) -> dict[str, Any]:
    """Let the model's text tower read `length` tokens; returns its open_clip config with the new length.

    The tokenizer must be given the same length. Raises ConfigError where the tower cannot be changed: a table of too
    few positions to stretch, or a BERT-family tower without that many.
    """
    config = deepcopy(dict(model_cfg))
    config["text_cfg"]["context_length"] = length
    text: Any = getattr(model, "text", model)
    if not hasattr(text, "positional_embedding"):
        positions = int(text.config.max_position_embeddings)
        if length > positions:
            raise ConfigError("model.context_length", f"the text tower has {positions} positions", found=length,
                              todo=f"take at most {positions}")  # fmt: skip
        return config
    old = int(text.positional_embedding.shape[0])
    extra = old - int(text.context_length)  # CoCa-like towers carry one position more for their own token
    if extra or (length > old and old <= keep + 1):
        raise ConfigError("model.context_length", f"this text tower of {old} positions cannot be stretched",
                          found=length, todo="start from a tower with more positions")  # fmt: skip
    with torch.no_grad():
        table = stretch_positions(text.positional_embedding, length, keep=keep)
    text.positional_embedding = nn.Parameter(table)
    if text.attn_mask is not None:
        mask = torch.full((length, length), float("-inf"), device=table.device).triu_(1)
        text.register_buffer("attn_mask", mask, persistent=False)
    for owner in (model, text):
        owner.context_length = length
    if hasattr(text, "num_pos"):
        text.num_pos = length
    return config
