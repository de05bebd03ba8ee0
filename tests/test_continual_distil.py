"""Distillation terms against the formulas of their papers, written once more in numpy and float64."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

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

B, D = 9, 6


def unit(seed, size=B, like=None, near=0.0):
    """Unit rows; with `like`, rows that lie near those."""
    rows = np.random.default_rng(seed).normal(size=(size, D))
    if like is not None:
        rows = like + near * rows
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# A teacher that knows most pairs and a student that moved away from it.
TEACHER_IMAGE = unit(1)
TEACHER_TEXT = unit(2, like=TEACHER_IMAGE, near=0.35)
IMAGE, TEXT = unit(3, like=TEACHER_IMAGE, near=0.3), unit(4, like=TEACHER_TEXT, near=0.3)


def pairs(image, text, requires_grad=False, dtype=torch.float64):
    return Pairs.of(*(torch.tensor(x, dtype=dtype, requires_grad=requires_grad) for x in (image, text)))


STUDENT, TEACHER = pairs(IMAGE, TEXT), pairs(TEACHER_IMAGE, TEACHER_TEXT)


def softmax(row):
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def kl(teacher, student):
    """KL(softmax(teacher) || softmax(student)) of two rows."""
    p, q = softmax(teacher), softmax(student)
    return float(sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True)))


def cross_entropy(teacher, student):
    return float(-(softmax(teacher) * np.log(softmax(student))).sum())


def gradient(function):
    """Gradient of a function of the student's (image, text), by numbers and by autograd, as one vector."""
    ours = pairs(IMAGE, TEXT, requires_grad=True)
    function(ours).backward()
    text = torch.zeros_like(ours.text) if ours.text.grad is None else ours.text.grad
    found = np.concatenate([ours.image.grad.numpy().ravel(), text.numpy().ravel()])
    flat, step, numeric = np.concatenate([IMAGE.ravel(), TEXT.ravel()]), 1e-6, []
    for i in range(0, flat.size, 7):
        values = []
        for sign in (1, -1):
            moved = flat.copy()
            moved[i] += sign * step
            image, text = moved[: B * D].reshape(B, D), moved[B * D :].reshape(B, D)
            values.append(float(function(pairs(image, text))))
        numeric.append((values[0] - values[1]) / (2 * step))
    return found[::7], np.asarray(numeric)


def modx_reference():
    total, counted = 0.0, 0
    for ours, theirs in (
        (IMAGE @ TEXT.T, TEACHER_IMAGE @ TEACHER_TEXT.T),
        (TEXT @ IMAGE.T, TEACHER_TEXT @ TEACHER_IMAGE.T),
    ):
        for i in range(B):
            # The authors replace a row the teacher gets wrong by the student's own.
            right = int(np.argmax(theirs[i])) == i
            counted += right
            total += kl(theirs[i] if right else ours[i], ours[i])
    assert 0 < counted < 2 * B  # both kinds of row occur
    return total / 2 / B


def test_modx_is_the_divergence_of_rows_that_the_teacher_gets_right():
    assert float(modx_loss(STUDENT, TEACHER)) == pytest.approx(modx_reference(), rel=1e-10)


def test_modx_is_the_authors_sum_over_rows_times_their_batch():
    """alpha x sum over 280 rows of one batch is alpha x 280 x the mean: what `rows` in the config stands for."""
    from biomedclip.training.continual.config import ModXConfig

    settings = ModXConfig()
    assert settings.weight * settings.rows == 20 * 280


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_anchor_loss_is_zscls_over_texts_and_over_images(temperature):
    anchors, scale = unit(5, size=4), 14.3
    ours, theirs = scale * IMAGE @ anchors.T / temperature, scale * TEACHER_IMAGE @ anchors.T / temperature
    over_texts = np.mean([cross_entropy(theirs[i], ours[i]) for i in range(B)])
    over_images = np.mean([cross_entropy(theirs[:, m], ours[:, m]) for m in range(len(anchors))])
    found = anchor_loss(STUDENT.image, TEACHER.image, torch.tensor(anchors), scale, temperature=temperature)
    assert float(found) == pytest.approx(temperature**2 * (over_texts + over_images), rel=1e-10)


def test_ctp_is_the_divergence_across_and_within_modalities():
    t, total = 0.07, 0.0
    for a, b, c, d in ((IMAGE, TEXT, TEACHER_IMAGE, TEACHER_TEXT), (TEXT, IMAGE, TEACHER_TEXT, TEACHER_IMAGE)):
        total += np.mean([kl(c[i] @ d.T / t, a[i] @ b.T / t) for i in range(B)]) / 2
    for a, c in ((IMAGE, TEACHER_IMAGE), (TEXT, TEACHER_TEXT)):
        rows = []
        for i in range(B):
            others = [j for j in range(B) if j != i]
            rows.append(kl(c[i] @ c[others].T / t, a[i] @ a[others].T / t))
        total += np.mean(rows) / 2
    assert float(ctp_loss(STUDENT, TEACHER, temperature=t)) == pytest.approx(total, rel=1e-10)


def test_lwf_is_the_divergence_over_dimensions():
    t = 0.07
    wanted = np.mean([kl(TEACHER_IMAGE[i] / t, IMAGE[i] / t) + kl(TEACHER_TEXT[i] / t, TEXT[i] / t) for i in range(B)])
    assert float(lwf_loss(STUDENT, TEACHER, temperature=t)) == pytest.approx(wanted / 2, rel=1e-10)


def test_feature_distance_is_two_minus_two_cosines():
    cosines = (IMAGE * TEACHER_IMAGE).sum(1), (TEXT * TEACHER_TEXT).sum(1)
    wanted = np.mean([2 - 2 * cosine.mean() for cosine in cosines])
    assert float(feature_loss(STUDENT, TEACHER)) == pytest.approx(wanted, rel=1e-10)


