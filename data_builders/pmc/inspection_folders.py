"""One article as a finished dataset folder, or a folder of units, knows it: kept figures with their pictures, drops.

`inspect_article` is the door for all kinds of places. Reads only the rows of the article out of indexes and ledgers,
whatever their size. What a build does not store (the href of a dropped figure, the words a licence was read from) is
unknown here and shown as such; a source shows it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from biomedclip.schema import INDEX_COLUMNS, LEDGER_COLUMNS, Article, Pair
from biomedclip.shards import ARTICLE_COLUMNS, MANIFEST, DatasetFolder, arrow_schema
from data_builders.pmc.inspection import (
    InspectConfig,
    Inspection,
    LicenceView,
    SeenFigure,
    admitting_presets,
    inspect_source,
    missing_article,
    parse_wanted,
    see_panel,
)
from data_builders.units import PAIR_COLUMNS, pair_of_row, read_image, read_units


@dataclass(frozen=True, slots=True)
class _Kept:
    """A pair as a folder stores it, with its image and sidecar."""

    pair: Pair
    is_panel: bool


def inspect_article(article: str, source: str, config: InspectConfig | None = None) -> Inspection:
    """An article of a source, a dataset folder or a folder of units.

    Raises ConfigError for what is no article id, DataError where the place is none of these or lacks the article.
    """
    folder = Path(source)
    if (folder / MANIFEST).exists():
        return _inspect_dataset(article, DatasetFolder(folder))
    if any(folder.glob("*.pairs.parquet")):
        return _inspect_units(article, folder)
    return inspect_source(article, source, config)


def _inspect_dataset(article: str, dataset: DatasetFolder) -> Inspection:
    paths = [dataset.folder / shard["name"].replace(".tar", ".parquet") for shard in dataset.manifest["shards"]]
    rows = _rows_of(paths, article, INDEX_COLUMNS)
    samples = [dataset.read(row) for row in rows]
    kept = [_Kept(_pair_of_sample(s.row, s.image, s.caption, s.json), "parent" in s.json) for s in samples]
    ledger = _rows_of([dataset.folder / "ledger.parquet"], article, LEDGER_COLUMNS)
    articles = _rows_of([dataset.folder / "articles.parquet"], article, ARTICLE_COLUMNS)
    seen = _assemble(article, str(dataset.folder), articles, ledger, kept)
    keys = {figure.key for figure in seen.figures} & dataset.withdrawn
    graves = [row for row in dataset.tombstones.to_pylist() if row["key"] in keys] if keys else []
    taken = tuple(f"{row['key']} was taken back: {row['reason']}, stated {row['stated']}" for row in graves)
    return replace(seen, notes=(*seen.notes, *taken))


def _inspect_units(article: str, folder: Path) -> Inspection:
    records = read_units(folder)
    rows = _rows_of([record.path("pairs") for record in records], article, PAIR_COLUMNS)
    pairs = [pair_of_row(row, read_image(folder, row)) for row in rows]
    superseded = {key for record in records for key in record.supersedes}
    ledger = [
        row
        for row in _rows_of([record.path("ledger") for record in records], article, LEDGER_COLUMNS)
        if (row["article_id"], row["item"], row["reason"]) not in superseded
    ]
    articles = _rows_of([record.path("articles") for record in records], article, ARTICLE_COLUMNS)
    return _assemble(article, str(folder), articles, ledger, [_Kept(pair, "parent" in pair.sidecar) for pair in pairs])


def _rows_of(paths: Sequence[Path], article: str, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of an article, all its versions where none is named, in the order of the files."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    pmcid, version = parse_wanted(article)
    name = pc.field("article_id")
    wanted = name == f"PMC{pmcid}.{version}" if version else pc.starts_with(name, f"PMC{pmcid}.")
    schema = arrow_schema(columns)
    rows: list[dict[str, Any]] = []
    for path in paths:
        rows += pq.read_table(path, filters=wanted).select(schema.names).to_pylist()
    return rows


def _pair_of_sample(row: Mapping[str, Any], image: bytes, caption: str, side: Mapping[str, Any]) -> Pair:
    facts = {field.name: row[field.name] for field in fields(Pair) if field.name in row}
    facts |= {name: tuple(value) for name, value in facts.items() if isinstance(value, list)}
    return Pair(**{**facts, "image": image, "caption": caption, "sidecar": dict(side)})


def _assemble(
    article: str,
    where: str,
    articles: Sequence[Mapping[str, Any]],
    ledger: Sequence[Mapping[str, Any]],
    kept: Sequence[_Kept],
) -> Inspection:
    # Versions that were superseded have ledger rows too; the article shown is the one that was read.
    facts = articles[0] if articles else None
    if not ledger and facts is None:
        raise missing_article(article, where)
    shown = _article_of(facts) if facts else None
    figures = tuple(_figures(ledger, {one.pair.key: one for one in kept}))
    return Inspection(
        article_id=shown.article_id if shown else ledger[0]["article_id"], where=where, article=shown,
        figures=figures, licence=_licence_of(shown) if shown else None,
        notes=("licence inputs and hrefs are not stored here: name a source to see them",),
    )  # fmt: skip


def _article_of(row: Mapping[str, Any]) -> Article:
    facts: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Article(**facts)


def _licence_of(article: Article) -> LicenceView:
    links = (f"stored: {article.licence_url}",) if article.licence_url else ()
    decision = article.licence or "none"
    return LicenceView(decision=decision, presets=admitting_presets(article.licence), links=links)


def _figures(ledger: Sequence[Mapping[str, Any]], kept: Mapping[str, _Kept]) -> Iterator[SeenFigure]:
    """A figure a ledger row, but panels go to the figure before them that they were cut from."""
    panels: dict[str, list[Pair]] = {}
    for one in kept.values():
        if one.is_panel:
            panels.setdefault(one.pair.sidecar["parent"], []).append(one.pair)
    for row in ledger:
        found = kept.get(row["key"]) if row["key"] else None
        if found is None:
            yield SeenFigure(item=row["item"], status=row["status"], key=row["key"], reason=row["reason"],
                             detail=row["detail"] or "")  # fmt: skip
        elif not (found.is_panel and found.pair.sidecar["parent"] in kept):
            yield _figure_of(found.pair, panels.get(found.pair.key, []))


def _figure_of(pair: Pair, panels: Sequence[Pair]) -> SeenFigure:
    side = pair.sidecar
    mentions = side.get("mentions") or ()
    if isinstance(mentions, str):
        mentions = json.loads(mentions)
    return SeenFigure(
        item=pair.figure_id or pair.key, status="kept", key=pair.key, label=side.get("label"), caption=pair.caption,
        file=side.get("file"), image=pair.image, image_format=pair.image_format, width=pair.width, height=pair.height,
        licence=pair.licence, modality=pair.modality, concepts=pair.concepts, flags=pair.flags,
        mentions=tuple(mention["text"] for mention in mentions), panels=tuple(see_panel(panel) for panel in panels),
    )  # fmt: skip
