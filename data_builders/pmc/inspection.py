"""One article as the builder sees it: its facts, the licence decision with what was decided on, each figure's fate.

Reads an article from a source, or what a dataset folder or a folder of units still knows of it; yields an `Inspection`
for `inspection_views` to show. Nothing is decided here: pairs and drops are those of `pairs.article_pairs` under the
same rules, and what is added (label, href, file, mentions of a dropped figure) is read from the same parse. A dropped
figure is shown with its picture wherever there is one, because the question is mostly whether the drop was right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from biomedclip.config import check_config
from biomedclip.errors import ConfigError, DataError
from biomedclip.images import BadImage, check_image
from biomedclip.licences import PRESETS, is_allowed
from biomedclip.schema import Article, Drop, Figure, Pair
from data_builders.build import resolve_root
from data_builders.pmc.catalog import ArticleRecord, BadFile, LocalBucket, Source, SourceFile, choose_versions
from data_builders.pmc.client import Client, ClientConfig
from data_builders.pmc.jats import BadXml, parse_article
from data_builders.pmc.licences import XmlLicence, decide_licence
from data_builders.pmc.media import resolve_graphic
from data_builders.pmc.pairs import PmcRules, article_pairs, compose_caption
from data_builders.pmc.panel_pairs import PanelConfig
from data_builders.pmc.sources import CloudBucket, OaPackages, kind_of_source

_ARTICLE = re.compile(r"(?:PMC)?([1-9][0-9]{0,11})(?:\.([1-9][0-9]{0,3}))?", re.IGNORECASE)
_LINKS = ("license@href", "license_ref", "link")


class InspectConfig(PmcRules):
    """The rules an article is looked at under; other than a build's, they ask for all that can be shown."""

    licence: Literal["commercial-derivatives", "commercial", "noncommercial", "all"] = "all"
    """The preset. Nothing is kept by looking, so here alone there is a default: the widest."""
    panels: PanelConfig = PanelConfig(mode="split")
    concepts: bool = True
    client: ClientConfig = ClientConfig()
    """For a source that is an address; its `endpoint` is that address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenPanel:
    """One panel of a figure."""

    letter: str
    caption: str
    key: str
    box: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom in pixels of the figure's picture."""
    confidence: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenFigure:
    """One figure and what became of it; None where the place looked at does not know."""

    item: str
    """The figure's id in the article."""
    status: Literal["kept", "dropped"]
    key: str | None = None
    reason: str | None = None
    detail: str = ""
    label: str | None = None
    caption: str | None = None
    graphic: str | None = None
    """The href as written."""
    file: str | None = None
    """The file it was resolved to."""
    image: bytes | None = None
    image_format: str | None = None
    width: int | None = None
    height: int | None = None
    licence: str | None = None
    modality: str | None = None
    concepts: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    mentions: tuple[str, ...] | None = None
    panels: tuple[SeenPanel, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LicenceView:
    """A licence decision and its three inputs."""

    decision: str
    """The code, or the reason why there is none."""
    presets: tuple[str, ...]
    """Those of `biomedclip.licences.PRESETS` that admit it."""
    metadata: str | None = None
    links: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """An article and its figures, in document order."""

    article_id: str
    where: str
    """The source, and the preset where one was applied."""
    article: Article | None = None
    """None where it could not be read; `figures` then has one row, which says why."""
    licence: LicenceView | None = None
    figures: tuple[SeenFigure, ...] = ()
    notes: tuple[str, ...] = ()


def inspect_source(article: str, source: str, config: InspectConfig | None = None) -> Inspection:
    """An article of a copy of the bucket, a mirror of oa_package, an address or `sample://pmc`.

    `article` is PMC123, of which the version that a build would take is shown, or PMC123.1. Raises ConfigError for
    what is no such id, DataError where the source holds none of that id.
    """
    config = config or InspectConfig()
    pmcid, version = parse_wanted(article)
    with open_source(source, config.client) as opened:
        found = opened.find(pmcid)
        chosen = [item for item in found if version is None or _version_of(item) == version]
        if not chosen:
            raise missing_article(article, source, [_id_of(item) for item in found])
        if version is None:
            *others, record = sorted(choose_versions(chosen), key=lambda item: isinstance(item, ArticleRecord))
            notes = tuple(f"{other.article_id}: {other.reason}" for other in others if isinstance(other, Drop))
        else:
            record, notes = chosen[0], ()
        where = f"{source}, preset {config.licence}"
        if isinstance(record, Drop):
            return Inspection(article_id=record.item, where=where, figures=(_dropped_whole(record),), notes=notes)
        return replace(inspect_record(record, opened, config), where=where, notes=notes)


def parse_wanted(article: str) -> tuple[int, int | None]:
    """Number and version of PMC123.1, the version None where it is not given. Raises ConfigError for what is none."""
    match = _ARTICLE.fullmatch(article.strip())
    if match is None:
        raise ConfigError("ARTICLE", "is no article id", found=repr(article)[:60], todo="write PMC123 or PMC123.1")
    return int(match[1]), int(match[2]) if match[2] else None


def missing_article(article: str, where: str | Path, others: Sequence[str] = ()) -> DataError:
    """The error for an article that is not there; `others` are versions of it that are."""
    return DataError(where, f"holds no article {article}", found=", ".join(others) or None,
                     todo="name one of these" if others else "check the id and the source")  # fmt: skip


@contextmanager
def open_source(source: str, client: ClientConfig) -> Iterator[LocalBucket | OaPackages | CloudBucket]:
    """The source that a string stands for. Raises DataError where it is none."""
    kind = kind_of_source(source if "://" in source and not source.startswith("sample:") else str(resolve_root(source)))
    if kind == "cloud":
        settings = check_config({**client.model_dump(), "endpoint": source}, ClientConfig, source)
        with Client(settings) as opened:
            yield CloudBucket(opened, ())
    elif kind == "packages":
        yield OaPackages(resolve_root(source))
    else:
        yield LocalBucket(resolve_root(source))


def inspect_record(record: ArticleRecord, source: Source, config: InspectConfig) -> Inspection:
    """The article of a record, under a config's rules and preset."""
    source = _Remembered(source)
    items = list(article_pairs(record, source, config, preset=config.licence))
    if isinstance(items[0], Drop):
        return Inspection(article_id=record.article_id, where="", figures=(_dropped_whole(items[0]),))
    try:
        parsed = parse_article(source.read(record.xml), article_id=record.article_id)
    except (BadFile, BadXml) as error:  # the same bytes were read a moment ago
        raise DataError(record.article_id, "changed while it was read", found=str(error)) from None
    article = items[0] if isinstance(items[0], Article) else None
    groups = list(_group_by_figure(item for item in items[1:] if not isinstance(item, Article)))
    figures = [_see_figure(figure, group, record, source) for figure, group in zip(parsed.figures, groups, strict=True)]
    return Inspection(
        article_id=record.article_id, where="", article=article, figures=tuple(figures),
        licence=_see_licence(record, parsed.licence),
    )  # fmt: skip


class _Remembered:
    """A source that reads each file once: an inspection asks for the XML and for some pictures twice."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._read: dict[str, bytes] = {}

    def records(self) -> Iterator[ArticleRecord | Drop]:
        return self.source.records()

    def read(self, file: SourceFile) -> bytes:
        if file.key not in self._read:
            self._read[file.key] = self.source.read(file)
        return self._read[file.key]


def _id_of(item: ArticleRecord | Drop) -> str:
    return item.item if isinstance(item, Drop) else item.article_id


def _version_of(item: ArticleRecord | Drop) -> int:
    return parse_wanted(_id_of(item))[1] or 1


def _dropped_whole(drop: Drop) -> SeenFigure:
    return SeenFigure(item=drop.item, status="dropped", reason=drop.reason, detail=drop.detail)


def _group_by_figure(items: Iterator[Pair | Drop]) -> Iterator[list[Pair | Drop]]:
    """What `article_pairs` yields of one figure: its pair or drop, and the pairs of its panels."""
    group: list[Pair | Drop] = []
    for item in items:
        is_panel = isinstance(item, Pair) and "parent" in item.sidecar
        if group and not is_panel:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _see_licence(record: ArticleRecord, xml: XmlLicence) -> LicenceView:
    code, reason = decide_licence(record.licence, xml)
    links = tuple(piece for piece in xml.evidence if piece.startswith(_LINKS))
    return LicenceView(
        decision=code or reason or "", presets=admitting_presets(code), metadata=record.licence, links=links,
        words=tuple(piece for piece in xml.evidence if piece not in links), flags=xml.flags,
    )  # fmt: skip


def admitting_presets(code: str | None) -> tuple[str, ...]:
    """The presets that admit a licence code; none where there is no code."""
    return tuple(preset for preset in PRESETS if code and is_allowed(code, preset))


def _see_figure(figure: Figure, group: list[Pair | Drop], record: ArticleRecord, source: Source) -> SeenFigure:
    head, panels = group[0], [item for item in group[1:] if isinstance(item, Pair)]
    file = _file_of(figure, record)
    seen = SeenFigure(
        item=figure.figure_id, status="kept", label=figure.label, caption=compose_caption(figure),
        graphic=figure.graphic, file=file.name if file else None, flags=figure.flags,
        mentions=tuple(mention.text for mention in figure.mentions),
        panels=tuple(see_panel(panel) for panel in panels),
    )  # fmt: skip
    if isinstance(head, Pair):
        return replace(seen, **_facts_of(head))
    seen = replace(seen, status="dropped", reason=head.reason, detail=head.detail, licence=figure.licence)
    if file is None:
        return seen
    try:
        image = check_image(source.read(file))
    except (BadFile, BadImage):
        return seen  # what is wrong with the file is the reason of the drop, or comes after it
    return replace(seen, image=image.data, image_format=image.format, width=image.width, height=image.height)


def _facts_of(pair: Pair) -> dict[str, Any]:
    names = ("key", "image", "image_format", "width", "height", "licence", "modality", "concepts", "flags")
    return {name: getattr(pair, name) for name in names}


def see_panel(pair: Pair) -> SeenPanel:
    """A panel's pair, as `panels.split_figure_pair` makes it."""
    box = pair.sidecar.get("panel_box")
    return SeenPanel(
        letter=pair.panel or "", caption=pair.caption, key=pair.key, confidence=pair.sidecar.get("panel_confidence"),
        box=(box[0], box[1], box[2], box[3]) if box else None,
    )  # fmt: skip


def _file_of(figure: Figure, record: ArticleRecord) -> SourceFile | None:
    media = {file.name: file for file in record.media}
    name = resolve_graphic(figure.graphic, tuple(media), alternatives=figure.alternatives) if figure.graphic else None
    return media[name] if name else None
