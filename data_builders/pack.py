"""A selection in, a dataset folder out: the selected pairs in shuffled order, written shard by shard.

The selection's rows are first sorted into the order of the shuffle, one row group of a working file a shard; then each
shard is a task of its own (`data_builders.engines`) that reads its images by unit and offset and leaves a record of
what it wrote. What a killed pack finished stays: it is run again, keeps the shards whose record agrees with their
files, and ends in the same bytes, whatever the number of workers. The tables beside the shards are `pack_tables`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

import biomedclip
from biomedclip.config import Config
from biomedclip.errors import DataError
from biomedclip.files import explain_full_disk, remove_leftovers, sha256_json, write_atomic, write_json
from biomedclip.progress import Progress, silent
from biomedclip.schema import SPLITS
from biomedclip.shards import BLOCK, ShardWriter, arrow_schema, finish_folder
from data_builders.build import ShardConfig
from data_builders.card import dataset_card
from data_builders.claims import UNFINISHED, claim_folder, finished_dataset, hold_folder
from data_builders.engines import check_engine, run_tasks
from data_builders.order import ShardRows, cut_shards, shuffle_ranks
from data_builders.pack_tables import (
    UnitFolder,
    load_articles,
    read_credits,
    write_articles,
    write_ledger,
)
from data_builders.pmc.inventory import open_database
from data_builders.selection import SELECTION_COLUMNS, Selection, read_selection
from data_builders.units import fingerprint_units, pair_of_row, read_image, read_units

if TYPE_CHECKING:
    pass

WORK = ".packing"
"""Folder inside the dataset folder for what only an unfinished pack needs."""

_ROWS = "rows.parquet"
_BATCH_ROWS = 10_000
_JSON_BYTES = 600
"""What the .json of a sample says beside its caption and sidecar, about."""


class PackConfig(Config):
    """What a pack makes of a selection."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    shards: ShardConfig = ShardConfig()
    shuffle_seed: int = 0


def pack(
    selection: str | Path,
    out: str | Path,
    config: PackConfig,
    *,
    engine: str = "local",
    workers: int = 1,
    progress: Progress = silent,
) -> dict[str, Any]:
    """The manifest of the dataset in `out`, packed now unless it is there already.

    Interrupted at any moment, it is run again, goes on where it was and gives the same bytes. Raises ConfigError where
    `out` holds another dataset or other files or is being written, DataError where the selection is none, is empty or
    speaks of pairs that have changed since.
    """
    check_engine(engine, workers)
    path, out = Path(selection).resolve(), Path(out).resolve()
    facts = read_selection(path)
    identity = {"config_sha256": sha256_json(config.model_dump(mode="json")), "input_sha256": facts.identity}
    manifest = finished_dataset(out, identity)
    if manifest is None:
        sources = _open_sources(path, facts)
        with hold_folder(out), explain_full_disk(out):
            if not claim_folder(out, identity):
                shutil.rmtree(out / WORK, ignore_errors=True)
            remove_leftovers(out)
            shards = _write_shards(path, out, sources, config, engine, workers, progress)
            manifest = _finish(path, out, facts, sources, config, identity, shards, progress)
    shutil.rmtree(out / WORK, ignore_errors=True)
    (out / UNFINISHED).unlink(missing_ok=True)
    return manifest


def _open_sources(path: Path, facts: Selection) -> list[UnitFolder]:
    if not facts.selected:
        found = ", ".join(f"{reason} {count}" for reason, count in facts.reasons.items()) or "no pairs"
        raise DataError(path, "selects nothing", found=found, todo="select again with another config")
    sources = []
    for raw in facts.raws:
        folder = (path.parent / raw.path).resolve()
        records = read_units(folder)
        if fingerprint_units(records) != raw.sha256:
            raise DataError(folder, f"is not what {path.name} was made from", todo="select again, then pack")
        sources.append(UnitFolder(folder=folder, records=records))
    return sources


