"""The rules that make a plan: a few numeric columns of all article versions in, one verdict a row out.

Reads the narrow columns of an article table, 8 million rows at a time, and decides with numpy on all of them at once:
which version of an article, which article of a DOI, licence, dates, sample. A rule excludes only rows that are still
in, so each excluded row has exactly one reason, the first that applies.
"""

from __future__ import annotations

import calendar
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from biomedclip.config import Config
from biomedclip.errors import DataError
from biomedclip.licences import is_allowed
from data_builders.pmc.licences import normalise_code

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

REASONS = (
    "superseded_version", "duplicate_doi", "not_asked_for", "retracted", "no_licence", "licence_not_allowed",
    "no_media", "no_date", "out_of_dates", "not_sampled", "beyond_limit",
)  # fmt: skip
"""Why a usable record is not planned, in the order in which it is asked; the first that applies is counted."""

_NARROW = ("pmcid", "version", "licence", "is_retracted", "is_manuscript", "published", "doi_key", "num_media",
           "num_pictures", "reason")  # fmt: skip
_DATE = re.compile(r"(\d{4})(?:-(\d{2})(?:-(\d{2}))?)?")


class PlanConfig(Config):
    """What is to be built. There is no default licence preset, because nobody should get one unasked."""

    licence: Literal["commercial-derivatives", "commercial", "noncommercial", "all"]
    """The preset of `biomedclip.licences.PRESETS` that the metadata's code must meet."""
    unstated_licence: Literal["exclude", "ask_xml"] = "exclude"
    """Articles whose metadata state no licence: left out, or planned so that the builder can ask their XML."""
    since: str | None = None
    """First day of publication: 2024, 2024-03 or 2024-03-01. A citation's missing month or day counts as the first."""
    until: str | None = None
    """Last day of publication; 2024 means to the end of that year."""
    need_media: bool = True
    """Leave out articles that list no media: their figures have no picture that could be fetched."""
    sample_rate: float = Field(default=1.0, gt=0, le=1)
    limit: int | None = Field(default=None, ge=1)
    """At most this many articles, those of the lowest hash."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the hash that samples."""
    unit_size: int = Field(default=2_000, ge=1, le=1_000_000)
    """Article versions in a unit, the step that is built or resumed as a whole."""

    @field_validator("since", "until")
    @classmethod
    def _check_date(cls, value: str | None) -> str | None:
        if value is not None:
            _day_number(value, last=False)
        return value


@dataclass(slots=True)
class Columns:
    """The numeric columns of all rows; those of Drops are zero."""

    pmcid: np.ndarray
    version: np.ndarray
    licence: np.ndarray
    """Position in `licence_codes`; 0 is none."""
    is_retracted: np.ndarray
    is_manuscript: np.ndarray
    published: np.ndarray
    doi_key: np.ndarray
    num_media: np.ndarray
    num_pictures: np.ndarray
    is_record: np.ndarray
    licence_codes: list[str | None]
    drop_reasons: Counter[str]

    def count_licences(self, planned: np.ndarray) -> dict[str, int]:
        """Licence code -> planned rows."""
        import numpy as np

        counts = np.bincount(self.licence[planned], minlength=len(self.licence_codes))
        names = ("none" if code is None else code for code in self.licence_codes)
        return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def load_columns(path: Path) -> Columns:
    """The columns of an article table. Raises DataError where its rows are not sorted, or not unique."""
    import numpy as np
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    kinds = {"pmcid": np.int64, "version": np.int16, "licence": np.int32, "is_retracted": np.bool_,
             "is_manuscript": np.bool_, "published": np.int32, "doi_key": np.uint64, "num_media": np.int32,
             "num_pictures": np.int32, "is_record": np.bool_}  # fmt: skip
    codes: dict[str | None, int] = {None: 0}
    reasons: Counter[str] = Counter()
    with pq.ParquetFile(path, pre_buffer=False) as file:  # which would hold these columns of the whole file
        arrays = {name: np.zeros(file.metadata.num_rows, kind) for name, kind in kinds.items()}
        start = 0
        for batch in file.iter_batches(200_000, columns=list(_NARROW), use_threads=False):
            rows = slice(start, start + batch.num_rows)
            start = rows.stop
            for name in _NARROW:
                column = batch.column(batch.schema.get_field_index(name))
                if name == "licence":
                    arrays[name][rows] = _number_codes(column, codes)
                elif name == "reason":
                    arrays["is_record"][rows] = pc.is_null(column).to_numpy(zero_copy_only=False)
                    reasons.update(column.drop_null().to_pylist())
                else:
                    filled = pc.fill_null(column, False if arrays[name].dtype == np.bool_ else 0)
                    arrays[name][rows] = filled.to_numpy(zero_copy_only=False)
    columns = Columns(**arrays, licence_codes=list(codes), drop_reasons=reasons)
    _check_order(columns, path)
    return columns


def _number_codes(column: pa.Array, codes: dict[str | None, int]) -> np.ndarray:
    """The position of each licence code in `codes`, which grows by those it lacks."""
    import numpy as np

    encoded = column.dictionary_encode()
    numbers = [codes.setdefault(code, len(codes)) for code in encoded.dictionary.to_pylist()]
    positions = encoded.indices.fill_null(len(numbers)).to_numpy(zero_copy_only=False)
    return np.array([*numbers, 0], np.int32)[positions]


