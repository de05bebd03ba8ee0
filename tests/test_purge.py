"""Samples taken back: every reader passes over them, no shard is rewritten, and no accident brings them back."""

from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_line import run_command
from synthetic_shards import write_articles, write_colours

from biomedclip.errors import ConfigError, DataError
from biomedclip.files import sha256_file
from biomedclip.layouts import read_bytes, read_manifest
from biomedclip.shards import TOMBSTONE_KEY, TOMBSTONES, DatasetFolder, verify
from biomedclip.stream.decode import Geometry
from biomedclip.stream.loader import Samples, StreamLoader, StreamSource
from biomedclip.tokens import encode_captions
from data_builders.pmc.article_table import write_articles as write_table
from data_builders.pmc.catalog import ArticleRecord, SourceFile
from data_builders.pmc.diff import diff_tables
from data_builders.purge import purge, purge_by_diff, read_withdrawals


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_articles(tmp_path / "set")


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir() if path.name != TOMBSTONES}


def take_back(folder: Path, text: str, **kw):
    return purge(folder, read_withdrawals(text, **({"reason": "retracted"} | kw)))


def test_readers_pass_over_what_was_taken_back_and_no_shard_changes(folder):
    before = bytes_of(folder)
    facts = take_back(folder, "PMC1,PMC3.1,pmc4-0,PMC77", stated="2026-11-01")
    assert (facts.samples, facts.withdrawn, facts.left, facts.absent) == (9, 9, 11, ("PMC77",))
    assert facts.reasons == {"retracted": 9}
    assert bytes_of(folder) == before
    dataset = DatasetFolder(folder)
    kept = [f"pmc{a}-{n}" for a, n in itertools.product((0, 2, 4), range(4)) if (a, n) != (4, 0)]
    assert dataset.index["key"].to_pylist() == [sample.key for sample in dataset.samples()] == kept
    assert (len(dataset), len(dataset.stored_index), dataset.splits) == (11, 20, {"train": 11})
    assert set(dataset.tombstones.to_pylist()[0].items()) == {
        ("key", "pmc1-0"), ("article_id", "PMC1.1"), ("reason", "retracted"), ("stated", "2026-11-01")
    }  # fmt: skip
    assert verify(folder) == []


def test_purges_are_a_union_whatever_their_order_and_number(folder, tmp_path):
    take_back(folder, "PMC1")
    first = (folder / TOMBSTONES).read_bytes()
    assert take_back(folder, "PMC1").samples == 0
    assert (folder / TOMBSTONES).read_bytes() == first
    take_back(folder, "PMC3,PMC1.1", reason="removed")
    assert DatasetFolder(folder).tombstones.num_rows == 12
    assert len(DatasetFolder(folder).withdrawn) == 8
    other = write_articles(tmp_path / "other")
    take_back(other, "PMC3,PMC1", reason="removed")
    take_back(other, "PMC1")
    assert (other / TOMBSTONES).read_bytes() == (folder / TOMBSTONES).read_bytes()


def test_what_names_no_sample_leaves_no_file(folder):
    facts = take_back(folder, "PMC77")
    assert (facts.samples, facts.left, facts.absent) == (0, 20, ("PMC77",))
    assert not (folder / TOMBSTONES).exists()


def test_a_split_of_which_nothing_is_left_is_no_split(tmp_path):
    folder = write_colours(tmp_path / "colours")
    keys = [key for key in DatasetFolder(folder).index["key"].to_pylist() if key.startswith("val-")]
    (tmp_path / "list").write_text("# withdrawn by their owner\n" + "\n".join(keys) + "\n")
    take_back(folder, str(tmp_path / "list"), reason="requested")
    assert DatasetFolder(folder).splits == {"train": 18}


