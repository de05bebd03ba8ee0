"""The cards of released models, from their facts: the zoo's YAML file as a page that a person reads.

Numbers are the publisher's and marked as theirs. A model that comes with this package was trained here: its card is
written from the record beside its weights (`own_cards.py`), with numbers measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from biomedclip.errors import CheckpointError
from biomedclip.models.catalog import bundled_folder, describe_access
from biomedclip.models.zoo import ReleasedModel, Step

NOT_FOR_CARE = "It is not a medical device: no diagnosis, no triage, no decision about a patient."


def released_card(model: ReleasedModel) -> str:
    """The card of a released model, Markdown with front matter.

    Raises DataError where a bundled one has no record beside its weights, CheckpointError where that contradicts it.
    """
    if model.source.kind == "bundled":
        return _bundled_card(model)
    sections = [
        front_matter(_released_metadata(model)), f"# {model.title}\n\n{model.summary}.\n",
        _note(model), "## Use\n\n" + bullets([
            f"Intended: {model.intended_use}", f"Out of scope: anything but research. {NOT_FOR_CARE}",
        ]),
        f"```python\nimport biomedclip\n\nmodel, preprocess, tokenizer = biomedclip.load(\"{model.name}\""
        f"{', checkpoint=PATH' if model.source.kind == 'manual' else ''})\n```\n",
        "## Source\n\n" + _source_lines(model),
        "## Model\n\n" + _model_lines(model),
        "## Training data\n\n" + model.training_data + "\n",
        "## Evaluation\n\n" + _reported(model),
        "## Limits\n\n" + bullets([*model.limits, "Subgroup results: not measured here"]),
        "## What was checked here\n\n" + _checked(model),
        "## Citation\n\n" + _citation(model),
    ]  # fmt: skip
    return "\n".join(sections)


def _bundled_card(model: ReleasedModel) -> str:
    from biomedclip.models.calibration import read_calibration
    from biomedclip.models.own_cards import record_card
    from biomedclip.models.training_record import RECORD_FILE, read_record

    path = bundled_folder(model.source.folder or "") / RECORD_FILE
    record = read_record(path)
    pinned = {file.sha256 for file in model.files_of("weights")}
    if pinned != {record.weights.sha256} or record.notes.licence != model.licence.id:
        raise CheckpointError(
            path, f"is of other weights, or another licence, than {model.name}.yaml says",
            found=f"{record.weights.sha256}, {record.notes.licence}", todo="collect it again",
        )  # fmt: skip
    return record_card(record, calibration=read_calibration(model.name))


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
    return bullets(lines)


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
    return bullets(lines)


def _reported(model: ReleasedModel) -> str:
    if not model.reported:
        return "No number of the authors is quoted here. Nothing was measured here.\n"
    rows = [(entry.task, entry.metric, f"{entry.value:g}", entry.source) for entry in model.reported]
    return "Reported in the sources named, not measured here:\n\n" + table(("task", "metric", "value", "source"), rows)


def _checked(model: ReleasedModel) -> str:
    words = {
        "documented": "Its facts are collected; it was not loaded in any form.",
        "layout-tested": "Random weights in the published layout load, every key accounted for, and give the outputs"
        f" of {model.compared_with}.",
        "weights-tested": f"The published weights were loaded and compared with {model.compared_with}.",
    }
    return words[model.status] + "\n\nNot verified:\n\n" + bullets(model.unverified)


def _citation(model: ReleasedModel) -> str:
    paper = model.paper
    if paper is None:
        return "None known.\n"
    link = (
        f"https://doi.org/{paper.doi}" if paper.doi else f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else ""
    )
    parts = [paper.title, paper.venue, str(paper.year), link]
    return ". ".join(part for part in parts if part) + "\n"


def front_matter(said: Mapping[str, Any]) -> str:
    """The YAML between two lines of dashes that the Hub reads."""
    return "---\n" + yaml.safe_dump(dict(said), sort_keys=False, allow_unicode=True, width=120) + "---\n"


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "".join(f"- {line}\n" for line in lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
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
