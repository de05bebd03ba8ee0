"""Sections of the overview that are drawn: curves, few shots, wording, subgroups, differences, ranks, points between.

Reads result records and their stored scores; yields HTML with SVG inside, empty where no result has what it shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from biomedclip.evaluation.answer_scores import LabelScores
from biomedclip.evaluation.compare import LOWER_IS_BETTER, Change
from biomedclip.evaluation.comparisons import RankComparison, compare_ranks
from biomedclip.evaluation.macro_curves import mean_precision, mean_roc, pairs_of
from biomedclip.evaluation.markup import name_metric, round_value
from biomedclip.evaluation.plots import draw_boxes, draw_forest, draw_ranks, draw_square
from biomedclip.evaluation.results import TaskResult
from biomedclip.evaluation.scores import ClassScores, read_scores
from biomedclip.page.markup import to_text, write_table

Results = Mapping[str, Mapping[str, TaskResult]]
"""{task: {model: newest result}}"""


def write_curves(table: Results) -> str:
    """ROC, precision by sensitivity and reliability of each task; of more than two classes the macro average."""
    blocks = []
    for by_model in table.values():
        roc: dict[str, Any] = {}
        precision: dict[str, Any] = {}
        reliability: dict[str, Any] = {}
        many = 0
        for model, result in by_model.items():
            if result.scores_path.exists() and result.record["model"].get("given") != "predictions":
                scores = read_scores(result.scores_path)
                if isinstance(scores, ClassScores | LabelScores) and (pairs := pairs_of(scores)):
                    many = len(pairs) if len(pairs) > 1 else 0
                    roc[model], precision[model] = _thin(*mean_roc(pairs)), _steps(*mean_precision(pairs))
            if shown := result.record.get("beyond", {}).get("calibration", {}).get("reliability"):
                reliability[model] = list(zip(shown["confidence"], shown["accuracy"], strict=True))
        mean = "mean " if many else ""
        parts = [
            draw_square(roc, x_label="false positive rate", y_label=f"{mean}sensitivity", diagonal=True) if roc else "",
            draw_square(precision, x_label="sensitivity", y_label=f"{mean}precision") if precision else "",
            draw_square(reliability, x_label="confidence", y_label="accuracy", diagonal=True, dots=True)
            if reliability else "",
        ]  # fmt: skip
        if any(parts):
            title = to_text(next(iter(by_model.values())).record["title"])
            which = f", one against the rest, mean of {many}" if many else ""
            blocks.append(f'<h3>{title}{which}</h3><div class="pair">{"".join(parts)}</div>')
    note = ("ROC and precision by sensitivity. Of more than two classes each stands against the rest, and the curve is "
            "the mean over the classes: its area is the macro AUROC, or the macro average precision. A calibrated "
            "model's dots lie on the diagonal.")  # fmt: skip
    return write_block("Curves", note, blocks)


def _steps(x: Any, y: Any) -> list[tuple[float, float]]:
    """A step function that holds y up to x."""
    return _thin(np.r_[0.0, np.repeat(x, 2)[:-1]], np.repeat(y, 2))


def _thin(a: Any, b: Any) -> list[tuple[float, float]]:
    keep = np.unique(np.linspace(0, len(a) - 1, min(len(a), 200)).astype(int))
    return [(float(a[i]), float(b[i])) for i in keep]


def write_few_shot(table: Results) -> str:
    """Curves over images a class, with bands, and every number behind them."""
    blocks = []
    for _, model, result, found in results_with(table, "few_shot"):
        curves = found["curves"]
        top = max((float(k) for points in curves.values() for k in points), default=1.0)
        lines = {name: [(float(k), v["mean"]) for k, v in points.items()] for name, points in curves.items()}
        ticks = sorted({x for points in lines.values() for x, _ in points})
        label = found["metric"].replace("_", " ")
        bands = {name: [(float(k), v["mean"] - (v["sd"] or 0), v["mean"] + (v["sd"] or 0)) for k, v in points.items()]
                 for name, points in curves.items()}  # fmt: skip
        if found.get("zero_shot") is not None and ticks:
            lines["zero-shot"] = [(ticks[0], found["zero_shot"]), (top, found["zero_shot"])]
        chart = draw_square(lines, x_label="images a class", y_label=label, x_max=top, dots=True, ticks=ticks,
                            bands=bands)  # fmt: skip
        rows = [(name, k, round_value(v["mean"]), round_value(v["sd"]), f"{v['min']:.3f} to {v['max']:.3f}",
                 f"{v['n']:g}") for name, points in curves.items() for k, v in points.items()]  # fmt: skip
        head = ("method", "K", "mean", "sd over seeds", "range", "seeds")
        spread = write_table(head, [tuple(map(to_text, row)) for row in rows])
        remarks = [*found["tags"], *(f"{what}: {why}" for what, why in found["failed"].items())]
        remarks += [f"fewer images than asked for: {', '.join(found['short'])}"] if found["short"] else []
        blocks.append(
            f"<div><h3>{to_text(result.record['title'])}, {to_text(model)}</h3>{chart}<details><summary>all numbers"
            f'</summary>{spread}</details><p class="note">{to_text("; ".join(remarks))}</p></div>'
        )
    note = (
        "Means over seeds and one standard deviation either way; draws are nested, and what is chosen on the scored "
        "split is tagged."
    )
    return write_block("Few shots", note, [f'<div class="pair">{"".join(blocks)}</div>'] if blocks else [])


def write_boxes(table: Results) -> str:
    """Spread over random single prompts."""
    rows = [(f"{task}, {model}", found) for task, model, _, found in results_with(table, "prompt_sensitivity")]
    note = "The same images under random single prompts: minimum, quartiles and maximum of balanced accuracy."
    return write_block("Wording", note, [draw_boxes(rows)] if rows else [])


def write_subgroups(table: Results) -> str:
    """A forest of subgroups for each task and model."""
    blocks = []
    for _, model, result, found in results_with(table, "subgroups"):
        rows = [(g["name"], g["value"], g["ci_low"] or g["value"], g["ci_high"] or g["value"], f"n {g['n']}")
                for g in found["groups"] if g["value"] is not None]  # fmt: skip
        small = ", ".join(f"{g['name']} ({g['reason']})" for g in found["groups"] if g["value"] is None)
        blocks.append(
            f"<h3>{to_text(result.record['title'])}, {to_text(model)}, by {to_text(found['attribute'])}</h3>"
            f"{draw_forest(rows, zero=found['overall'], low=0, high=1)}<p class='note'>{to_text(small)}</p>"
        )
    return write_block("Subgroups", "Dashed: all samples. Groups too small to measure are named, not drawn.", blocks)


def write_forest(changes: Mapping[str, Sequence[Change]]) -> str:
    """Paired differences between models."""
    blocks = []
    for pair, entries in changes.items():
        rows = [(c.task, c.value, c.low, c.high, c.verdict) for c in entries if not c.reason]
        reach = max([0.05, *(max(abs(low), abs(high)) for _, _, low, high, _ in rows)])
        if rows:
            blocks.append(f"<h3>{to_text(pair)}</h3>{draw_forest(rows, zero=0, low=-reach, high=reach)}")
    return write_block(
        "What changed", "Paired differences on the same samples with 95 % intervals; right is better.", blocks
    )


def results_with(table: Results, section: str) -> Iterable[tuple[str, str, TaskResult, Mapping[str, Any]]]:
    """(task, model, result, numbers) of the results that have the section."""
    for task, by_model in table.items():
        for model, result in by_model.items():
            found = result.record.get("beyond", {}).get(section)
            if found and "reason" not in found:
                yield task, model, result, found


def models_of(table: Results) -> list[str]:
    """Names of the models, in the order they were met."""
    return list(dict.fromkeys(model for by_model in table.values() for model in by_model))


def write_block(title: str, note: str, blocks: Sequence[str]) -> str:
    """A section of HTML blocks; nothing where there are none."""
    if not blocks:
        return ""
    return f'<section><h2>{to_text(title)}</h2><p class="note">{to_text(note)}</p>{"".join(blocks)}</section>'


def rank_models(table: Results) -> tuple[RankComparison, list[str]]:
    """Models by their ranks over the tasks that all of them have, each by its own primary metric; and those tasks."""
    models = models_of(table)
    rows, tasks = [], []
    for task, by_model in table.items():
        name = next(iter(by_model.values())).record["primary"]
        values = [by_model[m].metrics[name]["value"] if m in by_model else None for m in models]
        if None not in values:
            sign = -1.0 if name.split("/")[-1] in LOWER_IS_BETTER else 1.0
            rows.append([sign * float(value) for value in values if value is not None])
            tasks.append(task)
    return compare_ranks(np.asarray(rows).reshape(len(rows), len(models)), models), tasks


def write_ranks(table: Results) -> str:
    """Mean ranks with Nemenyi's critical difference, for three or more models on two or more tasks."""
    found, tasks = rank_models(table)
    if len(found.mean_ranks) < 3 or found.reason:
        return ""
    chart = draw_ranks(found.mean_ranks, found.critical_difference, found.alike)
    note = (
        f"Ranks over {len(tasks)} tasks, each by its primary metric, 1 is best: {', '.join(tasks)}. Friedman's test: "
        f"chi-square {found.statistic:.2f}, p = {found.p:.3g}. Models on one bar are less than Nemenyi's critical "
        f"difference apart, {found.critical_difference:.2f} at 5 %, and are not told apart."
    )
    return write_block("Ranks", note, [chart])


def write_wise(table: Results) -> str:
    """The metric of each task along the line between two models."""
    blocks: dict[str, dict[str, list[tuple[float, float]]]] = {}
    remarks = []
    for task, model, _, found in results_with(table, "wise"):
        split = next(key for key in found["curve"][0] if key != "alpha")
        line = [(point["alpha"], point[split]) for point in found["curve"] if point[split] is not None]
        blocks.setdefault(f"{model}, from {found['start']}", {})[f"{task}, {name_metric(found['metric'])}"] = line
        chosen = found["chosen"]
        why = chosen.get("reason") or (f"alpha {chosen['hparams']['alpha']:g}, chosen on {chosen['split']}, "
                                       f"{round_value(chosen['value'])}")  # fmt: skip
        remarks.append(f"{task}: {why}")
    charts = [f"<h3>{to_text(title)}</h3>{draw_square(lines, x_label='alpha', y_label='metric', dots=True)}"
              for title, lines in blocks.items()]  # fmt: skip
    note = "0 is the model before training, 1 the model of the run (WiSE-FT). " + "; ".join(remarks)
    return write_block("Points between two models", note, charts)
