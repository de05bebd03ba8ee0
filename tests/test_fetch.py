"""Ranges over HTTP from a loopback server: the right bytes, every fault overcome or named, nothing hangs."""

import multiprocessing
import os
import threading
import time

import pytest
from mock_bucket import Fault, MockBucket

from biomedclip.errors import ConfigError, DataError
from biomedclip.stream.addresses import resolve, shown
from biomedclip.stream.budget import Budget
from biomedclip.stream.cache import DiskCache, entry_name
from biomedclip.stream.fetch import MAX_BLOCK, MAX_GAP, FetchConfig, Fetcher, RangeFile, Span, Unreachable, coalesce

BODY = bytes(os.urandom(300_000))


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr("biomedclip.stream.fetch._FIRST_PAUSE_S", 0.02)
    made = []

    def build(**changes):
        options = {"cache": str(tmp_path / "cache"), "max_wait_s": 5, "silence_s": 0.2, "requests_per_s": 1000}
        made.append(Fetcher(FetchConfig(**options | changes)))
        return made[-1]

    yield build
    for fetcher in made:
        fetcher.close()


def test_near_spans_are_one_request_and_far_ones_are_not(make):
    with MockBucket({"a.tar": BODY, "b.tar": BODY}) as bucket:
        url = f"{bucket.endpoint}/a.tar"
        spans = [Span(url, 100, 200), Span(url, 5000, 9000), Span(url, 150, 180), Span(url, 200_000, 200_001),
                 Span(f"{bucket.endpoint}/b.tar", 0, 10)]  # fmt: skip
        pending = make().start(spans)
        assert [pending[span].result() for span in spans] == [BODY[span.start : span.stop] for span in spans]
        assert sorted((r.key, r.headers["Range"]) for r in bucket.log) == [
            ("a.tar", "bytes=100-8999"), ("a.tar", "bytes=200000-200000"), ("b.tar", "bytes=0-9")
        ]  # fmt: skip


def test_blocks_hold_every_span_within_the_limits():
    spans = [Span("u", start, start + 50_000) for start in range(0, 20_000_000, 100_000)] + [Span("v", 0, 1)]
    blocks = coalesce(spans)
    assert sorted((s.url, s.start) for block in blocks for s in block) == sorted((s.url, s.start) for s in spans)
    for block in blocks:
        assert len({span.url for span in block}) == 1
        assert max(s.stop for s in block) - block[0].start <= MAX_BLOCK
    assert len(blocks) == 4
    assert len(coalesce([Span("u", 0, 10), Span("u", 10 + MAX_GAP, 90_000)])) == 1
    assert len(coalesce([Span("u", 0, 10), Span("u", 11 + MAX_GAP, 90_000)])) == 2


@pytest.mark.parametrize(
    ("kind", "cause"),
    [("too_many", "throttled"), ("slow_down", "throttled"), ("server_error", "server_error"), ("dropped", "dropped"),
     ("truncated", "truncated"), ("stall", "timeout"), ("no_answer", "dropped"),
     ("trickle", "slow"), ("trickle_headers", "slow")],
)  # fmt: skip
def test_a_fault_that_passes_costs_time_and_no_bytes(make, kind, cause):
    fetcher = make()
    with MockBucket({"a.tar": BODY}, faults=[Fault(kind, times=3, retry_after="0.1")]) as bucket:
        assert fetcher.read(Span(f"{bucket.endpoint}/a.tar", 1000, 250_000)) == BODY[1000:250_000]
    assert fetcher.requests[cause] == 3
    assert fetcher.requests["requests"] == 4


@pytest.mark.parametrize("kind", ["too_many", "stall", "trickle", "trickle_headers", "dropped", "no_answer"])
def test_a_fault_that_stays_ends_in_time_and_is_named(make, kind):
    fetcher = make(max_wait_s=0.6)
    with MockBucket({"a.tar": BODY}, faults=[Fault(kind)]) as bucket:
        started = time.monotonic()
        with pytest.raises(Unreachable, match=r"cannot be read within 0.6 s .*x; last"):
            fetcher.read(Span(f"{bucket.endpoint}/a.tar", 0, 250_000))
        assert time.monotonic() - started < 2