def test_similarity_loss_is_open_clips_distillation():
    from open_clip import DistillClipLoss

    scale, teacher_scale = torch.tensor(20.0, dtype=torch.float64), torch.tensor(30.0, dtype=torch.float64)
    both = DistillClipLoss()(
        STUDENT.image, STUDENT.text, scale, TEACHER.image, TEACHER.text, teacher_scale, output_dict=True
    )
    found = similarity_loss(STUDENT, scale, TEACHER, teacher_scale)
    assert float(found) == pytest.approx(float(both["distill_loss"]), rel=1e-10)
    ours, theirs = 20 * IMAGE @ TEXT.T, 30 * TEACHER_IMAGE @ TEACHER_TEXT.T
    halves = [np.mean([cross_entropy(t[i], o[i]) for i in range(B)]) for t, o in ((theirs, ours), (theirs.T, ours.T))]
    assert float(found) == pytest.approx(np.mean(halves), rel=1e-10)


def test_reinforced_loss_averages_probabilities_of_the_teachers():
    second = unit(8), unit(9)
    scale = torch.tensor(20.0, dtype=torch.float64)
    found = reinforced_loss(STUDENT, scale, [(TEACHER, 30.0), (pairs(*second), 10.0)])
    logits = (30 * TEACHER_IMAGE @ TEACHER_TEXT.T, 10 * second[0] @ second[1].T)
    ours, halves = 20 * IMAGE @ TEXT.T, []
    for student, teachers in ((ours, logits), (ours.T, [x.T for x in logits])):
        rows = []
        for i in range(B):
            p, q = np.mean([softmax(t[i]) for t in teachers], axis=0), softmax(student[i])
            rows.append((p * (np.log(p) - np.log(q))).sum())
        halves.append(np.mean(rows))
    assert float(found) == pytest.approx(np.mean(halves), rel=1e-10)


FORMULAS = {
    "modx": lambda ours: modx_loss(ours, TEACHER),
    "anchors": lambda ours: anchor_loss(ours.image, TEACHER.image, torch.tensor(unit(5, size=4)), 14.3),
    "ctp": lambda ours: ctp_loss(ours, TEACHER),
    "lwf": lambda ours: lwf_loss(ours, TEACHER),
    "features": lambda ours: feature_loss(ours, TEACHER),
    "similarity": lambda ours: similarity_loss(ours, torch.tensor(20.0), TEACHER, 30.0),
    "reinforced": lambda ours: reinforced_loss(ours, torch.tensor(20.0), [(TEACHER, 30.0)]),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_are_those_of_the_value(name):
    found, numeric = gradient(FORMULAS[name])
    assert np.abs(numeric).max() > 1e-4
    np.testing.assert_allclose(found, numeric, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_student_that_is_the_teacher_has_no_gradient(name):
    """At the start of a run the terms pull nowhere; `anchors` and `similarity` are cross entropies, above zero."""
    ours = pairs(TEACHER_IMAGE, TEACHER_TEXT, requires_grad=True)
    function = {**FORMULAS, "similarity": lambda x: similarity_loss(x, torch.tensor(30.0), TEACHER, 30.0),
                "reinforced": lambda x: reinforced_loss(x, torch.tensor(30.0), [(TEACHER, 30.0)])}[name]  # fmt: skip
    value = function(ours)
    value.backward()
    if name not in ("anchors", "similarity"):
        assert float(value.detach()) == pytest.approx(0, abs=1e-12)
    text = torch.zeros_like(ours.text) if ours.text.grad is None else ours.text.grad
    assert max(float(ours.image.grad.abs().max()), float(text.abs().max())) < 1e-10


@pytest.mark.parametrize("name", ["modx", "ctp", "lwf", "features", "similarity", "reinforced"])
def test_the_mean_over_two_processes_is_the_value_of_the_whole_batch(name):
    """Each process brings half of the rows against the columns of all."""
    ours, theirs = pairs(unit(3, 8), unit(4, 8)), pairs(unit(1, 8), unit(2, 8, like=unit(1, 8), near=0.3))

    def half(whole, first):
        rows = slice(first, first + 4)
        return Pairs(whole.image[rows], whole.text[rows], whole.image, whole.text, first)

    formulas = {
        "modx": modx_loss, "ctp": ctp_loss, "lwf": lwf_loss, "features": feature_loss,
        "similarity": lambda a, b: similarity_loss(a, torch.tensor(20.0), b, 30.0),
        "reinforced": lambda a, b: reinforced_loss(a, torch.tensor(20.0), [(b, 30.0)]),
    }  # fmt: skip
    halves = [float(formulas[name](half(ours, first), half(theirs, first))) for first in (0, 4)]
    assert np.mean(halves) == pytest.approx(float(formulas[name](ours, theirs)), rel=1e-12)


def test_terms_stay_finite_in_float32_at_clips_logit_scale():
    ours = pairs(IMAGE, TEXT, requires_grad=True, dtype=torch.float32)
    theirs = pairs(TEACHER_IMAGE, TEACHER_TEXT, dtype=torch.float32)
    hundred = torch.tensor(100.0)
    value = (
        modx_loss(ours, theirs) + ctp_loss(ours, theirs, temperature=0.01) + lwf_loss(ours, theirs, temperature=0.01)
        + similarity_loss(ours, hundred, theirs, 100.0) + reinforced_loss(ours, hundred, [(theirs, 100.0)])
        + anchor_loss(ours.image, theirs.image, F.normalize(torch.randn(5, D), dim=1), 100.0)
    )  # fmt: skip
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(ours.image.grad).all()
    assert torch.isfinite(ours.text.grad).all()
