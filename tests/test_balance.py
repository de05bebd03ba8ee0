"""Balance: each formula against its definition written out again, and what the stream makes of the stored weights."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from biomedclip.errors import DataError
from biomedclip.schema import Pair
from biomedclip.shards import DatasetFolder
from data_builders.build import BuildConfig, build
from data_builders.labels.balance import (
    balance_report,
    class_factors,
    count_classes,
    entropy_bits,
    expected_collisions,
    image_weights,
)
from data_builders.labels.recipe import Balance

LABELS = [("a",)] * 60 + [("b",)] * 30 + [("c",)] * 6 + [("b", "c")] * 3 + [()]


def single(**counts: int) -> list[tuple[str, ...]]:
    return [(label,) for label, count in counts.items() for _ in range(count)]


def pair(number: int, captions: tuple[str, ...], labels: tuple[str, ...] = ()) -> Pair:
    return Pair(
        key=f"k{number}", image=b"", image_format="png", width=1, height=1, caption=captions[0], captions=captions,
        source="s", licence="CC0", sha256=str(number), phash=0, labels=labels,
    )  # fmt: skip


def after(labels: list[tuple[str, ...]], **balance: Any) -> dict[str, float]:
    """Class counts of as many weighted draws as there are images."""
    return count_classes(labels, image_weights(labels, class_factors(labels, Balance(**balance))))


def test_uniform_gives_every_class_as_many_draws() -> None:
    assert after(single(a=90, b=9, c=1), mode="uniform") == pytest.approx({"a": 100 / 3, "b": 100 / 3, "c": 100 / 3})


def test_sqrt_gives_shares_by_the_root_of_the_count() -> None:
    found = after(single(a=81, b=16, c=4), mode="sqrt")
    assert [found[c] / found["c"] for c in "abc"] == pytest.approx([9 / 2, 4 / 2, 1])


@pytest.mark.parametrize("beta", [0.9, 0.999, 0.999999])
def test_effective_number_is_the_sum_of_a_geometric_series(beta: float) -> None:
    # Cui et al. 2019, proposition 1: E_n = (1 - beta^n) / (1 - beta) = sum of beta^i for i < n; weights go as 1 / E_n.
    counts = {"a": 500, "b": 40, "c": 3}
    effective = {c: math.fsum(beta**i for i in range(n)) for c, n in counts.items()}
    found = class_factors(single(**counts), Balance(mode="effective", beta=beta))
    assert [found[c] / found["a"] for c in counts] == pytest.approx([effective["a"] / effective[c] for c in counts])
    assert sum(n * found[c] for c, n in counts.items()) == pytest.approx(sum(counts.values()))


def test_repeat_factors_are_those_of_lvis_and_the_rarest_label_decides() -> None:
    factors = class_factors(LABELS, Balance(mode="repeat", threshold=0.25))
    share = {label: sum(label in said for said in LABELS) / len(LABELS) for label in "abc"}
    assert {c: factors[c] for c in "abc"} == pytest.approx({c: max(1, (0.25 / f) ** 0.5) for c, f in share.items()})
    assert factors["a"] == factors["b"] == 1 < factors["c"]
    assert dict(zip(LABELS, image_weights(LABELS, factors), strict=True))["b", "c"] == factors["c"]


def test_none_changes_nothing_and_a_cap_limits_what_a_class_counts_for() -> None:
    assert set(class_factors(LABELS, Balance()).values()) == {1.0}
    labels = single(a=90, b=9, c=1)
    factors = class_factors(labels, Balance(cap=10))
    assert {c: n * factors[c] for c, n in {"a": 90, "b": 9, "c": 1}.items()} == pytest.approx({"a": 10, "b": 9, "c": 1})
    both = class_factors(labels, Balance(mode="uniform", cap=20))
    assert both["c"] == pytest.approx(20)


@pytest.mark.parametrize("mode", ["none", "uniform", "sqrt", "effective", "repeat"])
def test_images_without_a_label_are_a_class_and_no_images_are_none(mode: Any) -> None:
    assert set(class_factors(LABELS, Balance(mode=mode))) == {"", "a", "b", "c"}
    assert class_factors([], Balance(mode=mode)) == {}


def test_collisions_are_what_counting_all_batches_gives() -> None:
    shares = [0.5, 0.3, 0.2]
    expected = sum(
        math.prod(shares[item] for item in batch) * sum(other == batch[0] for other in batch[1:])
        for batch in itertools.product(range(3), repeat=4)
    )
    assert expected_collisions(shares, 4) == pytest.approx(expected)


def test_entropy_is_in_bits() -> None:
    assert entropy_bits([0.25] * 4) == 2
    assert entropy_bits([1.0]) == 0
    assert entropy_bits([0.5, 0.25, 0.25]) == 1.5


def test_the_report_says_counts_entropy_and_collisions_before_and_after() -> None:
    pairs = [pair(n, ("one a", "two a"), ("a",)) for n in range(3)] + [pair(3, ("one b", "two b"), ("b",))]
    report = balance_report(pairs, Balance(mode="uniform"), batch_size=11)
    assert report["class_counts"] == {"before": {"a": 3, "b": 1}, "after": {"a": 2, "b": 2}}
    assert report["class_weights"]["b"] == pytest.approx(3 * report["class_weights"]["a"], rel=1e-5)
    assert report["caption_entropy_bits"]["after"] == pytest.approx(2)
    captions = Counter(caption for one in pairs for caption in one.captions)
    assert report["caption_entropy_bits"]["before"] == pytest.approx(
        -sum(n / 8 * math.log2(n / 8) for n in captions.values()), rel=1e-5
    )
    assert report["collisions"]["before"]["same_labels"] == pytest.approx(10 * (0.75**2 + 0.25**2))
    assert report["collisions"]["after"]["same_labels"] == pytest.approx(10 * 0.5)
    assert report["collisions"]["after"]["same_caption"] == pytest.approx(10 * 4 / 16)


# From the recipe to the batch


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled set of 24 `a`, 6 `b` and 2 `c`, balanced by the root."""
    root = tmp_path_factory.mktemp("skewed")
    random = np.random.default_rng(0)
    for label, count in {"a": 24, "b": 6, "c": 2}.items():
        (root / "images" / label).mkdir(parents=True)
        for number in range(count):
            picture = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / "images" / label / f"{number}.png")
    (root / "skewed.yaml").write_text(
        "{name: skewed, title: Skewed, modality: photograph, layout: {type: image_folder}, kind: single,\n"
        " classes: [{label: a, name: apple}, {label: b, name: pear}, {label: c, name: plum}],\n"
        " templates: {single: ['A photograph of {a_x}.']}, captions_per_image: 1, balance: {mode: sqrt},\n"
        " licence: {code: CC0, evidence: made up}, citation: nobody}\n"
    )
    source = {"kind": "labels", "root": str(root / "images"), "recipe": str(root / "skewed.yaml")}
    build(BuildConfig.model_validate({"name": "skewed", "licence": "all", "source": source}), root / "out")
    return root / "out"


