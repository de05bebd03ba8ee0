"""Each export read back by the library it is for: the same pictures and captions, nothing that was taken back."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run_command
from PIL import Image

from biomedclip.config import check_config
from biomedclip.errors import ConfigError, DataError
from biomedclip.files import sha256_file
from biomedclip.schema import KEY_PATTERN, Article, Pair
from biomedclip.shards import DatasetFolder, DatasetWriter
from data_builders.exports import run as export_room
from data_builders.exports.biomedica import KEYS
from data_builders.exports.run import SCHEMAS, export
from data_builders.exports.samples import ExportConfig
from data_builders.purge import purge, read_withdrawals

left_open_by_webdataset = pytest.mark.filterwarnings(r"ignore:unclosed file .*\d{6}\.tar:ResourceWarning")

CAPTIONS = ("Plain.", 'µm\t≥ 10^4, “quoted” and "so"', "Two\nlines, 中文", "NA")
FORMATS = (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))
GONE = "PMC4"


def make_pair(i: int) -> Pair:
    encoding, name = FORMATS[i % 3]
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 7 + i, 3), dtype=np.uint8)).save(buffer, name)
    image = buffer.getvalue()
    caption = CAPTIONS[i % 4] if i != 7 else "Not NA."
    mentions = [{"text": f"See figure {i}.", "section": "Results"}] if i > 8 else []
    return Pair(
        key=f"pmc-{i}-f1-p0", image=image, image_format=encoding, width=7 + i, height=9, caption=caption,
        captions=(caption, "Another.") if i == 5 else (), source="pmc", licence="CC BY" if i % 2 else "CC0",
        sha256=hashlib.sha256(image).hexdigest(), phash=2**64 - 1 - i, split="test" if i % 5 == 4 else "train",
        article_id=f"PMC{1 + i // 4}.1", figure_id=f"F{i}", modality="CT" if i > 4 else None,
        concepts=("ct",) if i > 4 else (), labels=("tumour",) if i == 6 else (), flags=("alpha",) if i == 2 else (),
        sidecar={"file": f"f{i}.jpg", "mentions": mentions} if i else {},
    )  # fmt: skip


PAIRS = {pair.key: pair for pair in map(make_pair, range(20))}
LEFT = {key: pair for key, pair in PAIRS.items() if pair.article_id != f"{GONE}.1"}
ARTICLES = [
    Article(article_id="PMC1.1", pmcid=1, version=1, title="First", licence="CC BY"),
    Article(article_id="PMC3.1", pmcid=3, version=1, title="Third", licence="CC BY", journal="J", published="2024-03",
            citation="J. 2024", mesh=("Humans", "Lung"), keywords=("k",), pmid=9, doi="10.1000/3"),
]  # fmt: skip


def write_dataset(folder: Path) -> Path:
    with DatasetWriter(folder, name="small", max_samples=6) as writer:
        for pair in PAIRS.values():
            writer.add(pair)
        writer.finish(articles=ARTICLES, provenance={"notices": ["From PMC."]}, card=lambda manifest: "")
    purge(folder, read_withdrawals(GONE, reason="retracted"))
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def config(**values: Any) -> ExportConfig:
    return check_config(values, ExportConfig, "test")


def by_split(split: str) -> dict[str, Pair]:
    return {key: pair for key, pair in LEFT.items() if pair.split == split}


# BIOMEDICA


@left_open_by_webdataset
def test_webdataset_reads_biomedicas_members_and_keys(dataset, tmp_path):
    wds = pytest.importorskip("webdataset")
    facts = export(dataset, tmp_path / "out", "biomedica", config(max_samples=5))
    assert facts["splits"] == {"train": 13, "test": 3}
    for split, count in (("train", 3), ("test", 1)):
        tars = sorted(str(path) for path in (tmp_path / "out" / split).glob("*.tar"))
        assert len(tars) == count
        found = {}
        for sample in wds.WebDataset(tars, shardshuffle=False):
            key = sample["__key__"]
            pair, facts = PAIRS[key], json.loads(sample["json"])
            found[key] = sample
            assert KEY_PATTERN.fullmatch(key)
            assert {name for name in sample if not name.startswith("_")} == {"jpg", "txt", "json"}
            assert (sample["jpg"], sample["txt"].decode()) == (pair.image, pair.caption)
            assert list(facts) == list(KEYS)
            assert len(KEYS) == 25
            check_biomedica(facts, pair, split)
        assert found.keys() == by_split(split).keys()


def check_biomedica(facts: dict[str, Any], pair: Pair, split: str) -> None:
    name = pair.sidecar.get("file", f"{pair.key}.jpg")
    article = next((a for a in ARTICLES if a.article_id == pair.article_id), None)
    assert facts["image_file_name"] == name
    assert facts["image_hash"] == hashlib.md5(pair.image).hexdigest()
    assert facts["image_size"] == [pair.width, pair.height]
    assert facts["image_context"] == {name: [m["text"] for m in pair.sidecar.get("mentions", ())]}
    assert facts["image_set"] == sorted(
        f"{key}.jpg" for key, other in by_split(split).items() if other.article_id == pair.article_id
    )
    assert facts["image_primary_label"] == ([pair.modality] if pair.modality else [])
    assert facts["image_secondary_label"] == [*pair.concepts, *pair.labels]
    assert (facts["article_accession_id"], facts["article_license"]) == (pair.article_id[:-2], pair.licence)
    assert facts["article_title"] == (article.title if article else "")
    assert (facts["article_journal"], facts["article_date"]) == (
        (article.journal or "", article.published or "") if article else ("", "")
    )
    assert facts["article_mesh_terms"] == (list(article.mesh) if article else [])
    for empty in ("image_cluster_id", "image_label_id", "article_abstract", "article_text", "article_reference_count"):
        assert facts[empty] is None
    assert facts["article_reference_ids"] == facts["article_reference_list"] == facts["article_subject"] == []


def test_the_readme_says_what_biomedicas_keys_cannot_hold(dataset, tmp_path):
    export(dataset, tmp_path / "out", "biomedica")
    text = (tmp_path / "out" / "README.md").read_text()
    assert all(f"`{key}`" in text for key in KEYS)
    assert "taken back before this export: 4" in text
    assert "From PMC." in text
    assert "not for clinical use" in text


def test_a_set_without_articles_is_exported_too(tmp_path):
    with DatasetWriter(tmp_path / "set", name="labels") as writer:
        pair = make_pair(1)
        writer.add(Pair(**{**{f: getattr(pair, f) for f in Pair.__dataclass_fields__}, "article_id": None}))
        writer.finish(provenance={}, card=lambda manifest: "")
    export(tmp_path / "set", tmp_path / "out", "biomedica")
    with tarfile.open(tmp_path / "out" / "train" / "000000.tar") as tar:
        facts = json.loads(tar.extractfile(f"{pair.key}.json").read())
    assert (facts["article_accession_id"], facts["image_set"]) == ("", [f"{pair.key}.jpg"])


# open_clip


def test_pandas_reads_the_csv_as_open_clip_does(dataset, tmp_path):
    pandas = pytest.importorskip("pandas")
    facts = export(dataset, tmp_path / "out", "open_clip_csv")
    assert facts["dropped"] == {"caption_reads_as_missing": 3}
    for split in ("train", "test"):
        table = pandas.read_csv(tmp_path / "out" / f"{split}.csv", sep="\t")
        wanted = {key: pair for key, pair in by_split(split).items() if pair.caption != "NA"}
        assert list(table.columns) == ["filepath", "title", "key", "article_id", "licence"]
        assert dict(zip(table["key"], table["title"], strict=True)) == {k: p.caption for k, p in wanted.items()}
        assert dict(zip(table["key"], table["licence"], strict=True)) == {k: p.licence for k, p in wanted.items()}
        for key, path in zip(table["key"], table["filepath"], strict=True):
            assert (tmp_path / "out" / path).read_bytes() == PAIRS[key].image
            assert Path(path).suffix == f".{PAIRS[key].image_format}"
    written = {path.stem for path in (tmp_path / "out" / "images").rglob("*.*")}
    assert written == {key for key, pair in LEFT.items() if pair.caption != "NA"}


def test_another_separator_is_used(dataset, tmp_path):
    pandas = pytest.importorskip("pandas")
    export(dataset, tmp_path / "out", "open_clip_csv", config(separator=","))
    assert len(pandas.read_csv(tmp_path / "out" / "train.csv")) == 11
    with pytest.raises(ConfigError, match="separator"):
        config(separator="ab")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_open_clips_own_dataset_class_reads_the_csv(dataset, tmp_path, monkeypatch):
    data = pytest.importorskip("open_clip_train.data")
    export(dataset, tmp_path / "out", "open_clip_csv")
    monkeypatch.chdir(tmp_path / "out")
    read = data.CsvDataset("train.csv", lambda image: image.size, "filepath", "title", "\t", tokenizer=lambda t: t)
    found = [read[i] for i in range(len(read))]
    wanted = [pair for pair in by_split("train").values() if pair.caption != "NA"]
    assert found == [((pair.width, pair.height), pair.caption) for pair in wanted]


# datasets


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
    return datasets, str(tmp_path / "cache")


def test_datasets_loads_the_folder_by_its_readme(dataset, tmp_path, offline):
    datasets, cache = offline
    facts = export(dataset, tmp_path / "out", "hf_parquet", config(max_samples=5))
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=cache)
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 13, "test": 3} == facts["splits"]
    assert isinstance(loaded["train"].features["image"], datasets.Image)
    for split, rows in loaded.items():
        wanted = by_split(split)
        raw = rows.cast_column("image", datasets.Image(decode=False))
        assert {row["key"]: row["image"]["bytes"] for row in raw} == {k: p.image for k, p in wanted.items()}
        for row in rows:
            pair = PAIRS[row["key"]]
            assert row["image"].size == (pair.width, pair.height)
            assert (row["caption"], row["captions"]) == (pair.caption, list(pair.captions or (pair.caption,)))
            assert (row["phash"], row["licence"], row["split"]) == (pair.phash, pair.licence, split)
            assert (row["labels"], row["modality"]) == (list(pair.labels), pair.modality)
            assert json.loads(row["sidecar"]).get("mentions", []) == pair.sidecar.get("mentions", [])
    streamed = datasets.load_dataset(str(tmp_path / "out"), split="test", streaming=True)
    assert {row["key"] for row in streamed} == by_split("test").keys()


# LLaVA


def test_each_line_is_a_conversation_about_a_picture_that_is_there(dataset, tmp_path):
    export(dataset, tmp_path / "out", "llava_jsonl")
    for split in ("train", "test"):
        lines = (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()
        entries = {entry["id"]: entry for entry in map(json.loads, lines)}
        assert entries.keys() == by_split(split).keys()
        for key, entry in entries.items():
            human, answer = entry["conversations"]
            assert (human["from"], answer) == ("human", {"from": "gpt", "value": PAIRS[key].caption})
            assert human["value"].startswith("<image>\n")
            assert (tmp_path / "out" / entry["image"]).read_bytes() == PAIRS[key].image
            assert entry["licence"] == PAIRS[key].licence


# All of them


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_an_export_is_reproducible_interrupted_or_not_and_said_to_be_complete(dataset, tmp_path, schema, monkeypatch):
    facts = export(dataset, tmp_path / "a", schema, config(max_samples=4))
    assert facts == json.loads((tmp_path / "a" / "export.json").read_bytes())
    whole = tree(tmp_path / "a")
    sums = dict(line.split("  ", 1)[::-1] for line in (tmp_path / "a" / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: digest for name, digest in whole.items() if name not in ("SHA256SUMS", "export.json")}
    assert not [name for name in whole if "/." in f"/{name}"]

    real = export_room.write_text
    monkeypatch.setattr(export_room, "write_text", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        export(dataset, tmp_path / "b", schema, config(max_samples=4))
    assert not (tmp_path / "b" / "export.json").exists()
    monkeypatch.setattr(export_room, "write_text", real)
    assert export(dataset, tmp_path / "b", schema, config(max_samples=4)) == facts
    assert tree(tmp_path / "b") == whole
    assert export(dataset, tmp_path / "b", schema, config(max_samples=4)) == facts
    assert tree(tmp_path / "b") == whole


def test_a_folder_with_other_files_or_another_export_is_left_alone(dataset, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        export(dataset, tmp_path / "mine", "hf_parquet")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    export(dataset, tmp_path / "out", "llava_jsonl")
    with pytest.raises(ConfigError, match="holds another export"):
        export(dataset, tmp_path / "out", "open_clip_csv")


def test_an_export_made_before_a_purge_is_not_taken_for_one_made_after(tmp_path):
    folder = write_dataset(tmp_path / "set")
    export(folder, tmp_path / "out", "llava_jsonl")
    purge(folder, read_withdrawals("PMC1", reason="removed"))
    with pytest.raises(ConfigError, match="of other samples"):
        export(folder, tmp_path / "out", "llava_jsonl")


def test_nothing_left_an_unknown_schema_and_a_damaged_shard_are_one_line(tmp_path):
    folder = write_dataset(tmp_path / "set")
    with pytest.raises(ConfigError, match="use one of biomedica, open_clip_csv, hf_parquet, llava_jsonl"):
        export(folder, tmp_path / "out", "biomedika")
    tar = folder / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(DataError, match="is cut off"):
        export(folder, tmp_path / "out", "hf_parquet")
    assert not (tmp_path / "out" / "export.json").exists()
    purge(folder, read_withdrawals(",".join(f"PMC{n}" for n in range(1, 6)), reason="removed"))
    with pytest.raises(DataError, match="has no samples left"):
        export(folder, tmp_path / "none", "hf_parquet")


def test_indexes_are_read_a_shard_at_a_time(dataset, tmp_path, monkeypatch):
    def refuse(self):
        raise AssertionError("the whole index was read")

    monkeypatch.setattr(DatasetFolder, "stored_index", property(refuse))
    for schema in SCHEMAS:
        export(dataset, tmp_path / schema, schema)


def test_the_command_prints_counts_and_drops(dataset, tmp_path):
    options = ("--schema", "open_clip_csv", "--out", tmp_path / "out", "--csv-separator", ";")
    done = run_command("data", "export", dataset, *options)
    assert done.returncode == 0, done.stderr
    assert "13 samples as open_clip_csv (train 11, test 2), 4 taken back before" in done.stdout
    assert "3 dropped: caption_reads_as_missing" in done.stdout
    assert (tmp_path / "out" / "train.csv").read_text().startswith("filepath;title;")
