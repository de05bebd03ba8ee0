"""The record of a training, from what its runs left behind: configs, logs, manifests of the data, result files.

Reads finished run folders and the records of `biomedclip evaluate` for exactly these weights and for those the first
run started from; yields a `TrainingRecord`. Nothing is typed in that a file knows. A record with a hole is not made:
the error lists every hole at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from biomedclip.errors import CheckpointError, ConfigError, DataError
from biomedclip.files import sha256_file, sha256_json, split_lines
from biomedclip.models.training_record import (
    CardNotes,
    Confusion,
    GroupScore,
    RunRecord,
    Score,
    SourceRecord,
    TaskRecord,
    TrainingRecord,
    WeightsRecord,
)
from biomedclip.runs import CONFIG, DONE, FACTS, LOG

Record = Mapping[str, Any]
_NUM_CONFUSIONS = 3


def collect_record(
    run: str | Path, notes: CardNotes, after: Sequence[Record], *, weights: WeightsRecord,
    before: Sequence[Record] | None = None, start_fingerprint: str | None = None, name: str | None = None,
) -> TrainingRecord:  # fmt: skip
    """The record of a run's model; earlier runs it went through are found by its config.

    `after` and `before` are records of `biomedclip evaluate`; without `before` the starting point counts as not
    measured. Raises ConfigError listing all holes: a run that is not finished, data without a manifest, no result for
    these weights, values without n or interval, a task that was not scored at the start, a target without a task.
    """
    folders = find_runs(run)
    holes = [f"{folder}: the run is not finished" for folder in folders if not (folder / DONE).exists()]
    sources = _sources(folders, notes, holes)
    own = _of_weights(after, weights.fingerprint, "these weights", holes)
    started = {} if before is None else {
        record["task"]: record for record in _of_weights(before, str(start_fingerprint), "the starting point", holes)
    }  # fmt: skip
    if before is not None:
        holes += [f"{record['task']}: was not scored at the starting point" for record in own
                  if record["task"] not in started]  # fmt: skip
    holes += [f"targets.{task}: no result of this task" for task in notes.targets
              if task not in {record["task"] for record in own}]  # fmt: skip
    tasks = [_task(record, started.get(record["task"]), notes, holes) for record in own]
    runs = [_run(folder) for folder in folders if (folder / DONE).exists()]
    if holes:
        raise ConfigError(run, "a card would have holes", found="; ".join(holes), todo="fill them and write it again")
    return TrainingRecord(
        name=name or folders[-1].name, notes=notes, weights=weights, runs=tuple(runs), sources=tuple(sources),
        tasks=tuple(task for task in tasks if task is not None),
    )  # fmt: skip


def describe_weights(file: Path, *, fingerprint: str, parameters: int, preprocess: str, context: int) -> WeightsRecord:
    """What a card says about a file of weights."""
    halves = any(array.dtype == np.float16 for array in _read_arrays(file).values())
    return WeightsRecord(
        file=file.name, sha256=sha256_file(file), bytes=file.stat().st_size, parameters=parameters,
        fingerprint=fingerprint, precision="float16" if halves else "float32", preprocess=preprocess, context=context,
    )  # fmt: skip


def check_copy(trained: Path, copy: Path) -> None:
    """Raise CheckpointError where `copy` does not hold the tensors of `trained`, each as it is or rounded to half."""
    ours, theirs = _read_arrays(trained), _read_arrays(copy)
    wrong = sorted(ours.keys() ^ theirs.keys())
    wrong += [name for name, array in ours.items()
              if name in theirs and not np.array_equal(array.astype(theirs[name].dtype), theirs[name])]  # fmt: skip
    if wrong:
        raise CheckpointError(
            copy, f"does not hold what the run {trained.parent.parent} trained",
            found=f"{len(wrong)} tensors differ, such as {wrong[0]}", todo="export it again",
        )  # fmt: skip


def find_runs(run: str | Path) -> list[Path]:
    """The run and the earlier runs whose weights it went on with, first to last; what trained its text tower leads.

    A folder of weights in a run (`ema`, `final`) stands for the run. The starting point of the whole is `start/` of the
    first that is no text run. Raises ConfigError for no run.
    """
    folders = [_run_of(str(run)) or Path(run)]
    texts: list[Path] = []
    while True:
        model = _config(folders[0])["model"]
        earlier = _run_of(model["name"])
        tower = _run_of(model["text_tower"]) if model.get("text_tower") else None
        if tower is not None and tower not in texts:
            texts.insert(0, tower)
        if earlier is None or earlier in folders:
            return [*texts, *folders]
        folders.insert(0, earlier)


def find_start(run: str | Path) -> Path:
    """The folder of the weights that the first of the runs with pictures started from."""
    first = next(folder for folder in find_runs(run) if "sources" in _config(folder)["data"])
    return first / "start"


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """All result records under a folder of `biomedclip evaluate`. Raises DataError for a file that is none."""
    records = []
    for path in sorted(Path(folder).glob("results/*/*.json")):
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
            record["model"]["fingerprint"], record["metrics"], record["task"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(path, "is no result file", found=repr(error)[:80], todo="evaluate again") from None
        records.append(record)
    return records


def count_hours(log: str) -> float | None:
    """Hours of a run by its log.txt, summed over its sessions: from `started` or `resumed` to the last line of each."""
    sessions: list[list[datetime]] = []
    for line in split_lines(log):
        stamp, _, text = line.partition(" ")
        try:
            moment = datetime.fromisoformat(stamp)
        except ValueError:
            continue
        if text.startswith(("started ", "resumed ")) or not sessions:
            sessions.append([])
        sessions[-1].append(moment)
    seconds = sum((session[-1] - session[0]).total_seconds() for session in sessions)
    return round(seconds / 3600, 3) if sessions else None


def _read_arrays(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(path, "holds no tensors", found=str(error)[:80], todo="export it again") from None


def _of_weights(records: Sequence[Record], fingerprint: str, what: str, holes: list[str]) -> list[Record]:
    """The newest record of each task that is of these weights."""
    own = {str(record["task"]): record for record in sorted(records, key=lambda record: str(record.get("time", "")))
           if record["model"]["fingerprint"] == fingerprint}  # fmt: skip
    if not own:
        others = sorted({record["model"]["fingerprint"][:17] for record in records})
        holes.append(f"no result of {what} ({fingerprint[:17]}…): evaluate them"
                     + (f"; there are results of {', '.join(others)}" if others else ""))  # fmt: skip
    return list(own.values())


def _task(record: Record, start: Record | None, notes: CardNotes, holes: list[str]) -> TaskRecord | None:
    primary, name = str(record["primary"]), str(record["task"])
    scores = {metric: found for metric, value in record["metrics"].items() if (found := _score(value)) is not None}
    if primary not in scores:
        holes.append(f"{name}: {primary} has no n or interval")
        return None
    began = None
    if start is not None:
        began = _score(start["metrics"].get(primary, {}))
        if began is None:
            holes.append(f"{name}: {primary} of the starting point has no n or interval")
        if start["dataset"]["manifest_sha256"] != record["dataset"]["manifest_sha256"]:
            holes.append(f"{name}: the starting point was scored on other samples")
    beyond = record.get("beyond", {})
    groups = beyond.get("subgroups", {})
    return TaskRecord(
        task=name, title=str(record.get("title", name)), split=str(record["dataset"]["split"]), primary=primary,
        metrics=scores, start=began, manifest_sha256=str(record["dataset"]["manifest_sha256"]),
        num_groups=record["dataset"].get("n_groups"), group=record["dataset"].get("group"),
        target=notes.targets.get(name), majority=record.get("baselines", {}).get("majority", {}).get(primary),
        leakage=str(record["dataset"].get("leakage", {}).get("text", "not checked")),
        classes=tuple(GroupScore(name=row["class"], n=row["support"], value=row["recall"])
                      for row in record.get("per_class", ())),
        attribute=groups.get("attribute"),
        subgroups=tuple(GroupScore(**{key: row[key] for key in ("name", "n", "value", "ci_low", "ci_high")})
                        for row in groups.get("groups", ())),
        confusions=_confusions(record), worst_corruption=_worst(beyond.get("corruptions", {}), scores[primary].n),
    )  # fmt: skip


def _score(value: Mapping[str, Any]) -> Score | None:
    if any(value.get(part) is None for part in ("value", "ci_low", "ci_high", "n")):
        return None
    return Score(value=value["value"], ci_low=value["ci_low"], ci_high=value["ci_high"], n=value["n"],
                 ci_method=value.get("ci_method", "interval"))  # fmt: skip


def _confusions(record: Record) -> tuple[Confusion, ...]:
    names, table = record["dataset"].get("classes", ()), record.get("confusion", ())
    found = [
        Confusion(truth=names[i], answer=names[j], count=count, of=sum(row))
        for i, row in enumerate(table) for j, count in enumerate(row) if i != j and count
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda entry: (-entry.count, entry.truth, entry.answer))[:_NUM_CONFUSIONS])


def _worst(corruptions: Mapping[str, Any], n: int) -> GroupScore | None:
    worst = corruptions.get("worst")
    return None if worst is None else GroupScore(name=worst, n=n, value=corruptions["by_corruption"][worst])


def _sources(folders: Sequence[Path], notes: CardNotes, holes: list[str]) -> list[SourceRecord]:
    found: dict[str, SourceRecord] = {}
    for config in map(_config, folders):
        for source in config["data"].get("sources", ()):
            path = Path(source.get("path") or "") / "manifest.json"
            try:
                manifest = json.loads(path.read_bytes())
                hashes = [shard["sha256"] for shard in manifest["shards"]]
                record = SourceRecord(name=source["name"], samples=manifest["samples"], licences=manifest["licences"],
                                      splits=manifest.get("splits", {}), sha256=sha256_json(hashes))  # fmt: skip
                found[record.sha256] = record
            except (OSError, ValueError, KeyError, TypeError):
                holes.append(f"source {source['name']}: no manifest with licences at {path}")
        for file in map(Path, config["data"].get("sentences", ())):
            if not file.is_file() or notes.text_licence is None:
                holes.append(f"sentences {file}: " + ("text_licence of the notes" if file.is_file() else "the file")
                             + " is missing")  # fmt: skip
                continue
            count = len(split_lines(file.read_text(encoding="utf-8")))
            record = SourceRecord(name=file.name, samples=count, licences={notes.text_licence: count},
                                  sha256=sha256_file(file))  # fmt: skip
            found[record.sha256] = record
    return list(found.values())


def _run(folder: Path) -> RunRecord:
    config, facts = _config(folder), _json(folder / FACTS)
    machine = facts.get("machine", {})
    log = folder / LOG
    words = [str(machine.get("system", "an unnamed machine")), f"{machine.get('cpus', 'unknown')} CPUs",
             *machine.get("gpus", ())]  # fmt: skip
    return RunRecord(
        task=config.get("task", "pretraining"), config_sha256=sha256_file(folder / CONFIG),
        starts_from=_starts_from(config["model"]), seed=facts["seed"], steps=_json(folder / DONE).get("steps"),
        hours=count_hours(log.read_text(encoding="utf-8")) if log.exists() else None,
        machine=", ".join(words), git_commit=facts.get("git_commit"), versions=facts.get("versions", {}),
    )  # fmt: skip


def _starts_from(model: Mapping[str, Any]) -> str:
    """Where a run's first weights came from, without the folders of the machine it ran on."""

    def shown(name: str) -> str:
        path = Path(name)
        if not (path.exists() or path.is_absolute()):
            return name
        return path.parent.name if path.name in ("final", "start", "ema") else path.name

    parts = [f"{shown(model['name'])} ({model.get('init', 'pretrained')})"]
    parts += [f"{what} of {shown(model[key])}" for key, what in
              (("image_weights", "image tower"), ("text_tower", "text tower")) if model.get(key)]  # fmt: skip
    return ", ".join(parts)


def _run_of(name: str) -> Path | None:
    """The run folder that a model's name lies in; None where it is no folder of a run."""
    path = Path(name)
    if not path.is_dir():
        return None
    return next((folder for folder in (path, *list(path.parents)[:2]) if (folder / FACTS).is_file()), None)


def _config(folder: Path) -> dict[str, Any]:
    """A run's config; of a `task: text` run in the form of the others: model and data as tables."""
    try:
        config: dict[str, Any] = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        if config.get("task") == "text":
            data = {"sentences": config["sentences"]}
            return {**config, "model": {"name": config["model"], "init": "random"}, "data": data}
        config["model"]["name"], config["data"]["sources"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            folder, "is no training run", found=str(error)[:80], todo="name a folder of `train`"
        ) from None
    return config


def _json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(path, "cannot be read", found=str(error)[:80], todo="name a folder of `train`") from None
    return value
