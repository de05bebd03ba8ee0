"""Filters against pairs built here: every rule, its edge, and which of two duplicates stays."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from biomedclip.config import check_config
from biomedclip.errors import ConfigError
from biomedclip.schema import Drop, Pair
from data_builders.filters import FilterConfig, apply_filters, make_filters


def pair(key: str = "a", **changes: Any) -> Pair:
    image = changes.pop("image", key.encode())
    facts: dict[str, Any] = {
        "key": key, "image": image, "image_format": "jpg", "width": 100, "height": 50, "caption": "four words are here",
        "source": "pmc", "licence": "CC BY", "sha256": hashlib.sha256(image).hexdigest(), "phash": 0,
    }  # fmt: skip
    return Pair(**{**facts, **changes})


def reason(config: FilterConfig, item: Pair) -> str | None:
    verdict = apply_filters(item, make_filters(config))
    return verdict.reason if isinstance(verdict, Drop) else None


@pytest.mark.parametrize(
    ("rule", "refused", "expected"),
    [
        ({"min_side_px": 51}, {}, "image_too_small"),
        ({"min_side_px": 50}, {}, None),
        ({"max_aspect": 1.99}, {}, "image_too_elongated"),
        ({"max_aspect": 2}, {}, None),
        ({"max_aspect": 1.99}, {"width": 50, "height": 100}, "image_too_elongated"),
        ({"min_caption_words": 5}, {}, "caption_too_short"),
        ({"min_caption_words": 4}, {}, None),
        ({"min_caption_chars": 20}, {}, "caption_too_short"),
        ({"min_caption_chars": 19}, {}, None),
        ({}, {"width": 1, "height": 9999, "caption": "x"}, None),
    ],
)
def test_each_rule_refuses_beyond_its_edge_and_not_at_it(
    rule: dict[str, Any], refused: dict[str, Any], expected: str | None
) -> None:
    assert reason(FilterConfig(**rule), pair(**refused)) == expected


def test_of_equal_images_the_first_stays_and_refused_images_do_not_count_as_first() -> None:
    filters = make_filters(FilterConfig(min_side_px=10))
    small = pair("small", image=b"same", width=5)
    verdicts = [apply_filters(p, filters) for p in (small, pair("b", image=b"same"), pair("c", image=b"same"))]
    assert [v.reason if isinstance(v, Drop) else v.key for v in verdicts] == ["image_too_small", "b", "duplicate_image"]


def test_duplicates_stay_where_the_rule_is_off_and_filters_of_two_builds_do_not_share_memory() -> None:
    assert make_filters(FilterConfig(drop_duplicates=False)) == ()
    assert reason(FilterConfig(), pair(image=b"same")) is None
    assert reason(FilterConfig(), pair(image=b"same")) is None


def test_a_drop_names_the_figure_its_article_and_what_was_found() -> None:
    item = pair(figure_id="F1", article_id="PMC1.1")
    drop = apply_filters(item, make_filters(FilterConfig(min_side_px=99)))
    assert isinstance(drop, Drop)
    assert (drop.source, drop.item, drop.article_id) == ("pmc", "F1", "PMC1.1")
    assert drop.detail.startswith("100x50, 4 words, sha256 ca978112ca1b")


def test_a_limit_that_nothing_could_meet_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_aspect: .*greater than or equal to 1"):
        check_config({"max_aspect": 0.5}, FilterConfig, "here.yaml")
