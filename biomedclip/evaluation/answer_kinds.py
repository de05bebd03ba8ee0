"""What a model says where an image has several labels, options of its own, or is one patch of a slide.

Reads a task with its rows and image embeddings; yields the scores that `answer_scores.py` and `scores.py` keep. The
checks of rows are here too, since what is a wrong row depends on the kind of answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.errors import DataError
from biomedclip.evaluation.answer_scores import LabelScores, OptionScores
from biomedclip.evaluation.embed import embed_texts
from biomedclip.evaluation.multilabel import read_labels
from biomedclip.evaluation.prompts import compile_negatives
from biomedclip.evaluation.scores import ClassScores
from biomedclip.evaluation.tasks import Task
from biomedclip.evaluation.zero_shot import pool_patches, score_labels, score_options
from biomedclip.schema import LabelledImage

if TYPE_CHECKING:
    from biomedclip.evaluation.scoring import Encoder

Vectors = NDArray[np.float32]


def check_label_sets(task: Task, rows: Sequence[LabelledImage], root: str) -> None:
    """Raise DataError for a label that is no class of a task of several labels, or where no row has any."""
    known = {entry.label for entry in task.classes}
    for row in rows:
        if unknown := sorted(set(row.labels) - known):
            raise DataError(f"{root}: {row.sample_id}", "has labels that are no class of the task",
                            found=", ".join(unknown), todo=f"known: {', '.join(sorted(known))}")  # fmt: skip
    if not any(row.labels for row in rows):
        raise DataError(root, f"split '{task.split}' has no image with a label", todo="check the table's label columns")


def read_options(row: LabelledImage, root: str) -> tuple[list[str], int]:
    """Options of a row and the place of its answer. Raises DataError where the answer is not one of them."""
    text = row.attributes.get("options", "")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(one, str) and one for one in found):
        raise DataError(f"{root}: {row.sample_id}", "needs two or more options as a JSON list", found=text[:60])
    if found.count(row.text or "") != 1:
        raise DataError(f"{root}: {row.sample_id}", "its answer must be one of its options", found=repr(row.text))
    return found, found.index(row.text)


def score_label_sets(
    task: Task, prompts: Mapping[str, Sequence[str]], prompt_set: str, rows: Sequence[LabelledImage], images: Vectors,
    encoder: Encoder, groups: tuple[str, ...] | None,
) -> LabelScores:  # fmt: skip
    """Cosine with the positive less cosine with the negative prompts, each label by itself."""
    negatives = compile_negatives(task, prompt_set)
    labels = tuple(prompts)
    sides = [
        [embed_texts(encoder.model, encoder.tokenizer, side[label], device=encoder.device) for label in labels]
        for side in (prompts, negatives)
    ]
    truth = read_labels(
        [row.labels for row in rows], [row.negatives for row in rows], [row.uncertain for row in rows], labels,
        closed=task.closed,
    )  # fmt: skip
    return LabelScores(
        sample_ids=tuple(row.sample_id for row in rows), group_ids=groups, labels=labels, truth=truth,
        cosines=score_labels(images, *sides), logit_scale=encoder.logit_scale,
    )  # fmt: skip


def score_option_sets(
    task: Task, rows: Sequence[LabelledImage], images: Vectors, encoder: Encoder, groups: tuple[str, ...] | None
) -> OptionScores:
    """Cosine of each image with each of its own options; equal options are embedded once, so that they tie."""
    asked = [read_options(row, task.name) for row in rows]
    flat = [option for options, _ in asked for option in options]
    unique = list(dict.fromkeys(flat))
    place = {option: i for i, option in enumerate(unique)}
    vectors = embed_texts(encoder.model, encoder.tokenizer, unique, device=encoder.device)
    sizes = np.asarray([len(options) for options, _ in asked], dtype=np.int64)
    return OptionScores(
        sample_ids=tuple(row.sample_id for row in rows), group_ids=groups,
        answer_texts=tuple(options[answer] for options, answer in asked),
        sets=tuple(str(row.attributes.get("dataset", task.name)) for row in rows), sizes=sizes,
        answers=np.asarray([answer for _, answer in asked], dtype=np.int64),
        cosines=score_options(images, vectors[[place[option] for option in flat]], sizes.tolist()),
        logit_scale=encoder.logit_scale,
    )  # fmt: skip


def pool_slides(scores: ClassScores, top: int) -> ClassScores:
    """One row a slide. Raises DataError for patches without a slide, or a slide with two labels."""
    if scores.group_ids is None:
        raise DataError("slides", "patches name no slide", todo="say the group column in the task's layout")
    label: dict[str, Any] = {}
    for slide, y in zip(scores.group_ids, scores.y.tolist(), strict=True):
        if label.setdefault(slide, y) != y:
            raise DataError(f"slide {slide}", "has patches with different labels")
    names, pooled = pool_patches(scores.cosines, scores.group_ids, top)
    y = np.asarray([label[name] for name in names], dtype=np.int64)
    return replace(scores, sample_ids=names, group_ids=None, y=y, cosines=pooled)