def _check_order(columns: Columns, path: Path) -> None:
    import numpy as np

    order = (columns.pmcid * 10_000 + columns.version)[columns.is_record]
    if len(order) > 1 and not np.all(order[1:] > order[:-1]):
        place = int(np.argmin(order[1:] > order[:-1])) + 1
        found = f"PMC{order[place] // 10_000}.{order[place] % 10_000}"
        raise DataError(path, "must hold each article version once, sorted by PMC id and version", found=found,
                        todo="write it from the records of one source")  # fmt: skip


def decide(columns: Columns, config: PlanConfig, only: Iterable[int] | None) -> np.ndarray:
    """For each row 0 where it is planned, n for REASONS[n - 1], -1 where it was a Drop already."""
    import numpy as np

    codes = np.where(columns.is_record, np.int8(0), np.int8(-1))

    def exclude(where: np.ndarray, reason: str) -> None:
        codes[(codes == 0) & where] = REASONS.index(reason) + 1

    # One number a row that orders versions as choose_versions does: publisher's before manuscript, media, number.
    rank = (~columns.is_manuscript).astype(np.int64) << 17 | (columns.num_media > 0).astype(np.int64) << 16
    rank |= columns.version.astype(np.int64)
    retracted = columns.is_retracted.copy()
    rows = np.flatnonzero(columns.is_record)
    best = _choose(columns.pmcid[rows], rows, rank, retracted)
    exclude(~_mask(best, len(codes)), "superseded_version")
    with_doi = best[columns.doi_key[best] != 0]
    with_doi = with_doi[np.argsort(columns.doi_key[with_doi], kind="stable")]
    exclude(
        _mask(with_doi, len(codes)) & ~_mask(_choose(columns.doi_key[with_doi], with_doi, rank, retracted), len(codes)),
        "duplicate_doi",
    )
    if only is not None:
        exclude(~np.isin(columns.pmcid, np.fromiter(only, np.int64)), "not_asked_for")
    exclude(retracted, "retracted")
    for number, code in enumerate(columns.licence_codes):
        stated = normalise_code(code)
        if stated is None and config.unstated_licence == "exclude":
            exclude(columns.licence == number, "no_licence")
        elif stated is not None and not is_allowed(stated, config.licence):
            exclude(columns.licence == number, "licence_not_allowed")
    if config.need_media:
        exclude(columns.num_media == 0, "no_media")
    _exclude_dates(columns.published, config, exclude)
    ranks = hash_ids(columns.pmcid, config.seed)
    if config.sample_rate < 1:
        exclude(ranks >= np.uint64(min(int(config.sample_rate * 2**64), 2**64 - 1)), "not_sampled")
    left = np.flatnonzero(codes == 0)
    if config.limit is not None and len(left) > config.limit:
        order = left[np.argsort(ranks[left], kind="stable")]
        exclude(_mask(order[config.limit :], len(codes)), "beyond_limit")
    return codes


def _choose(groups: np.ndarray, rows: np.ndarray, rank: np.ndarray, retracted: np.ndarray) -> np.ndarray:
    """The row of highest rank of each run of equal `groups`, the first of equals; spreads retractions over a run."""
    import numpy as np

    if not len(rows):
        return rows
    starts = np.flatnonzero(np.concatenate(([True], groups[1:] != groups[:-1])))
    lengths = np.diff(np.append(starts, len(rows)))
    retracted[rows] = np.repeat(np.logical_or.reduceat(retracted[rows], starts), lengths)
    highest = np.repeat(np.maximum.reduceat(rank[rows], starts), lengths)
    winners = np.flatnonzero(rank[rows] == highest)
    run = np.repeat(np.arange(len(starts)), lengths)[winners]
    return np.sort(rows[winners[np.concatenate(([True], run[1:] != run[:-1]))]])


def _mask(rows: np.ndarray, size: int) -> np.ndarray:
    import numpy as np

    mask = np.zeros(size, np.bool_)
    mask[rows] = True
    return mask


def _exclude_dates(published: np.ndarray, config: PlanConfig, exclude: Callable[[np.ndarray, str], None]) -> None:
    import numpy as np

    if config.since is None and config.until is None:
        return
    exclude(published == 0, "no_date")
    month, day = published // 100 % 100, published % 100
    first_day = published + np.where(month == 0, 100, 0) + np.where(day == 0, 1, 0)
    if config.since is not None:
        exclude(first_day < _day_number(config.since, last=False), "out_of_dates")
    if config.until is not None:
        exclude(first_day > _day_number(config.until, last=True), "out_of_dates")


def _day_number(text: str, *, last: bool) -> int:
    """yyyymmdd of the first or last day of a year, month or day. Raises ValueError."""
    match = _DATE.fullmatch(text)
    if match is None:
        raise ValueError("must be a date such as 2024, 2024-03 or 2024-03-01")
    year = int(match[1])
    month = int(match[2] or (12 if last else 1))
    if not 1 <= month <= 12 or year < 1:
        raise ValueError("must be a date such as 2024, 2024-03 or 2024-03-01")
    days = calendar.monthrange(year, month)[1]
    day = int(match[3] or (days if last else 1))
    if not 1 <= day <= days:
        raise ValueError(f"has no day {day}")
    return year * 10_000 + month * 100 + day


def hash_ids(pmcids: np.ndarray, seed: int) -> np.ndarray:
    """A uniform uint64 for each PMC id and seed: two rounds of the splitmix64 finaliser (Steele et al. 2014)."""
    import numpy as np

    def mix(values: np.ndarray) -> np.ndarray:
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))

    return mix(pmcids.astype(np.uint64) ^ mix(np.array([seed], np.uint64)))
