"""The table of JATS edge cases, one golden test a row: hand-written documents, the expected text written out."""

import pytest

from data_builders.pmc.jats import BadXml, parse_article

XLINK = 'xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:mml="http://www.w3.org/1998/Math/MathML"'
GRAPHIC = '<graphic xlink:href="f1.jpg"/>'


def article(body="", front="", attributes='xml:lang="en"', back="", meta=""):
    return (
        f"<article {XLINK} {attributes}><front><journal-meta><journal-title-group><journal-title>J</journal-title>"
        f"</journal-title-group></journal-meta><article-meta>{meta}<title-group><article-title>T</article-title>"
        f"</title-group>{front}</article-meta></front><body>{body}</body>{back}</article>"
    ).encode()


def parse(body="", **kw):
    xml = body if isinstance(body, bytes) else article(body, **kw)
    fast, slow = parse_article(xml, article_id="PMC7.1"), parse_article(xml, article_id="PMC7.1", fast=False)
    assert fast == slow
    return fast


def figure(body, **kw):
    (only,) = parse(body, **kw).figures
    return only


def fig(caption="<p>A lung.</p>", graphic=GRAPHIC, attributes='id="F1"', label="<label>Figure 1</label>"):
    return f"<fig {attributes}>{label}<caption>{caption}</caption>{graphic}</fig>"


def test_a_plain_figure():
    found = figure(fig())
    assert (found.figure_id, found.label, found.caption, found.graphic) == ("F1", "Figure 1", "A lung.", "f1.jpg")
    assert (found.ordinal, found.panel_index, found.panel_count, found.language) == (0, 0, 1, "en")
    assert not found.third_party


@pytest.mark.parametrize("href", ["f1", "f1.jpg", "nihms-2062735-f0001.jpg", "SMSC-6-e70347-g005.webp", "x.y.g001"])
def test_the_href_is_kept_as_written_with_or_without_extension(href):
    assert figure(fig(graphic=f'<graphic id="g1" position="float" xlink:href="{href}"/>')).graphic == href


def test_alternatives_are_one_figure_with_one_picture():
    two = '<alternatives><graphic xlink:href="f1.tif"/><graphic xlink:href="f1.jpg"/></alternatives>'
    found = figure(fig(graphic=two))
    assert found.panel_count == 1
    assert {found.graphic, *found.alternatives} == {"f1.tif", "f1.jpg"}
    assert found.graphic == "f1.jpg"


def test_two_graphics_in_a_figure_are_panels_that_share_the_caption():
    parsed = parse(fig(graphic='<graphic xlink:href="a.jpg"/><graphic xlink:href="b.jpg"/>'))
    assert [(f.graphic, f.panel_index, f.panel_count) for f in parsed.figures] == [("a.jpg", 0, 2), ("b.jpg", 1, 2)]
    assert {f.caption for f in parsed.figures} == {"A lung."}


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("<title>Major fabrication.</title><p>In vivo.</p>", "Major fabrication. In vivo."),
        ("<title>Title</title><p>One.</p><p>Two.</p>", "Title One. Two."),
        ("<p>about 10<sup>4</sup> cells</p>", "about 10^4 cells"),
        ("<p>CO<sub>2</sub> and m<sup>2</sup></p>", "CO2 and m2"),
        ("<p><italic>E. coli</italic>K-12 <bold>(A)</bold> x</p>", "E. coliK-12 (A) x"),
        (
            "<p>List: <list><list-item><p>one</p></list-item><list-item><p>two</p></list-item></list></p>",
            "List: one two",
        ),
        ("<p>  spaced\n   out </p>", "spaced out"),
        ("<p>Before<break/>after</p>", "Before after"),
        ("<p>A<object-id>doi:1</object-id></p>", "A"),
    ],
)
def test_caption_text_has_spaces_between_blocks_and_none_inside_words(caption, text):
    assert figure(fig(caption)).caption == text


def test_a_figure_without_id_gets_a_stable_one():
    parsed = parse(fig(attributes="") + fig(attributes="", graphic='<graphic xlink:href="f2.jpg"/>'))
    assert [f.figure_id for f in parsed.figures] == ["fig@0", "fig@1"]


def test_a_figure_without_caption_or_graphic_is_still_seen():
    parsed = parse(f'<fig id="F1">{GRAPHIC}</fig>' + fig(attributes='id="F2"', graphic=""))
    assert [(f.caption, f.graphic) for f in parsed.figures] == [("", "f1.jpg"), ("A lung.", None)]


def test_a_group_gives_its_caption_to_its_figures():
    inner = fig() + fig(attributes='id="F2"', graphic='<graphic xlink:href="f2.jpg"/>')
    group = f'<fig-group id="G"><label>Fig. 1</label><caption><title>All lungs.</title></caption>{inner}</fig-group>'
    parsed = parse(group)
    assert [(f.group_id, f.caption) for f in parsed.figures] == [("G", "A lung.")] * 2
    assert all("All lungs." in f.group_caption for f in parsed.figures)


