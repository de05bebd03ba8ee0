"""Sources that stay where they are: the batches of a local folder over HTTP, whatever the host does; foreign tars."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from foreign_tars import members_of, write_foreign, write_tar
from mock_bucket import Fault, MockBucket
from synthetic_shards import write_articles, write_colours
from test_loader import equal, tokenise

from biomedclip.errors import DataError
from biomedclip.stream.decode import Geometry
from biomedclip.stream.fetch import FetchConfig, Unreachable
from biomedclip.stream.loader import Samples, StreamLoader, StreamSource

STEPS = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("remote")
    write_colours(root / "colours")
    write_articles(root / "articles")
    write_foreign(root / "tars")
    return root


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr("biomedclip.stream.fetch._FIRST_PAUSE_S", 0.02)
    made = []

    def build(base, *, steps=STEPS, workers=0, max_bad=0.05, seed=0, foreign=True, **fetch):
        sources = [
            StreamSource(name="colours", path=f"{base}/colours", weight=2),
            StreamSource(name="articles", path=f"{base}/articles"),
        ]
        if foreign:
            sources.append(StreamSource(name="tars", path=f"{base}/tars/{{00000..00002}}.tar", article_key="article"))
        options = {"cache": str(tmp_path / "cache"), "max_wait_s": 10, "silence_s": 0.3, "requests_per_s": 5000}
        samples = Samples(
            sources, batch_size=8, seed=seed, geometry=Geometry(size_px=20, resize_mode="squash"), tokenise=tokenise,
            max_bad=max_bad, fetch=FetchConfig(**options | fetch),
        )  # fmt: skip
        made.append(samples)
        return StreamLoader(samples, max_steps=steps, workers=workers)

    yield build
    for samples in made:
        samples.close()


def same(one, other):
    assert len(one) == len(other)
    return all(equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_over_http_the_batches_are_those_of_the_local_folder(root, make, workers):
    here = list(make(root))
    assert {name for batch in here for name in batch["source"]} == {"colours", "articles", "tars"}
    with MockBucket(root) as bucket:
        loader = make(bucket.endpoint, workers=workers)
        assert same(list(loader), here)
        assert loader.bad == {}
        assert loader.notices == []
        asked = len(bucket.requests("*.tar"))
        again = make(bucket.endpoint)
        assert same(list(again), here)
        assert len(bucket.requests("*.tar")) - asked == 3  # the foreign tars' ETags; all samples were in the cache
        assert same(list(make(bucket.endpoint, cache_gb=0)), here)


def test_a_batch_is_fetched_together_and_the_next_ones_before_they_are_needed(root, make):
    with MockBucket(root) as bucket:
        loader = make(bucket.endpoint, foreign=False, ahead=2)
        del bucket.log[:]
        batch = loader.samples[0]
        deadline = time.monotonic() + 5
        while len(loader.samples._shards[0]._pending) and time.monotonic() < deadline:
            if all(p.future is None or p.future.done() for s in loader.samples._shards for p in s._pending.values()):
                break
            time.sleep(0.01)
        asked = len(bucket.log)
        assert asked < len(batch["key"]) * 3  # the samples of three batches lie near each other
        del bucket.log[:]
        loader.samples[1]
        assert loader.samples._prepared == {2, 3}
        assert len(bucket.log) < len(batch["key"])
        loader.samples.max_steps = 4
        for step in (2, 3):
            loader.samples[step]
        assert loader.samples._prepared == set()
        assert all(not shards._pending and not shards._held for shards in loader.samples._shards)


@pytest.mark.parametrize("kind", ["too_many", "server_error", "truncated", "dropped", "no_answer", "stall", "trickle"])
def test_no_sample_is_lost_to_a_fault_that_passes(root, make, kind):
    here = list(make(root))
    with MockBucket(root) as bucket:
        loader = make(bucket.endpoint)
        bucket.faults.append(Fault(kind, match="*.tar", times=12, retry_after="0.05"))
        assert same(list(loader), here)
        assert loader.bad == {}
        assert bucket.faults[0].times == 0


def test_a_host_that_stays_away_ends_the_run_in_time_and_counts_no_sample_as_bad(root, make):
    with MockBucket(root) as bucket:
        loader = make(bucket.endpoint, max_wait_s=0.5)
        batches = iter(loader)
        next(batches)
        state = loader.state_dict()
        bucket.faults.append(Fault("trickle", match="*.tar"))
        started = time.monotonic()
        with pytest.raises(Unreachable, match="resume the run"):
            list(batches)
        assert time.monotonic() - started < 5
        assert loader.bad == {}
        bucket.faults.clear()
        rest = make(bucket.endpoint)
        rest.load_state_dict(state)
        assert same(list(rest), list(make(root))[1:])


def test_a_missing_shard_is_counted_sample_by_sample(root, make):
    with MockBucket(root) as bucket:
        loader = make(bucket.endpoint, max_bad=1.0, foreign=False)
        bucket.faults.append(Fault("missing", match="articles/00000.tar"))
        with pytest.raises(DataError, match="8 samples in a row cannot be read"):
            list(loader)


def test_a_replaced_tar_is_noticed(root, make, tmp_path):
    shutil.copytree(root, tmp_path / "copy")
    with MockBucket(tmp_path / "copy") as bucket:
        loader = make(bucket.endpoint, max_bad=1.0)
        tar = tmp_path / "copy" / "tars" / "00001.tar"
        write_tar(tar, [m for n in range(8) for m in members_of(f"s{n:04d}", n + 100)])
        batches = list(loader)
        assert loader.bad["tars"] > 0
        assert loader.bad.keys() == {"tars"}
        assert "since its index was read" in loader.last_bad
        assert all(len(batch["key"]) == 8 for batch in batches)


@pytest.mark.parametrize("change", ["cut", "replaced"])
def test_a_local_tar_that_changes_after_its_index_is_counted_sample_by_sample(root, make, tmp_path, change):
    shutil.copytree(root, tmp_path / "copy")
    loader = make(tmp_path / "copy", max_bad=1.0)
    tar = tmp_path / "copy" / "tars" / "00001.tar"
    data = tar.read_bytes()
    if change == "cut":
        tar.write_bytes(data[: len(data) // 2])
    else:
        write_tar(tar, [m for n in range(8) for m in members_of(f"s{n:04d}", n + 100)])
    list(loader)
    assert loader.bad.keys() == {"tars"}
    assert "was replaced" in loader.last_bad


def test_a_tar_that_was_cut_before_says_what_is_left_out(root, make, tmp_path):
    shutil.copytree(root, tmp_path / "copy")
    tar = tmp_path / "copy" / "tars" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    with MockBucket(tmp_path / "copy") as bucket:
        for base in (tmp_path / "copy", bucket.endpoint):
            loader = make(base)
            assert "tar_cut_off 1" in loader.notices[0]
            list(loader)
            assert loader.bad == {}


def test_a_full_disk_is_one_notice(root, make, monkeypatch):
    import errno

    def full(path, data):
        raise OSError(errno.ENOSPC, "full")

    here = list(make(root))
    with MockBucket(root) as bucket:
        loader = make(bucket.endpoint)
        monkeypatch.setattr("biomedclip.stream.cache.write_bytes", full)
        said = []
        loader.on_notice = said.append
        assert same(list(loader), here)
        assert len(said) == 1
        assert "cache is off" in said[0]


def test_a_remote_folder_is_checked_against_its_manifest(root, make, tmp_path):
    shutil.copytree(root, tmp_path / "copy")
    with MockBucket(tmp_path / "copy") as bucket:
        with pytest.raises(DataError, match=r"nowhere/colours/manifest\.json: is missing"):
            make(f"{bucket.endpoint}/nowhere")
        index = tmp_path / "copy" / "articles" / "00000.parquet"
        good = index.read_bytes()
        index.write_bytes(good[:-1] + b"!")
        with pytest.raises(DataError, match="other bytes than its manifest says"):
            make(bucket.endpoint)
        index.write_bytes(good)
        manifest = tmp_path / "copy" / "articles" / "manifest.json"
        facts = json.loads(manifest.read_text())
        facts["shards"][0]["name"] = "../../00000.tar"
        facts["files"]["../../00000.parquet"] = hashlib.sha256(good).hexdigest()
        manifest.write_text(json.dumps(facts))
        with pytest.raises(DataError, match="names shards that are none"):
            make(bucket.endpoint)
        for wrong in ("{", "[]", "{}"):
            manifest.write_text(wrong)
            with pytest.raises(DataError, match="is no manifest"):
                make(bucket.endpoint)


def test_samples_taken_back_at_the_source_are_not_read(root, make, tmp_path):
    from biomedclip.schema import TOMBSTONE_COLUMNS
    from biomedclip.shards import TOMBSTONE_KEY, arrow_schema, tombstone_promise

    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    shutil.copytree(root, tmp_path / "copy")
    folder = tmp_path / "copy" / "articles"
    rows = [dict.fromkeys(TOMBSTONE_COLUMNS) | {"key": "pmc0-0", "reason": "retracted"}]
    table = pa.Table.from_pylist(rows, schema=arrow_schema(TOMBSTONE_COLUMNS))
    promise = json.dumps(tombstone_promise(folder, table.to_pylist()))
    pq.write_table(table.replace_schema_metadata({TOMBSTONE_KEY: promise}), folder / "tombstones.parquet")
    with MockBucket(tmp_path / "copy") as bucket:
        for base in (tmp_path / "copy", bucket.endpoint):
            keys = {key for rows in make(base).samples.rows for key in rows.columns["key"]}
            assert "pmc0-1" in keys
            assert "pmc0-0" not in keys
        (folder / "tombstones.parquet").unlink()
        assert any("pmc0-0" in rows.columns["key"] for rows in make(bucket.endpoint).samples.rows)


def test_an_article_of_foreign_tars_comes_once_in_a_batch(root, make):
    for batch in make(root, steps=6):
        articles = [a for a, s in zip(batch["article"].tolist(), batch["source"], strict=True) if s == "tars"]
        assert -1 not in articles
        assert len(articles) == len(set(articles))


def test_a_set_on_the_hub_is_read_by_the_hubs_rules(root, make, tmp_path, monkeypatch):
    here = list(make(root))
    served = tmp_path / "hub" / "datasets" / "lab" / "set" / "resolve" / "v1"
    shutil.copytree(root, served)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with MockBucket(tmp_path / "hub") as bucket:
        monkeypatch.setenv("HF_ENDPOINT", bucket.endpoint)
        monkeypatch.setattr("biomedclip.stream.fetch._HUB_PER_S", 1000.0)
        assert same(list(make("hf://datasets/lab/set@v1")), here)
        assert {r.headers.get("authorization") for r in bucket.log} == {"Bearer hf_test"}


def test_a_public_bucket_is_read_without_credentials(root, make, monkeypatch):
    here = list(make(root))
    with MockBucket(root.parent) as bucket:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
        # Whoever may not list a bucket is told 403 where a file is missing.
        bucket.faults.append(Fault("forbidden", match="*/tombstones.parquet"))
        assert same(list(make(f"s3://{root.name}")), here)
        assert not any("authorization" in {name.lower() for name in r.headers} for r in bucket.log)


def test_a_private_bucket_is_read_with_the_credentials_that_are_here(root, make, monkeypatch):
    pytest.importorskip("botocore")
    import mock_bucket

    from biomedclip.stream import addresses

    real = mock_bucket._Handler._object

    def private(self, key, fault):
        if "X-Amz-Signature=" not in self.path:
            self.mock.refused += 1
            fault = Fault("forbidden")
        self.refuse = fault and fault.kind == "forbidden"
        return real(self, key, fault)

    def answer(self, key, query, status, headers, body, fault):
        return real_answer(self, key, query, status, headers, body, Fault("forbidden") if self.refuse else fault)

    real_answer = mock_bucket._Handler._answer
    monkeypatch.setattr(mock_bucket._Handler, "_object", private)
    monkeypatch.setattr(mock_bucket._Handler, "_answer", answer)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    here = list(make(root))
    with MockBucket(root.parent) as bucket:
        bucket.refused = 0
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
        addresses._s3_client.cache_clear()
        with pytest.raises(DataError, match=r"may not be read .*biomedclip\[s3\]"):
            make(f"s3://{root.name}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
        addresses._s3_client.cache_clear()
        try:
            assert same(list(make(f"s3://{root.name}")), here)
        finally:
            addresses._s3_client.cache_clear()
        assert bucket.refused > 0


def test_training_from_urls_gives_the_weights_of_training_from_folders(root, tmp_path):
    from safetensors.torch import load_file
    from tiny_model import write_tiny_model

    from biomedclip.config import check_config
    from biomedclip.training.config import TrainConfig
    from biomedclip.training.train import train

    write_tiny_model(tmp_path / "model")
    cut = tmp_path / "cut.tar"
    cut.write_bytes((root / "tars" / "00000.tar").read_bytes()[:20_000])

    def run(base, out, **changes):
        sources = [{"name": "colours", "path": f"{base}/colours"},
                   {"name": "tars", "shards": [f"{base}/tars/{{00000..00002}}.tar"], "article_key": "article"},
                   {"name": "cut", "path": str(cut)}]  # fmt: skip
        fetch = {"cache": str(tmp_path / "cache")}
        values = {"model": {"name": str(tmp_path / "model")}, "data": {"sources": sources, "fetch": fetch},
                  "max_steps": 4, "batch_size": 8, "threads": 1, "checkpoints": {"every_steps": 2},
                  "validation": {"every_steps": 2}, "log_every_steps": 1}  # fmt: skip
        train(check_config(values | changes, TrainConfig, "test"), tmp_path / out)
        return load_file(tmp_path / out / "final" / "open_clip_model.safetensors")

    here = run(root, "here")
    with MockBucket(root, faults=[Fault("slow_down", match="*.tar", times=3, retry_after="0.05")]) as bucket:
        there = run(bucket.endpoint, "there")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    import pyarrow.parquet as pq

    for out in ("here", "there"):
        rows = pq.read_table(tmp_path / out / "stream_ledger.parquet").to_pylist()
        assert "tar_cut_off" in {row["reason"] for row in rows}
        assert "cannot be used" in (tmp_path / out / "log.txt").read_text()


KILLED = """
import hashlib, json, sys
sys.path.insert(0, {tests!r})
from test_loader import tokenise
from biomedclip.stream.decode import Geometry
from biomedclip.stream.fetch import FetchConfig
from biomedclip.stream.loader import Samples, StreamLoader, StreamSource

