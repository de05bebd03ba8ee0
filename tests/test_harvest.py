"""The harvest, end to end on the bundled articles: equal bytes from everywhere, and nothing lost to faults."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from mock_bucket import Fault, MockBucket

from biomedclip import cli
from biomedclip.errors import ConfigError, DataError
from biomedclip.schema import Article, Drop, Pair
from data_builders.locks import hold_lock
from data_builders.pmc.catalog import LocalBucket
from data_builders.pmc.client import Client, ClientConfig
from data_builders.pmc.harvest import HarvestConfig, harvest, parse_slice
from data_builders.pmc.harvest_folder import LOCK
from data_builders.pmc.look_ahead import read_ahead
from data_builders.pmc.mend import Mend, failed_articles
from data_builders.pmc.pairs import article_pairs
from data_builders.pmc.plan import plan_facts, plan_source, read_plan
from data_builders.pmc.plan_rules import PlanConfig
from data_builders.units import (
    HARVEST,
    article_rows,
    ledger_rows,
    missing_units,
    pair_of_row,
    pair_rows,
    read_image,
    read_units,
    write_unit,
)

SAMPLE = Path(str(resources.files("data_builders"))) / "sample" / "pmc"
QUICK = HarvestConfig(
    client=ClientConfig(
        first_backoff_s=0.001, max_backoff_s=0.01, connect_timeout_s=2, read_timeout_s=0.5, grace_s=0.3,
        min_bytes_per_s=100_000, max_attempts=4, max_concurrency=8,
    )
)  # fmt: skip


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != LOCK}


def pairs_of(folder: Path) -> dict[str, Any]:
    return {row["key"]: pair_of_row(row, read_image(folder, row)) for row in pair_rows(folder).to_pylist()}


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Path:
    """All bundled articles in five units."""
    path = tmp_path_factory.mktemp("plan") / "plan.parquet"
    plan_source(str(SAMPLE), path, PlanConfig(licence="commercial", unit_size=4))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Six articles in three units."""
    path = tmp_path_factory.mktemp("small") / "plan.parquet"
    plan_source(str(SAMPLE), path, PlanConfig(licence="commercial", unit_size=2, limit=6))
    return path


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "raw"
    harvest(plan, str(SAMPLE), out)
    return out


