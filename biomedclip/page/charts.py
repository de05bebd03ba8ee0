"""Charts of pages as SVG text: intervals, loss curves and funnels, drawn by hand.

Reads plain numbers; yields SVG strings whose colours are the page's own CSS variables, so a chart follows the light
or dark theme, prints sharp, needs no script and weighs a kilobyte. Every label is escaped here. A plotting library
would bring fonts and fixed colours and ten times the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Points = list[tuple[float, float]]


def draw_interval(
    before: Mapping[str, Any] | None, after: Mapping[str, Any], chance: float | None, *, top: float = 1.0
) -> str:
    """One row's picture on an axis from 0 to `top`: before (hollow) and after (filled) with whiskers, chance dashed."""
    width, height, pad = 240, 34, 6

    def x(value: float) -> float:
        return round(pad + (width - 2 * pad) * min(max(value / top, 0.0), 1.0), 1)

    marks = [f'<line class="axis" x1="{pad}" x2="{width - pad}" y1="17" y2="17"/>']
    for step in range(5):
        marks.append(f'<line class="axis" x1="{x(top * step / 4)}" x2="{x(top * step / 4)}" y1="14" y2="20"/>')
    if chance is not None:
        marks.append(f'<line class="chance" x1="{x(chance)}" x2="{x(chance)}" y1="3" y2="31"/>')
    rows = [("before", before, 11), ("after", after, 23)] if before else [("after", after, 17)]
    spoken = []
    for name, entry, y in rows:
        if entry is None or entry["value"] is None:
            continue
        if entry["ci_low"] is not None:
            low, high = x(entry["ci_low"]), x(entry["ci_high"])
            marks.append(f'<line class="whisker {name}" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>')
        marks.append(f'<circle class="dot {name}" cx="{x(entry["value"])}" cy="{y}" r="4.5"/>')
        spoken.append(f"{name} {entry['value']:.3f}")
    label = escape(", ".join(spoken) + (f", chance {chance:.3f}" if chance is not None else ""), quote=True)
    return (
        f'<svg class="interval" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{label}">{"".join(marks)}</svg>'
    )


def draw_lines(series: Mapping[str, Points], *, x_label: str, y_label: str) -> str:
    """A line chart; the first series is drawn faint with its running mean on top, the others as they are."""
    width, height, left, right, top, bottom = 760, 260, 48, 12, 12, 40
    everything = [point for points in series.values() for point in points]
    x_ticks = _ticks(min(p[0] for p in everything), max(p[0] for p in everything))
    y_ticks = _ticks(min(p[1] for p in everything), max(p[1] for p in everything))
    x_low, x_high = min(p[0] for p in everything), max(max(p[0] for p in everything), x_ticks[-1])
    y_low, y_high = min(y_ticks[0], min(p[1] for p in everything)), max(y_ticks[-1], max(p[1] for p in everything))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - x_low) / ((x_high - x_low) or 1)
        up = (point[1] - y_low) / ((y_high - y_low) or 1)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    parts = []
    for tick in y_ticks:
        _, y = place((x_low, tick))
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{_tick_text(tick)}</text>')
    for tick in x_ticks:
        if tick < x_low:
            continue
        x, _ = place((tick, y_low))
        parts.append(f'<text x="{x:.1f}" y="{height - 20}" text-anchor="middle">{_tick_text(tick)}</text>')
    parts.append(f'<text class="label" x="{width - right}" y="{height - 2}" text-anchor="end">{escape(x_label)}</text>')
    for number, points in enumerate(series.values()):
        if number == 0 and len(points) > 20:
            parts.append(_polyline(map(place, points), "line-0 faint"))
            points = _running_mean(points, max(3, len(points) // 25))
        parts.append(_polyline(map(place, points), f"line-{number % 4}"))
    label = escape(f"{y_label} against {x_label}", quote=True)
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def collect_curves(rows: Sequence[Mapping[str, float | None]], contains: str = "loss") -> dict[str, Points]:
    """{column: (step, value) points} of the metric columns whose name contains a word; training first.

    `rows` are those of a run's metrics.csv (biomedclip.runs.read_metrics); cells that are empty or not finite are
    left out, and so is a column without any number.
    """
    curves: dict[str, Points] = {}
    for number, row in enumerate(rows):
        step = row.get("step")
        for name, value in row.items():
            if contains in name.lower() and value is not None and math.isfinite(value):
                curves.setdefault(name, []).append((float(number) if step is None else step, value))
    return dict(sorted(curves.items(), key=lambda item: (not item[0].lower().startswith("train"), item[0])))


def draw_funnel(seen: int, kept: int, dropped: Mapping[str, int]) -> str:
    """Rows of bars: seen, each reason by size, kept; lengths are shares of what was seen."""
    ordered = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    rows = [
        ("seen", seen, "seen"),
        *((reason.replace("_", " "), count, "dropped") for reason, count in ordered),
        ("kept", kept, "kept"),
    ]
    height = 24 * len(rows)
    parts, start = [], 0.0
    for position, (name, count, kind) in enumerate(rows):
        share = count / seen if seen else 0.0
        # Dropped bars hang from where the bars before them ended, so that what is left at the end is what was kept.
        x = 200 + 440 * (1 - start - share) if kind == "dropped" else 200.0
        start += share if kind == "dropped" else 0.0
        y = position * 24
        sign = "−" if kind == "dropped" else ""
        parts.append(f'<text x="190" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y + 4}" width="{max(440 * share, 1):.1f}" height="15" rx="2"/>'
        )
        parts.append(f'<text class="count" x="700" y="{y + 15}" text-anchor="end">{sign}{count:,}</text>')
    label = escape(f"{seen} seen, {kept} kept, {sum(dropped.values())} dropped", quote=True)
    return (
        f'<svg class="chart funnel" viewBox="0 0 704 {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def _polyline(points: Any, css: str) -> str:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{css}" points="{text}"/>'


def _running_mean(points: Points, width: int) -> Points:
    """Centred mean over up to `width` neighbours, fewer at the ends."""
    half = width // 2
    means = []
    for i in range(len(points)):
        near = points[max(0, i - half) : i + half + 1]
        means.append((points[i][0], sum(value for _, value in near) / len(near)))
    return means


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) that enclose the upper end."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.floor(low / step)
    return [round((first + i) * step, 10) for i in range(math.ceil(high / step) - first + 1)]


def _tick_text(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"
