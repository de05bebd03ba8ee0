"""How often the images of each class should be used, and what that does to a batch: arithmetic over label counts.

Reads the labels of the pairs that will be trained on and yields one factor a class; the weight of an image is the
largest factor of its labels, so that a rare finding lifts the images it occurs in (Gupta et al. 2019). Nothing is
copied or left out: the factors stand in the dataset's manifest, and a training source with `balance: weights` deals its
slots by them, so the same shards serve any balance. The report says what changes: class counts, the entropy of the
captions, and how many others of a batch are expected to have one's own labels or caption, which a contrastive loss
takes for negatives.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from biomedclip.schema import Pair
from data_builders.labels.recipe import Balance

NO_LABEL = ""
"""Class of the images without a positive label, which are a class of their own here."""

Labels = tuple[str, ...]


def class_factors(labels: Sequence[Labels], balance: Balance) -> dict[str, float]:
    """Class -> factor by which its images are used more or less often than others; empty for no images.

    `uniform` 1/n, `sqrt` 1/sqrt(n) and `effective` (1 - beta) / (1 - beta^n) (Cui et al. 2019, eq. 2) are scaled so
    that the counts keep their sum; `repeat` is max(1, sqrt(threshold / f)) for a class in the share f of all images
    (Gupta et al. 2019, section 4.1). `cap` then limits n times the factor.
    """
    counts = count_classes(labels)
    if balance.mode == "repeat":
        factors = {c: max(1.0, math.sqrt(balance.threshold * len(labels) / n)) for c, n in counts.items()}
    else:
        raw = {c: _raw_factor(n, balance) for c, n in counts.items()}
        scale = sum(counts.values()) / sum(n * raw[c] for c, n in counts.items()) if counts else 1.0
        factors = {c: scale * value for c, value in raw.items()}
    if balance.cap is not None:
        factors = {c: min(factors[c], balance.cap / n) for c, n in counts.items()}
    return factors


def image_weights(labels: Iterable[Labels], factors: Mapping[str, float]) -> list[float]:
    """The weight of each image: the largest factor of its labels."""
    return [max(factors[label] for label in of_image or (NO_LABEL,)) for of_image in labels]


def count_classes(labels: Sequence[Labels], weights: Sequence[float] | None = None) -> dict[str, float]:
    """Class -> number of images, sorted by class; with `weights` the number expected in as many weighted draws."""
    share = len(labels) / sum(weights) if weights else 1.0
    counts: defaultdict[str, float] = defaultdict(float)
    for number, of_image in enumerate(labels):
        for label in of_image or (NO_LABEL,):
            counts[label] += weights[number] * share if weights else 1
    return dict(sorted(counts.items()))


def entropy_bits(shares: Iterable[float]) -> float:
    """-sum p log2 p of shares that sum to one."""
    return -sum(p * math.log2(p) for p in shares if p > 0) + 0.0


def expected_collisions(shares: Iterable[float], batch_size: int) -> float:
    """(B - 1) sum p²: how many others of a batch of B independent draws are expected to equal a drawn one."""
    return (batch_size - 1) * sum(p * p for p in shares)


def balance_report(pairs: Sequence[Pair], balance: Balance, batch_size: int) -> dict[str, Any]:
    """The factors of a set and what they change, as JSON: what manifest, card and command show."""
    labels = [tuple(pair.labels) for pair in pairs]
    factors = {c: _rounded(value) for c, value in class_factors(labels, balance).items()}
    weights = image_weights(labels, factors)
    even = [1.0] * len(labels)
    settings = {"effective": {"beta": balance.beta}, "repeat": {"threshold": balance.threshold}}.get(balance.mode, {})
    return {
        "mode": balance.mode, **settings, **({"cap": balance.cap} if balance.cap is not None else {}),
        "batch_size": batch_size,
        "class_weights": factors,
        "class_counts": {
            "before": {c: int(n) for c, n in count_classes(labels).items()},
            "after": {c: _rounded(n) for c, n in count_classes(labels, weights).items()},
        },
        "caption_entropy_bits": {name: _rounded(entropy_bits(_caption_shares(pairs, of_each)))
                                 for name, of_each in (("before", even), ("after", weights))},
        "collisions": {
            name: {
                "same_labels": _rounded(expected_collisions(_shares(labels, of_each), batch_size)),
                "same_caption": _rounded(expected_collisions(_caption_shares(pairs, of_each), batch_size)),
            }
            for name, of_each in (("before", even), ("after", weights))
        },
    }  # fmt: skip


def _raw_factor(count: float, balance: Balance) -> float:
    if balance.mode == "uniform":
        return 1 / count
    if balance.mode == "sqrt":
        return 1 / math.sqrt(count)
    if balance.mode == "effective":
        # expm1: beta^n is so near to one for few images that the difference would lose its digits.
        return (1 - balance.beta) / -math.expm1(count * math.log(balance.beta))
    return 1.0


def _shares(items: Iterable[Hashable], weights: Sequence[float]) -> list[float]:
    """The share of the weight that falls on each distinct item."""
    totals: defaultdict[Hashable, float] = defaultdict(float)
    for item, weight in zip(items, weights, strict=True):
        totals[item] += weight
    whole = math.fsum(weights)
    return [value / whole for value in totals.values()]


def _caption_shares(pairs: Sequence[Pair], weights: Sequence[float]) -> list[float]:
    """The share of each sentence where an image is drawn by weight and one of its captions evenly."""
    captions = [pair.captions or (pair.caption,) for pair in pairs]
    spread = [weight / len(said) for weight, said in zip(weights, captions, strict=True) for _ in said]
    return _shares((caption for said in captions for caption in said), spread)


def _rounded(value: float) -> float:
    """Six significant digits: what a reader needs, and the same on every machine."""
    return float(f"{value:.6g}")
