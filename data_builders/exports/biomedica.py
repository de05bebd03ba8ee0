"""Export as WebDataset tars with the members and JSON keys of BIOMEDICA, so that scripts written for it run unchanged.

Reads the samples in shard order and, in step with them, a stream of article facts that DuckDB has joined to the index;
yields `<split>/NNNNNN.tar`. BIOMEDICA repeats the article in each of its figures' samples, and so does this. What we
cannot know (its visual clusters, its experts' labels, abstracts, references, full text) is null or an empty list; what
an article does not state is an empty string, because readers that infer types cannot go from null to text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from biomedclip.files import TEMPORARY_PREFIX, write_atomic
from biomedclip.shards import BLOCK, IMAGE_MEMBER, DatasetFolder, Sample, tar_header
from data_builders.exports.samples import Advance, ExportConfig, Exported, read_samples
from data_builders.pmc.inventory import open_database

KEYS = (
    "image_file_name", "image_cluster_id", "image_hash", "image_label_id", "image_panel_type", "image_panel_subtype",
    "image_primary_label", "image_secondary_label", "image_size", "image_set", "image_context", "article_accession_id",
    "article_title", "article_journal", "article_date", "article_abstract", "article_mesh_terms", "article_keywords",
    "article_reference_ids", "article_reference_count", "article_reference_list", "article_subject",
    "article_citation", "article_license", "article_text",
)  # fmt: skip
"""The keys of a sample's JSON, in BIOMEDICA's order."""

UNKNOWN: dict[str, Any] = {
    "image_cluster_id": None, "image_label_id": None, "image_panel_type": None, "image_panel_subtype": None,
    "article_abstract": None, "article_reference_ids": [], "article_reference_count": None,
    "article_reference_list": [], "article_subject": [], "article_text": None,
}  # fmt: skip
"""Keys that nothing in a dataset folder can fill."""

_FACTS = ("title", "journal", "published", "mesh", "keywords", "citation")
_USAGE = (
    """```python
import webdataset as wds

samples = wds.WebDataset("train/000000.tar", shardshuffle=False).decode("pil")
```

Members are `<key>.jpg`, `<key>.txt` and `<key>.json`, and the JSON has BIOMEDICA's 25 keys. `datasets` cannot read
these tars, because `image_context` has other keys in each sample: export with `--schema hf_parquet` for it.

| key | holds here |
|---|---|
| `image_file_name` | the picture's name in its article |
| `image_hash` | md5 of the picture's bytes |
| `image_primary_label` | our modality, where known: not BIOMEDICA's vocabulary |
| `image_secondary_label` | our concepts and class names: not BIOMEDICA's vocabulary |
| `image_size` | width, height |
| `image_set` | members of this export from the same article and split |
| `image_context` | the file name, and the paragraphs that cite the figure |
| `article_accession_id` | PMC id without version |
| `article_license` | the licence of the sample, the strictest of article and figure |
| `article_title`, `article_journal`, `article_date`, `article_citation` | as stated, or empty |
| `article_mesh_terms`, `article_keywords` | as stated, or empty |