def main(base, workers, state, cache):
    sources = [StreamSource(name="colours", path=base + "/colours"),
               StreamSource(name="tars", path=base + "/tars/{{00000..00002}}.tar")]
    samples = Samples(sources, batch_size=8, seed=0, geometry=Geometry(size_px=20), tokenise=tokenise,
                      fetch=FetchConfig(cache=cache, requests_per_s=5000))
    loader = StreamLoader(samples, max_steps=40, workers=workers)
    if state:
        loader.load_state_dict(json.loads(state))
    for batch in loader:
        digest = hashlib.sha256(batch["image"].numpy().tobytes() + batch["text"].numpy().tobytes()).hexdigest()
        print(json.dumps([loader.state_dict(), batch["key"], digest, loader.bad.total()]), flush=True)

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
"""


@pytest.mark.fault
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_killed_over_http_a_run_goes_on_with_the_same_batches(root, tmp_path, workers):
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent)))

    def start(base, workers, state=""):
        return subprocess.Popen(
            [sys.executable, str(script), str(base), str(workers), state, str(tmp_path / "cache")],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent, start_new_session=True,
        )  # fmt: skip

    whole = [json.loads(line) for line in start(root, 0).communicate(timeout=100)[0].splitlines()]
    assert len(whole) == 40
    lines = []
    with MockBucket(root, faults=[Fault("slow_down", match="*.tar", times=10, retry_after="0.05")]) as bucket:
        for stop in (7, 19, None):
            run = start(bucket.endpoint, workers if stop != 19 else 1, json.dumps(lines[-1][0]) if lines else "")
            while (line := run.stdout.readline()) and (stop is None or len(lines) < stop):
                lines.append(json.loads(line))
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            run.stdout.close()
    assert [line[1:] for line in lines] == [line[1:] for line in whole]
    assert lines[-1][3] == 0


def test_a_spawned_worker_reads_too(root, make):
    import pickle

    with MockBucket(root) as bucket:
        loader = make(bucket.endpoint)
        first = loader.samples[0]
        loader.samples.close()
        loader.samples.tokenise = tokenise
        again = pickle.loads(pickle.dumps(loader.samples))
        assert torch.equal(again[0]["image"], first["image"])
        again.close()
