"""MetaCLIP's balancing: matches are those of its substring rule, probabilities those of its formula."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_shards import write_captions

from biomedclip.config import check_config
from biomedclip.errors import ConfigError, DataError
from biomedclip.shards import DatasetFolder
from biomedclip.stream.metaclip import (
    Entries,
    MetaclipConfig,
    count_entries,
    make_rule,
    most_of_tail,
    read_captions,
    read_entries,
    read_terms,
    write_entries,
)


def spaced(text: str) -> str:
    """MetaCLIP's own way: the text between blanks, some signs set apart, breaks made blanks."""
    text = f" {text} "
    for sign in ",.;:?!`":
        text = text.replace(sign, f" {sign} ")
    for sign in "\t\n\r":
        text = text.replace(sign, " ")
    return text


@pytest.mark.parametrize("lower", [True, False])
def test_matches_are_those_of_the_substring_rule(lower):
    draw = random.Random(0)
    words = ["lung", "Lung", "left lung", "lung mass", "left lung mass", "mass, large", "x-ray", "T2", "p < 0.05"]
    entries = Entries([*words, "(CT)", "lung", " ", "cancer. stage"], lower=lower)
    pieces = [" ", "  ", ",", ". ", "\n", "left ", "lung", "Lung ", "mass", "large", "x-ray", "T2", "p < 0.05", "(CT)",
              "cancer", "stage "]  # fmt: skip
    for _ in range(400):
        caption = "".join(draw.choices(pieces, k=draw.randint(0, 12)))
        wanted = {
            name for name in entries.names if f" {name} " in spaced(caption.lower() if lower else caption)
        }  # fmt: skip
        assert {entries.names[number] for number in entries.match(caption)} == wanted, caption


def test_the_probability_is_that_of_one_draw_for_each_entry(tmp_path):
    entries = Entries(["ct", "lung", "rare sign"])
    write_entries(tmp_path / "e.parquet", entries, np.array([1000, 400, 20]))
    names, counts, lower = read_entries(tmp_path / "e.parquet")
    assert (names, counts.tolist(), lower) == (["ct", "lung", "rare sign"], [1000, 400, 20], True)
    rule = make_rule(MetaclipConfig(entries=str(tmp_path / "e.parquet"), most=100))
    captions = ["CT of the lung .", "CT", "a rare sign in CT", "nothing known", ""]
    found = rule(captions)
    assert found.dtype == np.float32
    assert found == pytest.approx([1 - 0.9 * 0.75, 0.1, 1.0, 0.0, 0.0])
    generator = np.random.default_rng(0)
    drawn = ((generator.random((20_000, 2)) < [0.1, 0.25]).any(axis=1)).mean()
    assert drawn == pytest.approx(found[0], abs=0.01)


def test_the_limit_is_the_count_where_the_tail_reaches_its_share():
    counts = np.array([1, 1, 2, 6, 10, 80, 0])
    # By hand: from the rarest up the matches are 1, 2, 4, 10, 20, 100 of 100.
    assert [most_of_tail(counts, tail) for tail in (0.01, 0.04, 0.05, 0.1, 0.2, 0.21, 1.0)] == [1, 2, 6, 6, 10, 80, 80]


def test_a_rule_is_known_by_its_entries_counts_and_limit(tmp_path):
    for name, counts in (("a", [5, 3]), ("same", [5, 3]), ("b", [5, 4])):
        write_entries(tmp_path / f"{name}.parquet", Entries(["ct", "mr"]), np.array(counts))
    hashes = {
        (name, most): make_rule(MetaclipConfig(entries=str(tmp_path / f"{name}.parquet"), most=most)).sha256
        for name in ("a", "same", "b")
        for most in (1, 2)
    }
    assert len(set(hashes.values())) == 4
    assert hashes["a", 1] == hashes["same", 1]


@pytest.mark.parametrize(
    ("values", "match"),
    [({"entries": "e"}, "either most or tail"), ({"entries": "e", "most": 1, "tail": 0.5}, "either most or tail"),
     ({"entries": "e", "tail": 0}, "greater than 0"), ({"entries": "e", "most": 0}, "greater than or equal to 1")],
)  # fmt: skip
def test_a_wrong_config_is_refused(values, match):
    with pytest.raises(ConfigError, match=match):
        check_config(values, MetaclipConfig, "run.yaml")


