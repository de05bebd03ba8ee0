"""Captions to token ids, and batches of ids to buckets of like length.

Token ids of CLIP's vocabulary come from the Rust tokeniser of `biomedclip.tokens`, those of the Hugging Face
tokenizers from a copy of their own Rust half: equal to calling open_clip's tokenizer, several times faster, because
texts that need no mending are not mended and padding is written once for the whole batch. Any other tokenizer is called
as it is.

Most captions are short and a few fill the context, so a text tower that pads to the longest spends most of its time on
padding. `bucket_by_length` divides a batch so that each part runs at its own length; the embeddings are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from biomedclip.tokens import WordIds, encode_captions, mend_text

Tokenise = Callable[[Sequence[str]], torch.Tensor]


def fast_tokenise(tokenizer: Any) -> Tokenise:
    """A function from captions to (B, L) int64 token ids, equal to calling an open_clip `tokenizer`."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    if type(tokenizer) is SimpleTokenizer and tokenizer.vocab_size == 49408:
        if tokenizer.reduction_fn is None and tokenizer.clean_fn.__name__ == "_clean_lower":
            return ClipIds(tokenizer.context_length)
    elif type(tokenizer) is HFTokenizer and HuggingFaceIds.knows(tokenizer):
        return HuggingFaceIds(tokenizer)
    return TokenizerIds(tokenizer)


class ClipIds:
    """Ids of CLIP's own vocabulary."""

    def __init__(self, context_length: int) -> None:
        self._length = context_length

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """(B, L) ids: start, text, end, zeros."""
        return torch.from_numpy(encode_captions(captions, self._length))


class TokenizerIds:
    """Ids by whatever tokenizer a model has."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """(B, L) ids, as the tokenizer gives them."""
        ids: torch.Tensor = self._tokenizer(list(captions))
        return ids


class HuggingFaceIds:
    """Ids by the Rust half of an open_clip HFTokenizer, with its cleaning, special tokens and padding to the end."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        inner = tokenizer.tokenizer
        # A copy, because truncation and padding are settings of the tokenizer and its owner keeps its own.
        stored = inner.backend_tokenizer.to_str()
        self._rust = Tokenizer.from_str(stored)
        self._rust.no_padding()
        self._rust.no_truncation()
        self._words = _bert_words(self._rust, json.loads(stored)) if inner.truncation_side == "right" else None
        self._before, self._after = (np.array(ids, dtype=np.int32) for ids in _special_ids(self._rust))
        self._rust.enable_truncation(tokenizer.context_length, direction=inner.truncation_side)
        self._clean = _CLEANERS[tokenizer.clean_fn.__name__]
        self._length, self._pad_id = tokenizer.context_length, inner.pad_token_id
        self._pads_left = inner.padding_side == "left"
        self._stripped_id = inner.sep_token_id if tokenizer.strip_sep_token else None

    @staticmethod
    def knows(tokenizer: Any) -> bool:
        """Whether the tokenizer has a Rust half and does nothing that this class does not."""
        inner = tokenizer.tokenizer
        return bool(
            getattr(inner, "is_fast", False)
            and not tokenizer.tokenizer_mode
            and tokenizer.context_length
            and tokenizer.clean_fn.__name__ in _CLEANERS
            and inner.pad_token_id is not None
            and not getattr(inner, "split_special_tokens", False)
        )

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """(B, L) ids, padded to the context; a longer text is cut and keeps its special tokens."""
        encoded = self._encode([self._clean(caption) for caption in captions])
        ids = np.full((len(encoded), self._length), self._pad_id, dtype=np.int64)
        for row, found in zip(ids, encoded, strict=True):
            row[slice(self._length - len(found), None) if self._pads_left else slice(len(found))] = found
        if self._stripped_id is not None:
            ids[ids == self._stripped_id] = 0
        return torch.from_numpy(ids)

    def _encode(self, texts: list[str]) -> Sequence[Sequence[int] | np.ndarray]:
        if self._words is None:
            return [encoding.ids for encoding in self._rust.encode_batch_fast(texts)]
        room = self._length - len(self._before) - len(self._after)
        return [np.concatenate([self._before, ids, self._after]) for ids in self._words(texts, room)]


