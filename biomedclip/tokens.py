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


# What ftfy leaves alone, character by character, where the whole does not look wrongly decoded: ASCII, Latin, Greek and
# Cyrillic letters without combining marks, dashes, signs, arrows, mathematics, kana and Han. A test asks ftfy.
_UNTOUCHED = re.compile(
    "[^\\t\\n\\x20-\\x7e\u00a0-\u0131\u0134-\u013e\u0141-\u0148\u014a-\u017e\u0391-\u03a1\u03a3-\u03ce"
    "\u0410-\u044f\u2002-\u200a\u2010-\u2015\u2020-\u2022\u2026\u2030\u2032\u2033\u2070\u2074-\u208e\u20ac\u2103"
    "\u2122\u2190-\u2193\u2200-\u2265\u25a0-\u25ff\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff]"
)
_QUOTES = str.maketrans("\u02bc\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "'''''\"\"\"\"")


def mend_text(text: str) -> str:
    """A text with its encoding mended and HTML entities resolved, equal to ftfy and two rounds of `html.unescape`.

    Most captions need no mending, and finding that out is quicker than what ftfy does to leave them as they are.
    """
    if text.isascii():
        if "&" not in text and _UNTOUCHED.search(text) is None:
            return text
    elif "&" not in text and "\n" not in text:
        from ftfy.badness import is_bad

        straight = text.translate(_QUOTES)
        if _UNTOUCHED.search(straight) is None and not is_bad(text) and not is_bad(straight):
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
    encodings = clip_tokenizer().encode_batch_fast([clean_caption(t) for t in texts], add_special_tokens=False)
    rows = []
    for encoding in encodings:
        ids = [START_ID, *encoding.ids[: context_length - 2], END_ID]
        rows.append(ids + [0] * (context_length - len(ids)))
    return rows


@cache
def clip_tokenizer() -> Tokenizer:
    """The Rust tokenizer. Raises MissingExtra where `tokenizers` is not installed."""
    try:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    except ImportError:
        raise MissingExtra("build", "tokenizers") from None
    packed = (resources.files("biomedclip") / "vocabularies" / "clip_merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    symbols = list(_byte_symbols().values())
    vocabulary = [*symbols, *(f"{s}</w>" for s in symbols), *("".join(pair) for pair in merges), START, END]
    model = models.BPE(
        vocab={token: number for number, token in enumerate(vocabulary)},
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


def _byte_symbols() -> dict[int, str]:
    """Byte -> printable character, GPT-2's table in its own order, which fixes the first 256 ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return table
