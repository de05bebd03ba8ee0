"""What a plan will cost, before anything is downloaded: articles, pictures, requests, bytes, hours, disk.

Counts come from the plan itself; the bucket's inventory and metadata state no sizes, so bytes and hours rest on the
`Rates`, each with a word on where it is from. They are guesses to decide by (a day or a month, one disk or ten), and
an estimate carries them along so that nobody takes it for a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from biomedclip.config import Config
from data_builders.pmc.plan import plan_facts


class Rates(Config):
    """What one article, picture or second is taken to hold. Replace those you have measured."""

    xml_bytes: float = Field(default=150_000, gt=0)
    picture_bytes: float = Field(default=140_000, gt=0)
    figures_per_article: float = Field(default=4.2, gt=0)
    pairs_per_picture: float = Field(default=1.0, gt=0, le=1)
    pair_overhead_bytes: float = Field(default=5_000, ge=0)
    requests_per_s: float = Field(default=3_000, gt=0)
    line_bytes_per_s: float = Field(default=125e6, gt=0)
    articles_per_core_s: float = Field(default=217, gt=0)
    pictures_per_core_s: float = Field(default=256, gt=0)
    requests_per_core_s: float = Field(default=2_000, gt=0)
    cores: int = Field(default=1, ge=1)


ORIGINS = {
    "xml_bytes": "assumed mean of PMC; eLife and PLOS articles are larger (181 kB measured)",
    "picture_bytes": "assumed mean of PMC's web-size JPEG",
    "figures_per_article": "assumed mean of PMC; used where the plan lists no pictures",
    "pairs_per_picture": "upper bound: every distinct picture is taken to be a figure that is kept",
    "pair_overhead_bytes": "assumed: caption, JSON, tar headers, index row",
    "requests_per_s": "assumed for one machine; S3 slows down near 5,500 a second and prefix",
    "line_bytes_per_s": "assumed: a line of 1 Gbit/s",
    "articles_per_core_s": "measured on a prototype: XML to figures, one core of an EPYC server",
    "pictures_per_core_s": "measured on a prototype: full decode, perceptual hash, sha256, tar; one core",
    "requests_per_core_s": "measured on loopback without TLS: 0.5 ms of CPU an object",
    "cores": "as asked for",
}
"""Rate -> where its default is from. None of them was measured on the live service."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The cost of a plan. Hours are those of the slower of line and cores, which work at the same time."""

    articles: int
    units: int
    pictures: int
    """Distinct pictures among the planned media: an upper bound of the figures."""
    requests: int
    download_bytes: int
    dataset_bytes: int
    disk_bytes: int
    """While it is built: the units' raw pairs and the finished shards exist at the same time."""
    network_hours: float
    cpu_hours: float
    """Of one core."""
    hours: float
    assumptions: tuple[str, ...]
    """Each rate used, its value and where that is from."""


def estimate_plan(plan: str | Path, rates: Rates | None = None) -> Estimate:
    """The estimate for a plan. Raises DataError where `plan` is none."""
    rates, facts = rates or Rates(), plan_facts(plan)
    pictures = facts.pictures or round(facts.planned * rates.figures_per_article)
    # The plan holds the metadata: one request for the XML and one a picture remain.
    requests = facts.planned + pictures
    download = facts.planned * rates.xml_bytes + pictures * rates.picture_bytes
    pairs = pictures * rates.pairs_per_picture
    dataset = pairs * (rates.picture_bytes + rates.pair_overhead_bytes)
    network_s = max(requests / rates.requests_per_s, download / rates.line_bytes_per_s)
    cpu_s = (
        facts.planned / rates.articles_per_core_s
        + pictures / rates.pictures_per_core_s
        + requests / rates.requests_per_core_s
    )
    return Estimate(
        articles=facts.planned,
        units=facts.units,
        pictures=pictures,
        requests=requests,
        download_bytes=round(download),
        dataset_bytes=round(dataset),
        disk_bytes=round(2 * dataset),
        network_hours=network_s / 3600,
        cpu_hours=cpu_s / 3600,
        hours=max(network_s, cpu_s / rates.cores) / 3600,
        assumptions=_list_assumptions(rates, facts.pictures),
    )


def _list_assumptions(rates: Rates, listed_pictures: int) -> tuple[str, ...]:
    defaults = Rates()
    lines = []
    for name, origin in ORIGINS.items():
        if name == "figures_per_article" and listed_pictures:
            continue
        value = getattr(rates, name)
        lines.append(f"{name} {value:g}: {origin if value == getattr(defaults, name) else 'given by you'}")
    return tuple(lines)
