"""The overview: all results of a folder, any number of models and tasks, as one HTML page and as Markdown.

Reads result records and their stored scores; yields `report.html`, which needs nothing but a browser, and `report.md`
with the same tables. Averages are over tasks of one metric that every model has, with their names; nothing else is
averaged. The page of one training run, before and after, is report.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biomedclip.errors import DataError
from biomedclip.evaluation.appendix import write_appendix
from biomedclip.evaluation.compare import Change, compare_results
from biomedclip.evaluation.markup import interval_text, name_metric, round_value
from biomedclip.evaluation.overview_charts import (
    Results,
    models_of,
    rank_models,
    write_boxes,
    write_curves,
    write_few_shot,
    write_forest,
    write_ranks,
    write_subgroups,
    write_wise,
)
from biomedclip.evaluation.results import TaskResult, read_results, read_skipped
from biomedclip.evaluation.sections import LIMITS, write_confusions
from biomedclip.files import write_text
from biomedclip.page import write_page
from biomedclip.page.markup import to_text, write_table

_GENERAL = "general"


def write_overview(results: str | Path, out: str | Path) -> list[Path]:
    """Write `report.html` and `report.md` under `out`. Raises DataError for a folder without results."""
    found = read_results(results)
    if not found:
        raise DataError(results, "holds no results", todo="run `biomedclip eval run` with --out of this name")
    table = arrange(found)
    changes = compare_models(table)
    named: dict[str, list[tuple[str, ...]]] = {
        "Results": matrix(table), "Averages": averages(table), "Ranks": rank_rows(table),
        "Differences": difference_rows(changes),
        "Beyond accuracy": beyond_rows(table), "Published results": published_rows(table),
        "Skipped": [("task", "why"), *read_skipped(results).items()],
    }  # fmt: skip
    lines = ["# Evaluation", "", *(f"> {limit}" for limit in LIMITS), ""]
    for title, rows in named.items():
        if len(rows) > 1:
            lines += [f"## {title}", "", *_markdown(rows), ""]
    write_text(Path(out) / "report.md", "\n".join(lines))
    sections = [
        "<header>\n<h1>Evaluation</h1></header>",
        *(_section(title, named[title]) for title in ("Results", "Averages")),
        write_forest(changes), *(_section(t, named[t]) for t in ("Differences", "Published results")),
        write_ranks(table), write_curves(table), *_confusions(table), write_few_shot(table), write_boxes(table),
        write_subgroups(table), _forgetting(table), write_wise(table),
        _section("Beyond accuracy", named["Beyond accuracy"]), _limits(table), _section("Skipped", named["Skipped"]),
        *_appendices(table),
    ]  # fmt: skip
    page = write_page(Path(out) / "report.html", "Evaluation", sections, footer=LIMITS[0])
    return [page, Path(out) / "report.md"]


def arrange(results: Iterable[TaskResult]) -> dict[str, dict[str, TaskResult]]:
    """{task: {model: newest result}}."""
    table: dict[str, dict[str, TaskResult]] = {}
    for result in results:
        table.setdefault(result.task, {})[result.model] = result
    return table


def matrix(table: Results) -> list[tuple[str, ...]]:
    """Sets by models: primary metric with interval; baselines, leakage, excluded images and n beside it."""
    models = models_of(table)
    rows = [("task", "metric", *models, "random", "majority", "n", "excluded", "leakage")]
    for by_model in table.values():
        record = next(iter(by_model.values())).record
        name = record["primary"]
        cells = [_cell(by_model[m].metrics[name]) if m in by_model else "–" for m in models]
        base = [round_value(record["baselines"].get(kind, {}).get(name)) for kind in ("random", "majority")]
        data = record["dataset"]
        leaks = {str(r.record["dataset"].get("leakage", {}).get("text", "not checked")) for r in by_model.values()}
        rows.append((record["title"], name_metric(name), *cells, *base, f"{data['n']:,}",
                     str(data["excluded"]["n"]), " / ".join(sorted(leaks))))  # fmt: skip
    return rows


def averages(table: Results) -> list[tuple[str, ...]]:
    """Means over the tasks of one suite and one primary metric that all models have, listing them."""
    models = models_of(table)
    rows: list[tuple[str, ...]] = [("suite", "metric", *models, "mean of")]
    kinds: dict[tuple[str, str], list[str]] = {}
    for task, by_model in table.items():
        record = next(iter(by_model.values())).record
        if all(m in by_model and by_model[m].metrics[record["primary"]]["value"] is not None for m in models):
            kinds.setdefault((record["suite"], record["primary"]), []).append(task)
    for (suite, name), tasks in kinds.items():
        if len(tasks) > 1:
            means = [np.mean([table[t][m].metrics[name]["value"] for t in tasks]) for m in models]
            rows.append((suite, name_metric(name), *(round_value(float(v)) for v in means), ", ".join(tasks)))
    return rows


def rank_rows(table: Results) -> list[tuple[str, ...]]:
    """Mean ranks of three or more models over the tasks that all have, and which cannot be told from the best."""
    found, tasks = rank_models(table)
    if len(found.mean_ranks) < 3 or found.reason:
        return []
    ordered = sorted(found.mean_ranks.items(), key=lambda item: item[1])
    rows: list[tuple[str, ...]] = [("model", "mean rank", f"critical difference {found.critical_difference:.2f}", "of")]
    best = next((run for run in found.alike if ordered[0][0] in run), (ordered[0][0],))
    return rows + [
        (model, f"{rank:.2f}", "not told from the best" if model in best else "", ", ".join(tasks))
        for model, rank in ordered
    ]


def compare_models(table: Results) -> dict[str, list[Change]]:
    """{other model: changes against the first one}, empty for a single model."""
    first, *others = models_of(table)
    ours = [by_model[first] for by_model in table.values() if first in by_model]
    found = {}
    for other in others:
        theirs = [by_model[other] for by_model in table.values() if other in by_model]
        if {r.task for r in ours} & {r.task for r in theirs}:
            found[f"{other} against {first}"] = compare_results(ours, theirs, resamples=1000)
    return found


def difference_rows(changes: Mapping[str, Sequence[Change]]) -> list[tuple[str, ...]]:
    """Each comparison as text: difference, interval, Holm-adjusted p, verdict."""
    rows: list[tuple[str, ...]] = [("models", "task", "metric", "difference", "95 % interval", "p (Holm)", "")]
    for pair, entries in changes.items():
        for c in entries:
            shown = (
                ("", "", "") if c.reason else (f"{c.value:+.3f}", f"{c.low:+.3f} to {c.high:+.3f}", f"{c.p_holm:.3g}")
            )
            rows.append((pair, c.task, name_metric(c.metric), *shown, c.verdict))
    return rows


def published_rows(table: Results) -> list[tuple[str, ...]]:
    """Published figures of the task's set beside ours, with a verdict where the figure is of the model that was scored.

    Another model's figure is context, not a reproduction.
    """
    rows: list[tuple[str, ...]] = [
        ("task", "published model", "metric", "published", "n there", "ours", "verdict", "source")
    ]
    for by_model in table.values():
        for model, result in by_model.items():
            judged = {(row["model"], row["metric"], row["published"]): row
                      for row in result.record.get("reproduction", ())}  # fmt: skip
            for entry in result.record.get("published", ()):
                own = result.metrics.get(entry["metric"])
                verdict = judged.get((entry["model"], entry["metric"], entry["value"]))
                ours = f"{model}: {_cell(own)}" if own else "not measured"
                if verdict and not own and verdict["ours"] is not None:
                    ours = f"{model}: {round_value(verdict['ours'])}"
                rows.append((result.record["title"], entry["model"], name_metric(entry["metric"]),
                             round_value(entry["value"]), f"{entry['n']:,}" if entry["n"] else "not said", ours,
                             _verdict(verdict), entry["source"]))  # fmt: skip
    return rows


def _verdict(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "another model"
    return (
        f"{row['verdict']}: {row['reason']}" if "reason" in row else f"{row['verdict']} within {row['tolerance']:.2g}"
    )


def beyond_rows(table: Results) -> list[tuple[str, ...]]:
    """Adapters, calibration, outsiders, corruptions and composition, one number a row; reasons where there is none."""
    rows: list[tuple[str, ...]] = [("task", "model", "what", "value", "remark")]
    for task, by_model in table.items():
        for model, result in by_model.items():
            for name, value in result.record.get("strict", {}).items():
                rows.append((task, model, f"strict {name_metric(name)}", round_value(value), "own partner only"))
            for name, value in result.record.get("pooled_and_macro", {}).items():
                rows.append((task, model, f"accuracy, {name.replace('_', ' ')}", round_value(value), ""))
            for section, found in result.record.get("beyond", {}).items():
                rows += [(task, model, *row) for row in _facts(section, found)]
    return rows


def _facts(section: str, found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    if "reason" in found:
        return [(section.replace("_", " "), "–", str(found["reason"]))]
    rows: list[tuple[str, str, str]] = []
    if section == "adapters":
        for name, entry in found.items():
            if "reason" in entry:
                rows.append((name, "–", str(entry["reason"])))
                continue
            tags = ", ".join([f"chosen on {entry['selection']['split']}", *entry["selection"].get("tags", ())])
            rows.append((f"{name}, balanced accuracy", round_value(entry["balanced_accuracy"]), tags))
    elif section == "calibration":
        rows.append(("ECE at the model's own scale", round_value(found["own_scale"]["ece"]), ""))
        t = found["temperature"]
        rows.append(("ECE after a temperature", round_value(t.get("ece")),
                     t.get("reason") or f"T = {t['value']:.3g}, fitted on {t['split']}"))  # fmt: skip
    elif section == "ood":
        for name, kinds in found.items():
            rows += [(f"{name}, {kind}, AUROC", round_value(kinds[kind]["mean"]["auroc"]),
                      ", ".join(kinds[kind]["sets"])) for kind in ("near", "far") if kind in kinds]  # fmt: skip
    elif section == "corruptions":
        rows.append(("kept under corruption", round_value(found["kept"]), f"worst: {found['worst']}"))
    elif section == "prior_correction":
        rows += [
            (
                f"balanced accuracy, prior {what}",
                round_value(found[key]["balanced_accuracy"]),
                f"seen on {found['split']}, n {found['n']}",
            )
            for key, what in (("before", "kept"), ("after", "out"))
        ]
    elif section == "perception":
        said = ", ".join(f"{value} {share:.2f}" for value, share in found["perceived"].items())
        rows += [("balanced accuracy, zero-shot", round_value(found["zero_shot"]["balanced_accuracy"]), ""),
                 ("balanced accuracy, conditioned", round_value(found["balanced_accuracy"]), said)]  # fmt: skip
    elif section == "backgrounds":
        rows += [(f"class on background, {name}", round_value(found[name]), found["attribute"])
                 for name in ("worst", "mean", "gap")]  # fmt: skip
    elif section == "composition":
        rows += [(f"{name} foils refused", round_value(e.get("accuracy")), e.get("reason") or f"n {e['n']}, chance 0.5")
                 for name, e in found.items()]  # fmt: skip
    return rows


def _forgetting(table: Results) -> str:
    """General tasks beside medical ones, model by model: what was kept while the rest was learnt."""
    general = [t for t, by in table.items() if next(iter(by.values())).record["suite"] == _GENERAL]
    if not general:
        return ""
    rows = [row for row in matrix({t: table[t] for t in general})]
    return _section("Retention", rows)


def _confusions(table: Results) -> list[str]:
    first, *rest = models_of(table)
    old = {t: by[first].record for t, by in table.items() if first in by}
    if not rest:
        return [write_confusions({}, old).replace("<caption>after</caption>", f"<caption>{to_text(first)}</caption>")]
    new = {t: by[rest[-1]].record for t, by in table.items() if rest[-1] in by}
    html = write_confusions(old, new)
    html = html.replace("<caption>before</caption>", f"<caption>{to_text(first)}</caption>")
    return [html.replace("<caption>after</caption>", f"<caption>{to_text(rest[-1])}</caption>")]


def _limits(table: Results) -> str:
    lines = list(LIMITS)
    for by_model in table.values():
        record = next(iter(by_model.values())).record
        lines += [f"{record['title']}: {text}" for text in (record["dataset"]["contamination"], *record["warnings"])]
        if not record["dataset"].get("verified", True):
            lines.append(f"{record['title']}: class list or layout of this task is not verified")
    items = "".join(f"<li>{to_text(line)}</li>" for line in lines)
    return f'<section id="limits"><h2>What this does not show</h2><ul>{items}</ul></section>'


def _appendices(table: Results) -> list[str]:
    newest = {task: list(by_model.values())[-1].record for task, by_model in table.items()}
    return [write_appendix({}, newest, [], None)]


def _cell(entry: Mapping[str, Any]) -> str:
    if entry["value"] is None:
        return f"undefined: {entry.get('reason', '')}"
    return f"{round_value(entry['value'])} ({interval_text(entry)})"


def _section(title: str, rows: Sequence[Sequence[str]]) -> str:
    if len(rows) < 2:
        return ""
    body = write_table(tuple(map(to_text, rows[0])), [tuple(map(to_text, row)) for row in rows[1:]])
    return f'<section><h2>{to_text(title)}</h2><div class="wide">{body}</div></section>'


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return [
        f"| {' | '.join(cells[0])} |",
        f"|{'---|' * len(cells[0])}",
        *(f"| {' | '.join(row)} |" for row in cells[1:]),
    ]