def _bert_words(tokenizer: Any, stored: dict[str, Any]) -> WordIds | None:
    """The words of a tokenizer that is BERT's in every stage; None for another one."""
    stages = [(stored[stage] or {}).get("type") for stage in ("normalizer", "pre_tokenizer", "model")]
    if stages != ["BertNormalizer", "BertPreTokenizer", "WordPiece"]:
        return None
    # BERT's words: runs of letters and digits, and every other sign by itself.
    marks = [token["content"] for token in stored["added_tokens"]]
    return WordIds(tokenizer, "[A-Za-z0-9]+|[^A-Za-z0-9 ]", marks)


def _special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids before and after those of a text."""
    alone, whole = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    place = next(i for i in range(len(whole) + 1) if whole[i : i + len(alone)] == alone)
    return whole[:place], whole[place + len(alone) :]


def _clean_whitespace(text: str) -> str:
    return " ".join(mend_text(text).split())


def _clean_lower(text: str) -> str:
    return _clean_whitespace(text).lower()


def _clean_canonicalize(text: str) -> str:
    from open_clip.tokenizer import canonicalize_text

    cleaned: str = canonicalize_text(mend_text(text).strip())
    return cleaned


_CLEANERS = {f.__name__: f for f in (_clean_whitespace, _clean_lower, _clean_canonicalize)}
"""open_clip's cleaning functions by their names, over a mending that is quicker and gives the same."""


def token_lengths(ids: torch.Tensor, pad_id: int) -> torch.Tensor:
    """(B,) how many columns each row of (B, L) ids needs: up to its last token that is not padding, at least one.

    A row that is padded on the left needs all of them.
    """
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return ((ids != pad_id) * places).amax(dim=1).clamp(min=1)


def bucket_by_length(
    lengths: torch.Tensor | Sequence[int], buckets: int = 2, *, multiple_of: int = 1
) -> list[tuple[torch.Tensor, int]]:
    """The rows of a batch in at most `buckets` groups: (index int64, length), short ones first; no row in two.

    Of all divisions by length this one computes the fewest tokens, rows times length summed over the groups; equal
    lengths stay together, and fewer groups come out where more would save nothing. A tower runs `ids[index, :length]`
    of each group and its embeddings go back to `index`. They equal those of all ids at once wherever no embedding
    depends on the padding behind a text: BERT-like towers with an attention mask as they are, and causal towers that
    read the end token, such as CLIP's, where their positions and mask are cut to the length as well (open_clip's own
    forward passes take the whole context only). `multiple_of` rounds lengths up, as tensor cores like it.
    """
    given = torch.as_tensor(lengths)
    needed = np.asarray(given.cpu())
    if not len(needed):
        return []
    rounded = -(-needed // multiple_of) * multiple_of
    widths, counts = np.unique(rounded, return_counts=True)
    total = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: fewest tokens of the j shortest widths in so many groups; a group spans widths i to j - 1.
    cost = np.full(len(widths) + 1, np.inf)
    cost[0] = 0
    choices = []
    for _ in range(max(buckets, 1)):
        spans = cost[:-1, None] + (total[None, 1:] - total[:-1, None]) * widths[None, :]
        spans[np.tril_indices(len(widths), -1)] = np.inf
        best = spans.argmin(axis=0)
        cost = np.concatenate([[0], spans[best, np.arange(len(widths))]])
        choices.append(best)
        if len(choices) == len(widths):
            break
    groups: list[tuple[torch.Tensor, int]] = []
    stop = len(widths)
    for best in reversed(choices):
        if not stop:
            break
        start = int(best[stop - 1])
        width = int(widths[stop - 1])
        inside = (rounded > (widths[start - 1] if start else -1)) & (rounded <= width)
        groups.append((torch.from_numpy(np.flatnonzero(inside)).to(given.device), width))
        stop = start
    return groups[::-1]
