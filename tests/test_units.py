"""Units: what is written is what is read, by our readers and by others; nothing half-written; deltas add up."""

from __future__ import annotations

import errno
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from biomedclip.errors import DataError
from biomedclip.files import write_json
from biomedclip.schema import LEDGER_COLUMNS, Article, Drop, Pair
from biomedclip.shards import ARTICLE_COLUMNS
from data_builders import units
from data_builders.units import (
    HARVEST,
    PAIR_COLUMNS,
    article_rows,
    count_rows,
    delete_unit,
    find_damage,
    ledger_rows,
    missing_units,
    pair_of_row,
    pair_rows,
    read_image,
    read_units,
    unit_name,
    write_unit,
)

IDENTITY = {"config_sha256": "c", "plan_sha256": "p"}
ARTICLE = Article(article_id="PMC1.1", pmcid=1, version=1, title="First", licence="CC BY", published="2024-03",
                  authors=("A B",))  # fmt: skip


def pair(key: str, **changes: Any) -> Pair:
    facts: dict[str, Any] = {
        "key": key, "image": f"bytes of {key}".encode() * 50, "image_format": "png", "width": 8, "height": 9,
        "caption": f"Caption of {key}, 10^4 µm.", "source": "pmc", "licence": "CC BY-NC", "sha256": "00",
        "phash": 2**64 - 1, "article_id": "PMC1.1", "figure_id": f"F-{key}",
    }  # fmt: skip
    return Pair(**{**facts, **changes})


def drop(item: str, reason: str = "fetch_timeout", article_id: str | None = "PMC1.1") -> Drop:
    return Drop(source="pmc", item=item, reason=reason, detail="why", article_id=article_id)


PAIRS = (
    pair("a", captions=("Caption of a, 10^4 µm.", "Another"), labels=("cell",), label_ids=(3,), flags=("alpha",)),
    pair("b", sidecar={"mentions": [{"text": "as in Fig 1", "panels": ["A"]}], "label": "Figure 1"}, split="test"),
    pair("c", article_id=None, figure_id=None, source="bccd", concepts=("x-ray",), licence="MIT"),
)
ITEMS = (ARTICLE, PAIRS[0], drop("F2"), PAIRS[1], drop("F3", "no_caption"), PAIRS[2])


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_is_read_back_is_what_was_written(tmp_path):
    record = write_unit(tmp_path, unit_name(0), ITEMS, identity=IDENTITY)
    assert read_units(tmp_path, verify=True) == [record]
    assert (record.articles, record.kept, record.dropped) == (1, 3, {"fetch_timeout": 1, "no_caption": 1})
    rows = pair_rows(tmp_path).to_pylist()
    assert [pair_of_row(row, read_image(tmp_path, row)) for row in rows] == list(PAIRS)
    assert [row["published"] for row in rows] == ["2024-03", "2024-03", None]
    assert [row["licence_class"] for row in rows] == ["noncommercial", "noncommercial", "commercial-derivatives"]
    assert [row["caption_chars"] for row in rows] == [22, 22, 22]
    assert all(row["caption_tokens"] > 5 and row["unit"] == "unit-000000" for row in rows)
    assert article_rows(tmp_path).to_pylist()[0]["authors"] == ["A B"]
    ledger = ledger_rows(tmp_path).to_pylist()
    assert [(row["item"], row["status"], row["reason"], row["key"]) for row in ledger] == [
        ("F-a", "kept", None, "a"), ("F2", "dropped", "fetch_timeout", None), ("F-b", "kept", None, "b"),
        ("F3", "dropped", "no_caption", None), ("c", "kept", None, "c"),
    ]  # fmt: skip


def test_the_tar_is_a_tar_and_the_parquets_have_the_promised_columns(tmp_path):
    record = write_unit(tmp_path, "set-a", ITEMS, identity=IDENTITY)
    with tarfile.open(record.path("tar")) as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == {f"{p.key}.jpg": p.image for p in PAIRS}
    assert pq.read_schema(record.path("pairs")).names == list(PAIR_COLUMNS)
    assert pq.read_schema(record.path("articles")).names == list(ARTICLE_COLUMNS)
    assert pq.read_schema(record.path("ledger")).names == list(LEDGER_COLUMNS)