def test_a_figure_filed_again_in_floats_group_is_one():
    again = f"<floats-group>{fig()}</floats-group>"
    parsed = parse(fig(), back=again)
    assert len(parsed.figures) == 1
    assert parsed.counts["merged_figures"] == 1


def test_a_caption_inside_the_graphic_is_found():
    inside = '<graphic xlink:href="f1.jpg"><caption><p>Inside.</p></caption></graphic>'
    assert figure(f'<fig id="F1">{inside}</fig>').caption == "Inside."


def test_formulas_are_text_without_latex_preamble():
    tex = r"\documentclass{minimal}\begin{document}$$x^2$$\end{document}"
    both = (
        f"<inline-formula><alternatives><tex-math>{tex}</tex-math><mml:math><mml:msup><mml:mi>x</mml:mi>"
        "<mml:mn>2</mml:mn></mml:msup></mml:math></alternatives></inline-formula>"
    )
    found = figure(fig(f"<p>where {both} holds</p>"))
    assert "documentclass" not in found.caption
    assert found.caption == "where x^2 holds"
    assert "has_math" in found.flags


def test_html_entities_without_a_dtd_become_characters():
    assert figure(fig("<p>5 &micro;m &alpha;&nbsp;&lt; 3</p>")).caption == "5 µm α < 3"


BOMB = (
    '<!DOCTYPE article [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]>'
)


@pytest.mark.parametrize(
    "doctype", [BOMB, '<!DOCTYPE article [<!ENTITY c SYSTEM "file:///etc/passwd">]>',
                '<!DOCTYPE article [<!ENTITY % p SYSTEM "http://127.0.0.1:9/x"> %p; <!ENTITY c "x">]>'],
)  # fmt: skip
def test_entity_declarations_are_refused(doctype):
    with pytest.raises(BadXml) as caught:
        parse_article(doctype.encode() + article(fig("<p>&c;</p>")), article_id="PMC7.1")
    assert caught.value.reason == "xml_hostile"


def test_an_external_dtd_is_never_loaded():
    doctype = b'<!DOCTYPE article PUBLIC "-//NLM//DTD JATS//EN" "http://127.0.0.1:9/JATS.dtd">'
    assert figure(doctype + article(fig())).caption == "A lung."


def test_a_truncated_file_is_recovered_and_says_so():
    whole = article(fig() + "<p>" + "x" * 200 + "</p>")
    parsed = parse(whole[:-120])
    assert "xml_recovered" in parsed.flags
    assert [f.caption for f in parsed.figures] == ["A lung."]


@pytest.mark.parametrize(("xml", "reason"), [(b"", "empty_file"), (b"<html><p>no</p></html>", "not_an_article"),
                                             (b"plain words", "xml_error")])  # fmt: skip
def test_what_is_no_article_has_a_reason(xml, reason):
    with pytest.raises(BadXml) as caught:
        parse_article(xml, article_id="PMC7.1")
    assert caught.value.reason == reason


def test_a_declared_encoding_is_honoured():
    xml = b'<?xml version="1.0" encoding="ISO-8859-1"?>' + article(fig("<p>caf\u00e9</p>")).decode().encode("latin-1")
    assert figure(xml).caption == "café"


@pytest.mark.parametrize(
    "wrapped",
    [
        b"<pmc-articleset>%s</pmc-articleset>",
        b'<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/"><GetRecord><record><metadata>%s</metadata></record>'
        b"</GetRecord></OAI-PMH>",
    ],
)
def test_wrapped_articles_are_found(wrapped):
    assert figure(wrapped % article(fig())).caption == "A lung."


def test_a_default_namespace_is_no_obstacle():
    xml = article(fig(), attributes='xmlns="https://jats.nlm.nih.gov/ns/archiving/1.3/" xml:lang="en"')
    assert figure(xml).caption == "A lung."


def test_figures_of_translations_and_responses_say_where_they_stand():
    def sub(kind):
        inner = fig(graphic='<graphic xlink:href="s.jpg"/>', attributes='id="S1"')
        return f'<sub-article article-type="{kind}"><body>{inner}</body></sub-article>'

    translated = parse(fig(), back=sub("translation")).figures
    assert ["subarticle_translation" in f.flags for f in translated] == [False, True]
    reviewed = parse(fig(), back=sub("reviewer-report")).figures
    assert any("subarticle" in flag for flag in reviewed[1].flags)


def test_mentions_are_sentences_with_section_and_panel_letters():
    body = (
        '<sec><title>Results</title><p>Lungs grew (<italic><xref ref-type="fig" rid="F1">Fig. 1A</xref></italic>).'
        ' Others shrank. <xref ref-type="fig" rid="F1">Figure 1B–C</xref> shows more.</p></sec>'
    )
    first, second = figure(body + fig()).mentions
    assert first.text == "Lungs grew (Fig. 1A)."
    assert (first.section, first.panels) == ("Results", ("A",))
    assert second.panels == ("B", "C")


