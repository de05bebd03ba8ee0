"""A dataset folder or a folder of units as one page: what was seen, what was kept, and what the samples are like.

Reads a `Survey` and the few samples it chose; writes one HTML file that opens offline (`biomedclip.page`). The reader
meets the funnel first, then licences, because these two decide whether the set may be used at all; pictures come last,
each with its licence and article. Nothing depends on time or machine: the same folder gives the same page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from biomedclip.page import write_page
from biomedclip.page.bars import draw_bars, draw_drops, draw_histogram, write_share
from biomedclip.page.gallery import SampleFigure, describe_article, write_gallery
from biomedclip.page.markup import to_text, write_table
from biomedclip.shards import DatasetFolder
from data_builders.labels.summary import leakage_lines
from data_builders.survey import ASPECTS, SHORTER_SIDE_PX, TOKENS, WORDS, Chosen, Survey, survey_folder
from data_builders.units import read_image

_NOTE = "For research only; not for clinical use."
_MOST_UNITS = 200


def write_data_report(folder: str | Path, path: str | Path, *, samples: int = 24, seed: int = 0) -> Survey:
    """Write the page of a folder to `path` and return the numbers it shows.

    Raises DataError where the folder is neither a finished dataset nor a folder of units, or its counts do not add up.
    """
    folder = Path(folder)
    survey = survey_folder(folder, samples=samples, seed=seed)
    figures = [_figure(folder, survey, chosen) for chosen in survey.chosen]
    note = f"{len(figures)} samples chosen by a hash of their keys, seed {seed}; captions are shortened."
    sections = [
        _header(survey), _tiles(survey), _funnel(survey), _units(survey), _licences(survey), _origin(survey),
        _content(survey), _pictures(survey), _captions(survey), _articles(survey), _doubts(survey),
        write_gallery(figures, "A random look", note),
    ]  # fmt: skip
    write_page(path, f"{survey.name}: what it holds", sections, footer=_NOTE)
    return survey


def _header(survey: Survey) -> str:
    kind = "A dataset folder" if survey.kind == "dataset" else "A folder of units, before selection"
    preset = survey.provenance.get("config", {}).get("licence")
    facts = [("built by", f"biomedclip {survey.provenance['biomedclip']}")] if "biomedclip" in survey.provenance else []
    facts += [("licence preset", preset)] if preset else []
    facts += [(name, survey.provenance[name][:12]) for name in ("config_sha256", "input_sha256") if
              name in survey.provenance]  # fmt: skip
    terms = "".join(f"<div><dt>{to_text(name)}</dt><dd>{to_text(value)}</dd></div>" for name, value in facts)
    return (
        f'<header><h1>{to_text(survey.name)}</h1><p class="lede">{kind}: {survey.kept:,} images with captions out of '
        f'{survey.seen:,} figures and images seen.</p><dl class="facts">{terms}</dl></header>'
    )


def _tiles(survey: Survey) -> str:
    free = survey.counts["licence_class"]["commercial-derivatives"]
    tiles = [
        ("samples", f"{survey.kept:,}", f"{write_share(_share(survey.kept, survey.seen))} of what was seen"),
        ("pictures", _bytes(survey.image_bytes), f"{_bytes(survey.image_bytes / max(survey.kept, 1))} each"),
        ("articles", f"{survey.articles_kept:,}", f"with samples, of {survey.articles_read:,} read")
        if survey.articles_read
        else ("labels", f"{len(survey.counts['labels']):,}", "different ones, on all samples together"),
        ("open licences", write_share(_share(free, survey.kept)), "class commercial-derivatives"),
    ]
    blocks = "".join(
        f'<div class="tile"><h2>{to_text(name)}</h2><div class="value">{to_text(value)}</div>'
        f'<div class="from">{to_text(note)}</div></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles small">{blocks}</div>'


def _funnel(survey: Survey) -> str:
    dropped = sum(survey.dropped.values())
    line = f"{survey.seen:,} seen = {survey.kept:,} kept + {dropped:,} dropped"
    data = f'data-seen="{survey.seen}" data-kept="{survey.kept}" data-dropped="{dropped}"'
    bars = draw_drops(survey.seen, survey.kept, survey.dropped)
    heading = "What was kept, and why the rest was not"
    return _section("ledger", heading, f'<p class="note ledger" {data}>{line}</p>{bars}')


def _units(survey: Survey) -> str:
    """Reasons by unit: a unit that differs from the others was harvested on a bad day."""
    if not survey.units:
        return ""
    reasons = [reason for reason, _ in sorted(survey.dropped.items(), key=lambda item: (-item[1], item[0]))]
    rows = [
        (to_text(name), f"{kept + sum(dropped.values()):,}", f"{kept:,}", *(f"{dropped[r]:,}" for r in reasons))
        for name, kept, dropped in survey.units[:_MOST_UNITS]
    ]
    left = len(survey.units) - len(rows)
    note = f'<p class="note">{left:,} more units are not listed.</p>' if left else ""
    return _section("units", "Reasons by unit", write_table(("unit", "seen", "kept", *reasons), rows) + note)


def _licences(survey: Survey) -> str:
    charts = [
        ("Licences", _named(survey.counts["licence"], "not stated"), "kept"),
        ("Classes", _named(survey.counts["licence_class"], "none"), "kept"),
    ]
    return _section("licences", "Licences", _bars_side_by_side(charts, survey.kept))


def _origin(survey: Survey) -> str:
    charts = [("Sources", survey.counts["source"], "kept"), ("Splits", survey.counts["split"], "kept")]
    note = ""
    if survey.kind == "units":
        note = '<p class="note">Splits of units are those of their source; a selection may change them.</p>'
    return _section("origin", "Sources and splits", note + _bars_side_by_side(charts, survey.kept))


def _content(survey: Survey) -> str:
    charts = [
        ("Modalities", _named(survey.counts["modality"], "not named"), "kept"),
        ("Concepts in captions", _spaced(survey.counts["concepts"]), "kept"),
    ]
    if survey.counts["labels"]:
        charts.append(("Labels", survey.counts["labels"], "kept"))
    note = (
        '<p class="note">Modalities and concepts come from the words of captions, or from a set\'s recipe; a caption '
        "may name several concepts, or none.</p>"
    )
    return _section("content", "What is shown", note + _bars_side_by_side(charts, survey.kept))


def _pictures(survey: Survey) -> str:
    sides, aspects = survey.histograms["shorter_side"].tolist(), survey.histograms["aspect"].tolist()
    parts = [
        ("Shorter side", draw_histogram(sides, _edge_names(SHORTER_SIDE_PX), label="pixels, from")),
        ("Aspect", draw_histogram(aspects, _edge_names(ASPECTS), label="width by height, from")),
        ("Formats", draw_bars(survey.counts["image_format"], survey.kept)),
    ]
    small = int(sum(sides[: SHORTER_SIDE_PX.index(224)]))
    note = f"{small:,} pictures ({write_share(_share(small, survey.kept))}) have a shorter side below 224 pixels."
    return _section("pictures", "Pictures", f'<p class="note">{note}</p>' + _side_by_side(parts))


def _captions(survey: Survey) -> str:
    marks = {TOKENS.index(76): "77", TOKENS.index(255): "256"}
    words, tokens = survey.histograms["words"].tolist(), survey.histograms["tokens"].tolist()
    parts = [
        ("Words", draw_histogram(words, _edge_names(WORDS), label="words, from")),
        ("CLIP tokens", draw_histogram(tokens, _edge_names(TOKENS), label="tokens, from", marks=marks)),
    ]
    known = survey.tokens_known
    note = (
        f"{write_share(_share(survey.beyond_77, known))} of captions are cut by a context of 77 tokens "
        f"({survey.beyond_77:,} of {known:,}), {write_share(_share(survey.beyond_256, known))} by one of 256 "
        f"({survey.beyond_256:,}); two tokens of a context are its marks."
    )
    if survey.words_counted < survey.kept:
        note += f" Words are those of {survey.words_counted:,} captions chosen by hash."
    return _section("captions", "Captions", f'<p class="note">{note}</p>' + _side_by_side(parts))


def _articles(survey: Survey) -> str:
    if not survey.articles_read:
        return ""
    years = {year: count for year, count in survey.years.items() if year}
    names = [str(year) for year in range(int(min(years)), int(max(years)) + 1)] if years else []
    names = names[-24:]  # older articles are few; they stand in the first column
    counts = [years.get(name, 0) for name in names]
    if names:
        counts[0] += sum(count for year, count in years.items() if year < names[0])
    shown = [name if place % 4 == 0 or len(names) < 10 else "" for place, name in enumerate(names)]
    chart = draw_histogram(counts, shown, label="year of publication") if names else '<p class="note">No dates.</p>'
    undated = f" {survey.years['']:,} state no date." if survey.years[""] else ""
    note = (
        f'<p class="note">{survey.articles_read:,} articles were read, {survey.articles_kept:,} gave samples.{undated}'
    )
    parts = [("Years", chart), ("Journals", draw_bars(_named(survey.journals, "not stated"), survey.articles_read))]
    return _section("articles", "Articles", note + "</p>" + _side_by_side(parts))


def _doubts(survey: Survey) -> str:
    parts = [("Flags", draw_bars(_spaced(survey.counts["flags"]), survey.kept, css="seen"))]
    sizes = survey.cluster_sizes
    members = sum(size * count for size, count in sizes.items())
    if members:
        bars = {f"clusters of {size}": count for size, count in sizes.items()}
        text = f"{members:,} samples are in {sum(sizes.values()):,} clusters of duplicates."
        parts.append(("Duplicates", f'<p class="note">{text}</p>' + draw_bars(bars, sum(sizes.values()), css="seen")))
    else:
        parts.append(("Duplicates", '<p class="note">No clusters are recorded among the samples.</p>'))
    parts.append(("Contamination", _contamination(survey.provenance)))
    if survey.withdrawn:
        count = len(survey.withdrawn)
        text = f"{count:,} samples were taken back; readers pass over them, the counts of this page do not."
        bars_of = draw_bars(survey.tombstones, survey.kept, css="dropped")
        parts.append(("Tombstones", f'<p class="note">{text}</p>{bars_of}'))
    else:
        parts.append(("Tombstones", '<p class="note">None: nothing was taken back.</p>'))
    return _section("doubts", "What to keep in mind", _side_by_side(parts))


def _contamination(provenance: Mapping[str, Any]) -> str:
    """What a build or a selection recorded of evaluation sets that its pictures show."""
    lines = [" ".join(line.split()) for line in leakage_lines(provenance["leakage"])] if "leakage" in provenance else []
    selection = provenance.get("selection", {})
    for name, found in selection.get("contamination", {}).items():
        lines.append(f"{found['pairs']:,} pairs show one of {found['samples']:,} samples of {name}")
    against = provenance.get("config", {}).get("select", {}).get("against", ())
    if against and not selection.get("contamination"):
        lines.append(f"compared with {len(against)} evaluation sets: nothing found")
    if not lines:
        return '<p class="note">Not looked for: no evaluation set was compared with.</p>'
    return "<ul>" + "".join(f"<li>{to_text(line)}</li>" for line in lines) + "</ul>"


def _figure(folder: Path, survey: Survey, chosen: Chosen) -> SampleFigure:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    (row,) = pq.read_table(chosen.path, filters=pc.field("key") == chosen.key).to_pylist()
    if survey.kind == "units":
        articles, image, caption = chosen.path.with_name(f"{row['unit']}.articles.parquet"), None, row["caption"]
        image = read_image(folder, row)
    else:
        sample = DatasetFolder(folder).read(row)
        articles, image, caption = folder / "articles.parquet", sample.image, sample.caption
    found = pq.read_table(articles, filters=pc.field("article_id") == row["article_id"]).to_pylist()
    return describe_article(row, image, caption, found[0] if found else {})


def _section(name: str, heading: str, html: str) -> str:
    return f'<section id="{name}">\n<h2>{to_text(heading)}</h2>\n{html}\n</section>'


def _bars_side_by_side(charts: Iterable[tuple[str, Mapping[str, int], str]], total: int) -> str:
    return _side_by_side([(name, draw_bars(counts, total, css=css)) for name, counts, css in charts])


def _side_by_side(parts: Sequence[tuple[str, str]]) -> str:
    blocks = "".join(f"<div><h3>{to_text(name)}</h3>{html}</div>" for name, html in parts)
    return f'<div class="twin">{blocks}</div>'


def _named(counts: Mapping[str, int], nothing: str) -> dict[str, int]:
    """The counts with a name for what is null."""
    return {name or nothing: count for name, count in counts.items()}


def _spaced(counts: Mapping[str, int]) -> dict[str, int]:
    return {name.replace("_", " "): count for name, count in counts.items()}


def _edge_names(edges: Sequence[float]) -> list[str]:
    return [f"{edge:g}" for edge in edges]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _bytes(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 1e3:,.0f} kB"