def test_a_trickle_is_given_up_soon_however_much_was_asked_for(make):
    fetcher, body = make(), BODY * 14
    with MockBucket({"a.tar": body}, faults=[Fault("trickle", times=2)]) as bucket:
        started = time.monotonic()
        assert fetcher.read(Span(f"{bucket.endpoint}/a.tar", 0, len(body))) == body
        assert time.monotonic() - started < 3
    assert fetcher.requests["slow"] == 2


def test_a_slow_answer_that_keeps_coming_is_waited_for(make, monkeypatch):
    monkeypatch.setattr("biomedclip.stream.transport._SLOW_BYTES_PER_S", 20)
    fetcher = make()
    with MockBucket({"a.tar": BODY}, faults=[Fault("trickle")]) as bucket:
        assert fetcher.read(Span(f"{bucket.endpoint}/a.tar", 0, 60)) == BODY[:60]
    assert fetcher.requests == {"requests": 1}


def test_retry_after_is_waited_for_by_everybody(make):
    with MockBucket({"a.tar": BODY}, faults=[Fault("too_many", times=1, retry_after="0.5")]) as bucket:
        url = f"{bucket.endpoint}/a.tar"
        started = time.monotonic()
        assert make().read(Span(url, 0, 10)) == BODY[:10]
        other = make()
        waited = time.monotonic() - started
        assert 0.45 < waited < 3
        other._budget.pause(url.split("/")[2], 0.5)
        started = time.monotonic()
        assert make().read(Span(url, 20, 30)) == BODY[20:30]
        assert time.monotonic() - started > 0.45
        other._budget.pause(url.split("/")[2], 600.0)
        with pytest.raises(Unreachable, match="longer pause"):
            make().read(Span(url, 40, 50))


def test_what_asking_again_cannot_change_is_said_at_once(make):
    with MockBucket({"a.tar": BODY, "new.tar": BODY}) as bucket:
        url = f"{bucket.endpoint}/a.tar"
        fetcher = make()
        cases = [
            (Span(f"{bucket.endpoint}/none.tar", 0, 9), "is missing"),
            (Span(url, 299_999, 300_009), "cut off"),
            (Span(url, 400_000, 400_009), "cut off since its index"),
            (Span(url, 0, 9, total=5), "was replaced"),
            (Span(url, 0, 9, etag='"other"'), "was replaced"),
        ]
        for span, word in cases:
            with pytest.raises(DataError, match=word) as caught:
                fetcher.read(span)
            assert not isinstance(caught.value, Unreachable)
        assert len(bucket.log) == len(cases)
        assert fetcher.read(Span(f"{bucket.endpoint}/new.tar", 0, 9)) == BODY[:9]
        bucket.objects["new.tar"] = BODY[::-1]
        with pytest.raises(DataError, match=r"was replaced since its index was read \(found ETag"):
            fetcher.read(Span(f"{bucket.endpoint}/new.tar", 20, 29))
        bucket.faults.append(Fault("forbidden"))
        with pytest.raises(DataError, match="may not be read"):
            fetcher.read(Span(url, 10, 19))


def test_a_server_that_ignores_ranges_is_put_up_with_for_small_files(make, monkeypatch):
    with MockBucket({"a.tar": BODY}, faults=[Fault("ignore_range")]) as bucket:
        url = f"{bucket.endpoint}/a.tar"
        assert make().read(Span(url, 70, 90)) == BODY[70:90]
        monkeypatch.setattr("biomedclip.stream.fetch.MAX_WHOLE", 1000)
        with pytest.raises(DataError, match="too_large"):
            make().read(Span(url, 100, 190))


