"""Charts of the evaluation overview as SVG text: curves in a square, forests of intervals, boxes of draws.

Like `biomedclip.page.charts`, whose colours and classes they use: no script, no font, every label escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
COLOURS = ("var(--accent)", "var(--drop)", "var(--hit)", "var(--before)", "var(--ink)")
_PAD, _SIDE = 58, 220


def draw_square(
    series: Mapping[str, Points], *, x_label: str, y_label: str, x_max: float = 1.0, diagonal: bool = False,
    dots: bool = False, ticks: Sequence[float] | None = None,
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
) -> str:  # fmt: skip
    """Lines over x from 0 to `x_max` and y from 0 to 1, one colour a series, the key underneath.

    `bands` {series: (x, low, high)} are shaded behind its line.
    """

    def x(value: float) -> float:
        return round(_PAD + _SIDE * value / x_max, 1)

    def y(value: float) -> float:
        return round(10 + _SIDE * (1 - min(max(value, 0.0), 1.0)), 1)

    marks = []
    for step in (0, 0.25, 0.5, 0.75, 1):
        marks.append(f'<line class="grid" x1="{x(0)}" x2="{x(x_max)}" y1="{y(step)}" y2="{y(step)}"/>')
        marks.append(f'<text x="{_PAD - 6}" y="{y(step) + 4}" text-anchor="end">{step:g}</text>')
    for step in ticks or [x_max * k / 4 for k in range(5)]:
        marks.append(f'<text x="{x(step)}" y="{y(0) + 16}" text-anchor="middle">{step:g}</text>')
    if diagonal:
        marks.append(f'<line class="chance" x1="{x(0)}" y1="{y(0)}" x2="{x(x_max)}" y2="{y(1)}"/>')
    key = []
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        if band := (bands or {}).get(name):
            edge = [(a, high) for a, _, high in band] + [(a, low) for a, low, _ in reversed(band)]
            marks.append(f'<polygon points="{" ".join(f"{x(a)},{y(b)}" for a, b in edge)}" '
                         f'style="fill:{colour};opacity:0.15"/>')  # fmt: skip
        path = " ".join(f"{x(a)},{y(b)}" for a, b in points)
        marks.append(f'<polyline points="{path}" style="fill:none;stroke:{colour};stroke-width:2"/>')
        if dots:
            marks += [f'<circle cx="{x(a)}" cy="{y(b)}" r="3.5" style="fill:{colour}"/>' for a, b in points]
        key.append(f'<span class="key"><svg width="14" height="10"><rect width="14" height="4" y="3" '
                   f'style="fill:{colour}"/></svg>{escape(name)}</span>')  # fmt: skip
    marks.append(f'<text x="{x(x_max / 2)}" y="{y(0) + 34}" text-anchor="middle">{escape(x_label)}</text>')
    marks.append(f'<text x="12" y="{y(0.5)}" text-anchor="middle" transform="rotate(-90 12 {y(0.5)})">'
                 f"{escape(y_label)}</text>")  # fmt: skip
    width, height = _PAD + _SIDE + 16, _SIDE + 52
    return (
        f'<div><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(y_label + " by " + x_label, quote=True)}">{"".join(marks)}</svg>'
        f"<div>{''.join(key)}</div></div>"
    )


def draw_forest(rows: Sequence[tuple[str, float, float, float, str]], *, zero: float, low: float, high: float) -> str:
    """Rows (name, value, low, high, remark) as dots with whiskers between `low` and `high`, `zero` dashed."""
    left, right, step = 230, 600, 28
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return round(left + (right - left) * min(max((value - low) / span, 0.0), 1.0), 1)

    bottom = len(rows) * step + 8
    marks = [f'<line class="chance" x1="{x(zero)}" x2="{x(zero)}" y1="2" y2="{bottom}"/>']
    for number, (name, value, start, end, remark) in enumerate(rows):
        y = number * step + 18
        marks.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        marks.append(f'<line class="whisker after" x1="{x(start)}" x2="{x(end)}" y1="{y}" y2="{y}"/>')
        marks.append(f'<circle class="dot after" cx="{x(value)}" cy="{y}" r="4.5"/>')
        marks.append(f'<text x="{right + 12}" y="{y + 4}">{escape(remark)}</text>')
    for value in (low, zero, high):
        marks.append(f'<text x="{x(value)}" y="{bottom + 14}" text-anchor="middle">{value:+.2f}</text>')
    return (
        f'<svg class="chart" viewBox="0 0 860 {bottom + 22}" role="img" aria-label="differences with intervals">'
        f"{''.join(marks)}</svg>"
    )


def draw_ranks(ranks: Mapping[str, float], critical: float, alike: Sequence[Sequence[str]]) -> str:
    """Mean ranks on a line from 1 to the number of models, the critical difference above it, a bar under models that
    are not told apart (Demsar's diagram)."""
    left, right, top = 60, 800, 56

    def x(rank: float) -> float:
        return round(left + (right - left) * (rank - 1) / max(1, len(ranks) - 1), 1)

    marks = [f'<line class="grid" x1="{left}" x2="{right}" y1="{top}" y2="{top}"/>']
    for rank in range(1, len(ranks) + 1):
        marks.append(f'<line class="grid" x1="{x(rank)}" x2="{x(rank)}" y1="{top - 5}" y2="{top + 5}"/>')
        marks.append(f'<text x="{x(rank)}" y="{top - 10}" text-anchor="middle">{rank}</text>')
    end = min(1 + critical, float(len(ranks)))
    marks.append(f'<line x1="{x(1)}" x2="{x(end)}" y1="18" y2="18" style="stroke:var(--ink);stroke-width:2"/>')
    beyond = "" if 1 + critical <= len(ranks) else ", more than the line is long"
    marks.append(f'<text x="{x(1)}" y="12">critical difference {critical:.2f}{beyond}</text>')
    for number, group in enumerate(alike):
        ends = [ranks[name] for name in group]
        at_y = top + 12 + 8 * number
        marks.append(f'<line x1="{x(min(ends)) - 4}" x2="{x(max(ends)) + 4}" y1="{at_y}" y2="{at_y}" '
                     f'style="stroke:var(--accent);stroke-width:4"/>')  # fmt: skip
    base = top + 30 + 8 * len(alike)
    for number, (name, mean) in enumerate(sorted(ranks.items(), key=lambda item: item[1])):
        y, at = base + 22 * number, x(mean)
        marks.append(f'<circle class="dot after" cx="{at}" cy="{top}" r="4.5"/>')
        marks.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{top}" y2="{y - 4}"/>')
        side, shift = ("start", 6) if at < (left + right) / 2 else ("end", -6)
        marks.append(f'<text x="{at + shift}" y="{y}" text-anchor="{side}">{escape(name)}, {mean:.2f}</text>')
    bottom = base + 22 * len(ranks)
    return (f'<svg class="chart" viewBox="0 0 860 {bottom}" role="img" aria-label="mean ranks of models">'
            f"{''.join(marks)}</svg>")  # fmt: skip


def draw_boxes(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Boxes of (name, {min, q1, median, q3, max}) on an axis from 0 to 1."""
    left, right, step = 230, 820, 34

    def x(value: float) -> float:
        return round(left + (right - left) * value, 1)

    bottom = len(rows) * step + 6
    marks = [f'<line class="grid" x1="{x(t)}" x2="{x(t)}" y1="0" y2="{bottom}"/>' for t in (0, 0.25, 0.5, 0.75, 1)]
    marks += [f'<text x="{x(t)}" y="{bottom + 14}" text-anchor="middle">{t:g}</text>' for t in (0, 0.25, 0.5, 0.75, 1)]
    for number, (name, box) in enumerate(rows):
        y = number * step + 20
        marks.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        marks.append(f'<line class="whisker after" x1="{x(box["min"])}" x2="{x(box["max"])}" y1="{y}" y2="{y}"/>')
        wide = max(1.0, x(box["q3"]) - x(box["q1"]))
        marks.append(f'<rect x="{x(box["q1"])}" y="{y - 8}" width="{wide:.1f}" height="16" '
                     f'style="fill:var(--accent-soft);stroke:var(--accent)"/>')  # fmt: skip
        marks.append(f'<line x1="{x(box["median"])}" x2="{x(box["median"])}" y1="{y - 8}" y2="{y + 8}" '
                     f'style="stroke:var(--ink);stroke-width:2"/>')  # fmt: skip
    return f'<svg class="chart" viewBox="0 0 860 {bottom + 22}" role="img" aria-label="draws">{"".join(marks)}</svg>'
