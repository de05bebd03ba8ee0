"""Sections of the report as HTML text, one function each, in reading order.

Reads result records, run and dataset folders; yields HTML in the forms of markup.py, which escapes what comes from
strangers: captions, titles, reasons and names. The reader meets the verdict first and the fine print last.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from biomedclip import __version__
from biomedclip.errors import DataError
from biomedclip.evaluation.markup import (
    Record,
    chance_of,
    interval_text,
    name_metric,
    round_value,
    write_measured,
    write_number,
)
from biomedclip.evaluation.results import TaskResult
from biomedclip.page.charts import collect_curves, draw_funnel, draw_interval, draw_lines
from biomedclip.page.gallery import find_thumbnails
from biomedclip.page.markup import shorten, to_text
from biomedclip.runs import DONE, read_facts, read_metrics
from biomedclip.shards import DatasetFolder

SHOWN_METRICS = {
    "zero_shot": ("balanced_accuracy", "auroc", "accuracy"),
    "retrieval": tuple(f"{way}/recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)),
}
"""Metrics of the headline table and of `report.summarise`; all others are in the appendix."""

LIMITS = (
    "For research only; not for clinical use. No number here says that a model is safe or useful for patients.",
    "Intervals say how far a figure would move with other samples of the same kind. They do not cover another "
    "hospital, scanner, stain or population, nor another random start of the training.",
    "Small test sets give wide intervals: read the interval, not the middle of it.",
)


def count_ledgers(datasets: Iterable[DatasetFolder]) -> dict[str, int]:
    """{seen, kept, dropped} over datasets. Raises DataError where they do not add up."""
    total = {"seen": 0, "kept": 0, "dropped": 0}
    for dataset in datasets:
        ledger = dataset.manifest["ledger"]
        dropped = sum(ledger["dropped"].values())
        if ledger["seen"] != ledger["kept"] + dropped:
            raise DataError(
                dataset.folder, "its ledger does not add up",
                found=f"{ledger['seen']} seen, {ledger['kept']} kept, {dropped} dropped", todo="build it again",
            )  # fmt: skip
        for key, value in (("seen", ledger["seen"]), ("kept", ledger["kept"]), ("dropped", dropped)):
            total[key] += value
    return total


def write_header(
    title: str, lede: str, run: str | Path | None, results: Sequence[TaskResult], extra: Mapping[str, str]
) -> str:
    """Title and the facts of the run."""
    facts: dict[str, str] = {}
    about = (read_facts(run) if run else None) or {}
    if about:
        facts["trained"] = str(about.get("started", ""))[:10]
        facts["seed"] = str(about.get("seed"))
        facts["commit"] = str(about.get("git_commit") or "")[:10]
        facts["machine"] = f"{about.get('machine', {}).get('cpus', '?')} CPU threads"
    done = _read_json(Path(run) / DONE) if run else {}
    if "seconds" in done:
        facts["training time"] = _duration(float(done["seconds"]))
    if results:
        record = results[0].record
        facts["weights"] = str(record["model"]["fingerprint"]).removeprefix("sha256:")[:10]
        facts["biomedclip"] = str(record["versions"].get("biomedclip", __version__))
        facts["torch"] = str(record["versions"].get("torch", ""))
    facts |= extra
    items = "".join(f"<div><dt>{to_text(k)}</dt><dd>{to_text(v)}</dd></div>" for k, v in facts.items() if v)
    text = f'<p class="lede">{to_text(lede)}</p>' if lede else ""
    return f'<header>\n<h1>{to_text(title)}</h1>{text}\n<dl class="facts">{items}</dl>\n</header>'


def write_tiles(before: Mapping[str, Record], after: Mapping[str, Record]) -> str:
    """One tile a task: the primary metric in large type."""
    tiles = []
    for task, record in after.items():
        name = record["primary"]
        entry, old = record["metrics"][name], before.get(task, {}).get("metrics", {}).get(name)
        chance = chance_of(record, name)
        facts = [f"before {write_number(old['value'], task, 'before', name)}"] if old else []
        facts += [f"chance {round_value(chance)}"] if chance is not None else []
        tiles.append(
            f'<section class="tile"><h2>{to_text(record["title"])}</h2>'
            f'<div class="value">{write_number(entry["value"], task, "after", name)}</div>'
            f'<div class="metric">{to_text(name_metric(name))} on {entry["n"]:,} held-out '
            f"{'images' if record['kind'] == 'zero_shot' else 'pairs'}</div>"
            f'<div class="from">95 % interval {interval_text(entry)}<br>{" · ".join(facts)}</div></section>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def write_headline(before: Mapping[str, Record], after: Mapping[str, Record]) -> str:
    """The before/after table, each row with its picture."""
    rows = []
    for task, record in after.items():
        data = record["dataset"]
        groups = f", {data['n_groups']:,} groups (by {data['group']})" if data["n_groups"] else ""
        count = f"{data['n']:,} samples of the {data['split']} split{groups}"
        title = f"{to_text(record['title'])}<span>{to_text(count)}</span>"
        rows.append(f'<tr class="task"><th colspan="6">{title}</th></tr>')
        names = [name for name in SHOWN_METRICS[record["kind"]] if name in record["metrics"]]
        old = before.get(task, {}).get("metrics", {})
        for name in names:
            entry, chance = record["metrics"][name], chance_of(record, name)
            css = ' class="primary"' if name == record["primary"] else ""
            first = f'<td class="number">{write_measured(old[name], task, "before", name)}</td>' if name in old else ""
            rows.append(
                f"<tr{css}><td>{to_text(name_metric(name))}</td>{first if before else ''}"
                f'<td class="number">{write_measured(entry, task, "after", name)}</td>'
                f'<td class="picture">{draw_interval(old.get(name), entry, chance)}</td>'
                f'<td class="number">{round_value(chance)}</td><td class="number">{entry["n"]:,}</td></tr>'
            )
    stages = ("before", "after") if before else ("value",)
    head = "".join(f'<th class="number">{stage}, 95 % interval</th>' for stage in stages)
    key = (
        '<p><span class="key"><svg width="12" height="12"><circle class="dot before" cx="6" cy="6" r="4.5"/></svg>'
        'before</span><span class="key"><svg width="12" height="12"><circle class="dot after" cx="6" cy="6" r="4.5"/>'
        '</svg>after</span><span class="key"><svg width="12" height="12"><line class="chance" x1="6" x2="6" y1="0" '
        'y2="12"/></svg>chance</span></p>'
    )
    shown = {name for names in SHOWN_METRICS.values() for name in names}
    entries = [entry for record in after.values() for name, entry in record["metrics"].items() if name in shown]
    methods = sorted({entry["ci_method"] for entry in entries})
    note = f"Axes run from 0 to 1. Intervals: {', '.join(methods)}; the primary metric of each task is in bold."
    return (
        f'<section id="results">\n<h2>Before and after</h2>\n{key if before else ""}<div class="wide"><table>'
        f'<thead><tr><th>metric</th>{head}<th class="picture">0 to 1</th><th class="number">chance</th>'
        f'<th class="number">n</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>\n'
        f'<p class="note">{to_text(note)}</p>\n</section>'
    )


def write_learning(run: str | Path | None) -> str:
    """Loss curves of the run; empty without one."""
    curves = collect_curves(read_metrics(run)) if run else {}
    # The total says how training went; its terms, where there are any, would crowd the picture.
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return ""
    shown = dict(list(curves.items())[:4])
    key = "".join(
        f'<span class="key"><span class="swatch line-{i}"></span>{to_text(name)}</span>' for i, name in enumerate(shown)
    )
    first, last = next(iter(shown.values()))[0], next(iter(shown.values()))[-1]
    note = f"{next(iter(shown))}: {first[1]:.3g} at step {first[0]:,.0f}, {last[1]:.3g} at step {last[0]:,.0f}."
    return (
        f'<section id="loss">\n<h2>How it learned</h2>\n<p>{key}</p>\n'
        f'{draw_lines(shown, x_label="step", y_label="loss")}\n<p class="note">{to_text(note)}</p>\n</section>'
    )


def write_confusions(before: Mapping[str, Record], after: Mapping[str, Record]) -> str:
    """Confusion tables side by side."""
    blocks = []
    for task, record in after.items():
        if "confusion" not in record:
            continue
        tables = [
            _confusion_table(stage, source[task])
            for stage, source in (("before", before), ("after", after))
            if task in source and "confusion" in source[task]
        ]
        blocks.append(f'<h3>{to_text(record["title"])}</h3><div class="pair">{"".join(tables)}</div>')
    if not blocks:
        return ""
    note = "Rows are true classes, columns predictions; shade and percentage are shares of the row."
    return (
        f'<section id="confusion">\n<h2>Where it is right and wrong</h2>\n<p class="note">{note}</p>'
        f"{''.join(blocks)}\n</section>"
    )


def _confusion_table(stage: str, record: Record) -> str:
    classes = record["dataset"]["classes"]
    head = "".join(f'<th scope="col">{to_text(name)}</th>' for name in classes)
    rows = []
    for name, counts in zip(classes, record["confusion"], strict=True):
        cells = []
        for count in counts:
            share = count / sum(counts) if sum(counts) else 0.0
            dark = ' class="dark"' if share > 0.7 else ""
            cells.append(f'<td{dark} style="--share:{share:.3f}">{count:,}<small>{share:.0%}</small></td>')
        rows.append(f'<tr><th scope="row">{to_text(name)}</th>{"".join(cells)}</tr>')
    return (
        f'<table class="confusion" data-task="{to_text(record["task"])}" data-stage="{stage}">'
        f"<caption>{stage}</caption><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def write_retrieved(after: Mapping[str, Record], datasets: Sequence[DatasetFolder]) -> str:
    """Held-out figures with the caption the model put first."""
    examples = [example for record in after.values() for example in record.get("examples", ())][:8]
    if not examples:
        return ""
    pictures = find_thumbnails(datasets, [example["sample_id"] for example in examples])
    rows = []
    for example in examples:
        picture = pictures.get(example["sample_id"])
        image = (
            f'<img alt="" src="{picture}">' if picture else f'<span class="hash">{to_text(example["sample_id"])}</span>'
        )
        verdict = '<span class="hit">right</span>' if example["hit"] else '<span class="miss">wrong</span>'
        rank = f"{example['rank']:g}"
        rows.append(
            f'<tr><td>{image}</td><td><div class="clip">{to_text(shorten(example["caption"]))}</div></td>'
            f'<td><div class="clip">{to_text(shorten(example["top_caption"]))}</div></td>'
            f'<td>{verdict}</td><td class="number">{rank}</td></tr>'
        )
    return (
        '<section id="retrieval">\n<h2>Which caption it would choose</h2>\n<p class="note">Held-out figures spread '
        "evenly over the set, not picked; rank is the place of the figure's own caption, ties counted half.</p>\n"
        '<div class="wide"><table class="retrieved"><thead><tr><th>figure</th><th>its caption</th><th>first choice '
        f'after training</th><th></th><th class="number">rank</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</div>\n</section>"
    )


def write_funnels(datasets: Sequence[DatasetFolder]) -> str:
    """One funnel a dataset: seen, dropped by reason, kept."""
    if not datasets:
        return ""
    total = count_ledgers(datasets)
    blocks = []
    for dataset in datasets:
        ledger = dataset.manifest["ledger"]
        dropped = sum(ledger["dropped"].values())
        sum_line = f"{ledger['seen']:,} seen = {ledger['kept']:,} kept + {dropped:,} dropped"
        blocks.append(
            f'<h3>{to_text(dataset.manifest["name"])}</h3><p class="note ledger" data-seen="{ledger["seen"]}" '
            f'data-kept="{ledger["kept"]}" data-dropped="{dropped}">{sum_line}</p>'
            f"{draw_funnel(ledger['seen'], ledger['kept'], ledger['dropped'])}"
        )
    return (
        '<section id="ledger">\n<h2>What was kept, and why the rest was not</h2>\n'
        f"<p>{total['seen']:,} figures and images were seen; {total['kept']:,} became samples and {total['dropped']:,} "
        f"were dropped, each with a reason in its ledger.</p>\n{''.join(blocks)}\n</section>"
    )


def write_limits(after: Sequence[TaskResult]) -> str:
    """What the numbers do not say, and every warning of the results."""
    warnings = [
        f"{result.record['title']}: {warning}"
        for result in after
        for warning in [*result.record["warnings"], result.record["dataset"]["contamination"]]
    ]
    for result in after:
        excluded = result.record["dataset"]["excluded"]
        if excluded["n"]:
            reasons = ", ".join(f"{reason} {n}" for reason, n in excluded["by_reason"].items())
            warnings.append(f"{result.record['title']}: {excluded['n']} excluded ({reasons})")
    items = "".join(f"<li>{to_text(line)}</li>" for line in (*LIMITS, *warnings))
    return f'<section id="limits">\n<h2>What this does not show</h2>\n<ul>{items}</ul>\n</section>'


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
