"""The bundled model on altered copies of its validation splits, beside the weights that it came from.

Training films are 28 px wide and cells are cut close; pictures at hand are neither. Each validation picture is changed
in a fixed way (hue, paleness, mirrored surroundings; gamma, texture, black margins), and balanced accuracy is printed
for each model. MODELS="biomedclip-mini runs/mini/ema runs/mini_wide/ema" names the models, the first being ours and the
others its peers; without it the peer is the same architecture with random weights. With ../shared/data the chest films
of VQA-RAD join, 11 with an opacity and 14 clear ones by their questions: AUROC, on films that nothing was trained on.
Test splits are not read, so that choices may be made by what is printed here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from biomedclip.evaluation.metrics import auroc
from biomedclip.evaluation.splits import read_other_split
from biomedclip.evaluation.tasks import find_task
from biomedclip.layouts import read_rgb
from biomedclip.models.load import load

PEERS = ()
SAMPLE = Path(str(resources.files("data_builders"))) / "sample"
FILMS = Path(__file__).resolve().parents[3] / "shared" / "data" / "vqa_rad" / "images"
OPACITY = "29265 13385 33481 32084 52988 52932 26413 25587 49914 17145 38531"
CLEAR = "21776 25821 33302 16174 52767 60423 27402 53228 42245 24538 19232 33331 33226 31256"
PROMPTS = {
    "bccd": {name: f"a microscopy image of a {words}" for name, words in (
        ("Platelets", "platelet"), ("RBC", "red blood cell"), ("WBC", "white blood cell"))},
    "pneumoniamnist": {
        "normal": "a chest X-ray showing normal lungs", "pneumonia": "a chest X-ray showing pneumonia",
    },
}  # fmt: skip
PARAPHRASE = ("radiograph of a patient without any findings", "opacity in the lung")
"""Normal and pneumonia in words that no caption of the training sets has."""
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def turn_hue(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Hue moved by a fourteenth of the circle, either way."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV).astype(int)
    hsv[..., 0] = (hsv[..., 0] + rng.choice([-13, 13])) % 180
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)


def pale(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Three fifths of the contrast, brighter."""
    del rng
    return (pixels * 0.6 + 100).clip(0, 255).astype(np.uint8)


def surround(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror images of itself around the picture, which then takes a third of the area."""
    del rng
    side = round(pixels.shape[0] * 0.42)
    return cv2.copyMakeBorder(pixels, side, side, side, side, cv2.BORDER_REFLECT)


def bend_gamma(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exposure: a gamma of 0.6 or 1.6."""
    return ((pixels / 255) ** rng.choice([0.6, 1.6]) * 255).astype(np.uint8)


def add_texture(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The detail of a large film: 320 px with noise of two sizes."""
    large = cv2.resize(pixels, (320, 320), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    coarse = cv2.resize(rng.standard_normal((160, 160)).astype(np.float32), (320, 320)) * 8
    return (large + (coarse + rng.standard_normal((320, 320)) * 6)[..., None]).clip(0, 255).astype(np.uint8)


def add_margins(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Black margins, an eighth of each side."""
    del rng
    side = round(pixels.shape[0] / 7)
    return cv2.copyMakeBorder(pixels, side, side, side // 2, side // 2, cv2.BORDER_CONSTANT)


def unchanged(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As it is."""
    del rng
    return pixels


CHANGES: dict[str, tuple[Change, ...]] = {
    "bccd": (unchanged, turn_hue, pale, surround),
    "pneumoniamnist": (unchanged, bend_gamma, add_texture, add_margins),
}


class Model:
    """A model with the weights of both tasks' classes."""

    def __init__(self, name: str) -> None:
        random = name == "random"
        torch.manual_seed(0)
        self.name = name
        self.model, self.preprocess, self.tokenise = load("biomedclip-mini", random_init=True) if random else load(name)

    @torch.inference_mode()
    def score(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """(N, C) cosines."""
        pixels = torch.stack([self.preprocess(Image.fromarray(picture)) for picture in pictures])
        model: Any = self.model
        images = torch.cat([model.encode_image(part, normalize=True) for part in pixels.split(64)])
        found: np.ndarray = (images @ model.encode_text(self.tokenise(list(prompts)), normalize=True).T).numpy()
        return found


def read_validation(task: str) -> tuple[list[np.ndarray], np.ndarray]:
    """RGB pictures and class numbers of a bundled set's validation split."""
    manifest = read_other_split(find_task(task), SAMPLE / task, "val")
    labels = list(PROMPTS[task])
    pictures = [np.asarray(read_rgb(manifest, row)) for row in manifest.rows]
    return pictures, np.array([labels.index(row.labels[0]) for row in manifest.rows])


def balanced_accuracy(cosines: np.ndarray, y: np.ndarray) -> float:
    """Mean over classes of the share of right answers."""
    right = cosines.argmax(1) == y
    return float(np.mean([right[y == label].mean() for label in np.unique(y)]))


def main() -> None:
    """Print a line for each picture set and change, and the figures of the first model beside the last one's."""
    names = os.environ.get("MODELS", "biomedclip-mini random").split()
    models = [Model(name) for name in names]
    figures: dict[str, float] = {}
    for task, changes in CHANGES.items():
        pictures, y = read_validation(task)
        for change in changes:
            rng = np.random.default_rng(0)
            changed = [change(picture, rng) for picture in pictures]
            values = [balanced_accuracy(model.score(changed, list(PROMPTS[task].values())), y) for model in models]
            show(f"{task} {change.__name__}", len(y), names, values, figures)
        if task == "pneumoniamnist":
            values = [balanced_accuracy(model.score(pictures, PARAPHRASE), y) for model in models]
            show(f"{task} paraphrased", len(y), names, values, figures)
    if FILMS.is_dir():
        paths = [FILMS / f"synpic{number}.jpg" for number in f"{OPACITY} {CLEAR}".split()]
        films = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
        y = np.r_[np.ones(len(OPACITY.split()), int), np.zeros(len(CLEAR.split()), int)]
        scores = [model.score(films, list(PROMPTS["pneumoniamnist"].values())) for model in models]
        show("vqa_rad auroc", len(y), names, [auroc(y, score[:, 1] - score[:, 0]) for score in scores], figures)
    else:
        print(f"{FILMS} is missing: the chest films of VQA-RAD are left out", file=sys.stderr)
    print(json.dumps({"benchmark": "mini", "figures": figures}))


def show(what: str, n: int, names: Sequence[str], values: Sequence[float], figures: dict[str, float]) -> None:
    """One line of the table; the first and the last value are kept."""
    told = "  ".join(f"{name} {value:.3f}" for name, value in zip(names, values, strict=True))
    print(f"{what:<28} n = {n:<4} {told}")
    key = what.replace(" ", "_")
    figures[key], figures[f"{key}_peer"] = round(values[0], 4), round(values[-1], 4)


if __name__ == "__main__":
    main()