def test_the_same_items_give_the_same_bytes_and_no_items_give_a_unit(tmp_path):
    for name in ("x", "y"):
        write_unit(tmp_path / name, "unit-000000", iter(ITEMS), identity=IDENTITY)
        write_unit(tmp_path / name, "unit-000001", (), identity=IDENTITY)
    assert snapshot(tmp_path / "x") == snapshot(tmp_path / "y")
    assert len(snapshot(tmp_path / "x")) == 10
    assert [record.kept for record in read_units(tmp_path / "x", verify=True)] == [3, 0]


def test_many_rows_pass_by_in_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "_ROW_GROUP", 7)
    write_unit(tmp_path, "many", (pair(f"k{n}") for n in range(30)), identity=IDENTITY)
    assert pair_rows(tmp_path)["key"].to_pylist() == [f"k{n}" for n in range(30)]
    assert pq.ParquetFile(tmp_path / "many.pairs.parquet").num_row_groups == 5


@pytest.mark.parametrize("spoiler", [pair("a"), pair("Bad.key"), pair("z", caption=" ")])
def test_a_pair_that_breaks_the_contract_leaves_nothing_behind(tmp_path, spoiler):
    with pytest.raises(DataError):
        write_unit(tmp_path, unit_name(0), (*ITEMS, spoiler), identity=IDENTITY)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 8, 30])
def test_a_full_disk_is_one_line_and_a_rerun_gives_the_same_bytes(tmp_path, monkeypatch, number):
    import os

    write_unit(tmp_path / "well", unit_name(0), ITEMS, identity=IDENTITY)
    calls, sync = iter(range(10**6)), os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        if number < 10:  # four files and the record, each synced with its folder
            with pytest.raises(DataError, match=r"ill: the disk is full \(found No space.*run the same command again"):
                write_unit(tmp_path / "ill", unit_name(0), ITEMS, identity=IDENTITY)
            assert not [name for name in snapshot(tmp_path / "ill") if ".tmp" in name]
    write_unit(tmp_path / "ill", unit_name(0), ITEMS, identity=IDENTITY)
    assert snapshot(tmp_path / "ill") == snapshot(tmp_path / "well")


def test_leftovers_of_a_killed_writer_go_and_those_of_other_units_stay(tmp_path):
    for name in ("unit-000000.tar", "unit-000000.json", "unit-000000-r01.tar", "unit-000001.tar"):
        (tmp_path / f".tmp-01234567-{name}").touch()
    write_unit(tmp_path, unit_name(0), ITEMS, identity=IDENTITY)
    left = sorted(path.name for path in tmp_path.glob(".tmp-*"))
    assert left == [".tmp-01234567-unit-000000-r01.tar", ".tmp-01234567-unit-000001.tar"]


def test_deltas_replace_the_rows_they_name_and_the_counts_add_up(tmp_path):
    base = (ARTICLE, PAIRS[0], drop("F2"), drop("F2", "fetch_slow"), drop("F2", "no_caption"), drop("F4"))
    write_unit(tmp_path, unit_name(0), base, identity=IDENTITY)
    write_unit(tmp_path, unit_name(1), (drop("F2"),), identity=IDENTITY)
    names = ("F2", "fetch_timeout"), ("F2", "fetch_slow"), ("F4", "fetch_timeout")
    first = (ARTICLE, pair("f2", figure_id="F2"), drop("F2", "missing_file"), drop("F4", "fetch_dropped"))
    write_unit(tmp_path, unit_name(0, 1), first, identity=IDENTITY, supersedes=[("PMC1.1", *name) for name in names])
    write_unit(tmp_path, unit_name(0, 2), (pair("f4", figure_id="F4"),), identity=IDENTITY,
               supersedes=[("PMC1.1", "F4", "fetch_dropped")])  # fmt: skip
    records = read_units(tmp_path)
    assert [r.name for r in records] == ["unit-000000", "unit-000000-r01", "unit-000000-r02", "unit-000001"]
    assert [r.base for r in records] == ["unit-000000"] * 3 + ["unit-000001"]
    kept, dropped = count_rows(records)
    assert (kept, dropped) == (3, {"missing_file": 1, "no_caption": 1, "fetch_timeout": 1})
    rows = ledger_rows(tmp_path).to_pylist()
    assert len(rows) == kept + dropped.total()
    assert [(r["item"], r["reason"]) for r in rows] == [
        ("F-a", None), ("F2", "no_caption"), ("F2", None), ("F2", "missing_file"), ("F4", None),
        ("F2", "fetch_timeout"),
    ]  # fmt: skip
    assert len(article_rows(tmp_path)) == 1
    assert pair_rows(tmp_path)["key"].to_pylist() == ["a", "f2", "f4"]


