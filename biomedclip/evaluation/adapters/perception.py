"""PerceptionCLIP: first see how an image was made, then what it shows. Needs no labelled image.

An et al. 2024: with attributes z (stain, magnification, view, device), p(y|x) = sum over z of p(z|x) p(y|x,z), where
p(y|x,z) is the softmax over classes of the prompts "class y, seen as z". Step one infers p(z|x), from the class
prompts summed over classes (`class`) or from prompts of the attribute alone (`pure`), flattened by a temperature,
since a model that is too sure of the stain would look at one set of prompts only.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from biomedclip.errors import ConfigError
from biomedclip.evaluation.adapters.features import Adapted, Choice, Vectors
from biomedclip.evaluation.metrics import softmax


def perceive(
    prompts: Vectors, *, logit_scale: float = 100.0, temperature: float = 5.0,
    attributes: Vectors | None = None, infer: Literal["class", "pure"] = "class", **_: Any,
) -> Adapted:  # fmt: skip
    """Logits log p(y|x). `prompts` (Z, C, D) are unit weights of each class under each attribute value.

    `pure` needs `attributes` (Z, D), prompts of the attribute values alone; ConfigError without.
    """
    if infer == "pure" and attributes is None:
        raise ConfigError("infer pure", "needs prompts of the attributes alone", todo="give attributes, or infer class")
    chosen = Choice(hparams={"temperature": temperature, "infer": infer})

    def logits(vectors: Vectors) -> NDArray[np.float64]:
        cosines, shares = _infer(vectors, prompts, attributes if infer == "pure" else None, logit_scale, temperature)
        classes = np.stack([softmax(logit_scale * cosines[:, z]) for z in range(cosines.shape[1])], axis=1)
        return np.log(np.maximum((shares[:, :, None] * classes).sum(1), 1e-300))

    return Adapted(method="perception", logits=logits, choice=chosen)


def infer_attributes(
    vectors: Vectors, prompts: Vectors, *, attributes: Vectors | None = None, logit_scale: float = 100.0,
    temperature: float = 5.0,
) -> NDArray[np.float64]:  # fmt: skip
    """(N, Z) p(z|x), from class prompts, or from prompts of the attributes alone where given."""
    return _infer(vectors, prompts, attributes, logit_scale, temperature)[1]


def _infer(
    vectors: Vectors, prompts: Vectors, attributes: Vectors | None, logit_scale: float, temperature: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    wide = np.asarray(vectors, dtype=np.float64)
    cosines = np.einsum("nd,zcd->nzc", wide, np.asarray(prompts, dtype=np.float64))
    if attributes is not None:
        return cosines, softmax(logit_scale / temperature * (wide @ np.asarray(attributes, dtype=np.float64).T))
    scaled = logit_scale / temperature * cosines
    top = scaled.max(axis=2, keepdims=True)
    return cosines, softmax(top[:, :, 0] + np.log(np.exp(scaled - top).sum(2)))
