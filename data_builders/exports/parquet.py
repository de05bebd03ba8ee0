"""Export as parquet files that `datasets.load_dataset(folder)` and the Hugging Face hub read as images and captions.

One row a sample: `image` (bytes and path, the type that `datasets` decodes), `caption`, `captions`, the columns of the
index that speak of the sample and not of its shard, and the rest of its .json as text. The features are written into
the parquet files themselves, so that nothing is guessed from the first rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.files import write_atomic
from biomedclip.schema import INDEX_COLUMNS
from biomedclip.shards import DatasetFolder, Sample, arrow_schema
from data_builders.exports.samples import Advance, ExportConfig, Exported, read_samples

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP = 100
"""Rows of a row group, as few as the hub's viewer asks for where rows hold pictures."""

COLUMNS = {
    "caption": "string",
    "captions": "list<string>",
    **{name: kind for name, kind in INDEX_COLUMNS.items()
       if name not in ("shard", "image_crc32", "caption_sha1", "num_captions")
       and not name.endswith(("_offset", "_size"))},
    "sidecar": "string",
}  # fmt: skip
"""Columns beside `image`."""

HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}


def write_parquet(dataset: DatasetFolder, out: Path, config: ExportConfig, advance: Advance) -> Exported:
    """What was exported as `data/<split>-NNNNN.parquet`."""
    done = Exported(
        usage='```python\nfrom datasets import load_dataset\n\nsamples = load_dataset("path/of/this/folder")\n```\n\n'
        "`image` is decoded to a picture by `datasets`; its bytes are the original ones. `sidecar` is JSON text with "
        "what else is known of the sample, such as the sentences that cite the figure.",
        data_files={HUB_SPLITS[split]: f"data/{HUB_SPLITS[split]}-*.parquet" for split in dataset.splits},
    )
    schema = _schema()
    for split in dataset.splits:
        files = _cut(read_samples(dataset, split), config)
        for number, samples in enumerate(files):
            _write_file(out / "data" / f"{HUB_SPLITS[split]}-{number:05d}.parquet", samples, schema, advance)
            done.splits[split] += len(samples)
    return done


def _cut(samples: Iterable[Sample], config: ExportConfig) -> Iterator[list[Sample]]:
    """Samples in lists of as many as a file may hold: a file is what stays in memory."""
    waiting, size = [], 0
    for sample in samples:
        waiting.append(sample)
        size += len(sample.image)
        if len(waiting) >= config.max_samples or size >= config.max_bytes:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


def _write_file(path: Path, samples: list[Sample], schema: pa.Schema, advance: Advance) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with write_atomic(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, len(samples), ROW_GROUP):
            rows = []
            for sample in samples[start : start + ROW_GROUP]:
                rows.append(_row(sample))
                advance()
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _row(sample: Sample) -> dict[str, Any]:
    rest = {key: value for key, value in sample.json.items() if key not in COLUMNS}
    image = {"bytes": sample.image, "path": f"{sample.key}.{sample.row['image_format']}"}
    facts = {name: sample.row[name] for name in COLUMNS if name in sample.row}
    captions = sample.json.get("captions") or [sample.caption]
    return {"image": image, "caption": sample.caption, "captions": captions, **facts,
            "sidecar": json.dumps(rest, ensure_ascii=False, sort_keys=True)}  # fmt: skip


def _schema() -> pa.Schema:
    """The columns, with the features as `datasets` writes them into its own parquet files."""
    import pyarrow as pa

    columns = arrow_schema(COLUMNS)
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    for name, kind in COLUMNS.items():
        inner = kind.removeprefix("list<").removesuffix(">")
        value = {"dtype": inner, "_type": "Value"}
        features[name] = {"feature": value, "_type": "List"} if kind.startswith("list<") else value
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([pa.field("image", image), *columns], metadata=metadata)
