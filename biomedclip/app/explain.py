"""Where in a picture the evidence for a few words lies: a map, a picture of it, and whether the map means anything.

Reads a loaded model, an 8-bit picture and a label, yields an `Explanation`. The map comes from the image tower
(`biomedclip.app.evidence`), is put back on the user's picture through the inverse of the model's own preprocessing, and
is checked by deletion: the hottest tenth of what the model sees is painted in the picture's mean colour, and the fall
of the cosine is compared with the same shape painted at random places. A map that does no better than chance is shown
with that verdict, because a heat map looks convincing whether or not the model looked there (Adebayo et al. 2018).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from biomedclip.app.evidence import find_evidence
from biomedclip.app.overlay import HIDDEN_SHARE, draw_explanation
from biomedclip.errors import ConfigError
from biomedclip.models.geometry import Placement, place_input
from biomedclip.models.preprocess import ImageTransform

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

PLACES = 40
"""Random places that the hottest tenth is compared with; at least 95 % of them must matter less."""
_TRUSTED_RANK = 0.95
_BATCH = 8
_ALL = 0.999
"""A share of the picture above which nothing worth telling is cut off: sizes are rounded to whole pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faithfulness:
    """What hiding the hottest tenth does to the score, beside hiding the same shape elsewhere (deletion check)."""

    drop: float
    """Fall of the score when the hottest tenth is hidden."""
    drop_elsewhere: float
    """Mean fall over `places` random places of the same shape."""
    rank: float
    """Share of the random places whose hiding lowers the score less than hiding the hottest tenth does, 0 to 1."""
    places: int = PLACES

    @property
    def holds(self) -> bool:
        """Whether the map shows what the score depends on: hiding it matters, and more than hiding other places."""
        return self.drop > 0 and self.rank >= _TRUSTED_RANK

    def describe(self) -> str:
        """One sentence with the numbers, for people."""
        numbers = (
            f"hiding the hottest tenth takes {_number(self.drop)} off the score, the same shape elsewhere"
            f" {_number(self.drop_elsewhere)} on average, less at {self.rank:.0%} of {self.places} places"
        )
        verdict = (
            "the map shows what the score rests on"
            if self.holds
            else "not clearly better than chance, do not rely on this map"
        )
        return f"{numbers}: {verdict}"


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Where the evidence for `label` (and against `against`) lies in a picture."""

    label: str
    against: str | None
    picture: Image.Image
    input_heat: np.ndarray
    """float32 (h, w), 0 to 1, over the model's input."""
    placement: Placement
    method: str
    cosine: float
    """Of the picture and the label."""
    cosine_against: float | None
    faithfulness: Faithfulness

    @property
    def score(self) -> float:
        """What was explained: the cosine, less the cosine with `against` where that is given."""
        return self.cosine - (self.cosine_against or 0.0)

    @property
    def is_cropped(self) -> bool:
        """Whether the preprocessing cuts off part of the picture."""
        return self.placement.seen_share() < _ALL

    @cached_property
    def heat(self) -> np.ndarray:
        """float32 (H, W), 0 to 1, over the picture; 0 where a crop hides it from the model."""
        return self.placement.to_picture(self.input_heat)

    @cached_property
    def overlay(self) -> Image.Image:
        """The picture and the map beside each other, with labels, colour bar and the result of the check."""
        return draw_explanation(self)

    def describe(self) -> list[str]:
        """Sentences for people: the numbers, the check, what a crop hid, and what this is not for."""
        words = f"Cosine with “{self.label}” {self.cosine:.3f}"
        words += f", with “{self.against}” {self.cosine_against:.3f}" if self.against is not None else ""
        sentences = [f"{words}. Map: {self.method}.", f"Check: {self.faithfulness.describe()}."]
        share = self.placement.seen_share()
        if self.is_cropped:
            sentences.append(
                f"The model sees {share:.0%} of this picture, the middle; the dark part is cut off before it."
            )
        return [*sentences, "For research only; not for clinical use."]

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {
            "label": self.label, "against": self.against, "cosine": self.cosine, "cosine_against": self.cosine_against,
            "method": self.method, "seen_share": self.placement.seen_share(), "drop": self.faithfulness.drop,
            "drop_elsewhere": self.faithfulness.drop_elsewhere, "rank": self.faithfulness.rank,
            "holds": self.faithfulness.holds,
        }  # fmt: skip


