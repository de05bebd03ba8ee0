"""Captions to token ids: which of a sample's captions this time, and the tokeniser of the model.

A sample may have several captions (templates compiled from its labels, rewrites). Which one is used is a hash of
(seed, sample key, epoch), so every run and every resumed run reads the same one. Token ids of CLIP's vocabulary come
from the Rust tokeniser of `biomedclip.tokens`, which gives open_clip's ids several times faster; every other
vocabulary goes through open_clip's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from biomedclip.stream.plan import draw_int
from biomedclip.tokens import encode_captions

Tokenise = Callable[[Sequence[str]], torch.Tensor]


def choose_caption(captions: Sequence[str], *facts: object) -> str:
    """One of the captions, each as likely, decided by the facts (seed, sample key, epoch) alone."""
    return captions[draw_int("caption", *facts) % len(captions)]


def fast_tokenise(tokenizer: Any) -> Tokenise:
    """A function from captions to (B, L) int64 token ids, equal to calling an open_clip `tokenizer`."""
    from open_clip.tokenizer import SimpleTokenizer

    plain_clip = type(tokenizer) is SimpleTokenizer and tokenizer.vocab_size == 49408
    if not plain_clip or tokenizer.reduction_fn is not None or tokenizer.clean_fn.__name__ != "_clean_lower":
        return lambda captions: tokenizer(list(captions))
    length = tokenizer.context_length
    return lambda captions: torch.tensor(encode_captions(captions, length), dtype=torch.int64)
