"""One PMC article to pairs: its facts, then a `Pair` or a `Drop` for every figure its XML holds.

Reads an `ArticleRecord` and its files from a `Source`; yields the `Article` first and then, in document order, each
figure exactly once. What concerns the whole article (retraction, licence) is asked first, but still counted figure by
figure, so that the ledger says what a rule costs; only where the XML itself cannot be read there is one Drop with the
article id as item, because nobody knows how many figures were lost. Nothing is inferred: without a stated licence that
the preset admits, no figure of the article is kept, and a figure whose caption or permissions speak of somebody else's
rights is kept only under the preset `all`, or where the config says so. Panels (`panel_pairs`), caption concepts and
MeSH terms are added only where the config asks for them; a panel is an item of its own, seen and counted like a figure.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from biomedclip.config import Config
from biomedclip.images import BadImage, CheckedImage, check_image
from biomedclip.licences import is_allowed
from biomedclip.schema import Article, Drop, Figure, Pair, Split
from data_builders.concepts import modality_of, tag_caption
from data_builders.pmc.catalog import ArticleRecord, BadFile, Source, SourceFile
from data_builders.pmc.jats import BadXml, parse_article
from data_builders.pmc.licences import decide_licence
from data_builders.pmc.media import resolve_graphic
from data_builders.pmc.mesh_terms import read_mesh_terms
from data_builders.pmc.panel_pairs import PanelConfig, with_panels
from data_builders.pmc.side_tables import hash_files, read_once

MAX_MENTIONS = 5
MAX_MENTION_CHARS = 1000
"""Of the mentions that go into a sample's .json: a paragraph that cites a figure says little new after five."""

_MAX_KEY = 80
_STRICTNESS = ("CC0", "CC BY", "CC BY-SA", "CC BY-ND", "CC BY-NC", "CC BY-NC-SA", "CC BY-NC-ND")


class SplitConfig(Config):
    """How articles are dealt out; what is neither `val` nor `test` is `train`."""

    val: float = Field(default=0.05, ge=0, lt=1)
    test: float = Field(default=0.05, ge=0, lt=1)
    seed: int = 0

    @model_validator(mode="after")
    def _leave_something_to_train(self) -> SplitConfig:
        if self.val + self.test >= 1:
            raise ValueError("val and test together must be below 1")
        return self


class PmcRules(Config):
    """What becomes of the figures of an article, wherever its files come from."""

    languages: tuple[str, ...] | None = ("en",)
    """Primary language tags to keep; None keeps all. A figure whose language nothing states is kept and flagged."""
    third_party: Literal["drop", "keep"] | None = None
    """Figures that speak of somebody else's rights; None drops them under every preset but `all`."""
    splits: SplitConfig = SplitConfig()
    panels: PanelConfig = PanelConfig()
    concepts: bool = False
    """Whether captions are searched for concepts, and for the modality of their picture (`data_builders.concepts`)."""

    mesh: str | None = None
    """A table of MeSH terms (`mesh_terms`), joined on the PMID into the articles' facts."""

    def side_files(self) -> dict[str, str]:
        """Key -> sha256 of each file beside the articles that the rules name; part of a build's identity."""
        return hash_files({"panels.boxes": self.panels.boxes, "mesh": self.mesh})


class PmcConfig(PmcRules):
    """A source of PMC articles and the rules that only it can apply."""

    kind: Literal["pmc"] = "pmc"
    root: str
    """A local copy of the PMC Cloud Service bucket; `sample://pmc` is the one that comes with the project."""
    snapshot: str | None = None
    """When the copy was taken; the dataset card states it, as the terms of the service ask."""


@dataclass(slots=True)
class _Context:
    """What the figures of one article share while they are turned into pairs."""

    record: ArticleRecord
    source: Source
    config: PmcRules
    preset: str
    article: Article
    split: Split
    media: dict[str, SourceFile]
    used_keys: set[str] = field(default_factory=set)