def test_an_article_is_also_found_by_its_doi(tmp_path):
    folder = tmp_path / "set"
    write_articles(folder)
    from biomedclip.schema import Article
    from biomedclip.shards import DatasetWriter
    from test_shards import pair  # isort: skip

    with DatasetWriter(tmp_path / "doi", name="doi") as writer:
        writer.add(pair("a", article_id="PMC1.1"))
        writer.add(pair("b", article_id="PMC2.1"))
        articles = [Article(article_id=f"PMC{n}.1", pmcid=n, version=1, title="", licence="CC BY", doi=f"10.1000/X{n}")
                    for n in (1, 2)]  # fmt: skip
        writer.finish(articles=articles, provenance={}, card=lambda manifest: "")
    facts = take_back(tmp_path / "doi", "https://doi.org/10.1000/x2, 10.1000/none")
    assert (DatasetFolder(tmp_path / "doi").withdrawn, facts.absent) == ({"b"}, ("10.1000/none",))


# Readers below the torch line


def loader(folder: Path, source: str, max_steps: int = 12) -> StreamLoader:
    samples = Samples(
        [StreamSource(name=source, path=folder)], batch_size=4, seed=0, geometry=Geometry(size_px=16),
        tokenise=lambda captions: torch.tensor(encode_captions(captions, 16), dtype=torch.int64),
    )  # fmt: skip
    return StreamLoader(samples, max_steps=max_steps)


@pytest.mark.parametrize(("write", "gone"), [(write_articles, "PMC2"), (write_colours, "train-red-0")])
def test_the_stream_never_gives_them_and_a_run_goes_on_only_over_the_same_samples(tmp_path, write, gone):
    folder = write(tmp_path / "set")
    before = loader(folder, "set")
    batches = iter(before)
    next(batches)
    state = before.state_dict()
    take_back(folder, gone)
    after = loader(folder, "set")
    seen = {key for batch in after for key in batch["key"]}
    assert seen == set(DatasetFolder(folder).index.filter(pa.compute.field("split") == "train")["key"].to_pylist())
    with pytest.raises(ConfigError, match="tombstones"):
        loader(folder, "set").load_state_dict(state)
    loader(folder, "set").load_state_dict(after.state_dict())


def test_an_evaluation_manifest_and_its_hash_change_also_in_a_process_that_read_it_before(folder):
    before = read_manifest("dataset_folder", folder)
    take_back(folder, "PMC1")
    after = read_manifest("dataset_folder", folder)
    assert len(before.rows) - len(after.rows) == 4
    assert before.sha256 != after.sha256
    assert read_bytes(after, after.rows[0])


# Trust


def write_with(path: Path, table: pa.Table, promise: bytes) -> None:
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({TOMBSTONE_KEY: promise})


def test_tombstones_that_cannot_be_trusted_stop_every_reader(folder, tmp_path):
    take_back(folder, "PMC1")
    good = (folder / TOMBSTONES).read_bytes()
    table = pq.read_table(folder / TOMBSTONES).replace_schema_metadata(None)
    promise = pq.read_metadata(folder / TOMBSTONES).metadata[TOMBSTONE_KEY]
    damaged = {
        "cut": good[:-20],
        "no promise": lambda path: pq.write_table(table, path),
        "other rows": lambda path: write_with(path, table.slice(1), promise),
    }
    for how in damaged.values():
        (folder / TOMBSTONES).write_bytes(how) if isinstance(how, bytes) else how(folder / TOMBSTONES)
        with pytest.raises(DataError, match=TOMBSTONES):
            len(DatasetFolder(folder))
        with pytest.raises(DataError, match=TOMBSTONES):
            loader(folder, "set")
        assert any(TOMBSTONES in problem for problem in verify(folder))
    other = write_articles(tmp_path / "other", articles=4)
    (other / TOMBSTONES).write_bytes(good)
    with pytest.raises(DataError, match="is damaged, or of another dataset"):
        len(DatasetFolder(other))


