"""Sentences of random words: the anchors of VR-LwF, which stand for every text that no training set holds.

Reads an open_clip tokenizer and yields token ids, drawn once from a seed: beginning, random words, end, padding.
Special tokens and BERT's unused entries are left out: no sentence contains them, so their embeddings are random.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from biomedclip.errors import ConfigError
from biomedclip.models.tokenise import AutoEncoder, RustEncoder


def random_sentences(tokenizer: Any, *, num_texts: int, num_words: int, seed: int) -> Tensor:
    """(num_texts, context) token ids of sentences of `num_words` random tokens, the same for the same seed.

    1000 sentences of 10 tokens in ZSCL's code (`--ref-sentences random`); see `anchor_loss`. Raises ConfigError where
    the words do not fit into the context, or the tokenizer is of an unknown kind.
    """
    words, first, last, padding = _vocabulary(tokenizer)
    length = int(tokenizer.context_length)
    if num_words + 2 > length:
        raise ConfigError("continual.vr_lwf.num_words", f"does not fit the text tower's {length} tokens",
                          found=num_words, todo=f"take at most {length - 2}")  # fmt: skip
    draw = np.random.Generator(np.random.Philox(key=seed))
    texts = np.full((num_texts, length), padding, dtype=np.int64)
    texts[:, 0], texts[:, num_words + 1] = first, last
    texts[:, 1 : num_words + 1] = draw.choice(words, size=(num_texts, num_words))
    return torch.from_numpy(texts)


def _vocabulary(tokenizer: Any) -> tuple[np.ndarray, int, int, int]:
    """(ids of words, id that begins a text, id that ends it, id of padding) of open_clip's tokenizers or ours."""
    if hasattr(tokenizer, "sot_token_id"):
        first, last = int(tokenizer.sot_token_id), int(tokenizer.eot_token_id)
        special = {int(i) for i in tokenizer.all_special_ids} | {first, last}
        return _without(range(int(tokenizer.vocab_size)), special), first, last, 0
    if isinstance(getattr(tokenizer, "encode", None), RustEncoder | AutoEncoder):
        return _of_rows(tokenizer)
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None or inner.cls_token_id is None or inner.sep_token_id is None:
        raise ConfigError("continual.vr_lwf", f"cannot write sentences for a {type(tokenizer).__name__}",
                          todo="use zscl with a reference set instead")  # fmt: skip
    words = _words(inner.get_vocab(), set(inner.all_special_ids))
    # open_clip drops the end mark from texts for towers that were trained without it.
    last = 0 if tokenizer.strip_sep_token else int(inner.sep_token_id)
    return words, int(inner.cls_token_id), last, int(inner.pad_token_id or 0)


def _of_rows(tokenizer: Any) -> tuple[np.ndarray, int, int, int]:
    """The same of a released model's tokenizer, which says by an empty text how texts begin and end."""
    inner, ends = tokenizer.encode.tokenizer, tokenizer.encode([""], 8)[0]
    if len(ends) != 2:
        raise ConfigError(
            "continual.vr_lwf", "cannot write sentences for a tokenizer without a start and an end", found=ends,
            todo="use zscl with a reference set instead",
        )  # fmt: skip
    auto = isinstance(tokenizer.encode, AutoEncoder)
    special = set(inner.all_special_ids if auto else inner.get_added_tokens_decoder())
    padding = int(tokenizer.facts.pad_id)
    return _words(inner.get_vocab(), special | {*ends, padding}), int(ends[0]), int(ends[1]), padding


def _words(names: dict[str, int], special: set[int]) -> np.ndarray:
    unused = {number for name, number in names.items() if name.startswith("[unused")}
    return _without(sorted(names.values()), special | unused)


def _without(numbers: Any, special: set[int]) -> np.ndarray:
    return np.asarray([number for number in numbers if number not in special], dtype=np.int64)
