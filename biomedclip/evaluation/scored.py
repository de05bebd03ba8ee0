"""A task as it was scored, with the means to embed more of it: what the sections beyond accuracy are made from.

Reads the scored rows of a task with their embeddings and scores; yields features of its other splits, and the parts
that whatever is learnt or chosen may see: never rows of a group that is also in the scored split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.errors import DataError
from biomedclip.evaluation.adapters.features import Features, Selection
from biomedclip.evaluation.config import EvaluateConfig
from biomedclip.evaluation.scores import ClassScores, Scores
from biomedclip.evaluation.tasks import Task
from biomedclip.schema import LabelledImage, Manifest

if TYPE_CHECKING:
    from biomedclip.evaluation.embed import ImageEmbeddings
    from biomedclip.evaluation.scoring import Encoder

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A task as it was scored, with the means to embed more."""

    task: Task
    manifest: Manifest
    rows: Sequence[LabelledImage]
    images: Vectors
    scores: Scores
    sentences: Mapping[str, Sequence[str]]
    """{label: prompts}"""
    embed_prompts: Callable[[], Sequence[Vectors]]
    """Embeds the sentences once, when they are first asked for."""
    encoder: Encoder
    embed: Callable[..., ImageEmbeddings]
    """`embed(manifest, read=None, fresh=False)`; `fresh` where the model carries other weights for a while."""
    embed_texts: Callable[[Sequence[str]], Vectors]
    score: Callable[[Sequence[LabelledImage], Vectors], Scores]
    """Scores of rows with their embeddings, prompts embedded anew."""
    read_split: Callable[[str], Manifest]
    """The manifest of another split of the task's data."""
    outside: Callable[[str], Vectors]
    """Embeddings of the scored images of another task of the run."""
    start_weights: Callable[[], Mapping[str, Any]]
    """Weights of the model before training, for the points between."""

    @property
    def logit_scale(self) -> float:
        """Exponentiated."""
        return self.scores.logit_scale

    @property
    def prompts(self) -> Sequence[Vectors]:
        """Embeddings of each class's prompts; empty where the task has none."""
        return self.embed_prompts()

    @property
    def class_scores(self) -> ClassScores:
        """The scores of a task of one class an image. Raises DataError for another kind."""
        if not isinstance(self.scores, ClassScores):
            raise DataError(self.task.name, "has no one class an image")
        return self.scores

    def embed_split(self, split: str) -> tuple[list[LabelledImage], Vectors]:
        """Rows of another split, less those whose group is also scored, and their embeddings.

        Near-copies of a scored image (its patient, slide or duplicate) may lie in the set's own training split. Raises
        DataError for the split that is scored, and where nothing is left.
        """
        if split == self.task.split:
            raise DataError(self.task.name, f"split '{split}' is the one that is scored: nothing is learnt on it")
        manifest = self.read_split(split)
        embedded = self.embed(manifest)
        rows = {row.sample_id: row for row in manifest.rows}
        scored = {row.group_id for row in self.rows if row.group_id}
        places = [i for i, name in enumerate(embedded.sample_ids) if rows[name].group_id not in scored]
        if not places:
            raise DataError(self.task.name, f"every group of split '{split}' is also in the one that is scored")
        return [rows[embedded.sample_ids[i]] for i in places], embedded.vectors[places]

    def features(self, split: str) -> Features:
        """Labelled embeddings of another split."""
        rows, vectors = self.embed_split(split)
        return self.as_features(rows, vectors, split)

    def as_features(self, rows: Sequence[LabelledImage], vectors: Vectors, split: str) -> Features:
        """Rows with one label each as features; rows without a group are groups of their own."""
        label = {entry.label: c for c, entry in enumerate(self.task.classes)}
        groups = None
        if any(row.group_id for row in rows):
            groups = tuple(row.group_id or f"sample:{row.sample_id}" for row in rows)
        y = np.asarray([label[row.labels[0]] for row in rows], dtype=np.int64)
        return Features(vectors=vectors, y=y, num_classes=len(label), split=split, groups=groups)

    def has_split(self, split: str) -> bool:
        """Whether the data has the split, as it should be: many copies of sets come without their validation part."""
        try:
            self.read_split(split)
        except DataError:
            return False
        return True

    def test_features(self) -> Features:
        """The scored images."""
        scores = self.class_scores
        return Features(vectors=self.images, y=scores.y, num_classes=len(scores.classes), split=self.task.split,
                        groups=scores.group_ids)  # fmt: skip

    def selection(self, config: EvaluateConfig) -> Selection:
        """Where hyper-parameters are chosen: the selection split, or folds, or the scored one where it is allowed."""
        held = None
        chosen_on = self.task.select_split
        if chosen_on not in (None, "train") and self.has_split(str(chosen_on)):
            held = self.features(str(chosen_on))
        if config.allow_test_selection and held is None:
            held = self.test_features()
        return Selection(features=held, scored_split=self.task.split, allow_test=config.allow_test_selection,
                         seed=config.seed)  # fmt: skip