@pytest.fixture(scope="module")
def small_whole(small, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("small_whole") / "raw"
    harvest(small, str(SAMPLE), out)
    return out


def test_every_row_of_the_plan_and_every_figure_is_kept_or_dropped_once(plan, whole):
    facts = harvest(plan, "sample://pmc", whole)
    assert (facts.units, facts.finished, facts.left_to_others, facts.articles) == (5, 5, (), 19)
    ledger = ledger_rows(whole).to_pylist()
    assert facts.seen == len(ledger) == facts.kept + sum(facts.dropped.values())
    assert Counter(row["reason"] for row in ledger if row["status"] == "dropped") == facts.dropped
    assert facts.kept == len(pair_rows(whole)) == 101
    planned = plan_facts(plan)
    assert {reason: facts.dropped[reason] for reason in planned.excluded} == planned.excluded
    assert len(article_rows(whole)) == planned.planned
    assert missing_units([whole]) == []
    assert all(pair.licence in ("CC BY", "CC0") for pair in pairs_of(whole).values())
    described = json.loads((whole / HARVEST).read_bytes())
    assert described["config"]["licence"] == "commercial"
    assert "courtesy of the U.S. National Library of Medicine" in described["notices"][0]
    assert str(SAMPLE) not in (whole / HARVEST).read_text()


def test_the_bucket_over_http_gives_the_bytes_of_a_local_copy(plan, whole, tmp_path):
    with MockBucket(SAMPLE) as bucket:
        harvest(plan, bucket.endpoint, tmp_path / "raw", QUICK)
        assert bucket.peak > 1, "many requests are under way at once"
        read = Counter(request.key for request in bucket.requests())
    probe = next(read_plan(plan)).xml.key
    assert set(read.values()) - {read[probe]} == {1}, "each file is fetched once"
    assert not [key for key in read if key.endswith(".json")], "the plan holds the metadata"
    assert bytes_of(tmp_path / "raw") == bytes_of(whole)


@pytest.mark.slow
def test_two_workers_and_two_slices_give_the_bytes_of_one(plan, whole, tmp_path):
    harvest(plan, str(SAMPLE), tmp_path / "two", workers=2)
    assert bytes_of(tmp_path / "two") == bytes_of(whole)
    for number in (1, 0):
        facts = harvest(plan, str(SAMPLE), tmp_path / "slices", unit_slice=(number, 2))
        assert facts.finished == (2 if number else 5)
        harvest(plan, str(SAMPLE), tmp_path / f"machine{number}", unit_slice=(number, 2))
    assert bytes_of(tmp_path / "slices") == bytes_of(whole)
    machines = [tmp_path / "machine0", tmp_path / "machine1"]
    assert bytes_of(machines[0]) | bytes_of(machines[1]) == bytes_of(whole)
    assert missing_units(machines) == []
    assert len(missing_units(machines[1:])) == 4


@pytest.mark.slow
def test_builders_that_share_a_folder_by_slices_never_disturb_each_other(plan, whole, tmp_path):
    slices, errors = [(0, 2), (1, 2), (0, 2), (0, 3), (1, 3), (2, 3)], []

    def build(unit_slice: tuple[int, int]) -> None:
        try:
            harvest(plan, str(SAMPLE), tmp_path, unit_slice=unit_slice)
        except DataError as error:
            errors.append(error)

    threads = [threading.Thread(target=build, args=(one,)) for one in slices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert bytes_of(tmp_path) == bytes_of(whole)


def test_a_second_builder_of_the_same_folder_is_told_so(small, small_whole, tmp_path):
    harvest(small, str(SAMPLE), tmp_path, unit_slice=(0, 3))
    with hold_lock(tmp_path / LOCK) as is_ours:
        assert is_ours
        for unit_slice in ((0, 1), (0, 2)):
            with pytest.raises(ConfigError, match="is being harvested by another process; wait for it, or give each"):
                harvest(small, str(SAMPLE), tmp_path, unit_slice=unit_slice)
    with hold_lock(tmp_path / LOCK, shared=True):
        with pytest.raises(ConfigError, match="is being harvested by another process"):
            harvest(small, str(SAMPLE), tmp_path)
        with hold_lock(tmp_path / f"{LOCK}-unit-000001"):
            facts = harvest(small, str(SAMPLE), tmp_path, unit_slice=(1, 2))
            assert (facts.left_to_others, facts.finished) == (("unit-000001",), 1)
        assert harvest(small, str(SAMPLE), tmp_path, unit_slice=(1, 2)).finished == 2
    harvest(small, str(SAMPLE), tmp_path)
    assert bytes_of(tmp_path) == bytes_of(small_whole)


def test_a_unit_that_a_stray_worker_holds_is_waited_for_and_then_named(small, tmp_path, monkeypatch):
    monkeypatch.setattr("data_builders.pmc.harvest_folder._ORPHAN_S", 0.1)
    tmp_path.joinpath("raw").mkdir()
    with (
        hold_lock(tmp_path / "raw" / f"{LOCK}-unit-000001"),
        pytest.raises(ConfigError, match="unit-000001: is being built by another process"),
    ):
        harvest(small, str(SAMPLE), tmp_path / "raw")
    assert harvest(small, str(SAMPLE), tmp_path / "raw").finished == 3


PASSING = {
    "storm": Fault("slow_down", times=60, retry_after="0"),
    "too_many": Fault("too_many", times=10),
    "errors": Fault("server_error", "*.jpg", times=10),
    "dropped": Fault("dropped", times=6),
    "truncated": Fault("truncated", times=6),
    "wrong": Fault("wrong_bytes", "*.xml", times=1),
    "slow": Fault("trickle", "*.jpg", times=2),
    "headers": Fault("trickle_headers", "*.jpg", times=2),
    "silent": Fault("stall", "*.jpg", times=2),
    "no_answer": Fault("no_answer", times=6),
}


@pytest.mark.parametrize(
    "name", ["storm", *(pytest.param(name, marks=pytest.mark.slow) for name in PASSING if name != "storm")]
)
def test_faults_that_pass_leave_no_trace(small, small_whole, tmp_path, name):
    fault = PASSING[name]
    client = QUICK.client.model_copy(update={"max_attempts": 25})
    with MockBucket(SAMPLE, [Fault(fault.kind, fault.match, fault.times, fault.retry_after)]) as bucket:
        harvest(small, bucket.endpoint, tmp_path / "raw", QUICK.model_copy(update={"client": client}))
        assert bucket.faults[0].times == 0, "the fault was met"
    assert bytes_of(tmp_path / "raw") == bytes_of(small_whole)


def victims(small_whole: Path) -> tuple[str, list[str], str]:
    """The XML of one kept article and its id, and two kept pictures of another."""
    files: dict[str, list[str]] = {}
    for pair in pairs_of(small_whole).values():
        files.setdefault(pair.article_id, []).append(f"{pair.article_id}/{pair.sidecar['file']}")
    rich = next(article_id for article_id, names in files.items() if len(names) > 3)
    other = next(article_id for article_id in files if article_id != rich)
    return f"{other}/{other}.xml", files[rich][:2], other


PERMANENT = {
    "missing": "missing_file", "forbidden": "fetch_forbidden", "redirect": "fetch_refused", "slow_down":
    "fetch_throttled", "server_error": "fetch_server_error", "truncated": "fetch_truncated", "dropped":
    "fetch_dropped", "wrong_bytes": "md5_mismatch", "trickle": "fetch_slow",
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["missing", *(pytest.param(kind, marks=pytest.mark.slow) for kind in PERMANENT if kind != "missing")]
)
def test_a_fault_that_stays_is_a_row_of_the_ledger_and_costs_nothing_else(small, small_whole, tmp_path, kind):
    xml, (first, _), article_id = victims(small_whole)
    out = tmp_path / "raw"
    with MockBucket(SAMPLE, [Fault(kind, xml), Fault(kind, first)]) as bucket:
        facts = harvest(small, bucket.endpoint, out, QUICK)
    rows = [row for row in ledger_rows(out).to_pylist() if row["reason"] == PERMANENT[kind]]
    assert {row["item"] for row in rows} == {article_id, *figures_of(small_whole, first)}
    assert facts.seen == len(ledger_rows(out))
    whole, found = pairs_of(small_whole), pairs_of(out)
    lost = {key for key, pair in whole.items() if pair.article_id == article_id} | set(keys_of(whole, first))
    assert found == {key: pair for key, pair in whole.items() if key not in lost}
    is_final = kind in ("missing", "forbidden", "redirect")
    assert facts.retryable == (0 if is_final else 2)


def keys_of(pairs: dict[str, Any], file: str) -> list[str]:
    return [key for key, pair in pairs.items() if f"{pair.article_id}/{pair.sidecar['file']}" == file]


def figures_of(folder: Path, file: str) -> list[str]:
    pairs = pairs_of(folder)
    return [pairs[key].figure_id for key in keys_of(pairs, file)]


def test_retries_mend_what_failed_and_committed_units_never_change(small, small_whole, tmp_path):
    xml, pictures, _ = victims(small_whole)
    out, whole = tmp_path / "raw", pairs_of(small_whole)
    with MockBucket(SAMPLE, [Fault("server_error", key) for key in (xml, *pictures)]) as bucket:
        before = harvest(small, bucket.endpoint, out, QUICK)
        committed = bytes_of(out)
        assert before.retryable == 3
        same = harvest(small, bucket.endpoint, out, QUICK, retry_failed=True)
        assert (same.retried > 0, same.retryable, bytes_of(out)) == (True, 3, committed), "nothing mended, nothing new"
        bucket.faults[:] = [Fault("server_error", pictures[1])]
        first = harvest(small, bucket.endpoint, out, QUICK, retry_failed=True)
        assert first.retryable == 1
        bucket.faults.clear()
        second = harvest(small, bucket.endpoint, out, QUICK, retry_failed=True)
    names = [record.name for record in read_units(out, verify=True)]
    assert sum("-r01" in name for name in names) in (1, 2)
    assert sum("-r02" in name for name in names) == 1
    assert {name: data for name, data in bytes_of(out).items() if name in committed} == committed
    assert pairs_of(out) == whole
    dates = {row["key"]: row["published"] for row in pair_rows(out).to_pylist()}
    assert dates == {row["key"]: row["published"] for row in pair_rows(small_whole).to_pylist()}
    assert sorted(map(str, ledger_rows(out).to_pylist())) == sorted(map(str, ledger_rows(small_whole).to_pylist()))
    assert sorted(map(str, article_rows(out).to_pylist())) == sorted(map(str, article_rows(small_whole).to_pylist()))
    last = harvest(small, str(SAMPLE), out)
    assert (last.seen, last.kept, last.dropped) == (second.seen, second.kept, second.dropped)
    assert (last.kept, last.seen, last.retryable) == (len(whole), len(ledger_rows(small_whole)), 0)
    assert harvest(small, str(SAMPLE), out, retry_failed=True).retried == 0


def test_a_picture_that_failed_beside_others_of_its_figure_is_the_only_row_replaced(tmp_path):
    """Several graphics of one figure have one item in the ledger."""
    facts, good, bad = article_with_two_pairs()
    good, bad = replace(good, figure_id="F1"), replace(bad, figure_id="F1")
    gone = Drop(source="pmc", item="F1", reason="missing_graphic", article_id=good.article_id)
    failed = replace(gone, reason="fetch_slow")
    record = write_unit(tmp_path, "unit-000000", (facts, good, failed, gone), identity={})
    mend = Mend(failed_articles([record], {"fetch_slow"}))
    assert list(mend.items([(facts, good, bad, gone)])) == [facts, bad]
    assert mend.supersedes == [(good.article_id, "F1", "fetch_slow")]
    unreadable = replace(failed, item=good.article_id)
    for today in ((facts, good, failed, gone), (unreadable,)):
        mend = Mend(failed_articles([record], {"fetch_slow"}))
        assert (list(mend.items([today])), mend.supersedes) == ([], [])


def test_an_article_that_can_be_read_after_all_and_has_no_figures_leaves_the_ledger(tmp_path):
    facts, *_ = article_with_two_pairs()
    failed = Drop(source="pmc", item=facts.article_id, reason="fetch_slow", article_id=facts.article_id)
    record = write_unit(tmp_path, "unit-000000", (failed,), identity={})
    mend = Mend(failed_articles([record], {"fetch_slow"}))
    assert list(mend.items([(facts,)])) == [facts]
    assert mend.supersedes == [(facts.article_id, facts.article_id, "fetch_slow")]


def article_with_two_pairs() -> tuple[Article, Pair, Pair]:
    bucket = LocalBucket(SAMPLE)
    for record in bucket.records():
        facts, *items = article_pairs(record, bucket, HarvestConfig(), preset="all")
        pairs = [item for item in items if isinstance(item, Pair)]
        if len(pairs) >= 2:
            return facts, pairs[0], pairs[1]
    raise LookupError("the sample has such articles")


def test_a_host_that_is_gone_stops_the_harvest_and_a_rerun_goes_on(small, small_whole, tmp_path):
    client = QUICK.client.model_copy(update={"max_attempts": 1, "give_up_after": 1, "max_concurrency": 1})
    config = QUICK.model_copy(update={"client": client})
    later = {key for record in read_plan(small, [1, 2]) for key in (record.xml.key, *(f.key for f in record.media))}
    with MockBucket(SAMPLE, [Fault("no_answer", key) for key in later]) as bucket:
        with pytest.raises(DataError, match=r"does not answer: \d+ files in a row failed"):
            harvest(small, bucket.endpoint, tmp_path, config)
        assert [record.name for record in read_units(tmp_path)] == ["plan", "unit-000000"]
        bucket.faults.clear()
        harvest(small, bucket.endpoint, tmp_path, config)
    assert bytes_of(tmp_path) == bytes_of(small_whole)


def test_articles_that_run_ahead_are_held_back_while_much_is_waiting(tmp_path):
    _, pair, _ = article_with_two_pairs()
    begun, go = [], threading.Event()

    def read(number: Any) -> list[Any]:
        begun.append(number)
        if number == 0:
            go.wait(10)
        return [pair]

    with Client(ClientConfig(endpoint="http://127.0.0.1:9", max_concurrency=16)) as client:
        results = read_ahead(client, range(200), read, max_waiting_bytes=3 * len(pair.image))
        timer = threading.Timer(0.3, lambda: (seen.append(len(begun)), go.set()))
        seen: list[int] = []
        timer.start()
        assert [len(items) for items in results] == [1] * 200
        timer.join()
    assert seen[0] <= 1 + 3 + 16, "the first, three that fill the window, and those begun meanwhile"
    assert sorted(begun) == list(range(200))


def test_leaving_a_read_ahead_early_ends_its_threads():
    client = Client(ClientConfig(endpoint="http://127.0.0.1:9", max_concurrency=4))
    results = read_ahead(client, range(100), lambda number: [], max_waiting_bytes=0)
    assert next(results) == []
    results.close()
    client.close()


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A file system of its own and a function that sets its size in kB; nothing where this user may not mount."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(kilobytes: int, option: str = "remount,") -> bool:
        command = ["mount", "-t", "tmpfs", "-o", f"{option}size={kilobytes}k", "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True).returncode == 0

    is_mounted = os.geteuid() == 0 and resize(300, "")
    yield (folder if is_mounted else None), resize
    if is_mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_with_space_the_harvest_goes_on(
    small, small_whole, tmp_path, tiny_disk, monkeypatch, workers
):
    disk, resize = tiny_disk
    out = (disk or tmp_path) / "raw"
    with monkeypatch.context() as patch:
        if disk is None:  # no mounting here: the second file is one too many
            calls, sync = iter(range(10**6)), os.fsync
            patch.setattr(os, "fsync", lambda fd: sync(fd) if next(calls) < 13 else full())
            workers = 1
        with pytest.raises(DataError, match=r"the disk is full \(found No space left on device\); free space and run"):
            harvest(small, str(SAMPLE), out, workers=workers)
    for record in read_units(out, verify=True):
        assert record.name == "plan" or (small_whole / f"{record.name}.json").exists()
    assert not [name for name in bytes_of(out) if name.startswith(".tmp-")]
    if disk is not None:
        resize(50_000)
    harvest(small, str(SAMPLE), out, workers=workers)
    assert bytes_of(out) == bytes_of(small_whole)


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_unit_that_lost_a_file_is_built_again_and_its_deltas_go(small, small_whole, tmp_path):
    xml, _, article_id = victims(small_whole)
    unit = next(n for n in range(3) if article_id in {r.article_id for r in read_plan(small, [n])})
    with MockBucket(SAMPLE, [Fault("server_error", xml)]) as bucket:
        harvest(small, bucket.endpoint, tmp_path, QUICK)
        bucket.faults.clear()
        harvest(small, bucket.endpoint, tmp_path, QUICK, retry_failed=True)
    assert (tmp_path / f"unit-{unit:06d}-r01.json").exists()
    (tmp_path / f"unit-{unit:06d}.tar").unlink()
    harvest(small, str(SAMPLE), tmp_path)
    assert bytes_of(tmp_path) == bytes_of(small_whole)


@pytest.mark.slow
def test_a_mirror_of_packages_is_harvested(tmp_path):
    mirror = tmp_path / "mirror" / "00"
    mirror.mkdir(parents=True)
    for name in ("PMC12419688.1", "PMC999000002.1"):
        with tarfile.open(mirror / f"{name.partition('.')[0]}.tar.gz", "w:gz") as tar:
            for path in sorted((SAMPLE / name).iterdir()):
                data = path.read_bytes()
                info = tarfile.TarInfo(f"{name.partition('.')[0]}/{path.name.replace('.xml', '.nxml')}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    rules = PlanConfig(licence="commercial", unit_size=1, unstated_licence="ask_xml")
    plan_source(str(tmp_path / "mirror"), tmp_path / "plan.parquet", rules)
    facts = [harvest(tmp_path / "plan.parquet", str(tmp_path / "mirror"), tmp_path / f"raw{n}", workers=n)
             for n in (1, 2)]  # fmt: skip
    assert facts[0] == facts[1]
    assert (facts[0].finished, facts[0].kept > 0) == (2, True)
    assert bytes_of(tmp_path / "raw1") == bytes_of(tmp_path / "raw2")
    direct = {key: pair.sha256 for key, pair in pairs_of_sample(("PMC12419688.1", "PMC999000002.1")).items()}
    assert {key: pair.sha256 for key, pair in pairs_of(tmp_path / "raw1").items()} == direct


def pairs_of_sample(article_ids: tuple[str, ...]) -> dict[str, Any]:
    bucket = LocalBucket(SAMPLE)
    return {
        item.key: item
        for record in bucket.records()
        if record.article_id in article_ids
        for item in article_pairs(record, bucket, HarvestConfig(), preset="commercial")
        if isinstance(item, Pair)
    }


def command(capsys, monkeypatch, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["biomedclip", "data", "harvest", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out + captured.err


def test_the_command_prints_the_funnel_and_says_when_nothing_is_left(capsys, monkeypatch, small, tmp_path):
    out = tmp_path / "raw"
    common = (small, "--source", "sample://pmc", "--out", out)
    code, text = command(capsys, monkeypatch, *common, "--unit-slice", "1/3")
    assert (code, f"{out}: 1 of 3 units, 2 articles read" in text) == (0, True)
    code, text = command(capsys, monkeypatch, *common)
    facts = harvest(small, str(SAMPLE), out)
    assert code == 0
    assert f"{out}: {facts.seen:,} seen, {facts.kept:,} kept" in text
    for reason, count in facts.dropped.items():
        assert f"{count:>9,} dropped: {reason}" in text
    code, text = command(capsys, monkeypatch, *common, "--retry-failed")
    assert (code, f"{out}: nothing is left to retry" in text) == (0, True)


BAD = {
    "no plan": (["nowhere.parquet"], "nowhere.parquet: there is no such file; make one with: biomedclip data plan"),
    "not a plan": ([SAMPLE / "ATTRIBUTION.csv"], "ATTRIBUTION.csv: is no plan"),
    "no source": (["PLAN", "--source", "nowhere"], "nowhere: there is no such folder"),
    "another source": (["PLAN", "--source", "EMPTY"], "EMPTY: has none of the first 2 articles of the plan (found no "),
    "no address": (["PLAN", "--source", "http://"], "http://: endpoint: must be http(s)://host"),
    "no slice": (["PLAN", "--unit-slice", "3"], "unit slice: is not i/n (found '3'); write, for example, 0/4"),
    "no number": (["PLAN", "--unit-slice", "a/b"], "unit slice: is not i/n (found 'a/b')"),
    "slice too high": (["PLAN", "--unit-slice", "4/4"], "unit slice: i must be from 0 to n - 1 (found 4/4)"),
    "engine": (["PLAN", "--engine", "spark"], "engine: is unknown (found 'spark'); use one of local, ray"),
    "ray": (["PLAN", "--engine", "ray"], "ray: this step needs it and it is not installed; run: pip install"),
    "licence": (["PLAN", "--set", "licence=all"], "--set: licence: unknown key"),
    "key": (["PLAN", "--set", "langauges=[en]"], "--set: langauges: unknown key; did you mean 'languages'?"),
    "file": (["PLAN", "--out", "FILE"], "FILE: is a file; name a folder"),
    "other files": (["PLAN", "--out", "FULL"], "FULL: holds other files (found a.txt); name an empty or a new folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(capsys, monkeypatch, small, tmp_path, name):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "a.txt").touch()
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    given, expected = BAD[name]
    arguments = [small if argument == "PLAN" else argument for argument in given]
    for option, default in (("--source", "sample://pmc"), ("--out", "raw")):
        if option not in arguments:
            arguments += [option, default]
    code, text = command(capsys, monkeypatch, *arguments)
    lines = [line for line in text.splitlines() if not line.startswith("  ")]
    assert (code, len(lines)) == (2, 1), text
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert not list((tmp_path / "raw").glob("unit-*"))


def test_another_config_or_plan_in_the_same_folder_is_refused(plan, small, small_whole):
    before = bytes_of(small_whole)
    with pytest.raises(ConfigError, match=r"raw: holds the harvest of another config \(found [0-9a-f]{8}\); name"):
        harvest(small, str(SAMPLE), small_whole, HarvestConfig(languages=None))
    with pytest.raises(ConfigError, match="raw: holds the harvest of another plan"):
        harvest(plan, str(SAMPLE), small_whole)
    harvest(small, str(SAMPLE), small_whole, QUICK)  # how a host is asked is not part of it
    assert bytes_of(small_whole) == before


def test_a_damaged_harvest_file_is_one_line(small, tmp_path):
    (tmp_path / HARVEST).write_text("{}")
    with pytest.raises(DataError, match=r"harvest\.json: is damaged"):
        harvest(small, str(SAMPLE), tmp_path)


def test_slices_read_as_i_of_n():
    assert parse_slice("0/1") == (0, 1)
    assert parse_slice("3/4") == (3, 4)
