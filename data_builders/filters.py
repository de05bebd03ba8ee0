"""Filters: `Pair -> reason | None`, built from a run config and applied to the pairs of every source alike.

A filter sees one pair and says why it should not be kept, or None. A rule is a filter that looks at the size or the
caption alone, and is therefore written once for both who ask: called with a pair it answers for that pair, and
`refuse_rows` asks it of a whole table. Only the duplicate filter is none: it remembers the images it has let pass, so
the first of equal images in the source's own order is the one that stays, whatever the shuffle does later. What only
the source can know (language, licence, rights) is decided there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from biomedclip.config import Config
from biomedclip.schema import Drop, Pair

if TYPE_CHECKING:
    import pyarrow as pa

Filter = Callable[[Pair], "str | None"]


class RuleConfig(Config):
    """What a pair must be to be kept; None switches a rule off."""

    min_side_px: int | None = Field(default=None, ge=1)
    """Shorter side of the image."""
    max_aspect: float | None = Field(default=None, ge=1)
    """Longer side over shorter side; strips of equations and rulers are far above 10."""
    min_caption_words: int | None = Field(default=None, ge=1)
    min_caption_chars: int | None = Field(default=None, ge=1)


class FilterConfig(RuleConfig):
    """The rules, and what a build does with images that are there twice."""

    drop_duplicates: bool = True
    """Keep only the first of images with equal bytes."""


@dataclass(frozen=True, slots=True)
class SizeRule:
    """A filter that asks for the image's size."""

    reason: str
    refuses: Callable[[Any, Any], Any]
    """Of width and height, which are numbers or whole columns: True, or a column of it, where the rule refuses."""

    def __call__(self, pair: Pair) -> str | None:
        """The reason why the pair should not be kept, or None."""
        return self.reason if self.refuses(pair.width, pair.height) else None


@dataclass(frozen=True, slots=True)
class CaptionRule:
    """A filter that asks for the caption."""

    reason: str
    refuses: Callable[[str], bool]

    def __call__(self, pair: Pair) -> str | None:
        """The reason why the pair should not be kept, or None."""
        return self.reason if self.refuses(pair.caption) else None


Rule = SizeRule | CaptionRule


def make_rules(config: RuleConfig) -> tuple[Rule, ...]:
    """The rules of a config, in the order in which they are asked."""
    rules: list[Rule] = []
    if config.min_side_px is not None:
        rules.append(min_side(config.min_side_px))
    if config.max_aspect is not None:
        rules.append(max_aspect(config.max_aspect))
    if config.min_caption_words is not None:
        rules.append(min_caption_words(config.min_caption_words))
    if config.min_caption_chars is not None:
        rules.append(min_caption_chars(config.min_caption_chars))
    return tuple(rules)


def make_filters(config: FilterConfig) -> tuple[Filter, ...]:
    """The filters of a config, in the order in which they are asked; the one that remembers is last."""
    return (*make_rules(config), *([first_of_duplicates()] if config.drop_duplicates else []))


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


def refuse_rows(table: pa.Table, rules: Sequence[Rule]) -> np.ndarray:
    """For each row of a table with width, height and caption: 0, or n where rules[n - 1] is the first that refuses it.

    The answers are those of `apply_filters`. A caption is looked at only by rules that still matter for its row.
    """
    width, height = (table[name].to_numpy() for name in ("width", "height"))
    captions = table["caption"].to_pylist() if any(isinstance(rule, CaptionRule) for rule in rules) else []
    codes = np.zeros(table.num_rows, dtype=np.int16)
    for number, rule in enumerate(rules, 1):
        if isinstance(rule, SizeRule):
            codes[(codes == 0) & rule.refuses(width, height)] = number
        else:
            refuses = rule.refuses
            for row in np.flatnonzero(codes == 0).tolist():
                if refuses(captions[row]):
                    codes[row] = number
    return codes


def min_side(size_px: int) -> SizeRule:
    """Refuses `image_too_small`: a shorter side below `size_px`."""
    return SizeRule("image_too_small", lambda width, height: (width < size_px) | (height < size_px))


def max_aspect(ratio: float) -> SizeRule:
    """Refuses `image_too_elongated`: a longer side over `ratio` times the shorter one."""
    return SizeRule("image_too_elongated", lambda width, height: (width > ratio * height) | (height > ratio * width))


def min_caption_words(count: int) -> CaptionRule:
    """Refuses `caption_too_short`: fewer than `count` words between blanks."""
    return CaptionRule("caption_too_short", lambda caption: len(caption.split()) < count)


def min_caption_chars(count: int) -> CaptionRule:
    """Refuses `caption_too_short`: fewer than `count` characters."""
    return CaptionRule("caption_too_short", lambda caption: len(caption) < count)


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
