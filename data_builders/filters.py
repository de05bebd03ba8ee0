"""Filters: `Pair -> reason | None`, built from a run config and applied to the pairs of every source alike.

A filter sees one pair and says why it should not be kept, or None. All but one are pure; the duplicate filter
remembers the images it has let pass, so the first of equal images in the source's own order is the one that stays,
whatever the shuffle does later. What only the source can know (language, licence, rights) is decided there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import Field

from biomedclip.config import Config
from biomedclip.schema import Drop, Pair

Filter = Callable[[Pair], "str | None"]


class FilterConfig(Config):
    """What a pair must be to be kept; None switches a rule off."""

    min_side_px: int | None = Field(default=None, ge=1)
    """Shorter side of the image."""
    max_aspect: float | None = Field(default=None, ge=1)
    """Longer side over shorter side; strips of equations and rulers are far above 10."""
    min_caption_words: int | None = Field(default=None, ge=1)
    min_caption_chars: int | None = Field(default=None, ge=1)
    drop_duplicates: bool = True
    """Keep only the first of images with equal bytes."""


def make_filters(config: FilterConfig) -> tuple[Filter, ...]:
    """The filters of a config, in the order in which they are asked; the one that remembers is last."""
    filters: list[Filter] = []
    if config.min_side_px is not None:
        filters.append(min_side(config.min_side_px))
    if config.max_aspect is not None:
        filters.append(max_aspect(config.max_aspect))
    if config.min_caption_words is not None:
        filters.append(min_caption_words(config.min_caption_words))
    if config.min_caption_chars is not None:
        filters.append(min_caption_chars(config.min_caption_chars))
    if config.drop_duplicates:
        filters.append(first_of_duplicates())
    return tuple(filters)


def apply_filters(pair: Pair, filters: Sequence[Filter]) -> Pair | Drop:
    """The pair, or a Drop with the reason of the first filter that refuses it."""
    for refuse in filters:
        reason = refuse(pair)
        if reason is not None:
            detail = f"{pair.width}x{pair.height}, {len(pair.caption.split())} words, sha256 {pair.sha256[:12]}"
            return Drop(
                source=pair.source, item=pair.figure_id or pair.key, reason=reason, detail=detail,
                article_id=pair.article_id,
            )  # fmt: skip
    return pair


def min_side(size_px: int) -> Filter:
    """Refuses `image_too_small`: a shorter side below `size_px`."""
    return lambda pair: "image_too_small" if min(pair.width, pair.height) < size_px else None


def max_aspect(ratio: float) -> Filter:
    """Refuses `image_too_elongated`: a longer side over `ratio` times the shorter one."""

    def refuse(pair: Pair) -> str | None:
        short, long = sorted((pair.width, pair.height))
        return "image_too_elongated" if long > ratio * short else None

    return refuse


def min_caption_words(count: int) -> Filter:
    """Refuses `caption_too_short`: fewer than `count` words between blanks."""
    return lambda pair: "caption_too_short" if len(pair.caption.split()) < count else None


def min_caption_chars(count: int) -> Filter:
    """Refuses `caption_too_short`: fewer than `count` characters."""
    return lambda pair: "caption_too_short" if len(pair.caption) < count else None


def first_of_duplicates() -> Filter:
    """Refuses `duplicate_image`: bytes that an earlier pair of the same filter already had."""
    seen: set[bytes] = set()

    def refuse(pair: Pair) -> str | None:
        digest = bytes.fromhex(pair.sha256)
        if digest in seen:
            return "duplicate_image"
        seen.add(digest)
        return None

    return refuse
