"""Figures of a dataset by words or by a picture: `open_index(dataset, model)`, then `search_text` or `search_image`.

Reads a `DatasetFolder`; yields `Hit`s with caption, article and licence. Pictures are embedded once (shard_vectors.py);
what is searched (nearest.py) and a table of the rows' places are made of them whenever shards or tombstones changed,
which takes seconds for a million, and lie in the user's cache with checksums: what does not agree is made again. The
table is mapped and captions are read from the shards, so memory does not grow with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.annotation.embeddings import PLACE_COLUMNS
from biomedclip.app.encoder import Encoder
from biomedclip.app.nearest import CENTROIDS, CODES, EXACT_BYTES, ROTATION, TRAINING_VECTORS, Coded, Exact, write_codes
from biomedclip.app.shard_vectors import ShardVectors, cache_of, embed_shards, find_vectors, owning
from biomedclip.errors import ConfigError, DataError
from biomedclip.files import remove_leftovers, sha256_file, sha256_json, write_atomic, write_json
from biomedclip.page.gallery import SampleFigure, describe_article
from biomedclip.progress import Advance, Progress, silent
from biomedclip.schema import INDEX_COLUMNS
from biomedclip.shards import DatasetFolder, arrow_schema, read_member, read_tables

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image

ROWS, FACTS = "rows.arrow", "index.json"
_FORMAT = 2
_FETCH = "fetch the shard again, or rebuild the dataset"
_COLUMNS = PLACE_COLUMNS | {
    name: INDEX_COLUMNS[name] for name in ("source", "article_id", "figure_id", "licence", "split")
}
_PLACE = "place"
"""Column of the table of rows: the sample's number within its shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One figure that was found."""

    key: str
    score: float
    """Cosine of its embedding and the query's, from -1 to 1. Words and pictures lie apart: a good fit may be 0.3."""
    caption: str
    article: str | None
    """Id of its article, `PMC1234567.1`; None for samples of labelled sets."""
    figure: str | None
    licence: str
    split: str
    shard: str
    source: str
    row: int = field(repr=False)
    """Its place in the index that found it."""

    def to_json(self) -> dict[str, Any]:
        """All but its place in the index."""
        facts = asdict(self)
        del facts["row"]
        return facts | {"score": round(self.score, 6)}


