"""Model cards: of every released model from its facts, and of models trained here from their run and results.

A card of a released model is the zoo's YAML file as a page a person reads, with the publisher's numbers marked as
theirs. A card of a run takes what it says from files: the run's config and facts, the manifests of its data, the result
JSON files of `biomedclip evaluate` for exactly these weights; what no file can know (intended use, limits, consent,
contact) comes from a short YAML. A card with a hole is not written: the error lists every hole at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from biomedclip.config import Config
from biomedclip.errors import ConfigError, DataError
from biomedclip.models.catalog import describe_access
from biomedclip.models.zoo import ReleasedModel, Step

NOT_FOR_CARE = "It is not a medical device: no diagnosis, no triage, no decision about a patient."


class CardNotes(Config):
    """What only the people who trained a model know; the YAML of `biomedclip models card RUN --notes`."""

    title: str
    summary: str
    licence: str
    """Id as on the Hub, such as `apache-2.0` or `cc-by-nc-4.0`."""
    intended_use: str
    out_of_scope: str
    training_data: str
    """What the data are, in words; licences and counts come from the manifests."""
    consent: str
    """Consent and de-identification of the data."""
    population: str
    """Whom and what the data cover: countries, ages, modalities, languages."""
    limitations: tuple[str, ...] = Field(min_length=1)
    subgroups: str = "not measured"
    contact: str
    repo: str | None = None
    """Where it will be published, for the example."""


def released_card(model: ReleasedModel) -> str:
    """The card of a released model, Markdown with front matter."""
    sections = [
        _front_matter(_released_metadata(model)), f"# {model.title}\n\n{model.summary}.\n",
        _note(model), "## Use\n\n" + _list([
            f"Intended: {model.intended_use}", f"Out of scope: anything but research. {NOT_FOR_CARE}",
        ]),
        f"```python\nimport biomedclip\n\nmodel, preprocess, tokenizer = biomedclip.load(\"{model.name}\""
        f"{', checkpoint=PATH' if model.source.kind == 'manual' else ''})\n```\n",
        "## Source\n\n" + _source_lines(model),
        "## Model\n\n" + _model_lines(model),
        "## Training data\n\n" + model.training_data + "\n",
        "## Evaluation\n\n" + _reported(model),
        "## Limits\n\n" + _list([*model.limits, "Subgroup results: not measured here"]),
        "## What was checked here\n\n" + _checked(model),
        "## Citation\n\n" + _citation(model),
    ]  # fmt: skip
    return "\n".join(sections)


def run_card(
    run: str | Path, notes: CardNotes, results: Sequence[Mapping[str, Any]], *, fingerprint: str,
    weights_sha256: str, preprocess: str, context: int,
) -> str:  # fmt: skip
    """The card of a run's final model. `results` are records of `biomedclip evaluate`.

    Raises ConfigError listing all holes: data without a manifest, no result for these weights, values without n or
    interval.
    """
    run = Path(run)
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    facts = json.loads((run / "run.json").read_bytes())
    done = json.loads((run / "done.json").read_bytes()) if (run / "done.json").exists() else None
    own = [record for record in results if record["model"]["fingerprint"] == fingerprint]
    data, holes = _training_sources(config)
    if done is None:
        holes.append(f"{run}: the run is not finished")
    if not own:
        others = {record["model"]["fingerprint"][:17] for record in results}
        holes.append(f"no result of these weights ({fingerprint[:17]}…): evaluate the run"
                     + (f"; there are results of {', '.join(sorted(others))}" if others else ""))  # fmt: skip
    rows = [row for record in own for row in _result_rows(record, holes)]
    if holes or done is None:
        raise ConfigError(run, "a card would have holes", found="; ".join(holes), todo="fill them and write it again")
    start = f"{config['model']['name']} ({config['model']['init']})"
    sections = [
        _front_matter(_run_metadata(notes, config, own)), f"# {notes.title}\n\n{notes.summary}\n",
        "## Use\n\n" + _list([
            f"Intended: {notes.intended_use}", f"Out of scope: {notes.out_of_scope} {NOT_FOR_CARE}",
        ]),
        "```python\nimport biomedclip\n\n"
        f"model, preprocess, tokenizer = biomedclip.load({json.dumps(notes.repo or str(run))})\n```\n",
        "## Model\n\n" + _list([
            f"Starts from: {start}", f"Images: `{preprocess}`", f"Text: {context} tokens",
            f"Weights: `final/open_clip_model.safetensors`, sha256 `{weights_sha256}`", f"Fingerprint: `{fingerprint}`",
        ]),
        "## Training\n\n" + _list([
            notes.training_data, f"Population: {notes.population}", f"Consent and de-identification: {notes.consent}",
            f"{done['steps']:,} steps; config in `config.yaml`, seed {facts['seed']}, commit"
            f" {facts['git_commit'] or 'of an installed package'}",
        ]) + "\n" + _table(("source", "samples", "licences"), data),
        "## Evaluation\n\n" + _table(("task", "split", "metric", "value", "interval", "n"), rows)
        + "\nPrompts, manifest hashes and versions are in the result files. Subgroups: " + notes.subgroups + ".\n",
        "## Limits\n\n" + _list(notes.limitations),
        f"## Contact\n\n{notes.contact}\n",
    ]  # fmt: skip
    return "\n".join(sections)


def describe_steps(steps: Sequence[Step]) -> str:
    """Image steps in words a person reads."""
    return "; ".join(_STEP_WORDS[step.verb](step) for step in steps)


def _released_metadata(model: ReleasedModel) -> dict[str, Any]:
    said: dict[str, Any] = {
        "library_name": "biomedclip", "pipeline_tag": "zero-shot-image-classification", "language": ["en"],
        "license": model.licence.id,
    }  # fmt: skip
    if model.licence.name:
        said["license_name"] = model.licence.name
    if model.licence.url:
        said["license_link"] = model.licence.url
    if model.source.repo and model.source.kind == "hub":
        said["base_model"] = model.source.repo
    return {**said, "tags": ["clip", "biomedical", *model.domains]}


def _note(model: ReleasedModel) -> str:
    return (
        "This page describes a model that others published. It is written from `biomedclip/models/zoo/"
        f"{model.name}.yaml`; numbers are its authors' own.\n"
    )


def _source_lines(model: ReleasedModel) -> str:
    source = model.source
    where = f"https://huggingface.co/{'datasets/' if source.kind == 'hub-dataset' else ''}{source.repo}"
    lines = [
        f"Published at: {where if source.repo else source.page}",
        f"Revision: {source.revision or 'not pinned'}",
        f"Access: {describe_access(source.model_dump())}{f' ({source.terms})' if source.terms else ''}",
    ]
    for file in model.files:
        known = f"sha256 `{file.sha256}`" if file.sha256 else f"md5 `{file.md5}`" if file.md5 else "not pinned"
        size = f", {file.size:,} bytes" if file.size else ""
        lines.append(f"`{file.paths[0]}` ({file.role}{size}): {known}{f', from {file.repo}' if file.repo else ''}")
    licence = model.licence.name or model.licence.id
    lines.append(f"Licence: {licence} ({model.licence.evidence}); commercial use {_said(model.licence.commercial)},"
                 f" redistribution {_said(model.licence.redistribution)}")  # fmt: skip
    return _list(lines)


def _said(value: bool | None) -> str:
    return "not stated" if value is None else "allowed" if value else "not allowed"


def _model_lines(model: ReleasedModel) -> str:
    tokenizer = model.tokenizer
    lines = [
        f"Towers: {model.architecture.builder}, activation {model.architecture.activation}",
        f"Images: {describe_steps(model.preprocess.steps)} ({model.preprocess.origin})",
        f"Text: {tokenizer.kind} tokens, context {tokenizer.context}, padded to {tokenizer.pad}",
        f"Scores: {model.scoring.kind}, template `{model.scoring.template}`",
    ]
    if model.scoring.note:
        lines.append(model.scoring.note)
    if model.architecture.quick_gelu_doubt:
        lines.append(f"Doubt about the activation: {model.architecture.quick_gelu_doubt}")
    if tokenizer.exception:
        lines.append(f"Padding: {tokenizer.exception}")
    return _list(lines)


def _reported(model: ReleasedModel) -> str:
    if not model.reported:
        return "No number of the authors is quoted here. Nothing was measured here.\n"
    rows = [(entry.task, entry.metric, f"{entry.value:g}", entry.source) for entry in model.reported]
    return "Reported in the sources named, not measured here:\n\n" + _table(("task", "metric", "value", "source"), rows)


def _checked(model: ReleasedModel) -> str:
    words = {
        "documented": "Its facts are collected; it was not loaded in any form.",
        "layout-tested": "Random weights in the published layout load, every key accounted for, and give the outputs"
        f" of {model.compared_with}.",
        "weights-tested": f"The published weights were loaded and compared with {model.compared_with}.",
    }
    return words[model.status] + "\n\nNot verified:\n\n" + _list(model.unverified)


def _citation(model: ReleasedModel) -> str:
    paper = model.paper
    if paper is None:
        return "None known.\n"
    link = (
        f"https://doi.org/{paper.doi}" if paper.doi else f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else ""
    )
    parts = [paper.title, paper.venue, str(paper.year), link]
    return ". ".join(part for part in parts if part) + "\n"


def _training_sources(config: Mapping[str, Any]) -> tuple[list[tuple[str, str, str]], list[str]]:
    rows, holes = [], []
    for source in config["data"]["sources"]:
        path = Path(source.get("path") or "") / "manifest.json"
        try:
            manifest = json.loads(path.read_bytes())
            licences = ", ".join(f"{name}: {count:,}" for name, count in manifest["licences"].items())
            rows.append((source["name"], f"{manifest['samples']:,}", licences))
        except (OSError, ValueError, KeyError):
            holes.append(f"source {source['name']}: no manifest with licences at {path}")
    return rows, holes


def _result_rows(record: Mapping[str, Any], holes: list[str]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for metric, value in record["metrics"].items():
        if any(value.get(part) is None for part in ("value", "ci_low", "ci_high", "n")):
            if metric == record.get("primary"):
                holes.append(f"{record['task']}: {metric} has no n or interval")
            continue
        interval = f"{value['ci_low']:.4g} to {value['ci_high']:.4g} ({value.get('ci_method', 'interval')})"
        split = str(record["dataset"]["split"])
        rows.append((str(record["title"]), split, metric, f"{value['value']:.4g}", interval, f"{value['n']:,}"))
    if not rows:
        holes.append(f"{record['task']}: no metric has both n and interval")
    return rows


def _run_metadata(notes: CardNotes, config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    results = []
    for record in records:
        primary = record["metrics"][record["primary"]]
        results.append({
            "task": {"type": "zero-shot-image-classification", "name": record["title"]},
            "dataset": {"type": record["task"], "name": record["title"], "split": record["dataset"]["split"],
                        "revision": record["dataset"]["manifest_sha256"]},
            "metrics": [{"type": record["primary"], "value": primary["value"], "name": record["primary"]}],
        })  # fmt: skip
    said: dict[str, Any] = {
        "library_name": "open_clip", "pipeline_tag": "zero-shot-image-classification", "license": notes.licence,
        "tags": ["clip", "biomedical"],
    }  # fmt: skip
    if config["model"]["init"] == "pretrained" and "/" in config["model"]["name"]:
        said["base_model"] = config["model"]["name"].removeprefix("hf-hub:")
    return {**said, "model-index": [{"name": notes.title, "results": results}]}


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


def _front_matter(said: Mapping[str, Any]) -> str:
    return "---\n" + yaml.safe_dump(dict(said), sort_keys=False, allow_unicode=True, width=120) + "---\n"


def _list(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" for line in lines)


def _size(step: Step) -> str:
    size = step.size
    return f"{size} px" if isinstance(size, int) else "×".join(str(side) for side in size or ())


_STEP_WORDS: dict[str, Any] = {
    "mode": lambda step: f"to {step.mode}",
    "minmax": lambda step: "stretched to 0..255",
    "pad": lambda step: "padded to a square" if step.pad == "square" else f"padded to {_size(step)} ({step.pad})",
    "resize": lambda step: (
        f"{step.resize} side to {_size(step)}, {step.interpolation}"
        if step.resize != "squash"
        else f"squashed to {_size(step)}, {step.interpolation}" + ("" if step.antialias else ", not antialiased")
    ),
    "crop": lambda step: f"centre crop {_size(step)}",
    "channels": lambda step: "grey to 3 channels",
    "tensor": lambda step: "divided by 255" if step.tensor == 255 else "kept at 0..255",
    "normalize": lambda step: (
        f"normalised ({step.normalize})"
        if isinstance(step.normalize, str)
        else "normalised (mean {}, std {})".format(*(f"{numbers[0]:g}" for numbers in step.normalize))
    ),
}
