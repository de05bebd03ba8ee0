"""What is missing, cut off or changed in a dataset folder or a folder of units, made again; all else stays untouched.

A dataset folder is compared with the hashes of its manifest. Small files follow from the manifest, an index from its
tar; shards and tables need the selection they were packed from, and are packed again in a hidden folder that begins
with everything that is intact, so only what is lost is written. A file takes its place only if its hash is the promised
one; hence repairing can be killed, run again, and cannot make anything worse. A damaged unit is deleted together with
the deltas that mend it, because `harvest` builds whatever has no commit record.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from biomedclip.errors import ConfigError, DataError
from biomedclip.files import explain_full_disk, sha256_file, sync_folder, write_json, write_text
from biomedclip.images import BadImage, check_image
from biomedclip.progress import Progress, silent
from biomedclip.schema import INDEX_COLUMNS, Article, Pair
from biomedclip.shards import (
    ARTICLE_COLUMNS,
    MANIFEST,
    SUMS,
    DatasetFolder,
    index_row,
    read_tables,
    read_tombstones,
    sums_text,
    write_table,
)
from data_builders.card import dataset_card
from data_builders.claims import UNFINISHED, hold_folder
from data_builders.locks import hold_lock
from data_builders.pack import WORK, PackConfig, pack
from data_builders.pmc.harvest_folder import LOCK
from data_builders.selection import read_selection
from data_builders.units import HARVEST, delete_unit, find_damage, missing_units, read_unit

_SPARE = ".repairing"
_HARVEST = "biomedclip data harvest PLAN --source SOURCE --out {}"


@dataclass(slots=True)
class Repair:
    """What a repair found: names of files that are whole again, and what is left, one line each with what to do."""

    damaged: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def repair(
    folder: str | Path, *, selection: str | Path | None = None, workers: int = 1, progress: Progress = silent
) -> Repair:
    """What was found and done. Raises DataError where `folder` is neither a dataset nor a folder of units.

    `selection` is the one that the dataset was packed from; its units are found through it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(folder, "there is no such folder", todo="name a dataset folder or a folder of units")
    with explain_full_disk(folder):
        if (folder / MANIFEST).exists():
            return _repair_dataset(folder, selection, workers, progress)
        if (folder / UNFINISHED).exists():
            raise DataError(folder, "was never finished", todo="run the command that wrote it again: it goes on")
        if (folder / HARVEST).exists() or next(folder.glob("*.pairs.parquet"), None):
            return _repair_units(folder, progress)
    raise DataError(folder, "is neither a dataset folder nor a folder of units", found="no manifest.json, no units",
                    todo="if its manifest.json was lost, build or pack it again into another folder")  # fmt: skip


# Units


def _repair_units(folder: Path, progress: Progress) -> Repair:
    found = Repair()
    harvest = f"run: {_HARVEST.format(folder)}"
    # Only a harvest looks for that lock, and only its folder may have it.
    with hold_lock(folder / LOCK) if (folder / HARVEST).exists() else nullcontext(True) as is_ours:
        if not is_ours:
            raise ConfigError(folder, "is being harvested by another process", todo="wait for it")
        names = sorted(path.stem for path in folder.glob("*.json") if path.name != HARVEST)
        with progress("checking units", len(names)) as advance:
            for name in names:
                _check_unit(folder, name, found, harvest)
                advance()
        found.left += _check_harvest(folder, set(names))
    return found


def _check_unit(folder: Path, name: str, found: Repair, harvest: str) -> None:
    path = folder / f"{name}.json"
    if not path.exists():
        return  # deleted with the unit that it mends
    try:
        record = read_unit(folder, name)
    except DataError as error:
        record, problems = None, [f"{error.where}: {error.wrong}"]
    else:
        problems = find_damage(record, verify=True) if record else []
    if not problems:
        return
    found.damaged += problems
    base = record.base if record else name.partition("-r")[0]
    is_delta = base != name
    # Later deltas were made with this one in mind; a harvest deletes them with their base, too.
    doomed = sorted({name, *(other.stem for other in folder.glob(f"{base}-r*.json") if other.stem > name)})
    for other in reversed(doomed):
        _delete(folder, other)
    retry = " --retry-failed" if is_delta else ""
    found.left.append(f"{folder / name}: deleted, because it was damaged; {harvest}{retry}")
    found.left += [f"{folder / other}: deleted, because it mended {base}; {harvest} --retry-failed, after that"
                   for other in doomed if other != name]  # fmt: skip