def test_damage_is_found_and_named(tmp_path):
    record = write_unit(tmp_path, unit_name(0), ITEMS, identity=IDENTITY)
    tar = record.path("tar")
    whole = tar.read_bytes()
    tar.write_bytes(whole.replace(b"bytes of a", b"bytes of x"))
    assert read_units(tmp_path) == [record]
    assert find_damage(record, verify=True) == [f"{tar}: has other bytes than its commit record says"]
    with pytest.raises(DataError, match=r"unit-000000.json: speaks of other files"):
        read_units(tmp_path, verify=True)
    with pytest.raises(DataError, match="a: has other bytes than its row says"):
        read_image(tmp_path, pair_rows(tmp_path).to_pylist()[0])
    tar.write_bytes(whole[:1000])
    with pytest.raises(DataError, match="has 1000 bytes, its commit record says"):
        read_units(tmp_path)
    tar.unlink()
    assert find_damage(record) == [f"{tar}: is missing"]
    delete_unit(record)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "supersedes": [], "unit": "x"}'])
def test_a_broken_commit_record_is_one_line(tmp_path, text):
    (tmp_path / "unit-000000.json").write_text(text)
    with pytest.raises(DataError, match=r"unit-000000\.json: is "):
        read_units(tmp_path)


def test_folders_without_units_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no finished unit"):
        read_units(tmp_path)
    with pytest.raises(DataError, match="there is no such folder"):
        pair_rows(tmp_path / "x")
    with pytest.raises(DataError, match="cannot hold a unit of this name"):
        write_unit(tmp_path, "../x", (), identity=IDENTITY)


def test_units_that_a_harvest_still_owes_are_named_over_all_its_folders(tmp_path):
    for name, number in (("one", 0), ("two", 1)):
        write_unit(tmp_path / name, unit_name(number), (), identity=IDENTITY)
        write_json(tmp_path / name / HARVEST, {"plan_sha256": "p" * 64, "config_sha256": "c" * 64, "units": 3})
    assert missing_units([tmp_path / "one", tmp_path / "two"]) == ["pppppppp/plan", "pppppppp/unit-000002"]


def test_an_error_of_the_source_leaves_an_older_commit_record_away(tmp_path):
    """A unit that is written again is not there until it is whole again."""

    def broken() -> Iterator[Article | Pair | Drop]:
        yield from ITEMS
        raise io.UnsupportedOperation("gone")

    write_unit(tmp_path, unit_name(0), ITEMS, identity=IDENTITY)
    with pytest.raises(io.UnsupportedOperation):
        write_unit(tmp_path, unit_name(0), broken(), identity=IDENTITY)
    assert "unit-000000.json" not in snapshot(tmp_path)


def test_the_record_holds_no_folder(tmp_path):
    record = write_unit(tmp_path, unit_name(0), ITEMS, identity=IDENTITY)
    assert str(tmp_path) not in (tmp_path / "unit-000000.json").read_text()
    facts = json.loads((tmp_path / "unit-000000.json").read_text())
    assert facts["identity"] == IDENTITY
    assert replace(record, folder=Path()).files == facts["files"]
