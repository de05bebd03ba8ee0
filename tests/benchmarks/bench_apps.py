"""Tools of every day: classify beside a plain open_clip loop, time to the first answer, search over a million vectors.

Pictures are 1,000 small ones of the bundled samples (blood cells of 96 px as JPEG, chest X-rays of 28 px as PNG). The
loop is what people write: open, open_clip's own transform, stack, `encode_image`, softmax, with the same weights, in
batches of 64, once in the main process and once behind a DataLoader of two workers; ours is compared with the faster.
Both have the model loaded and start from file names. All run in turns on two cores, and the middle round counts.
Weights are mini's where they are there, else random ones of its architecture, which take as long. The first answer is a
command in a process of its own: the best of three, because it says what the command costs and not what else goes on.

APPS_BENCH_IMAGES=200 takes fewer pictures, for a first look.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from search_speed import measure_search
from torch.utils.data import DataLoader

from biomedclip.app.classify import BATCH, Classifier
from biomedclip.app.encoder import Encoder
from biomedclip.app.pictures import find_sources
from biomedclip.app.questions import ask_labels
from biomedclip.errors import CheckpointError
from biomedclip.models.export import export_open_clip
from biomedclip.models.load import find_origin, load
from biomedclip.models.preprocess import open_clip_config

PEERS = ()
ROUNDS = 5
IMAGES = int(os.environ.get("APPS_BENCH_IMAGES", "1000"))
MINI = "biomedclip-mini"
LABELS = "white blood cell,red blood cell,platelet,normal lungs,pneumonia"
SAMPLE = Path(__file__).resolve().parents[2] / "data_builders" / "sample"


def write_pictures(folder: Path) -> list[Path]:
    """Copies of the sample's pictures as files, nine cells to one X-ray."""
    cells = sorted((SAMPLE / "bccd").rglob("*.jpg"))
    films = np.load(SAMPLE / "pneumoniamnist" / "pneumoniamnist.npz")["test_images"]
    paths = []
    for number in range(IMAGES):
        paths.append(folder / f"{number:04d}.{'png' if number % 10 == 0 else 'jpg'}")
        if number % 10 == 0:
            Image.fromarray(films[number // 10 % len(films)]).save(paths[-1])
        else:
            paths[-1].write_bytes(cells[number % len(cells)].read_bytes())
    return paths


def find_model(folder: Path) -> str:
    """mini, or a folder with random weights of its architecture."""
    try:
        load(MINI)
    except CheckpointError:
        torch.manual_seed(0)
        model = load(MINI, random_init=True)[0]
        return str(export_open_clip(model, folder, model_cfg=find_origin(MINI, random_init=True).model_cfg))
    return MINI


class Loop:
    """The plain loop: the same network, open_clip's transform of its preprocess_cfg."""

    def __init__(self, name: str, workers: int) -> None:
        self.model, own, tokenizer = load(name)
        config = open_clip.transform.PreprocessCfg(**open_clip_config(own))
        self.preprocess = open_clip.transform.image_transform_v2(config, is_train=False)
        self.workers = workers
        with torch.inference_mode():
            prompts = [sentence for said in ask_labels(LABELS).prompts.values() for sentence in said]
            vectors = self.model.encode_text(tokenizer(prompts), normalize=True)
            means = vectors.view(len(LABELS.split(",")), -1, vectors.shape[1]).mean(1)
        self.weights = torch.nn.functional.normalize(means, dim=-1)

    def __getitem__(self, path: Path) -> torch.Tensor:
        return self.preprocess(Image.open(path).convert("RGB"))

    def batches(self, paths: list[Path]):
        """Stacked pictures."""
        if self.workers:
            yield from DataLoader(self, batch_size=64, sampler=paths, num_workers=self.workers)
            return
        for start in range(0, len(paths), 64):
            yield torch.stack([self[path] for path in paths[start : start + 64]])

    def __call__(self, paths: list[Path]) -> np.ndarray:
        """(N, C) probabilities."""
        with torch.inference_mode():
            rows = [
                (self.model.logit_scale.exp() * self.model.encode_image(batch, normalize=True) @ self.weights.T)
                .softmax(-1).numpy()
                for batch in self.batches(paths)
            ]  # fmt: skip
        return np.concatenate(rows)


def make_ours(name: str, fast: bool) -> Callable[[list[Path]], np.ndarray]:
    """Our classifier as a function of file names."""
    classifier = Classifier(Encoder(name, fast=fast), ask_labels(LABELS))
    classifier.calibration = None  # the loop has no temperature

    def classify(paths: list[Path]) -> np.ndarray:
        sources = find_sources([str(path) for path in paths]).files
        return np.stack([row.probabilities for row in classifier.classify(sources)])

    return classify


def measure_classify(folder: Path) -> dict[str, float]:
    """Ratios of images per second, and rates."""
    paths, name = write_pictures(folder), find_model(folder / "model")
    runners = {
        "loop": Loop(name, 0), "loop, 2 workers": Loop(name, 2),
        "classify": make_ours(name, fast=False), "classify --fast": make_ours(name, fast=True),
    }  # fmt: skip
    wanted = {key: run(paths[:64]) for key, run in runners.items()}  # warm, and the same answers
    for key, found in wanted.items():
        off = float(np.abs(found - wanted["loop"]).max())
        print(f"{key:<16} probabilities off by at most {off:.1e}")
        if off > (0.2 if key.endswith("fast") else 1e-3):
            raise SystemExit(f"{key} gives other answers")
    seconds: dict[str, list[float]] = {key: [] for key in runners}
    for _ in range(ROUNDS):
        for key, run in runners.items():
            begun = time.perf_counter()
            run(paths)
            seconds[key].append(time.perf_counter() - begun)
    rates = {key: len(paths) / statistics.median(values) for key, values in seconds.items()}
    for key, rate in rates.items():
        print(f"{key:<16} {rate:7.1f} images/s, rounds {', '.join(f'{len(paths) / s:.0f}' for s in seconds[key])}")
    peer = max(rates["loop"], rates["loop, 2 workers"])
    return {
        "classify_vs_open_clip": round(rates["classify"] / peer, 3),
        "classify_fast_vs_open_clip": round(rates["classify --fast"] / peer, 3),
        "classify_images_s": round(rates["classify"], 1),
        "classify_fast_images_s": round(rates["classify --fast"], 1),
        "open_clip_images_s": round(peer, 1),
        **measure_phases(paths[:320], name),
        "first_answer_s": measure_first_answer(name),
    }


def measure_phases(paths: list[Path], name: str) -> dict[str, float]:
    """Milliseconds of one thread for a picture: read and decoded, prepared, embedded; as it is and fast."""
    figures: dict[str, float] = {}
    torch.set_num_threads(1)
    for kind, fast in (("", False), ("_fast", True)):
        encoder = Encoder(name, fast=fast, lite=True)
        seconds: dict[str, list[float]] = {"read": [], "prepare": [], "embed": []}
        for _ in range(3):
            begun = time.perf_counter()
            pictures = [p for s in find_sources(list(map(str, paths))).files for p in s.read(encoder.at_least_px)]
            read = time.perf_counter()
            tensors = [encoder.prepare(picture.image) for picture in pictures]
            prepared = time.perf_counter()
            for start in range(0, len(tensors), BATCH):
                encoder.encode(tensors[start : start + BATCH])
            embedded = time.perf_counter()
            for phase, spent in zip(seconds, (read - begun, prepared - read, embedded - prepared), strict=True):
                seconds[phase].append(spent)
        for phase, spent in seconds.items():
            figures[f"{phase}{kind}_ms"] = round(1e3 * statistics.median(spent) / len(paths), 2)
    torch.set_num_threads(2)
    print("phases           " + ", ".join(f"{phase} {ms}" for phase, ms in figures.items()))
    return figures


def measure_first_answer(name: str) -> float:
    """Seconds from the command to its end, one picture; the best of three."""
    command = [sys.executable, "-m", "biomedclip", "classify", "sample://xray", "--labels", LABELS, "--model", name]
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - begun)
    print(f"first answer     {', '.join(f'{s:.2f}' for s in seconds)} s")
    return round(min(seconds), 2)


def main() -> None:
    """Measure and print."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure_classify(Path(folder))
    figures |= measure_search()
    print(json.dumps({"benchmark": "apps", "figures": figures}))


if __name__ == "__main__":
    main()