def _delete(folder: Path, name: str) -> None:
    try:
        record = read_unit(folder, name)
    except DataError:
        record = None
    if record is None:
        (folder / f"{name}.json").unlink(missing_ok=True)
    else:
        delete_unit(record)


def _check_harvest(folder: Path, checked: set[str]) -> list[str]:
    """What is wrong with the harvest as a whole; `checked` are the units that had a commit record before."""
    if not (folder / HARVEST).exists():
        return []
    try:
        missing = {name.rpartition("/")[2] for name in missing_units([folder])} - checked
    except (ValueError, TypeError, KeyError):
        return [f"{folder / HARVEST}: is damaged and follows from nothing here; harvest into another folder"]
    if not missing:
        return []
    more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
    return [f"{folder / min(missing)}: has no commit record{more}; run: {_HARVEST.format(folder)}"]


# Datasets


def _repair_dataset(folder: Path, selection: str | Path | None, workers: int, progress: Progress) -> Repair:
    found = Repair()
    dataset = DatasetFolder(folder)
    spare = folder / _SPARE
    with hold_folder(folder):
        shutil.rmtree(spare, ignore_errors=True)
        spare.mkdir()
        try:
            bad = _damaged_files(dataset, progress)
            found.damaged = sorted(bad)
            for name, rebuild in _small_repairs(dataset, bad):
                if rebuild(spare / name) and _restore(dataset, spare, name):
                    bad.discard(name)
            if bad and selection is not None:
                bad -= _repack(dataset, bad, Path(selection), spare, workers, progress)
            found.repaired = sorted(set(found.damaged) - bad)
            found.left = [_advice(dataset, name, selection) for name in sorted(bad)]
        finally:
            shutil.rmtree(spare, ignore_errors=True)
        found.left += _check_tombstones(folder)
    return found


def _damaged_files(dataset: DatasetFolder, progress: Progress) -> set[str]:
    files = dataset.manifest["files"]
    bad = set()
    with progress("checking files", len(files)) as advance:
        for name, digest in files.items():
            path = dataset.folder / name
            if not path.is_file() or sha256_file(path) != digest:
                bad.add(name)
            advance()
    sums = dataset.folder / SUMS
    if not sums.is_file() or sums.read_text(errors="replace") != sums_text(dataset.manifest["files"]):
        bad.add(SUMS)
    return bad


def _small_repairs(dataset: DatasetFolder, bad: set[str]) -> Iterator[tuple[str, Callable[[Path], bool]]]:
    """Files that follow from others of the folder, and what writes them; in an order in which each finds what it needs.

    A function returns False where it cannot; what it wrote is used only if it has the promised hash.
    """
    if SUMS in bad:
        yield SUMS, lambda path: _wrote(write_text, path, sums_text(dataset.manifest["files"]))
    if "sizes.json" in bad:
        sizes = {shard["name"]: shard["samples"] for shard in dataset.manifest["shards"]}
        yield "sizes.json", lambda path: _wrote(write_json, path, sizes)
    for shard in dataset.manifest["shards"]:
        index = shard["name"].replace(".tar", ".parquet")
        if index in bad and shard["name"] not in bad:
            yield index, partial(_write_index, dataset.folder / shard["name"])
    if "README.md" in bad:
        yield "README.md", partial(_write_card, dataset, bad)


def _wrote(write: Callable[[Path, Any], None], path: Path, content: Any) -> bool:
    write(path, content)
    return True


def _restore(dataset: DatasetFolder, spare: Path, name: str) -> bool:
    """Put a file made in `spare` into its place, if it is what the manifest promises."""
    promised = dataset.manifest["files"].get(name)
    path = spare / name
    if not path.is_file() or (promised is not None and sha256_file(path) != promised):
        return False
    path.replace(dataset.folder / name)
    sync_folder(dataset.folder)
    return True


def _write_index(tar: Path, path: Path) -> bool:
    """Write the index of a whole tar from its members. What only a selection knows (dup_cluster) is not there."""
    try:
        rows = list(_index_rows(tar))
    except (BadImage, tarfile.TarError, KeyError, ValueError, TypeError):
        return False  # not a tar of ours, or one whose pictures we cannot hash: the selection must help
    write_table(path, rows, INDEX_COLUMNS)
    return True


