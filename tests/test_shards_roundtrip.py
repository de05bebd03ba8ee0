"""Shards written here, read by the three readers people have: webdataset, datasets, and open_clip's own pipeline.

Every sample is compared, byte for byte; the encodings are mixed from the first sample on, because that is what breaks
readers that look at file names.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from biomedclip.schema import Article, Pair
from biomedclip.shards import DatasetFolder, DatasetWriter
from data_builders.card import dataset_card

# webdataset leaves the tars it has read to the garbage collector, which says so.
left_open_by_webdataset = pytest.mark.filterwarnings(r"ignore:unclosed file .*\d{5}\.tar:ResourceWarning")

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
CAPTIONS = ("Plain caption.", "µm, ≥ 10^4 and “quotes”", "Two\nlines, 中文, naïve", "x" * 5000)


@pytest.fixture(scope="module")
def pairs() -> dict[str, Pair]:
    rng = np.random.default_rng(0)
    made = {}
    for i in range(24):
        encoding = list(FORMATS)[i % 3]
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (9, 7 + i, 3), dtype=np.uint8)).save(buffer, FORMATS[encoding])
        image = buffer.getvalue()
        key = f"pmc-{i}-v1-f{i}-p0"
        # Optional facts appear late and in some samples only, as they do in real articles.
        sidecar: dict[str, Any] = {"mentions": [{"text": "See.", "panels": ["A"]}] if i > 8 else [], "label": None}
        made[key] = Pair(
            key=key, image=image, image_format=encoding, width=7 + i, height=9, caption=CAPTIONS[i % 4], source="pmc",
            licence="CC BY", sha256=hashlib.sha256(image).hexdigest(), phash=i, article_id="PMC1.1",
            split="test" if i % 4 == 3 else "train", panel="1" if i > 8 else None, sidecar=sidecar,
        )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def folder(pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dataset")
    article = Article(article_id="PMC1.1", pmcid=1, version=1, title="T", licence="CC BY", doi="10.1/x")
    with DatasetWriter(path, name="roundtrip", max_samples=7) as writer:
        for pair in pairs.values():
            writer.add(pair)
        writer.finish(
            articles=[article], provenance={}, card=lambda facts: dataset_card(facts, [article], {"PMC1.1": 24})
        )
    return path


def tars(folder: Path, split: str) -> list[str]:
    return [str(path) for path in DatasetFolder(folder).shard_paths(split)]


def check(found: dict[str, tuple[bytes, str]], pairs: dict[str, Pair], split: str) -> None:
    expected = {key: (pair.image, pair.caption) for key, pair in pairs.items() if pair.split == split}
    assert len(expected) in (6, 18)
    assert found == expected


@left_open_by_webdataset
@pytest.mark.parametrize("split", ["train", "test"])
def test_webdataset_reads_equal_bytes_and_captions(folder: Path, pairs: dict[str, Pair], split: str) -> None:
    wds = pytest.importorskip("webdataset")
    found = {}
    for sample in wds.WebDataset(tars(folder, split), shardshuffle=False):
        found[sample["__key__"]] = (sample["jpg"], sample["txt"].decode())
        facts = json.loads(sample["json"])
        assert facts["image_format"] == pairs[sample["__key__"]].image_format
        assert facts["key"] == sample["__key__"]
    check(found, pairs, split)


@left_open_by_webdataset
@pytest.mark.parametrize("split", ["train", "test"])
def test_open_clips_pipeline_reads_equal_bytes_and_captions(folder: Path, pairs: dict[str, Pair], split: str) -> None:
    wds = pytest.importorskip("webdataset")

    def has_caption_and_image(sample: dict[str, Any]) -> bool:
        return "txt" in sample and any(kind in sample for kind in ("png", "jpg", "jpeg", "webp"))

    steps = [
        wds.SimpleShardList(tars(folder, split)),
        wds.tarfile_to_samples(),
        wds.select(has_caption_and_image),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(text=bytes.decode),
        wds.to_tuple("__key__", "image", "text"),
    ]
    check({key: (image, text) for key, image, text in wds.DataPipeline(*steps)}, pairs, split)


@left_open_by_webdataset
def test_open_clips_decoder_shows_the_pictures(folder: Path, pairs: dict[str, Pair]) -> None:
    wds = pytest.importorskip("webdataset")
    steps = [
        wds.SimpleShardList(tars(folder, "train")), wds.tarfile_to_samples(), wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"), wds.to_tuple("__key__", "image", "text"),
    ]  # fmt: skip
    shown = 0
    for key, image, text in wds.DataPipeline(*steps):
        with Image.open(io.BytesIO(pairs[key].image)) as expected:
            assert np.array_equal(np.asarray(image), np.asarray(expected.convert("RGB")))
        assert text == pairs[key].caption
        shown += 1
    assert shown == 18


def datasets_rows(dataset: Any) -> dict[str, tuple[bytes, str]]:
    from datasets import Image as ImageFeature

    undecoded = dataset.cast_column("jpg", ImageFeature(decode=False))
    return {row["__key__"]: (row["jpg"]["bytes"], row["txt"]) for row in undecoded}


@pytest.fixture
def load_dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    datasets.disable_progress_bars()

    def load(*arguments: Any, **options: Any) -> Any:
        return datasets.load_dataset(*arguments, cache_dir=str(tmp_path), **options)

    return load


def test_datasets_streams_equal_bytes_and_captions(folder: Path, pairs: dict[str, Pair], load_dataset: Any) -> None:
    files = {"train": tars(folder, "train"), "test": tars(folder, "test")}
    for split in files:
        loaded = load_dataset("webdataset", data_files=files, split=split, streaming=True)
        check(datasets_rows(loaded), pairs, split)


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_loads_the_folder_by_its_card(
    folder: Path, pairs: dict[str, Pair], load_dataset: Any, streaming: bool
) -> None:
    loaded = load_dataset(str(folder), streaming=streaming)
    assert set(loaded) == {"train", "test"}
    for split in loaded:
        check(datasets_rows(loaded[split]), pairs, split)


def test_our_own_reader_agrees(folder: Path, pairs: dict[str, Pair]) -> None:
    for split in ("train", "test"):
        check({s.key: (s.image, s.caption) for s in DatasetFolder(folder).samples(split)}, pairs, split)
