"""The card of a model trained here, from its record: what it is for, what made it, how good it is and where it fails.

Reads a `TrainingRecord` and, where there is one, the calibration beside the weights; yields Markdown with the front
matter that the Hub reads. Every number comes from the record with its n and interval; a target that was missed and a
starting point that was not beaten are said in the same words as one that was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from biomedclip.models.cards import NOT_FOR_CARE, bullets, front_matter, table
from biomedclip.models.training_record import GroupScore, RunRecord, Score, TaskRecord, TrainingRecord

if TYPE_CHECKING:
    from biomedclip.models.calibration import Calibration


def record_card(record: TrainingRecord, *, calibration: Calibration | None = None) -> str:
    """The card of a model trained here, Markdown with front matter."""
    notes = record.notes
    sections = [
        front_matter(_metadata(record)), f"# {notes.title}\n\n{notes.summary}\n",
        "**Not for clinical use.** Written from the record of its training and its result files; nothing here was typed"
        " in by hand but the words of the notes.\n",
        "## Use\n\n" + bullets([
            f"Intended: {notes.intended_use}", f"Out of scope: {notes.out_of_scope} {NOT_FOR_CARE}",
        ]) + _how_to_load(record),
        "## Model\n\n" + bullets(_model_lines(record)),
        "## Training\n\n" + bullets([
            notes.training_data, f"Population: {notes.population}", f"Consent and de-identification: {notes.consent}",
            *([f"Hardware: {notes.hardware}"] if notes.hardware else []),
        ]) + "\n" + _sources(record) + "\n" + _runs(record.runs),
        "## Evaluation\n\n" + _results(record.tasks),
        "## Subgroups\n\n" + _subgroups(record),
        "## Where it fails\n\n" + _failures(record.tasks),
        "## How sure it is\n\n" + _calibration(calibration),
        "## Limits\n\n" + bullets(notes.limitations),
        f"## Contact\n\n{notes.contact}\n",
    ]  # fmt: skip
    return "\n".join(sections)


def _metadata(record: TrainingRecord) -> dict[str, Any]:
    results = [
        {
            "task": {"type": "zero-shot-image-classification", "name": task.title},
            "dataset": {"type": task.task, "name": task.title, "split": task.split, "revision": task.manifest_sha256},
            "metrics": [{"type": task.primary, "value": task.metrics[task.primary].value, "name": task.primary}],
        }
        for task in record.tasks
    ]  # fmt: skip
    said: dict[str, Any] = {
        "library_name": "open_clip", "pipeline_tag": "zero-shot-image-classification",
        "license": record.notes.licence, "tags": ["clip", "biomedical"],
    }  # fmt: skip
    base = record.runs[0].starts_from
    if base.endswith("(pretrained)") and "/" in base:
        said["base_model"] = base.split(" ")[0].removeprefix("hf-hub:")
    return {**said, "model-index": [{"name": record.notes.title, "results": results}]}


def _how_to_load(record: TrainingRecord) -> str:
    if record.notes.weights is not None:
        return f"\nIts weights are not published: {record.notes.weights}\n"
    name = json.dumps(record.notes.repo or record.name)
    return f"\n```python\nimport biomedclip\n\nmodel, preprocess, tokenizer = biomedclip.load({name})\n```\n"


def _model_lines(record: TrainingRecord) -> list[str]:
    weights = record.weights
    return [
        f"Starts from: {record.notes.starting_point or record.runs[0].starts_from}",
        f"{weights.parameters:,} parameters; images `{weights.preprocess}`; text of {weights.context} tokens",
        f"Weights: `{weights.file}`, {weights.bytes:,} bytes in {weights.precision}, sha256 `{weights.sha256}`",
        f"Fingerprint: `{weights.fingerprint}`",
    ]


def _sources(record: TrainingRecord) -> str:
    rows = [
        (source.name, f"{source.samples:,}", ", ".join(f"{name} {count:,}" for name, count in source.splits.items()),
         ", ".join(f"{name}: {count:,}" for name, count in source.licences.items()), f"`{source.sha256[:16]}`")
        for source in record.sources
    ]  # fmt: skip
    return table(("source", "samples", "splits", "licences", "hash of its shards"), rows)


def _runs(runs: Sequence[RunRecord]) -> str:
    rows = [
        (
            str(number), run.task, run.starts_from, "" if run.steps is None else f"{run.steps:,}",
            "unknown" if run.hours is None else f"{run.hours:.2f}", str(run.seed), run.machine,
            f"`{run.git_commit[:12]}`" if run.git_commit else "an installed package", f"`{run.config_sha256[:16]}`",
        )
        for number, run in enumerate(runs, 1)
    ]  # fmt: skip
    hours = sum(run.hours or 0 for run in runs)
    used = ", ".join(f"{name} {version}" for name, version in runs[-1].versions.items())
    head = ("run", "task", "starts from", "steps", "hours", "seed", "machine", "commit", "hash of its config")
    return table(head, rows) + f"\n{hours:.2f} hours in all. Versions: {used or 'not recorded'}.\n"


def _results(tasks: Sequence[TaskRecord]) -> str:
    rows = []
    for task in tasks:
        own = task.metrics[task.primary]
        groups = f" ({task.num_groups:,} groups)" if task.num_groups else ""
        majority = "" if task.majority is None else f"{task.majority:.3f}"
        start = "not measured" if task.start is None else _interval(task.start)
        rows.append((task.title, task.split, task.primary, _interval(own), f"{own.n:,}{groups}", majority, start,
                     _verdict(task), task.leakage))  # fmt: skip
    head = ("task", "split", "metric", "value (95 % interval)", "n", "majority", "at its starting point", "verdict",
            "leakage check")  # fmt: skip
    others = [
        (task.title, name, _interval(score), score.ci_method, f"{score.n:,}")
        for task in tasks for name, score in task.metrics.items()
    ]  # fmt: skip
    return (
        table(head, rows) + "\nAll metrics:\n\n" + table(("task", "metric", "value", "interval by", "n"), others)
        + "\nPrompts, manifest hashes and versions are in the result files.\n"
    )  # fmt: skip


def _verdict(task: TaskRecord) -> str:
    words = {True: "better than its start, intervals apart", False: "NOT clearly better than its start", None: ""}
    said = [words[task.beats_start]]
    if task.target is not None:
        said.append(f"target {task.target:g} " + ("reached" if task.reaches_target else "MISSED"))
    return "; ".join(part for part in said if part) or "no target"


def _subgroups(record: TrainingRecord) -> str:
    parts = []
    for task in record.tasks:
        if task.subgroups:
            parts.append(f"{task.title}, {task.primary} by {task.attribute}:\n\n" + _group_table(task.subgroups))
        if task.classes:
            parts.append(f"{task.title}, share of right answers by class:\n\n" + _group_table(task.classes))
    said = (
        f"By patient or acquisition: {record.notes.subgroups}.\n" if not any(t.subgroups for t in record.tasks) else ""
    )
    return "\n".join([*parts, said] if said else parts)


def _group_table(groups: Sequence[GroupScore]) -> str:
    rows = []
    for group in groups:
        interval = "" if group.ci_low is None else f" ({group.ci_low:.3f} to {group.ci_high:.3f})"
        rows.append(
            (group.name, "undefined" if group.value is None else f"{group.value:.3f}{interval}", f"{group.n:,}")
        )
    return table(("group", "value", "n"), rows)


def _failures(tasks: Sequence[TaskRecord]) -> str:
    lines = [
        f"{task.title}: {entry.count:,} of {entry.of:,} {entry.truth} are called {entry.answer}"
        for task in tasks for entry in task.confusions
    ]  # fmt: skip
    lines += [
        f"{task.title}: worst corruption is {found.name}, {task.primary} {found.value:.3f} over severities 1, 3 and 5"
        for task in tasks if (found := task.worst_corruption) is not None and found.value is not None
    ]  # fmt: skip
    return bullets(lines) if lines else "No wrong answer on the tasks above, which says how easy they are.\n"


def _calibration(calibration: Calibration | None) -> str:
    if calibration is None:
        return (
            "Not calibrated: its probabilities are too sure of themselves on images unlike those it was trained on.\n"
        )
    facts, sure = calibration.facts, calibration.facts.confidence
    lines = [
        f"Logits are divided by {facts.temperature:.3f}, fitted on the validation splits of "
        + ", ".join(f"{fit.task} (n = {fit.n:,}, expected calibration error {fit.ece[0]:.3f} before, {fit.ece[1]:.3f}"
                    " after)" for fit in facts.tasks),
        f"An answer whose probability is below {facts.uncertain_below:.3f} is called uncertain: of the surer ones"
        f" {sure.accuracy:.3f} are right on validation, and {sure.coverage:.3f} of all answers are surer"
        f" (n = {sure.n:,})",
    ]  # fmt: skip
    if facts.scope is not None:
        lines.append(
            f"An image further from the training images than {facts.scope.quantile:.1%} of the validation images of"
            f" every domain is called out of scope ({', '.join(domain.name for domain in facts.scope.domains)})"
        )
    return bullets(lines)


def _interval(score: Score) -> str:
    return f"{score.value:.3f} ({score.ci_low:.3f} to {score.ci_high:.3f})"
