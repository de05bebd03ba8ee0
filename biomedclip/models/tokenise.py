"""A sentence's way into a model: token ids of the kind, length and padding that its facts name.

Reads the facts (`biomedclip.models.zoo.Tokenizer`) and the tokenizer files they need; yields a callable from sentences
to (B, L) int64 ids. CLIP's byte pairs are open_clip's tokenizer, so that what knows it keeps knowing it; WordPiece is
built from `vocab.txt` by the Rust tokenizers library, with no request to anywhere. Every row is padded to the context,
unless the facts say otherwise, so that an embedding never depends on its neighbours in a batch.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.errors import CheckpointError, MissingExtra
from biomedclip.files import split_lines
from biomedclip.models.zoo import Tokenizer

if TYPE_CHECKING:
    import torch

Tokenise = Callable[..., "torch.Tensor"]
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def make_tokenizer(facts: Tokenizer, files: Mapping[str, Path], where: str) -> Tokenise:
    """A callable `(texts, context_length=None) -> (B, L)` ids. Raises CheckpointError where a file is missing or wrong.

    `files` are the model's tokenizer files by name.
    """
    if facts.kind == "clip":
        from open_clip.tokenizer import SimpleTokenizer

        return SimpleTokenizer(context_length=facts.context)
    return TokenRows(facts, _ENCODERS[facts.kind](facts, files, where), dict(files))


class TokenRows:
    """Sentences to padded rows of ids, by a Rust or transformers tokenizer."""

    def __init__(self, facts: Tokenizer, encode: Callable[[list[str], int], list[list[int]]], files: dict[str, Path]):
        self.facts, self.encode, self.files = facts, encode, files
        self.context_length = facts.context

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> torch.Tensor:
        """(B, L) int64 ids of one or several sentences; a longer one is cut and keeps its end token."""
        import torch

        length = context_length or self.context_length
        sentences = [texts] if isinstance(texts, str) else list(texts)
        if self.facts.clean == "open_clip":
            sentences = [clean_text(text) for text in sentences]
        rows = self.encode(sentences, length)
        width = length if self.facts.pad == "max" else max((len(row) for row in rows), default=0)
        ids = torch.full((len(rows), width), self.facts.pad_id, dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        return ids


def clean_text(text: str) -> str:
    """A sentence with mended encoding, resolved HTML entities and single spaces: open_clip's `whitespace` cleaning."""
    import ftfy

    text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())


class RustEncoder:
    """Rows of ids with start and end tokens, by the tokenizers library."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str], length: int) -> list[list[int]]:
        """Ids of each text, at most `length`."""
        self.tokenizer.enable_truncation(length)
        return [row.ids for row in self.tokenizer.encode_batch_fast(texts)]


def _wordpiece(facts: Tokenizer, files: Mapping[str, Path], where: str) -> RustEncoder:
    try:
        from tokenizers import Tokenizer as Rust
        from tokenizers import models, normalizers, pre_tokenizers, processors
    except ImportError:
        raise MissingExtra("build", "tokenizers") from None
    path = _file(files, "vocab.txt", where)
    words = split_lines(path.read_text(encoding="utf-8"))
    vocabulary = {word: number for number, word in enumerate(words)}
    missing = [token for token in _SPECIAL if token not in vocabulary]
    if missing:
        raise CheckpointError(
            path, f"is no WordPiece vocabulary: it lacks {', '.join(missing)}", found=f"{len(words):,} lines",
            todo="download it again",
        )  # fmt: skip
    tokenizer = Rust(models.WordPiece(vocabulary, unk_token=_SPECIAL[1], max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=facts.lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    # A special token written in a text stands for itself, as in transformers' tokenizers.
    tokenizer.add_special_tokens([token for token in (*_SPECIAL, "[MASK]") if token in vocabulary])
    return RustEncoder(tokenizer)


def _json(facts: Tokenizer, files: Mapping[str, Path], where: str) -> RustEncoder:
    from tokenizers import Tokenizer as Rust

    path = _file(files, "tokenizer.json", where)
    try:
        known = json.loads(path.read_bytes())["model"]["type"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(path, "is no tokenizer", found=repr(error)[:80], todo="download it again") from error
    if known not in ("BPE", "WordPiece", "Unigram", "WordLevel"):
        raise CheckpointError(path, "is a tokenizer of an unknown kind", found=known, todo="download it again")
    tokenizer = Rust.from_file(str(path))
    tokenizer.no_padding()
    return RustEncoder(tokenizer)


def _sentencepiece(facts: Tokenizer, files: Mapping[str, Path], where: str) -> RustEncoder:
    from biomedclip.models.sentencepiece import read_sentencepiece

    found = [path for name, path in files.items() if name.endswith((".spm", ".model"))]
    if not found:
        raise CheckpointError(
            where, "needs a .spm file, which was not found", found=", ".join(sorted(files)) or "no tokenizer files",
            todo=f"run: biomedclip models pull {where}, or put it beside the weights",
        )  # fmt: skip
    return RustEncoder(read_sentencepiece(found[0]))


class AutoEncoder:
    """Rows of ids by a tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str], length: int) -> list[list[int]]:
        """Ids of each text, at most `length`."""
        rows: list[list[int]] = self.tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        return rows


def _auto(facts: Tokenizer, files: Mapping[str, Path], where: str) -> AutoEncoder:
    from transformers import AutoTokenizer

    if not files:
        raise CheckpointError(where, "has no tokenizer files", todo=f"run: biomedclip models pull {where}")
    folder = next(iter(files.values())).parent
    try:
        return AutoEncoder(AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            folder, "holds no tokenizer that transformers reads", found=" ".join(str(error).split())[:160],
            todo=f"run: biomedclip models pull {where}",
        ) from error  # fmt: skip


def _file(files: Mapping[str, Path], name: str, where: str) -> Path:
    if name not in files:
        raise CheckpointError(
            where, f"needs {name}, which was not found", found=", ".join(sorted(files)) or "no tokenizer files",
            todo=f"run: biomedclip models pull {where}, or put {name} beside the weights",
        )  # fmt: skip
    return files[name]


_ENCODERS: dict[str, Callable[[Tokenizer, Mapping[str, Path], str], Any]] = {
    "wordpiece": _wordpiece, "json": _json, "sentencepiece": _sentencepiece, "auto": _auto,
}  # fmt: skip
