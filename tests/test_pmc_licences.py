import pytest

from data_builders.pmc.jats import parse_article
from data_builders.pmc.licences import decide_licence, normalise_code

BY = '<license xlink:href="https://creativecommons.org/licenses/by/4.0/"><license-p>Open access.</license-p></license>'


def licence(permissions):
    xml = (
        '<article xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:ali="http://www.niso.org/schemas/ali/1.0/"><front>'
        f"<article-meta><permissions>{permissions}</permissions></article-meta></front><body/></article>"
    )
    return parse_article(xml.encode(), article_id="PMC7.1").licence


@pytest.mark.parametrize(
    ("permissions", "code"),
    [
        (BY, "CC BY"),
        (BY.replace("/by/", "/by-nc-nd/"), "CC BY-NC-ND"),
        (BY.replace("licenses/by/4.0", "publicdomain/zero/1.0"), "CC0"),
        ("<ali:license_ref>http://creativecommons.org/licenses/by-sa/3.0/</ali:license_ref>", "CC BY-SA"),
        ("<license><license-p>Distributed under the terms of the Creative Commons Attribution License, which permits"
         " unrestricted use, distribution, and reproduction.</license-p></license>", "CC BY"),
        ("<license><license-p>Creative Commons Attribution-NonCommercial 4.0 International License"
         "</license-p></license>", "CC BY-NC"),
        ("<copyright-statement>© 2020 Publisher. All rights reserved.</copyright-statement>", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_licence_is_read_from_link_or_words(permissions, code):
    assert licence(permissions).code == code


def test_a_waiver_for_the_data_alone_is_not_the_articles_licence():
    data = (
        "<license-p>This article is distributed under the terms of the Creative Commons Attribution License"
        ' (<ext-link xlink:href="http://creativecommons.org/licenses/by/4.0">link</ext-link>). The Creative Commons'
        ' Public Domain Dedication waiver (<ext-link xlink:href="http://creativecommons.org/publicdomain/zero/1.0/">'
        "link</ext-link>) applies to the data made available in this article.</license-p>"
    )
    assert licence(f"<license>{data}</license>").code == "CC BY"


@pytest.mark.parametrize(
    ("metadata", "xml", "expected"),
    [
        ("CC BY", BY, ("CC BY", None)),
        ("CC BY-NC", BY, (None, "licence_conflict")),
        ("CC0", BY, (None, "licence_conflict")),
        (None, "", (None, "no_licence")),
    ],
)
def test_disagreement_is_a_reason_and_silence_is_no_licence(metadata, xml, expected):
    assert decide_licence(metadata, licence(xml)) == expected


@pytest.mark.parametrize(("text", "code"), [("CC BY", "CC BY"), ("CC-BY-NC", "CC BY-NC"), ("cc0", "CC0"), (None, None)])
def test_codes_have_one_spelling(text, code):
    assert normalise_code(text) == code
