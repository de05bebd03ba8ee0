"""Select: every rule on pairs made for it, one reason a pair, and the same answer whatever the order of the folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from synthetic_shards import encode, write_colours
from synthetic_units import article, articles, pair, smooth, write_raw

from biomedclip.config import check_config, read_overrides
from biomedclip.errors import ConfigError, DataError
from data_builders.contamination import write_hashes
from data_builders.filters import apply_filters
from data_builders.select import select
from data_builders.selection import REASONS, SELECTION_COLUMNS, SelectConfig, describe_selection, read_selection
from data_builders.units import PAIR_COLUMNS, pair_rows, unit_name, write_unit


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    return write_raw(folder, articles(range(1, 4)), [], articles([4, 5]))


def picture(width: int, height: int) -> bytes:
    return encode(smooth(np.random.default_rng(0), (width, height)), "PNG")


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pq.read_table(path).to_pylist()}


def choose(raws: Path | Sequence[Path], out: Path, **config: Any) -> dict[str, dict[str, Any]]:
    folders = [raws] if isinstance(raws, Path) else raws
    select(folders, out / "s.parquet", check_config(config, SelectConfig, "test"))
    return rows_of(out / "s.parquet")


def reasons(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {key: row["reason"] for key, row in rows.items() if row["reason"] is not None}


def test_everything_is_selected_and_keeps_its_columns(raw: Path, tmp_path: Path) -> None:
    facts = select([raw], tmp_path / "s.parquet", SelectConfig())
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.column_names == list(SELECTION_COLUMNS)
    assert (facts.seen, facts.selected, facts.reasons, facts.splits) == (20, 20, {}, {"train": 20})
    assert table.select(list(PAIR_COLUMNS)).equals(pair_rows(raw))
    assert table["raw"].to_pylist() == [0] * 20
    assert read_selection(tmp_path / "s.parquet") == facts
    assert describe_selection(facts).splitlines() == ["20 pairs seen, 20 selected", "         20 in train"]


def test_the_same_input_gives_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        select([raw], tmp_path / f"{name}.parquet", SelectConfig(where="width > 10"))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # reason: config, what is changed in the pair, what is changed in its article
    "excluded_article": ({"exclude_articles": "LIST"}, {}, {}),
    "where": ({"where": "article.journal <> 'Nature'"}, {}, {"journal": "Nature"}),
    "licence_not_allowed": ({"licence": "commercial"}, {"licence": "CC BY-NC"}, {}),
    "other_language": ({"languages": ["en", "de"]}, {}, {"language": "fr-CA"}),
    "image_too_small": ({"filters": {"min_side_px": 48}}, {"image": picture(47, 47)}, {}),
    "image_too_elongated": ({"filters": {"max_aspect": 3}}, {"image": picture(200, 50)}, {}),
    "caption_too_short": ({"filters": {"min_caption_words": 4}}, {"caption": "Chest X-ray today"}, {}),
    "caption_too_long": ({"captions": {"max_words": 30}}, {"caption": "many different words " * 11}, {}),
    "caption_boilerplate": ({}, {"caption": "Figure S2b. See main text for details."}, {}),
    "caption_not_text": ({}, {"caption": "12.5 ± 0.3 mmHg (n = 33), 14.1 ± 0.2, p = 0.013"}, {}),
    "caption_repetitive": ({}, {"caption": "Scale bar is 20 µm. " * 6}, {}),
    "no_date": ({"split_by_time": {"test_from": "2030"}}, {}, {"published": None}),
}  # fmt: skip


@pytest.mark.parametrize("reason", CASES)
def test_a_rule_refuses_the_pair_that_is_made_for_it_and_no_other(reason: str, tmp_path: Path) -> None:
    config, of_pair, of_article = CASES[reason]
    if config.get("exclude_articles"):
        (tmp_path / "list.txt").write_text("# held out\n\nPMC777  # the one\n10.1/999\n")
        config = {"exclude_articles": str(tmp_path / "list.txt")}
    odd = [article(777, **of_article), pair(777, 0, **of_pair)]
    raw = write_raw(tmp_path / "raw", [*articles(range(1, 3)), *odd])
    assert reasons(choose(raw, tmp_path, **config)) == {"pmc-777-v1-f0-p0": reason}


def test_the_first_rule_that_applies_is_the_reason(tmp_path: Path) -> None:
    image = picture(40, 10)
    raw = write_raw(tmp_path / "raw", [article(1, language="fr"), pair(1, 0, image=image, caption="Figure 1")])
    every = {
        "where": "false", "languages": ["en"], "filters": {"min_side_px": 20, "max_aspect": 2, "min_caption_words": 5},
    }  # fmt: skip
    removed = [
        ({}, "where"), ({"where": "true"}, "other_language"), ({"languages": None}, "image_too_small"),
        ({"filters": {"max_aspect": 2, "min_caption_words": 5}}, "image_too_elongated"),
        ({"filters": {"min_caption_words": 5}}, "caption_too_short"), ({"filters": {}}, "caption_boilerplate"),
        ({"captions": {"boilerplate": False}}, None),
    ]  # fmt: skip
    for change, reason in removed:
        every |= change
        assert [row["reason"] for row in choose(raw, tmp_path, **every).values()] == [reason]


def test_columns_and_pairs_are_judged_alike(raw: Path, tmp_path: Path) -> None:
    from data_builders.caption_quality import CaptionConfig, make_caption_rules
    from data_builders.filters import RuleConfig, make_rules, refuse_rows
    from data_builders.units import pair_of_row

    rules = (
        *make_rules(RuleConfig(min_side_px=49, max_aspect=1.2, min_caption_words=20, min_caption_chars=90)),
        *make_caption_rules(CaptionConfig(max_words=12, min_letter_share=0.8, max_repeated_share=0.01)),
    )
    table = pair_rows(raw)
    for chosen in (rules, rules[2:], rules[4:], rules[::-1]):
        codes = refuse_rows(table, chosen)
        one_by_one = [apply_filters(pair_of_row(row, b""), chosen) for row in table.to_pylist()]
        expected = [getattr(verdict, "reason", None) if hasattr(verdict, "item") else None for verdict in one_by_one]
        assert [chosen[code - 1].reason if code else None for code in codes] == expected
        assert any(expected)


def test_the_predicate_sees_window_functions_lists_and_nulls(raw: Path, tmp_path: Path) -> None:
    two = choose(raw, tmp_path, where="row_number() over (partition by article_id order by figure_id) <= 2")
    assert sum(row["reason"] is None for row in two.values()) == 10
    assert len(reasons(choose(raw, tmp_path, where="modality = 'ct'"))) == 20
    assert not reasons(choose(raw, tmp_path, where="modality is null and len(flags) = 0"))
    assert not reasons(choose(raw, tmp_path, where="json_extract_string(sidecar, '$.label') like 'Figure %'"))


@pytest.mark.parametrize(
    ("predicate", "message"),
    [
        ("widht > 3", "there is no column widht; did you mean width\\?"),
        ("width >", "is no SQL condition"),
        ("true; drop table pairs", "is no SQL condition"),
        ("true) from x --", "is no SQL condition"),
        ("key in (select key from read_parquet('/etc/passwd'))", "must be one condition over the columns"),
        ("exists(from read_text('/etc/passwd'))", "must be one condition over the columns"),
        ("read_text('/etc/passwd') is not null", "table function"),
        ("columns(*) is null", "must be one condition over the columns"),
        ("random() < 0.5", "must give the same answer in every run; sample with hash"),
        ("published > current_date", "must give the same answer in every run"),
        ("count(*) > 3", "GROUP BY"),
        ("key", "Could not convert string"),
        ("error('x')", "same answer"),
        ("", "is empty"),
    ],
)
def test_a_bad_predicate_is_one_clear_line(raw: Path, tmp_path: Path, predicate: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        choose(raw, tmp_path, where=predicate)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s.parquet").exists()


def test_a_predicate_can_open_nothing(tmp_path: Path) -> None:
    from biomedclip.predicates import _connect

    (tmp_path / "a.csv").write_text("a\n1\n")
    for statement in (f"FROM '{tmp_path}/a.csv'", f"COPY (SELECT 1) TO '{tmp_path}/b.csv'", "INSTALL httpfs",
                      f"ATTACH '{tmp_path}/c.db'", "SET enable_external_access = true", "SET threads = 4"):  # fmt: skip
        with pytest.raises(Exception, match=r"disabled|locked|lock"), _connect() as connection:
            connection.execute(statement)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv"]


def test_splits_by_time_take_the_first_day_of_a_coarse_date(tmp_path: Path) -> None:
    dates = ["2023", "2023-12-31", "2024", "2024-06", "2024-07", "2024-07-02", "2025-01"]
    items = [x for n, date in enumerate(dates, 1) for x in (article(n, published=date), pair(n, 0))]
    labelled = pair(99, 0, article_id=None, key="set-1", split="val", source="set")
    raw = write_raw(tmp_path / "raw", [*items, labelled])
    rows = choose(raw, tmp_path, split_by_time={"val_from": "2024", "test_from": "2024-07"})
    assert [row["split"] for row in rows.values()] == ["train"] * 2 + ["val"] * 2 + ["test"] * 3 + ["val"]
    for wrong in ({"val_from": "2024", "test_from": "2023"}, {}, {"test_from": "2024-13"}, {"test_from": "soon"}):
        with pytest.raises(ConfigError, match=r"val_from|test_from"):
            check_config({"split_by_time": wrong}, SelectConfig, "x")


def test_duplicates_over_folders_keep_one_whatever_the_order_of_the_folders(tmp_path: Path) -> None:
    shared = pair(1, 0).image
    better = pair(8, 0, image=shared, licence="CC0")
    a = write_raw(tmp_path / "a", [article(1), pair(1, 0, licence="CC BY-NC"), pair(1, 1)])
    b = write_raw(tmp_path / "b", [article(8), better, pair(8, 1)])
    kept = {}
    for order in ([a, b], [b, a]):
        rows = choose(order, tmp_path)
        assert reasons(rows) == {"pmc-1-v1-f0-p0": "duplicate_image"}
        assert rows["pmc-1-v1-f0-p0"]["dup_cluster"] == rows["pmc-8-v1-f0-p0"]["dup_cluster"] is not None
        assert rows["pmc-1-v1-f1-p0"]["dup_cluster"] is None
        kept[order[0]] = {key: (row["reason"], row["dup_cluster"]) for key, row in rows.items()}
    assert kept[a] == kept[b]
    assert read_selection(tmp_path / "s.parquet").clusters == 1


def test_a_row_that_is_left_out_never_stands_for_its_duplicates(tmp_path: Path) -> None:
    shared = pair(1, 0).image
    raw = write_raw(tmp_path / "raw", [article(1), pair(1, 0, licence="CC0", caption="Figure 1"),
                                       pair(1, 1, image=shared)])  # fmt: skip
    assert reasons(choose(raw, tmp_path)) == {"pmc-1-v1-f0-p0": "caption_boilerplate"}


def test_a_key_that_two_folders_have_is_taken_once(raw: Path, tmp_path: Path) -> None:
    copy = write_raw(tmp_path / "copy", articles([5, 6]))
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist() if choose([raw, copy], tmp_path) else []
    assert [row["reason"] for row in rows].count("duplicate_key") == 4
    chosen = [row["key"] for row in rows if row["reason"] is None]
    assert len(chosen) == len(set(chosen)) == 24


def test_pictures_of_evaluation_sets_are_dropped_or_flagged_and_counted(raw: Path, tmp_path: Path) -> None:
    colours = write_colours(tmp_path / "colours", per_class=1)
    write_hashes(colours, tmp_path / "colours.parquet")
    mine = pair_rows(raw).to_pylist()[3]
    (tmp_path / "exam.csv").write_text(f"set,sample,phash\nexam,q7,{mine['phash'] ^ 0b11}\n")
    config = {"against": [str(tmp_path / "colours.parquet"), str(tmp_path / "exam.csv")]}
    rows = choose(raw, tmp_path, **config)
    assert reasons(rows) == {mine["key"]: "contaminated"}
    assert rows[mine["key"]]["matches"] == ["exam: q7 (phash)"]
    assert read_selection(tmp_path / "s.parquet").contamination == {"exam": {"pairs": 1, "samples": 1, "phash": 1}}
    flagged = choose(raw, tmp_path, contaminated="flag", **config)
    assert not reasons(flagged)
    assert [key for key, row in flagged.items() if "contaminated" in row["flags"]] == [mine["key"]]
    assert not reasons(choose(raw, tmp_path, against_distance=1, **config))


def test_what_is_not_there_or_damaged_is_one_line(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        choose(tmp_path / "none", tmp_path)
    with pytest.raises(ConfigError, match="cannot be read as a list of articles"):
        choose(raw, tmp_path, exclude_articles=str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match="no such hash file"):
        choose(raw, tmp_path, against=[str(tmp_path / "none.parquet")])
    with pytest.raises(DataError, match="there is no such file"):
        read_selection(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(DataError, match="is no selection"):
        read_selection(tmp_path / "text.parquet")
    with pytest.raises(DataError, match="is no selection"):
        read_selection(raw / "unit-000000.pairs.parquet")
    with pytest.raises(ConfigError, match="did you mean 'where'"):
        read_overrides(["were=1"], SelectConfig)


def test_an_unfinished_harvest_is_refused_unless_asked_for(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", articles([1]))
    (raw / "harvest.json").write_text(
        '{"plan_sha256": "ab", "config_sha256": "cd", "units": 2, "config": {"licence": "all", "languages": ["en"]}}'
    )
    with pytest.raises(DataError, match=r"lacks units of its plan \(found 2, such as .*allow_unfinished"):
        choose(raw, tmp_path)
    assert len(choose(raw, tmp_path, allow_unfinished=True)) == 4
    assert read_selection(tmp_path / "s.parquet").raws[0].facts == {"licence": "all", "languages": ["en"]}


def test_units_without_pairs_and_deltas_are_read_too(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", [article(1)], [article(2), pair(2, 0)])
    write_unit(raw, unit_name(0, 1), [article(1), pair(1, 0)], identity={})
    rows = choose(raw, tmp_path)
    assert [(row["unit"], row["reason"]) for row in rows.values()] == [("unit-000000-r01", None), ("unit-000001", None)]
    empty = write_raw(tmp_path / "empty", [article(3)])
    assert choose(empty, tmp_path) == {}
    assert choose(empty, tmp_path, where="width > 1", dedup={"captions": "near"}) == {}


def test_reasons_are_words_and_come_once() -> None:
    assert len(set(REASONS)) == len(REASONS)
    assert set(CASES) <= set(REASONS)