class SearchIndex:
    """The searchable figures of a dataset; `open_index` makes it, any number of threads may ask it."""

    def __init__(self, dataset: DatasetFolder, encoder: Encoder, folder: Path, vectors: Sequence[ShardVectors]) -> None:
        self.dataset, self.encoder, self.folder = dataset, encoder, folder
        self._vectors, self._rows = vectors, _map_rows(folder)
        self._ends = np.cumsum([batch.num_rows for batch in self._rows])
        dim = max(shard.dim for shard in vectors)
        if _is_exact(len(self), dim):
            self._nearest: Exact | Coded = Exact(np.concatenate(list(_read_live(vectors, self._rows))))
        else:
            self._nearest = Coded(folder, dim, len(self), self._take)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def is_exact(self) -> bool:
        """Whether all figures are compared with a query, and not only the likeliest ones."""
        return isinstance(self._nearest, Exact)

    @cached_property
    def unreadable(self) -> dict[str, str]:
        """Key -> why, of the samples that cannot be found because their picture cannot be read."""
        found = {key: why for shard in self._vectors for key, why in shard.unreadable.items()}
        return {key: why for key, why in found.items() if key not in self.dataset.withdrawn}

    def search_text(self, query: str, top: int = 10) -> list[Hit]:
        """The `top` figures that fit the words best, the best first. Raises ConfigError where there are no words."""
        if not query.strip():
            raise ConfigError("query", "is empty", todo="say in a few words what the figure should show")
        return self.search_vector(self.encoder.embed_texts([query])[0], top)

    def search_image(self, picture: Image.Image, top: int = 10) -> list[Hit]:
        """The `top` figures that look most like an RGB picture, the best first; one that is in the dataset is found."""
        return self.search_vector(self.encoder.encode([self.encoder.prepare(picture)])[0], top)

    def search_vector(self, vector: NDArray[np.float32], top: int = 10) -> list[Hit]:
        """The `top` figures nearest to a unit embedding (D,). Raises ConfigError where top is below 1."""
        if top < 1:
            raise ConfigError("top", "must be at least 1", found=top)
        scores, rows = self._nearest.search(np.ascontiguousarray(vector, np.float32), top)
        return [self._hit(int(row), float(score)) for score, row in zip(scores, rows, strict=True)]

    def read_picture(self, hit: Hit) -> bytes:
        """The picture's bytes as they are stored (JPEG, PNG or WebP), checked against the index of its shard.

        Raises DataError where the shard is gone, cut off or has other bytes.
        """
        return self._read_sample(hit).image

    def describe(self, hits: Sequence[Hit]) -> list[SampleFigure]:
        """The hits with pictures, titles, authors and links, as pages show them."""
        wanted = sorted({hit.article for hit in hits if hit.article})
        articles = _find_articles(self.dataset.folder / "articles.parquet", wanted) if wanted else {}
        figures = []
        for hit in hits:
            sample = self._read_sample(hit)
            figures.append(describe_article(sample.row, sample.image, hit.caption, articles.get(hit.article or "", {})))
        return figures

    def _hit(self, row: int, score: float) -> Hit:
        facts = self._row(row)
        path = self.dataset.folder / facts["shard"]
        with _explaining(path), path.open("rb") as file:
            text = read_member(file, facts["text_offset"], facts["text_size"], path, facts["key"])
        return Hit(
            key=facts["key"], score=score, caption=text.decode("utf-8", "replace"), article=facts["article_id"],
            figure=facts["figure_id"], licence=facts["licence"], split=facts["split"], shard=facts["shard"],
            source=facts["source"], row=row,
        )  # fmt: skip

    def _row(self, row: int) -> dict[str, Any]:
        shard = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._rows[shard]
        found: dict[str, Any] = batch.slice(row - (int(self._ends[shard]) - batch.num_rows), 1).to_pylist()[0]
        return found

    def _read_sample(self, hit: Hit) -> Any:
        with _explaining(self.dataset.folder / hit.shard):
            return self.dataset.read(self._row(hit.row))

    def _take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, D) of sorted rows of the index, from the files of their shards."""
        shards = np.searchsorted(self._ends, rows, side="right")
        blocks = []
        for shard in np.unique(shards).tolist():
            batch = self._rows[shard]
            inside = rows[shards == shard] - (self._ends[shard] - batch.num_rows)
            places = batch.column(_PLACE).to_numpy(zero_copy_only=True)[inside]
            blocks.append(self._vectors[shard].take(places))
        return np.concatenate(blocks)


def open_index(
    dataset: str | Path | DatasetFolder, model: str | Path | Encoder = "biomedclip-mini", *,
    cache: Path | None = None, workers: int = 0, progress: Progress = silent,
) -> SearchIndex:  # fmt: skip
    """The index of a dataset folder for a model, made or completed now where the cache has none that fits.

    `model` is what `biomedclip.load` takes, or an Encoder that is loaded already; `cache` a folder other than
    `$BIOMEDCLIP_CACHE/search`; `workers` processes that read pictures while they are embedded. A run that was killed
    goes on. Raises DataError where the folder is no dataset or has nothing to search, CheckpointError as `load` does.
    """
    dataset = dataset if isinstance(dataset, DatasetFolder) else DatasetFolder(dataset)
    if not len(dataset):
        raise DataError(dataset.folder, "has no samples to search", todo="name another dataset, or build it again")
    encoder = model if isinstance(model, Encoder) else Encoder(model, lite=True)
    home = cache_of(encoder, cache)
    name = hashlib.sha256(str(dataset.folder.resolve()).encode()).hexdigest()[:16]
    folder = home / "indexes" / name
    vectors = find_vectors(dataset, home)
    if vectors is None or not _is_whole(folder, _describe_state(dataset, vectors)):
        with owning(home):
            vectors = embed_shards(dataset, encoder, home, workers=workers, progress=progress)
            _build(dataset, vectors, folder, progress)
    return SearchIndex(dataset, encoder, folder, vectors)


def _build(dataset: DatasetFolder, vectors: Sequence[ShardVectors], folder: Path, progress: Progress) -> None:
    """Write the table of rows, codes where they are needed and, last, the facts that vouch for them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).unlink(missing_ok=True)
    remove_leftovers(folder)
    total = _write_rows(dataset, vectors, folder / ROWS)
    if not total:
        why = next((f"{k}: {w}" for shard in vectors for k, w in shard.unreadable.items()), "all were withdrawn")
        raise DataError(dataset.folder, "has no picture that can be read", found=why, todo="repair or rebuild it")
    dim = max(shard.dim for shard in vectors)
    names = [ROWS]
    if not _is_exact(total, dim):
        rows = _map_rows(folder)
        with progress(f"indexing {dataset.manifest['name']}", total) as advance:
            write_codes(folder, dim, total, _choose_sample(vectors, rows), _read_live(vectors, rows, advance))
        names += [CODES, CENTROIDS, ROTATION]
    facts = {"format": _FORMAT, "dataset": str(dataset.folder.resolve()), "samples": total, "dim": dim,
             "state": _describe_state(dataset, vectors),
             "files": {name: sha256_file(folder / name) for name in names}}  # fmt: skip
    write_json(folder / FACTS, facts)


