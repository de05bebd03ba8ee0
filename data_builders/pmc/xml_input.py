"""Bytes of one XML file in, its `article` element out, whatever the wrapper, encoding, namespace or damage.

Every file is treated as hostile: no DTD is loaded, nothing is fetched, no entity is ever expanded, and a file that
declares entities is refused before the parser sees it (the parser's own limits must be off for long articles, so they
cannot be relied on). The order of attempts matters: a strict parse first, then one of repaired bytes, and only then
libxml2's recovery, which can lose text and is therefore flagged `xml_recovered`. `cut_references` removes reference
lists before the parse, because they are about a third of an article and never hold a figure; a test compares the
results with and without it.
"""

from __future__ import annotations

import codecs
import re
from html.entities import html5

from lxml import etree
from lxml.etree import _Element as Element

XLINK_HREF = "{http://www.w3.org/1999/xlink}href"
XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"

_OPTIONS = {
    "load_dtd": False,
    "no_network": True,
    "resolve_entities": False,
    "attribute_defaults": False,
    "dtd_validation": False,
    "huge_tree": True,  # some articles hold more than 10 MB in one text node
    "remove_comments": True,
    "remove_pis": True,
    # collect_ids=False would be faster, but with libxml2 2.14 it makes lxml 6 load the external DTD after all.
}
_STRICT = etree.XMLParser(**_OPTIONS)
_RECOVER = etree.XMLParser(recover=True, **_OPTIONS)

_ASCII_LIKE = ("utf-8", "ascii", "iso8859", "cp125", "latin", "koi8")
"""Beginnings of Python codec names whose encodings agree with ASCII: their bytes can be searched as they are."""
_DECLARATION = re.compile(rb"^\s*<\?xml\b[^>]*?encoding\s*=\s*[\"']([A-Za-z0-9._-]+)[\"'][^>]*?\?>")
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_UTF16_WITHOUT_BOM = ((b"<\x00", "utf-16-le"), (b"\x00<", "utf-16-be"))
_ENTITY = re.compile(rb"<!\[CDATA\[.*?\]\]>|&([A-Za-z][A-Za-z0-9.-]*);", re.DOTALL)
_NAMED = re.compile(rb"&(?!#|lt;|gt;|amp;|quot;|apos;)")
_PREDEFINED = frozenset((b"amp", b"lt", b"gt", b"quot", b"apos"))
_ILLEGAL_CONTROLS = bytes(b for b in range(32) if b not in b"\t\n\r")
_ILLEGAL_REFERENCE = re.compile(rb"&#(?:0*(?:[0-8]|1[124-9]|2[0-9]|3[01])|[xX]0*(?:[0-8]|[bcef]|1[0-9a-f]));", re.I)


