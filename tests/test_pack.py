"""Pack: the bundled articles from plan to dataset folder, with the same bytes by any workers and after any kill."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from command_line import run_command
from synthetic_units import article, articles, pair, write_raw

from biomedclip.errors import ConfigError, DataError
from biomedclip.shards import DatasetFolder, verify
from data_builders import pack as pack_module
from data_builders.build import ShardConfig
from data_builders.claims import hold_folder
from data_builders.contamination import read_hashes
from data_builders.pack import WORK, PackConfig, pack
from data_builders.pmc.harvest import harvest
from data_builders.pmc.plan import plan_source
from data_builders.pmc.plan_rules import PlanConfig
from data_builders.select import select
from data_builders.selection import SelectConfig
from data_builders.units import pair_rows, unit_name, write_unit

SMALL = PackConfig(name="small", shards=ShardConfig(max_samples=12, max_bytes=1_500_000))
left_open_by_webdataset = pytest.mark.filterwarnings(r"ignore:unclosed file .*\d{5}\.tar:ResourceWarning")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled articles, harvested."""
    sample = str(resources.files("data_builders") / "sample" / "pmc")
    folder = tmp_path_factory.mktemp("harvest")
    plan_source(sample, folder / "plan.parquet", PlanConfig(licence="commercial-derivatives", unit_size=6))
    harvest(folder / "plan.parquet", sample, folder / "raw")
    return folder / "raw"


@pytest.fixture(scope="module")
def selection(raw: Path) -> Path:
    path = raw.parent / "selection.parquet"
    select([raw], path, SelectConfig(where="width >= 224"))
    return path


@pytest.fixture(scope="module")
def packed(selection: Path) -> Path:
    out = selection.parent / "packed"
    pack(selection, out, SMALL)
    return out


def pack_command(selection: Path, out: Path, workers: int) -> list[str]:
    """The command that packs as SMALL says."""
    settings = ["name=small", "shards.max_samples=12", "shards.max_bytes=1500000"]
    return [sys.executable, "-m", "biomedclip", "data", "pack", str(selection), "--out", str(out),
            "--workers", str(workers), *(word for value in settings for word in ("--set", value))]  # fmt: skip


def sums(folder: Path) -> str:
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []
    return (folder / "SHA256SUMS").read_text() + hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def test_the_folder_is_complete_and_every_sample_is_the_harvested_one(packed: Path, raw: Path) -> None:
    assert verify(packed) == []
    dataset = DatasetFolder(packed)
    rows = {row["key"]: row for row in pair_rows(raw).to_pylist()}
    seen = 0
    for sample in dataset.samples():
        row = rows[sample.key]
        assert hashlib.sha256(sample.image).hexdigest() == row["sha256"] == sample.row["sha256"]
        assert (sample.caption, sample.row["split"]) == (row["caption"], row["split"])
        for name in ("width", "height", "phash", "caption_tokens", "licence_class", "flags", "article_id", "panel"):
            assert sample.row[name] == row[name], name
        seen += 1
    # One caption is nothing but a label.
    assert seen == len(dataset) == sum(row["width"] >= 224 for row in rows.values()) - 1 > 60


def test_shards_hold_one_split_and_no_more_than_they_may(packed: Path) -> None:
    manifest = DatasetFolder(packed).manifest
    assert len(manifest["shards"]) >= 6
    index = DatasetFolder(packed).index.to_pylist()
    for shard in manifest["shards"]:
        rows = [row for row in index if row["shard"] == shard["name"]]
        assert {row["split"] for row in rows} == {shard["split"]}
        assert len(rows) == shard["samples"] <= 12
        largest = max(row["image_size"] for row in rows)
        assert shard["bytes"] < 1_500_000 + largest + 20_000
    assert set(manifest["splits"]) == {"train", "val", "test"}


def test_the_ledger_has_every_figure_once(packed: Path, raw: Path) -> None:
    manifest = DatasetFolder(packed).manifest
    ledger = DatasetFolder(packed).ledger.to_pylist()
    assert manifest["ledger"]["seen"] == len(ledger)
    assert len(ledger) == manifest["ledger"]["kept"] + sum(manifest["ledger"]["dropped"].values())
    found = Counter(row["reason"] for row in ledger if row["status"] == "dropped")
    assert manifest["ledger"]["dropped"] == dict(sorted(found.items()))
    assert found["where"] == sum(width < 224 for width in pair_rows(raw)["width"].to_pylist())
    assert found["missing_graphic"] > 0
    assert all((row["key"] is None) == (row["status"] == "dropped") for row in ledger)


def test_articles_card_and_provenance_say_where_it_comes_from(packed: Path) -> None:
    dataset = DatasetFolder(packed)
    ids = dataset.articles["article_id"].to_pylist()
    assert len(ids) == len(set(ids))
    assert set(dataset.index["article_id"].to_pylist()) <= set(ids)
    assert dataset.articles["pmcid"].to_pylist() == sorted(dataset.articles["pmcid"].to_pylist())
    card = (packed / "README.md").read_text()
    for text in ("courtesy of the U.S. National Library of Medicine", "| PMC12419688.1 |", "10.7554/eLife.30274",
                 "Built under the preset `commercial-derivatives`", "cc-by-4.0", "| dropped: where |"):  # fmt: skip
        assert text in card
    provenance = dataset.manifest["provenance"]
    assert provenance["config"]["select"]["where"] == "width >= 224"
    assert str(packed.parent) not in (packed / "manifest.json").read_text()
    assert "language:\n- en\n" in card


