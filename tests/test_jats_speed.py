"""What makes extraction fast changes nothing: references cut before the parse, and only cited sentences looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_builders
from data_builders.pmc.jats import BadXml, ParsedArticle, parse_article
from data_builders.pmc.mentions import _marked_sentences, split_sentences
from data_builders.pmc.rights import words_of_others
from data_builders.pmc.xml_input import cut_references

BUNDLED = sorted((Path(data_builders.__file__).parent / "sample" / "pmc").glob("PMC*/*.xml"))


def both_ways(xml: bytes) -> tuple[ParsedArticle | str, ParsedArticle | str]:
    outcomes: list[ParsedArticle | str] = []
    for fast in (True, False):
        try:
            outcomes.append(parse_article(xml, article_id="PMC7.1", fast=fast))
        except BadXml as error:
            outcomes.append(error.reason)
    return outcomes[0], outcomes[1]


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_the_bundled_articles_are_read_alike_with_and_without_their_references(path: Path) -> None:
    xml = path.read_bytes()
    fast, slow = both_ways(xml)
    assert fast == slow
    assert not isinstance(fast, str)


def test_most_bundled_articles_really_take_the_fast_path() -> None:
    cut = [len(cut_references(path.read_bytes())) < path.stat().st_size for path in BUNDLED]
    assert sum(cut) > 0.8 * len(cut)


XLINK = 'xmlns:x="http://www.w3.org/1999/xlink"'
FIG = f'<fig id="F{{}}"><caption><p>Figure {{}}.</p></caption><graphic {XLINK} x:href="f"/></fig>'
REF = "<ref><mixed-citation>A &amp; B 2001?! No &#945; here</mixed-citation></ref>"


@pytest.mark.parametrize(
    "back",
    [
        f"<ref-list>{REF}</ref-list>",
        f'<ref-list id="r">{REF}</ref-list><sec>{FIG.format(2, 2)}</sec>',
        f"<ref-list><ref-list>{REF}</ref-list>{FIG.format(2, 2)}<ref-list>{REF}</ref-list></ref-list>",
        f"<ref-list>{REF}{FIG.format(2, 2)}</ref-list>",
        f"<ref-list>{REF}</ref-list>{FIG.format(2, 2)}<!-- </ref-list> -->",
        f"<!-- <ref-list> -->{FIG.format(2, 2)}<!-- </ref-list> -->",
        f"<!-- <ref-list> --><ref-list>{REF}</ref-list>{FIG.format(2, 2)}",
        f"<ref-list>{REF}<!-- <ref-list> --></ref-list>{FIG.format(2, 2)}<!-- x -->",
        f"<?x <ref-list> ?>{FIG.format(2, 2)}<?x </ref-list> ?>",
        f"<sec><![CDATA[<ref-list>]]>{FIG.format(2, 2)}<![CDATA[</ref-list>]]></sec>",
        f"<ref-list>{REF}<![CDATA[</ref-list>]]></ref-list>{FIG.format(2, 2)}",
        f"<ref-list>{REF}&unknown;</ref-list>",
        f"<ref-list>{REF}&micro;</ref-list>",
        f"<ref-list>{REF}<!ENTITY x 'y'></ref-list>",
        f"<ref-list>{REF}",
        f"{REF}</ref-list>{FIG.format(2, 2)}",
        f"</ref-list>{FIG.format(2, 2)}<ref-list>{REF}",
    ],
)
def test_what_only_looks_like_a_reference_list_is_never_lost(back: str) -> None:
    xml = f"<article><front/><body>{FIG.format(1, 1)}</body><back>{back}</back></article>".encode()
    fast, slow = both_ways(xml)
    assert fast == slow
    if isinstance(slow, ParsedArticle) and FIG.format(2, 2) in back:
        assert [figure.figure_id for figure in slow.figures] == ["F1", "F2"]


PIECES = st.sampled_from(
    [
        "See",
        "Fig.",
        "al.",
        "\x01{}\x02Fig. 2",
        "\x01{}\x02",
        "Growth",
        "et",
        "(",
        ")",
        ".",
        "?",
        "A",
        "b",
        "3.",
        " ",
        "É",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=25), st.booleans())
def test_the_cited_sentences_are_those_of_all_sentences_that_hold_a_mark(pieces: list[str], spaced: bool) -> None:
    text = (" " if spaced else "").join(piece.format(n) for n, piece in enumerate(pieces))
    text = " ".join(text.split())
    every = [sentence for sentence in split_sentences(text) if "\x01" in sentence]
    found = list(_marked_sentences(text))
    assert [sentence for _, sentence in found] == every
    assert all(text[start:].startswith(sentence) for start, sentence in found)


@pytest.mark.parametrize(
    ("caption", "theirs"),
    [
        ("(a) CT. (b) MRI. (c) PET.", False),
        ("(C) 2017 panels", True),
        ("A lung (c)2004 Elsevier", True),
        ("Image © Nature", True),
        ("(c) 19 mice", False),
        ("Copyright: Springer", True),
    ],
)
def test_a_panel_c_is_no_copyright_sign(caption: str, theirs: bool) -> None:
    assert words_of_others(caption) is theirs
