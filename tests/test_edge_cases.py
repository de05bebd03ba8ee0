"""The table of what real PMC articles do to a builder: one row a case, from the article's bytes to pairs and drops.

Each case is a whole article with its files in a bucket, read by `article_pairs`, and the outcome is written out: a line
a figure with its file, flags and caption, or with the reason why it was dropped, and indented below it its mentions.
The names of the cases are the rows. What a row needs beyond that (images, tars, copies) has a test of its own below.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from biomedclip.schema import Article, Drop, Pair
from data_builders.pmc.catalog import ArticleRecord, LocalBucket
from data_builders.pmc.pairs import PmcConfig, article_pairs
from data_builders.pmc.sources import OaPackages

NAMESPACES = 'xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:mml="http://www.w3.org/1998/Math/MathML"'
CC_BY = '<license xlink:href="https://creativecommons.org/licenses/by/4.0/"/>'
Item = Article | Pair | Drop


def picture(seed: int = 0, format: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((96, 72), Image.Resampling.BICUBIC).save(buffer, format, **options)
    return buffer.getvalue()


FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "gif": "GIF", "tif": "TIFF", "webp": "WEBP", "jpg_": "JPEG"}


def article(body: str, *, attributes: str = 'xml:lang="en"', front: str = "", back: str = "", meta: str = "",
            licence: str = CC_BY) -> bytes:  # fmt: skip
    return (
        f"<article {NAMESPACES} {attributes}>{front}<front><article-meta>{meta}<title-group><article-title>T"
        f"</article-title></title-group><permissions>{licence}</permissions></article-meta></front><body>{body}</body>"
        f"{back}</article>"
    ).encode()


def fig(number: int = 1, caption: str = "<p>A lung.</p>", graphic: str | None = None, attributes: str | None = None,
        inside: str = "") -> str:  # fmt: skip
    graphic = f'<graphic xlink:href="f{number}.jpg"/>' if graphic is None else graphic
    attributes = f'id="F{number}"' if attributes is None else attributes
    caption = f"<caption>{caption}</caption>" if caption else ""
    return f"<fig {attributes}><label>Figure {number}</label>{caption}{graphic}{inside}</fig>"


def graphic(href: str) -> str:
    return f'<graphic xlink:href="{href}"/>'


def read(root: Path, xml: bytes, files: tuple[str, ...] | dict[str, bytes], *, preset: str = "commercial",
         metadata: dict[str, Any] | None = None, **config: Any) -> list[Item]:  # fmt: skip
    """What `article_pairs` makes of one article; a file that has only a name gets a picture that fits it."""
    if not isinstance(files, dict):
        files = {name: picture(n, FORMATS.get(name.rpartition(".")[2].lower(), "JPEG")) for n, name in enumerate(files)}
    folder = root / "PMC7.1"
    folder.mkdir()
    files = {"PMC7.1.xml": xml, **files}
    urls = {name: f"s3://b/PMC7.1/{name}?md5={hashlib.md5(data).hexdigest()}" for name, data in files.items()}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    facts = {
        "pmcid": "PMC7", "version": 1, "license_code": None, "is_retracted": False, "is_manuscript": False,
        "xml_url": urls.pop("PMC7.1.xml"), "media_urls": list(urls.values()), "pmid": 5, **(metadata or {}),
    }  # fmt: skip
    (folder / "PMC7.1.json").write_text(json.dumps(facts))
    bucket = LocalBucket(root)
    (record,) = bucket.records()
    assert isinstance(record, ArticleRecord)
    return list(article_pairs(record, bucket, PmcConfig(root="x", **config), preset=preset))


def lines(items: list[Item]) -> list[str]:
    found = []
    for item in items:
        if isinstance(item, Pair):
            panel = f"/{item.panel}" if item.panel else ""
            flags = f" [{' '.join(item.flags)}]" if item.flags else ""
            found.append(f"{item.figure_id}{panel} = {item.sidecar['file']}{flags} {item.caption}")
            for mention in item.sidecar.get("mentions", ()):
                panels = f" <{''.join(mention.get('panels', ()))}>" if mention.get("panels") else ""
                found.append(f"  {mention['text']}{panels}")
        elif isinstance(item, Drop):
            found.append(f"{item.item} - {item.reason}")
    return found


@dataclass(frozen=True)
class Case:
    row: str
    xml: bytes
    outcome: list[str]
    files: tuple[str, ...] = ("f1.jpg",)
    metadata: dict[str, Any] = field(default_factory=dict)


def two(first: str, second: str, *, more: str = "") -> bytes:
    return article(fig(1, graphic=first) + fig(2, graphic=second) + more)


TEX = r"\documentclass{minimal}\begin{document}$$x^2$$\end{document}"
FORMULA = (
    f"<inline-formula><alternatives><tex-math>{TEX}</tex-math><mml:math><mml:msup><mml:mi>x</mml:mi><mml:mn>2</mml:mn>"
    "</mml:msup></mml:math></alternatives></inline-formula>"
)
WAIVER = (
    '<license xlink:href="https://creativecommons.org/licenses/by/4.0/"><license-p>Distributed under the Creative '
    "Commons Attribution License. The Creative Commons Public Domain Dedication waiver "
    "(http://creativecommons.org/publicdomain/zero/1.0/) applies to the data made available in this article."
    "</license-p></license>"
)
XREF = '<xref ref-type="fig" rid="{}">{}</xref>'
FOUR = "".join(fig(n) for n in (1, 2, 3, 4))
FOUR_FILES = ("f1.jpg", "f2.jpg", "f3.jpg", "f4.jpg")

CASES = [
    Case("href without extension", article(fig(graphic=graphic("f1"))), ["F1 = f1.jpg A lung."]),
    Case("href with extension", article(fig()), ["F1 = f1.jpg A lung."]),
    Case("href in another case", article(fig(graphic=graphic("F1.JPG"))), ["F1 = f1.jpg A lung."]),
    Case("href with dots", article(fig(graphic=graphic("pone.0000217.g001"))), ["F1 = pone.0000217.g001.jpg A lung."],
         ("pone.0000217.g001.jpg",)),
    Case("webp png gif tif jpeg only", article("".join(fig(n, graphic=graphic(f"f{n}")) for n in (1, 2, 3, 4, 5))), [
        "F1 = f1.webp A lung.", "F2 = f2.png A lung.", "F3 = f3.gif [reencoded] A lung.",
        "F4 = f4.tif [reencoded] A lung.", "F5 = f5.jpeg A lung.",
    ], ("f1.webp", "f2.png", "f3.gif", "f4.tif", "f5.jpeg")),
    Case("file without extension", article(fig(graphic=graphic("484463v1_fig1"))), ["F1 = 484463v1_fig1 A lung."],
         ("484463v1_fig1", "484463v1_fig2")),
    Case("gif thumbnail beside the jpg", two(graphic("f1.gif"), graphic("f2")),
         ["F1 = f1.jpg A lung.", "F2 = f2.jpg A lung."], ("f1.gif", "f1.jpg", "f2.gif", "f2.jpg")),
    Case("id before xlink:href", article(fig(graphic='<graphic id="g1" position="float" xlink:href="f1"/>')),
         ["F1 = f1.jpg A lung."]),
    Case("alternatives with two graphics",
         article(fig(graphic=f"<alternatives>{graphic('f1.tif')}{graphic('f1.jpg')}</alternatives>")),
         ["F1 = f1.jpg A lung."], ("f1.tif", "f1.jpg")),
    Case("two graphics in one fig", article(fig(graphic=graphic("f1") + graphic("f2"))),
         ["F1/0 = f1.jpg [shared_caption] A lung.", "F1/1 = f2.jpg [shared_caption] A lung."], ("f1.jpg", "f2.jpg")),
    Case("title, two p, italic, sup", article(fig(caption=(
        "<title>Growth</title><p>In <italic>E. coli</italic>.</p><p>At 10<sup>4</sup> cells, 2<sup>nd</sup> of"
        " CO<sub>2</sub> and m<sup>2</sup>.</p>"))),
         ["F1 = f1.jpg Growth In E. coli. At 10^4 cells, 2nd of CO2 and m2."]),
    Case("no id", article(fig(1, attributes="") + fig(2, attributes="")),
         ["fig@0 = f1.jpg [id_missing] A lung.", "fig@1 = f2.jpg [id_missing] A lung."], ("f1.jpg", "f2.jpg")),
    Case("no caption", article(fig(1) + fig(2, caption="") + fig(3, caption="<p> </p>")),
         ["F1 = f1.jpg A lung.", "F2 - no_caption", "F3 - no_caption"], ("f1.jpg", "f2.jpg", "f3.jpg")),
    Case("no graphic, no file", article(fig(1, graphic="") + fig(2)), ["F1 - no_graphic", "F2 - missing_graphic"]),
    Case("fig-group with a caption of its own", article(
        '<fig-group id="G"><label>Fig. 1</label><caption><title>All lungs.</title></caption>'
        f"{fig(1)}{fig(2, caption='')}</fig-group>"),
         ["F1 = f1.jpg [group_caption] Fig. 1 All lungs. A lung.",
          "F2 = f2.jpg [group_caption] Fig. 1 All lungs."], ("f1.jpg", "f2.jpg")),
    Case("figure again in floats-group", article(fig(), back=f"<floats-group>{fig()}</floats-group>"),
         ["F1 = f1.jpg A lung."]),
    Case("floats-group alone", article("", back=f"<floats-group>{fig()}</floats-group>"), ["F1 = f1.jpg A lung."]),
    Case("caption inside graphic",
         article('<fig id="F1"><graphic xlink:href="f1.jpg"><label>Figure 1</label><caption><p>Inside.</p></caption>'
                 "</graphic></fig>"), ["F1 = f1.jpg Inside."]),
    Case("tex-math beside mml", article(fig(caption=f"<p>where {FORMULA} holds</p>")),
         ["F1 = f1.jpg [has_math] where x^2 holds"]),
    Case("list-item without label", article(fig(caption=(
        "<p>List:</p><list><list-item><p>one</p></list-item><list-item><p>two</p></list-item></list>"))),
         ["F1 = f1.jpg List: one two"]),
    Case("undeclared entity", article(fig(caption="<p>5 &micro;m, &alpha;&nbsp;&lt; 3</p>")),
         ["F1 = f1.jpg 5 µm, α < 3"]),
    Case("DOCTYPE with an external DTD", b'<!DOCTYPE article PUBLIC "-//NLM//DTD" "http://127.0.0.1:9/JATS.dtd">'
         + article(fig()), ["F1 = f1.jpg A lung."]),
    Case("DOCTYPE that declares entities", b'<!DOCTYPE article [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
         + article(fig(caption="<p>&x;</p>")), ["PMC7.1 - xml_hostile"]),
    Case("truncated XML", article(fig() + "<p>" + "x" * 200 + "</p>")[:-120],
         ["F1 = f1.jpg [xml_recovered] A lung."]),
    Case("bytes that are not UTF-8", article(fig(caption="<p>caf@ noir</p>")).replace(b"@", b"\xe9"),
         ["F1 = f1.jpg [encoding_repaired xml_recovered] caf\ufffd noir"]),
    Case("ISO-8859-1", b'<?xml version="1.0" encoding="ISO-8859-1"?>'
         + article(fig(caption="<p>caf@</p>")).replace(b"@", b"\xe9"), ["F1 = f1.jpg café"]),
    Case("UTF-16", ('<?xml version="1.0" encoding="UTF-16"?>' + article(fig(caption="<p>café</p>")).decode())
         .encode("utf-16"), ["F1 = f1.jpg café"]),
    Case("wrapped in pmc-articleset", b"<pmc-articleset>" + article(fig()) + b"</pmc-articleset>",
         ["F1 = f1.jpg A lung."]),
    Case("wrapped in OAI", b'<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/"><GetRecord><record><metadata>'
         + article(fig(), attributes='xmlns="https://jats.nlm.nih.gov/ns/archiving/1.3/" xml:lang="en"')
         + b"</metadata></record></GetRecord></OAI-PMH>", ["F1 = f1.jpg A lung."]),
    Case("sub-article: translation", article(fig(), back=(
        '<sub-article article-type="translation" xml:lang="es"><body>' + fig(2) + "</body></sub-article>")),
         ["F1 = f1.jpg A lung.", "F2 - translation"], ("f1.jpg", "f2.jpg")),
    Case("sub-article: review", article(fig(), back=(
        '<sub-article article-type="reviewer-report"><body>' + fig(2) + "</body></sub-article>")),
         ["F1 = f1.jpg A lung.", "F2 = f2.jpg [subarticle_reviewer_report] A lung."], ("f1.jpg", "f2.jpg")),
    Case("xref nested in italic",
         article(f"<p>Grew (<italic>{XREF.format('F1', 'Fig. 1A')}</italic>). Shrank.</p>" + fig()),
         ["F1 = f1.jpg A lung.", "  Grew (Fig. 1A). <A>"]),
    Case("xref with several rids", article(f"<p>See {XREF.format('F1 F3', 'Figs 1, 3')}.</p>" + FOUR),
         ["F1 = f1.jpg A lung.", "  See Figs 1, 3.", "F2 = f2.jpg A lung.", "F3 = f3.jpg A lung.", "  See Figs 1, 3.",
          "F4 = f4.jpg A lung."], FOUR_FILES),
    Case("xref range between two rids",
         article(f"<p>See {XREF.format('F2', 'Figs 2')}–{XREF.format('F4', '4')}.</p>" + FOUR),
         ["F1 = f1.jpg A lung.", "F2 = f2.jpg A lung.", "  See Figs 2–4.", "F3 = f3.jpg A lung.", "  See Figs 2–4.",
          "F4 = f4.jpg A lung.", "  See Figs 2–4."], FOUR_FILES),
    Case("xref with panel letters", article(f"<p>As in {XREF.format('F1', 'Figure 1B–D')} and elsewhere.</p>" + fig()),
         ["F1 = f1.jpg A lung.", "  As in Figure 1B–D and elsewhere. <BCD>"]),
    Case("inline, formula and table graphics", article(
        f"<p><inline-graphic xlink:href='i.gif'/></p><disp-formula>{graphic('e.gif')}</disp-formula><table-wrap>"
        f"{graphic('t.jpg')}</table-wrap>{fig()}"), ["F1 = f1.jpg A lung."], ("i.gif", "e.gif", "t.jpg", "f1.jpg")),
    Case("media and supplementary pictures", article(
        f"<supplementary-material>{graphic('s.jpg')}<media xlink:href='m.mp4'/></supplementary-material>{fig()}"
        + fig(2, graphic='<media xlink:href="f2.mp4" mimetype="video"/>')),
         ["F1 = f1.jpg A lung.", "F2 - no_graphic"], ("s.jpg", "f1.jpg")),
    Case("languages of article and caption", article(
        fig(1) + fig(2, attributes='id="F2" xml:lang="en"')
        + '<fig id="F3"><caption xml:lang="fr"><p>Un poumon.</p></caption><caption xml:lang="en"><p>A lung.</p>'
        f"</caption>{graphic('f3')}</fig>", attributes='xml:lang="fr"'),
         ["F1 - other_language", "F2 = f2.jpg A lung.", "F3 = f3.jpg [multilingual_caption] A lung."], FOUR_FILES),
    Case("language that nothing states", article(fig(), attributes=""),
         ["F1 = f1.jpg [language_unstated] A lung."]),
    Case("retracted by the metadata", article(fig()), ["F1 - retracted"], metadata={"is_retracted": True}),
    Case("retracted by a related article", article(fig(), meta=(
        '<related-article related-article-type="retraction-forward" xlink:href="10.1/x"/>')), ["F1 - retracted"]),
    Case("retraction notice", article(fig(), attributes='article-type="retraction" xml:lang="en"'),
         ["F1 - retracted"]),
    Case("restricted-by pmc is no restriction", article(
        fig(), front="<processing-meta><restricted-by>pmc</restricted-by></processing-meta>"),
         ["F1 = f1.jpg A lung."]),
    Case("manuscript", article(fig(), meta='<article-id pub-id-type="manuscript">NIHMS123</article-id>'),
         ["F1 = f1.jpg [manuscript] A lung."]),
    Case("caption boilerplate", article(
        fig(1, caption="<p>A lung. Full size image</p>") + fig(2, caption="<p>A lung.</p><p>doi:10.1371/x.g001</p>")
        + fig(3, caption="<p>A lung.<object-id>10.1/x</object-id></p>") + fig(4, caption="<p>A lung. (DOCX)</p>")),
         [f"F{n} = f{n}.jpg [boilerplate_removed] A lung." for n in (1, 2, 3, 4)], FOUR_FILES),
    Case("words of third parties", article(
        fig(1, caption="<p>A lung. Reproduced with permission from Smith. Copyright 2017 Nature.</p>")
        + fig(2, caption="<p>A lung. The patient gave permission.</p>")
        + fig(3, caption="<p>A lung. Adapted from [3].</p>")),
         ["F1 - third_party", "F2 = f2.jpg A lung. The patient gave permission.",
          "F3 = f3.jpg [adapted] A lung. Adapted from [3]."], FOUR_FILES),
    Case("permissions of one figure", article(fig(2) + fig(1, inside=(
        '<permissions><license xlink:href="https://creativecommons.org/licenses/by-nc/4.0/"/></permissions>'))),
         ["F2 = f2.jpg A lung.", "F1 - licence_not_allowed"], ("f1.jpg", "f2.jpg")),
    Case("CC0 waiver for the data of a CC BY article", article(fig(), licence=WAIVER), ["F1 = f1.jpg A lung."]),
    Case("licences that disagree", article(fig()), ["F1 - licence_conflict"], metadata={"license_code": "CC BY-NC"}),
    Case("no licence", article(fig(), licence=""), ["F1 - no_licence"]),
    Case("names that differ in case, with spaces, or not in ASCII", article(
        fig(1) + fig(2, graphic=graphic("fig%202.png")) + fig(3, graphic=graphic("ﬁgüre 3"))),
         ["F1 = F1.JPG A lung.", "F2 = fig 2.png A lung.", "F3 = ﬁgüre 3.png A lung."],
         ("F1.JPG", "fig 2.png", "ﬁgüre 3.png")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
def test_row(case: Case, tmp_path: Path) -> None:
    assert lines(read(tmp_path, case.xml, case.files, metadata=case.metadata)) == case.outcome


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = picture()
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def recoded(mode: str, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture())).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def see_through() -> bytes:
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(picture()))
    image.putalpha(image.convert("L"))
    image.save(buffer, "PNG")
    return buffer.getvalue()


def deep() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 96 * 72).reshape(72, 96).astype(np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(format="JPEG", exif=exif)


def white(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "outcome"),
    [
        pytest.param(picture(format="JPEG"), "F1 = f1.jpg A lung.", id="plain JPEG"),
        pytest.param(picture(format="JPEG")[:900], "F1 - broken_image", id="truncated"),
        pytest.param(b"<html>404</html>", "F1 - not_an_image", id="text named .jpg"),
        pytest.param(b"", "F1 - empty_file", id="empty"),
        pytest.param(picture(format="PNG"), "F1 = f1.jpg A lung.", id="PNG named .jpg"),
        pytest.param(picture(format="WEBP"), "F1 = f1.jpg A lung.", id="WebP named .jpg"),
        pytest.param(white(1, 1), "F1 - image_too_small", id="1x1 spacer"),
        pytest.param(white(600, 20), "F1 - image_too_elongated", id="equation strip"),
        pytest.param(png_header(30_000, 30_000), "F1 - image_bomb", id="decompression bomb"),
        pytest.param(white(30_000, 2_000), "F1 - image_too_elongated", id="30,000 px wide"),
        pytest.param(recoded("CMYK", "JPEG"), "F1 = f1.jpg [cmyk reencoded] A lung.", id="CMYK"),
        pytest.param(recoded("P", "PNG"), "F1 = f1.jpg A lung.", id="palette"),
        pytest.param(recoded("RGBA", "PNG"), "F1 = f1.jpg A lung.", id="alpha that hides nothing"),
        pytest.param(see_through(), "F1 = f1.jpg [alpha reencoded] A lung.", id="alpha"),
        pytest.param(deep(), "F1 - deep_image", id="16 bit"),
        pytest.param(picture(format="GIF", save_all=True, append_images=[Image.new("RGB", (96, 72))]),
                     "F1 = f1.jpg [first_frame reencoded] A lung.", id="animated"),
        pytest.param(turned(), "F1 = f1.jpg [rotated reencoded] A lung.", id="EXIF rotation"),
    ],
)  # fmt: skip
def test_row_of_images(data: bytes, outcome: str, tmp_path: Path) -> None:
    """The sizes are rules of the filters, which read what the image check found."""
    from data_builders.filters import FilterConfig, apply_filters, make_filters

    filters = make_filters(FilterConfig(min_side_px=16, max_aspect=8))
    items = read(tmp_path, article(fig()), {"f1.jpg": data})
    assert lines([apply_filters(item, filters) if isinstance(item, Pair) else item for item in items]) == [outcome]


def test_row_same_figure_reused(tmp_path: Path) -> None:
    """A graphical abstract that is Figure 1 again, and Figure 1 in another encoding."""
    from data_builders.filters import FilterConfig, apply_filters, make_filters

    jpeg, png = picture(format="JPEG", quality=95), picture()
    files = {"f1.jpg": jpeg, "f2.jpg": jpeg, "f3.png": png, "f4.jpg": picture(9, "JPEG")}
    body = fig(1) + fig(2) + fig(3, graphic=graphic("f3")) + fig(4, "<p>Another lung.</p>")
    filters = make_filters(FilterConfig(drop_duplicates=True))
    first, *others = [item for item in read(tmp_path, article(body), files) if isinstance(item, Pair)]
    assert [pair.sha256 == first.sha256 for pair in others] == [True, False, False]
    assert [(pair.phash ^ first.phash).bit_count() <= 4 for pair in others] == [True, True, False]
    kept = [apply_filters(pair, filters) for pair in (first, *others)]
    assert [type(item) for item in kept] == [Pair, Drop, Pair, Pair]  # near copies are for `select`, which sees all


@pytest.mark.parametrize(
    "ids",
    [
        '<article-id pub-id-type="pmc">PMC7</article-id>', '<article-id pub-id-type="pmc">7</article-id>',
        '<article-id pub-id-type="pmcid">PMC7</article-id>', '<article-id pub-id-type="pmc-uid">7</article-id>',
        '<article-id pub-id-type="pmcaid">7</article-id><article-id pub-id-type="pmcid">PMC7.1</article-id>', "",
    ],
)  # fmt: skip
def test_row_old_ids(ids: str, tmp_path: Path) -> None:
    facts = read(tmp_path, article(fig(), meta=ids), ("f1.jpg",))[0]
    assert isinstance(facts, Article)
    assert (facts.article_id, facts.pmcid, facts.version, facts.pmid, facts.flags) == ("PMC7.1", 7, 1, 5, ())


def test_row_the_id_of_another_article(tmp_path: Path) -> None:
    other = '<article-id pub-id-type="pmc">PMC8</article-id>'
    facts = read(tmp_path, article(fig(), meta=other), ("f1.jpg",))[0]
    assert isinstance(facts, Article)
    assert (facts.pmcid, facts.flags) == (7, ("id_mismatch",))


def test_row_translated_titles_are_not_the_title(tmp_path: Path) -> None:
    xml = article(fig()).replace(
        b"</article-title>",
        b'</article-title><trans-title-group xml:lang="fr"><trans-title>Le T</trans-title></trans-title-group>',
    )
    facts = read(tmp_path, xml, ("f1.jpg",))[0]
    assert isinstance(facts, Article)
    assert (facts.title, facts.language) == ("T", "en")


def test_row_packages(tmp_path: Path) -> None:
    """Path traversal, links, two .nxml, upper-case extensions, spaces and other alphabets, all in one tar.gz."""
    xml = article(fig(1) + fig(2, graphic=graphic("fig 2")) + fig(3, graphic=graphic("évasion")) + fig(4))
    path = tmp_path / "mirror" / "PMC7.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for name, data in {
            "PMC7/x.nxml": xml, "PMC7/second.nxml": b"<article/>", "PMC7/F1.JPG": picture(1, "JPEG"),
            "PMC7/f1.gif": picture(1, "GIF"), "PMC7/fig 2.jpg": picture(2, "JPEG"), "PMC7/évasion.png": picture(3),
            "../outside.jpg": picture(4, "JPEG"), "/etc/f4.jpg": picture(4, "JPEG"),
        }.items():  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("PMC7/f4.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "F1.JPG"
        archive.addfile(link)
    source = OaPackages(path.parent)
    found: list[Item] = []
    for entry in source.records():
        if isinstance(entry, Drop):
            found.append(entry)
        else:
            found += article_pairs(entry, source, PmcConfig(root="x"), preset="commercial")
    assert sorted(lines(found)) == [
        "../outside.jpg - unsafe_member", "/etc/f4.jpg - unsafe_member",
        "F1 = F1.JPG A lung.", "F2 = fig 2.jpg A lung.", "F3 = évasion.png A lung.", "F4 - missing_graphic",
        "PMC7/f4.jpg - unsafe_member", "PMC7/second.nxml - extra_xml",
    ]  # fmt: skip
    assert [item.name for item in tmp_path.iterdir()] == ["mirror"]
