"""What a model says about the rows of one task: embeddings in, raw scores out.

Reads image embeddings with their rows and an `Encoder`; yields the scores that scores.py stores: cosines per class,
label or option, or ranks in both directions. Nothing is measured here, so that validation during training and a whole
evaluation score the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from biomedclip.evaluation.answer_kinds import pool_slides, score_label_sets, score_option_sets
from biomedclip.evaluation.answer_scores import LabelScores
from biomedclip.evaluation.embed import embed_texts, fingerprint, logit_scale_of
from biomedclip.evaluation.retrieval import KS, caption_ids, rank_candidates, recall_all
from biomedclip.evaluation.scores import ClassScores, RankScores, Scores, statistics_of
from biomedclip.evaluation.tasks import Task
from biomedclip.evaluation.zero_shot import score_classes
from biomedclip.schema import LabelledImage

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Encoder:
    """A loaded model with what a result must say about it."""

    name: str
    model: torch.nn.Module
    preprocess: Callable[[Any], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]
    device: str

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights."""
        return fingerprint(self.model)

    @property
    def logit_scale(self) -> float:
        """Exponentiated; of the weights that the model carries now."""
        return logit_scale_of(self.model)


class Asked(Protocol):
    """A task with the prompts that are asked, of the prompt set of that name."""

    @property
    def task(self) -> Task:
        """The task."""

    @property
    def prompts(self) -> Mapping[str, Sequence[str]]:
        """{label: sentences}, empty where the task has none."""


def embed_prompts(prompts: Mapping[str, Sequence[str]], encoder: Encoder) -> list[NDArray[np.float32]]:
    """Embeddings (K_c, D) of each class's prompts, in class order; empty without prompts."""
    if not prompts:
        return []
    flat = [sentence for sentences in prompts.values() for sentence in sentences]
    vectors = embed_texts(encoder.model, encoder.tokenizer, flat, device=encoder.device)
    return np.split(vectors, np.cumsum([len(sentences) for sentences in prompts.values()])[:-1])


def score_options_of(
    plan: Asked, rows: Sequence[LabelledImage], images: NDArray[np.float32], encoder: Encoder
) -> Scores:
    """Cosines of every image with its own options."""
    return score_option_sets(plan.task, rows, images, encoder, group_ids(rows))


def score_zero_shot(
    plan: Asked, rows: Sequence[LabelledImage], images: NDArray[np.float32], encoder: Encoder
) -> ClassScores | LabelScores:
    """Cosines of every image with every class; of slides where the task pools patches.

    `plan` has a task, its prompts and, where it is not `default`, the prompt set.
    """
    if plan.task.labels == "multi":
        prompt_set = getattr(plan, "prompt_set", "default")
        return score_label_sets(plan.task, plan.prompts, prompt_set, rows, images, encoder, group_ids(rows))
    labels = list(plan.prompts)
    parts = embed_prompts(plan.prompts, encoder)
    scores = ClassScores(
        sample_ids=tuple(row.sample_id for row in rows),
        group_ids=group_ids(rows),
        classes=tuple(labels),
        y=np.asarray([labels.index(row.labels[0]) for row in rows], dtype=np.int64),
        cosines=score_classes(images, parts, plan.task.ensemble, encoder.logit_scale),
        logit_scale=encoder.logit_scale,
    )
    return pool_slides(scores, plan.task.pool) if plan.task.pool else scores


def score_retrieval(
    plan: Asked, rows: Sequence[LabelledImage], images: NDArray[np.float32], encoder: Encoder
) -> RankScores:
    """Ranks in both directions; captions that read the same are right answers to each other's images."""
    captions = [str(row.text) for row in rows]
    ids = caption_ids(captions)
    # Equal captions are embedded once: the same words in another batch may differ in the last bit, and then not tie.
    _, first = np.unique(ids, return_index=True)
    unique = [captions[position] for position in first]
    texts = embed_texts(encoder.model, encoder.tokenizer, unique, device=encoder.device)[ids]
    to_text = rank_candidates(images, texts, ids, ids)
    to_image = rank_candidates(texts, images, ids, ids)
    return RankScores(
        sample_ids=tuple(row.sample_id for row in rows),
        group_ids=group_ids(rows),
        caption_ids=ids,
        image_to_text=to_text.ranks,
        text_to_image=to_image.ranks,
        image_to_text_top=to_text.top,
        text_to_image_top=to_image.top,
        cosines=np.einsum("nd,nd->n", images, texts).astype(np.float32),
        logit_scale=encoder.logit_scale,
        **_full_recalls(images, texts, ids, to_text.ranks, to_image.ranks),
    )


def _full_recalls(
    images: NDArray[np.float32], texts: NDArray[np.float32], ids: NDArray[np.int64], to_text: NDArray[np.float64],
    to_image: NDArray[np.float64],
) -> dict[str, NDArray[np.float64]]:  # fmt: skip
    """Shares of all right answers, both ways; a query with one right answer has them from its rank already."""
    _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    many = np.flatnonzero(counts[inverse] > 1)
    found = {}
    for name, queries, candidates, ranks in (
        ("image_to_text_full", images, texts, to_text), ("text_to_image_full", texts, images, to_image),
    ):  # fmt: skip
        shares = (ranks[:, None] <= np.asarray(KS)).astype(np.float64)
        if many.size:
            shares[many] = recall_all(queries[many], candidates, ids[many], ids)
        found[name] = shares
    return found


def measure_strict(
    rows: Sequence[LabelledImage], images: NDArray[np.float32], encoder: Encoder, names: tuple[str, ...]
) -> dict[str, float]:
    """The same metrics where only a query's own partner is right: what a single-positive protocol reports."""
    captions = [str(row.text) for row in rows]
    unique = list(dict.fromkeys(captions))
    place = {caption: i for i, caption in enumerate(unique)}
    texts = embed_texts(encoder.model, encoder.tokenizer, unique, device=encoder.device)
    texts = texts[[place[caption] for caption in captions]]
    own = np.arange(len(rows))
    to_text, to_image = rank_candidates(images, texts, own, own), rank_candidates(texts, images, own, own)
    scores = RankScores(
        sample_ids=tuple(row.sample_id for row in rows), group_ids=None, caption_ids=own, image_to_text=to_text.ranks,
        text_to_image=to_image.ranks, image_to_text_top=to_text.top, text_to_image_top=to_image.top,
        cosines=np.zeros(len(rows), dtype=np.float32), logit_scale=encoder.logit_scale,
        **_full_recalls(images, texts, own, to_text.ranks, to_image.ranks),
    )  # fmt: skip
    return {name: float(statistic(None)) for name, statistic in statistics_of(scores, names).items()}


def group_ids(rows: Sequence[LabelledImage]) -> tuple[str, ...] | None:
    """Group of each row, its own id where it has none; None where no row has one."""
    if all(row.group_id is None for row in rows):
        return None
    return tuple(row.group_id if row.group_id is not None else f"sample:{row.sample_id}" for row in rows)
