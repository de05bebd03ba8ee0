"""What is known about the pairs of a batch beyond the diagonal: which share a target, which are no true negatives.

Reads the label, article and token columns of a batch; answers tile by tile, so that nothing of size B x B is ever held.
A pair whose label sets overlap is a partial positive (with soft targets) and stays in the loss even if it comes from
one article; of the other pairs, those of one article or one caption can be left out. Captions are compared by a 64-bit
hash of their token ids: a false match among 65,536 captions has a chance of one in ten thousand million.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from biomedclip.training.gather import gather_rows, rank

LEFT_OUT = -1e30
"""Logit of a pair that is left out: finite, so that a row of such pairs alone gives no NaN; its exponential is 0."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows r.start to r.stop of this process against columns c.start to c.stop of all."""

    rows: slice
    columns: slice
    own: int
    """Offset of the diagonal that holds the rows' own columns."""

    @property
    def has_own(self) -> bool:
        """Whether any row meets its own column here."""
        rows, columns = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        return -rows < self.own < columns


def tiles(rows: int, columns: int, first_row: int, size: int) -> Iterator[Tile]:
    """The tiles of a (rows, columns) matrix whose row i has its own pair at column first_row + i."""
    for top in range(0, rows, size):
        for left in range(0, columns, size):
            yield Tile(
                slice(top, min(top + size, rows)), slice(left, min(left + size, columns)), first_row + top - left
            )


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Facts about the pairs of b rows here and B columns everywhere. `no_facts()` is plain CLIP: one positive a row."""

    groups: tuple[tuple[Tensor, Tensor], ...] = ()
    """Ids (b,) and (B,): two different samples of one id, from 0, are left out; negative ids are nobody's."""
    members: tuple[Tensor, Tensor] | None = None
    """(b, C) and (B, C): one where the sample has the label."""
    norms: tuple[Tensor, Tensor] | None = None
    """(b,) and (B,): sum of the overlaps of a row."""
    strength: float = 0.0
    """Share of the target that follows label overlap."""

    def overlap(self, tile: Tile) -> Tensor | None:
        """Jaccard overlap of the label sets, 1 for the own pair; None without soft targets."""
        if self.members is None:
            return None
        rows, columns = self.members[0][tile.rows], self.members[1][tile.columns]
        shared = rows @ columns.T
        union = rows.sum(dim=1)[:, None] + columns.sum(dim=1)[None, :] - shared
        shared.div_(union.clamp_(min=1))
        if tile.has_own:
            shared.diagonal(tile.own).fill_(1.0)
        return shared

    def left_out(self, tile: Tile, overlap: Tensor | None) -> Tensor | None:
        """True where a pair is neither positive nor negative; None where no pair can be."""
        found: Tensor | None = None
        for rows, columns in self.groups:
            here = rows[tile.rows]
            same = (here[:, None] == columns[tile.columns][None, :]) & (here >= 0)[:, None]
            found = same if found is None else found | same
        if found is None:
            return None
        if tile.has_own:
            found.diagonal(tile.own).fill_(False)
        return found if overlap is None else found & (overlap == 0)


def no_facts() -> Pairs:
    """Nothing is known: each row's own column is its one positive, all others are negatives."""
    return Pairs()


def batch_pairs(
    batch: dict[str, Tensor],
    *,
    soft_targets: float = 0.0,
    same_article: bool = False,
    same_caption: bool = False,
    dtype: torch.dtype = torch.float32,
    tile: int = 1024,
) -> Pairs:
    """The facts of a batch with `labels` (b, K; -1 pads), `article` (b,) and `text` (b, L), gathered over processes."""
    groups = []
    if same_article:
        groups.append((batch["article"], gather_rows(batch["article"])))
    if same_caption:
        captions = caption_ids(batch["text"])
        groups.append((captions, gather_rows(captions)))
    labels = batch["labels"] if soft_targets else None
    if labels is None or not labels.numel():
        return Pairs(groups=tuple(groups))
    everywhere = gather_rows(labels.contiguous())
    known, ids = torch.unique(everywhere.clamp(min=-1), return_inverse=True)
    members = torch.zeros(len(everywhere), len(known), device=labels.device, dtype=dtype)
    members.scatter_(1, ids, (everywhere >= 0).to(dtype))
    first = rank() * len(labels)
    pairs = Pairs(
        groups=tuple(groups), members=(members[first : first + len(labels)], members), strength=float(soft_targets)
    )
    norm = torch.zeros(len(labels), device=labels.device, dtype=dtype)
    for part in tiles(len(labels), len(everywhere), first, tile):
        overlap = pairs.overlap(part)
        if overlap is not None:
            norm[part.rows] += overlap.sum(dim=1)
    return Pairs(groups=pairs.groups, members=pairs.members, strength=pairs.strength, norms=(norm, gather_rows(norm)))


def caption_ids(tokens: Tensor) -> Tensor:
    """(b,) ids from 0 on, equal where two rows of (b, L) token ids are equal: a polynomial hash modulo 2**63."""
    ids = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    for column in tokens.to(torch.int64).unbind(dim=1):
        ids = ids * 6364136223846793005 + column + 1442695040888963407
        ids = ids ^ (ids >> 29)
    return ids & 0x7FFFFFFFFFFFFFFF
