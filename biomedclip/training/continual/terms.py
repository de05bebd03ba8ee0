"""From the config's sections to the terms of a step: which formula, on which tensors, with which weight.

Reads a ContinualConfig and what a run has at hand (its starting weights, tokenizer, image size); yields the `Continual`
that the training module takes. A term keeps nothing that a resumed run could not find again: the teacher, the anchors
of L2-SP and EWC and the texts of VR-LwF come from the run's starting weights, its seed and its folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from biomedclip.training.config import TrainConfig
from biomedclip.training.continual.config import (
    ContinualConfig,
    EwcConfig,
    ReferenceConfig,
    StoredConfig,
    VocabularyConfig,
)
from biomedclip.training.continual.distil import (
    Pairs,
    anchor_loss,
    ctp_loss,
    feature_loss,
    lwf_loss,
    modx_loss,
    reinforced_loss,
    similarity_loss,
)
from biomedclip.training.continual.reference import ReferenceImages, fisher_batches
from biomedclip.training.continual.stored import StoredEmbeddings
from biomedclip.training.continual.teacher import FrozenTeacher
from biomedclip.training.continual.vocabulary import random_sentences
from biomedclip.training.continual.weights import ewc, l2_sp, load_anchors, load_fisher, trained_parameters
from biomedclip.training.data import StreamData
from biomedclip.training.gather import gather_rows
from biomedclip.training.terms import Continual, StepTensors, Term


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the terms of a run may need beside their own sections."""

    config: TrainConfig
    folder: Path
    """The run folder; `start/` in it holds the starting weights."""
    model: nn.Module
    tokenizer: Any
    """open_clip's."""
    data: StreamData


@dataclass(slots=True, kw_only=True)
class FormulaTerm:
    """A term given by a function of the step."""

    name: str
    weight: float
    formula: Callable[[StepTensors], Tensor]
    needs_teacher: bool = True

    def __call__(self, step: StepTensors) -> Tensor:
        """The term's value, not yet weighted."""
        return self.formula(step)


def build_continual(
    config: TrainConfig, *, folder: Path, model: nn.Module, tokenizer: Any, data: StreamData
) -> Continual:
    """The terms that the config asks for, and the teacher where one of them needs it.

    Raises ConfigError or DataError where reference sources or stored embeddings are not what the run needs; the
    teacher itself is loaded at the first step.
    """
    settings = config.continual or ContinualConfig()
    around = Surroundings(config=config, folder=folder, model=model, tokenizer=tokenizer, data=data)
    name = folder / "start" if settings.teacher == "start" else settings.teacher
    teacher = FrozenTeacher.load(name, model, precision=settings.teacher_precision)
    terms: list[Term] = [*_batch_terms(settings, teacher), *_weight_terms(settings, around)]
    if settings.vr_lwf:
        terms.append(VocabularyTerm(settings.vr_lwf, teacher, around))
    if settings.zscl:
        terms.append(ReferenceTerm(settings.zscl, teacher, around))
    if settings.stored:
        terms.append(_stored_term(settings.stored, data))
    return Continual(terms=tuple(terms), teacher=teacher if any(term.needs_teacher for term in terms) else None)


def _stored_term(settings: StoredConfig, data: StreamData) -> FormulaTerm:
    """MobileCLIP's distillation from embeddings that lie beside the shards."""
    samples = data.train_loader.samples
    stored = StoredEmbeddings(samples, settings.names, settings.folder)
    samples.views = stored.views

    def formula(step: StepTensors) -> Tensor:
        teachers = []
        for image, text, scale in stored.find(step.batch):
            image, text = image.to(step.image.device), text.to(step.image.device)
            pairs = Pairs(image, text, gather_rows(image), gather_rows(text), step.first_row)
            teachers.append((pairs, scale))
        return reinforced_loss(_student(step), step.logit_scale, teachers)

    return FormulaTerm(name="stored", weight=settings.weight, formula=formula, needs_teacher=False)


def _batch_terms(config: ContinualConfig, teacher: FrozenTeacher) -> list[Term]:
    """Terms on what student and teacher make of the batch."""
    terms: list[Term] = []

    def add(name: str, weight: float, formula: Callable[[Pairs, Pairs], Tensor]) -> None:
        terms.append(FormulaTerm(name=name, weight=weight, formula=lambda step: formula(_student(step), _taught(step))))

    if config.modx:
        add("modx", config.modx.weight * config.modx.rows, modx_loss)
    if section := config.ctp:
        temperature = section.temperature
        add("ctp", section.weight, lambda ours, theirs: ctp_loss(ours, theirs, temperature=temperature))
    if section := config.lwf:
        warmth = section.temperature
        add("lwf", section.weight, lambda ours, theirs: lwf_loss(ours, theirs, temperature=warmth))
    if config.features:
        add("features", config.features.weight, feature_loss)
    if config.similarity:
        terms.append(FormulaTerm(
            name="similarity", weight=config.similarity.weight,
            formula=lambda step: similarity_loss(
                _student(step), step.logit_scale, _taught(step), teacher.logit_scale(step.image.device)
            ),
        ))  # fmt: skip
    return terms


