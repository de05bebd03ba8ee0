"""Distillation as functions of embeddings: how far the student's similarities moved away from the teacher's.

They read the unit embeddings of a batch from the student and from the frozen teacher and yield one number, a mean over
rows, so that a weight means the same at every batch size (where authors sum over rows the docstring says so). The
teacher's side carries no gradient. Where a paper and its code differ the code counts: it made the published numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Pairs:
    """Unit embeddings of one batch by one model: b rows of this process, B columns of all.

    With one process rows and columns are the same. The mean over processes of a function that averages over rows is
    that function of the global batch, at b x B similarities a process.
    """

    image: Tensor
    text: Tensor
    all_image: Tensor
    all_text: Tensor
    first_row: int = 0

    @classmethod
    def of(cls, image: Tensor, text: Tensor) -> Pairs:
        """The pairs of a single process."""
        return cls(image, text, image, text)

    @property
    def across(self) -> tuple[Tensor, Tensor]:
        """(b, B) cosines of images with texts, and of texts with images."""
        return self.image @ self.all_text.T, self.text @ self.all_image.T

    @property
    def within(self) -> tuple[Tensor, Tensor]:
        """(b, B) cosines of images with images, and of texts with texts."""
        return self.image @ self.all_image.T, self.text @ self.all_text.T

    @property
    def own(self) -> Tensor:
        """(b,) the column of each row's own sample."""
        return self.first_row + torch.arange(len(self.image), device=self.image.device)


def modx_loss(student: Pairs, teacher: Pairs) -> Tensor:
    """Mod-X: KL(softmax of the teacher's row || softmax of the student's), mean over rows and both directions.

    Rows are plain cosines, without logit scale. A row where the teacher does not put the sample's own partner first
    counts zero: the authors put the student's row in its place ("cognition align"), whose divergence and gradient are
    zero. Ni et al. 2023 (arXiv 2305.07437, section 4.2), as in their code, which sums over the rows of a batch.
    """
    halves = []
    for ours, theirs in zip(student.across, teacher.across, strict=True):
        knows = theirs.argmax(dim=1) == teacher.own
        halves.append((row_divergence(theirs, ours) * knows).mean())
    return (halves[0] + halves[1]) / 2


def anchor_loss(
    image: Tensor, teacher_image: Tensor, anchors: Tensor, scale: float | Tensor, *, temperature: float = 2.0
) -> Tensor:
    """ZSCL and VR-LwF: cross entropy between softened similarities of images and fixed texts, both ways added up.

    With the teacher's logit scale s, the student's images f (N, D), the teacher's f̄, the texts A (M, D) embedded by
    the teacher, L = s f Aᵀ and L̄ = s f̄ Aᵀ: T² mean_i CE(softmax(L̄_i / T), L_i / T), plus the same of the transposed.
    ZSCL: Zheng et al. 2023 (arXiv 2303.06628, section 3.2), with images and sentences of a reference set. VR-LwF: Ding
    et al. 2022 (arXiv 2207.09248), with the batch's images and random words; its authors released no code, and the
    form taken here is that of ZSCL's code with random sentences.
    """
    ours, theirs = scale * image @ anchors.T, scale * teacher_image @ anchors.T
    over_texts = soft_cross_entropy(theirs / temperature, ours / temperature).mean()
    over_images = soft_cross_entropy(theirs.T / temperature, ours.T / temperature).mean()
    return temperature**2 * (over_texts + over_images)