def test_weights_of_the_recipe_reach_manifest_card_and_batch(skewed: Path) -> None:
    from biomedclip.stream.decode import Geometry
    from biomedclip.stream.loader import Samples, StreamSource

    balance = DatasetFolder(skewed).manifest["provenance"]["balance"]
    roots = {c: math.sqrt(n) for c, n in {"a": 24, "b": 6, "c": 2}.items()}
    expected = {c: 32 * root / sum(roots.values()) for c, root in roots.items()}
    assert balance["class_counts"]["after"] == pytest.approx(expected, rel=1e-5)
    card = (skewed / "README.md").read_text()
    assert f"| a | 24 | {balance['class_weights']['a']} | {expected['a']:,.0f} |" in card
    assert "bits of entropy before balancing" in card
    samples = Samples(
        [StreamSource(name="s", path=skewed, balance="weights")], batch_size=64, seed=0, geometry=Geometry(size_px=8),
        tokenise=lambda texts: torch.zeros(len(texts), 4, dtype=torch.int64),
    )  # fmt: skip
    drawn: Counter[str] = Counter()
    for step in range(64):
        for pick in samples.plan.batch(step):
            drawn[samples.label_names[samples.rows[pick.source].labels[pick.row][0]][-1]] += 1
    for label, count in expected.items():
        assert drawn[label] / 4096 == pytest.approx(count / 32, abs=2 / 4096)
    # Label ids travel with their images: soft targets are built from them.
    batch = samples[0]
    assert batch["labels"].shape == (64, 1)
    assert {samples.label_names[n] for n in batch["labels"][:, 0].tolist()} == {"s: a", "s: b", "s: c"}


def local_fetcher(folder: Path):
    """What `read_rows` asks for remote sources, of which these tests have none."""
    from biomedclip.stream.fetch import FetchConfig
    from biomedclip.stream.tars import FetcherHere

    return FetcherHere(FetchConfig(cache=str(folder / "cache")))


def test_a_set_without_weights_says_so(tmp_path: Path) -> None:
    from synthetic_shards import write_colours

    from biomedclip.stream.rows import StreamSource, read_rows

    folder = write_colours(tmp_path / "colours")
    with pytest.raises(DataError, match="was compiled without class weights"):
        read_rows([StreamSource(name="colours", path=folder, balance="weights")], 0.0, local_fetcher(tmp_path))


def test_the_size_exponent_mixes_sets_by_a_power_of_their_size(skewed: Path, tmp_path: Path) -> None:
    from synthetic_shards import write_colours

    from biomedclip.stream.rows import StreamSource, read_rows

    folder = write_colours(tmp_path / "colours")
    sources = [StreamSource(name="s", path=skewed), StreamSource(name="c", path=folder, weight=2)]
    fetcher = local_fetcher(tmp_path)
    sizes = [len(rows) for rows in read_rows(sources, 0.0, fetcher)[0]]
    for exponent in (0.0, 0.5, 1.0):
        first, second = (source.weight for source in read_rows(sources, exponent, fetcher)[1])
        assert second / first == pytest.approx(2 * (sizes[1] / sizes[0]) ** exponent)
