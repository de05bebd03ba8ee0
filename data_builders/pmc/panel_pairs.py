"""A figure's pair in, the same pair and those of its panels out, as the config asks.

A figure is cut where caption and picture agree on its panels and its licence lets a part be given on. A panel is an
item of its own in the ledger: the figure is seen once and kept, or dropped as `replaced_by_panels`, and each panel is
seen once more and kept, so that what was seen is still what was kept and dropped. A compound figure that stays whole
says why in its flags: `panels_not_allowed` (the licence), `panels_shared` (several graphics have one caption) or
`panels_uncut` (caption and picture do not agree, or not surely enough).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from biomedclip.config import Config
from biomedclip.images import read_rgb
from biomedclip.schema import Drop, Pair
from data_builders.pmc.panel_boxes import figure_name, read_boxes
from data_builders.pmc.panel_captions import split_caption
from data_builders.pmc.panels import MIN_CONFIDENCE, PanelBox, may_be_cut, split_figure_pair
from data_builders.pmc.side_tables import read_once


class PanelConfig(Config):
    """Whether compound figures are taken apart."""

    mode: Literal["none", "split"] = "none"
    min_confidence: float = Field(default=MIN_CONFIDENCE, ge=0, le=1)
    """A figure whose caption or whose least certain panel is below stays whole; a detector's box below is ignored."""
    parent: Literal["keep", "replace"] = "keep"
    """Whether a figure stays beside its panels."""
    boxes: str | None = None
    """A file of a detector's boxes (`panel_boxes.read_boxes`); figures it does not name then stay whole."""


def with_panels(pair: Pair, mentions: Sequence[Mapping[str, Any]], config: PanelConfig) -> Iterator[Pair | Drop]:
    """The figure's pair, or the Drop that says it was replaced, and then a pair a panel.

    `mentions` are all of the figure's, as a sidecar holds them: a panel gets those that name its letter. Raises
    DataError where the boxes of the config cannot be read or reach out of the picture.
    """
    if config.mode == "none" or len(split_caption(pair.caption).letters) < 2:
        yield pair
        return
    if not may_be_cut(pair.licence):
        yield _flagged(pair, "panels_not_allowed")
        return
    if pair.panel is not None:
        yield _flagged(pair, "panels_shared")
        return
    panels = _cut(replace(pair, sidecar={**pair.sidecar, "mentions": mentions}), config)
    if not panels:
        yield _flagged(pair, "panels_uncut")
        return
    letters = [panel.panel for panel in panels]
    if config.parent == "keep":
        captions = {str(panel.panel): panel.caption for panel in panels}
        sidecar = {**pair.sidecar, "panels": letters, "panel_captions": captions}
        yield replace(_flagged(pair, "has_panels"), sidecar=sidecar)
    else:
        yield Drop(source=pair.source, item=pair.figure_id or pair.key, reason="replaced_by_panels",
                   detail=" ".join(str(letter) for letter in letters), article_id=pair.article_id)  # fmt: skip
    yield from panels


def _cut(pair: Pair, config: PanelConfig) -> list[Pair]:
    boxes: list[PanelBox] | None = None
    if config.boxes is not None:
        table = read_once(read_boxes, Path(config.boxes).expanduser())
        found = table.get(pair.key) or table.get(figure_name(pair.article_id, pair.figure_id)) or []
        boxes = [box for box in found if box.confidence >= config.min_confidence]
        if len(boxes) < 2:
            return []
    rgb = np.asarray(read_rgb(pair.image, pair.key))
    return split_figure_pair(pair, rgb, boxes=boxes, min_confidence=config.min_confidence)


def _flagged(pair: Pair, flag: str) -> Pair:
    return replace(pair, flags=(*pair.flags, flag))
