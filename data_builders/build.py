"""One build config to one dataset folder: a source's pairs, filtered, shuffled and written, each counted once.

Reads a `BuildConfig` (PMC articles or a labelled set: one YAML is one run) and yields a finished dataset folder, see
`biomedclip.shards`. The pairs of a source come article by article; shards in that order would put figures of one
article, which are each other's false negatives, into one batch, so all kept pairs are first spooled to an unnamed
temporary file in the output folder and then written in the order of a seeded hash of their keys. The bytes depend on
the config and the input alone: an interrupted build is simply run again and gives the same ones. A finished folder is
never touched: the same config over the same input is returned as it is, anything else is refused.
"""

from __future__ import annotations

import csv
import io
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import Field

import biomedclip
from biomedclip.config import Config
from biomedclip.errors import ConfigError, DataError
from biomedclip.files import TEMPORARY_PREFIX, sha256_json, write_text
from biomedclip.licences import is_allowed
from biomedclip.progress import Progress, silent
from biomedclip.schema import Article, Drop, Pair
from biomedclip.shards import DatasetWriter
from data_builders.card import dataset_card
from data_builders.claims import UNFINISHED, claim_folder, finished_dataset, hold_folder
from data_builders.filters import Filter, FilterConfig, apply_filters, make_filters
from data_builders.labels.leakage import LeakageConfig
from data_builders.order import shuffle_rank
from data_builders.pmc.pairs import PmcConfig

SAMPLE_SCHEME = "sample://"

NLM_NOTICE = (
    "Articles are from PubMed Central (PMC), courtesy of the U.S. National Library of Medicine (NLM). This is a "
    "snapshot{when}; it does not reflect the most current data available from NLM: articles may since have been "
    "corrected, retracted or removed. NLM has not endorsed this data set."
)
"""What the terms of the PMC Cloud Service ask of those who redistribute."""


class LabelsConfig(Config):
    """A labelled image set and the recipe that turns its labels into captions."""

    kind: Literal["labels"] = "labels"
    root: str
    """The set's folder or file; `sample://bccd` is one that comes with the project."""
    recipe: str
    """Name of a recipe of the project, or path of a recipe file."""
    splits: tuple[str, ...] | None = ("train",)
    """Splits of the set that become pairs; the others are left for evaluation and not even counted. None takes all."""
    leakage: LeakageConfig = LeakageConfig()
    batch_size: int = Field(default=256, ge=2)
    """The batch for which the card says how many captions and label sets are expected to collide."""


class ShardConfig(Config):
    """How large a shard may grow, whichever limit comes first."""

    max_samples: int = Field(default=10_000, ge=1)
    max_bytes: int = Field(default=500_000_000, ge=1)


class BuildConfig(Config):
    """One build."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    licence: Literal["commercial-derivatives", "commercial", "noncommercial", "all"]
    """The preset of `biomedclip.licences.PRESETS`; there is no default, because nobody should get one unasked."""
    source: Annotated[PmcConfig | LabelsConfig, Field(discriminator="kind")]
    filters: FilterConfig = FilterConfig()
    shards: ShardConfig = ShardConfig()
    shuffle_seed: int = 0
    max_drop_rate: float | None = Field(default=None, ge=0, le=1)
    """Fail where a larger share of what was seen is dropped; a guard against sources that changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """What a source says once all of its pairs have been seen."""

    drops: Mapping[str, Drop] = field(default_factory=dict)
    """Key -> why that pair must go all the same."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For the manifest's provenance."""
    reports: Mapping[str, Any] = field(default_factory=dict)
    """JSON files of the dataset folder, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildInput:
    """A source as `build` sees it, whatever its kind."""

    fingerprint: str
    """Hex sha256 of what the source promises; equal input, equal fingerprint, on any machine."""
    total: int
    """Steps that `items` reports to its argument."""
    items: Callable[[Callable[[], None]], Iterator[Article | Pair | Drop]]
    """The stream; calls its argument after each article or row."""
    review: Callable[[Sequence[Pair]], Review] | None = None
    """What only the whole set shows, asked of the pairs that would be kept, without their images."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest says of the input beside the fingerprint: notices, attribution."""


