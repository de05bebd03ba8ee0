"""Foreign tars read by position give what webdataset's own reader gives, and what they lack is counted."""

import tarfile
from collections import Counter

import pytest
import webdataset
from foreign_tars import members_of, picture, write_foreign, write_tar
from mock_bucket import MockBucket

from biomedclip.errors import ConfigError, DataError
from biomedclip.stream.fetch import FetchConfig, Fetcher
from biomedclip.stream.index import expand_tars, index_tars

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def fetcher(tmp_path):
    made = Fetcher(FetchConfig(cache=str(tmp_path / "cache"), requests_per_s=1000, max_wait_s=5))
    yield made
    made.close()


def read_webdataset(paths):
    samples = webdataset.WebDataset([str(p) for p in paths], shardshuffle=False, handler=webdataset.reraise_exception)
    for sample in samples:
        image = next((sample[s] for s in ("jpg", "png", "webp") if s in sample), None)
        if image is not None and "txt" in sample:
            yield sample["__key__"], image, sample["txt"]


def read_index(index):
    for row in index.table.to_pylist():
        data = open(row["shard"], "rb").read()  # noqa: SIM115
        yield (
            row["key"],
            *(data[row[f"{m}_offset"] : row[f"{m}_offset"] + row[f"{m}_size"]] for m in ("image", "text")),
        )


