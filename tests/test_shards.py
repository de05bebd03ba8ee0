"""The dataset folder, written here and read back by others' code: headers, offsets, counts, and planted corruption."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from biomedclip.errors import DataError
from biomedclip.schema import INDEX_COLUMNS, LEDGER_COLUMNS, Article, Drop, Pair
from biomedclip.shards import DatasetFolder, DatasetWriter, sidecar, tar_header, verify
from biomedclip.tokens import count_tokens

RNG = np.random.default_rng(0)


def pair(key: str, **changes: Any) -> Pair:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    image = changes.pop("image", buffer.getvalue())
    facts: dict[str, Any] = {
        "key": key, "image": image, "image_format": "png", "width": 8, "height": 8, "caption": f"Caption of {key}.",
        "source": "pmc", "licence": "CC BY", "sha256": hashlib.sha256(image).hexdigest(), "phash": 2**64 - 1,
    }  # fmt: skip
    return Pair(**{**facts, **changes})


ITEMS: tuple[Pair | Drop, ...] = (
    pair("a", article_id="PMC1.1", figure_id="F1", labels=("cell",), label_ids=(3,), flags=("alpha",)),
    Drop(source="pmc", item="F2", reason="no_caption", article_id="PMC1.1"),
    pair("b", split="test", caption="µm – ≥ 10^4 “quoted”\nsecond line", phash=0),
    pair("c"),
    Drop(source="pmc", item="F3", reason="broken_image", detail="cut off"),
    Drop(source="pmc", item="F4", reason="no_caption"),
    pair("d", licence="CC0", source="bccd", captions=("Caption of d.", "Another one.")),
)
ARTICLES = (
    Article(article_id="PMC20.1", pmcid=20, version=1, title="Later", licence="CC0", authors=("A B", "C D")),
    Article(article_id="PMC1.1", pmcid=1, version=1, title="First", licence="CC BY", is_retracted=False),
)


def write(folder: Path, items: Sequence[Pair | Drop] = ITEMS, **limits: int) -> dict[str, Any]:
    with DatasetWriter(folder, name="small", **limits) as writer:
        for item in items:
            writer.add(item)
        return writer.finish(articles=ARTICLES, provenance={"config": {}}, card=lambda facts: f"# {facts['name']}\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


def test_a_header_is_what_tarfile_reads_and_the_same_every_time() -> None:
    header = tar_header("pmc-1-v1-f1-p0.jpg", 1234)
    info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    assert (info.name, info.size, info.type) == ("pmc-1-v1-f1-p0.jpg", 1234, tarfile.REGTYPE)
    assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)
    assert header == tar_header("pmc-1-v1-f1-p0.jpg", 1234)
    assert len(header) == 512


def test_a_name_too_long_for_a_header_is_refused() -> None:
    tar_header("x" * 100, 1)
    with pytest.raises(DataError, match="too long for a tar member"):
        tar_header("x" * 101, 1)


def test_tarfile_reads_every_member_in_order(folder: Path) -> None:
    with tarfile.open(folder / "00000.tar") as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    kept = [item for item in ITEMS if isinstance(item, Pair) and item.split == "train"]
    assert [name for name, _ in members] == [f"{p.key}.{kind}" for p in kept for kind in ("jpg", "txt", "json")]
    assert [data for _, data in members][0::3] == [p.image for p in kept]
    assert [data.decode() for name, data in members if name.endswith("txt")] == [p.caption for p in kept]
    assert [json.loads(data) for name, data in members if name.endswith("json")] == [sidecar(p) for p in kept]


def test_a_shard_ends_in_two_zero_blocks_on_a_block_boundary(folder: Path) -> None:
    data = (folder / "00000.tar").read_bytes()
    assert len(data) % 512 == 0
    assert data.endswith(bytes(1024))


def test_the_index_has_its_columns_and_its_offsets_point_at_the_members(folder: Path) -> None:
    table = pq.read_table(folder / "00000.parquet")
    assert table.column_names == list(INDEX_COLUMNS)
    data = (folder / "00000.tar").read_bytes()
    for row in table.to_pylist():
        item = next(p for p in ITEMS if isinstance(p, Pair) and p.key == row["key"])
        assert data[row["image_offset"] :][: row["image_size"]] == item.image
        assert data[row["text_offset"] :][: row["text_size"]] == item.caption.encode()
        assert json.loads(data[row["json_offset"] :][: row["json_size"]]) == sidecar(item)
        assert row["caption_tokens"] == count_tokens(item.caption)
        assert (row["phash"], row["image_format"], row["licence_class"]) == (
            item.phash, "png", "commercial-derivatives",
        )  # fmt: skip
        assert (row["labels"], row["label_ids"], row["num_captions"]) == (
            list(item.labels), list(item.label_ids), len(item.captions) or 1,
        )  # fmt: skip


def test_a_shard_holds_one_split_and_no_more_than_it_may(tmp_path: Path) -> None:
    items = [pair(f"k{i}", split="val" if i % 3 == 0 else "train") for i in range(10)]
    manifest = write(tmp_path, items, max_samples=2)
    assert manifest["splits"] == {"train": 6, "val": 4}
    for shard in manifest["shards"]:
        rows = pq.read_table(tmp_path / shard["name"].replace(".tar", ".parquet")).to_pylist()
        assert {row["split"] for row in rows} == {shard["split"]}
        assert len(rows) == shard["samples"] <= 2
    assert [shard["name"] for shard in manifest["shards"]] == [f"{i:05d}.tar" for i in range(5)]
    assert json.loads((tmp_path / "sizes.json").read_bytes()) == {s["name"]: s["samples"] for s in manifest["shards"]}


def test_a_shard_is_closed_when_it_has_reached_its_size(tmp_path: Path) -> None:
    manifest = write(tmp_path, [pair(f"k{i}", image=bytes(3000)) for i in range(4)], max_bytes=6000)
    assert [shard["samples"] for shard in manifest["shards"]] == [2, 2]


def test_seen_is_kept_plus_dropped_in_manifest_and_ledger(folder: Path) -> None:
    dataset = DatasetFolder(folder)
    ledger = dataset.manifest["ledger"]
    assert ledger == {"seen": 7, "kept": 4, "dropped": {"broken_image": 1, "no_caption": 2}}
    assert ledger["seen"] == ledger["kept"] + sum(ledger["dropped"].values())
    rows = dataset.ledger.to_pylist()
    assert list(rows[0]) == list(LEDGER_COLUMNS)
    assert [row["item"] for row in rows] == ["F1", "F2", "b", "c", "F3", "F4", "d"]
    assert [row["key"] for row in rows if row["status"] == "kept"] == ["a", "b", "c", "d"]
    assert rows[4] == {
        "source": "pmc", "article_id": None, "item": "F3", "status": "dropped", "reason": "broken_image",
        "detail": "cut off", "key": None,
    }  # fmt: skip


def test_articles_come_back_whole_and_in_order(folder: Path) -> None:
    rows = DatasetFolder(folder).articles.to_pylist()
    assert [row["article_id"] for row in rows] == ["PMC1.1", "PMC20.1"]
    expected = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(ARTICLES[0]).items()}
    assert rows[1] == expected


def test_samples_come_back_equal(folder: Path) -> None:
    pairs = {item.key: item for item in ITEMS if isinstance(item, Pair)}
    samples = list(DatasetFolder(folder).samples())
    assert len(DatasetFolder(folder)) == len(samples) == 4
    for sample in samples:
        assert (sample.image, sample.caption) == (pairs[sample.key].image, pairs[sample.key].caption)
        assert sample.json == sidecar(pairs[sample.key])
    assert [sample.key for sample in DatasetFolder(folder).samples("test")] == ["b"]
    assert [path.name for path in DatasetFolder(folder).shard_paths("test")] == ["00001.tar"]


def test_a_sidecar_has_no_nulls_and_no_empty_lists() -> None:
    facts = sidecar(pair("a", sidecar={"mentions": [], "label": None, "file": "f.jpg"}))
    assert facts["file"] == "f.jpg"
    assert not [key for key, value in facts.items() if value in (None, [])]


def test_checksums_are_those_of_the_files(folder: Path) -> None:
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    names = {path.name for path in folder.iterdir()} - {"SHA256SUMS", "manifest.json"}
    assert {line.split("  ")[1] for line in lines} == names
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_the_same_input_gives_the_same_bytes_over_an_older_dataset_too(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two", [pair(f"old{i}") for i in range(9)], max_samples=1)
    write(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert len(list((tmp_path / "one").iterdir())) == len(list((tmp_path / "two").iterdir()))


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"key": "pone.0000217.g001"}, "cannot be a sample key"),
        ({"key": "UPPER"}, "cannot be a sample key"),
        ({"key": "x" * 81}, "cannot be a sample key"),
        ({"key": "../a"}, "cannot be a sample key"),
        ({"key": ""}, "cannot be a sample key"),
        ({"image_format": "gif"}, "in an encoding shards do not hold"),
        ({"caption": " \n"}, "has an empty caption"),
        ({"captions": ("another",)}, "is not the caption"),
        ({"licence": ""}, "has no licence"),
        ({"split": "validation"}, "has an unknown split"),
    ],
)
def test_a_pair_that_readers_would_lose_is_refused(tmp_path: Path, changes: dict[str, Any], wrong: str) -> None:
    with DatasetWriter(tmp_path, name="x") as writer, pytest.raises(DataError, match=wrong):
        writer.add(pair(**{"key": "a", **changes}))


def test_a_key_may_be_used_once(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, name="x") as writer:
        writer.add(pair("a"))
        with pytest.raises(DataError, match="is the key of two samples"):
            writer.add(pair("a", split="test"))


def write_three_and_stop(folder: Path) -> None:
    with DatasetWriter(folder, name="x", max_samples=2) as writer:
        for i in range(3):
            writer.add(pair(f"k{i}"))
        raise KeyboardInterrupt


def test_an_interrupted_writer_leaves_only_whole_shards_and_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_three_and_stop(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.parquet", "00000.tar"]
    assert pq.read_table(tmp_path / "00000.parquet").num_rows == 2
    with pytest.raises(DataError, match="holds no finished dataset; run its `biomedclip build` command again"):
        DatasetFolder(tmp_path)


def test_a_folder_that_is_missing_broken_or_newer_is_one_clear_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        DatasetFolder(tmp_path / "nowhere")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(DataError, match=r"is not of format 1 \(found 99\)"):
        DatasetFolder(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        DatasetFolder(folder)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "damage", "finding"),
    [
        ("00000.tar", cut, "00000.tar: has other bytes"),
        ("00000.tar", flip, "00000.tar: has other bytes"),
        ("00001.tar", Path.unlink, "00001.tar: is missing"),
        ("00000.parquet", flip, "00000.parquet: has other bytes"),
        ("ledger.parquet", Path.unlink, "ledger.parquet: is missing"),
        ("README.md", lambda path: path.write_text("mine"), "README.md: has other bytes"),
    ],
)
def test_verify_finds_planted_corruption(
    folder: Path, name: str, damage: Callable[[Path], object], finding: str
) -> None:
    assert verify(folder) == []
    damage(folder / name)
    (problem,) = verify(folder)
    assert finding in problem


def test_verify_checks_counts_that_the_checksums_cannot_know(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["ledger"]["seen"] += 1
    manifest["ledger"]["kept"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert any("the index has 4 rows, the ledger kept 5" in problem for problem in verify(folder))


def test_reading_a_damaged_shard_names_the_sample(folder: Path) -> None:
    dataset = DatasetFolder(folder)
    rows = dataset.index.to_pylist()
    flip(folder / "00000.tar")
    with pytest.raises(DataError, match=r"00000\.tar: a: has other bytes than its index says"):
        dataset.read(rows[0])
    cut(folder / "00000.tar")
    with pytest.raises(DataError, match=r"00000\.tar: d: is cut off \(found"):
        dataset.read(rows[2])


def test_a_broken_index_is_one_clear_line(folder: Path) -> None:
    (folder / "00000.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        len(DatasetFolder(folder).index)
