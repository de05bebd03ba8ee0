"""What was lost comes back byte for byte, nothing else is touched, and what cannot come back is said with a command."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from command_line import run_command
from synthetic_units import article, articles, pair, write_raw

from biomedclip.errors import ConfigError, DataError
from biomedclip.files import sha256_file
from biomedclip.schema import Drop
from biomedclip.shards import TOMBSTONES, DatasetFolder, verify
from data_builders.build import BuildConfig, ShardConfig, build
from data_builders.claims import hold_folder
from data_builders.pack import PackConfig, pack
from data_builders.pmc.harvest import harvest
from data_builders.pmc.plan import plan_source
from data_builders.pmc.plan_rules import PlanConfig
from data_builders.purge import purge, read_withdrawals
from data_builders.repair import repair
from data_builders.select import select
from data_builders.selection import SelectConfig
from data_builders.units import unit_name, write_unit

CONFIG = PackConfig(name="small", shards=ShardConfig(max_samples=8))


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw/, selection.parquet and packed/, with a duplicate so that dup_cluster says something."""
    root = tmp_path_factory.mktemp("origin")
    write_raw(root / "raw", articles(range(1, 6)), articles(range(6, 9)))
    select([root / "raw"], root / "selection.parquet", SelectConfig())
    pack(root / "selection.parquet", root / "packed", CONFIG)
    return root


@pytest.fixture
def root(origin: Path, tmp_path: Path) -> Path:
    shutil.copytree(origin, tmp_path / "root")
    return tmp_path / "root"


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}  # fmt: skip


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = (cut, change, Path.unlink)


def test_nothing_is_done_where_nothing_is_damaged(root):
    before = inodes(root / "packed")
    found = repair(root / "packed")
    assert (found.damaged, found.repaired, found.left) == ([], [], [])
    assert inodes(root / "packed") == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_with_its_selection_every_file_of_a_packed_dataset_comes_back_alone(root, damage):
    folder = root / "packed"
    whole = tree(folder)
    for name in sorted(set(whole) - {"manifest.json"}):
        before = inodes(folder)
        damage(folder / name)
        found = repair(folder, selection=root / "selection.parquet")
        assert (found.damaged, found.repaired, found.left) == ([name], [name], []), name
        assert tree(folder) == whole
        others = {other: place for other, place in inodes(folder).items() if other != name}
        assert others == {other: place for other, place in before.items() if other != name}
    assert verify(folder) == []


@pytest.mark.slow
def test_everything_at_once_comes_back_on_two_workers(root):
    folder = root / "packed"
    whole = tree(folder)
    for name, damage in zip(sorted(set(whole) - {"manifest.json"}), itertools.cycle(DAMAGES), strict=False):
        damage(folder / name)
    found = repair(folder, selection=root / "selection.parquet", workers=2)
    assert found.left == []
    assert tree(folder) == whole


def test_without_a_selection_what_follows_from_the_rest_comes_back_and_the_rest_is_named(root):
    folder = root / "packed"
    whole = tree(folder)
    for name in ("sizes.json", "SHA256SUMS", "README.md", "00000.parquet", "00001.tar", "ledger.parquet"):
        change(folder / name)
    assert verify(folder)[-1] == f"{folder}/SHA256SUMS: is missing or does not agree with manifest.json"
    found = repair(folder)
    assert found.repaired == ["00000.parquet", "README.md", "SHA256SUMS", "sizes.json"]
    assert [line.partition(":")[0] for line in found.left] == [f"{folder}/00001.tar", f"{folder}/ledger.parquet"]
    assert all("--selection SELECTION" in line for line in found.left)
    differing = {name for name, digest in tree(folder).items() if digest != whole[name]}
    assert differing == {"00001.tar", "ledger.parquet"}


def test_an_index_that_says_more_than_its_tar_is_not_replaced_by_one_that_says_less(tmp_path):
    items = articles(range(1, 4))
    twin = pair(9, 0, image=items[1].image)
    write_raw(tmp_path / "raw", [*items, article(9), twin])
    select([tmp_path / "raw"], tmp_path / "s.parquet", SelectConfig())
    folder = tmp_path / "packed"
    pack(tmp_path / "s.parquet", folder, CONFIG)
    rows = DatasetFolder(folder).index.to_pylist()
    (shard,) = {row["shard"] for row in rows if row["dup_cluster"] is not None}
    whole = tree(folder)
    for path in folder.glob("0*.parquet"):
        path.unlink()
    found = repair(folder)
    assert [line.partition(":")[0] for line in found.left] == [str(folder / shard.replace(".tar", ".parquet"))]
    assert repair(folder, selection=tmp_path / "s.parquet").left == []
    assert tree(folder) == whole


def test_another_selection_is_refused_and_changes_nothing(root):
    folder = root / "packed"
    select([root / "raw"], root / "other.parquet", SelectConfig(where="width > 10"))
    cut(folder / "00000.tar")
    before = tree(folder)
    with pytest.raises(DataError, match=r"is not what .* was packed from"):
        repair(folder, selection=root / "other.parquet")
    assert tree(folder) == before


KILLED = """
import os, signal, sys
from data_builders import repair as room
room._restore = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
room.repair(sys.argv[1], selection=sys.argv[2])
"""


