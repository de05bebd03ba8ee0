"""A SentencePiece model file as a tokenizer of the Rust library, numbered as XLM-R numbers its words.

Reads the published `.spm` itself: its protocol buffer has three things that matter (pieces with scores, the table of
normalisation, two switches), and reading them here spares a C++ library that nothing else needs. XLM-R keeps fairseq's
numbers: <s> 0, <pad> 1, </s> 2, <unk> 3, then the file's pieces from its fourth on, and <mask> last.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.errors import CheckpointError, MissingExtra

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FIRST = ("<s>", "<pad>", "</s>", "<unk>")
_CONTROL = 3  # the file's own <unk>, <s>, </s>
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of sentencepiece_model.proto, ModelProto
_UNIGRAM = 1


def read_sentencepiece(path: str | Path) -> Tokenizer:
    """The tokenizer of a unigram model file, adding <s> and </s>. Raises CheckpointError where it is none."""
    try:
        from tokenizers import Tokenizer as Rust
        from tokenizers import models, normalizers, pre_tokenizers, processors
    except ImportError:
        raise MissingExtra("build", "tokenizers") from None
    pieces, table = _read_model(Path(path))
    words = [(name, 0.0) for name in FIRST] + pieces[_CONTROL:] + [("<mask>", 0.0)]
    tokenizer = Rust(models.Unigram(words, unk_id=FIRST.index("<unk>"), byte_fallback=False))
    if table and not _is_whole(table):
        raise CheckpointError(path, "holds a broken table of normalisation", found=f"{len(table):,} bytes",
                              todo="download it again")  # fmt: skip
    cleaned: list[Any] = [normalizers.Precompiled(table)] if table else []
    # SentencePiece takes off outer spaces and joins inner ones before it puts its own mark in front of each word.
    tokenizer.normalizer = normalizers.Sequence([*cleaned, normalizers.Replace(_several_spaces(), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    start, end = FIRST[0], FIRST[2]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[start, "$A", end], special_tokens=[(start, FIRST.index(start)), (end, FIRST.index(end))]
    )
    return tokenizer


def _several_spaces() -> Any:
    from tokenizers import Regex

    return Regex(" {2,}")


def _is_whole(table: bytes) -> bool:
    """Whether a table is what the Rust library, which raises nothing narrower than Exception, can read.

    Four bytes give the size of a trie of 32-bit numbers; behind it is UTF-8 text.
    """
    text = 4 + int.from_bytes(table[:4], "little") // 4 * 4
    try:
        table[text:].decode()
    except UnicodeDecodeError:
        return False
    return text <= len(table)


def _read_model(path: Path) -> tuple[list[tuple[str, float]], bytes]:
    """(piece, score) of every piece, and the table of normalisation."""
    pieces: list[tuple[str, float]] = []
    table = b""
    kind = _UNIGRAM
    try:
        for number, value in _fields(path.read_bytes()):
            if number == _PIECES:
                entry = dict(_fields(value))
                pieces.append((entry[1].decode(), entry.get(2, 0.0)))
            elif number == _TRAINER:
                kind = dict(_fields(value)).get(3, _UNIGRAM)
            elif number == _NORMALIZER:
                table = dict(_fields(value)).get(2, b"")
    except (ValueError, KeyError, AttributeError, TypeError, IndexError, struct.error) as error:
        raise CheckpointError(
            path, "is no SentencePiece model", found=repr(error)[:80], todo="download it again"
        ) from None
    except FileNotFoundError:
        raise CheckpointError(path, "there is no such file", todo="check the path") from None
    if len(pieces) <= _CONTROL or kind != _UNIGRAM:
        raise CheckpointError(
            path, "is no unigram SentencePiece model", found=f"{len(pieces)} pieces, model type {kind}",
            todo="download it again",
        )  # fmt: skip
    return pieces, table


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer message's fields: bytes, ints, or floats for 32-bit ones."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        value: Any
        if wire == 0:
            value, position = _varint(data, position)
        elif wire == 1:
            value, position = struct.unpack_from("<d", data, position)[0], position + 8
        elif wire == 5:
            value, position = struct.unpack_from("<f", data, position)[0], position + 4
        elif wire == 2:
            length, position = _varint(data, position)
            value, position = data[position : position + length], position + length
            if len(value) != length:
                raise ValueError("cut short")
        else:
            raise ValueError(f"wire type {wire}")
        yield key >> 3, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[position]
        number |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return number, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
