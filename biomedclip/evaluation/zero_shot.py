"""Zero-shot classification: class prompts and image embeddings to one cosine per image and class.

Reads unit embeddings of images (N, D) and of each class's prompts (K_c, D); yields scores (N, C), float32 and raw:
temperature, softmax and every metric come later and from these. The ensemble mode is a named argument because
published numbers differ in it silently: normalise, mean, re-normalise (open_clip, the default) is not normalise, mean
(FLAIR), which favours classes whose prompts are alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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


def score_classes(images: Vectors, prompts: Sequence[Vectors], ensemble: Ensemble, logit_scale: float) -> Vectors:
    """(N, C) scores in float32, higher is likelier; cosines in every mode but `prob`.

    embed: f . norm(mean u); logit: mean of f . u; max: largest f . u; none: f . u of the single prompt;
    prob: log of the mean over k of softmax_c(s f . u_ck), divided by s, so that softmax(s z) gives that mean back.
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
    stacked = np.stack(cosines, axis=1)  # (N, C, K)
    mean = np.mean([softmax(logit_scale * stacked[:, :, k]) for k in range(stacked.shape[2])], axis=0)
    return (np.log(np.maximum(mean, 1e-300)) / logit_scale).astype(np.float32)