class _Refused(ValueError):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def article_pairs(
    record: ArticleRecord, source: Source, config: PmcRules, *, preset: str
) -> Iterator[Article | Pair | Drop]:
    """The article's facts, then one Pair or Drop a figure and one Pair a panel; one Drop alone for unreadable XML.

    `preset` is one of `biomedclip.licences.PRESETS`. Reasons of a Drop, in the order in which they are asked:
    `retracted`; those of `licences.decide_licence`; `licence_not_allowed`; `third_party`; `translation`;
    `other_language`; `no_caption`; `no_graphic`; `missing_graphic`; those of `Source.read` and of
    `biomedclip.images.check_image`; `replaced_by_panels`.
    """
    try:
        parsed = parse_article(source.read(record.xml), article_id=record.article_id)
    except (BadFile, BadXml) as error:
        yield Drop(source="pmc", item=record.article_id, reason=error.reason, detail=error.detail,
                   article_id=record.article_id)  # fmt: skip
        return
    licence, refusal = decide_licence(record.licence, parsed.licence)
    article = complete_article(parsed.article, record, licence)
    if config.mesh is not None:
        article = replace(article, mesh=read_once(read_mesh_terms, Path(config.mesh).expanduser()).of(article.pmid))
    yield article
    context = _Context(
        record, source, config, preset, article, split_of(article_identity(article), config.splits),
        {file.name: file for file in record.media},
    )  # fmt: skip
    for figure in parsed.figures:
        try:
            pair = _pair(figure, context, refusal)
        except _Refused as refused:
            yield Drop(source="pmc", item=figure.figure_id, reason=refused.reason, detail=refused.detail,
                       article_id=record.article_id)  # fmt: skip
            continue
        for item in with_panels(pair, _mentions(figure), config.panels):
            yield _finish(item, config) if isinstance(item, Pair) else item


def complete_article(article: Article, record: ArticleRecord, licence: str | None) -> Article:
    """The XML's facts with what only the metadata know; the XML's own word goes first, but for a retraction."""
    return replace(
        article,
        pmcid=record.pmcid,
        version=record.version,
        licence=licence,
        title=article.title or record.title or "",
        doi=article.doi or record.doi,
        pmid=article.pmid or record.pmid,
        citation=article.citation or record.citation,
        is_retracted=article.is_retracted or record.is_retracted,
        is_manuscript=article.is_manuscript or record.is_manuscript,
    )


def article_identity(article: Article) -> str:
    """What stays the same for all versions and copies of an article: its DOI, else its PMC id without version."""
    doi = re.sub(r"^(https?://(dx\.)?doi\.org/|doi:)", "", (article.doi or "").strip().lower())
    return f"doi:{doi}" if doi else f"pmc:{article.pmcid}"


