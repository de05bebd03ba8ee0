"""The folded end of the report: attribution, all metrics, prompts, provenance and the config.

Reads the same records as the sections above it. Attribution is complete for the articles whose figures were used, up
to a page's worth; where there are more, the page says in which file they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from biomedclip.evaluation.markup import Record, name_metric, write_measured
from biomedclip.page.gallery import article_link
from biomedclip.page.markup import link_to, to_text, write_table
from biomedclip.runs import CONFIG
from biomedclip.shards import DatasetFolder

_MAX_CREDITS = 200


def write_appendix(
    before: Mapping[str, Record], after: Mapping[str, Record], datasets: Sequence[DatasetFolder], run: str | Path | None
) -> str:
    """Folded: attribution, all metrics, prompts, provenance, config."""
    parts = [
        ("Licences and attribution", _credits(after, datasets)),
        ("All metrics", _all_metrics(before, after)),
        ("Prompts", _prompts(after)),
        ("Models, data and versions", _provenance(before, after)),
    ]
    config = Path(run) / CONFIG if run else None
    if config and config.exists():
        parts.append(("Config of the training run", f"<pre>{to_text(config.read_text(encoding='utf-8'))}</pre>"))
    blocks = [f"<details><summary>{name}</summary>{body}</details>" for name, body in parts if body]
    return f'<section id="appendix">\n<h2>Appendix</h2>\n{"".join(blocks)}\n</section>'


def _credits(after: Mapping[str, Record], datasets: Sequence[DatasetFolder]) -> str:
    rows = [
        (to_text(record["title"]), to_text(record["dataset"]["citation"]), to_text(record["dataset"]["licence"]))
        for record in after.values()
    ]
    html = write_table(("evaluated on", "source", "licence"), rows)
    for dataset in datasets:
        licences = ", ".join(f"{code} ({n:,})" for code, n in dataset.manifest["licences"].items())
        html += f"<h3>{to_text(dataset.manifest['name'])}</h3><p>{to_text(licences)}</p>"
        used = set(dataset.index["article_id"].to_pylist())
        articles = [article for article in dataset.articles.to_pylist() if article["article_id"] in used]
        credits = []
        for article in articles[:_MAX_CREDITS]:
            link, text = article_link(article)
            source = link_to(link, text) if link else to_text(article["article_id"])
            people = ", ".join((article["authors"] or [])[:3]) + (
                " et al." if len(article["authors"] or []) > 3 else ""
            )
            credits.append((to_text(article["title"]), to_text(people), source, to_text(article["licence"])))
        if credits:
            html += write_table(("article", "authors", "source", "licence"), credits)
        if len(articles) > len(credits):
            html += f"<p>{len(articles) - len(credits):,} more are in its articles.parquet.</p>"
    return html


def _all_metrics(before: Mapping[str, Record], after: Mapping[str, Record]) -> str:
    rows = []
    for task, record in after.items():
        old = before.get(task, {}).get("metrics", {})
        for name, entry in record["metrics"].items():
            reason = to_text(entry.get("reason", ""))
            first = write_measured(old[name], task, "before", name) if name in old else ""
            rows.append((to_text(record["title"]), to_text(name_metric(name)), first,
                         write_measured(entry, task, "after", name), reason))  # fmt: skip
    return write_table(("task", "metric", "before", "after", "why undefined"), rows)


def _prompts(after: Mapping[str, Record]) -> str:
    html = ""
    for record in after.values():
        if not record["prompts"]:
            continue
        mode = ", ".join(f"{key} {value}" for key, value in record["ensemble"].items())
        html += f"<h3>{to_text(record['title'])}</h3><p>Set {to_text(record['prompt_set'])}: "
        html += f"{to_text(record['prompt_source'])}. Ensemble: {to_text(mode)}.</p>"
        rows = [(to_text(label), "<br>".join(map(to_text, texts))) for label, texts in record["prompts"].items()]
        html += write_table(("class", "prompts"), rows)
    return html


def _provenance(before: Mapping[str, Record], after: Mapping[str, Record]) -> str:
    rows = []
    for stage, source in (("before", before), ("after", after)):
        for record in source.values():
            rows.append((
                stage, to_text(record["task"]), to_text(record["model"]["name"]),
                f'<span class="hash">{to_text(record["model"]["fingerprint"])}</span>',
                f'<span class="hash">{to_text(record["dataset"]["manifest_sha256"])}</span>',
                f"{record['model']['logit_scale']:.2f}", str(record["seed"]),
            ))  # fmt: skip
    html = write_table(("", "task", "model", "weights", "data", "logit scale", "seed"), rows)
    for record in list(after.values())[:1]:
        html += f"<p>{to_text(', '.join(f'{k} {v}' for k, v in record['versions'].items()))}</p>"
        if record["model"].get("preprocess"):  # given scores have none
            html += f"<p>{to_text(record['model']['preprocess'])}</p>"
    return html
