"""A finished dataset folder in, the same samples in another project's format out.

Everything is written into a hidden folder inside the output and moved to its place at the end; `export.json` is last
and means that the export is complete. The bytes depend on the dataset, its tombstones and the config alone: the same
again returns at once, an interrupted one is begun anew, and a folder that holds anything else is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

import biomedclip
from biomedclip.errors import ConfigError, DataError
from biomedclip.files import explain_full_disk, sha256_file, sha256_json, write_json, write_text
from biomedclip.progress import Progress, silent
from biomedclip.shards import MANIFEST, DatasetFolder
from data_builders.card import CLINICAL_NOTICE, hub_licence
from data_builders.claims import UNFINISHED, claim_folder, hold_folder
from data_builders.exports.biomedica import write_biomedica
from data_builders.exports.parquet import write_parquet
from data_builders.exports.pictures import write_csv, write_llava
from data_builders.exports.samples import Advance, ExportConfig, Exported

EXPORT = "export.json"
"""Written last: its presence means that the export is complete."""

SCHEMAS: dict[str, Callable[[DatasetFolder, Path, ExportConfig, Advance], Exported]] = {
    "biomedica": write_biomedica,
    "open_clip_csv": write_csv,
    "hf_parquet": write_parquet,
    "llava_jsonl": write_llava,
}

_WORK = ".exporting"


def export(
    folder: str | Path, out: str | Path, schema: str, config: ExportConfig | None = None, *, progress: Progress = silent
) -> dict[str, Any]:
    """What `export.json` says: samples by split, what the format could not hold, and of which dataset it is.

    Raises ConfigError for an unknown schema and where `out` holds another export or other files, DataError where
    `folder` holds no finished dataset, is damaged or has nothing left.
    """
    config = config or ExportConfig()
    if schema not in SCHEMAS:
        raise ConfigError("--schema", "is not known", found=repr(schema), todo=f"use one of {', '.join(SCHEMAS)}")
    dataset, out = DatasetFolder(folder), Path(out)
    identity = _identity(dataset, schema, config)
    done = _finished(out, identity)
    if done is None:
        if not len(dataset):
            raise DataError(folder, "has no samples left", found=f"{len(dataset.withdrawn)} taken back")
        with hold_folder(out), explain_full_disk(out):
            claim_folder(out, identity)
            done = _write(dataset, out, schema, config, identity, progress)
    (out / UNFINISHED).unlink(missing_ok=True)
    return done


def _identity(dataset: DatasetFolder, schema: str, config: ExportConfig) -> dict[str, Any]:
    return {
        "biomedclip": biomedclip.__version__,
        "schema": schema,
        "config": config.model_dump(mode="json"),
        "manifest_sha256": sha256_file(dataset.folder / MANIFEST),
        "tombstones_sha256": sha256_json(sorted(dataset.withdrawn)),
    }


def _finished(out: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier export of the same identity says. Raises ConfigError for one of another."""
    path = out / EXPORT
    if not path.exists():
        return None
    try:
        facts: dict[str, Any] = json.loads(path.read_bytes())
        same = {key: facts.get(key) for key in identity} == dict(identity)
    except (ValueError, AttributeError):
        same = False
    if not same:
        raise ConfigError(out, "holds another export, or one of other samples",
                          todo="name another folder, or delete this one to export again")  # fmt: skip
    return facts


def _write(
    dataset: DatasetFolder,
    out: Path,
    schema: str,
    config: ExportConfig,
    identity: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    work = out / _WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    with progress("exporting", len(dataset)) as advance:
        exported = SCHEMAS[schema](dataset, work, config, lambda: advance(1))
    shutil.copyfile(dataset.folder / "articles.parquet", work / "articles.parquet")
    facts = {
        **identity,
        "samples": exported.splits.total(),
        "splits": dict(exported.splits),
        "dropped": dict(sorted(exported.dropped.items())),
        "withdrawn": len(dataset.withdrawn),
    }
    write_text(work / "README.md", _readme(dataset, facts, exported))
    names = sorted(path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file())
    sums = "".join(f"{sha256_file(work / name)}  {name}\n" for name in names)
    for entry in sorted(work.iterdir()):
        target = out / entry.name
        # What an interrupted move left: the folder is ours, as its mark says.
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        entry.rename(target)
    work.rmdir()
    write_text(out / "SHA256SUMS", sums)
    write_json(out / EXPORT, facts)
    return facts


def _readme(dataset: DatasetFolder, facts: Mapping[str, Any], exported: Exported) -> str:
    manifest = dataset.manifest
    head: dict[str, Any] = {
        "pretty_name": manifest["name"],
        "license": sorted({hub_licence(code) for code in manifest["licences"]}),
        "tags": ["biology", "medical", "image-text", "biomedclip"],
    }
    if exported.data_files:
        files = [{"split": split, "path": path} for split, path in exported.data_files.items()]
        head["configs"] = [{"config_name": "default", "data_files": files}]
    counts = "\n".join(f"- {split}: {count:,} samples" for split, count in facts["splits"].items())
    lost = "".join(f"\n- left out, `{reason}`: {count:,}" for reason, count in facts["dropped"].items())
    gone = f"\n- taken back before this export: {facts['withdrawn']:,}" if facts["withdrawn"] else ""
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n# {manifest['name']}\n\n"
        f"The dataset `{manifest['name']}` in the format `{facts['schema']}`, exported with biomedclip "
        f"{facts['biomedclip']}.\n\n{CLINICAL_NOTICE}\n\n"
        + "".join(f"{notice}\n\n" for notice in manifest["provenance"].get("notices", ()))
        + f"## Contents\n\n{counts}{lost}{gone}\n\n## Use\n\n{exported.usage}\n\n## Licences\n\n"
        "Every sample keeps its own licence; `articles.parquet` has title, authors, DOI and licence of each article, "
        "for attribution. Samples by licence before anything was taken back:\n\n"
        + "\n".join(f"- {code}: {count:,}" for code, count in manifest["licences"].items())
        + "\n"
    )
