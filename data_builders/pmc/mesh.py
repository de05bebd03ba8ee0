"""PubMed's citations in, a table of MeSH terms by PMID out, which `mesh_terms` joins to articles.

Reads baseline and update files or efetch answers (`.xml` or `.xml.gz`, `PubmedArticleSet`) one citation at a time and
writes one parquet sorted by PMID. Later files win, a `DeleteCitation` removes. Terms meet articles by their PMID and
never by position: an answer leaves out PMIDs that were merged or deleted, and counting along would give every article
after a gap the terms of its neighbour. Files are taken as hostile, like articles (see `xml_input`): no DTD, no entity,
and an end to how much is read without a citation in it. Latest-wins and sorting are left to DuckDB with a memory limit,
because PubMed has 38 million citations.
"""

from __future__ import annotations

import gzip
import json
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from biomedclip.errors import DataError
from biomedclip.files import TEMPORARY_PREFIX, write_atomic
from biomedclip.progress import Progress, silent
from data_builders.pmc.inventory import open_database

if TYPE_CHECKING:
    import pyarrow as pa
    from lxml.etree import _Element as Element

MAX_BARREN_BYTES = 64 * 2**20
"""More XML than this without a citation in it is refused; the longest citation of PubMed has below 4 MB."""

_MESH_KEY = b"biomedclip_mesh"
_BATCH_ROWS = 20_000
_GROUP_ROWS = 5_000
_ENCODING = re.compile(rb"<\?xml\b[^>]*?encoding\s*=\s*[\"']([A-Za-z0-9._-]+)")
_READABLE = (b"utf-8", b"us-ascii", b"ascii", b"iso-8859-1")
_AGAIN = "download the file again; no table was written"

_LATEST = """
    SELECT pmid, mesh, major FROM read_parquet('{path}') rows
    JOIN (SELECT pmid, max(rank) AS rank FROM read_parquet('{path}') GROUP BY pmid) USING (pmid, rank)
    WHERE NOT deleted ORDER BY pmid
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshFacts:
    """What a table of MeSH terms says of itself."""

    files: int
    citations: int
    """Citations read, all versions of a PMID."""
    deleted: int
    """PMIDs that a file takes back, each time one does."""
    without_pmid: int
    """Citations left out because their PMID is missing or no number."""
    articles: int
    """Rows: PMIDs that are left."""


def write_mesh(paths: Sequence[str | Path], out: str | Path, *, progress: Progress = silent) -> MeshFacts:
    """The facts of the table written to `out`: pmid, mesh, major; an article without terms is a row with none.

    Raises DataError where a file cannot be read to its end, because what it would have changed is not known.
    """
    out = Path(out)
    if not paths:
        raise DataError("mesh", "no file is named", todo="name PubMed's .xml.gz files, oldest first")
    out.parent.mkdir(parents=True, exist_ok=True)
    counts = {"citations": 0, "deleted": 0, "without_pmid": 0}
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=out.parent) as folder:
        spool = Path(folder) / "citations.parquet"
        with progress("reading PubMed", len(paths)) as advance:
            _spool(paths, spool, counts, advance)
        return _write_latest(spool, out, {"files": len(paths), **counts})


@dataclass(slots=True)
class _Citation:
    pmid: int | None
    version: int
    deleted: bool = False
    mesh: tuple[str, ...] = ()
    major: tuple[str, ...] = ()


def read_citations(path: str | Path) -> Iterator[_Citation]:
    """The citations and deletions of one file, in its order. Raises DataError where it cannot be read to its end."""
    from lxml import etree

    path = Path(path)
    failures = (OSError, EOFError, zlib.error, etree.XMLSyntaxError)
    try:
        with path.open("rb") as file, gzip.open(file) if _is_gzip(file) else file as plain:
            guarded = _Guarded(plain, path)
            # A set, because efetch answers with an error document under status 200.
            events = etree.iterparse(
                guarded, events=("start", "end"), tag=("PubmedArticleSet", "MedlineCitation", "DeleteCitation"),
                load_dtd=False, no_network=True, resolve_entities=False, dtd_validation=False,
                attribute_defaults=False, remove_comments=True, remove_pis=True,
            )  # fmt: skip
            inside = False
            for event, element in events:
                if element.tag == "PubmedArticleSet":
                    inside = True
                elif event == "end" and inside:
                    guarded.barren = 0
                    yield from _read_element(element)
                    _forget(element)
            if not inside:
                raise DataError(path, "is no PubmedArticleSet", found=f"<{events.root.tag}>"[:60], todo=_AGAIN)
    except FileNotFoundError:
        raise DataError(path, "there is no such file", todo="name PubMed's .xml.gz files, oldest first") from None
    except failures as error:
        raise DataError(path, "cannot be read as PubMed's XML", found=str(error)[:120], todo=_AGAIN) from None


class _Guarded:
    """A file that ends the reading of anything hostile: entities, encodings that could hide them, endless filler."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path = file, path
        self._tail = b""
        self._first = True
        self.barren = 0
        """Bytes read since the last citation."""

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        if self._first and data:
            self._first = False
            declared = _ENCODING.search(data[:200])
            if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4] or (
                declared and declared[1].lower() not in _READABLE
            ):  # fmt: skip
                raise DataError(self._path, "is in an encoding that PubMed does not use", todo=_AGAIN)
        if b"<!ENTITY" in self._tail + data:
            raise DataError(self._path, "declares entities, which PubMed's files never do", todo="do not use this file")
        self._tail = data[-8:]
        self.barren += len(data)
        if self.barren > MAX_BARREN_BYTES:
            raise DataError(self._path, f"has {MAX_BARREN_BYTES // 2**20} MB without a citation",
                            todo="do not use this file")  # fmt: skip
        return data


