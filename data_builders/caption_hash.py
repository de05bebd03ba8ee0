"""Captions in, exact and near duplicates among them out: normalised text, MinHash bands, and the true overlap.

Two captions are near duplicates where the sets of their three-word sequences overlap by a Jaccard index of at least a
threshold. MinHash (Broder 1997) proposes candidates: 32 minima in 8 bands of 4 find a pair of index 0.8 with 98.5 % and
one of 0.9 with 99.98 %; what is proposed is then compared by its words, so nothing is joined that should not be. Only
the bands are kept, 64 bytes a caption.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import pairwise

import numpy as np

_WORDS = re.compile(r"[^\W_]+")
_BANDS, _ROWS = 8, 4
_CHUNK = 20_000
_CROWDED = 200
_MIX = np.uint64(0x9E3779B97F4A7C15)


def normalise_caption(caption: str) -> str:
    """The caption's words in lower case, compatibility forms unified (NFKC), joined by single blanks."""
    if not caption.isascii():
        caption = unicodedata.normalize("NFKC", caption)
    return " ".join(_WORDS.findall(caption.lower()))


def hash_captions(captions: Sequence[str]) -> np.ndarray:
    """(N,) uint64 of the normalised captions; equal captions have equal hashes, others practically never."""
    digests = (sha256(normalise_caption(caption).encode()).digest()[:8] for caption in captions)
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def jaccard(left: str, right: str) -> float:
    """Shared three-word sequences of two captions over all of theirs, 0 to 1."""
    first, second = _shingles(left), _shingles(right)
    return len(first & second) / len(first | second) if first or second else 1.0


def near_captions(captions: Sequence[str], min_jaccard: float) -> Iterator[tuple[int, int]]:
    """Positions (i, j), i < j, of captions whose index is at least `min_jaccard`; collapse equal ones before.

    Where more than 200 share a band (forms such as `Case 3, axial view`), each is compared with the first of them and
    with its neighbour instead of with all.
    """
    seen: set[tuple[int, int]] = set()
    bands = _bands(captions)
    for band in range(_BANDS):
        order = np.argsort(bands[:, band], kind="stable")
        ordered = bands[order, band]
        edges = np.flatnonzero(np.diff(ordered, prepend=~ordered[:1], append=~ordered[-1:]))
        for start, stop in pairwise(edges.tolist()):
            for pair in _pairs(np.sort(order[start:stop]).tolist()):
                if pair not in seen:
                    seen.add(pair)
                    if jaccard(captions[pair[0]], captions[pair[1]]) >= min_jaccard:
                        yield pair


def _pairs(members: list[int]) -> Iterator[tuple[int, int]]:
    if len(members) <= _CROWDED:
        yield from ((members[i], members[j]) for i in range(len(members)) for j in range(i + 1, len(members)))
        return
    for before, member in pairwise(members):
        yield members[0], member
        if before != members[0]:
            yield before, member


def _shingles(caption: str) -> set[tuple[str, ...]]:
    words = normalise_caption(caption).split()
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))} if words else set()


def _bands(captions: Sequence[str]) -> np.ndarray:
    """(N, 8) uint64: a hash of the four minima of each band."""
    bands = np.empty((len(captions), _BANDS), dtype=np.uint64)
    seeds = np.random.default_rng(0).integers(1, 2**63, size=(_BANDS * _ROWS, 2), dtype=np.uint64)
    for start in range(0, len(captions), _CHUNK):
        hashes, starts = _shingle_hashes(captions[start : start + _CHUNK])
        minima = np.zeros((len(starts), _BANDS), dtype=np.uint64)
        for number, (multiplier, addend) in enumerate(seeds):
            mixed = hashes * (multiplier | np.uint64(1)) + addend
            mixed ^= mixed >> np.uint64(29)
            mixed *= _MIX
            least = np.minimum.reduceat(mixed, starts)
            minima[:, number // _ROWS] = (minima[:, number // _ROWS] ^ least) * _MIX
        bands[start : start + len(starts)] = minima
    return bands


def _shingle_hashes(captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all three-word sequences, caption after caption, and where each caption's begin."""
    words: list[int] = []
    starts = np.empty(len(captions), dtype=np.int64)
    for number, caption in enumerate(captions):
        starts[number] = len(words)
        # Padding gives a caption of one or two words a sequence of its own; it never shares one with another's end.
        tokens = normalise_caption(caption).split() or [""]
        words += [zlib.crc32(token.encode()) for token in tokens]
        words += [0] * max(0, 3 - len(tokens))
    values = np.array(words, dtype=np.uint64)
    hashes = values * np.uint64(3)
    hashes[:-1] = (hashes[:-1] ^ values[1:]) * _MIX
    hashes[:-2] = (hashes[:-2] ^ values[2:] * np.uint64(7)) * _MIX
    hashes ^= hashes >> np.uint64(31)
    # A sequence must not run on into the next caption: the last two of each repeat its last whole one.
    ends = np.append(starts[1:], len(values))
    for back in (2, 1):
        hashes[ends - back] = hashes[ends - 3]
    return hashes, starts
