"""Every source gives what a local copy of the bucket gives; inventories, plans and estimates add up."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import tarfile
from importlib import resources
from pathlib import Path

import pytest
from mock_bucket import Fault, MockBucket

from biomedclip.config import check_config
from biomedclip.errors import ConfigError, DataError
from biomedclip.schema import Drop
from data_builders.pmc.article_table import crawl_articles, read_articles, write_articles
from data_builders.pmc.catalog import ArticleRecord, BadFile, LocalBucket, SourceFile, choose_versions
from data_builders.pmc.client import Client, ClientConfig
from data_builders.pmc.estimate import Rates, estimate_plan
from data_builders.pmc.inventory import Inventory, find_manifest, read_inventory
from data_builders.pmc.plan import PlannedSource, make_plan, plan_facts, read_exclusions, read_plan
from data_builders.pmc.plan_rules import PlanConfig
from data_builders.pmc.sources import CloudBucket, OaPackages

SAMPLE = Path(str(resources.files("data_builders"))) / "sample" / "pmc"
FAST = {"first_backoff_s": 0.001, "max_backoff_s": 0.01, "max_attempts": 4, "read_timeout_s": 2}


def config(**changes) -> PlanConfig:
    return check_config({"licence": "commercial-derivatives"} | changes, PlanConfig, "test")


@pytest.fixture(scope="module")
def bucket():
    with MockBucket(SAMPLE) as server:
        yield server


@pytest.fixture
def client(bucket):
    with Client(ClientConfig(endpoint=bucket.endpoint, **FAST), seed=0) as made:
        yield made


def files_of(record: ArticleRecord) -> list[SourceFile]:
    return [record.xml, *record.media]


# CloudBucket


def test_the_cloud_gives_the_records_and_bytes_of_a_local_copy(client):
    local = LocalBucket(SAMPLE)
    ours, theirs = list(CloudBucket(client).records()), list(local.records())
    assert ours == theirs
    record = next(r for r in theirs if isinstance(r, ArticleRecord) and len(r.media) > 3)
    cloud = CloudBucket(client, [record.article_id])
    assert list(cloud.read_many(files_of(record))) == [local.read(file) for file in files_of(record)]


def test_a_storm_of_faults_costs_retries_and_no_article(bucket):
    faults = [Fault("slow_down", times=12), Fault("dropped", times=3), Fault("truncated", "*.json", times=3),
              Fault("wrong_bytes", "*.xml", times=1)]  # fmt: skip
    with MockBucket(SAMPLE, faults) as stormy:
        settings = {**FAST, "max_attempts": 30}
        with Client(ClientConfig(endpoint=stormy.endpoint, **settings), seed=0) as client:
            records = list(CloudBucket(client).records())
            assert records == list(LocalBucket(SAMPLE).records())
            first = next(r for r in records if isinstance(r, ArticleRecord))
            assert client.read(first.xml.key, md5=first.xml.md5) == LocalBucket(SAMPLE).read(first.xml)
    assert all(fault.times == 0 for fault in faults)


def test_an_article_that_is_gone_is_a_reason(client):
    (drop,) = CloudBucket(client, ["PMC424242.1"]).records()
    assert isinstance(drop, Drop)
    assert (drop.article_id, drop.reason) == ("PMC424242.1", "no_metadata")


# OaPackages


def package(folder: Path, pmcid: int, files: dict[str, bytes], *, extra=()) -> Path:
    path = folder / f"PMC{pmcid}.tar.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"PMC{pmcid}/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return path


@pytest.fixture
def packages(tmp_path):
    package(tmp_path / "08" / "e0", 13900, {"a.nxml": b"<article/>", "f1.jpg": b"jpg", "f1.gif": b"gif"})
    package(tmp_path / "09", 20000, {"b.nxml": b"<article>2</article>"})
    rows = [
        ["File", "Article Citation", "Accession ID", "Last Updated (YYYY-MM-DD HH:MM:SS)", "PMID", "License"],
        [
            "oa_package/08/e0/PMC13900.tar.gz",
            "J. 2001 Nov 2; 3(1):55",
            "PMC13900",
            "2019-11-05 11:56:12",
            "11",
            "CC BY",
        ],
    ]
    with (tmp_path / "oa_file_list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path


def test_a_mirror_of_packages_is_streamed_and_joined_with_its_list(packages):
    source = OaPackages(packages)
    first, second = (r for r in source.records() if isinstance(r, ArticleRecord))
    assert (first.article_id, first.licence, second.licence) == ("PMC13900.1", "CC BY", None)
    assert source.read(first.xml) == b"<article/>"
    assert {file.key.split("/")[-1]: source.read(file) for file in first.media} == {"f1.jpg": b"jpg", "f1.gif": b"gif"}
    assert not [path for path in packages.rglob("*") if path.suffix in (".nxml", ".jpg")]


def test_hostile_members_are_reasons_and_nothing_is_written(packages):
    link = tarfile.TarInfo("PMC30000/evil.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    escape = tarfile.TarInfo("../../outside.jpg")
    device = tarfile.TarInfo("PMC30000/dev")
    device.type = tarfile.CHRTYPE
    package(packages, 30000, {"c.nxml": b"<article/>"}, extra=[link, escape, device])
    reasons = {d.reason for d in OaPackages(packages).records() if isinstance(d, Drop) and d.article_id == "PMC30000.1"}
    assert "unsafe_member" in reasons
    assert not (packages.parent.parent / "outside.jpg").exists()


def test_a_truncated_package_and_one_without_article_are_reasons(packages):
    path = package(packages, 40000, {"d.nxml": b"<article/>" * 5000, "f.jpg": bytes(range(256)) * 200})
    path.write_bytes(path.read_bytes()[:300])
    package(packages, 50000, {"readme.txt": b"x"})
    reasons = {d.article_id: d.reason for d in OaPackages(packages).records() if isinstance(d, Drop) and
               d.reason in ("broken_package", "no_xml")}  # fmt: skip
    assert reasons == {"PMC40000.1": "broken_package", "PMC50000.1": "no_xml"}


def test_a_folder_without_packages_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no packages"):
        OaPackages(tmp_path)


# Inventory


def inventory_bucket(keys: dict[str, str], snapshot="2026-01-18T01-00Z", **changes) -> dict[str, bytes]:
    rows = "".join(f'"pmc-oa-opendata","{key}","2026-01-02T00:00:00.000Z","{etag}"\n' for key, etag in keys.items())
    data = gzip.compress(rows.encode(), mtime=0)
    prefix = "inventory-reports/pmc-oa-opendata/metadata/"
    manifest = {
        "sourceBucket": "pmc-oa-opendata", "fileFormat": "CSV", "fileSchema": "Bucket, Key, LastModifiedDate, ETag",
        "files": [{"key": f"{prefix}data/x.csv.gz", "size": len(data), "MD5checksum": hashlib.md5(data).hexdigest()}],
    } | changes  # fmt: skip
    return {f"{prefix}{snapshot}/manifest.json": json.dumps(manifest).encode(), f"{prefix}data/x.csv.gz": data,
            f"{prefix}hive/y": b"ignore"}  # fmt: skip


def read(objects, out, **kw):
    with MockBucket(objects) as server, Client(ClientConfig(endpoint=server.endpoint, **FAST), seed=0) as client:
        return read_inventory(client, out, **kw)


OLD = {"metadata/PMC2.1.json": "a" * 32, "metadata/PMC10.1.json": "b" * 32, "metadata/PMC10.2.json": "c" * 32,
       "README.txt": "d" * 32}  # fmt: skip


def test_the_newest_inventory_becomes_a_sorted_table(tmp_path):
    objects = inventory_bucket({"metadata/PMC1.1.json": "0" * 32}, snapshot="2025-12-31T01-00Z")
    table = read(objects | inventory_bucket(OLD), tmp_path / "i.parquet")
    assert table.facts.snapshot == "2026-01-18T01-00Z"
    assert list(table) == ["PMC2.1", "PMC10.1", "PMC10.2"]
    assert (len(table), table.facts.other_keys) == (3, 1)


def test_a_damaged_inventory_is_refused_whole(tmp_path):
    objects = inventory_bucket(OLD)
    name = next(key for key in objects if key.endswith(".gz"))
    with pytest.raises(DataError):
        read(objects | {name: objects[name][:-4] + b"xxxx"}, tmp_path / "i.parquet")
    assert not (tmp_path / "i.parquet").exists()
    with pytest.raises(DataError, match="fileSchema"):
        read(inventory_bucket(OLD, fileSchema="Bucket, Size"), tmp_path / "i.parquet")
    (tmp_path / "x.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match="is no inventory table"):
        Inventory(tmp_path / "x.parquet")


def test_the_columns_of_the_manifest_are_believed_not_the_readme():
    objects = inventory_bucket(OLD)
    with MockBucket(objects) as server, Client(ClientConfig(endpoint=server.endpoint, **FAST), seed=0) as client:
        assert find_manifest(client).columns == ("Bucket", "Key", "LastModifiedDate", "ETag")


# Article table and plan


def test_metadata_of_an_inventory_is_crawled_once_and_equals_the_local_copy(tmp_path):
    keys = {f"metadata/{path.name}": "a" * 32 for path in (SAMPLE / "metadata").iterdir()}
    objects = {p.relative_to(SAMPLE).as_posix(): p.read_bytes() for p in SAMPLE.rglob("*.json")}
    with (
        MockBucket(objects | inventory_bucket(keys)) as server,
        Client(ClientConfig(endpoint=server.endpoint, **FAST), seed=0) as client,
    ):
        inventory = read_inventory(client, tmp_path / "i.parquet")
        rows = crawl_articles(client, inventory, tmp_path / "a.parquet")
    local = list(LocalBucket(SAMPLE).records())
    assert rows == len(local)
    assert list(read_articles(tmp_path / "a.parquet")) == local


def test_a_plan_counts_every_version_once_and_chooses_as_the_builder_does(tmp_path):
    source = LocalBucket(SAMPLE)
    facts = make_plan(source, tmp_path / "plan.parquet", config(), snapshot="2026-11-01")
    planned, excluded = list(read_plan(tmp_path / "plan.parquet")), list(read_exclusions(tmp_path / "plan.parquet"))
    assert facts.seen == facts.planned + sum(facts.excluded.values()) == len(list(source.records()))
    assert (len(planned), len(excluded)) == (facts.planned, sum(facts.excluded.values()))
    chosen = {r.article_id for r in choose_versions(source.records()) if isinstance(r, ArticleRecord)}
    assert {r.article_id for r in planned} <= chosen
    assert plan_facts(tmp_path / "plan.parquet") == facts
    assert facts.snapshot == "2026-11-01"


def test_the_same_plan_has_the_same_bytes_and_samples_are_nested(tmp_path):
    source = LocalBucket(SAMPLE)
    for name in ("a", "b"):
        make_plan(source, tmp_path / name, config(limit=8))
    make_plan(source, tmp_path / "c", config(limit=4))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    eight, four = ({r.article_id for r in read_plan(tmp_path / name)} for name in ("a", "c"))
    assert (len(eight), len(four)) == (8, 4)
    assert four < eight


def test_units_are_slices_that_make_up_the_plan(tmp_path):
    facts = make_plan(LocalBucket(SAMPLE), tmp_path / "p", config(unit_size=5))
    units = [[r.article_id for r in read_plan(tmp_path / "p", [unit])] for unit in range(facts.units)]
    assert [article_id for unit in units for article_id in unit] == [r.article_id for r in read_plan(tmp_path / "p")]
    assert {len(unit) for unit in units[:-1]} == {5}
    with pytest.raises(DataError, match="has units 0 to"):
        list(read_plan(tmp_path / "p", [99]))


def test_a_licence_the_preset_does_not_admit_is_excluded_with_its_reason(tmp_path):
    records = [r for r in LocalBucket(SAMPLE).records() if isinstance(r, ArticleRecord)]
    write_articles(LocalBucket(SAMPLE).records(), tmp_path / "t.parquet")
    facts = make_plan(tmp_path / "t.parquet", tmp_path / "p", config())
    assert set(facts.licences) <= {"CC BY", "CC0"}
    with pytest.raises(DataError, match="nothing is left to plan"):
        make_plan(tmp_path / "t.parquet", tmp_path / "q", config(since="2099"))
    assert len(records) >= facts.planned
    with pytest.raises(ConfigError, match="licence"):
        check_config({}, PlanConfig, "test")


def test_a_planned_source_asks_for_no_metadata(bucket, client, tmp_path):
    make_plan(LocalBucket(SAMPLE), tmp_path / "p", config())
    before = len(bucket.log)
    source = PlannedSource(tmp_path / "p", CloudBucket(client, []))
    record = next(r for r in source.records() if isinstance(r, ArticleRecord))
    assert source.read(record.xml) == LocalBucket(SAMPLE).read(record.xml)
    assert len(bucket.log) == before + 1


def test_an_estimate_follows_from_its_rates_and_names_them(tmp_path):
    facts = make_plan(LocalBucket(SAMPLE), tmp_path / "p", config())
    rates = Rates(xml_bytes=100, picture_bytes=1000, requests_per_s=1, line_bytes_per_s=1e9, pair_overhead_bytes=0)
    found = estimate_plan(tmp_path / "p", rates)
    assert found.requests == facts.planned + facts.pictures
    assert found.download_bytes == 100 * facts.planned + 1000 * facts.pictures
    assert found.network_hours == pytest.approx(found.requests / 3600)
    assert found.disk_bytes == 2 * found.dataset_bytes == 2000 * facts.pictures
    assert any("given by you" in line for line in found.assumptions)
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(DataError, match="is no plan"):
        estimate_plan(tmp_path / "x")


def test_a_file_that_changed_under_a_plan_is_noticed(tmp_path):
    record = next(r for r in LocalBucket(SAMPLE).records() if isinstance(r, ArticleRecord))
    with (
        MockBucket({record.xml.key: b"other"}) as server,
        Client(ClientConfig(endpoint=server.endpoint, **FAST), seed=0) as client,
        pytest.raises(BadFile) as caught,
    ):
        CloudBucket(client, []).read(record.xml)
    assert caught.value.reason == "md5_mismatch"