def build(config: BuildConfig, out: str | Path, *, workers: int = 1, progress: Progress = silent) -> dict[str, Any]:
    """The manifest of the dataset in `out`, built now unless it is there already.

    Raises ConfigError where `out` holds another dataset or other files, DataError where the source cannot be read,
    nothing is kept or more is dropped than `max_drop_rate`. Interrupted at any moment, it is run again and gives the
    same bytes.
    """
    out = Path(out)
    source = open_input(config, workers=workers)
    identity = {"config_sha256": config_sha256(config), "input_sha256": source.fingerprint}
    manifest = finished_dataset(out, identity)
    if manifest is not None:
        (out / UNFINISHED).unlink(missing_ok=True)
        return manifest
    claim_folder(out, identity)
    with (
        hold_folder(out),
        DatasetWriter(
            out, name=config.name, max_samples=config.shards.max_samples, max_bytes=config.shards.max_bytes
        ) as writer,
        tempfile.TemporaryFile(dir=out, prefix=TEMPORARY_PREFIX) as spool,
    ):
        collected = _collect(config, source, writer, spool, progress)
        review = _review(source, collected, writer)
        _check_yield(config, collected)
        with progress("writing shards", len(collected.kept)) as advance:
            for pair in _shuffled(collected.kept, spool, config.shuffle_seed):
                writer.add(pair)
                advance()
        manifest = writer.finish(
            articles=collected.articles,
            provenance=_provenance(config, identity, source, collected) | dict(review.facts),
            reports=review.reports,
            card=lambda facts: dataset_card(facts, collected.articles, collected.kept_articles),
        )
    (out / UNFINISHED).unlink()
    return manifest


def is_built(config: BuildConfig, out: str | Path) -> bool:
    """Whether `out` holds what `build` would return at once. Raises ConfigError where it holds another dataset."""
    identity = {"config_sha256": config_sha256(config), "input_sha256": open_input(config).fingerprint}
    return finished_dataset(Path(out), identity) is not None


def write_names(config: BuildConfig, path: str | Path) -> int:
    """Write key, sample id and group of every image and dropped file of a labelled set as csv; returns their number.

    It undoes what the hashes in the dataset folder hide, and so belongs to whoever holds the images. Raises ConfigError
    for a source that has no such names.
    """
    from data_builders.labels import compile as labels
    from data_builders.labels.recipe import load_recipe

    if not isinstance(config.source, LabelsConfig):
        raise ConfigError("source.kind", "has no names to write", found=config.source.kind)
    recipe = load_recipe(config.source.recipe)
    rows = list(labels.key_names(recipe, labels.read_labelled_set(recipe, resolve_root(config.source.root))))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("key", "sample_id", "group"), *rows])
    write_text(path, text.getvalue())
    return len(rows)


def config_sha256(config: BuildConfig) -> str:
    """Hex sha256 of the resolved config."""
    return sha256_json(config.model_dump(mode="json"))


def resolve_root(root: str) -> Path:
    """The path of a source; `sample://NAME` is in the sample data that comes with the project."""
    if not root.startswith(SAMPLE_SCHEME):
        return Path(root).expanduser()
    sample = Path(str(resources.files("data_builders"))) / "sample"
    path = sample / root.removeprefix(SAMPLE_SCHEME)
    if ".." in path.parts or not path.exists():
        known = ", ".join(f"{SAMPLE_SCHEME}{p.name}" for p in sorted(sample.iterdir()) if p.is_dir())
        raise ConfigError(root, "is not in the sample data", todo=f"use one of {known}")
    return path


def open_input(config: BuildConfig, *, workers: int = 1) -> BuildInput:
    """The source of a config, ready to be read. Raises DataError where it is missing or empty.

    `workers` processes read a labelled set; PMC articles are read by this one.
    """
    if isinstance(config.source, PmcConfig):
        return _open_pmc(config.source, config.licence)
    return _open_labels(config.source, workers, config.filters.drop_duplicates)


def _open_pmc(config: PmcConfig, preset: str) -> BuildInput:
    from data_builders.pmc.catalog import LocalBucket, choose_versions, fingerprint
    from data_builders.pmc.pairs import article_pairs

    bucket = LocalBucket(resolve_root(config.root))
    digest, count = fingerprint(bucket)
    side_files = config.side_files()
    if side_files:
        digest = sha256_json({"articles": digest, **side_files})

    def items(advance: Callable[[], None]) -> Iterator[Article | Pair | Drop]:
        for record in choose_versions(bucket.records()):
            if isinstance(record, Drop):
                yield record
            else:
                yield from article_pairs(record, bucket, config, preset=preset)
            advance()

    notice = NLM_NOTICE.format(when=f" of {config.snapshot}" if config.snapshot else "")
    return BuildInput(fingerprint=digest, total=count, items=items, facts={"notices": [notice]})


def _open_labels(config: LabelsConfig, workers: int, drop_duplicates: bool) -> BuildInput:
    from data_builders.labels import compile as labels
    from data_builders.labels import leakage
    from data_builders.labels.balance import balance_report
    from data_builders.labels.recipe import load_recipe

    recipe = load_recipe(config.recipe)
    manifest = labels.read_labelled_set(recipe, resolve_root(config.root))
    leakage.refuse_crossing_groups(config.leakage, manifest)
    pixels = leakage.needs_pixels(config.leakage, manifest)

    def items(advance: Callable[[], None]) -> Iterator[Article | Pair | Drop]:
        for item in labels.compile_pairs(recipe, manifest, splits=config.splits, pixels=pixels, workers=workers):
            yield item
            advance()

    def review(pairs: Sequence[Pair]) -> Review:
        gate = leakage.check_leaks(
            recipe, manifest, pairs, config.leakage, drop_duplicates=drop_duplicates, workers=workers
        )
        training = [pair for pair in pairs if pair.split == "train" and pair.key not in gate.drops]
        balance = balance_report(training, recipe.balance, config.batch_size) if training else None
        return Review(
            drops=gate.drops,
            facts={"balance": balance, "leakage": {key: gate.report[key] for key in gate.report if key != "matches"}},
            reports={leakage.REPORT: gate.report},
        )

    total = len(manifest.drops) + len(labels.chosen_rows(manifest, config.splits))
    digest = labels.fingerprint_set(recipe, manifest)
    if config.leakage.against:
        digest = sha256_json([digest, leakage.fingerprint_sets(config.leakage)])
    return BuildInput(fingerprint=digest, total=total, items=items, review=review, facts=labels.describe_set(recipe))


