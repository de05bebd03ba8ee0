"""Rows of a mixture: `where`, caps and keep-probabilities over real indexes; read lazily, remembered, identified."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from foreign_tars import write_foreign
from mock_bucket import MockBucket
from synthetic_shards import COLOURS, colour_pair, encode, write_articles, write_colours

from biomedclip.errors import ConfigError, DataError
from biomedclip.schema import Article, Pair
from biomedclip.shards import DatasetFolder, DatasetWriter
from biomedclip.stream import columns as columns_module
from biomedclip.stream import selection as selection_module
from biomedclip.stream.fetch import FetchConfig
from biomedclip.stream.plan import Plan
from biomedclip.stream.rows import StreamSource, read_rows
from biomedclip.stream.tars import FetcherHere


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> Path:
    """24 figures of 6 articles in 4 shards, two licences, three modalities, concepts; the last shard is `val`."""
    folder = tmp_path_factory.mktemp("figures") / "set"
    data = encode(np.zeros((8, 8, 3), dtype=np.uint8), "PNG")
    with DatasetWriter(folder, name="figures", max_samples=6) as writer:
        for number in range(24):
            article = number // 4
            writer.add(
                Pair(
                    key=f"pmc{article}-{number % 4}", image=data, image_format="png", width=8 + number, height=8,
                    caption=f"Figure {number}.", source="pmc", licence="CC0" if article < 2 else "CC BY", phash=0,
                    sha256=hashlib.sha256(data).hexdigest(), article_id=f"PMC{article}.1", figure_id=str(number),
                    modality=("CT", "MRI", "figure")[number % 3], split="train" if number < 18 else "val",
                    concepts=("lung", "node") if number % 2 else ("lung",), labels=("odd",) if number % 2 else (),
                )
            )  # fmt: skip
        articles = [
            Article(article_id=f"PMC{n}.1", pmcid=n, version=1, title=f"Article {n}", licence="CC BY",
                    journal="Chest" if n % 2 else "Brain", published=f"{2018 + n}-01-01")
            for n in range(6)
        ]  # fmt: skip
        writer.finish(articles=articles, provenance={}, card=lambda manifest: "figures")
    return folder


@pytest.fixture
def fetcher(tmp_path):
    here = FetcherHere(FetchConfig(cache=str(tmp_path / "cache")))
    yield here
    here.close()


def keys(source: StreamSource, fetcher: FetcherHere) -> list[str]:
    rows, _, _ = read_rows([source], 0.0, fetcher)
    return [key for part in rows for key in part.columns["key"]]


def of(where: str, folder: Path, fetcher: FetcherHere) -> list[str]:
    return keys(StreamSource(name="figures", path=folder, where=where), fetcher)


def test_a_condition_chooses_rows_of_the_split_by_index_and_article(figures, fetcher):
    assert len(of("true", figures, fetcher)) == 18
    assert of("licence in ('CC0', 'CC BY') and modality = 'CT' and width < 20", figures, fetcher) == [
        "pmc0-0", "pmc0-3", "pmc1-2", "pmc2-1"
    ]  # fmt: skip
    assert of("article.journal = 'Chest' and article.published < '2021'", figures, fetcher) == [
        f"pmc1-{n}" for n in range(4)
    ]
    assert of("LICENCE = 'CC0' and 'node' in concepts", figures, fetcher) == ["pmc0-1", "pmc0-3", "pmc1-1", "pmc1-3"]
    assert of("row_number() over (partition by article_id order by key) = 1", figures, fetcher) == [
        f"pmc{n}-0" for n in range(5)
    ]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("licnce = 'CC0'", "data.sources: figures: where: there is no column licnce; did you mean licence?"),
        ("article.jornal = 'x'", "journal"),
        ("width >", "is no SQL condition"),
        ("random() < 0.5", "must give the same answer in every run"),
        ("key in (select key from read_parquet('/etc/passwd'))", "one condition"),
    ],
)
def test_a_condition_that_is_none_names_the_source_and_the_nearest_column(figures, fetcher, where, words):
    with pytest.raises(ConfigError) as caught:
        of(where, figures, fetcher)
    assert words in str(caught.value)


def test_a_condition_that_leaves_nothing_says_so(figures, fetcher):
    with pytest.raises(DataError, match=r"no samples left of split 'train' .*its where is true of none"):
        of("width > 9999", figures, fetcher)


def test_a_condition_works_on_foreign_tars_and_has_no_articles_there(tmp_path, fetcher):
    tars = [str(path) for path in write_foreign(tmp_path / "tars")]
    source = StreamSource(name="old", shards=tuple(tars), article_key="article", where="image_format = 'png'")
    found = keys(source, fetcher)
    assert found == [f"s{n:04d}" for n in range(24) if n % 3 == 1]
    with pytest.raises(ConfigError, match="there is no column article; did you mean article_id"):
        keys(StreamSource(name="old", shards=tuple(tars), where="article.journal = 'x'"), fetcher)


def test_a_remote_set_is_asked_the_same_with_its_articles(figures, fetcher):
    local = of("article.journal = 'Chest' and width > 12", figures, fetcher)
    with MockBucket(figures.parent) as bucket:
        source = StreamSource(
            name="far", path=f"{bucket.endpoint}/set", where="article.journal = 'Chest' and width > 12"
        )
        assert keys(source, fetcher) == local


def test_caps_hold_for_every_label_and_concept_and_take_turns(figures, fetcher):
    source = StreamSource(name="figures", path=figures, caps={"concept": 6, "label": 4})
    rows, sources, names = read_rows([source], 0.0, fetcher)
    assert names == ["figures: odd"]
    plan = Plan(sources, batch_size=2, seed=0)
    concepts = {row["key"]: row["concepts"] for row in DatasetFolder(figures).index.to_pylist()}
    used: Counter[str] = Counter()
    for epoch in range(9):
        chosen = [rows[0].columns["key"][row] for row in plan.members[0].rows(epoch)]
        counts = Counter(concept for key in chosen for concept in concepts[key])
        assert counts["lung"] <= 6
        assert counts["node"] <= 4
        assert len(chosen) == plan.members[0].before(1) >= 5
        used.update(chosen)
    assert len(used) == 18


def test_keep_probabilities_come_from_the_captions_once(figures, fetcher):
    class EvenOnly:
        sha256 = "even"
        asked = 0

        def __call__(self, captions):
            numbers = [int(caption.removeprefix("Figure ").removesuffix(".")) for caption in captions]
            self.asked += len(numbers)
            return np.array([float(number % 2 == 0) for number in numbers])

    rule = EvenOnly()
    source = StreamSource(name="figures", path=figures, keep=rule)
    for _ in range(2):
        rows, sources, _ = read_rows([source], 0.0, fetcher)
        plan = Plan(sources, batch_size=3, seed=0)
        kept = {rows[0].columns["key"][pick.row] for step in range(12) for pick in plan.batch(step)}
        assert kept == {f"pmc{n // 4}-{n % 4}" for n in range(0, 18, 2)}
    assert rule.asked == 18


def test_a_choice_is_remembered_where_it_is_worth_it(figures, fetcher, monkeypatch, tmp_path):
    monkeypatch.setattr(selection_module, "WORTH_KEEPING", 1)
    source = StreamSource(name="figures", path=figures, where="width > 9", caps={"concept": 6}, balance=True)
    first = read_rows([source], 0.0, fetcher)
    asked = []
    monkeypatch.setattr(selection_module, "_select", lambda *_: asked.append(1))
    renamed = StreamSource(name="other", path=figures, where="width > 9", caps={"concept": 6}, balance=True)
    again, other = read_rows([source], 0.0, fetcher), read_rows([renamed], 0.0, fetcher)
    assert not asked
    plans = [Plan(found[1], batch_size=4, seed=0) for found in (first, again, other)]
    assert plans[0].sha256 == plans[1].sha256 != plans[2].sha256
    assert [part.name for part in other[1]] == ["other/", "other/odd"]
    assert list(plans[0].batch(5)) == list(plans[1].batch(5))
    for path in (tmp_path / "cache" / "selection").iterdir():
        path.write_bytes(b"PK broken")
    monkeypatch.undo()
    assert Plan(read_rows([source], 0.0, fetcher)[1], batch_size=4, seed=0).sha256 == plans[0].sha256


def test_the_identity_of_a_plan_follows_what_is_read_not_where_it_lies(figures, fetcher, tmp_path):
    import shutil

    from data_builders.purge import purge, read_withdrawals

    copy = Path(shutil.copytree(figures, tmp_path / "copy"))

    def sha256(path: Path, **more) -> str:
        return Plan(
            read_rows([StreamSource(name="f", path=path, **more)], 0.0, fetcher)[1], batch_size=4, seed=0
        ).sha256

    whole = sha256(figures)
    assert sha256(copy) == whole
    others = [sha256(figures, where="true"), sha256(figures, split="val"), sha256(figures, caps={"concept": 3})]
    purge(copy, read_withdrawals("PMC1", reason="retracted"))
    assert len({whole, sha256(copy), *others}) == 5
    assert len(keys(StreamSource(name="f", path=copy), fetcher)) == 14


def test_indexes_are_read_shard_by_shard_and_only_when_needed(figures, fetcher, monkeypatch):
    rows, sources, _ = read_rows([StreamSource(name="f", path=figures)], 0.0, fetcher)
    read = []
    original = columns_module._read_parquet
    monkeypatch.setattr(columns_module, "_read_parquet", lambda part, c: read.append(part.shard) or original(part, c))
    monkeypatch.setattr(columns_module, "HELD_ROWS", 6)
    assert rows[0].columns["key"][7] == "pmc1-3"
    assert rows[0].columns["image_offset"][7] > 0
    assert read == ["00001.tar"]
    assert rows[0].articles[7] == rows[0].articles[4] != rows[0].articles[3]
    assert rows[0].labels[7] == (0,)
    assert len(rows[0].columns["shard"]) == 18
    plan = Plan(sources, batch_size=6, seed=1)
    assert sorted(rows[0].columns["key"][p.row] for s in range(3) for p in plan.batch(s)) == sorted(
        rows[0].columns["key"]
    )
    (figures / "00001.parquet").rename(figures / "away.parquet")
    try:
        with pytest.raises(DataError, match=r"00001\.parquet: cannot be read"):
            rows[0].columns["key"][7]
    finally:
        (figures / "away.parquet").rename(figures / "00001.parquet")


def test_labels_of_two_sources_are_told_apart(tmp_path, fetcher):
    write_colours(tmp_path / "colours")
    with DatasetWriter(tmp_path / "more", name="more") as writer:
        writer.add(colour_pair("red-0", "red", COLOURS["red"], "train", 0, 0, source="more"))
        writer.finish(provenance={}, card=lambda manifest: "more")
    write_articles(tmp_path / "articles")
    sources = [StreamSource(name=name, path=tmp_path / name) for name in ("colours", "more", "articles")]
    rows, _, names = read_rows(sources, 0.0, fetcher)
    assert names == ["colours: blue", "colours: green", "colours: red", "more: red"]
    assert [rows[1].labels[0], rows[2].labels[0]] == [(3,), ()]
    assert [part.most_labels for part in rows] == [1, 1, 0]
    assert rows[0].articles[0] == -1