def _weight_terms(config: ContinualConfig, around: Surroundings) -> list[Term]:
    """Terms on the weights themselves."""
    terms: list[Term] = []
    if config.l2_sp:
        terms.append(AnchoredTerm("l2_sp", config.l2_sp.weight, around.folder))
    if config.ewc:
        terms.append(AnchoredTerm("ewc", config.ewc.weight, around.folder, around, config.ewc))
    return terms


class AnchoredTerm:
    """L2-SP, or with a section of its own EWC: distance from the starting weights, read when first needed."""

    needs_teacher = False

    def __init__(
        self,
        name: str,
        weight: float,
        folder: Path,
        around: Surroundings | None = None,
        settings: EwcConfig | None = None,
    ) -> None:
        self.name, self.weight = name, weight
        self._folder, self._around, self._settings = folder, around, settings
        self._anchors: dict[str, Tensor] = {}
        self._fisher: dict[str, Tensor] = {}

    def __call__(self, step: StepTensors) -> Tensor:
        """½ Σ F (θ - θ0)², F = 1 for L2-SP."""
        if not self._anchors:
            self._anchors = load_anchors(self._folder / "start", step.model, step.image.device)
            if self._settings is not None and self._around is not None:
                around, settings = self._around, self._settings
                self._fisher = load_fisher(
                    self._folder, step, lambda: fisher_batches(settings, around, step.image.device)
                )
        parameters = trained_parameters(step.model)
        if self._settings is None:
            return l2_sp(parameters, self._anchors)
        return ewc(parameters, self._anchors, self._fisher)


class VocabularyTerm:
    """VR-LwF: the batch's images among sentences of random words, which the teacher embeds once."""

    name, needs_teacher = "vr_lwf", True

    def __init__(self, settings: VocabularyConfig, teacher: FrozenTeacher, around: Surroundings) -> None:
        self.weight, self.settings, self.teacher = settings.weight, settings, teacher
        self.texts = random_sentences(
            around.tokenizer, num_texts=settings.num_texts, num_words=settings.num_words, seed=around.config.seed
        )
        self._anchors: Tensor | None = None

    def __call__(self, step: StepTensors) -> Tensor:
        """The value over the images of all processes."""
        if self._anchors is None:
            self._anchors = self.teacher.embed_texts(self.texts.to(step.image.device))
        scale, warmth = self.teacher.logit_scale(step.image.device), self.settings.temperature
        return anchor_loss(step.all_image, _known(step.all_teacher_image), self._anchors, scale, temperature=warmth)


class ReferenceTerm:
    """ZSCL: reference images among the captions of their source, read beside the training batch."""

    name, needs_teacher = "zscl", False
    # The teacher embeds the reference images here; the training batch it need not see.

    def __init__(self, settings: ReferenceConfig, teacher: FrozenTeacher, around: Surroundings) -> None:
        self.weight, self.settings, self.teacher = settings.weight, settings, teacher
        self.images = ReferenceImages(settings, around)
        self._anchors: Tensor | None = None

    def __call__(self, step: StepTensors) -> Tensor:
        """The value over the reference images of all processes."""
        device = step.image.device
        if self._anchors is None:
            self._anchors = self.teacher.embed_texts(self.images.texts.to(device))
        pixels = step.normalise(self.images.at(step.step).to(device))
        model: Any = step.model
        ours = gather_rows(nn.functional.normalize(model.encode_image(pixels).float(), dim=1))
        theirs = gather_rows(self.teacher.embed_images(pixels))
        warmth = self.settings.temperature
        return anchor_loss(ours, theirs, self._anchors, self.teacher.logit_scale(device), temperature=warmth)


def _student(step: StepTensors) -> Pairs:
    return Pairs(step.image, step.text, step.all_image, step.all_text, step.first_row)


def _taught(step: StepTensors) -> Pairs:
    image, text = _known(step.teacher_image), _known(step.teacher_text)
    return Pairs(image, text, _known(step.all_teacher_image), _known(step.all_teacher_text), step.first_row)


def _known(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise TypeError("a term needs the teacher's embeddings and the step has none")
    return tensor