def test_a_redirect_to_another_scheme_or_in_circles_is_not_followed(make, monkeypatch):
    seen = []

    def spoil(self, *args, **options):
        seen.append(args)
        return real(self, *args, **options)

    from biomedclip.stream.transport import Transport

    real = Transport.ask
    monkeypatch.setattr(Transport, "ask", spoil)
    with MockBucket({"a.tar": BODY}, faults=[Fault("redirect")]) as bucket:
        import mock_bucket

        monkeypatch.setattr(mock_bucket._Handler, "send_header", _send_location("https://127.0.0.1:1/a"))
        with pytest.raises(DataError, match="another scheme"):
            make().read(Span(f"{bucket.endpoint}/a.tar", 0, 9))
        monkeypatch.setattr(mock_bucket._Handler, "send_header", _send_location(f"{bucket.endpoint}/b.tar"))
        with pytest.raises(DataError, match="circles"):
            make().read(Span(f"{bucket.endpoint}/a.tar", 0, 9))
    assert all(args[0].startswith("http://") for args in seen)


def _send_location(where):
    from http.server import BaseHTTPRequestHandler

    def send_header(self, name, value):
        BaseHTTPRequestHandler.send_header(self, name, where if name == "Location" else value)

    return send_header


def test_a_redirect_within_the_scheme_is_followed_and_takes_no_token_along(make, monkeypatch):
    with (
        MockBucket({"a.tar": BODY}) as store,
        MockBucket({"datasets/o/n/resolve/main/a.tar": BODY}, faults=[Fault("redirect", times=1)]) as hub,
    ):
        import mock_bucket

        monkeypatch.setattr(mock_bucket._Handler, "send_header", _send_location(f"{store.endpoint}/a.tar?signed=1"))
        import biomedclip.stream.fetch as fetch

        token = {"authorization": "Bearer secret"}
        monkeypatch.setattr(fetch, "resolve", lambda url: (f"{hub.endpoint}/datasets/o/n/resolve/main/a.tar", token))
        fetcher = make()
        for start in (0, 100_000):
            assert fetcher.read(Span("hf://datasets/o/n/a.tar", start, start + 9)) == BODY[start : start + 9]
        assert len(hub.log) == 1  # the second read went straight to where the first was sent
        assert hub.log[0].headers["authorization"] == "Bearer secret"
        assert len(store.log) == 2
        assert not any("authorization" in {name.lower() for name in r.headers} for r in store.log)
        store.faults.append(Fault("forbidden", times=1))  # the signature expired
        assert fetcher.read(Span("hf://datasets/o/n/a.tar", 200_000, 200_009)) == BODY[200_000:200_009]


