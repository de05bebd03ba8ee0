"""CLIP's loss and InfoLOOB, exact, tile by tile: memory grows with the batch, not with its square.

Reads this process's unit image embeddings, the unit text embeddings of all processes, and what is known of the pairs;
yields this process's share of the loss. The forward pass keeps the log-sums of rows and columns, the backward pass
computes each tile of logits again: four matrix products in place of the six of a loss that holds both logit matrices,
and three where the logits are so few that they are kept. It is one-sided: images stay where they are, texts are
gathered (by the caller, once for all losses), and of the columns only two numbers each travel. The mean over the
processes of what is returned is the loss of the global batch, which is what gradient averaging expects.

    L = a_row mean_i w_i [log sum_j exp(S_ij) - sum_j t_ij S_ij]  +  the same over columns with a_column,  S = s I T^T
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from biomedclip.training.gather import gather_rows, world_size
from biomedclip.training.objectives.pairs import LEFT_OUT, Pairs, Tile, no_facts, tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """What is summed: `loob` leaves the own pair out of the log-sums."""

    pairs: Pairs
    loob: bool
    row_share: float
    column_share: float
    first_row: int
    tile: int


def clip_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, pairs: Pairs | None = None, weights: Tensor | None = None,
    first_row: int = 0, tile: int = 0,
) -> Tensor:  # fmt: skip
    """Scalar CLIP loss of (b, D) image and (B, D) text unit embeddings; image i belongs to text `first_row` + i.

    The mean of image-to-text and text-to-image cross entropy (Radford et al. 2021, figure 3), equal to open_clip's
    `ClipLoss` without `pairs`. `logit_scale` is the factor itself (already exponentiated). `weights` (b,) multiply the
    loss of each sample, in both directions. `tile` is the side of the tiles, 0 for one that suits the device.
    """
    return clip_losses(image, text, logit_scale, pairs=pairs, weights=weights, first_row=first_row, tile=tile)[0]


def infoloob_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, pairs: Pairs | None = None, first_row: int = 0,
    both: bool = True, tile: int = 0,
) -> Tensor:  # fmt: skip
    """Scalar InfoLOOB loss (Poole et al. 2019; Fürst et al. 2022, equation 6), times 1 / logit_scale as CLOOB takes it.

    Like `clip_loss`, with the own pair left out of the log-sum, so that it does not saturate; `both` adds the two
    directions' halves, else images alone are anchors. A row without any negative left has no loss. The factor
    1 / logit_scale carries no gradient.
    """
    return infoloob_losses(image, text, logit_scale, pairs=pairs, first_row=first_row, both=both, tile=tile)[0]


def infoloob_losses(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, pairs: Pairs | None = None, first_row: int = 0,
    both: bool = True, tile: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`infoloob_loss`, and the (b,) losses of the samples, without gradient, whose mean it is."""
    loss, samples = _losses(image, text, logit_scale, pairs, None, first_row, tile, loob=True, both=both)
    return loss / logit_scale.detach(), samples / logit_scale.detach()


