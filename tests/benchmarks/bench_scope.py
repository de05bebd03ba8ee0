"""Does the bundled model's scope tell pictures apart that it was not made for: AUROC and shares flagged, with n.

Inside are the test splits of the bundled blood cells and chest X-rays, which no part of the scope has seen. Outside are
flat pictures, noise, lines of text, crops of scikit-learn's two photographs, and, where ../shared/data is there, brain
MRI and lung histology; sets that are missing are named. MODEL=name measures another model that has a calibration. The
peer is the largest probability (Hendrycks and Gimpel 2017) over both tasks' labels, from the same embeddings.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from biomedclip.evaluation.embed import embed_texts, logit_scale_of
from biomedclip.evaluation.metrics import auroc
from biomedclip.evaluation.ood import msp
from biomedclip.evaluation.prompts import compile_prompts
from biomedclip.evaluation.splits import read_split
from biomedclip.evaluation.tasks import find_task
from biomedclip.evaluation.zero_shot import class_weights
from biomedclip.layouts import read_rgb
from biomedclip.models.calibration import read_calibration
from biomedclip.models.load import load

PEERS = ()
SAMPLE = Path(str(resources.files("data_builders"))) / "sample"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
INSIDE = {"bccd": SAMPLE / "bccd", "pneumoniamnist": SAMPLE / "pneumoniamnist"}
PER_SET = 300


def say(text: str) -> None:
    """Talk goes to standard error; the last line of standard output is the result."""
    print(text, file=sys.stderr, flush=True)


def flat(rng: np.random.Generator) -> Iterator[Image.Image]:
    """One colour each, black and white among them."""
    for value in [(0, 0, 0), (255, 255, 255), *rng.integers(0, 256, (98, 3)).tolist()]:
        yield Image.new("RGB", (128, 128), tuple(value))


def noise(rng: np.random.Generator) -> Iterator[Image.Image]:
    """Grains of 1 to 32 px, coloured or grey."""
    for number in range(200):
        side = int(rng.choice([4, 8, 16, 32, 128]))
        pixels = rng.integers(0, 256, (side, side, 1 if number % 2 else 3), dtype=np.uint8)
        yield Image.fromarray(np.broadcast_to(pixels, (side, side, 3)).copy()).resize(
            (128, 128), Image.Resampling.NEAREST
        )


def text(rng: np.random.Generator) -> Iterator[Image.Image]:
    """Black lines on white, as a screenshot has them."""
    words = "patient report image of the and result table value left right not a normal date page".split()
    for _ in range(100):
        page = Image.new("RGB", (320, 240), (255, 255, 255))
        draw = ImageDraw.Draw(page)
        for line in range(0, 230, int(rng.integers(12, 22))):
            draw.text((4, line), " ".join(rng.choice(words, 9)), fill=(0, 0, 0))
        yield page


def photographs(rng: np.random.Generator) -> Iterator[Image.Image]:
    """Crops of a temple and of a flower."""
    from sklearn.datasets import load_sample_images

    pair = load_sample_images().images
    for number in range(200):
        pixels = pair[number % 2]
        side = int(rng.integers(96, 400))
        top, left = rng.integers(0, pixels.shape[0] - side), rng.integers(0, pixels.shape[1] - side)
        yield Image.fromarray(pixels[top : top + side, left : left + side])


def folder(path: Path, pattern: str) -> Iterator[Image.Image]:
    """Pictures spread evenly over a folder's files."""
    files = sorted(path.glob(pattern))
    for place in np.unique(np.linspace(0, len(files) - 1, min(PER_SET, len(files))).round().astype(int)):
        with Image.open(files[place]) as picture:
            yield picture.convert("RGB")


def task_pictures(name: str) -> Iterator[Image.Image]:
    """The test split of a task, evenly thinned to the size of a set."""
    manifest = read_split(find_task(name), INSIDE[name])
    for place in np.unique(np.linspace(0, len(manifest.rows) - 1, PER_SET).round().astype(int)):
        yield read_rgb(manifest, manifest.rows[place])


def main() -> None:
    """Print each set's figures and the JSON line."""
    name = os.environ.get("MODEL", "biomedclip-mini")
    known = read_calibration(name)
    if known is None or known.facts.scope is None:
        raise SystemExit(f"{name} has no scope: run biomedclip models calibrate")
    model, preprocess, tokenizer = load(name)
    prompts = [sentences for task in INSIDE for sentences in compile_prompts(find_task(task)).values()]
    weights = class_weights([embed_texts(model, tokenizer, sentences) for sentences in prompts])
    scale = logit_scale_of(model) / known.temperature

    def embed(pictures: Iterator[Image.Image]) -> Any:
        with torch.inference_mode():
            parts = [model.encode_image(preprocess(p)[None], normalize=True)[0].numpy() for p in pictures]
        return np.stack(parts)

    rng = np.random.default_rng(0)
    inside = {task: embed(task_pictures(task)) for task in INSIDE}
    sets = {"flat": flat(rng), "noise": noise(rng), "text": text(rng), "photographs": photographs(rng)}
    for title, place, pattern in (
        ("brain_mri", "brain_tumor_mri_128", "Testing/*/*.jpg"), ("histology", "lc25000_lung_128", "**/*.jp*g")
    ):  # fmt: skip
        if (SHARED / place).is_dir():
            sets[title] = folder(SHARED / place, pattern)
        else:
            say(f"no {SHARED / place}: {title} is not measured")
    home = np.concatenate(list(inside.values()))
    own, sure = known.scope_scores(home), msp(home @ weights.T, scale)
    figures: dict[str, Any] = {
        f"flagged_{task}": round(float(known.outside(vectors).mean()), 4) for task, vectors in inside.items()
    }
    say(f"inside: n = {', '.join(f'{len(v)} {t}' for t, v in inside.items())}; flagged {figures}")
    for title, pictures in sets.items():
        vectors = embed(pictures)
        belongs = np.arange(len(home) + len(vectors)) < len(home)
        area = auroc(belongs, np.concatenate([own, known.scope_scores(vectors)]))
        peer = auroc(belongs, np.concatenate([sure, msp(vectors @ weights.T, scale)]))
        flagged = float(known.outside(vectors).mean())
        say(f"{title}: n = {len(vectors)}, AUROC {area:.3f} (largest probability {peer:.3f}), flagged {flagged:.3f}")
        figures |= {f"auroc_{title}": round(float(area), 4), f"flagged_{title}": round(flagged, 4)}
    print(json.dumps({"benchmark": "scope", "figures": figures}))


if __name__ == "__main__":
    main()
