"""Exports with extracted pictures: open_clip's csv and LLaVA's jsonl.

Yields `images/<shard>/<key>.<encoding>` with the original bytes and, for each split, one table that names them by
paths relative to the export, so that the bytes are the same wherever it lies.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from biomedclip.files import write_atomic
from biomedclip.shards import DatasetFolder, Sample
from data_builders.exports.samples import Advance, ExportConfig, Exported, image_name, read_samples

CSV_COLUMNS = ("filepath", "title", "key", "article_id", "licence")

QUESTIONS = (
    "What does this image show?", "Describe the image.", "Write a caption for this figure.",
    "Summarise what can be seen here.", "How would an article describe this picture?",
)  # fmt: skip

_MISSING = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
     "NULL", "NaN", "None", "n/a", "nan", "null")
)  # fmt: skip
"""Texts that pandas, with which open_clip reads its csv, takes for a missing value, quoted or not."""


def write_csv(dataset: DatasetFolder, out: Path, config: ExportConfig, advance: Advance) -> Exported:
    """What was exported as `<split>.csv` and pictures."""
    done = Exported(
        usage="Paths are relative to this folder, so train from inside it:\n\n```bash\ncd path/of/this/folder\n"
        "python -m open_clip_train.main --dataset-type csv --train-data train.csv --csv-img-key filepath "
        f"--csv-caption-key title --csv-separator {_spelled(config.separator)}\n```\n\n"
        "`key`, `article_id` and `licence` are columns beside these two; a picture with several captions has its first."
    )

    def lines(split: str) -> Iterator[str]:
        buffer = io.StringIO()
        writer = csv.writer(buffer, delimiter=config.separator, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for sample in read_samples(dataset, split):
            if sample.caption.strip() in _MISSING:
                done.dropped["caption_reads_as_missing"] += 1
            else:
                row = sample.row
                _write_picture(out, sample)
                writer.writerow(
                    (image_name(sample), sample.caption, sample.key, row["article_id"] or "", row["licence"])
                )
                done.splits[split] += 1
            advance()
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()

    _write_splits(dataset, out, "csv", lines)
    return done


def write_llava(dataset: DatasetFolder, out: Path, config: ExportConfig, advance: Advance) -> Exported:
    """What was exported as `<split>.jsonl` and pictures: one conversation a picture."""
    done = Exported(
        usage="Each line of `<split>.jsonl` is one conversation as LLaVA reads it: `id`, `image` (relative to this "
        "folder, LLaVA's `--image_folder`), `conversations`, and `article_id` and `licence` beside them. The question "
        "is one of a few, chosen by a hash of the key; the answer is the caption, word for word."
    )

    def lines(split: str) -> Iterator[str]:
        for sample in read_samples(dataset, split):
            _write_picture(out, sample)
            question = QUESTIONS[hashlib.sha256(sample.key.encode()).digest()[0] % len(QUESTIONS)]
            entry = {
                "id": sample.key,
                "image": image_name(sample),
                "conversations": [
                    {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": sample.caption}
                ],
                "article_id": sample.row["article_id"],
                "licence": sample.row["licence"],
            }  # fmt: skip
            done.splits[split] += 1
            advance()
            yield json.dumps(entry, ensure_ascii=False) + "\n"

    _write_splits(dataset, out, "jsonl", lines)
    return done


def _write_splits(dataset: DatasetFolder, out: Path, extension: str, lines: Callable[[str], Iterator[str]]) -> None:
    for split in dataset.splits:
        with write_atomic(out / f"{split}.{extension}") as file:
            for line in lines(split):
                file.write(line.encode())


def _write_picture(out: Path, sample: Sample) -> None:
    # Not through write_atomic: the export as a whole takes its final name at the end, and one fsync a picture is slow.
    path = out / image_name(sample)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sample.image)


def _spelled(separator: str) -> str:
    return "$'\\t'" if separator == "\t" else f"'{separator}'"
