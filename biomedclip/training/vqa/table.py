"""results.json of a run of answering heads as one Markdown table, encoders as rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METRICS = ("accuracy", "accuracy/open", "accuracy/closed")


def results_table(results: Mapping[str, Any]) -> str:
    """The table, the differences on closed questions, and what a reader must know about the data."""
    lines = [
        "| encoder | knows | overall | open | closed | closed, another image |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        cells = [_cell(row["metrics"].get(metric)) for metric in METRICS]
        shuffled = row["metrics"].get("accuracy/closed", {}).get("shuffled")
        lines.append(f"| {row['encoder']} | {row['knows']} | {' | '.join(cells)} | {_percent(shuffled)} |")
    for name, entry in results["baselines"].items():
        cells = [_cell(entry["metrics"].get(metric)) for metric in METRICS]
        lines.append(f"| {name} (no head) | {entry['knows']} | {' | '.join(cells)} | |")
    lines += ["", "Closed questions, difference with 95 % interval by image and Holm-adjusted p:", ""]
    for row in results["comparisons"]:
        if row["metric"] == "accuracy/closed" and "difference" in row:
            verdict = "" if row["p_holm"] <= 0.05 else ", not distinguishable"
            bounds = f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
            lines.append(
                f"- {row['encoder']} against {row['against']}: {100 * row['difference']:+.1f} points {bounds},"
                f" p {row['p_holm']:.3f}{verdict}"
            )
    data, ceiling = results["data"], results["rows"][0]["first_seed"]["unseen_answer_ceiling"]
    held = " (held out by image)" if data["validation_carved_by_image"] else ""
    refit = f", {data['fitted']:,} of both to train the heads that answer" if results["refit"] else ""
    seen = f"{data['test_images_seen_in_training']} of {data['test_images']} scored images also occur in training."
    lines += [
        "",
        f"{data['name']}: {data['train']:,} questions to train on, {data['validation']:,} to choose the epoch"
        f"{held}{refit}, {data['test']:,} scored; {seen} {len(results['seeds'])} seeds; head"
        f" {results['head']['name']}. With answers of the training questions alone"
        f" {_percent(ceiling['overall'])} can be right at most.",
    ]
    if results["scored"] == "validation":
        lines.append("The scored questions are the validation questions: for choosing settings, too good to report.")
    return "\n".join(lines)


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "–"
    spread = f" ± {100 * entry['sd']:.1f}" if entry.get("sd") is not None else ""
    bounds = "" if entry["low"] is None else f" [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
    return f"{100 * entry['value']:.1f}{spread}{bounds}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
