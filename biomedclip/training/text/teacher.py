"""What a sentence encoder makes of sentences: unit vectors, reduced to the width of the tower that learns from them.

Reads a folder in transformers' format; yields (N, D) vectors. The encoder runs once over all sentences, sorted by
length, and its vectors are kept in parts, so an interrupted run goes on. They are turned onto their D strongest
directions without centring, which keeps the cosines between sentences as well as D numbers can (Eckart and Young).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from biomedclip.errors import CheckpointError
from biomedclip.files import explain_full_disk, sha256_file, sha256_json, write_atomic
from biomedclip.progress import Progress, silent

PART = 8192
BATCH = 64


def embed_sentences(
    sentences: list[str], teacher: str | Path, cache: str | Path, *, max_tokens: int, progress: Progress = silent
) -> NDArray[np.float32]:
    """(N, T) unit vectors of the sentences by the encoder in the folder `teacher`, parts of it kept under `cache`.

    Raises CheckpointError where the folder holds no such encoder.
    """
    model, tokenise = _load(teacher)
    # Weights, config and tokenizer: what a vector depends on beside the sentence.
    files = sorted(path for path in Path(teacher).iterdir() if path.suffix in (".safetensors", ".json", ".txt"))
    own = sha256_json([[path.name, sha256_file(path)] for path in files])
    order = np.argsort([len(sentence) for sentence in sentences], kind="stable")
    vectors: NDArray[np.float32] | None = None
    with progress("sentences by the teacher", len(sentences)) as advance:
        for start in range(0, len(order), PART):
            rows = order[start : start + PART]
            part = [sentences[row] for row in rows]
            path = Path(cache) / f"{sha256_json([own, max_tokens, part])[:24]}.npy"
            known = _read_part(path, len(part))
            if known is None:
                made = np.concatenate([_embed(model, tokenise, part[i : i + BATCH], max_tokens)
                                       for i in range(0, len(part), BATCH)])  # fmt: skip
                known = made.astype(np.float16)
                path.parent.mkdir(parents=True, exist_ok=True)
                with explain_full_disk(path.parent), write_atomic(path) as file:
                    np.save(file, known, allow_pickle=False)
            if vectors is None:
                vectors = np.empty((len(sentences), known.shape[1]), dtype=np.float32)
            vectors[rows] = known
            advance(len(rows))
    if vectors is None:
        raise CheckpointError(teacher, "was given no sentence")
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def reduce_width(vectors: NDArray[np.float32], width: int) -> tuple[NDArray[np.float32], float]:
    """(N, width) unit vectors along the strongest directions, and the share of the squared length that is kept."""
    if vectors.shape[1] <= width:
        return np.pad(vectors, ((0, 0), (0, width - vectors.shape[1]))), 1.0
    values, directions = np.linalg.eigh((vectors.T @ vectors).astype(np.float64))
    strongest = directions[:, ::-1][:, :width].astype(np.float32)
    reduced = vectors @ strongest
    kept = float(values[::-1][:width].sum() / values.sum())
    return reduced / np.maximum(np.linalg.norm(reduced, axis=1, keepdims=True), 1e-12), kept


def _read_part(path: Path, count: int) -> NDArray[np.float16] | None:
    """A part that an earlier run left, where it is whole."""
    try:
        # Mapped, because a header may promise more than the file holds, and that would be allocated first.
        known = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, OverflowError):
        return None
    if known.dtype != np.float16 or known.ndim != 2 or len(known) != count or not np.isfinite(known).all():
        return None
    return np.array(known)


def _embed(model: Any, tokenise: Any, sentences: list[str], max_tokens: int) -> NDArray[np.float32]:
    tokens = tokenise(sentences, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    with torch.inference_mode():
        states = model(**tokens).last_hidden_state
        seen = tokens["attention_mask"][..., None].to(states)
        mean = (states * seen).sum(1) / seen.sum(1)
        found: NDArray[np.float32] = F.normalize(mean, dim=-1).numpy()
    return found


def _load(folder: str | Path) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(folder, "holds no config.json", todo="name a sentence encoder in transformers' format")
    try:
        options = {"local_files_only": True, "trust_remote_code": False}
        tokenise: Any = AutoTokenizer.from_pretrained(str(folder), **options)
        model: Any = AutoModel.from_pretrained(str(folder), use_safetensors=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            folder, "is no encoder that transformers can load", found=" ".join(str(error).split())[:120]
        ) from None  # fmt: skip
    return model.eval(), tokenise