@pytest.mark.slow
def test_two_workers_give_the_same_bytes(packed: Path, selection: Path, tmp_path: Path) -> None:
    pack(selection, tmp_path / "two", SMALL, workers=2)
    assert sums(tmp_path / "two") == sums(packed)


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_bytes(packed: Path, selection: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    command = pack_command(selection, tmp_path / "out", workers=2)
    done = subprocess.run([*command, "--engine", "ray"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sums(tmp_path / "out") == sums(packed)


def test_a_finished_pack_is_returned_and_another_is_refused(
    packed: Path, selection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sums(packed)
    monkeypatch.setattr(pack_module, "_write_shards", None)
    assert pack(selection, packed, SMALL) == DatasetFolder(packed).manifest
    with pytest.raises(ConfigError, match="finished dataset of another config"):
        pack(selection, packed, SMALL.model_copy(update={"shuffle_seed": 1}))
    other = selection.parent / "other.parquet"
    select([selection.parent / "raw"], other, SelectConfig())
    with pytest.raises(ConfigError, match="finished dataset of another input"):
        pack(other, packed, SMALL)
    assert sums(packed) == before


def test_other_files_and_other_builders_are_left_alone(selection: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds other files \(found thesis.txt\)"):
        pack(selection, tmp_path / "mine", SMALL)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with hold_folder(tmp_path / "busy"), pytest.raises(ConfigError, match="is being written by another process"):
        pack(selection, tmp_path / "busy", SMALL)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        pack(selection, tmp_path / "file", SMALL)


def interrupted(selection: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Pack, and fail after some images were read."""
    whole, calls = pack_module.read_image, 0

    def read(*arguments: Any) -> bytes:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "read_image", read)
        with pytest.raises(KeyboardInterrupt):
            pack(selection, out, SMALL)


def test_finished_shards_stay_and_the_rest_is_written(
    packed: Path, selection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(selection, out, monkeypatch, after=30)
    marks = sorted(path.stem for path in (out / WORK).glob("0*.json"))
    assert marks == ["00000", "00001"]
    assert not (out / "manifest.json").exists()
    times = {path: path.stat().st_mtime_ns for path in out.glob("0000[01].tar")}
    (out / "00001.parquet").unlink()
    with pytest.raises(DataError, match="no finished dataset"):
        DatasetFolder(out)
    pack(selection, out, SMALL)
    assert sums(out) == sums(packed)
    assert (out / "00000.tar").stat().st_mtime_ns == times[out / "00000.tar"]
    assert (out / "00001.tar").stat().st_mtime_ns != times[out / "00001.tar"]


def test_what_another_config_left_is_overwritten(
    packed: Path, selection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(selection, out, monkeypatch, after=30)
    config = SMALL.model_copy(update={"shuffle_seed": 5})
    manifest = pack(selection, out, config)
    assert verify(out) == []
    order = [sample.key for sample in DatasetFolder(out).samples()]
    assert sorted(order) == sorted(sample.key for sample in DatasetFolder(packed).samples())
    assert manifest["provenance"]["config"]["shuffle_seed"] == 5


@pytest.mark.timeout(600)  # a busy machine starts a dozen processes slowly
@pytest.mark.fault
@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_at_any_moment_and_a_rerun_give_the_same_bytes(
    packed: Path, selection: Path, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "out"
    command = pack_command(selection, out, workers)
    # Every kill comes a little later than the one before, until one comes too late.
    chance, kills = random.Random(workers), 0
    while not (out / "manifest.json").exists():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with process:
            try:
                _, errors = process.communicate(timeout=0.5 + 0.15 * kills + chance.uniform(0, 0.15))
                assert process.returncode == 0, errors.decode()
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        time.sleep(1.0 if workers > 1 else 0)  # orphaned workers end when they miss their caller
    assert kills >= 2
    subprocess.run(command, check=True, capture_output=True)
    assert sums(out) == sums(packed)
    assert verify(out) == []


def test_pairs_that_changed_since_the_selection_are_refused(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", articles([1, 2]))
    select([raw], tmp_path / "s.parquet", SelectConfig())
    tar = raw / "unit-000000.tar"
    data = bytearray(tar.read_bytes())
    data[3000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DataError, match=r"unit-000000\.tar: pmc-.*has other bytes than its row says"):
        pack(tmp_path / "s.parquet", tmp_path / "out", SMALL)
    write_unit(raw, unit_name(1), articles([3]), identity={})
    with pytest.raises(DataError, match=r"is not what s\.parquet was made from"):
        pack(tmp_path / "s.parquet", tmp_path / "out2", SMALL)
    (raw / "unit-000000.json").unlink()
    (raw / "unit-000001.json").unlink()
    with pytest.raises(DataError, match="holds no finished unit"):
        pack(tmp_path / "s.parquet", tmp_path / "out3", SMALL)


def test_a_selection_of_nothing_is_refused_with_its_reasons(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", articles([1]))
    select([raw], tmp_path / "s.parquet", SelectConfig(where="false"))
    with pytest.raises(DataError, match=r"selects nothing \(found where 4\)"):
        pack(tmp_path / "s.parquet", tmp_path / "out", SMALL)


def test_two_folders_become_one_dataset(tmp_path: Path) -> None:
    shared = pair(1, 0).image
    a = write_raw(tmp_path / "a", articles(range(1, 6)))
    labelled = [pair(50, n, article_id=None, key=f"set-{n}", source="set", labels=("cyst",), label_ids=(2,),
                     split="test", licence="CC0", sidecar={}, captions=()) for n in range(3)]  # fmt: skip
    again = [article(3), article(9), pair(9, 0, image=shared), pair(3, 0)]
    b = write_raw(tmp_path / "b", [*labelled, *again])
    select([a, b], tmp_path / "s.parquet", SelectConfig())
    manifest = pack(tmp_path / "s.parquet", tmp_path / "out", SMALL)
    assert verify(tmp_path / "out") == []
    dataset = DatasetFolder(tmp_path / "out")
    assert manifest["sources"] == {"pmc": 20, "set": 3}
    assert manifest["ledger"] == {
        "seen": 30, "kept": 23, "dropped": {"duplicate_image": 1, "duplicate_key": 1, "missing_graphic": 5},
    }  # fmt: skip
    assert dataset.articles["article_id"].to_pylist() == [f"PMC{n}.1" for n in (1, 2, 3, 4, 5, 9)]
    clusters = {row["key"]: row["dup_cluster"] for row in dataset.index.to_pylist() if row["dup_cluster"]}
    assert list(clusters) == ["pmc-1-v1-f0-p0"]
    dropped = {row["reason"]: row for row in dataset.ledger.to_pylist() if row["status"] == "dropped"}
    assert dropped["duplicate_image"]["detail"] == f"cluster {clusters['pmc-1-v1-f0-p0']}"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "PMC9.1" not in card
    sample = next(sample for sample in dataset.samples("test") if sample.key == "set-1")
    assert (sample.row["labels"], sample.row["label_ids"], sample.json["labels"]) == (["cyst"], [2], ["cyst"])


def test_more_articles_than_a_card_holds_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = articles([5], figures=1, licence_url="https://creativecommons.org/licenses/by/3.0/")
    raw = write_raw(tmp_path / "raw", [*articles(range(1, 5), figures=1), *older])
    select([raw], tmp_path / "s.parquet", SelectConfig())
    monkeypatch.setattr("data_builders.pack_tables.MAX_ATTRIBUTION_ROWS", 3)
    pack(tmp_path / "s.parquet", tmp_path / "out", SMALL)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("https://doi.org/10.1/") == 3
    assert "2 more articles are in `articles.parquet`." in card
    assert "- cc-by-3.0\n- cc-by-4.0\n" in card


@left_open_by_webdataset
def test_webdataset_reads_it(packed: Path) -> None:
    wds = pytest.importorskip("webdataset")
    expected = {sample.key: (sample.image, sample.caption) for sample in DatasetFolder(packed).samples("train")}
    tars = [str(path) for path in DatasetFolder(packed).shard_paths("train")]
    found = {s["__key__"]: (s["jpg"], s["txt"].decode()) for s in wds.WebDataset(tars, shardshuffle=False)}
    assert found == expected


def test_datasets_loads_it_by_its_card(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(str(packed), streaming=True, cache_dir=str(tmp_path))
    assert set(loaded) == {"train", "validation", "test"}
    undecoded = loaded["train"].cast_column("jpg", datasets.Image(decode=False))
    found = {row["__key__"]: (row["jpg"]["bytes"], row["txt"]) for row in undecoded}
    assert found == {sample.key: (sample.image, sample.caption) for sample in DatasetFolder(packed).samples("train")}


def test_the_commands_walk_from_units_to_a_dataset(raw: Path, packed: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        done = run_command("data", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    hashes, chosen = tmp_path / "hashes.parquet", tmp_path / "s.parquet"
    assert "pictures" in run("hashes", packed, "-o", hashes, "--name", "held-out")
    config = tmp_path / "select.yaml"
    config.write_text(f"against: [{hashes}]\n")
    text = run("select", raw, "--out", chosen, "--config", config, "--set", "where=width > 100")
    held_out = read_hashes(hashes).num_rows
    assert f"{held_out} left out: contaminated" in text
    assert "samples of held-out" in text
    text = run("pack", chosen, "--out", tmp_path / "out", "--set", "name=rest")
    assert f"{held_out} dropped: contaminated" in text
    assert verify(tmp_path / "out") == []
    keys = {sample.key for sample in DatasetFolder(tmp_path / "out").samples()}
    assert not keys & {sample.key for sample in DatasetFolder(packed).samples()}
