"""CLIP byte-pair token ids without torch: for counting tokens while building and for tokenising while training.

The vocabulary is OpenAI CLIP's (MIT, vocabularies/LICENSE), in the rank order that defines the ids; only the 48,894
merges that CLIP uses are kept. The work is done by the Rust `tokenizers` library; ids are equal to
`open_clip.get_tokenizer("ViT-B-32")`, which a test checks on captions in many scripts.
"""

from __future__ import annotations

import gzip
import html
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib import resources
from typing import TYPE_CHECKING

from biomedclip.errors import MissingExtra

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END = "<start_of_text>", "<end_of_text>"
START_ID, END_ID = 49406, 49407
_WORDS_KEPT = 200_000


# What ftfy leaves alone, character by character, where the whole does not look wrongly decoded: ASCII, Latin, Greek and
# Cyrillic letters without combining marks, dashes, signs, arrows, mathematics, kana and Han. A test asks ftfy.
_UNTOUCHED = frozenset("\t\n").union(
    *(
        map(chr, range(first, last + 1))
        for first, last in (
            (0x20, 0x7E), (0xA0, 0x131), (0x134, 0x13E), (0x141, 0x148), (0x14A, 0x17E), (0x391, 0x3A1),
            (0x3A3, 0x3CE), (0x410, 0x44F), (0x2002, 0x200A), (0x2010, 0x2015), (0x2020, 0x2022), (0x2026, 0x2026),
            (0x2030, 0x2030), (0x2032, 0x2033), (0x2070, 0x2070), (0x2074, 0x208E), (0x20AC, 0x20AC), (0x2103, 0x2103),
            (0x2122, 0x2122), (0x2190, 0x2193), (0x2200, 0x2265), (0x25A0, 0x25FF), (0x3041, 0x3096), (0x30A1, 0x30FA),
            (0x4E00, 0x9FFF),
        )
    )
)  # fmt: skip
_QUOTES = str.maketrans("\u02bc\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "'''''\"\"\"\"")


def mend_text(text: str) -> str:
    """A text with its encoding mended and HTML entities resolved, equal to ftfy and two rounds of `html.unescape`.

    Most captions need no mending, and finding that out is quicker than what ftfy does to leave them as they are.
    """
    if "&" not in text and (text.isascii() or "\n" not in text):
        if text.isascii() and (text.isprintable() or _UNTOUCHED.issuperset(text)):
            return text
        straight = text.translate(_QUOTES)
        if _UNTOUCHED.issuperset(straight):
            from ftfy.badness import is_bad

            if not is_bad(text) and (straight == text or not is_bad(straight)):
                return straight
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def clean_caption(text: str) -> str:
    """A caption as CLIP's tokenizer sees it: mended, one space between words, lower case."""
    return " ".join(mend_text(text).split()).lower()


@lru_cache(maxsize=4096)
def count_tokens(text: str) -> int:
    """Number of CLIP tokens of a caption, without start and end. Labelled sets say a few sentences very often."""
    return len(clip_tokenizer().encode(clean_caption(text), add_special_tokens=False).ids)


def encode_captions(texts: Sequence[str], context_length: int = 77) -> list[list[int]]:
    """(B, L) CLIP token ids: start, text, end, zeros; a longer text is cut and still ends in the end token."""
    rows = []
    for found in _clip_words()([clean_caption(text) for text in texts], context_length - 2):
        ids = [START_ID, *found, END_ID]
        rows.append(ids + [0] * (context_length - len(ids)))
    return rows


class WordIds:
    """Token ids of texts, word by word, without special tokens. Captions say the same words again and again: looking
    them up is five times faster than cutting them into pieces once more.

    Only for tokenizers that cut every word by itself and never across a blank. `words` finds the words of ASCII as the
    tokenizer does; anything else between two blanks is one word, and texts that hold one of the `marks` are given to
    the tokenizer whole.
    """

    def __init__(
        self, tokenizer: Tokenizer, words: re.Pattern[str], marks: Sequence[str] = (), *, lower: bool = False
    ) -> None:
        self._tokenizer, self._words, self._marks, self._lower = tokenizer, words, tuple(marks), lower
        self._known: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        """The first `limit` ids of each text."""
        found = [self._split(text, limit) for text in texts]
        rest = [text for text, words in zip(texts, found, strict=True) if words is None]
        whole = iter(self._encode(rest))
        known = self._learn({word for words in found if words for word in words})
        rows = []
        for words in found:
            ids = next(whole) if words is None else [number for word in words for number in known[word]]
            rows.append(ids[:limit])
        return rows

    def _split(self, text: str, limit: int) -> list[str] | None:
        if any(mark in text for mark in self._marks):
            return None
        if text.isascii() and text.isprintable():
            return self._find(text)[:limit]
        words: list[str] = []
        for part in text.split(" "):  # not cut to the limit: a part may have no ids at all
            if part.isascii() and part.isprintable():
                words += self._find(part)
            else:
                words.append(part)
        return words

    def _find(self, text: str) -> list[str]:
        return self._words.findall(text.lower() if self._lower else text)

    def _learn(self, words: set[str]) -> dict[str, list[int]]:
        known = self._known
        new = [word for word in words if word not in known]
        if new:
            if len(known) > _WORDS_KEPT:
                # Begun anew, with the words at hand: those that matter are back after a few batches.
                new, known = list(words), {}
                self._known = known
            known.update(zip(new, self._encode(new), strict=True))
        return known

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


@cache
def _clip_words() -> WordIds:
    return WordIds(clip_tokenizer(), re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+"))


@cache
def clip_tokenizer() -> Tokenizer:
    """The Rust tokenizer. Raises MissingExtra where `tokenizers` is not installed."""
    try:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    except ImportError:
        raise MissingExtra("build", "tokenizers") from None
    vocabulary, merges = clip_vocabulary()
    model = models.BPE(
        vocab=vocabulary,
        merges=merges,
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([])
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's tokens with their ids, and its merges in rank order."""
    packed = (resources.files("biomedclip") / "vocabularies" / "clip_merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    symbols = list(_byte_symbols().values())
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), *("".join(pair) for pair in merges), START, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def _byte_symbols() -> dict[int, str]:
    """Byte -> printable character, GPT-2's table in its own order, which fixes the first 256 ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return table