def split_of(identity: str, splits: SplitConfig) -> Split:
    """The split of an article: a hash of its identity, so it never changes as a dataset grows.

    Articles of the `val` share stay in `val` when `test` is enlarged, and the other way round: the shares are taken
    from the two ends of the hash's range.
    """
    digest = hashlib.sha256(f"{splits.seed}:{identity}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < splits.val:
        return "val"
    return "test" if position >= 1 - splits.test else "train"


def compose_caption(figure: Figure) -> str:
    """The figure's caption, after that of its group where the group has one of its own."""
    caption, group = figure.caption.strip(), (figure.group_caption or "").strip()
    if not group or caption.startswith(group):
        return caption
    return f"{group} {caption}".strip()


def sample_key(record: ArticleRecord, figure: Figure, used: set[str]) -> str:
    """`pmc-<id>-v<version>-<figure id>-p<panel>`, made unique among `used`, to which it is added.

    A key that is too long, or that another figure id already turned into, ends in a hash of the figure's own id.
    """
    prefix, suffix = f"pmc-{record.pmcid}-v{record.version}-", f"-p{figure.panel_index}"
    slug = re.sub(r"[^a-z0-9_-]+", "-", figure.figure_id.lower()).strip("-") or "fig"
    key = f"{prefix}{slug}{suffix}"
    attempt = 0
    while len(key) > _MAX_KEY or key in used:
        text = f"{figure.figure_id}\n{figure.ordinal}\n{figure.panel_index}\n{attempt}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        room = _MAX_KEY - len(prefix) - len(suffix) - len(digest) - 1
        key = f"{prefix}{slug[:room]}-{digest}{suffix}"
        attempt += 1
    used.add(key)
    return key


def _finish(pair: Pair, config: PmcRules) -> Pair:
    """The pair with no more mentions than a sidecar holds, and with what its caption says of its picture."""
    mentions = pair.sidecar.get("mentions", ())
    if len(mentions) > MAX_MENTIONS:
        pair = replace(pair, sidecar={**pair.sidecar, "mentions": mentions[:MAX_MENTIONS]})
    if not config.concepts:
        return pair
    concepts = tag_caption(pair.caption)
    return replace(pair, concepts=concepts, modality=modality_of(concepts))


def _pair(figure: Figure, context: _Context, refusal: str | None) -> Pair:
    """The figure's pair. Raises _Refused."""
    article, record = context.article, context.record
    licence = _licence(figure, context, refusal)
    _check_language(figure, context)
    caption = compose_caption(figure)
    if not caption:
        raise _Refused("no_caption", figure.label or "")
    file = _file(figure, context)
    # Before the picture is read: a picture that cannot be had today must not lend its key to another one.
    key = sample_key(record, figure, context.used_keys)
    image = _image(file, context)
    return Pair(
        key=key,
        image=image.data,
        image_format=image.format,
        width=image.width,
        height=image.height,
        caption=caption,
        source="pmc",
        licence=licence,
        sha256=image.sha256,
        phash=image.phash,
        split=context.split,
        article_id=record.article_id,
        figure_id=figure.figure_id,
        panel=str(figure.panel_index) if figure.panel_count > 1 else None,
        group_id=f"PMC{record.pmcid}",
        flags=_flags(figure, article, image),
        sidecar=_sidecar(figure, file),
    )


def _licence(figure: Figure, context: _Context, refusal: str | None) -> str:
    """The strictest licence of caption and picture, where the preset admits it. Raises _Refused."""
    if context.article.is_retracted:
        raise _Refused("retracted")
    if refusal is not None:
        raise _Refused(refusal, f"metadata: {context.record.licence}")
    codes = [code for code in (context.article.licence, figure.licence) if code]
    if not codes:
        raise _Refused("no_licence")
    for code in codes:
        if not is_allowed(code, context.preset):
            raise _Refused("licence_not_allowed", f"{code} under {context.preset}")
    if figure.third_party:
        rule = context.config.third_party or ("keep" if context.preset == "all" else "drop")
        if rule == "drop":
            raise _Refused("third_party", figure.caption[:120])
    # An unknown code reaches this line only under `all`, where it counts as the strictest.
    return max(codes, key=lambda code: _STRICTNESS.index(code) if code in _STRICTNESS else len(_STRICTNESS))


def _check_language(figure: Figure, context: _Context) -> None:
    language = figure.language or context.article.language
    wanted = context.config.languages
    if "subarticle_translation" in figure.flags:
        raise _Refused("translation", language or "")
    if wanted is not None and language and re.split("[-_]", language.lower())[0] not in wanted:
        raise _Refused("other_language", language)


def _file(figure: Figure, context: _Context) -> SourceFile:
    if not figure.graphic:
        raise _Refused("no_graphic", figure.label or "")
    name = resolve_graphic(figure.graphic, tuple(context.media), alternatives=figure.alternatives)
    if name is None:
        raise _Refused("missing_graphic", figure.graphic[:200])
    return context.media[name]


def _image(file: SourceFile, context: _Context) -> CheckedImage:
    try:
        return check_image(context.source.read(file))
    except BadFile as error:
        raise _Refused(error.reason, error.detail) from None
    except BadImage as error:
        raise _Refused(error.reason, f"{file.name} {error.detail}") from None


def _flags(figure: Figure, article: Article, image: CheckedImage) -> tuple[str, ...]:
    flags = [*figure.flags, *image.flags]
    if figure.third_party:
        flags.append("third_party")
    if figure.panel_count > 1:
        flags.append("shared_caption")
    if figure.group_caption:
        flags.append("group_caption")
    if article.is_manuscript:
        flags.append("manuscript")
    if not (figure.language or article.language):
        flags.append("language_unstated")
    return tuple(dict.fromkeys(flags))


def _mentions(figure: Figure) -> list[dict[str, Any]]:
    mentions = []
    for mention in figure.mentions:
        facts = {"text": mention.text[:MAX_MENTION_CHARS], "section": mention.section, "panels": list(mention.panels)}
        mentions.append({key: value for key, value in facts.items() if value})
    return mentions


def _sidecar(figure: Figure, file: SourceFile) -> dict[str, Any]:
    sidecar = {
        "label": figure.label,
        "file": file.name,
        "md5": file.md5,
        "panel_count": figure.panel_count if figure.panel_count > 1 else None,
        "figure_group": figure.group_id,
        "mentions": _mentions(figure)[:MAX_MENTIONS],
    }
    return {key: value for key, value in sidecar.items() if value}
