"""The dataset card: README.md of a dataset folder, for readers and for the Hugging Face hub.

Reads the manifest and the articles; yields Markdown whose front matter names the tars of each split, so that
`datasets.load_dataset(folder)` finds them without a script and does not take the parquet indexes for data. Licences
and attribution are written from what the build knows, never by hand: a card that is generated cannot be forgotten.
The card says nothing of the time it was made, because the folder's bytes depend on config and input alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import yaml

from biomedclip.schema import SPLITS, Article
from data_builders.labels.summary import balance_lines, leakage_lines

MAX_ATTRIBUTION_ROWS = 1000
"""Articles listed in the card; more are a page nobody can open, and articles.parquet has them all."""

_HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_HUB_LICENCES = {
    "CC0": "cc0-1.0", "MIT": "mit", "Apache-2.0": "apache-2.0", "BSD-3-Clause": "bsd-3-clause", "PDDL": "pddl",
}  # fmt: skip
_HUB_CC = {
    "by-2.0", "by-2.5", "by-3.0", "by-4.0", "by-sa-3.0", "by-sa-4.0", "by-nd-4.0", "by-nc-2.0", "by-nc-3.0",
    "by-nc-4.0", "by-nc-sa-2.0", "by-nc-sa-3.0", "by-nc-sa-4.0", "by-nc-nd-3.0", "by-nc-nd-4.0",
}  # fmt: skip
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
          (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"))  # fmt: skip

CLINICAL_NOTICE = (
    "**For research only; not for clinical use.** The captions were written for readers of articles or compiled from "
    "labels, nobody has checked them as diagnoses, and a model trained on them must not inform the care of a patient."
)


def dataset_card(
    manifest: Mapping[str, Any],
    articles: Iterable[Article] = (),
    kept: Mapping[str, int] | None = None,
    *,
    unlisted: int = 0,
    licences: Iterable[tuple[str, str | None]] = (),
) -> str:
    """Markdown of a dataset's README.md.

    `articles` are those read, `kept` says how many samples each gave; an article without samples is not listed. Where
    there are too many to pass, `unlisted` counts those that have samples all the same, and `licences` are code and URL
    of theirs.
    """
    credited = [article for article in articles if (kept or {}).get(article.article_id)]
    credited.sort(key=lambda article: (article.pmcid, article.version))
    sections = [
        _front_matter(manifest, {(article.licence, article.licence_url) for article in credited} | set(licences)),
        f"# {manifest['name']}",
        _introduction(manifest),
        CLINICAL_NOTICE,
        *manifest["provenance"].get("notices", ()),
        _contents(manifest),
        _loading(manifest),
        _funnel(manifest["ledger"]),
        _labels(manifest["provenance"]),
        _licences(manifest),
        _attribution(credited, kept or {}, unlisted, manifest["provenance"].get("attribution", ())),
        _provenance(manifest["provenance"]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def hub_licence(code: str, url: str | None = None) -> str:
    """The Hugging Face hub's word for a licence; `cc` where a Creative Commons version is not stated or unknown there.

    The version is read from the licence's own URL, because a bare `CC BY` states none.
    """
    if code in _HUB_LICENCES:
        return _HUB_LICENCES[code]
    match = re.search(r"creativecommons\.org/licenses/([a-z-]+)/(\d\.\d)", url or "")
    if match and f"CC {match[1].upper()}" == code and f"{match[1]}-{match[2]}" in _HUB_CC:
        return f"cc-{match[1]}-{match[2]}"
    return "cc" if code.startswith("CC ") else "other"


def _front_matter(manifest: Mapping[str, Any], stated: Collection[tuple[str | None, str | None]]) -> str:
    shards = manifest["shards"]
    data_files = [
        {"split": _HUB_SPLITS[split], "path": [shard["name"] for shard in shards if shard["split"] == split]}
        for split in SPLITS
    ]
    licences = {hub_licence(code, url) for code, url in stated if code}
    licences |= {hub_licence(code) for code in manifest["licences"] if code not in {code for code, _ in stated}}
    languages = manifest["provenance"].get("config", {}).get("source", {}).get("languages", ["en"])
    facts = {
        "pretty_name": manifest["name"],
        "license": sorted(licences),
        **({"language": list(languages)} if languages else {}),
        "task_categories": ["image-to-text", "zero-shot-image-classification", "feature-extraction"],
        "tags": ["biology", "medical", "image-text", "webdataset", "biomedclip"],
        "size_categories": [next((name for limit, name in _SIZES if manifest["samples"] < limit), "n>100M")],
        "configs": [{"config_name": "default", "data_files": [entry for entry in data_files if entry["path"]]}],
    }
    return "---\n" + yaml.safe_dump(facts, sort_keys=False, allow_unicode=True) + "---"


def _introduction(manifest: Mapping[str, Any]) -> str:
    sources = ", ".join(f"{name} ({count:,})" for name, count in manifest["sources"].items())
    return (
        f"{manifest['samples']:,} images with captions from {sources}, built with biomedclip "
        f"{manifest['provenance'].get('biomedclip', '')}".rstrip()
        + ". Each sample is an image (`jpg`), a caption (`txt`) and its facts (`json`). The image is JPEG, PNG or "
        "WebP, the original bytes wherever every reader shows them alike; `image_format` in the json says which. The "
        "member is called `jpg` in each case, because `datasets` wants one name. An article, patient or "
        "field that the source names is in one split only."
    )


def _contents(manifest: Mapping[str, Any]) -> str:
    rows = []
    for split in SPLITS:
        shards = [shard for shard in manifest["shards"] if shard["split"] == split]
        if shards:
            size = sum(shard["bytes"] for shard in shards)
            rows.append((split, sum(shard["samples"] for shard in shards), len(shards), f"{size / 1e6:.1f}"))
    return "## Contents\n\n" + _table(("split", "samples", "shards", "MB"), rows)


def _loading(manifest: Mapping[str, Any]) -> str:
    first = manifest["shards"][0]["name"]
    return (
        "## Loading\n\n"
        "```python\n"
        "from datasets import load_dataset\n"
        'samples = load_dataset("path/of/this/folder", streaming=True)\n'
        f'samples = load_dataset("webdataset", data_files={{"train": "{first}"}}, streaming=True)\n'
        "```\n\n"
        f'`webdataset.WebDataset("{first}")` and open_clip\'s `--dataset-type webdataset` read the tars as they are; '
        "the parquet file beside each tar is its index (offsets, sizes, hashes, licence, labels), and `biomedclip` "
        "reads any sample by position through it."
    )


def _funnel(ledger: Mapping[str, Any]) -> str:
    rows = [("seen", ledger["seen"], ""), ("kept", ledger["kept"], _share(ledger["kept"], ledger["seen"]))]
    by_count = sorted(ledger["dropped"].items(), key=lambda entry: (-entry[1], entry[0]))
    rows += [(f"dropped: {reason}", count, _share(count, ledger["seen"])) for reason, count in by_count]
    return (
        "## What was seen and what was kept\n\n"
        + _table(("", "figures or images", "share"), rows)
        + "\n\n`ledger.parquet` has a row for each of them."
    )


def _labels(provenance: Mapping[str, Any]) -> str:
    """Classes of the training images, what their captions do to a batch, and what was found to leak."""
    balance, leakage = provenance.get("balance"), provenance.get("leakage")
    if not balance and not leakage:
        return ""
    parts = ["## Classes, captions and leakage"]
    if balance:
        after = balance["class_counts"]["after"]
        rows = [(name or "no label", count, balance["class_weights"][name], f"{after[name]:,.0f}")
                for name, count in balance["class_counts"]["before"].items()]  # fmt: skip
        parts.append(_table(("class (training images)", "images", f"weight ({balance['mode']})", "used"), rows))
        # Not the class line: the table says it.
        parts.append("\n".join(_item(line) for line in balance_lines(balance) if line.startswith("captions")))
    if leakage:
        parts.append("\n".join(map(_item, leakage_lines(leakage))))
        parts.append("`leakage.json` names the matches. Hashes do not recognise a picture that was turned or cropped.")
    return "\n\n".join(parts)


def _item(line: str) -> str:
    head, text = line.split(maxsplit=1)
    return f"- {head}: {text}"


def _licences(manifest: Mapping[str, Any]) -> str:
    rows = list(manifest["licences"].items())
    preset = manifest["provenance"].get("config", {}).get("licence")
    text = "## Licences\n\n" + _table(("licence", "samples"), rows)
    if preset:
        text += f"\n\nBuilt under the preset `{preset}`: a figure without a stated licence that it admits is not here."
    return text + " Each sample keeps its own licence (`licence` in its json and index row); credit it as below."


def _attribution(
    credited: Sequence[Article], kept: Mapping[str, int], unlisted: int, others: Iterable[Mapping[str, str]]
) -> str:
    parts = []
    if credited:
        rows = [
            (
                article.article_id, _shorten(article.title), article.authors[0] if article.authors else "",
                f"https://doi.org/{article.doi}" if article.doi else "", article.licence or "",
                article.licence_url or "", kept[article.article_id],
            )
            for article in credited[:MAX_ATTRIBUTION_ROWS]
        ]  # fmt: skip
        header = ("article", "title", "first author", "DOI", "licence", "licence text", "samples")
        parts.append(_table(header, rows))
        if more := len(credited) - len(rows) + unlisted:
            parts.append(f"{more:,} more articles are in `articles.parquet`.")
    sets = [tuple(row.get(column, "") for column in ("name", "citation", "licence", "url")) for row in others]
    if sets:
        parts.append(_table(("data set", "citation", "licence", "source"), sets))
    if not parts:
        return ""
    changes = "Changes: figures were taken out of their articles; see the flag `reencoded` for pictures stored anew."
    return "\n\n".join(["## Attribution", *parts, *([changes] if credited else [])])


def _provenance(provenance: Mapping[str, Any]) -> str:
    rows = [(key, f"`{provenance[key]}`") for key in ("config_sha256", "input_sha256") if key in provenance]
    if not rows:
        return ""
    return "## Provenance\n\n" + _table(("", ""), rows) + "\n\nThe whole config is in `manifest.json`."


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    # Titles come from XML that anybody may have written: no cell may end its row or open a tag.
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("<", "&lt;").replace(">", "&gt;")


def _shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""
