"""Counts as bars: a table whose rows are names, bars and numbers, and a histogram of few bins.

Reads plain counts; yields HTML and SVG that follow the page's colours. Bars of a table are HTML, because text in a
scaled picture cannot be read on a telephone; a histogram is a small SVG, because its bins stand side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from biomedclip.page.markup import to_text


@dataclass(frozen=True, slots=True)
class Bar:
    """One row: a name, a count, and where its bar begins as a share of the whole (a funnel's hang)."""

    name: str
    count: int
    css: str = "kept"
    start: float = 0.0
    sign: str = ""


def draw_bars(counts: Mapping[str, int], total: int, *, most: int = 12, css: str = "kept") -> str:
    """Bars of the `most` largest counts as shares of `total`, the rest in one row; a note where there are none."""
    ordered = sorted(((name, count) for name, count in counts.items() if count), key=lambda item: (-item[1], item[0]))
    if not ordered:
        return '<p class="note">None.</p>'
    shown = ordered[:most] if len(ordered) > most + 1 else ordered
    rows = [Bar(name, count, css) for name, count in shown]
    if len(shown) < len(ordered):
        rest = sum(count for _, count in ordered[most:])
        rows.append(Bar(f"{len(ordered) - most:,} others", rest, "seen"))
    return draw_rows(rows, total)


def draw_drops(seen: int, kept: int, dropped: Mapping[str, int]) -> str:
    """A funnel: seen, each reason by size, kept; each bar of a reason begins where the one before it ended."""
    rows, left = [Bar("seen", seen, "seen")], float(seen)
    for reason, count in sorted(dropped.items(), key=lambda item: (-item[1], item[0])):
        left -= count
        rows.append(Bar(reason.replace("_", " "), count, "dropped", start=left / seen if seen else 0.0, sign="−"))
    return draw_rows([*rows, Bar("kept", kept, "kept")], seen)


def draw_rows(rows: Iterable[Bar], total: int) -> str:
    """Rows as a table; widths are shares of `total`."""
    cells = []
    for row in rows:
        share = row.count / total if total else 0.0
        style = f"margin-left:{100 * row.start:.2f}%;width:{max(100 * share, 0.15):.2f}%"
        cells.append(
            f'<tr><th scope="row">{to_text(row.name)}</th>'
            f'<td class="track"><i class="{row.css}" style="{style}"></i></td>'
            f'<td class="number">{row.sign}{row.count:,}</td><td class="number share">{write_share(share)}</td></tr>'
        )
    return f'<table class="bars"><tbody>{"".join(cells)}</tbody></table>'


def write_share(share: float) -> str:
    """`12 %`, with a digit more where it would round to nothing or to all."""
    percent = 100 * share
    return f"{percent:.1f} %" if 0 < percent < 1 or 99 < percent < 100 else f"{percent:.0f} %"


def draw_histogram(
    counts: Sequence[int], names: Sequence[str], *, label: str, marks: Mapping[int, str] | None = None
) -> str:
    """Columns, one a bin; `names` stand under them, and a mark draws a line with its text before that bin."""
    width, height, top, bottom, step = 480, 190, 26, 38, 480 / max(len(counts), 1)
    most = max([*counts, 1])
    parts = []
    for place, (count, name) in enumerate(zip(counts, names, strict=True)):
        tall = (height - top - bottom) * count / most
        x = place * step
        if count:
            parts.append(
                f'<rect class="kept" x="{x + 1:.1f}" y="{height - bottom - max(tall, 1):.1f}" width="{step - 2:.1f}" '
                f'height="{max(tall, 1):.1f}" rx="1.5"><title>{to_text(name)}: {count:,}</title></rect>'
            )
        parts.append(f'<text x="{x + step / 2:.1f}" y="{height - 20}" text-anchor="middle">{to_text(name)}</text>')
    parts.append(f'<line class="axis" x1="0" x2="{width}" y1="{height - bottom}" y2="{height - bottom}"/>')
    for place, text in (marks or {}).items():
        x = place * step
        side = "end" if x > width * 0.6 else "start"
        parts.append(f'<line class="chance" x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{height - bottom}"/>')
        shift = -5 if side == "end" else 5
        parts.append(f'<text x="{x + shift:.1f}" y="15" text-anchor="{side}">{to_text(text)}</text>')
    parts.append(f'<text class="label" x="{width}" y="{height - 4}" text-anchor="end">{to_text(label)}</text>')
    spoken = to_text(f"{label}: " + ", ".join(f"{n} {c:,}" for n, c in zip(names, counts, strict=True)))
    return (
        f'<svg class="chart histogram" viewBox="0 0 {width} {height}" role="img" aria-label="{spoken}">'
        f"{''.join(parts)}</svg>"
    )
