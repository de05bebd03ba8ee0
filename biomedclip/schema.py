"""The types that cross rooms: Article and Figure become Pair, the neck; everything after reads shards.

Both builders end in a stream of `Pair | Drop`: every figure or image seen is one or the other, which is what makes
`seen == kept + sum(dropped by reason)` hold by construction. The index columns are listed here as plain names and
types, so that readers need neither a builder nor a particular table library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

KEY_PATTERN = re.compile(r"[a-z0-9_-]{1,80}")
"""A sample key. A dot would end the key in every WebDataset reader and silently lose the sample."""

IMAGE_FORMATS = ("jpg", "png", "webp")
"""Encodings a shard stores; every other input is re-encoded losslessly to png before it becomes a Pair."""

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Article:
    """One version of one article. `article_id` is `PMC<id>.<version>` as in the PMC Cloud Service."""

    article_id: str
    pmcid: int
    version: int
    title: str
    licence: str | None
    """Normalised code such as `CC BY` or `CC0`; None where nothing states one (such an article is dropped)."""
    licence_url: str | None = None
    pmid: int | None = None
    doi: str | None = None
    journal: str | None = None
    publisher: str | None = None
    published: str | None = None
    """ISO date, as precise as the article states it: 2024, 2024-03 or 2024-03-01."""
    citation: str | None = None
    authors: tuple[str, ...] = ()
    article_type: str | None = None
    language: str | None = None
    keywords: tuple[str, ...] = ()
    mesh: tuple[str, ...] = ()
    is_retracted: bool = False
    is_manuscript: bool = False
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mention:
    """A sentence or paragraph of the body that cites a figure; `panels` are the letters it names (`Fig 2A` -> A)."""

    text: str
    section: str | None = None
    panels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One graphic of one `fig` element, its text verbatim from JATS."""

    article_id: str
    figure_id: str
    ordinal: int
    """Position among the article's figures, from 0."""
    label: str | None
    """The article's own name for it: `Figure 2`."""
    caption: str
    graphic: str | None
    """The `xlink:href` as written; None where the figure names no graphic."""
    panel_index: int = 0
    panel_count: int = 1
    """More than one where a `fig` holds several graphics that share the caption."""
    group_id: str | None = None
    group_caption: str | None = None
    language: str | None = None
    mentions: tuple[Mention, ...] = ()
    licence: str | None = None
    """Only where the figure carries permissions of its own."""
    third_party: bool = False
    """The caption or the figure's permissions speak of somebody else's rights."""
    flags: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    """Further hrefs of the same picture in other encodings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """An image and its caption, our unit of data: both builders end here and everything after starts here."""

    key: str
    image: bytes
    image_format: str
    """One of IMAGE_FORMATS; the original bytes where they already are one of these."""
    width: int
    height: int
    caption: str
    source: str
    """Where the pair comes from: `pmc`, or the name of the labelled set."""
    licence: str
    """Normalised code of the strictest licence that applies to image or caption."""
    sha256: str
    """Of the image bytes."""
    phash: int
    """64-bit perceptual hash (biomedclip.images)."""
    split: Split = "train"
    captions: tuple[str, ...] = ()
    """All captions where there are several; `captions[0] == caption`. Empty means just `caption`."""
    article_id: str | None = None
    figure_id: str | None = None
    panel: str | None = None
    modality: str | None = None
    labels: tuple[str, ...] = ()
    """Class names that hold for the image (labelled sets)."""
    label_ids: tuple[int, ...] = ()
    group_id: str | None = None
    """Patient, slide, field or augmentation group: samples of one group never cross splits."""
    concepts: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    sidecar: Mapping[str, Any] = field(default_factory=dict)
    """What else a reader of the .json member may want: label text, mentions. Never facts of the whole article."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """A figure or image that did not become a pair, and the reason, which is the ledger's counter key."""

    source: str
    item: str
    """Figure id or file: enough to find it again."""
    reason: str
    """One word from `[a-z0-9_]+`, such as `no_caption`."""
    detail: str = ""
    article_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRef:
    """Where one picture of a labelled set is: a file, and the part of it where a file holds many."""

    path: str
    """Relative to the manifest's root, with forward slashes."""
    part: str | None = None
    """Row of an array, frame of a DICOM, member of a tar, as `<scheme>:<what>` (`biomedclip.layouts.READERS`); None for
    a whole file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledImage:
    """One row of a Manifest: a picture and what is known about it, whatever the layout it came from."""

    sample_id: str
    """Unique in the manifest and equal on every machine: from split, path and part, never from an absolute path."""
    image: ImageRef
    labels: tuple[str, ...] = ()
    """Class names that hold. Exactly one for single-label and ordinal sets; empty for captioned sets."""
    negatives: tuple[str, ...] = ()
    """Class names stated not to hold (multi-label sets with explicit zeros)."""
    uncertain: tuple[str, ...] = ()
    """Class names stated to be uncertain."""
    split: str | None = None
    group_id: str | None = None
    """Patient, slide, field, article or augmentation group: the unit that bootstrap and splits keep together."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """Further columns: view, stain, sex, caption text, given split."""
    text: str | None = None
    """A caption, for retrieval sets."""


LabelKind = Literal["single", "multi", "ordinal", "caption"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A labelled data set as one table: every layout turns into it, and everything after ignores layouts.

    `biomedclip.layouts.read_manifest` makes it; `biomedclip.layouts.read_bytes` and `read_rgb` fetch a row's picture.
    """

    name: str
    root: str
    kind: LabelKind
    classes: tuple[str, ...]
    """Class names in label-id order."""
    rows: tuple[LabelledImage, ...]
    drops: tuple[Drop, ...] = ()
    """Rows or files that were seen and cannot be used, each with its reason."""
    sha256: str = ""
    """Of the rows as JSON, without the root: equal data, equal hash, on any machine."""


