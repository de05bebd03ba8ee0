"""Two days of a source, compared: what is new, changed, gone, withdrawn or under another licence, and nothing else."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import run_command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from biomedclip.config import check_config
from biomedclip.errors import DataError
from biomedclip.schema import Drop
from data_builders.pmc.article_table import write_articles
from data_builders.pmc.catalog import ArticleRecord, SourceFile
from data_builders.pmc.diff import KINDS, Change, changed_articles, diff_tables, read_changes, read_facts
from data_builders.pmc.plan import make_plan, read_exclusions, read_plan
from data_builders.pmc.plan_rules import PlanConfig

SAMPLE = Path(str(resources.files("data_builders"))) / "sample" / "pmc"


def record(number: int, version: int = 1, text: str = "first", licence: str | None = "CC BY", **kw) -> ArticleRecord:
    article_id, md5 = f"PMC{number}.{version}", hashlib.md5(text.encode()).hexdigest()
    media = (SourceFile(f"{article_id}/f1.jpg", md5),)
    return ArticleRecord(
        article_id=article_id, pmcid=number, version=version, licence=licence,
        xml=SourceFile(f"{article_id}/{article_id}.xml", md5), media=media, title="T", **kw,
    )  # fmt: skip


def write_inventory(path: Path, etags: dict[str, str | None], snapshot: str) -> Path:
    rows = sorted((int(a[3:].split(".")[0]), int(a.split(".")[1]), a) for a in etags)
    table = pa.table(
        {
            "article_id": pa.array([a for _, _, a in rows], pa.string()), "pmcid": pa.array([n for n, _, _ in rows]),
            "version": pa.array([v for _, v, _ in rows], pa.int16()),
            "etag": pa.array([etags[a] for _, _, a in rows], pa.string()),
            "last_modified": pa.array(["2026-01-01"] * len(rows), pa.string()),
            "keys": pa.array([3] * len(rows), pa.int64()),
        }
    )  # fmt: skip
    facts = {"snapshot": snapshot, "articles": len(rows), "keys": 3 * len(rows), "other_keys": 0}
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({b"biomedclip_inventory": json.dumps(facts).encode()})
    return path


def test_two_inventories_differ_by_what_is_new_changed_and_removed(tmp_path):
    old = write_inventory(tmp_path / "o", {"PMC2.1": "a", "PMC10.1": "b", "PMC10.2": "c"}, "2026-01-18T01-00Z")
    new = write_inventory(tmp_path / "n", {"PMC2.1": "a", "PMC10.2": "e", "PMC11.1": "f"}, "2026-02-18T01-00Z")
    facts = diff_tables(old, new, tmp_path / "diff.parquet")
    assert [(c.article_id, c.kind) for c in read_changes(tmp_path / "diff.parquet")] == [
        ("PMC10.1", "removed"), ("PMC10.2", "changed"), ("PMC11.1", "new")
    ]  # fmt: skip
    assert facts == read_facts(tmp_path / "diff.parquet")
    assert (facts.tables, facts.old, facts.new) == ("inventories", "2026-01-18T01-00Z", "2026-02-18T01-00Z")
    assert facts.counts == dict.fromkeys(KINDS, 0) | {"new": 1, "changed": 1, "removed": 1}


def test_a_listing_without_etags_is_compared_by_date_and_number_of_keys(tmp_path):
    old = write_inventory(tmp_path / "o", {"PMC1.1": None}, "2026-01-18T01-00Z")
    assert not any(diff_tables(old, old, tmp_path / "d").counts.values())


OLD = [record(1), record(2), record(3), record(4), record(5), record(6, is_retracted=True), record(8)]
NEW: list[ArticleRecord | Drop] = [
    record(1),
    record(2, text="second"),
    record(3, licence=None),
    record(4, is_retracted=True, licence="CC0"),
    Drop(source="pmc", item="PMC5.1", reason="no_metadata", article_id="PMC5.1"),
    record(6, is_retracted=True),
    record(7),
    record(7, 2, is_retracted=True),
]
WANTED = [
    Change(article_id="PMC2.1", pmcid=2, version=1, kind="changed", licence_before="CC BY", licence_now="CC BY"),
    Change(article_id="PMC3.1", pmcid=3, version=1, kind="licence_changed", licence_before="CC BY"),
    Change(article_id="PMC4.1", pmcid=4, version=1, kind="retracted", licence_before="CC BY", licence_now="CC0"),
    Change(article_id="PMC5.1", pmcid=5, version=1, kind="unreadable", licence_before="CC BY"),
    Change(article_id="PMC7.1", pmcid=7, version=1, kind="new", licence_now="CC BY"),
    Change(article_id="PMC7.2", pmcid=7, version=2, kind="retracted", licence_now="CC BY"),
    Change(article_id="PMC8.1", pmcid=8, version=1, kind="removed", licence_before="CC BY"),
]


@pytest.fixture
def diff(tmp_path) -> Path:
    write_articles(OLD, tmp_path / "old.parquet", snapshot="2026-01-18T01-00Z")
    write_articles(NEW, tmp_path / "new.parquet", snapshot="2026-02-18T01-00Z")
    diff_tables(tmp_path / "old.parquet", tmp_path / "new.parquet", tmp_path / "diff.parquet")
    return tmp_path / "diff.parquet"


def test_article_tables_also_tell_retractions_and_licences(diff):
    assert list(read_changes(diff)) == WANTED


def test_a_failed_read_is_no_removal_and_a_later_success_is_new(diff, tmp_path):
    back = [*NEW[:4], record(5), *NEW[5:]]
    write_articles(back, tmp_path / "later.parquet", snapshot="2026-03-18T01-00Z")
    facts = diff_tables(tmp_path / "new.parquet", tmp_path / "later.parquet", tmp_path / "d2.parquet")
    assert [(c.article_id, c.kind) for c in read_changes(tmp_path / "d2.parquet")] == [("PMC5.1", "new")]
    assert facts.counts["new"] == 1


def test_a_drop_of_an_articles_media_does_not_hide_its_record(tmp_path):
    media = Drop(source="pmc", item="PMC1.1/x.jpg", reason="unsafe_key", article_id="PMC1.1")
    write_articles([record(1), media], tmp_path / "old.parquet")
    write_articles([record(1)], tmp_path / "new.parquet")
    assert not any(diff_tables(tmp_path / "old.parquet", tmp_path / "new.parquet", tmp_path / "d").counts.values())


def test_the_same_two_tables_give_the_same_bytes(diff, tmp_path):
    again = tmp_path / "again.parquet"
    diff_tables(tmp_path / "old.parquet", tmp_path / "new.parquet", again)
    assert again.read_bytes() == diff.read_bytes()


def test_a_plan_for_a_diff_asks_for_what_differs_and_excludes_the_rest(diff, tmp_path):
    config = check_config({"licence": "commercial"}, PlanConfig, "test")
    assert changed_articles(diff) == [2, 3, 4, 5, 7, 8]
    make_plan(tmp_path / "new.parquet", tmp_path / "plan.parquet", config, only=changed_articles(diff))
    assert [r.article_id for r in read_plan(tmp_path / "plan.parquet")] == ["PMC2.1"]
    reasons = {d.article_id: d.reason for d in read_exclusions(tmp_path / "plan.parquet")}
    assert (reasons["PMC1.1"], reasons["PMC3.1"], reasons["PMC4.1"]) == ("not_asked_for", "no_licence", "retracted")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.integers(1, 6), st.tuples(st.sampled_from("ab"), st.sampled_from(["CC BY", None]),
                    st.booleans()), min_size=1),
    st.dictionaries(st.integers(1, 6), st.tuples(st.sampled_from("ab"), st.sampled_from(["CC BY", None]),
                    st.booleans()), min_size=1),
)  # fmt: skip
def test_a_diff_says_of_every_article_what_a_dictionary_says(tmp_path, before, after):
    def expected(number: int) -> str | None:
        old, new = before.get(number), after.get(number)
        if old == new:
            return None
        if new is None:
            return "removed"
        if new[2] and not (old and old[2]):
            return "retracted"
        return "new" if old is None else "licence_changed" if old[1] != new[1] else "changed"

    for name, side in (("old", before), ("new", after)):
        rows = [record(n, text=t, licence=c, is_retracted=r) for n, (t, c, r) in sorted(side.items())]
        write_articles(rows, tmp_path / f"{name}.parquet")
    diff_tables(tmp_path / "old.parquet", tmp_path / "new.parquet", tmp_path / "d")
    wanted = {n: expected(n) for n in range(1, 7) if expected(n)}
    assert {c.pmcid: c.kind for c in read_changes(tmp_path / "d")} == wanted


def test_sides_that_cannot_be_compared_are_refused(diff, tmp_path):
    inventory = write_inventory(tmp_path / "i.parquet", {"PMC1.1": "a"}, "2026-03-01T01-00Z")
    with pytest.raises(DataError, match="one is an inventory, the other an article table"):
        diff_tables(inventory, tmp_path / "new.parquet", tmp_path / "x")
    with pytest.raises(DataError, match=r"is younger than .*2026-02-18T01-00Z and 2026-01-18T01-00Z"):
        diff_tables(tmp_path / "new.parquet", tmp_path / "old.parquet", tmp_path / "x")
    with pytest.raises(DataError, match="there is no such file"):
        diff_tables(tmp_path / "no.parquet", tmp_path / "new.parquet", tmp_path / "x")
    with pytest.raises(DataError, match="is neither an inventory nor an article table"):
        diff_tables(diff, tmp_path / "new.parquet", tmp_path / "x")
    with pytest.raises(DataError, match="is no diff"):
        read_facts(tmp_path / "new.parquet")
    assert not (tmp_path / "x").exists()


def test_copies_of_the_bucket_are_compared_from_the_command_line(tmp_path):
    old = tmp_path / "old" / "metadata"
    old.mkdir(parents=True)
    for path in sorted((SAMPLE / "metadata").glob("*.json"))[2:]:
        facts = json.loads(path.read_text())
        (old / path.name).write_text(json.dumps(facts | {"is_retracted": False}))
    done = run_command("data", "diff", old.parent, SAMPLE, "--out", tmp_path / "d.parquet")
    assert done.returncode == 0, done.stderr
    assert "2 new" in done.stdout
    options = ("--set", "licence=all", "--only", tmp_path / "d.parquet")
    plan = run_command("data", "plan", SAMPLE, "--out", tmp_path / "p.parquet", *options)
    assert "not_asked_for" in plan.stdout, plan.stderr