def _is_gzip(file: BinaryIO) -> bool:
    start = file.read(2)
    file.seek(0)
    return start == b"\x1f\x8b"


def _read_element(element: Element) -> Iterator[_Citation]:
    if element.tag == "DeleteCitation":
        for child in element.iterfind("PMID"):
            yield _Citation(*_pmid(child), deleted=True)
        return
    mesh, major = [], []
    for heading in element.iterfind("MeshHeadingList/MeshHeading"):
        name = " ".join(heading.findtext("DescriptorName", "").split())
        if name:
            mesh.append(name)
            if any(part.get("MajorTopicYN") == "Y" for part in heading):
                major.append(name)
    # The citation's own PMID: those it comments on or corrects stand deeper.
    yield _Citation(*_pmid(element.find("PMID")), mesh=tuple(dict.fromkeys(mesh)), major=tuple(dict.fromkeys(major)))


def _pmid(element: Element | None) -> tuple[int | None, int]:
    text = (element.text or "").strip() if element is not None else ""
    version = (element.get("Version") or "1") if element is not None else "1"
    is_number = re.fullmatch(r"[1-9][0-9]{0,9}", text) is not None
    return int(text) if is_number else None, int(version) if re.fullmatch("[0-9]{1,3}", version) else 1


def _forget(element: Element) -> None:
    """Free a finished element, and all before it, so that memory does not grow with the file."""
    element.clear()
    while element is not None:
        parent = element.getparent()
        while parent is not None and element.getprevious() is not None:
            del parent[0]
        element = parent


def _spool(paths: Sequence[str | Path], spool: Path, counts: dict[str, int], advance: Any) -> None:
    """All citations with their rank: later files before earlier, then higher versions, then later in the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.list_(pa.string())
    schema = pa.schema({"pmid": pa.int64(), "rank": pa.int64(), "deleted": pa.bool_(), "mesh": text, "major": text})
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(spool, schema, compression="zstd") as writer:
        for number, path in enumerate(paths):
            for place, citation in enumerate(read_citations(path)):
                counts["deleted" if citation.deleted else "citations"] += 1
                if citation.pmid is None:
                    counts["without_pmid"] += 1
                    continue
                version = 999 if citation.deleted else citation.version
                rows.append({"pmid": citation.pmid, "rank": number << 42 | version << 32 | place,
                             "deleted": citation.deleted, "mesh": citation.mesh, "major": citation.major})  # fmt: skip
                if len(rows) >= _BATCH_ROWS:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    rows.clear()
            advance()
        writer.write_table(pa.Table.from_pylist(rows, schema))


def _write_latest(spool: Path, out: Path, counts: dict[str, int]) -> MeshFacts:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.list_(pa.string())
    schema = pa.schema({"pmid": pa.int64(), "mesh": text, "major": text})
    articles = 0
    with open_database(out.parent) as database, write_atomic(out) as file:
        latest = database.sql(_LATEST.format(path=str(spool).replace("'", "''")))
        # DuckDB renamed the method in version 2.
        read = latest.to_arrow_reader if hasattr(latest, "to_arrow_reader") else latest.fetch_arrow_reader
        with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=["mesh", "major"]) as writer:
            with read(_GROUP_ROWS) as reader:
                for batch in _exact_batches(reader, schema):
                    writer.write_table(batch, row_group_size=_GROUP_ROWS)
                    articles += batch.num_rows
            facts = MeshFacts(articles=articles, **counts)
            writer.add_key_value_metadata({_MESH_KEY: json.dumps(asdict(facts)).encode()})
    return facts


def _exact_batches(reader: Any, schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows in tables of _GROUP_ROWS, because the batches of a query are of whatever size, and bytes must not be."""
    import pyarrow as pa

    waiting: list[pa.RecordBatch] = []
    for batch in reader:
        waiting.append(batch.cast(schema))
        if sum(part.num_rows for part in waiting) >= _GROUP_ROWS:
            table = pa.Table.from_batches(waiting)
            whole = table.num_rows - table.num_rows % _GROUP_ROWS
            for start in range(0, whole, _GROUP_ROWS):
                yield table.slice(start, _GROUP_ROWS)
            waiting = table.slice(whole).to_batches()
    if waiting:
        yield pa.Table.from_batches(waiting)
