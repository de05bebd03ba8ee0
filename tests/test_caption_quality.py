"""Caption rules at their edges, and on the bundled captions, of which none but a bare label may go."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources

import pytest

from data_builders import caption_quality
from data_builders.caption_quality import (
    CaptionConfig,
    make_caption_rules,
    max_caption_words,
    max_repeated_share,
    min_letter_share,
    no_boilerplate,
)
from data_builders.pmc.jats import BadXml, parse_article


@pytest.mark.parametrize(
    ("caption", "refused"),
    [
        ("Figure 1", True),
        ("FIG. 2A–C.", True),
        ("Supplementary Figure S12: see main text.", True),
        ("Table 3 (continued)", True),
        ("(iv)", True),
        ("Click here for a larger image", True),
        ("…", True),
        ("Graphical abstract", True),
        ("Figure 1. Liver.", False),
        ("Normal.", False),
        ("CT", False),
        ("IVC", False),
        ("Lateral view", False),
        ("Рисунок 2", False),
        ("X-ray 05-2013.", False),
    ],
)
def test_a_bare_label_is_boilerplate(caption: str, refused: bool) -> None:
    assert no_boilerplate().refuses(caption) == refused


def test_words_are_counted_between_blanks() -> None:
    rule = max_caption_words(3)
    assert (rule.refuses("a b c"), rule.refuses("a b\n c  d")) == (False, True)
    assert rule.reason == "caption_too_long"


@pytest.mark.parametrize(
    ("caption", "share"), [("abcd", 1.0), ("ab 12", 0.5), ("à b ß_1", 0.6), ("肝臓 12", 0.5), ("12 %", 0.0)]
)
def test_letters_of_any_script_count(caption: str, share: float) -> None:
    assert not min_letter_share(share).refuses(caption)
    assert share == 1 or min_letter_share(share + 0.01).refuses(caption)


def test_a_caption_of_blanks_is_not_refused_for_its_letters() -> None:
    assert not min_letter_share(1).refuses("  ")


def test_repetition_is_of_three_word_sequences() -> None:
    rule = max_repeated_share(0.5)
    sentence = "The scale bar is twenty micrometres long. "
    assert not rule.refuses(sentence * 2)  # 7 of 12 sequences are new
    assert rule.refuses(sentence * 3)
    assert not rule.refuses("ha " * 11)  # nine sequences: too few to judge
    assert rule.refuses("ha " * 12)
    assert not rule.refuses(" ".join(f"word{number}" for number in range(200)))
    # Words repeat themselves in every caption; sequences do not.
    assert not rule.refuses("a b c a c b b a c b c a c a b c b a " * 1)


def brute_force(caption: str, share: float) -> bool:
    words = "".join(c if c.isalnum() else " " for c in caption.lower()).split()
    sequences = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    repeated = sum(sequence in sequences[:i] for i, sequence in enumerate(sequences))
    return len(sequences) >= 10 and repeated > share * len(sequences)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_the_short_cut_changes_nothing(share: float) -> None:
    import random

    chance = random.Random(0)
    for _ in range(300):
        caption = " ".join(chance.choices("abcdefgh"[: chance.randint(1, 8)], k=chance.randint(1, 60)))
        assert max_repeated_share(share).refuses(caption) == brute_force(caption, share), caption


def test_ascii_is_only_a_faster_way() -> None:
    import random

    chance = random.Random(1)
    for _ in range(300):
        caption = "".join(chance.choices([chr(code) for code in range(128)], k=chance.randint(0, 40)))
        assert caption_quality._words(caption) == caption_quality._WORDS.findall(caption.lower())
        letters = caption.translate(caption_quality._ASCII_LETTERS)
        assert letters == caption_quality._NO_LETTERS.sub("", caption)


def bundled_captions() -> Iterator[str]:
    for path in sorted((resources.files("data_builders") / "sample" / "pmc").rglob("*.xml")):
        try:
            yield from (figure.caption for figure in parse_article(path.read_bytes(), article_id="PMC1.1").figures)
        except BadXml:
            continue


def test_of_the_bundled_captions_only_a_bare_label_goes() -> None:
    captions = [caption for caption in bundled_captions() if caption.strip()]
    rules = make_caption_rules(CaptionConfig())
    refused = [caption for caption in captions if any(rule.refuses(caption) for rule in rules)]
    assert len(captions) > 100
    assert refused == ["Fig 1."]
    assert make_caption_rules(
        CaptionConfig(boilerplate=False, min_letter_share=None, max_repeated_share=None)
    ) == ()  # fmt: skip