class BadXml(ValueError):
    """XML that yields no article. `reason` is a ledger word: empty_file, xml_error, xml_hostile or not_an_article."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def read_article_element(xml: bytes, *, pmcid: int | None = None, cut: bool = True) -> tuple[Element, set[str]]:
    """The first `article` element without its default namespace, and flags on how it was read.

    Of several articles in one wrapper the one with `pmcid` is taken, or else the first. Flags: `xml_recovered`,
    `encoding_repaired`, `unknown_entity`. Raises BadXml.
    """
    if not xml.strip():
        raise BadXml("empty_file", f"{len(xml)} bytes, none of them text")
    flags: set[str] = set()
    xml = _make_ascii_like(xml)
    root = _parse(xml, flags, cut)
    if root is None:
        raise BadXml("xml_error", "nothing could be recovered")
    return _find_article(root, pmcid), flags


def substitute_entities(xml: bytes, flags: set[str] | None = None) -> bytes:
    """The XML with HTML's named entities as character references and unknown ones as literal text.

    JATS names them in an external DTD, which is never loaded, so `&micro;` would be an error or be lost. CDATA
    sections stay as they are. Adds `unknown_entity` to `flags`.
    """

    def replace(match: re.Match[bytes]) -> bytes:
        name = match[1]
        if name is None or name in _PREDEFINED:
            return match[0]
        text = _entity_text(name.decode("ascii"))
        if text is not None:
            return "".join(f"&#{ord(c)};" for c in text).encode("ascii")
        if flags is not None:
            flags.add("unknown_entity")
        return b"&amp;" + name + b";"

    return _ENTITY.sub(replace, xml) if _NAMED.search(xml) else xml


def _entity_text(name: str) -> str | None:
    """The text of a named entity of HTML, or of the ISO Greek sets that HTML left out: `agr`, `b.alpha`, `Thetas`."""
    if f"{name};" in html5:
        return html5[f"{name};"]
    if name in _ISO_GREEK:
        return _ISO_GREEK[name]
    return html5.get(f"{name.removeprefix('b.').removesuffix('s')};") if name.startswith("b.") else None


_GREEK_STEMS = "a b g d e z ee th i k l m n x o p r s t u ph kh ps oh"
_ISO_GREEK = {
    **{f"{stem}gr": letter for stem, letter in zip(_GREEK_STEMS.split(), "αβγδεζηθικλμνξοπρστυφχψω", strict=True)},
    **{
        f"{stem.upper()}gr": letter
        for stem, letter in zip(_GREEK_STEMS.split(), "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩ", strict=True)
    },
    "sfgr": "ς",
    "thetas": "θ",
    "Thetas": "Θ",
    "phis": "φ",
    "Ugr": "Υ",
}


def cut_references(xml: bytes) -> bytes:
    """The XML without its last reference list, or unchanged where that could remove anything else.

    Left alone is a list that holds a figure, a named entity (an unknown one is a flag of the article), or the beginning
    of a comment, instruction or CDATA section, because its end tag may then be none. A list that is no list otherwise
    (nested, or begun in a comment) leaves what is no XML, and the caller parses the whole. Only the last list is looked
    for: nearly every article has one, near its end.
    """
    end = xml.rfind(b"</ref-list>")
    start = xml.rfind(b"<ref-list", 0, end) if end >= 0 else -1
    if start < 0 or xml.find(b"<fig", start, end) >= 0 or _NAMED.search(xml, start, end):
        return xml
    for mark in (b"!", b"?"):  # single bytes are found at four times the speed of two
        if xml.find(mark, start, end) >= 0 and xml.find(b"<" + mark, start, end) >= 0:
            return xml
    return xml[:start] + xml[end + len(b"</ref-list>") :]


def href_of(element: Element) -> str | None:
    """The `xlink:href` of an element, also where the prefix was never declared; None where it is absent or empty."""
    href = element.get(XLINK_HREF)
    if href is None:
        href = next((v for k, v in element.items() if k.rpartition("}")[2].rpartition(":")[2] == "href"), None)
    return (href.strip() or None) if href else None


def _make_ascii_like(xml: bytes) -> bytes:
    """The file in an encoding whose ASCII bytes mean ASCII, so that the checks above see what the parser will see."""
    encoding = next((name for bom, name in _BOMS if xml.startswith(bom)), None)
    encoding = encoding or next((name for start, name in _UTF16_WITHOUT_BOM if xml.startswith(start)), None)
    if encoding is None:
        declared = _DECLARATION.match(xml.removeprefix(codecs.BOM_UTF8))
        if declared is None:
            return xml
        encoding = declared[1].decode("ascii")
        try:
            if codecs.lookup(encoding).name.startswith(_ASCII_LIKE):
                return xml
        except LookupError as error:
            raise BadXml("xml_error", f"unknown encoding {encoding!r}") from error
    try:
        text = xml.decode(encoding, errors="replace")
    except (LookupError, UnicodeError) as error:
        raise BadXml("xml_error", f"cannot be read as {encoding!r}: {error}") from error
    return re.sub(r"^\ufeff?\s*<\?xml\b.*?\?>", "", text, count=1, flags=re.DOTALL).encode("utf-8", "replace")


def _parse(xml: bytes, flags: set[str], cut: bool) -> Element | None:
    xml = xml.lstrip()
    if cut:
        shorter = cut_references(xml)
        if len(shorter) < len(xml):
            found: set[str] = set()
            try:
                root = etree.fromstring(_defuse(shorter, found), _STRICT)
            except etree.XMLSyntaxError:
                pass  # the file is damaged, or the cut was wrong: the whole of it decides
            else:
                flags |= found
                return root
    xml = _defuse(xml, flags)
    try:
        return etree.fromstring(xml, _STRICT)
    except etree.XMLSyntaxError:
        flags.add("xml_recovered")
    xml = _repair_bytes(xml, flags)
    try:
        return etree.fromstring(xml, _STRICT)
    except etree.XMLSyntaxError:
        pass
    try:
        return etree.fromstring(xml, _RECOVER)
    except etree.XMLSyntaxError as error:
        raise BadXml("xml_error", str(error)) from error


def _defuse(xml: bytes, flags: set[str]) -> bytes:
    """What may be given to the parser. Raises BadXml."""
    # Refused wherever it stands: telling a DOCTYPE from a CDATA section by search is what an attacker would attack.
    if b"<!ENTITY" in xml:
        raise BadXml("xml_hostile", "it declares entities")
    return substitute_entities(xml, flags)


def _repair_bytes(xml: bytes, flags: set[str]) -> bytes:
    """Bytes without characters that XML forbids; what is not UTF-8 in a file that says so becomes U+FFFD."""
    xml = _ILLEGAL_REFERENCE.sub(b"", xml.translate(None, _ILLEGAL_CONTROLS))
    declared = _DECLARATION.match(xml)
    if declared is None or declared[1].lower().replace(b"-", b"") == b"utf8":
        try:
            xml.decode("utf-8")
        except UnicodeDecodeError:
            flags.add("encoding_repaired")
            xml = xml.decode("utf-8", errors="replace").encode("utf-8")
    return xml


def _find_article(root: Element, pmcid: int | None) -> Element:
    articles = [root] if _local_name(root) == "article" else list(root.iter("article", "{*}article"))
    if not articles:
        raise BadXml("not_an_article", f"the root element is <{_local_name(root)}>")
    for article in articles:
        _strip_namespace(article)
    if pmcid is not None and len(articles) > 1:
        for article in articles:
            ids = article.findall("front/article-meta/article-id")
            if any((i.text or "").strip().upper() in (f"PMC{pmcid}", str(pmcid)) for i in ids):
                return article
    return articles[0]


def _local_name(element: Element) -> str:
    return str(element.tag).rpartition("}")[2]


def _strip_namespace(article: Element) -> None:
    """Make `{https://jats…}fig` plain `fig`, so that one spelling serves; MathML, xlink and ali keep theirs."""
    tag = article.tag
    if not tag.startswith("{"):
        return
    namespace = tag[: tag.index("}") + 1]
    for element in article.iter(f"{namespace}*"):
        element.tag = element.tag[len(namespace) :]