def clip_losses(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, pairs: Pairs | None = None, weights: Tensor | None = None,
    first_row: int = 0, tile: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`clip_loss`, and the (b,) losses of the samples, without gradient, whose mean it is."""
    return _losses(image, text, logit_scale, pairs, weights, first_row, tile, loob=False, both=True)


def _losses(
    image: Tensor, text: Tensor, logit_scale: Tensor, pairs: Pairs | None, weights: Tensor | None, first_row: int,
    tile: int, *, loob: bool, both: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    share = 0.5 if both else 1.0
    form = _Form(
        pairs=pairs or no_facts(), loob=loob, row_share=share, column_share=share if both else 0.0,
        first_row=first_row, tile=tile or tile_for(image),
    )  # fmt: skip
    with torch.autocast(image.device.type, enabled=False):
        image, text = at_least_float32(image), at_least_float32(text)
        ones = image.new_ones(len(image)) if weights is None else weights.detach().to(image.dtype)
        loss, samples = _Softmax.apply(image, text, logit_scale.to(image.dtype), ones, gather_rows(ones), form)
    return loss, samples


def tile_for(rows: Tensor) -> int:
    """A tile side for the device: cached in a CPU core, many enough numbers for a GPU."""
    return 1024 if rows.device.type == "cpu" else 8192


def kept_bytes(rows: Tensor) -> int:
    """Bytes of logits up to which the forward pass keeps them all: nothing that a device would notice.

    On a CPU a batch of 4,096 in float32.
    """
    return (64 if rows.device.type == "cpu" else 512) * 2**20


def at_least_float32(rows: Tensor) -> Tensor:
    """The tensor itself if float32 or float64, else in float32: log-sums of bf16 logits lose the third digit."""
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, weight: Tensor, all_weight: Tensor, form: _Form
    ) -> tuple[Tensor, Tensor]:
        ctx.kept = [] if len(image) * len(text) * image.element_size() <= kept_bytes(image) else None
        rows, columns, targets = _log_sums(image, text, scale, weight, all_weight, form, ctx.kept)
        first, last = form.first_row, form.first_row + len(image)
        if form.loob:
            # Without a negative there is nothing to be told apart from.
            weight = weight * (rows > LEFT_OUT / 2)
            all_weight = all_weight * (columns > LEFT_OUT / 2) if form.column_share else all_weight
        samples = form.row_share * weight * rows
        if form.column_share:
            samples += form.column_share * all_weight[first:last] * columns[first:last]
        if targets is None:
            own = scale * torch.linalg.vecdot(image, text[first:last])
            targets = (form.row_share * weight + form.column_share * all_weight[first:last]) * own
        samples -= targets
        ctx.save_for_backward(image, text, scale, weight, all_weight, rows, columns)
        ctx.form = form
        ctx.mark_non_differentiable(samples)
        return samples.mean(), samples

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, weight, all_weight, rows, columns = ctx.saved_tensors
        form: _Form = ctx.form
        to_image, to_text = torch.zeros_like(image), torch.zeros_like(text)
        for tile, logits, other in _logit_tiles(image, text, scale, form, ctx.kept):
            slope = _slope(logits, other, tile, weight, all_weight, rows, columns, form)
            to_image[tile.rows].addmm_(slope, text[tile.columns])
            to_text[tile.columns].addmm_(slope.T, image[tile.rows])
        factor = gradients[0] / len(image)
        # The sum of slope x cosine over all pairs, without another pass: each image times what it collected.
        to_scale = factor * torch.linalg.vecdot(image, to_image).sum()
        return to_image.mul_(factor * scale), to_text.mul_(factor * scale), to_scale, None, None, None


def _logit_tiles(
    image: Tensor, text: Tensor, scale: Tensor, form: _Form, kept: list[Tensor] | None
) -> Iterator[tuple[Tile, Tensor, Tensor]]:
    """Each tile with its logits and as much room beside them; pairs left out are not marked yet.

    Both are buffers that the next tile overwrites: fresh memory for each step of a tile costs a page fault every 4 KiB.
    The scale goes into the rows, where it costs no pass over the tile. An empty list `kept` is filled with copies of
    the logits, a filled one is read from.
    """
    side = form.tile
    room = [image.new_empty(min(side, len(image)) * min(side, len(text))) for _ in range(2)]
    rows, known = image, list(kept or ())
    for number, tile in enumerate(tiles(len(image), len(text), form.first_row, side)):
        columns = text[tile.columns]
        if tile.columns.start == 0:
            rows = image[tile.rows] * scale
        logits, other = (part[: len(rows) * len(columns)].view(len(rows), len(columns)) for part in room)
        if known:
            logits.copy_(known[number])
        else:
            torch.mm(rows, columns.T, out=logits)
            if kept is not None:
                kept.append(logits.clone())
        yield tile, logits, other


def _log_sums(
    image: Tensor, text: Tensor, scale: Tensor, weight: Tensor, all_weight: Tensor, form: _Form,
    kept: list[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Log-sums of the rows (b,) and the columns (B,), and the targets' share of each row (b,) where they are soft."""
    largest, total = image.new_full((len(image),), LEFT_OUT), image.new_zeros(len(image))
    column_largest, column_total = image.new_full((len(text),), LEFT_OUT), image.new_zeros(len(text))
    soft = None if form.pairs.members is None else image.new_zeros(len(image))
    for tile, logits, other in _logit_tiles(image, text, scale, form, kept):
        overlap = form.pairs.overlap(tile)
        if overlap is not None and soft is not None:
            soft[tile.rows] += torch.linalg.vecdot(_targets(overlap, tile, weight, all_weight, form), logits)
        _leave_out(logits, tile, overlap, form)
        _add_exponentials(logits, other, 1, largest[tile.rows], total[tile.rows])
        if form.column_share:
            _add_exponentials(logits, other, 0, column_largest[tile.columns], column_total[tile.columns])
    if form.column_share and world_size() > 1:
        here = column_largest.clone()
        dist.all_reduce(column_largest, op=dist.ReduceOp.MAX)
        column_total.mul_(torch.exp(here - column_largest))
        dist.all_reduce(column_total)
    columns = column_largest + column_total.log() if form.column_share else column_largest
    return largest + total.log(), columns, soft


def _add_exponentials(logits: Tensor, other: Tensor, axis: int, largest: Tensor, total: Tensor) -> None:
    """Fold a tile into running log-sums, in place: the sum of exp(logit - largest so far); `other` is overwritten."""
    before = largest.clone()
    torch.maximum(largest, logits.amax(dim=axis), out=largest)
    total.mul_(torch.exp(before - largest))
    total.add_(torch.sub(logits, largest.unsqueeze(axis), out=other).exp_().sum(dim=axis))


def _slope(
    logits: Tensor, other: Tensor, tile: Tile, weight: Tensor, all_weight: Tensor, rows: Tensor, columns: Tensor,
    form: _Form,
) -> Tensor:  # fmt: skip
    """Derivative of b times the loss by the logits of a tile, in `other`; the logits are overwritten."""
    overlap = form.pairs.overlap(tile)
    _leave_out(logits, tile, overlap, form)
    # A weight goes into the exponent's offset, where it costs no pass over the tile.
    row_offset = rows[tile.rows] - (form.row_share * weight[tile.rows]).log()
    slope = torch.sub(logits, row_offset[:, None], out=other).exp_()
    if form.column_share:
        offset = columns[tile.columns] - (form.column_share * all_weight[tile.columns]).log()
        slope += logits.sub_(offset).exp_()
    if overlap is not None:
        slope -= _targets(overlap, tile, weight, all_weight, form)
    elif tile.has_own:
        own = slope.diagonal(tile.own)
        start = max(-tile.own, 0) + tile.rows.start
        column = max(tile.own, 0) + tile.columns.start
        own -= form.row_share * weight[start : start + len(own)]
        own -= form.column_share * all_weight[column : column + len(own)]
    return slope


def _leave_out(logits: Tensor, tile: Tile, overlap: Tensor | None, form: _Form) -> None:
    ignored = form.pairs.left_out(tile, overlap)
    if ignored is not None:
        logits.masked_fill_(ignored, LEFT_OUT)
    if form.loob and tile.has_own:
        logits.diagonal(tile.own).fill_(LEFT_OUT)


def _targets(overlap: Tensor, tile: Tile, weight: Tensor, all_weight: Tensor, form: _Form) -> Tensor:
    """Weighted targets of a tile: (1 - strength) on the own pair plus strength x overlap over its sum."""
    pairs = form.pairs
    norms = pairs.norms or (overlap.new_ones(len(weight)), overlap.new_ones(len(all_weight)))
    row, column = form.row_share * weight[tile.rows], form.column_share * all_weight[tile.columns]
    shares = (row / norms[0][tile.rows])[:, None] + (column / norms[1][tile.columns])[None, :]
    targets = pairs.strength * overlap * shares
    if tile.has_own:
        own = targets.diagonal(tile.own)
        top, left = max(-tile.own, 0), max(tile.own, 0)
        own += (1 - pairs.strength) * (row[top : top + len(own)] + column[left : left + len(own)])
    return targets