def _index_rows(tar: Path) -> Iterator[dict[str, Any]]:
    names = {"image": "jpg", "text": "txt", "json": "json"}
    with tarfile.open(tar) as archive:
        members = {member.name: member for member in archive}
        keys = dict.fromkeys(name.partition(".")[0] for name in members)
        for key in keys:
            found = {column: members[f"{key}.{extension}"] for column, extension in names.items()}
            data = {column: archive.extractfile(member).read() for column, member in found.items()}  # type: ignore[union-attr]
            places = {f"{column}_offset": member.offset_data for column, member in found.items()}
            places |= {f"{column}_size": member.size for column, member in found.items()}
            pair = _pair_of(data["image"], data["text"].decode(), json.loads(data["json"]))
            yield index_row(pair) | places | {"shard": tar.name}


def _pair_of(image: bytes, caption: str, facts: Mapping[str, Any]) -> Pair:
    """The pair that a sample's members were written from, as far as an index needs it."""
    names = ("source", "split", "licence", "image_format", "width", "height", "sha256", "article_id", "figure_id",
             "panel", "modality", "group_id")  # fmt: skip
    lists = ("captions", "labels", "label_ids", "concepts", "flags")
    known: dict[str, Any] = {name: facts[name] for name in names if name in facts}
    known |= {name: tuple(facts.get(name, ())) for name in lists}
    return Pair(key=facts["key"], image=image, caption=caption, phash=check_image(image).phash, **known)


def _write_card(dataset: DatasetFolder, bad: set[str], path: Path) -> bool:
    needed = {"articles.parquet", *(shard["name"].replace(".tar", ".parquet") for shard in dataset.manifest["shards"])}
    if needed & bad:
        return False
    kept = Counter(article for article in dataset.stored_index["article_id"].to_pylist() if article is not None)
    table = read_tables([dataset.folder / "articles.parquet"], ARTICLE_COLUMNS)
    lists = [name for name, kind in ARTICLE_COLUMNS.items() if kind.startswith("list<")]
    articles = [Article(**row | {name: tuple(row[name] or ()) for name in lists}) for row in table.to_pylist()]
    facts = {key: value for key, value in dataset.manifest.items() if key != "files"}
    write_text(path, dataset_card(facts, articles, kept))
    return True


def _repack(
    dataset: DatasetFolder, bad: set[str], selection: Path, spare: Path, workers: int, progress: Progress
) -> set[str]:
    """Names of the files that could be packed again. Raises DataError where the selection is another."""
    provenance = dataset.manifest["provenance"]
    stored = provenance.get("config", {})
    if read_selection(selection).identity != provenance.get("input_sha256") or "shuffle_seed" not in stored:
        raise DataError(selection, f"is not what {dataset.folder} was packed from", todo="name the selection that was")
    config = PackConfig(**{name: stored[name] for name in PackConfig.model_fields})
    out = spare / "packed"
    (out / WORK).mkdir(parents=True)
    write_json(out / UNFINISHED, {name: provenance[name] for name in ("config_sha256", "input_sha256")})
    for shard in dataset.manifest["shards"]:
        index = shard["name"].replace(".tar", ".parquet")
        if not bad & {shard["name"], index}:
            _lend(dataset.folder, out, shard, index)
    pack(selection, out, config, workers=workers, progress=progress)
    return {name for name in bad if _restore(dataset, out, name)}


def _lend(folder: Path, out: Path, shard: Mapping[str, Any], index: str) -> None:
    """Let a pack in `out` find an intact shard as its own work: linked, because nothing that is there is written to."""
    for name in (shard["name"], index):
        try:
            os.link(folder / name, out / name)
        except OSError:
            shutil.copyfile(folder / name, out / name)
    columns = read_tables([folder / index], {"licence": "string", "source": "string"})
    counts = {f"{name}s": Counter(columns[name].to_pylist()) for name in ("licence", "source")}
    write_json(out / WORK / f"{Path(index).stem}.json", {**shard, **counts})


def _advice(dataset: DatasetFolder, name: str, selection: str | Path | None) -> str:
    kind = dataset.manifest["provenance"].get("config", {}).get("source", {}).get("kind")
    if kind == "selection" and selection is None:
        todo = f"run: biomedclip data repair {dataset.folder} --selection SELECTION, with what it was packed from"
    elif kind == "selection":
        todo = "it comes out otherwise from this selection; run: biomedclip data pack SELECTION --out OTHER_FOLDER"
    else:
        todo = "build it anew: biomedclip build CONFIG --out OTHER_FOLDER, with the config in manifest.json"
    return f"{dataset.folder / name}: cannot be rebuilt from the rest of the folder; {todo}"


def _check_tombstones(folder: Path) -> list[str]:
    try:
        read_tombstones(folder)
    except DataError as error:
        return [str(error)]
    return []