@pytest.mark.fault
def test_a_killed_repair_leaves_the_folder_as_it_was_and_can_be_run_again(root):
    folder = root / "packed"
    whole = tree(folder)
    cut(folder / "00000.tar")
    before = tree(folder)
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(root / "selection.parquet")])
    assert done.returncode == -9
    assert (folder / ".repairing").is_dir()
    assert {name: digest for name, digest in tree(folder).items() if not name.startswith(".")} == before
    assert repair(folder, selection=root / "selection.parquet").left == []
    assert {name: digest for name, digest in tree(folder).items() if not name.startswith(".")} == whole
    assert not (folder / ".repairing").exists()


def test_a_built_dataset_has_its_indexes_back_and_a_lost_shard_is_named_with_the_command(tmp_path):
    config = BuildConfig(name="demo", licence="commercial-derivatives", source={"kind": "pmc", "root": "sample://pmc"})
    build(config, tmp_path / "set")
    whole = tree(tmp_path / "set")
    for path in (tmp_path / "set").glob("0*.parquet"):
        path.unlink()
    change(tmp_path / "set" / "README.md")
    assert repair(tmp_path / "set").left == []
    assert tree(tmp_path / "set") == whole
    (tmp_path / "set" / "00000.tar").unlink()
    (line,) = repair(tmp_path / "set").left
    assert "biomedclip build CONFIG --out OTHER_FOLDER" in line


def test_tombstones_survive_a_repair_and_damaged_ones_are_named(root):
    folder = root / "packed"
    purge(folder, read_withdrawals("PMC1", reason="retracted"))
    stones = sha256_file(folder / TOMBSTONES)
    cut(folder / "00000.tar")
    assert repair(folder, selection=root / "selection.parquet").left == []
    assert sha256_file(folder / TOMBSTONES) == stones
    assert verify(folder) == []
    cut(folder / TOMBSTONES)
    (line,) = repair(folder).left
    assert TOMBSTONES in line


def test_a_folder_in_use_or_of_something_else_is_refused(root, tmp_path):
    with hold_folder(root / "packed"), pytest.raises(ConfigError, match="another process"):
        repair(root / "packed")
    with pytest.raises(DataError, match="there is no such folder"):
        repair(tmp_path / "no")
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match="neither a dataset folder nor a folder of units"):
        repair(tmp_path / "x")


# Units


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sample = str(resources.files("data_builders") / "sample" / "pmc")
    folder = tmp_path_factory.mktemp("harvest")
    plan_source(sample, folder / "plan.parquet", PlanConfig(licence="commercial-derivatives", unit_size=8))
    harvest(folder / "plan.parquet", sample, folder / "raw")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["tar", "pairs.parquet", "json"])
def test_a_damaged_unit_is_dropped_and_the_next_harvest_gives_the_same_bytes(harvested, tmp_path, damage, kind):
    folder = tmp_path / "raw"
    shutil.copytree(harvested / "raw", folder)
    whole = tree(folder)
    if kind == "json" and damage is Path.unlink:
        damage(folder / f"{unit_name(1)}.{kind}")
        assert [line.partition(":")[0] for line in repair(folder).left] == [f"{folder}/{unit_name(1)}"]
    else:
        damage(folder / f"{unit_name(1)}.{kind}")
        found = repair(folder)
        assert len(found.damaged) == 1
        assert found.left[0].startswith(f"{folder}/{unit_name(1)}: deleted, because it was damaged; run: biomedclip")
    others = {name: digest for name, digest in whole.items() if not name.startswith(unit_name(1))}
    assert {n: d for n, d in tree(folder).items() if not n.startswith(unit_name(1))} == others
    sample = str(resources.files("data_builders") / "sample" / "pmc")
    harvest(harvested / "plan.parquet", sample, folder)
    assert tree(folder) == whole
    found = repair(folder)
    assert (found.damaged, found.left) == ([], [])


def test_a_delta_goes_with_the_unit_it_mends_and_later_ones_with_it(tmp_path):
    def write() -> Path:
        shutil.rmtree(tmp_path / "raw", ignore_errors=True)
        write_raw(tmp_path / "raw", articles([1]), articles([2]))
        for retry in (1, 2, 3):
            drop = Drop(source="pmc", item=f"F{retry}", reason="x", article_id="PMC1.1")
            write_unit(tmp_path / "raw", unit_name(0, retry), [drop], identity={})
        return tmp_path / "raw"

    def left(folder: Path) -> list[str]:
        return sorted(path.stem for path in folder.glob("*.json"))

    cut(write() / f"{unit_name(0, 2)}.ledger.parquet")
    found = repair(tmp_path / "raw")
    assert left(tmp_path / "raw") == [unit_name(0), unit_name(0, 1), unit_name(1)]
    assert "--retry-failed" in found.left[0]
    cut(write() / f"{unit_name(0)}.tar")
    repair(tmp_path / "raw")
    assert left(tmp_path / "raw") == [unit_name(1)]
    assert not list((tmp_path / "raw").glob(f"{unit_name(0)}*"))


def test_the_command_exits_with_2_until_nothing_is_left(root):
    def run(*arguments):
        return run_command("data", "repair", root / "packed", *arguments)

    cut(root / "packed" / "00000.tar")
    done = run()
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    done = run("--selection", str(root / "selection.parquet"))
    assert (done.returncode, done.stdout) == (0, f"{root}/packed/00000.tar: repaired\n")
    assert run().stdout == f"{root}/packed: nothing is damaged\n"
