"""The dataset card: front matter that parses, splits that name their tars, credit for every article, hostile titles."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from biomedclip.schema import Article
from data_builders.card import MAX_ATTRIBUTION_ROWS, dataset_card, hub_licence

MANIFEST: dict[str, Any] = {
    "name": "small",
    "samples": 3,
    "splits": {"train": 2, "test": 1},
    "ledger": {"seen": 5, "kept": 3, "dropped": {"broken_image": 1, "no_caption": 1}},
    "licences": {"CC BY": 2, "CC0": 1},
    "sources": {"pmc": 3},
    "shards": [
        {"name": "00000.tar", "split": "train", "samples": 1, "bytes": 10_240},
        {"name": "00001.tar", "split": "test", "samples": 1, "bytes": 10_240},
        {"name": "00002.tar", "split": "train", "samples": 1, "bytes": 10_240},
    ],
    "provenance": {
        "config": {"licence": "commercial"}, "config_sha256": "c0ffee", "input_sha256": "decaf",
        "notices": ["Courtesy of NLM."],
    },
}  # fmt: skip
ARTICLES = (
    Article(article_id="PMC2.1", pmcid=2, version=1, title="Second", licence="CC0", doi="10.1/b"),
    Article(
        article_id="PMC1.1", pmcid=1, version=1, title="A | title\nwith <script>", licence="CC BY", doi="10.1/a",
        authors=("Ann Author", "B"), licence_url="http://creativecommons.org/licenses/by/3.0/",
    ),
    Article(article_id="PMC3.1", pmcid=3, version=1, title="Nothing kept", licence="CC BY"),
)  # fmt: skip
KEPT = {"PMC1.1": 2, "PMC2.1": 1}


def front_matter(card: str) -> dict[str, Any]:
    _, text, _ = card.split("---\n", 2)
    return dict(yaml.safe_load(text))


def test_the_front_matter_names_the_tars_of_each_split_and_the_licences_by_the_hubs_words() -> None:
    facts = front_matter(dataset_card(MANIFEST, ARTICLES, KEPT))
    assert facts["configs"] == [
        {
            "config_name": "default",
            "data_files": [
                {"split": "train", "path": ["00000.tar", "00002.tar"]}, {"split": "test", "path": ["00001.tar"]},
            ],
        }
    ]  # fmt: skip
    assert facts["license"] == ["cc-by-3.0", "cc0-1.0"]
    assert facts["size_categories"] == ["n<1K"]


def test_the_validation_split_has_the_hubs_name() -> None:
    shards = [{"name": "00000.tar", "split": "val", "samples": 3, "bytes": 10_240}]
    facts = front_matter(dataset_card(MANIFEST | {"shards": shards}))
    assert facts["configs"][0]["data_files"] == [{"split": "validation", "path": ["00000.tar"]}]


@pytest.mark.parametrize(
    ("code", "url", "word"),
    [
        ("CC0", None, "cc0-1.0"),
        ("CC BY", "https://creativecommons.org/licenses/by/4.0/", "cc-by-4.0"),
        ("CC BY", "http://creativecommons.org/licenses/by/2.0", "cc-by-2.0"),
        ("CC BY", None, "cc"),
        ("CC BY", "https://creativecommons.org/licenses/by-nc/4.0/", "cc"),
        ("CC BY-NC-ND", "https://creativecommons.org/licenses/by-nc-nd/4.0/", "cc-by-nc-nd-4.0"),
        ("CC BY", "https://creativecommons.org/licenses/by/9.9/", "cc"),
        ("MIT", None, "mit"),
        ("Elsevier user licence", None, "other"),
    ],
)
def test_a_licence_version_is_stated_only_where_its_url_states_it(code: str, url: str | None, word: str) -> None:
    assert hub_licence(code, url) == word


def test_counts_funnel_notices_and_the_clinical_line_are_there() -> None:
    card = dataset_card(MANIFEST, ARTICLES, KEPT)
    assert "not for clinical use" in card
    assert "Courtesy of NLM." in card
    assert "| seen | 5 |" in card
    assert "| kept | 3 | 60.0% |" in card
    assert "| dropped: no_caption | 1 | 20.0% |" in card
    assert "| train | 2 | 2 | 0.0 |" in card
    assert "| CC BY | 2 |" in card
    assert "`commercial`" in card
    assert "`c0ffee`" in card


def test_every_article_that_gave_a_sample_is_credited_and_no_other() -> None:
    card = dataset_card(MANIFEST, ARTICLES, KEPT)
    rows = [line for line in card.splitlines() if line.startswith("| PMC")]
    assert [row.split(" | ")[0] for row in rows] == ["| PMC1.1", "| PMC2.1"]
    assert "https://doi.org/10.1/a" in rows[0]
    assert rows[0].endswith("| 2 |")
    assert "Ann Author" in rows[0]
    assert "Nothing kept" not in card


def test_a_title_cannot_break_the_table_or_add_markup() -> None:
    card = dataset_card(MANIFEST, ARTICLES, KEPT)
    assert "A \\| title with &lt;script&gt;" in card
    assert "<script>" not in card


def test_labelled_sets_are_credited_from_the_provenance() -> None:
    attribution = [{"name": "BCCD", "citation": "Shenggan", "licence": "MIT", "url": "https://example.org"}]
    manifest = MANIFEST | {"licences": {"MIT": 3}, "provenance": {"attribution": attribution}}
    card = dataset_card(manifest)
    assert front_matter(card)["license"] == ["mit"]
    assert "| BCCD | Shenggan | MIT | https://example.org |" in card


def test_a_very_long_attribution_ends_with_where_the_rest_is() -> None:
    many = [
        Article(article_id=f"PMC{i}.1", pmcid=i, version=1, title="T", licence="CC BY")
        for i in range(1, MAX_ATTRIBUTION_ROWS + 3)
    ]
    card = dataset_card(MANIFEST, many, {article.article_id: 1 for article in many})
    assert len([line for line in card.splitlines() if line.startswith("| PMC")]) == MAX_ATTRIBUTION_ROWS
    assert "2 more articles are in `articles.parquet`." in card


def test_the_same_facts_give_the_same_card() -> None:
    assert dataset_card(MANIFEST, ARTICLES, KEPT) == dataset_card(MANIFEST, reversed(ARTICLES), KEPT)
