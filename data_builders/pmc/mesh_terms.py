"""MeSH terms of articles, looked up by PMID in a table made once from PubMed.

JATS has no MeSH terms; PubMed assigns them. The table is a parquet file of `pmid`, ascending and unique, `mesh`, a list
of terms, and perhaps `major`; `biomedclip data mesh` writes one. A look-up is a binary search, never a position, so an
article that PubMed does not know shifts nobody else's terms. Only PMIDs at the ends of row groups stay in memory, and
the row groups last asked for: all of PubMed has 38 million rows, and each process of a build has such a table.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from biomedclip.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

CACHED_ROWS = 200_000

_TODO = "expected a parquet file with pmid (integer, ascending) and mesh (list of strings): biomedclip data mesh"


@dataclass(frozen=True, slots=True)
class Mesh:
    """The MeSH descriptors of one article, in PubMed's order, and those that are its major topics."""

    terms: tuple[str, ...]
    major: tuple[str, ...] = ()


def read_mesh_terms(path: str | Path) -> MeshTable:
    """The table of a file. Raises DataError where it is none, or its PMIDs do not ascend."""
    return MeshTable(path)


class MeshTable:
    """PMID -> Mesh, read from the file as asked; it may be used by threads and sent to other processes."""

    def __init__(self, path: str | Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = Path(path)
        try:
            self._file = pq.ParquetFile(self.path)
            schema = self._file.schema_arrow
            names = {"pmid", "mesh"}.intersection(schema.names)
            if len(names) < 2 or not pa.types.is_list(schema.field("mesh").type):
                raise DataError(path, "is no table of MeSH terms", found=", ".join(schema.names), todo=_TODO)
            self._last = self._check_order()
        except FileNotFoundError:
            raise DataError(path, "there is no such file", todo=_TODO) from None
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise DataError(path, "is no table of MeSH terms", found=str(error)[:200], todo=_TODO) from None
        self._columns = ["pmid", "mesh", *(["major"] if "major" in schema.names else [])]
        self._groups: OrderedDict[int, tuple[np.ndarray, pa.Table]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def __contains__(self, pmid: object) -> bool:
        return isinstance(pmid, int) and self.get(pmid) is not None

    def __getitem__(self, pmid: int) -> Mesh:
        found = self.get(pmid)
        if found is None:
            raise KeyError(pmid)
        return found

    def get(self, pmid: int | None) -> Mesh | None:
        """What PubMed says of an article; None where the table does not know its PMID, or it has none."""
        import numpy as np

        if pmid is None:
            return None
        group = bisect_left(self._last, pmid)
        if group == len(self._last):
            return None
        pmids, table = self._group(group)
        row = int(np.searchsorted(pmids, pmid))
        if pmids[row] != pmid:
            return None
        return Mesh(*(tuple(table.column(name)[row].as_py() or ()) for name in self._columns[1:]))

    def of(self, pmid: int | None) -> tuple[str, ...]:
        """The terms of an article in PubMed's order; none where the table does not know it."""
        found = self.get(pmid)
        return found.terms if found is not None else ()

    def _check_order(self) -> list[int]:
        """The last PMID of each row group with rows. Raises DataError where they do not ascend."""
        import numpy as np

        last: list[int] = []
        for number in range(self._file.metadata.num_row_groups):
            column = self._read_pmids(number)
            if not len(column):
                raise DataError(self.path, "has an empty row group", todo=_TODO)
            if (last and column[0] <= last[-1]) or np.any(column[1:] <= column[:-1]):
                raise DataError(self.path, "must hold each PMID once, ascending", todo=_TODO)
            last.append(int(column[-1]))
        return last

    def _read_pmids(self, group: int) -> np.ndarray:
        import pyarrow as pa

        column = self._file.read_row_group(group, columns=["pmid"], use_threads=False)["pmid"].cast(pa.int64())
        if column.null_count:
            raise DataError(self.path, "must hold each PMID once, ascending", found="one without number", todo=_TODO)
        return column.to_numpy()

    def _group(self, number: int) -> tuple[np.ndarray, pa.Table]:
        with self._lock:
            if number not in self._groups:
                table = self._file.read_row_group(number, columns=self._columns, use_threads=False)
                self._groups[number] = (table["pmid"].to_numpy(), table)
                while len(self._groups) > 1 and sum(len(p) for p, _ in self._groups.values()) > CACHED_ROWS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(number)
            return self._groups[number]

    def __reduce__(self) -> tuple[Any, ...]:
        return MeshTable, (self.path,)