def _write_rows(dataset: DatasetFolder, vectors: Sequence[ShardVectors], path: Path) -> int:
    """Write one batch a shard of the samples that can be found; returns how many they are."""
    import pyarrow as pa

    schema = arrow_schema(_COLUMNS).append(pa.field(_PLACE, pa.int64()))
    total = 0
    with write_atomic(path) as file, pa.ipc.new_file(file, schema) as writer:
        for shard, found in zip(dataset.manifest["shards"], vectors, strict=True):
            table = read_tables([dataset.folder / shard["name"].replace(".tar", ".parquet")], _COLUMNS)
            if len(table) != found.samples:
                raise DataError(
                    dataset.folder / shard["name"], "has another number of samples than its index",
                    found=f"{found.samples} and {len(table)}", todo="run `biomedclip data verify` on the folder",
                )  # fmt: skip
            keys = table["key"].to_pylist()
            places = [
                n for n, key in enumerate(keys) if key not in dataset.withdrawn and key not in found.unreadable
            ]  # fmt: skip
            live = table.take(pa.array(places, pa.int64())).append_column(_PLACE, pa.array(places, pa.int64()))
            arrays = [column.combine_chunks() for column in live.cast(schema).columns]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            total += len(places)
    return total


def _map_rows(folder: Path) -> list[pa.RecordBatch]:
    """The table of rows, one batch a shard, mapped from disk."""
    import pyarrow as pa

    reader = pa.ipc.open_file(pa.memory_map(str(folder / ROWS)))
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


def _read_live(
    vectors: Sequence[ShardVectors], rows: Sequence[pa.RecordBatch], advance: Advance | None = None
) -> Iterator[NDArray[np.float32]]:
    """Blocks of the vectors of the rows, shard by shard; none of a shard without rows."""
    for shard, batch in zip(vectors, rows, strict=True):
        if batch.num_rows:
            yield shard.read()[batch.column(_PLACE).to_numpy()].astype(np.float32)
            if advance is not None:
                advance(batch.num_rows)


def _choose_sample(vectors: Sequence[ShardVectors], rows: Sequence[pa.RecordBatch]) -> NDArray[np.float32]:
    """Vectors to fit codes to, of all shards alike."""
    random = np.random.default_rng(0)
    total = sum(batch.num_rows for batch in rows)
    blocks = []
    for shard, batch in zip(vectors, rows, strict=True):
        if batch.num_rows:
            count = min(batch.num_rows, -(-TRAINING_VECTORS * batch.num_rows // total))
            chosen = np.sort(random.choice(batch.num_rows, count, replace=False))
            blocks.append(shard.take(batch.column(_PLACE).to_numpy()[chosen]))
    return np.concatenate(blocks)


def _find_articles(path: Path, wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{article id: facts} of some articles, without holding the others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, filters=[("article_id", "in", wanted)])
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(path, "cannot be read as parquet", found=str(error)[:80], todo=_FETCH) from None
    return {row["article_id"]: row for row in table.to_pylist()}


def _is_exact(total: int, dim: int) -> bool:
    return total * dim * 4 <= EXACT_BYTES


def _describe_state(dataset: DatasetFolder, vectors: Sequence[ShardVectors]) -> str:
    """A hash of all that an index is made of: embeddings, index rows and what was withdrawn."""
    files = dataset.manifest["files"]
    indexes = [files.get(shard["name"].replace(".tar", ".parquet")) for shard in dataset.manifest["shards"]]
    unreadable = sorted(key for shard in vectors for key in shard.unreadable)
    return sha256_json(
        [_FORMAT, [shard.sha256 for shard in vectors], indexes, sorted(dataset.withdrawn), unreadable, EXACT_BYTES]
    )


def _is_whole(folder: Path, state: str) -> bool:
    """Whether a folder holds the index of a state, with the very bytes that were written."""
    try:
        facts = json.loads((folder / FACTS).read_bytes())
        return facts["state"] == state and all(
            sha256_file(folder / name) == digest for name, digest in facts["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Turn what the system says of a shard that cannot be opened into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(path, "cannot be read", found=error.strerror, todo=_FETCH) from None
