"""Pixels and words of a training sample, step by step, beside open_clip's and MONAI's in the same process.

Pictures are made up: 600 x 450 px, JPEG quality 90, about 70 kB; views of 224 px. Each preset is timed from bytes to
pixels, and after decoding; beside them open_clip's training transform and the MONAI transforms whose formulas the
presets use. Captions are those of ../shared/data (ROCO, CC BY), tokenised with a small WordPiece vocabulary made of
them and padded to 256, and matched against 75,000 n-grams; left out, and said so, where that folder is missing. All
rates are by CPU time of one core; rounds are interleaved and medians printed.
"""

import csv
import io
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image

from biomedclip.stream.augment import augment
from biomedclip.stream.decode import Geometry, read_reduced
from biomedclip.stream.presets import PRESETS, find_preset

sys.path.insert(0, str(Path(__file__).parent))

PEERS = ()
ROUNDS, PICTURES, SIZE_PX, CONTEXT = 5, 8, 224, 256
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def medians(jobs: dict[str, tuple[Callable[[], object], int]]) -> dict[str, float]:
    """Name -> items a second of CPU time, of jobs that each do so many items; rounds interleaved."""
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for job, _ in jobs.values():
        job()
    for _ in range(ROUNDS):
        for name, (job, items) in jobs.items():
            start = time.process_time()
            job()
            rates[name].append(items / (time.process_time() - start))
    return {name: statistics.median(found) for name, found in rates.items()}


def make_picture(seed: int) -> bytes:
    """A smooth picture with some grain, as JPEG."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 255, (37, 50, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((600, 450), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = random.normal(0, 2, smooth.shape).astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def measure_pixels() -> dict[str, float]:
    """Pictures a second by preset and of open_clip's training transform; MONAI's milliseconds a picture."""
    from monai.transforms import RandAdjustContrast, RandAffine, RandBiasField, RandGaussianNoise
    from open_clip.transform import image_transform

    pictures = [make_picture(seed) for seed in range(PICTURES)]
    geometry = Geometry(size_px=SIZE_PX)
    theirs = image_transform(SIZE_PX, is_train=True, mean=(0, 0, 0), std=(1, 1, 1))
    jobs: dict[str, tuple[Callable[[], object], int]] = {
        "open_clip": (lambda: [theirs(Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures], PICTURES)
    }
    for name in PRESETS:
        change = find_preset(name)
        reduced = [read_reduced(data, "jpg", geometry, change) for data in pictures]

        def whole(change=change) -> None:
            for place, data in enumerate(pictures):
                augment(read_reduced(data, "jpg", geometry, change), geometry, change, facts=(0, place))

        def after(change=change, reduced=reduced) -> None:
            for place, picture in enumerate(reduced):
                augment(picture, geometry, change, facts=(0, place))

        jobs |= {name: (whole, PICTURES), f"{name}_decoded": (after, PICTURES)}
    image = torch.rand(1, SIZE_PX, SIZE_PX)
    monai = {
        "bias_field": RandBiasField(prob=1), "gamma": RandAdjustContrast(prob=1), "noise": RandGaussianNoise(prob=1),
        "affine": RandAffine(prob=1, rotate_range=0.1, scale_range=0.1, padding_mode="border"),
    }  # fmt: skip
    for name, transform in monai.items():
        jobs[f"monai_{name}"] = (lambda transform=transform: [transform(image) for _ in range(4)], 4)
    rates = medians(jobs)
    figures = {f"{name}_images_s": rates[name] for name in ("open_clip", *PRESETS)}
    figures |= {f"{name}_decoded_ms": 1e3 / rates[f"{name}_decoded"] for name in PRESETS}
    figures |= {f"monai_{name}_ms": 1e3 / rates[f"monai_{name}"] for name in monai}
    return figures | {"figure_vs_open_clip": rates["figure"] / rates["open_clip"]}


def measure_words(folder: Path) -> dict[str, float]:
    """Captions a second through tokenisers and MetaCLIP's matching."""
    from open_clip import get_tokenizer
    from open_clip.tokenizer import HFTokenizer
    from stream_data import write_wordpiece

    from biomedclip.stream.metaclip import Entries, read_terms
    from biomedclip.stream.text import fast_tokenise

    source = SHARED / "roco_captions_ccby.csv"
    if not source.exists():
        print(f"{SHARED} is missing: words are left out", file=sys.stderr)
        return {}
    with source.open(encoding="utf-8", newline="") as file:
        captions = [row["caption"] for row in csv.DictReader(file)][:2048]
    bert = HFTokenizer(str(write_wordpiece(folder, captions)), context_length=CONTEXT)
    clip = get_tokenizer("ViT-B-32")
    batches = [captions[first : first + 64] for first in range(0, len(captions), 64)]
    entries = Entries(read_terms(str(SHARED / "multicare_ngrams.csv")))
    ours_bert, ours_clip = fast_tokenise(bert), fast_tokenise(clip)
    if not torch.equal(ours_bert(captions), bert(captions)) or not torch.equal(ours_clip(captions), clip(captions)):
        raise SystemExit("the tokenisers differ")
    count = len(captions)
    rates = medians({
        "bert": (lambda: [ours_bert(batch) for batch in batches], count),
        "bert_open_clip_batch": (lambda: [bert(batch) for batch in batches], count),
        "bert_open_clip_single": (lambda: [bert(caption) for caption in captions], count),
        "clip": (lambda: [ours_clip(batch) for batch in batches], count),
        "clip_open_clip_batch": (lambda: [clip(batch) for batch in batches], count),
        "metaclip": (lambda: [entries.match(caption) for caption in captions], count),
    })  # fmt: skip
    figures = {f"{name}_captions_s": rate for name, rate in rates.items()}
    figures["tokens_vs_open_clip_batch"] = rates["bert"] / rates["bert_open_clip_batch"]
    return figures | {"tokens_vs_open_clip_single": rates["bert"] / rates["bert_open_clip_single"]}


def main() -> None:
    """Print the figures, last as one JSON line."""
    import tempfile

    warnings.simplefilter("ignore")
    figures = measure_pixels()
    with tempfile.TemporaryDirectory() as folder:
        figures |= measure_words(Path(folder))
    for name, value in figures.items():
        print(f"{name:<32} {value:10.2f}", file=sys.stderr)
    rounded = {name: round(value, 3) for name, value in figures.items()}
    print(json.dumps({"benchmark": "pixels", "figures": rounded}))


if __name__ == "__main__":
    main()
