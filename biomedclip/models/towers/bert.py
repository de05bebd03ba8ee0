"""A BERT text tower with the poolings of the released models, built from its config without a download.

The attention mask is made from the ids (`[PAD]` is 0), as open_clip does. A mean over tokens counts no padding, so
that an embedding depends on its sentence only: it is what MedCLIP's, FLAIR's and RetiZero's own code gives for one
sentence at a time. Their code averages over padding when it embeds a batch; `mean_over_padding` does that too.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers import BertConfig, BertModel

from biomedclip.config import Config
from biomedclip.models.towers.two_towers import Head, Projection, Tower


class Bert(Config):
    """A BERT text tower; the sizes are BERT-base's."""

    context: int
    vocab_size: int
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    pool: Literal["cls", "pooler", "last_token", "mean_1_2_last"] = "cls"
    """`pooler`: BERT's own tanh layer; `last_token`: that of `[SEP]`; `mean_1_2_last`: the mean over the tokens of
    hidden states 1, 2 and last (0 being the embeddings)."""
    attention_mask: bool = True
    """False: padding is attended to, as PMC-CLIP was trained."""
    mean_over_padding: bool = False
    projection: Projection = Projection()


class BertTower(Tower):
    """Token ids (B, L) to embeddings (B, D)."""

    def __init__(self, bert: Bert, embed_dim: int, head: nn.Module | None = None) -> None:
        super().__init__()
        sizes = {name: getattr(bert, name) for name in BERT_SIZES}
        self.trunk = BertModel(BertConfig(**sizes), add_pooling_layer=bert.pool == "pooler")
        self.pool, self.context_length, self.vocab_size = bert.pool, bert.context, bert.vocab_size
        self.attention_mask, self.mean_over_padding = bert.attention_mask, bert.mean_over_padding
        self.head = head or Head(bert.projection, bert.hidden_size, embed_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings of sentences, not normalised."""
        real = tokens != 0
        attended = real if self.attention_mask else torch.ones_like(real)
        output = self.trunk(
            input_ids=tokens, attention_mask=attended.long(), output_hidden_states=self.pool == "mean_1_2_last"
        )
        embedding: torch.Tensor = self.head(self._pool(output, real))
        return embedding

    def _pool(self, output: Any, real: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = output.last_hidden_state
        if self.pool == "pooler":
            pooled: torch.Tensor = output.pooler_output
            return pooled
        if self.pool == "last_token":
            return states[torch.arange(len(states), device=states.device), real.sum(1) - 1]
        if self.pool == "mean_1_2_last":
            hidden = output.hidden_states
            states = (hidden[1] + hidden[2] + hidden[-1]) / 3
            weights = torch.ones_like(real) if self.mean_over_padding else real
            return (states * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)
        return states[:, 0]


BERT_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "layer_norm_eps",
)  # fmt: skip