@dataclass(slots=True)
class _Collected:
    """What one pass over a source left: pairs without their image bytes, which wait in the spool."""

    kept: list[tuple[Pair, int, int]] = field(default_factory=list)
    """Pair, offset and size of its image."""
    articles: list[Article] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def kept_articles(self) -> Counter[str]:
        """Article id -> number of pairs."""
        return Counter(pair.article_id for pair, _, _ in self.kept if pair.article_id)


def _collect(
    config: BuildConfig, source: BuildInput, writer: DatasetWriter, spool: BinaryIO, progress: Progress
) -> _Collected:
    """Read the source once: drops go to the writer's ledger, images to the spool, the rest to memory."""
    # A source that reviews its pairs drops duplicates there: dropped one by one, they would hide what they contradict.
    rules = config.filters if source.review is None else config.filters.model_copy(update={"drop_duplicates": False})
    collected, filters = _Collected(), make_filters(rules)
    with progress("reading articles" if config.source.kind == "pmc" else "reading images", source.total) as advance:
        for item in source.items(lambda: advance(1, f"{len(collected.kept)} kept")):
            if isinstance(item, Article):
                collected.articles.append(item)
                continue
            verdict = _judge(item, config.licence, filters)
            if isinstance(verdict, Drop):
                writer.add(verdict)
                collected.dropped[verdict.reason] += 1
            else:
                collected.kept.append((replace(verdict, image=b""), spool.tell(), len(verdict.image)))
                spool.write(verdict.image)
    return collected


def _review(source: BuildInput, collected: _Collected, writer: DatasetWriter) -> Review:
    """The source's review, its drops taken out of what was collected."""
    if source.review is None:
        return Review()
    review = source.review([pair for pair, _, _ in collected.kept])
    for drop in review.drops.values():
        writer.add(drop)
        collected.dropped[drop.reason] += 1
    collected.kept = [entry for entry in collected.kept if entry[0].key not in review.drops]
    return review


def _judge(item: Pair | Drop, preset: str, filters: tuple[Filter, ...]) -> Pair | Drop:
    if isinstance(item, Drop):
        return item
    if not is_allowed(item.licence, preset):
        # Sources refuse earlier where that saves work; this line is what makes the preset hold for all of them.
        return Drop(source=item.source, item=item.figure_id or item.key, reason="licence_not_allowed",
                    detail=f"{item.licence} under {preset}", article_id=item.article_id)  # fmt: skip
    return apply_filters(item, filters)


def _shuffled(kept: list[tuple[Pair, int, int]], spool: BinaryIO, seed: int) -> Iterator[Pair]:
    """The pairs with their images, in the order of `shuffle_rank`."""
    for pair, offset, size in sorted(kept, key=lambda entry: shuffle_rank(entry[0].key, seed)):
        spool.seek(offset)
        yield replace(pair, image=spool.read(size))


def _check_yield(config: BuildConfig, collected: _Collected) -> None:
    dropped, kept = sum(collected.dropped.values()), len(collected.kept)
    reasons = ", ".join(f"{reason} {count}" for reason, count in collected.dropped.most_common(5)) or "nothing seen"
    if not kept:
        raise DataError(config.source.root, f"none of {dropped} figures or images can be kept", found=reasons,
                        todo="check the licence preset, the filters and the source")  # fmt: skip
    rate = dropped / (dropped + kept)
    if config.max_drop_rate is not None and rate > config.max_drop_rate:
        raise DataError(config.source.root, f"{rate:.1%} is dropped, max_drop_rate allows {config.max_drop_rate:.1%}",
                        found=reasons, todo="check the source or raise max_drop_rate")  # fmt: skip


def _provenance(
    config: BuildConfig, identity: Mapping[str, str], source: BuildInput, collected: _Collected
) -> dict[str, Any]:
    provenance: dict[str, Any] = {
        "biomedclip": biomedclip.__version__,
        "config": config.model_dump(mode="json"),
        **identity,
        **source.facts,
    }
    if config.source.kind == "pmc":
        provenance["articles"] = {"read": len(collected.articles), "kept": len(collected.kept_articles)}
    return provenance