def ctp_loss(student: Pairs, teacher: Pairs, *, temperature: float = 0.07) -> Tensor:
    """CTP's topology preservation: divergence of the similarities across modalities plus that within them.

    Each is the mean of two KL(softmax(S̄ / t) || softmax(S / t)), mean over rows: image-text and text-image; image-image
    and text-text without a sample's similarity to itself. Zhu et al. 2023 (arXiv 2308.07146, "Topology Preservation"),
    t = 0.07 as in their code. The momentum queue of that paper is another term and not part of this one.
    """
    itself = torch.zeros(student.across[0].shape, dtype=torch.bool, device=student.image.device)
    itself[torch.arange(len(itself)), student.own] = True
    total = student.image.new_zeros(())
    for ours, theirs in zip(student.across, teacher.across, strict=True):
        total = total + row_divergence(theirs / temperature, ours / temperature).mean() / 2
    for ours, theirs in zip(student.within, teacher.within, strict=True):
        # A finite number, as the authors do: minus infinity would be 0 times infinity in the gradient.
        ours, theirs = (x.masked_fill(itself, -1000.0) / temperature for x in (ours, theirs))
        total = total + row_divergence(theirs, ours).mean() / 2
    return total


def lwf_loss(student: Pairs, teacher: Pairs, *, temperature: float = 0.07) -> Tensor:
    """LwF for two towers: KL(softmax(f̄ / t) || softmax(f / t)) over the D dimensions, mean of images and texts.

    Li and Hoiem 2016 (arXiv 1606.09282, equation 2) for class logits. Over embeddings it is the LwF baseline in the
    code of CTP (arXiv 2308.07146) with t = 0.07; embeddings have length 1 here, and are as projected there.
    """
    over_images = row_divergence(teacher.image / temperature, student.image / temperature).mean()
    over_texts = row_divergence(teacher.text / temperature, student.text / temperature).mean()
    return (over_images + over_texts) / 2


def feature_loss(student: Pairs, teacher: Pairs) -> Tensor:
    """Feature distillation: mean of |f - f̄|² = 2 - 2 cos over the batch, mean of images and texts.

    CLIP-KD (Yang et al. 2024, arXiv 2307.12732, "feature distillation").
    """
    over_images = (student.image - teacher.image).square().sum(dim=1).mean()
    over_texts = (student.text - teacher.text).square().sum(dim=1).mean()
    return (over_images + over_texts) / 2


def similarity_loss(student: Pairs, scale: Tensor, teacher: Pairs, teacher_scale: float | Tensor) -> Tensor:
    """Distillation of the batch's similarities: CE(softmax(s̄ Ī T̄ᵀ), s I Tᵀ), mean over rows and both directions.

    The distillation term of open_clip's `DistillClipLoss`; "contrastive relational distillation" in CLIP-KD
    (arXiv 2307.12732).
    """
    halves = [
        soft_cross_entropy(teacher_scale * theirs, scale * ours).mean()
        for ours, theirs in zip(student.across, teacher.across, strict=True)
    ]
    return (halves[0] + halves[1]) / 2


def reinforced_loss(student: Pairs, scale: Tensor, teachers: Sequence[tuple[Pairs, float]]) -> Tensor:
    """MobileCLIP's distillation: KL(mean of the teachers' softmax(s̄ Ī T̄ᵀ) || softmax(s I Tᵀ)), mean of both directions.

    Probabilities are averaged over the teachers, not logits. Vasu et al. 2024 (arXiv 2311.17049, section 3, "Loss
    function"); s̄ is 100 there, and the whole loss is (1 - w) CLIP + w times this.
    """
    halves = []
    for direction, ours in enumerate(student.across):
        mean = torch.stack([(s * pairs.across[direction]).softmax(dim=1) for pairs, s in teachers]).mean(dim=0)
        log_mean = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
        halves.append((mean * (log_mean - F.log_softmax(scale * ours, dim=1))).sum(dim=1).mean())
    return (halves[0] + halves[1]) / 2


def row_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """(N,) KL(softmax(teacher) || softmax(student)) of each row of two (N, M) logits."""
    log_teacher = F.log_softmax(teacher, dim=1)
    return (log_teacher.exp() * (log_teacher - F.log_softmax(student, dim=1))).sum(dim=1)


def soft_cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """(N,) -sum_j softmax(teacher)_j log softmax(student)_j of each row of two (N, M) logits."""
    return -(F.softmax(teacher, dim=1) * F.log_softmax(student, dim=1)).sum(dim=1)