def test_addresses(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert resolve("s3://bucket/a b/c.tar") == ("https://bucket.s3.amazonaws.com/a%20b/c.tar", {})
    assert resolve("s3://my.bucket/c.tar") == ("https://s3.amazonaws.com/my.bucket/c.tar", {})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9000/")
    assert resolve("s3://bucket/c.tar")[0] == "http://localhost:9000/bucket/c.tar"
    address, headers = resolve("hf://datasets/owner/name@refs%2Fpr%2F1/data/0.tar")
    assert address == "https://huggingface.co/datasets/owner/name/resolve/refs%2Fpr%2F1/data/0.tar"
    assert headers == {"authorization": "Bearer hf_test"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE"):
        resolve("hf://datasets/owner/name/0.tar")
    for url in ("ftp://host/0.tar", "https://me:secret@host/0.tar", "hf://owner/name/0.tar"):
        with pytest.raises(ConfigError) as caught:
            resolve(url)
        assert "secret" not in str(caught.value)
    assert shown("https://h/a.tar?X-Amz-Signature=1") == "https://h/a.tar"


def test_the_cache_answers_the_second_time_and_notices_damage(make, tmp_path):
    with MockBucket({"a.tar": BODY}) as bucket:
        span = Span(f"{bucket.endpoint}/a.tar", 0, 1000)
        assert make().read(span) == make().read(span) == make().start([span])[span].result() == BODY[:1000]
        assert len(bucket.log) == 1
        (entry,) = (tmp_path / "cache" / "spans").glob("??/*")
        entry.write_bytes(entry.read_bytes()[:-1] + b"!")
        assert make().read(span) == BODY[:1000]
        assert len(bucket.log) == 2
        assert make(cache_gb=0).read(span) == BODY[:1000]
        assert len(bucket.log) == 3


def test_the_cache_stays_below_its_limit_and_keeps_what_was_used_last(tmp_path):
    cache = DiskCache(tmp_path, 100_000)
    names = [entry_name(number) for number in range(60)]
    for number, name in enumerate(names):
        cache.write(name, bytes(5000))
        os.utime(cache._path(name), (number, number))
    left = [name for name in names if cache.has(name)]
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) <= 110_000
    assert left == names[-len(left) :]
    assert 15 <= len(left) < 25


def test_a_full_disk_turns_the_cache_off_and_reading_goes_on(make, monkeypatch):
    import errno

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("biomedclip.stream.cache.write_bytes", full)
    with MockBucket({"a.tar": BODY}) as bucket:
        fetcher = make()
        for start in (0, 100_000):
            assert fetcher.read(Span(f"{bucket.endpoint}/a.tar", start, start + 9)) == BODY[start : start + 9]
    assert "the cache is off" in fetcher.cache.notice
    assert "No space left" in fetcher.cache.notice


def _spend(folder, count):
    budget = Budget(folder, 200, burst=1)
    for _ in range(count):
        time.sleep(budget.reserve("host", 60))


def test_processes_share_one_budget(tmp_path):
    started = time.monotonic()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_spend, args=(tmp_path, 25)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert 0.45 < time.monotonic() - started < 4


def test_a_budget_without_a_folder_or_with_a_damaged_file_still_counts(tmp_path):
    for folder in (None, tmp_path / "file" / "below"):
        (tmp_path / "file").write_text("in the way")
        budget = Budget(folder, 10, burst=1)
        waits = [budget.reserve("host", 60) for _ in range(4)]
        assert waits[0] < 0.11
        assert 0.25 < waits[3] < 0.31
    budget = Budget(tmp_path, 10)
    budget.reserve("host", 60)
    (file,) = tmp_path.glob("*.budget")
    file.write_bytes(b"\xff" * 8)
    assert budget.reserve("host", 60) == 0
    assert budget.reserve("host", 60) == 0


def test_a_range_file_reads_like_the_file(make):
    with MockBucket({"a.tar": BODY}) as bucket:
        file = RangeFile(make(), f"{bucket.endpoint}/a.tar")
        assert file.size == len(BODY)
        for place, size in ((0, 512), (100, 5), (65_000, 2000), (299_000, 5000), (3, 4), (0, -1)):
            assert file.seek(place) == file.tell() == place
            assert file.read(size) == BODY[place:][: size if size >= 0 else None]
        assert file.read(5) == b""
        bucket.objects["a.tar"] = BODY[:-1]
        file.seek(250_000)
        file._pieces.clear()
        file._pieces.append((0, b""))
        with pytest.raises(DataError, match="replaced while"):
            file.read(10)


def test_closing_ends_what_waits(make):
    fetcher = make(max_wait_s=60, silence_s=60)
    with MockBucket({"a.tar": BODY}, faults=[Fault("too_many", retry_after="30")]) as bucket:
        pending = fetcher.start([Span(f"{bucket.endpoint}/a.tar", 0, 9)])
        threading.Timer(0.2, fetcher.close).start()
        started = time.monotonic()
        with pytest.raises(Unreachable):
            next(iter(pending.values())).result()
        assert time.monotonic() - started < 5