def test_what_is_no_table_of_entries_is_named(tmp_path):
    (tmp_path / "text.parquet").write_text("ct\n")
    pq.write_table(pa.table({"entry": ["ct"]}), tmp_path / "other.parquet")
    for name, match in (("none", "no such"), ("text", "no table"), ("other", "no table")):
        with pytest.raises(DataError, match=rf"{name}.parquet: .*{match}.*biomedclip data entries"):
            make_rule(MetaclipConfig(entries=str(tmp_path / f"{name}.parquet"), most=1))
    write_entries(tmp_path / "zero.parquet", Entries(["ct"]), np.array([0]))
    with pytest.raises(ConfigError, match="has no entry"):
        make_rule(MetaclipConfig(entries=str(tmp_path / "zero.parquet"), most=1))


def test_terms_come_from_text_tables_and_articles(tmp_path):
    (tmp_path / "a.txt").write_text("lung\n\n ct scan \n")
    (tmp_path / "b.csv").write_text("count,ngram\n5,heart\n3,\n")
    (tmp_path / "c.tsv").write_text("term\tn\nliver\t2\n")
    pq.write_table(pa.table({"entry": ["kidney", None]}), tmp_path / "d.parquet")
    for name, terms in {"a.txt": ["lung", "ct scan"], "b.csv": ["heart"], "c.tsv": ["liver"],
                        "d.parquet": ["kidney"]}.items():  # fmt: skip
        assert read_terms(str(tmp_path / name)) == terms
    (tmp_path / "e.csv").write_text("word\nx\n")
    (tmp_path / "f.txt").write_text("\n")
    for name, match in (("e.csv", "no column"), ("f.txt", "no terms"), ("g.txt", "no such file")):
        with pytest.raises(ConfigError, match=match):
            read_terms(str(tmp_path / name))


@pytest.fixture
def dataset(tmp_path):
    return write_captions(
        tmp_path / "set", [f"CT of the lung {i}." if i % 4 else f"A rare sign {i}." for i in range(60)]
    )


def test_counting_writes_the_table_and_forecasts_what_is_kept(dataset, tmp_path):
    (tmp_path / "terms.txt").write_text("CT\nlung\nrare sign\nkidney\n")
    captions = list(read_captions(DatasetFolder(dataset)))
    found = count_entries([dataset], [str(tmp_path / "terms.txt")], tmp_path / "e.parquet", tail=0.1)
    names, counts, _ = read_entries(tmp_path / "e.parquet")
    said = dict(zip(names, counts.tolist(), strict=True))
    assert said == {"ct": sum("CT" in c for c in captions), "lung": sum("lung" in c for c in captions),
                    "rare sign": sum("rare" in c for c in captions), "kidney": 0}  # fmt: skip
    assert (found.entries, found.said, found.most) == (4, 3, said["rare sign"])
    rule = make_rule(MetaclipConfig(entries=str(tmp_path / "e.parquet"), tail=0.1))
    (forecast,) = found.forecasts
    assert forecast.captions == len(captions)
    assert forecast.kept == pytest.approx(float(rule(captions).mean()), abs=1e-6)
    assert forecast.unmatched == 0
    (tmp_path / "other.txt").write_text("kidney\n")
    with pytest.raises(ConfigError, match="no caption says"):
        count_entries([dataset], [str(tmp_path / "other.txt")], tmp_path / "f.parquet")
    with pytest.raises(DataError, match="no samples of split 'val'"):
        count_entries([dataset], [str(tmp_path / "terms.txt")], tmp_path / "f.parquet", split="val")


def test_a_run_keeps_samples_by_the_rule_and_its_plan_knows_it(dataset, tmp_path):
    from biomedclip.stream.decode import Geometry
    from biomedclip.stream.loader import Samples
    from biomedclip.training.config import DataConfig
    from biomedclip.training.data import stream_sources

    write_entries(tmp_path / "e.parquet", Entries(["ct", "rare sign"]), np.array([45, 15]))
    plans = {}
    for most in (None, 15, 5):
        keep = {"metaclip": {"entries": str(tmp_path / "e.parquet"), "most": most}} if most else None
        values = {
            "sources": [{"name": "a", "path": str(dataset), "keep": keep}],
            "fetch": {"cache": str(tmp_path / "cache")},
        }
        config = check_config(values, DataConfig, "run.yaml")
        samples = Samples(stream_sources(config), batch_size=4, seed=0, geometry=Geometry(size_px=8),
                          fetch=config.fetch, tokenise=lambda batch: None)  # fmt: skip
        plans[most] = samples.plan.sha256
        picks = [pick for step in range(60) for pick in samples.plan.batch(step)]
        rare = sum(pick.row % 4 == 0 for pick in picks) / len(picks)
        # Of 45 common and 15 rare captions an epoch keeps all; or a third of the common ones; or a ninth and a third.
        expected = {None: 15 / 60, 15: 15 / (15 + 15), 5: 5 / (5 + 5)}[most]
        assert rare == pytest.approx(expected, abs=0.08)
        samples.close()
    assert len(set(plans.values())) == 3