def test_several_ids_in_one_reference_and_ranges_reach_all_figures():
    figures = "".join(
        fig(attributes=f'id="F{i}"', label=f"<label>Figure {i}</label>", graphic=f'<graphic xlink:href="f{i}.jpg"/>')
        for i in (1, 2, 3, 4)
    )
    range_ = '<p>See <xref ref-type="fig" rid="F2">Figs 2</xref>–<xref ref-type="fig" rid="F4">4</xref>.</p>'
    both = '<p>As in <xref ref-type="fig" rid="F1 F2">Figs 1, 2</xref>.</p>'
    parsed = parse(both + range_ + figures)
    assert [len(f.mentions) for f in parsed.figures] == [1, 2, 1, 1]


def test_pictures_that_are_no_figures_are_counted():
    body = (
        '<p><inline-graphic xlink:href="i1.gif"/></p><disp-formula><graphic xlink:href="e1.gif"/></disp-formula>'
        '<table-wrap><graphic xlink:href="t1.jpg"/></table-wrap>'
        '<supplementary-material xlink:href="s1.pdf"><media xlink:href="m.mp4"/></supplementary-material>'
    )
    parsed = parse(body + fig())
    assert len(parsed.figures) == 1
    assert parsed.counts["inline_graphics"] == parsed.counts["formula_graphics"] == 1
    assert parsed.counts["table_graphics"] == parsed.counts["media"] == 1


def test_languages_are_inherited_and_silence_stays_silence():
    assert figure(fig(), attributes='xml:lang="fr"').language == "fr"
    assert figure(fig(attributes='id="F1" xml:lang="de"'), attributes='xml:lang="fr"').language == "de"
    assert figure(fig(), attributes="").language is None


@pytest.mark.parametrize(
    ("kw", "expected"),
    [
        ({"attributes": 'article-type="research-article"'}, False),
        ({"attributes": 'article-type="research-article"',
          "front": '<related-article related-article-type="retraction-forward" xlink:href="10.1/x"/>'}, True),
        ({"front": "<custom-meta-group/>", "attributes": 'article-type="research-article"',
          "meta": "<pub-history/>"}, False),
    ],
)  # fmt: skip
def test_a_retracted_article_is_known(kw, expected):
    assert parse(fig(), **kw).article.is_retracted is expected


def test_a_retraction_notice_names_what_it_retracts():
    link = '<related-article related-article-type="retracted-article" ext-link-type="doi" xlink:href="10.1/bad"/>'
    parsed = parse(fig(), attributes='article-type="retraction"', front=link)
    assert "10.1/bad" in parsed.retracts


def test_restricted_by_pmc_is_not_a_restriction():
    xml = article(fig()).replace(
        b"<front>", b"<processing-meta><restricted-by>pmc</restricted-by></processing-meta><front>"
    )
    parsed = parse(xml)
    assert len(parsed.figures) == 1
    assert not parsed.article.is_retracted


@pytest.mark.parametrize(
    "ids",
    [
        '<article-id pub-id-type="pmc">PMC7</article-id>', '<article-id pub-id-type="pmc">7</article-id>',
        '<article-id pub-id-type="pmcid">PMC7</article-id>',
    ],
)  # fmt: skip
def test_every_spelling_of_the_article_id_is_the_same_article(ids):
    more = '<article-id pub-id-type="pmid">42</article-id><article-id pub-id-type="doi">10.1/x</article-id>'
    found = parse(fig(), meta=ids + more).article
    assert (found.article_id, found.pmcid, found.version, found.pmid, found.doi) == ("PMC7.1", 7, 1, 42, "10.1/x")
    assert not [flag for flag in found.flags if "id" in flag]


@pytest.mark.parametrize(
    ("caption", "theirs"),
    [
        ("<p>A lung.</p>", False),
        ("<p>Reproduced with permission from Smith et al. Copyright 2017 Nature.</p>", True),
        ("<p>Adapted with permission from [12].</p>", True),
        ("<p>Mice were taken from the colony.</p>", False),
        ("<p>Written permission was obtained from the patient.</p>", False),
    ],
)
def test_words_of_other_peoples_rights_are_flagged(caption, theirs):
    assert figure(fig(caption)).third_party is theirs


def test_a_figure_with_permissions_of_its_own_carries_its_licence():
    own = (
        '<permissions><license xlink:href="https://creativecommons.org/licenses/by-nc/4.0/"><license-p>CC BY-NC'
        "</license-p></license></permissions>"
    )
    assert figure(fig(graphic=GRAPHIC + own)).licence == "CC BY-NC"


def test_article_facts_are_read_once():
    front = (
        '<contrib-group><contrib contrib-type="author"><name><surname>Doe</surname><given-names>Jane</given-names>'
        '</name></contrib></contrib-group><pub-date pub-type="epub"><day>3</day><month>02</month><year>2024</year>'
        "</pub-date><kwd-group><kwd>lung</kwd><kwd>X-ray</kwd></kwd-group>"
    )
    found = parse(fig(), front=front, attributes='article-type="case-report" xml:lang="EN"').article
    assert (found.title, found.journal, found.published) == ("T", "J", "2024-02-03")
    assert found.keywords == ("lung", "X-ray")
    assert "Doe" in found.authors[0]
    assert (found.article_type, found.language) == ("case-report", "en")
