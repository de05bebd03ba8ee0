"""Sentences that a small text tower learns words from: one a line, each once, in a fixed order.

Reads articles (JATS files in a folder or a tar, however nested) and, if asked, the class names of the recipes; yields
the sentences of titles, abstracts, paragraphs and captions. Nothing is parsed but text: a tower that learns from a
sentence encoder (`task: text`) needs the language of the field, not its figures. Sentences are cut by a rule that
knows the usual abbreviations; a wrong cut costs a training sentence and nothing else, so no model decides.
"""

from __future__ import annotations

import gzip
import lzma
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from biomedclip.errors import DataError
from biomedclip.files import write_bytes
from data_builders.labels.captions import with_article
from data_builders.labels.recipe import Recipe, load_recipe, recipe_names
from data_builders.pmc.text import render_text
from data_builders.pmc.xml_input import BadXml, read_article_element

SUFFIXES = (".xml", ".nxml")
MAX_FILE_BYTES = 200_000_000
WORDS = (4, 24)
"""Shorter ones are headings and debris; longer ones cost the teacher most and resemble no prompt."""

MAX_CHARACTERS = 105

_TAGS = ("article-title", "title", "p")
_APART = ("fig", "fig-group", "table-wrap", "boxed-text", "fn")
"""Stand within a paragraph in some articles, and are not part of its text."""
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(])")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Figs?|Eqs?|Refs?|Tabs?|Nos?|Drs?|e\.g|i\.e|al|vs|ca|cf|resp|approx|spp?|[A-Z]))\.$"
)


def write_sentences(articles: Sequence[str | Path], out: str | Path, *, recipes: bool = False) -> Counter[str]:
    """What was counted while the sentences went to `out`: articles, sentences, repeated, and files by reason.

    Raises DataError where an input is missing or nothing was found.
    """
    counts: Counter[str] = Counter()
    seen: dict[str, None] = {}
    for sentence in _all_sentences(articles, recipes, counts):
        counts["repeated" if sentence in seen else "sentences"] += 1
        seen[sentence] = None
    if not seen:
        raise DataError(", ".join(map(str, articles)) or "--recipes", "holds no sentence", todo="name JATS articles")
    write_bytes(out, "".join(f"{sentence}\n" for sentence in seen).encode())
    return counts


def article_sentences(xml: bytes) -> Iterator[str]:
    """The sentences of one article's titles, paragraphs and captions. Raises BadXml."""
    article, _ = read_article_element(xml)
    for element in article.iter(*_TAGS):
        outer = next(element.iterancestors("p", *_APART), None)
        if outer is not None and outer.tag == "p":
            continue  # the paragraph has its text
        yield from split_sentences(render_text(element))


def split_sentences(text: str) -> Iterator[str]:
    """The sentences of a text on one line that have a usual number of words."""
    pending = ""
    for piece in _END.split(text):
        pending = f"{pending} {piece}" if pending else piece
        if _ABBREVIATION.search(pending):
            continue
        if _is_usual(pending):
            yield pending
        pending = ""
    if _is_usual(pending):
        yield pending


def _is_usual(sentence: str) -> bool:
    return len(sentence) <= MAX_CHARACTERS and WORDS[0] <= sentence.count(" ") + 1 <= WORDS[1]


def recipe_sentences(recipe: Recipe) -> Iterator[str]:
    """A recipe's class names, bare and with each word for its modality; and what their definitions say."""
    for entry in recipe.classes:
        for form in entry.forms:
            said = with_article(form) if entry.countable else form
            yield form
            for modality in (recipe.modality, *recipe.modality_synonyms):
                yield f"{with_article(modality)} showing {said}"
                yield f"{form} on {modality}"
        if entry.definition:
            yield f"{entry.name}: {entry.definition}"


def _all_sentences(articles: Sequence[str | Path], recipes: bool, counts: Counter[str]) -> Iterator[str]:
    for place in articles:
        for xml in _read_files(Path(place), counts):
            try:
                yield from article_sentences(xml)
            except BadXml as error:
                counts[error.reason] += 1
            else:
                counts["articles"] += 1
    for name in recipe_names() if recipes else ():
        yield from recipe_sentences(load_recipe(name))


def _read_files(place: Path, counts: Counter[str]) -> Iterator[bytes]:
    """The bytes of the XML files of a folder, a tar or one file, by name."""
    if place.is_dir() or (place.suffix in SUFFIXES and place.is_file()):
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.suffix not in SUFFIXES or not path.is_file():
                continue
            if path.stat().st_size > MAX_FILE_BYTES:
                counts["too_large"] += 1
            else:
                yield path.read_bytes()
    elif place.is_file():
        yield from _read_tar(place, counts)
    else:
        raise DataError(place, "is neither a folder nor a file", todo="name JATS articles or a tar of them")


def _read_tar(place: Path, counts: Counter[str]) -> Iterator[bytes]:
    try:
        with tarfile.open(place) as tar:
            for member in tar:
                if not (member.isfile() and member.name.endswith(SUFFIXES)):
                    continue
                if member.size > MAX_FILE_BYTES:
                    counts["too_large"] += 1
                    continue
                content = tar.extractfile(member)
                if content is not None:
                    yield content.read()
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(
            place, "is no whole tar", found=str(error)[:80], todo="fetch it again, or name the unpacked folder"
        ) from None  # fmt: skip