def _write_shards(
    path: Path,
    out: Path,
    sources: Sequence[UnitFolder],
    config: PackConfig,
    engine: str,
    workers: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The records of all shards, after those that are not there yet are written."""
    work = out / WORK
    work.mkdir(exist_ok=True)
    remove_leftovers(work)
    rows, order = _read_order(path, config.shuffle_seed)
    shards = list(cut_shards(order.groups, order.sizes, config.shards.max_samples, config.shards.max_bytes))
    if not (work / _ROWS).exists():
        with progress("sorting rows", len(shards)) as advance:
            for _ in _sort_rows(path, work, rows, shards):
                advance()
    records = []
    with progress("writing shards", len(rows)) as advance:
        task = partial(_write_shard, out, [source.folder for source in sources])
        for record in run_tasks(task, shards, engine=engine, workers=workers, name=lambda shard: f"{shard.number:05d}"):
            records.append(record)
            advance(record["samples"])
    return records


@dataclass(frozen=True, slots=True)
class _Order:
    groups: np.ndarray
    """Position of the split in SPLITS."""
    sizes: np.ndarray
    """Bytes of a sample in its tar, about."""


def _read_order(path: Path, seed: int) -> tuple[np.ndarray, _Order]:
    """Numbers of the selected rows in the order in which they are written, and what shards are cut by."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    columns = ("key", "split", "reason", "image_size", "caption", "sidecar")
    found: list[tuple[np.ndarray, ...]] = []
    start = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=list(columns)):
            rows = np.flatnonzero(batch.column("reason").is_null().to_numpy(zero_copy_only=False))
            chosen = batch.take(pa.array(rows))
            text, side = (pc.binary_length(chosen.column(name)).to_numpy() for name in ("caption", "sidecar"))
            members = (chosen.column("image_size").to_numpy(), text, text + side + _JSON_BYTES)
            size = sum(BLOCK + (member.astype(np.int64) + BLOCK - 1) // BLOCK * BLOCK for member in members)
            group = pc.index_in(chosen.column("split"), value_set=pa.array(SPLITS)).to_numpy().astype(np.int8)
            found.append((rows + start, group, size, shuffle_ranks(chosen.column("key").to_pylist(), seed)))
            start += batch.num_rows
    rows, groups, sizes, ranks = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((ranks[:, 1], ranks[:, 0], groups))
    return rows[order], _Order(groups[order], sizes[order])


def _sort_rows(path: Path, work: Path, rows: np.ndarray, shards: Sequence[ShardRows]) -> Iterator[ShardRows]:
    """Write the selected rows in the order of `rows`, one row group a shard; DuckDB sorts on disk what is too much."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema(SELECTION_COLUMNS)
    places = pa.table({"row": rows, "place": np.arange(len(rows))})
    query = (
        f"SELECT {', '.join(schema.names)} FROM read_parquet(?, file_row_number = true) AS pairs "  # noqa: S608
        "JOIN places ON pairs.file_row_number = places.row ORDER BY place"
    )
    with ExitStack() as stack:
        database = stack.enter_context(open_database(_spill(work)))
        database.register("places", places)
        batches = database.sql(query, params=[str(path)]).to_arrow_reader(_BATCH_ROWS)
        file = stack.enter_context(write_atomic(work / _ROWS))
        writer = stack.enter_context(pq.ParquetWriter(file, schema, compression="lz4", store_schema=False))
        waiting = schema.empty_table()
        for shard in shards:
            count = shard.stop - shard.start
            while waiting.num_rows < count:
                waiting = pa.concat_tables([waiting, pa.Table.from_batches([batches.read_next_batch()]).cast(schema)])
            writer.write_table(waiting.slice(0, count), row_group_size=count)
            waiting = waiting.slice(count)
            yield shard


def _spill(work: Path) -> Path:
    """An empty folder for what DuckDB sorts on disk."""
    folder = work / "spill"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _write_shard(out: Path, folders: Sequence[Path], shard: ShardRows) -> dict[str, Any]:
    """The record of a shard that is now there: read, if an earlier run wrote it, or made from its rows."""
    import pyarrow.parquet as pq

    mark = out / WORK / f"{shard.number:05d}.json"
    record = _read_record(mark, out)
    if record is not None:
        return record
    with pq.ParquetFile(out / WORK / _ROWS) as file:
        rows = file.read_row_group(shard.number).to_pylist()
    writer = ShardWriter(out, shard.number, SPLITS[shard.group])
    with ExitStack() as unless_whole:
        unless_whole.callback(writer.abandon)
        for row in rows:
            pair = pair_of_row(row, read_image(folders[row["raw"]], row))
            writer.add(pair, dup_cluster=row["dup_cluster"], caption_tokens=row["caption_tokens"])
        unless_whole.pop_all()
    record = writer.close()
    write_json(mark, record)
    return record


def _read_record(mark: Path, out: Path) -> dict[str, Any] | None:
    """What an earlier run noted of a shard, None where it did not come so far or the tar is another."""
    try:
        record: dict[str, Any] = json.loads(mark.read_bytes())
        tar = out / record["name"]
        if tar.stat().st_size == record["bytes"] and tar.with_suffix(".parquet").exists():
            return record
    except (FileNotFoundError, ValueError, KeyError):
        pass
    return None


def _finish(
    path: Path, out: Path, facts: Selection, sources: Sequence[UnitFolder], config: PackConfig,
    identity: Mapping[str, str], shards: Sequence[Mapping[str, Any]], progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    dropped = write_ledger(path, out / "ledger.parquet", sources, facts.selected, progress)
    with open_database(_spill(out / WORK)) as database:
        load_articles(database, path, sources)
        write_articles(database, out / "articles.parquet")
        credits = read_credits(database)
    return finish_folder(
        out,
        shards,
        name=config.name,
        dropped=dropped,
        provenance=_provenance(facts, config, identity),
        card=lambda manifest: dataset_card(manifest, **credits),
    )


def _provenance(facts: Selection, config: PackConfig, identity: Mapping[str, str]) -> dict[str, Any]:
    """What the manifest says of how the dataset came to be; names no path of this machine."""
    presets = {raw.facts.get("licence") for raw in facts.raws} - {None}
    licence = facts.config["licence"] or (presets.pop() if len(presets) == 1 else None)
    languages = facts.config["languages"]
    if languages is None:
        languages = sorted({tag for raw in facts.raws for tag in raw.facts.get("languages") or ()})
    notices = dict.fromkeys(notice for raw in facts.raws for notice in raw.facts.get("notices", ()))
    return {
        "biomedclip": biomedclip.__version__,
        "config": {
            **config.model_dump(mode="json"),
            **({"licence": licence} if licence else {}),
            "source": {"kind": "selection", "languages": languages},
            "select": facts.config,
        },
        **identity,
        "notices": list(notices),
        "raws": [{"name": raw.name, "sha256": raw.sha256, "pairs": sum(n for _, n in raw.units)} for raw in facts.raws],
        "selection": {"seen": facts.seen, "selected": facts.selected, "reasons": facts.reasons,
                      "clusters": facts.clusters, "contamination": facts.contamination},
    }  # fmt: skip
