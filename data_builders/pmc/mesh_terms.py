"""MeSH terms of articles, looked up by PMID in a table made once from PubMed.

JATS has no MeSH terms; PubMed assigns them. The table is a parquet file of `pmid`, ascending and unique, and `mesh`, a
list of terms; a lookup is a binary search, never a position, so an article that PubMed does not know shifts nobody
else's terms. Terms are kept as numbers into one list of all terms: 8 million articles of 12 terms take about 0.5 GB.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from biomedclip.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class MeshTerms:
    """The terms of many articles."""

    pmids: np.ndarray
    terms: pa.ListArray

    def of(self, pmid: int | None) -> tuple[str, ...]:
        """The terms of an article in PubMed's order; none where the table does not know it."""
        import numpy as np

        if pmid is None:
            return ()
        place = int(np.searchsorted(self.pmids, pmid))
        if place == len(self.pmids) or self.pmids[place] != pmid:
            return ()
        return tuple(self.terms[place].as_py() or ())


def read_mesh_terms(path: Path) -> MeshTerms:
    """The table of a file. Raises DataError where it is none, or its PMIDs do not ascend."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    todo = "expected a parquet file with pmid (integer, ascending) and mesh (list of strings)"
    try:
        table = pq.read_table(path, columns=["pmid", "mesh"], read_dictionary=["mesh.list.element"])
        if set(table.column_names) != {"pmid", "mesh"} or not pa.types.is_list(table.schema.field("mesh").type):
            raise DataError(path, "is no table of MeSH terms", found=", ".join(table.column_names), todo=todo)
        pmids = table["pmid"].cast(pa.int64()).combine_chunks()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(path, "is no table of MeSH terms", found=str(error)[:200], todo=todo) from None
    numbers = pmids.to_numpy(zero_copy_only=False)
    if pmids.null_count or np.any(numbers[1:] <= numbers[:-1]):
        raise DataError(path, "must hold each PMID once, ascending", todo=todo)
    terms = table["mesh"].unify_dictionaries().combine_chunks()
    return MeshTerms(numbers, terms.combine_chunks() if isinstance(terms, pa.ChunkedArray) else terms)