INDEX_COLUMNS: dict[str, str] = {
    "key": "string",
    "shard": "string",
    "image_offset": "int64",
    "image_size": "int64",
    "image_format": "string",
    "image_crc32": "uint32",
    "text_offset": "int64",
    "text_size": "int64",
    "json_offset": "int64",
    "json_size": "int64",
    "sha256": "string",
    "phash": "uint64",
    "width": "int32",
    "height": "int32",
    "caption_sha1": "string",
    "caption_chars": "int32",
    "caption_tokens": "int32",
    "num_captions": "int32",
    "source": "string",
    "article_id": "string",
    "figure_id": "string",
    "panel": "string",
    "modality": "string",
    "licence": "string",
    "licence_class": "string",
    "split": "string",
    "labels": "list<string>",
    "label_ids": "list<int32>",
    "group_id": "string",
    "concepts": "list<string>",
    "dup_cluster": "int64",
    "flags": "list<string>",
}
"""Columns of `NNNNN.parquet`, in order: one row a sample, beside its shard. Offsets are into the tar, of the member's
bytes (not its header). `caption_tokens` counts CLIP byte-pair tokens without the two special ones."""

LEDGER_COLUMNS: dict[str, str] = {
    "source": "string",
    "article_id": "string",
    "item": "string",
    "status": "string",
    "reason": "string",
    "detail": "string",
    "key": "string",
}
"""Columns of `ledger.parquet`: one row for each figure or image seen; status is `kept` or `dropped`."""

TOMBSTONE_COLUMNS: dict[str, str] = {
    "key": "string",
    "article_id": "string",
    "reason": "string",
    "stated": "string",
}
"""Columns of `tombstones.parquet`: one row for each sample taken back and reason; `stated` is the day of the source
that said so. A key may have several reasons."""

ANNOTATION_COLUMNS: dict[str, str] = {
    "key": "string",
    "cluster": "string",
    "label": "string",
    "secondary": "string",
    "keep": "bool",
    "distance": "float32",
}
"""Columns of `annotations.parquet`: one row for each sample that was clustered; a label is null where experts gave its
cluster none. `distance` is from the middle of the cluster: the larger, the less the label may be trusted."""
