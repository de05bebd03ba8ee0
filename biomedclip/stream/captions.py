"""Which of a sample's texts this time: its caption, rewrites of it, sentences that cite it, captions of its panels.

Reads the caption and the sidecar of a sample; yields one text. The draw is a hash of (seed, sample key, epoch), so each
run and each resumed run reads the same text, whoever reads it. Kinds that a sample lacks leave their share to the
others, so one mix fits a mixture of articles and labelled sets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from biomedclip.config import Config
from biomedclip.stream.plan import draw_int

Weight = Annotated[float, Field(ge=0)]

_FEWEST_WORDS = 2
_FEWEST_IN_SENTENCE = 3
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(\[])")


class CaptionMix(Config):
    """How often each kind of text is read. Weights are relative; kinds that a sample lacks are left out of the sum.

    LaCLIP's rule, each of a caption and its M rewrites equally likely (Fan et al. 2023, section 3), is
    `{original: 1, rewrite: 1, weigh: texts}`.
    """

    original: Weight = 0.0
    """The caption itself."""
    compiled: Weight = 0.0
    """One of the captions that a labelled set's recipe made of the labels: `captions` in the sidecar."""
    rewrite: Weight = 0.0
    """One of the rewrites that somebody's language model made: `rewrites`, a list of texts."""
    mention: Weight = 0.0
    """One of the sentences or paragraphs of the article that cite the figure: `mentions`."""
    panel: Weight = 0.0
    """The caption of one of the figure's panels: `panel_captions`, a list or `{letter: text}`."""
    weigh: Literal["kinds", "texts"] = "kinds"
    """Whether a weight is shared by the texts of its kind, or is each text's own."""

    @model_validator(mode="after")
    def _some_weight(self) -> CaptionMix:
        if not any(self.weights.values()):
            raise ValueError("needs one weight above zero")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Kind -> weight."""
        return {kind: getattr(self, kind) for kind in KINDS}

    @property
    def needs_sidecar(self) -> bool:
        """Whether the .json of a sample must be read."""
        return any(weight for kind, weight in self.weights.items() if kind != "original")


KINDS = ("original", "compiled", "rewrite", "mention", "panel")


def choose_caption(captions: Sequence[str], *facts: object) -> str:
    """One of the captions, each as likely, decided by the facts (seed, sample key, epoch) alone."""
    return captions[draw_int("caption", *facts) % len(captions)]


def first_sentence(caption: str) -> str:
    """The caption up to the end of its first sentence of three words or more, all of it where it has one only.

    Long-CLIP's short caption is what stands before the first full stop and space. Of `Fig. 1. (A) Axial CT shows …`
    that is no sentence, so here one ends before a capital or a bracket, and is longer than a label.
    """
    for end in _SENTENCE_END.finditer(caption):
        if len(caption[: end.start()].split()) >= _FEWEST_IN_SENTENCE:
            return caption[: end.start()]
    return caption


def find_texts(caption: str, sidecar: Mapping[str, Any]) -> dict[str, list[str]]:
    """Kind -> texts of a sample; what is no text is passed over, and kinds without any are left out."""
    panels = sidecar.get("panel_captions")
    found = {
        "original": [caption],
        "compiled": _list(sidecar.get("captions")),
        "rewrite": _list(sidecar.get("rewrites")),
        "mention": [m.get("text") if isinstance(m, Mapping) else m for m in _list(sidecar.get("mentions"))],
        "panel": [panels[letter] for letter in sorted(panels)] if isinstance(panels, Mapping) else _list(panels),
    }
    texts = {kind: [text for text in listed if isinstance(text, str)] for kind, listed in found.items()}
    return {kind: listed for kind, listed in texts.items() if listed}


def sample_caption(texts: Mapping[str, Sequence[str]], mix: CaptionMix, *facts: object) -> str:
    """One text of a sample by the weights of its kinds, decided by the facts (seed, sample key, epoch) alone.

    The caption itself where the sample has none of the wanted kinds, or where the drawn text has fewer than two words.
    """
    shares = mix.weights
    each = [
        (text, shares[kind] if mix.weigh == "texts" else shares[kind] / len(texts[kind]))
        for kind in KINDS
        for text in texts.get(kind, ())
    ]
    point = draw_int("caption", *facts) / 2**64 * sum(weight for _, weight in each)
    original = texts["original"][0]
    for text, weight in each:
        point -= weight
        if point < 0:
            return text if len(text.split(maxsplit=_FEWEST_WORDS)) >= _FEWEST_WORDS else original
    return original


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