def test_verify_names_a_tombstone_without_sample(folder):
    from data_builders import purge as room

    row = {"key": "nobody", "article_id": None, "reason": "x", "stated": None}
    room._write(folder, [row])
    assert verify(folder) == [f"{folder}/{TOMBSTONES}: nobody is no sample of this dataset"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("no/such.txt", {}, "neither a file nor an article"),
        ("", {}, "names no article"),
        ("PMC1", {"reason": "Bad word"}, "one word"),
        ("PMC1", {"stated": "yesterday"}, "a date"),
    ],
)
def test_a_mistake_in_what_is_named_is_one_line(text, options, message):
    with pytest.raises(ConfigError, match=message):
        read_withdrawals(text, **({"reason": "retracted"} | options))


def test_a_folder_without_dataset_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no finished dataset"):
        take_back(tmp_path, "PMC1")


# By diff


def record(number: int, licence: str | None = "CC BY", text: str = "a", version: int = 1, **kw) -> ArticleRecord:
    name = f"PMC{number}.{version}"
    return ArticleRecord(article_id=name, pmcid=number, version=version, licence=licence,
                         xml=SourceFile(f"{name}/{name}.xml", None), title=text, **kw)  # fmt: skip


@pytest.fixture
def diff(tmp_path: Path) -> Path:
    old = [record(n) for n in range(1, 8)]
    new = [record(1, is_retracted=True), record(2, "CC BY-NC"), record(3, "CC0"), record(4, text="b"), record(7)]
    new += [record(6), record(6, version=2), record(9)]
    new.sort(key=lambda r: (r.pmcid, r.version))
    write_table(old, tmp_path / "old", snapshot="2026-10-01")
    write_table(new, tmp_path / "new", snapshot="2026-11-01")
    diff_tables(tmp_path / "old", tmp_path / "new", tmp_path / "diff.parquet")
    return tmp_path / "diff.parquet"


def built(folder: Path, preset: str | None) -> Path:
    from biomedclip.shards import DatasetWriter
    from test_shards import pair  # isort: skip

    with DatasetWriter(folder, name="pmc") as writer:
        for number in range(1, 9):
            writer.add(pair(f"k{number}", article_id=f"PMC{number}.1"))
        provenance = {"config": {"licence": preset}} if preset else {}
        writer.finish(provenance=provenance, card=lambda manifest: "")
    return folder


def test_a_diff_takes_back_what_is_retracted_removed_or_no_longer_licensed(diff, tmp_path):
    facts = purge_by_diff(built(tmp_path / "set", "commercial"), diff)
    rows = DatasetFolder(tmp_path / "set").tombstones.to_pylist()
    assert {row["key"]: row["reason"] for row in rows} == {
        "k1": "retracted", "k2": "licence_changed", "k5": "removed"
    }  # fmt: skip
    assert {row["stated"] for row in rows} == {"2026-11-01"}
    assert facts.outdated == ("PMC3", "PMC4", "PMC6")
    assert (facts.samples, facts.left) == (3, 5)
    facts = purge_by_diff(built(tmp_path / "all", "all"), diff)
    assert facts.reasons == {"removed": 1, "retracted": 1}
    facts = purge_by_diff(built(tmp_path / "unknown", None), diff)
    assert facts.reasons == {"licence_changed": 2, "removed": 1, "retracted": 1}


def test_the_command_says_what_it_took_back_and_that_the_shards_still_hold_it(folder):
    def run(*arguments):
        return run_command("data", *arguments)

    done = run("purge", str(folder), "--articles", "PMC1,PMC77", "--reason", "removed")
    assert done.returncode == 0, done.stderr
    assert "4 samples taken back (4 in all, 16 left)" in done.stdout
    assert "not in this dataset: PMC77" in done.stdout
    assert "16 samples" in run("verify", str(folder)).stdout
    wrong = run("purge", str(folder))
    assert (wrong.returncode, wrong.stderr) == (2, "error: data purge: needs --diff or --articles, one of them\n")
