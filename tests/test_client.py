"""The bucket client against a server that misbehaves: every fault ends in success or in a reason, and is counted."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from mock_bucket import Fault, MockBucket

from biomedclip.config import check_config
from biomedclip.errors import ConfigError, DataError
from data_builders.pmc.catalog import BadFile, SourceFile
from data_builders.pmc.client import ENDPOINT, RETRYABLE_REASONS, Client, ClientConfig
from data_builders.pmc.throttle import Throttle, backoff_s, retry_after_s

BODY = bytes(range(256)) * 40
MD5 = hashlib.md5(BODY).hexdigest()
KEY = "PMC1.1/f1.jpg"

Make = Callable[..., tuple[MockBucket, Client]]


@pytest.fixture
def make() -> Iterator[Make]:
    """A mock bucket and a client of it that backs off for milliseconds only."""
    opened: list[MockBucket | Client] = []

    def start(*faults: Fault, objects: dict[str, bytes] | None = None, page_size: int = 1000, **settings: object):
        bucket = MockBucket(objects if objects is not None else {KEY: BODY}, list(faults), page_size)
        opened.append(bucket.__enter__())
        defaults = {
            "endpoint": bucket.endpoint, "first_backoff_s": 0.001, "max_backoff_s": 0.01, "connect_timeout_s": 2,
            "read_timeout_s": 0.3, "grace_s": 0.2, "min_bytes_per_s": 100_000, "max_attempts": 3,
        }  # fmt: skip
        client = Client(ClientConfig(**(defaults | settings)), seed=0)
        opened.append(client)
        return bucket, client

    yield start
    for one in reversed(opened):
        one.__exit__(None, None, None)


def reason_of(client: Client, key: str = KEY, **options: object) -> str:
    with pytest.raises(BadFile) as caught:
        client.read(key, **options)
    return caught.value.reason


def test_an_object_comes_whole_over_one_kept_connection_with_our_name_in_the_user_agent(make: Make) -> None:
    bucket, client = make(contact="mailto:me@example.org")
    assert [client.read(KEY, md5=MD5) for _ in range(5)] == [BODY] * 5
    assert len({request.port for request in bucket.log}) == 1
    agent = bucket.log[0].headers["User-Agent"]
    assert agent.startswith("biomedclip/")
    assert "mailto:me@example.org" in agent
    metrics = client.metrics()
    assert (metrics["requests"], metrics["connections"], metrics["retries"], metrics["failures"]) == (5, 1, {}, {})
    assert metrics["bytes"] > 5 * len(BODY)


@pytest.mark.parametrize("span", [(0, 10), (100, 101), (10_000, 10_240), (10_000, 99_999)])
def test_a_range_is_that_part_of_the_object(make: Make, span: tuple[int, int]) -> None:
    bucket, client = make()
    part = BODY[span[0] : span[1]]
    assert client.read(KEY, byte_range=span, md5=hashlib.md5(part).hexdigest()) == part
    assert bucket.log[0].status == 206


def test_a_server_that_ignores_ranges_gives_the_same_part(make: Make) -> None:
    bucket, client = make(Fault("ignore_range"))
    assert client.read(KEY, byte_range=(7, 20)) == BODY[7:20]
    assert bucket.log[0].status == 200


def test_a_range_beyond_the_end_is_refused(make: Make) -> None:
    _, client = make()
    assert reason_of(client, byte_range=(20_000, 20_001)) == "fetch_refused"


def test_names_with_blanks_accents_and_signs_are_found(make: Make) -> None:
    names = ["PMC1.1/Fig 1 é.jpg", "PMC1.1/a+b&c=d?e#f%20g.jpg", "PMC1.1/(x)'~.jpg"]
    bucket, client = make(objects={name: name.encode() for name in names})
    assert [client.read(name) for name in names] == [name.encode() for name in names]
    assert sorted(entry.key for entry in client.list_keys("PMC1.1/")) == sorted(names)
    assert len(bucket.log) == 4


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("slow_down", "throttled"), ("too_many", "throttled"), ("server_error", "server_error"),
        ("truncated", "truncated"), ("dropped", "dropped"), ("no_answer", "dropped"), ("wrong_bytes", "md5_mismatch"),
        ("trickle", "slow"), ("trickle_headers", "slow"), ("stall", "timeout"),
    ],
)  # fmt: skip
def test_a_passing_fault_is_overcome_and_counted_under_its_cause(make: Make, kind: str, cause: str) -> None:
    bucket, client = make(Fault(kind, times=1))
    assert client.read(KEY, md5=MD5) == BODY
    assert client.metrics()["retries"] == {cause: 1}
    assert len(bucket.log) == 2


@pytest.mark.parametrize(
    ("kind", "reason", "requests"),
    [
        ("slow_down", "fetch_throttled", 3), ("too_many", "fetch_throttled", 3), ("stall", "fetch_timeout", 3),
        ("server_error", "fetch_server_error", 3), ("truncated", "fetch_truncated", 3), ("trickle", "fetch_slow", 3),
        ("dropped", "fetch_dropped", 3), ("no_answer", "fetch_dropped", 3), ("trickle_headers", "fetch_slow", 3),
        ("wrong_bytes", "md5_mismatch", 2), ("missing", "missing_file", 1), ("forbidden", "fetch_forbidden", 1),
        ("redirect", "fetch_refused", 1),
    ],
)  # fmt: skip
def test_a_lasting_fault_ends_in_a_reason_after_a_bounded_number_of_requests(
    make: Make, kind: str, reason: str, requests: int
) -> None:
    bucket, client = make(Fault(kind))
    started = time.monotonic()
    assert reason_of(client, md5=MD5) == reason
    assert time.monotonic() - started < 3
    assert len(bucket.log) == requests
    assert client.metrics()["failures"] == {reason: 1}
    assert sum(client.metrics()["retries"].values()) == requests - 1
    assert (reason in RETRYABLE_REASONS) == (requests > 1)


def test_a_key_that_leaves_the_bucket_is_never_asked_for(make: Make) -> None:
    bucket, client = make()
    assert reason_of(client, "PMC1.1/../PMC2.1/x") == "unsafe_key"
    assert reason_of(client, "/etc/passwd") == "unsafe_key"
    assert reason_of(client, "a\r\nHost: b") == "unsafe_key"
    assert bucket.log == []


def test_an_object_beyond_the_limit_is_refused_by_its_header(make: Make) -> None:
    _, client = make()
    assert reason_of(client, max_bytes=len(BODY) - 1) == "file_too_large"
    assert client.metrics()["bytes"] < len(BODY) + 1000
    assert client.read(KEY, max_bytes=len(BODY)) == BODY


def test_a_connection_that_the_server_closed_meanwhile_is_replaced_without_an_attempt_lost(make: Make) -> None:
    bucket, client = make(max_attempts=1)
    assert client.read(KEY) == BODY
    bucket.faults.append(Fault("no_answer", times=1))
    assert client.read(KEY) == BODY
    assert client.metrics()["retries"] == {"stale_connection": 1}


def test_nobody_listening_is_a_reason_and_then_an_error_that_stops_the_run() -> None:
    with MockBucket({}) as bucket:
        endpoint = bucket.endpoint
    with Client(ClientConfig(endpoint=endpoint, first_backoff_s=0, max_attempts=2, give_up_after=3)) as client:
        assert [reason_of(client) for _ in range(3)] == ["fetch_connect"] * 3
        with pytest.raises(DataError, match="does not answer: 3 files in a row"):
            client.read(KEY)
        assert client.metrics()["requests"] == 6


def test_missing_files_do_not_count_as_a_host_that_is_gone(make: Make) -> None:
    _, client = make(give_up_after=2)
    assert [reason_of(client, "absent") for _ in range(5)] == ["missing_file"] * 5
    assert client.read(KEY) == BODY


def test_a_storm_of_slow_down_halves_the_concurrency_and_loses_no_file(make: Make) -> None:
    objects = {f"PMC1.1/{i}": b"%d" % i for i in range(200)}
    bucket, client = make(Fault("slow_down", times=40), objects=objects, max_attempts=12, max_concurrency=16)
    files = [SourceFile(key, hashlib.md5(data).hexdigest()) for key, data in objects.items()]
    assert list(client.read_many(files)) == list(objects.values())
    metrics = client.metrics()
    assert metrics["retries"] == {"throttled": 40}
    assert metrics["requests"] == len(bucket.log) == 240
    assert bucket.peak <= 16


def test_many_files_come_in_order_and_each_fault_stays_with_its_file(make: Make) -> None:
    objects = {f"PMC1.1/{i}": b"%d" % i for i in range(50)}
    _, client = make(Fault("missing", "*/7"), Fault("wrong_bytes", "*/9"), objects=objects, max_concurrency=8)
    files = [SourceFile(key, hashlib.md5(data).hexdigest()) for key, data in objects.items()]
    found = list(client.read_many(files))
    bad = {i: item.reason for i, item in enumerate(found) if isinstance(item, BadFile)}
    assert bad == {7: "missing_file", 9: "md5_mismatch"}
    assert all(item == b"%d" % i for i, item in enumerate(found) if i not in bad)


def test_reading_many_looks_ahead_only_a_bounded_number_of_files(make: Make) -> None:
    _, client = make(max_concurrency=4)
    taken: list[int] = []

    def files() -> Iterator[SourceFile]:
        for i in range(1000):
            taken.append(i)
            yield SourceFile(KEY, MD5)

    reader = client.read_many(files())
    assert next(reader) == BODY
    assert len(taken) <= 8
    reader.close()


def test_retry_after_pauses_the_whole_host(make: Make) -> None:
    _, client = make(Fault("too_many", times=1, retry_after="1"), objects={"a": b"1", "b": b"2"})
    started = time.monotonic()
    assert client.read("a") == b"1"
    assert 1.0 <= time.monotonic() - started < 2.5


def test_an_absurd_retry_after_is_cut(make: Make) -> None:
    _, client = make(Fault("too_many", times=1, retry_after="99999999"), max_retry_after_s=0.05)
    assert client.read(KEY) == BODY


def test_closing_wakes_threads_that_wait(make: Make) -> None:
    _, client = make(Fault("too_many", retry_after="100"))
    outcome: list[type[BaseException]] = []

    def read() -> None:
        try:
            client.read(KEY)
        except CancelledError as error:
            outcome.append(type(error))

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.1)
    client.close()
    thread.join(timeout=2)
    assert outcome == [CancelledError]


@pytest.mark.parametrize("page_size", [1, 2, 1000])
def test_a_listing_goes_over_all_pages(make: Make, page_size: int) -> None:
    keys = ["PMC123.1/a.xml", "PMC123.1/b & <c>.jpg", "PMC123.10/a.xml", "PMC1234.1/a.xml", "README.txt"]
    bucket, client = make(objects=dict.fromkeys(keys, b"x"), page_size=page_size)
    assert [entry.key for entry in client.list_keys()] == keys
    versions = list(client.list_keys("PMC123.", delimiter="/"))
    assert [(entry.key, entry.is_prefix) for entry in versions] == [("PMC123.1/", True), ("PMC123.10/", True)]
    assert [entry.key for entry in client.list_keys(start_after="PMC123.2")] == keys[3:]
    (first,) = client.list_keys("PMC123.1/a")
    assert (first.size, first.etag) == (1, hashlib.md5(b"x").hexdigest())
    assert all(request.query["list-type"] == "2" for request in bucket.log)


def test_a_listing_is_fetched_again_where_it_is_cut_short(make: Make) -> None:
    _, client = make(Fault("truncated", times=1))
    assert [entry.key for entry in client.list_keys()] == [KEY]
    assert client.metrics()["retries"] == {"truncated": 1}


def test_a_listing_that_cannot_be_read_is_an_error_because_nobody_knows_what_it_lacks(make: Make) -> None:
    _, client = make(Fault("wrong_bytes"))
    with pytest.raises(DataError, match="listing"):
        list(client.list_keys())


@pytest.mark.parametrize(
    "endpoint", ["pmc-oa-opendata.s3.amazonaws.com", "ftp://x/", "https://", "https://me@host", "https://h/?a=b"]
)
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoint"):
        check_config({"endpoint": endpoint}, ClientConfig, "test")


def test_the_default_endpoint_is_the_service_and_nothing_is_asked_before_it_is_needed() -> None:
    with Client() as client:
        assert client.config.endpoint == ENDPOINT == "https://pmc-oa-opendata.s3.amazonaws.com"
        assert client.metrics()["connections"] == 0


def test_the_limit_doubles_until_the_first_slow_down_and_then_grows_by_one_a_round() -> None:
    throttle = Throttle(start=4, most=100)
    for _ in range(4):
        throttle.speed_up()
    assert throttle.limit == 8
    with throttle.slot() as started:
        pass
    throttle.slow_down(started)
    assert throttle.limit == 4
    throttle.slow_down(started)  # begun before the cut: the same burst
    assert throttle.limit == 4
    for _ in range(5):
        throttle.speed_up()
    assert 5 <= throttle.limit < 5.2
    for _ in range(10):
        with throttle.slot() as started:
            pass
        throttle.slow_down(started)
    assert throttle.limit == 1


def test_back_off_is_uniform_below_a_doubling_ceiling() -> None:
    import random

    dice = random.Random(0)
    for attempt, ceiling in ((1, 0.5), (2, 1.0), (3, 2.0), (8, 60.0), (5000, 60.0)):
        delays = [backoff_s(attempt, 0.5, 60.0, dice) for _ in range(500)]
        assert 0 <= min(delays) < 0.05 * ceiling
        assert 0.95 * ceiling < max(delays) <= ceiling


def test_retry_after_is_read_as_seconds_or_date() -> None:
    now = datetime(2026, 9, 1, tzinfo=UTC)
    assert retry_after_s("7", now.timestamp()) == 7
    assert retry_after_s(format_datetime(now.replace(second=30), usegmt=True), now.timestamp()) == 30
    assert retry_after_s(format_datetime(now.replace(year=2020), usegmt=True), now.timestamp()) == 0
    assert [retry_after_s(text, 0.0) for text in (None, "", "soon", "-3", "9" * 4000)] == [None] * 5
