"""A forecast of a run as text for a terminal."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from biomedclip.training.preflight import Forecast, SourceForecast

_SHOWN = 12
"""Most classes, licences and modalities that are listed."""


def forecast_text(found: Forecast) -> str:
    """The forecast as a table of sources and lines about the whole."""
    table = Table(box=None, pad_edge=False)
    table.add_column("source")
    for name in ("samples", "share", "shown", "different", "epochs", "GB", "requests"):
        table.add_column(name, justify="right")
    for source in found.sources:
        table.add_row(
            source.name, f"{source.samples:,}", _share(source), f"{source.shown:,}",
            f"{source.distinct:,} ({source.distinct / source.samples:.0%})", _epochs(source),
            f"{source.bytes_read / 1e9:,.2f}", f"{source.requests:,}" if source.remote else "-",
        )  # fmt: skip
    console = Console(file=io.StringIO(), width=110, color_system=None, highlight=False)
    console.print(table)
    buffer = console.file
    text = buffer.getvalue() if isinstance(buffer, io.StringIO) else ""
    lines = [
        f"steps      {found.steps:,}, the same in each of {found.processes} processes: {found.per_process} of the "
        f"{found.batch_size} samples of each",
        f"shown      {found.shown:,} samples; {found.same_article_pct:.2f} % meet their own article in a batch, "
        f"{found.same_caption_pct:.2f} % their own caption",
        f"licences   {_list(found.licences_pct)}",
        f"modalities {_list(found.modalities_pct)}",
        *([f"labels     {_list(found.labels_pct)}"] if found.labels_pct else []),
        f"time       {_time(found)}",
        f"plan       {found.plan_sha256[:16]}",
    ]
    if found.walked_steps < found.steps:
        lines.append(f"           batches were looked at in {found.walked_steps:,} of the steps")
    lines += [f"not known  {notice}" for notice in found.notices]
    return text + "\n" + "\n".join(lines)


def _time(found: Forecast) -> str:
    if found.hours is None or found.samples_s is None:
        return "unknown; say a speed that you have measured: --samples-s 900"
    hours = f"{found.hours:,.1f} h" if found.hours >= 1 else f"{60 * found.hours:.1f} min"
    return f"{hours} at {found.samples_s:,.0f} samples/s"


def _share(source: SourceForecast) -> str:
    first, last = f"{source.share_first:.1%}", f"{source.share_last:.1%}"
    return first if first == last else f"{first} > {last}"


def _epochs(source: SourceForecast) -> str:
    mean, most = f"{source.epochs:.2f}", f"{source.most_epochs:.2f}"
    return mean if mean == most else f"{mean} (to {most})"


def _list(shares: dict[str, float]) -> str:
    shown = [f"{name} {share:.1f} %" for name, share in list(shares.items())[:_SHOWN]]
    left = len(shares) - len(shown)
    return ", ".join(shown + ([f"{left} more"] if left else [])) or "none"