Never filled, because nothing we read knows them: """
    + ", ".join(f"`{key}`" for key in UNKNOWN)
    + "."
)


def write_biomedica(dataset: DatasetFolder, out: Path, config: ExportConfig, advance: Advance) -> Exported:
    """What was exported as `<split>/NNNNNN.tar`."""
    done = Exported(usage=_USAGE)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=out) as spare:
        for split in dataset.splits:
            facts = _article_facts(dataset, split, Path(spare))
            pairs = zip(read_samples(dataset, split), facts, strict=True)
            for number in itertools.count():
                first = next(pairs, None)
                if first is None:
                    break
                rest = itertools.chain((first,), pairs)
                done.splits[split] += _write_tar(out / split / f"{number:06d}.tar", rest, config, advance)
    return done


def _write_tar(
    path: Path, pairs: Iterable[tuple[Sample, Mapping[str, Any]]], config: ExportConfig, advance: Advance
) -> int:
    """Write samples until the tar is full; returns how many."""
    count = size = 0
    with write_atomic(path) as file:
        for sample, article in pairs:
            facts = json.dumps(describe(sample, article), ensure_ascii=False).encode()
            for extension, data in ((IMAGE_MEMBER, sample.image), ("txt", sample.caption.encode()), ("json", facts)):
                file.write(tar_header(f"{sample.key}.{extension}", len(data)) + data + b"\0" * (-len(data) % BLOCK))
                size += BLOCK + len(data)
            count += 1
            advance()
            if count >= config.max_samples or size >= config.max_bytes:
                break
        file.write(b"\0" * (2 * BLOCK))
    return count


def describe(sample: Sample, article: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a sample, KEYS in order; `article` has the article's facts, each None where not stated."""
    row = sample.row
    name = sample.json.get("file") or f"{sample.key}.{IMAGE_MEMBER}"
    known = {
        "image_file_name": name,
        "image_hash": hashlib.md5(sample.image, usedforsecurity=False).hexdigest(),
        "image_primary_label": [row["modality"]] if row["modality"] else [],
        "image_secondary_label": [*(row["concepts"] or ()), *(row["labels"] or ())],
        "image_size": [row["width"], row["height"]],
        "image_set": [f"{key}.{IMAGE_MEMBER}" for key in article["keys"] or (sample.key,)],
        "image_context": {name: [mention["text"] for mention in sample.json.get("mentions", ())]},
        "article_accession_id": (row["article_id"] or "").partition(".")[0],
        "article_title": article["title"] or "",
        "article_journal": article["journal"] or "",
        "article_date": article["published"] or "",
        "article_mesh_terms": list(article["mesh"] or ()),
        "article_keywords": list(article["keywords"] or ()),
        "article_citation": article["citation"] or "",
        "article_license": row["licence"],
    }
    everything = known | UNKNOWN
    return {key: everything[key] for key in KEYS}


def _article_facts(dataset: DatasetFolder, split: str, spare: Path) -> Iterator[dict[str, Any]]:
    """For each sample of a split, in shard order, the facts of its article and the keys of all its samples there."""
    import pyarrow as pa

    shards = [shard["name"] for shard in dataset.manifest["shards"] if shard["split"] == split]
    sets = _write_sets(dataset, split, spare)
    query = f"""
        SELECT {", ".join(f"a.{name}" for name in _FACTS)}, s.keys
        FROM read_parquet($indexes) r
        LEFT JOIN read_parquet($articles) a ON r.article_id = a.article_id
        LEFT JOIN read_parquet($sets) s ON r.article_id = s.article_id
        ANTI JOIN withdrawn ON r.key = withdrawn.key
        ORDER BY r.shard, r.image_offset
    """  # noqa: S608
    indexes = [str(dataset.folder / name.replace(".tar", ".parquet")) for name in shards]
    with open_database(spare) as database:
        database.register("withdrawn", pa.table({"key": pa.array(sorted(dataset.withdrawn), pa.string())}))
        params = {"indexes": indexes, "articles": str(dataset.folder / "articles.parquet"), "sets": str(sets)}
        for batch in database.sql(query, params=params).to_arrow_reader(1_000):
            yield from batch.to_pylist()


def _write_sets(dataset: DatasetFolder, split: str, spare: Path) -> Path:
    """A parquet of article id and the keys of its samples; by a sort, which spills to disk, where a list does not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema({"article_id": pa.string(), "keys": pa.list_(pa.string())})
    indexes = [str(dataset.folder / shard["name"].replace(".tar", ".parquet"))
               for shard in dataset.manifest["shards"] if shard["split"] == split]  # fmt: skip
    query = "SELECT article_id, key FROM read_parquet($1) WHERE article_id IS NOT NULL ORDER BY article_id, key"
    path = spare / f"{split}.sets.parquet"
    with open_database(spare) as database, pq.ParquetWriter(path, schema) as writer:
        rows = (
            (article_id, key)
            for batch in database.sql(query, params=[indexes]).to_arrow_reader(50_000)
            for article_id, key in zip(*(column.to_pylist() for column in batch.columns), strict=True)
            if key not in dataset.withdrawn
        )
        groups = ((article_id, [key for _, key in group]) for article_id, group in itertools.groupby(rows, _article))
        while part := list(itertools.islice(groups, 10_000)):
            ids, keys = zip(*part, strict=True)
            writer.write_table(pa.table({"article_id": ids, "keys": keys}, schema=schema))
    return path


def _article(row: tuple[str, str]) -> str:
    return row[0]