def explain_picture(
    model: nn.Module, preprocess: ImageTransform, tokenizer: Callable[..., Any], picture: Image.Image, label: str,
    against: str | None = None, *, seed: int = 0,
) -> Explanation:  # fmt: skip
    """Where the evidence for `label` lies in an 8-bit picture; with `against`, what speaks for the one over the other.

    `model, preprocess, tokenizer` are what `biomedclip.load` gives, the model in evaluation mode; `seed` chooses the
    places of the check. Raises ConfigError for an empty label and for two labels that are the same, DataError for a
    picture of more than 8 bits a channel.
    """
    label, against = check_labels(label, against)
    parameter = next(model.parameters())
    pixels = preprocess(picture).unsqueeze(0).to(parameter.device, parameter.dtype)
    texts = [label] if against is None else [label, against]
    with torch.no_grad():
        text = F.normalize(_encode_text(model, tokenizer, texts, parameter.device).float(), dim=-1)
    signs = torch.tensor([1.0, -1.0][: len(texts)], device=text.device)

    def cosines(images: torch.Tensor) -> torch.Tensor:
        return F.normalize(_embed(model, images), dim=-1) @ text.T

    def score(images: torch.Tensor) -> torch.Tensor:
        return cosines(images) @ signs

    heat, method = find_evidence(model, score, pixels)
    with torch.no_grad():
        found = cosines(pixels)[0].tolist()
        faithfulness = check_by_deletion(score, pixels, heat, seed=seed)
    return Explanation(
        label=label, against=against, picture=picture, input_heat=heat.cpu().numpy().astype(np.float32),
        placement=place_input(preprocess, picture.height, picture.width), method=method, cosine=found[0],
        cosine_against=found[1] if against is not None else None, faithfulness=faithfulness,
    )  # fmt: skip


def check_by_deletion(
    score: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, heat: torch.Tensor, *, seed: int = 0
) -> Faithfulness:
    """The fall of the score of `pixels` (1, 3, H, W) when the hottest tenth of `heat` (H, W) is hidden.

    Hidden pixels take the picture's mean colour. The comparison hides the same shape, moved round the picture by random
    shifts, so that size and outline cannot make the difference (deletion: Petsiuk et al. 2018, section 4.2).
    """
    height, width = heat.shape
    hottest = heat.flatten().topk(max(1, round(HIDDEN_SHARE * heat.numel()))).indices
    mask = torch.zeros(height * width, dtype=torch.bool, device=heat.device)
    mask[hottest] = True
    mask = mask.view(height, width)
    random = np.random.default_rng(seed)
    shifts = zip(random.integers(0, height, PLACES), random.integers(0, width, PLACES), strict=True)
    masks = torch.stack([mask, *(mask.roll((int(down), int(across)), (0, 1)) for down, across in shifts)])
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    whole = score(pixels)[0]
    scores = torch.cat([score(torch.where(part[:, None], mean, pixels)) for part in masks.split(_BATCH)])
    drops = (whole - scores).double().cpu()
    return Faithfulness(
        drop=drops[0].item(), drop_elsewhere=drops[1:].mean().item(),
        rank=(drops[1:] < drops[0]).double().mean().item(),
    )  # fmt: skip


def check_labels(label: str, against: str | None) -> tuple[str, str | None]:
    """Both without blanks around them. Raises ConfigError where one is empty or they are the same."""
    for name, text in (("label", label), ("against", against)):
        if text is not None and not text.strip():
            raise ConfigError(name, "is empty", todo="write the words whose evidence is looked for")
    label, against = label.strip(), against.strip() if against is not None else None
    if label == against:
        raise ConfigError("against", "is the label itself", found=label, todo="name what it is not")
    return label, against


def _encode_text(model: Any, tokenizer: Callable[..., Any], texts: list[str], device: torch.device) -> torch.Tensor:
    encoded: torch.Tensor = model.encode_text(tokenizer(texts).to(device))
    return encoded


def _embed(model: Any, images: torch.Tensor) -> torch.Tensor:
    embedded: torch.Tensor = model.encode_image(images).float()
    return embedded


def _number(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # + 0.0: never -0.000