LONG = "folder/" + "n" * 150
WRITTEN = {
    "pax": (tarfile.PAX_FORMAT, [m for n in range(5) for m in members_of(f"{LONG}{n}", n)]),
    "gnu": (tarfile.GNU_FORMAT, [m for n in range(5) for m in members_of(f"{LONG}{n}", n)]),
    "ustar": (tarfile.USTAR_FORMAT, [m for n in range(5) for m in members_of(f"a/b.c/k{n}", n, suffix="png")]),
    "case": (tarfile.USTAR_FORMAT, [("A.JPG", picture(1)), ("A.Txt", b"one"), ("__meta__/a.json", b"{}"),
                                    (".hidden", b"x"), ("noext", b"x")]),
    "unicode": (tarfile.PAX_FORMAT, members_of("Größe-é", 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_what_tarfile_writes_reads_as_webdataset_reads_it(tmp_path, fetcher, name):
    form, members = WRITTEN[name]
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    path = write_tar(tmp_path / "t.tar", [(folder, b""), *members], form)
    index = index_tars([str(path)], "t", fetcher)
    assert list(read_index(index)) == list(read_webdataset([path]))
    assert len(index.table) == sum(name.lower().endswith(".txt") for name, _ in members)
    assert index.dropped == {}


def test_what_webdataset_writes_reads_as_it_reads_it(tmp_path, fetcher):
    paths = write_foreign(tmp_path / "tars")
    index = index_tars(expand_tars(str(tmp_path / "tars" / "{00000..00002}.tar")), "w", fetcher, article_key="article")
    assert list(read_index(index)) == list(read_webdataset(paths))
    assert Counter(index.table["article_id"].to_pylist()) == {f"A{n}": 4 for n in range(6)}
    assert Counter(index.table["image_format"].to_pylist()) == {"jpg": 8, "png": 8, "webp": 8}
    assert expand_tars(str(tmp_path / "tars" / "*.tar")) == [str(path) for path in paths]
    by_key = index_tars([str(paths[0])], "w", fetcher, article_pattern=r"^s(\d{3})")
    assert set(by_key.table["article_id"].to_pylist()) == {"000"}
    with pytest.raises(ConfigError, match="regular expression"):
        index_tars([str(paths[0])], "w", fetcher, article_pattern="(")
    with pytest.raises(DataError, match="no such file"):
        expand_tars(str(tmp_path / "tars" / "{0..1}.tar"))


def test_over_http_the_index_is_the_same_and_large_members_are_not_fetched(tmp_path, fetcher):
    paths = write_foreign(tmp_path / "tars")
    big = [(f"big{n}.{s}", d) for n in range(4) for s, d in (("png", picture(n, "PNG", 900)), ("txt", b"big"))]
    paths.append(write_tar(tmp_path / "tars" / "big.tar", big))
    here = index_tars([str(path) for path in paths], "w", fetcher)
    with MockBucket(tmp_path / "tars") as bucket:
        urls = [f"{bucket.endpoint}/{path.name}" for path in paths]
        there = index_tars(urls, "w", fetcher)
        asked = len(bucket.log)
        fetched = sum(int(r.headers["Range"].split("-")[1]) - int(r.headers["Range"][6:].split("-")[0])
                      for r in bucket.requests("big.tar"))  # fmt: skip
        assert fetched < paths[-1].stat().st_size / 4
        again = index_tars(urls, "w", fetcher)
        assert len(bucket.log) - asked == len(urls)  # one request a tar tells that it is the same
    assert there.table.drop_columns("shard").equals(here.table.drop_columns("shard"))
    assert again.table.equals(there.table)


def test_samples_that_cannot_be_used_are_counted_by_reason(tmp_path, fetcher):
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        *members_of("good", 1), *members_of("PMC1.2_f", 2), ("lonely.txt", b"no picture"), ("mute.jpg", picture(3)),
        ("empty.jpg", picture(4)), ("empty.txt", b""), *members_of("twice", 5), *members_of("other", 6),
        *members_of("twice", 7), (link, b""), ("link.txt", b"x"), ("fake.jpg", b"<html>not here</html>"),
        ("fake.txt", b"x"), ("long.jpg", picture(8)), ("long.txt", b"x" * (2 << 20)),
        *members_of("double", 9), ("double.txt", b"again"),
    ]  # fmt: skip
    index = index_tars([str(write_tar(tmp_path / "t.tar", members))], "t", fetcher)
    assert index.table["key"].to_pylist() == ["good", "twice", "other"]
    assert {row["item"].rpartition("/")[2]: row["reason"] for row in index.ledger.to_pylist()} == {
        "PMC1": "dotted_key", "lonely": "no_image", "mute": "no_caption", "empty": "no_caption",
        "twice": "duplicate_key", "link": "not_a_plain_member", "fake": "not_an_image", "long": "text_too_long",
        "double": "duplicate_member",
    }  # fmt: skip
    assert {row["status"] for row in index.ledger.to_pylist()} == {"dropped"}


def test_a_tar_cut_off_anywhere_keeps_what_is_whole_and_says_so(tmp_path, fetcher):
    whole = write_tar(tmp_path / "whole.tar", [m for n in range(4) for m in members_of(f"k{n}", n)])
    data, full = whole.read_bytes(), index_tars([str(whole)], "t", fetcher)
    ends = {row["key"]: max(row["image_offset"] + row["image_size"], row["text_offset"] + row["text_size"])
            for row in full.table.to_pylist()}  # fmt: skip
    for cut in range(300, len(data) - 12_000, 397):
        path = tmp_path / f"cut{cut}.tar"
        path.write_bytes(data[:cut])
        index = index_tars([str(path)], "t", fetcher)
        keys, lost = set(index.table["key"].to_pylist()), Counter(index.ledger["reason"].to_pylist())
        assert keys <= {key for key, end in ends.items() if end <= cut}
        assert len({key for key, end in ends.items() if end <= cut} - keys) <= 1  # its json is cut
        assert lost["tar_cut_off"] + lost["tar_not_a_header"] == 1 or cut % 512 == 0, cut
        assert set(lost) <= {"cut_off", "tar_cut_off", "tar_not_a_header"}
        path.unlink()


def test_garbage_in_the_middle_is_no_silent_end(tmp_path, fetcher):
    path = write_tar(tmp_path / "t.tar", [m for n in range(4) for m in members_of(f"k{n}", n)])
    row = index_tars([str(path)], "t", fetcher).table.to_pylist()[2]
    with path.open("r+b") as file:
        file.seek(row["image_offset"] - 512)
        file.write(b"\x55" * 512)
    index = index_tars([str(path)], "t", fetcher)
    assert index.table["key"].to_pylist() == ["k0", "k1"]
    assert index.dropped == {"tar_not_a_header": 1}


def test_keys_that_several_tars_use_get_their_tars_name(tmp_path, fetcher):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [*members_of("0", 1), *members_of("1", 2)])
    index = index_tars(expand_tars(str(tmp_path / "{a,b}.tar")), "t", fetcher)
    assert index.table["key"].to_pylist() == ["a/0", "a/1", "b/0", "b/1"]


def test_a_cached_scan_is_used_until_the_tar_changes_and_a_damaged_one_never(tmp_path, fetcher, monkeypatch):
    path = write_tar(tmp_path / "t.tar", members_of("k0", 1))
    first = index_tars([str(path)], "t", fetcher)
    scans = []
    monkeypatch.setattr("biomedclip.stream.index.TarScan.__iter__", lambda self: scans.append(1) or iter(()))
    assert index_tars([str(path)], "t", fetcher).table.equals(first.table)
    assert scans == []
    for cached in (tmp_path / "cache" / "index").glob("*.parquet"):
        cached.write_bytes(b"damaged")
    assert len(index_tars([str(path)], "t", fetcher).table) == 0
    write_tar(path, [*members_of("k0", 1), *members_of("k1", 2)])
    index_tars([str(path)], "t", fetcher)
    assert len(scans) == 2
