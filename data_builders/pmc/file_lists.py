"""The file lists that came with PMC's packages in, facts on one article out.

Reads `oa_file_list.csv`, `oa_file_list.txt` and the `*.filelist.csv` of the bulk archives and of the old bucket, which
differ in columns, separator and header. Only an index (PMC id, offset of the row) is kept in memory and a row is
parsed when it is asked for: the lists have millions of rows, a mirror may hold few of them. Lists ended in 2026, so
what they say of a licence or a retraction is as old as the copy.
"""

from __future__ import annotations

import csv
import re
from array import array
from dataclasses import dataclass
from pathlib import Path

from biomedclip.errors import DataError

_ACCESSION = re.compile(rb'[,\t]"?PMC([1-9][0-9]{0,11})"?[,\t\r\n]')
_TEXT_COLUMNS = ("file", "articlecitation", "accessionid", "pmid", "license")
_MAX_LINE = 2**16


@dataclass(frozen=True, slots=True)
class ListedArticle:
    """One row of a list, in the list's own words."""

    pmcid: int
    licence: str | None
    """Such as `CC BY` or `NO-CC CODE`; None where the row has none."""
    citation: str | None
    pmid: int | None
    is_retracted: bool


class FileList:
    """One list on disk. `rows` is the number of rows indexed, `bad_rows` of those without a PMC id."""

    def __init__(self, path: str | Path) -> None:
        """Index the list. Raises DataError where it has not the form of one."""
        self.path = Path(path)
        self._columns, self._separator = self._read_form()
        self.bad_rows = 0
        ids, offsets = array("q"), array("q")
        with self.path.open("rb") as file:
            offset = len(file.readline(_MAX_LINE))
            if self._separator == "\t" and self._starts_with_a_row:
                offset = 0
                file.seek(0)
            for line in file:
                match = _ACCESSION.search(line)
                if match is not None:
                    ids.append(int(match[1]))
                    offsets.append(offset)
                elif line.strip():
                    self.bad_rows += 1
                offset += len(line)
        self.rows = len(ids)
        self._index_rows(ids, offsets)

    def find(self, pmcid: int) -> ListedArticle | None:
        """What the list says of an article (its last row, where there are several); None where it says nothing."""
        position = int(self._ids.searchsorted(pmcid, side="right")) - 1
        if position < 0 or self._ids[position] != pmcid:
            return None
        with self.path.open("rb") as file:
            file.seek(int(self._offsets[position]))
            line = file.readline(_MAX_LINE)
        return self._parse(line.decode("utf-8", "replace"), pmcid)

    def _index_rows(self, ids: array[int], offsets: array[int]) -> None:
        import numpy as np

        numbers = np.frombuffer(ids, dtype=np.int64) if ids else np.zeros(0, np.int64)
        places = np.frombuffer(offsets, dtype=np.int64) if offsets else np.zeros(0, np.int64)
        order = np.argsort(numbers, kind="stable")
        self._ids, self._offsets = numbers[order], places[order]

    def _read_form(self) -> tuple[tuple[str, ...], str]:
        """Column names without case and punctuation, and the separator."""
        with self.path.open("rb") as file:
            first = file.readline(_MAX_LINE).decode("utf-8-sig", "replace")
            second = file.readline(_MAX_LINE).decode("utf-8", "replace")
        header = tuple(re.sub(r"[^a-z]", "", name.lower()) for name in next(csv.reader([first]), []))
        if "accessionid" in header:
            return header, ","
        self._starts_with_a_row = "\t" in first
        if "\t" in first or "\t" in second:
            return _TEXT_COLUMNS, "\t"
        raise DataError(self.path, "is no file list of PMC packages", found=first[:60].strip() or "an empty file",
                        todo="expected oa_file_list.csv, oa_file_list.txt or a filelist.csv")  # fmt: skip

    def _parse(self, line: str, pmcid: int) -> ListedArticle | None:
        fields = next(csv.reader([line.rstrip("\r\n")])) if self._separator == "," else line.rstrip("\r\n").split("\t")
        row = dict(zip(self._columns, (value.strip() for value in fields), strict=False))
        if row.get("accessionid") != f"PMC{pmcid}":
            return None
        pmid = row.get("pmid", "").removeprefix("PMID:")
        return ListedArticle(
            pmcid=pmcid,
            licence=row.get("license") or None,
            citation=row.get("articlecitation") or None,
            pmid=int(pmid) if re.fullmatch(r"[1-9][0-9]{0,11}", pmid) else None,
            is_retracted=row.get("retracted", "").lower() in ("yes", "y", "true", "1"),
        )


def find_lists(root: Path) -> list[FileList]:
    """The lists that lie in a mirror's root, those that name single packages first."""
    names = ["oa_file_list.csv", "oa_file_list.txt"]
    paths = [root / name for name in names if (root / name).is_file()]
    return [FileList(path) for path in [*paths, *sorted(root.glob("*filelist.csv"))]]
