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

import numpy as np

from biomedclip.errors import MissingExtra

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END = "<start_of_text>", "<end_of_text>"
START_ID, END_ID = 49406, 49407
_WORDS_KEPT = 200_000
_LETTERS = 6
"""So many letters a token are looked at first, and the rest of a text where they were too few."""
_ID_BYTES = 4
_REACH = 7
_NOT_ASCII = re.compile("[^\x00-\x7f]+")


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
            (0x4E00, 0x9FFF), (0x3D5, 0x3D5), (0x3F5, 0x3F5), (0x2061, 0x2064), (0x27E6, 0x27EB), (0x1D400, 0x1D7FF),
        )
    )
)  # fmt: skip
_CURLY = ("\u02bc\u2018\u2019\u201a\u201b", "\u201c\u201d\u201e\u201f")
_ENTITY = re.compile(r"&[^\s;&]+;")


def mend_text(text: str) -> str:
    """A text with its encoding mended and HTML entities resolved, equal to ftfy and two rounds of `html.unescape`.

    Most captions need no mending, and finding that out is quicker than what ftfy does to leave them as they are.
    """
    plain_ands = "&" not in text or (_ENTITY.search(text) is None and html.unescape(text) == text)
    if plain_ands and (text.isascii() or "\n" not in text):
        if text.isascii() and (text.isprintable() or _UNTOUCHED.issuperset(text)):
            return text
        plain = _UNTOUCHED.issuperset(text)
        straight = text if plain else _straighten(text)
        known = plain or _UNTOUCHED.issuperset(straight)
        if known and not _looks_misread(text) and (plain or not _looks_misread(straight)):
            return straight
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _straighten(text: str) -> str:
    """The text with straight quotation marks. Replacing them one by one is ten times faster than str.translate."""
    for curly, straight in zip(_CURLY, "'\"", strict=True):
        for mark in curly:
            text = text.replace(mark, straight)
    return text


def _looks_misread(text: str) -> bool:
    """Whether ftfy may take a text for wrongly decoded, and surely where it does: asked of what surrounds its other
    letters than ASCII, because each of ftfy's signs has one and at most seven characters. A whole caption takes 0.2 ms.
    """
    from ftfy.badness import is_bad

    return any(is_bad(text[max(at.start() - _REACH, 0) : at.end() + _REACH]) for at in _NOT_ASCII.finditer(text))


def clean_caption(text: str) -> str:
    """A caption as CLIP's tokenizer sees it: mended, one space between words, lower case."""
    return " ".join(mend_text(text).split()).lower()


@lru_cache(maxsize=4096)
def count_tokens(text: str) -> int:
    """Number of CLIP tokens of a caption, without start and end. Labelled sets say a few sentences very often."""
    return len(clip_tokenizer().encode(clean_caption(text), add_special_tokens=False).ids)


def encode_captions(texts: Sequence[str], context_length: int = 77) -> np.ndarray:
    """(B, L) int64 CLIP token ids: start, text, end, zeros; a longer text is cut and still ends in the end token."""
    rows = np.zeros((len(texts), context_length), dtype=np.int64)
    rows[:, 0] = START_ID
    for row, ids in zip(rows, _clip_words()(list(map(clean_caption, texts)), context_length - 2), strict=True):
        row[1 : len(ids) + 1] = ids
        row[len(ids) + 1] = END_ID
    return rows


class WordIds:
    """Token ids of texts, word by word, without special tokens. Captions say the same words again and again: looking
    them up is five times faster than cutting them into pieces once more.

    Only for tokenizers that cut every word by itself and never across a blank. `words` is a pattern that finds the
    words of ASCII as the tokenizer does; anything else between two blanks is one word, and texts that hold one of the
    `marks` are given to the tokenizer whole.
    """

    def __init__(self, tokenizer: Tokenizer, words: str, marks: Sequence[str] = ()) -> None:
        self._tokenizer, self._words, self._marks = tokenizer, re.compile(words), tuple(marks)
        # Possessive, because printable ASCII before a blank is looked at again by `words` and need not be given back.
        self._mixed = re.compile(rf"[!-~]*+[^ -~][^ ]*|{words}")
        self._known: dict[str, bytes] = {}

    def __call__(self, texts: Sequence[str], limit: int) -> list[np.ndarray]:
        """The first `limit` ids of each text, int32."""
        head = _LETTERS * limit
        found = [self._split(text, head) for text in texts]
        whole = iter(self._encode([text for text, words in zip(texts, found, strict=True) if words is None]))
        known = self._learn(set().union(*(words for words in found if words)))
        rows = []
        for text, words in zip(texts, found, strict=True):
            ids = next(whole) if words is None else b"".join(map(known.__getitem__, words))
            if words is not None and len(text) > head and len(ids) < _ID_BYTES * limit:
                words = self._split(text, len(text)) or []
                ids = b"".join(map(self._learn(set(words)).__getitem__, words))
            rows.append(np.frombuffer(ids, np.int32)[:limit])
        return rows

    def _split(self, text: str, length: int) -> list[str] | None:
        """The words of the text, as far as the last blank within `length`; None where it holds a mark."""
        if any(mark in text for mark in self._marks):
            return None
        end = len(text) if len(text) <= length else text.rfind(" ", 0, length) + 1
        words = self._words if text.isascii() and text.isprintable() else self._mixed
        return words.findall(text, 0, end)

    def _learn(self, words: set[str]) -> dict[str, bytes]:
        new = list(words.difference(self._known))
        if new:
            if len(self._known) > _WORDS_KEPT:
                # Begun anew, with the words at hand: those that matter are back after a few batches.
                new, self._known = list(words), {}
            self._known.update(zip(new, self._encode(new), strict=True))
        return self._known

    def _encode(self, texts: Sequence[str]) -> list[bytes]:
        """Ids of each text as int32, which are joined faster than lists."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(found.ids, dtype=np.int32).tobytes() for found in encoded]


@cache
def _clip_words() -> WordIds:
    return WordIds(clip_tokenizer(), r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")


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
