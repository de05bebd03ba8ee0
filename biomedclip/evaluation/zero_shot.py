"""Zero-shot classification: class prompts and image embeddings to one cosine per image and class.

Reads unit embeddings of images (N, D) and of each class's prompts (K_c, D); yields scores (N, C), float32 and raw:
temperature, softmax and every metric come later and from these. The ensemble mode is a named argument because
published numbers differ in it silently: normalise, mean, re-normalise (open_clip, the default) is not normalise, mean
(FLAIR), which favours classes whose prompts are alike. Labels that hold side by side, options of a single image and
patches of a slide are scored here too; what becomes of the scores is in multilabel.py, options.py and ordinal.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biomedclip.errors import ConfigError
from biomedclip.evaluation.metrics import softmax
from biomedclip.evaluation.tasks import Ensemble

Vectors = NDArray[np.float32]


def class_weights(prompts: Sequence[Vectors], *, renorm: bool = True) -> Vectors:
    """(C, D) zero-shot classifier weights: the mean of each class's unit prompt embeddings, of length 1 if `renorm`."""
    means = np.stack([np.asarray(vectors, dtype=np.float64).mean(0) for vectors in prompts])
    if renorm:
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return means.astype(np.float32)


def nested_weights(prompts: Sequence[Sequence[Vectors]]) -> Vectors:
    """(C, D) weights where every name of a class counts alike, however many templates it fills.

    `prompts[c][n]` (K, D) are the prompts of the n-th name; norm(mean over names of norm(mean over templates)). The
    flat mean, over all prompts at once, is `class_weights`.
    """
    return class_weights([class_weights(names) for names in prompts])


def score_classes(images: Vectors, prompts: Sequence[Vectors], ensemble: Ensemble, logit_scale: float) -> Vectors:
    """(N, C) scores in float32, higher is likelier; cosines in every mode but `prob`.

    embed: f . norm(mean u); logit: mean of f . u; max: largest f . u; none: f . u of the single prompt;
    lse: log of the mean of exp(s f . u), divided by s, between mean and max; prob: log of the mean over k of
    softmax_c(s f . u_ck), divided by s, so that softmax(s z) gives that mean back.
    Raises ConfigError where `none` meets several prompts or `prob` unequal counts.
    """
    counts = {len(vectors) for vectors in prompts}
    if ensemble.mode == "none" and counts != {1}:
        raise ConfigError("ensemble.mode none", "needs one prompt per class", found=sorted(counts))
    if ensemble.mode == "prob" and len(counts) != 1:
        raise ConfigError("ensemble.mode prob", "needs equally many prompts per class", found=sorted(counts))
    wide = np.asarray(images, dtype=np.float64)
    if ensemble.mode in ("embed", "none"):
        renorm = ensemble.renorm and ensemble.mode == "embed"
        # Rounded once, at the end: equal embeddings get equal scores whatever block of the product they fall in.
        return (wide @ class_weights(prompts, renorm=renorm).astype(np.float64).T).astype(np.float32)
    cosines = [wide @ np.asarray(vectors, dtype=np.float64).T for vectors in prompts]
    if ensemble.mode == "logit":
        return np.stack([c.mean(1) for c in cosines], axis=1).astype(np.float32)
    if ensemble.mode == "max":
        return np.stack([c.max(1) for c in cosines], axis=1).astype(np.float32)
    if ensemble.mode == "lse":
        tops = [c.max(1, keepdims=True) for c in cosines]
        means = [np.exp(logit_scale * (c - top)).mean(1) for c, top in zip(cosines, tops, strict=True)]
        columns = [top[:, 0] + np.log(mean) / logit_scale for top, mean in zip(tops, means, strict=True)]
        return np.stack(columns, axis=1).astype(np.float32)
    stacked = np.stack(cosines, axis=1)  # (N, C, K)
    mean = np.mean([softmax(logit_scale * stacked[:, :, k]) for k in range(stacked.shape[2])], axis=0)
    return (np.log(np.maximum(mean, 1e-300)) / logit_scale).astype(np.float32)


def score_labels(images: Vectors, positive: Sequence[Vectors], negative: Sequence[Vectors]) -> Vectors:
    """(N, L) f . (w+ - w-) of each label from its positive and its negative prompts.

    The probability is sigmoid(s f . (w+ - w-)) (Tiu et al. 2022, whose s is 1); ranks need no s. Raises ConfigError
    where a label's two sides are the same to the model, so that nothing could tell them apart.
    """
    yes, no = class_weights(positive).astype(np.float64), class_weights(negative).astype(np.float64)
    same = np.flatnonzero((yes == no).all(1))
    if same.size:
        raise ConfigError("prompts", f"label {same[0]} has equal positive and negative prompts", todo="reword one")
    return (np.asarray(images, dtype=np.float64) @ (yes - no).T).astype(np.float32)


def score_options(images: Vectors, options: Vectors, sizes: Sequence[int]) -> NDArray[np.float32]:
    """(sum of sizes,) cosine of each image with each of its own options; `options` are all of them, image by image.

    Raises ValueError where the sizes do not add up.
    """
    owner = np.repeat(np.arange(len(images)), sizes)
    if len(owner) != len(options):
        raise ValueError(f"{len(options)} options for {len(owner)} places")
    product = np.asarray(images, dtype=np.float64)[owner] * np.asarray(options, dtype=np.float64)
    return product.sum(1).astype(np.float32)


def pool_patches(scores: ArrayLike, slides: Sequence[str], top: int) -> tuple[tuple[str, ...], Vectors]:
    """Slide ids in order of first appearance, and (S, C) means of each class's `top` largest patch scores.

    MI-Zero and CONCH; a slide of fewer patches uses all it has. Raises ConfigError for `top` below 1.
    """
    if top < 1:
        raise ConfigError("top", "must be 1 or more", found=top)
    patches = np.asarray(scores, dtype=np.float64)
    names = tuple(dict.fromkeys(slides))
    number = {name: i for i, name in enumerate(names)}
    slide_of = np.asarray([number[name] for name in slides])
    pooled = np.empty((len(names), patches.shape[1]))
    order = np.argsort(slide_of, kind="stable")
    for i, rows in enumerate(np.split(order, np.flatnonzero(np.diff(slide_of[order])) + 1)):
        pooled[i] = np.sort(patches[rows], axis=0)[-top:].mean(0)
    return names, pooled.astype(np.float32)


def correct_prior(scores: ArrayLike, shares: ArrayLike, logit_scale: float, tau: float = 1.0) -> Vectors:
    """(N, C) scores less tau log(share) / s, so that softmax(s z) answers for classes that are equally common.

    `shares` (C,) is how common the model thinks each class is: its mean probability on unlabelled images of a
    validation split, never on the images that are scored.
    """
    return (np.asarray(scores, dtype=np.float64) - tau * np.log(np.asarray(shares)) / logit_scale).astype(np.float32)
