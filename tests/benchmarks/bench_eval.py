"""Evaluation beside clip_benchmark, and what intervals, retrieval and adapters cost at full size.

Zero-shot: one open_clip ViT-B-32 with random weights (a fixed seed; speed and agreement need no good model) on the 176
test crops of the bundled blood cells, four prompts a class. Ours is the whole command: manifest, checks, prompts,
embeddings, scores, 2,000 bootstrap resamples, result file. The peer is clip_benchmark's own functions, its data loader
with four workers; it gives accuracies without intervals. Both compute in float32 (`zero_shot_vs_clip_benchmark`), and
both in bfloat16 as well (`..._amp`) where the processor has it: automatic mixed precision is how the peer comes, and
elsewhere takes ten times longer. Same model object, same process, rounds interleaved, medians of images per second.
Agreement is the largest difference in accuracy and balanced accuracy in float32.

Beside it the machine's rate of the same tower's matrix products alone: what is left to gain is the difference.

Full size, each in a process of its own for its peak memory: 2,000 resamples of balanced accuracy and macro AUROC of
1,000,000 samples x 100 classes; ranks of 100,000 x 100,000 embeddings of 512; GDA, Tip-Adapter, LP++ and the linear
probe swept on 10,000 x 512 features. EVAL_BENCH_SCALE=0.1 makes those sizes ten times smaller, for a first look;
EVAL_BENCH_PARTS=zero_shot,adapters runs some parts only.

The peer is installed without its dependencies, which are ours already, and imported beside them.
"""

import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PEERS = ("--no-deps", "clip-benchmark==1.6.2")
ROUNDS = 3
SCALE = float(os.environ.get("EVAL_BENCH_SCALE", "1"))
SAMPLE = Path(__file__).resolve().parents[2] / "data_builders" / "sample" / "bccd"
CLASSES = {"Platelets": "platelet", "RBC": "red blood cell", "WBC": "white blood cell"}
TEMPLATES = ["{}", "a microscopy image of a {}", "a light micrograph showing a {}", "a {} in a stained blood smear"]


def peak_gb() -> float:
    """Largest memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def unit(random: np.random.Generator, count: int, size: int) -> np.ndarray:
    """`count` float32 vectors of length 1."""
    vectors = random.standard_normal((count, size), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def measure_bootstrap() -> dict[str, float]:
    """Seconds and memory of intervals of a million samples of 100 classes."""
    from biomedclip.evaluation.scores import ClassScores, statistics_of
    from biomedclip.evaluation.statistics import Resampler, bootstrap

    random = np.random.default_rng(0)
    count, classes = int(1_000_000 * SCALE), 100
    y = random.integers(0, classes, count)
    cosines = random.standard_normal((count, classes), dtype=np.float32) / 10
    cosines[np.arange(count), y] += 0.1
    scores = ClassScores(
        sample_ids=tuple(map(str, range(count))), group_ids=None, classes=tuple(map(str, range(classes))), y=y,
        cosines=cosines, logit_scale=100.0,
    )  # fmt: skip
    start = time.perf_counter()
    resampler = Resampler(count, y=y, resamples=2000)
    found = bootstrap(statistics_of(scores, ("balanced_accuracy", "auroc"), resampler), resampler)
    seconds = time.perf_counter() - start
    if any(interval.reason for interval in found.values()):
        raise SystemExit(f"no interval: {found}")
    return {"bootstrap_1m_s": round(seconds, 1), "bootstrap_1m_gb": round(peak_gb(), 2)}


def measure_retrieval() -> dict[str, float]:
    """Seconds and memory of the ranks of 100,000 queries among 100,000 candidates."""
    from biomedclip.evaluation.retrieval import rank_candidates

    random = np.random.default_rng(0)
    count = int(100_000 * SCALE)
    images = unit(random, count, 512)
    texts = images + 0.06 * random.standard_normal(images.shape, dtype=np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    start = time.perf_counter()
    found = rank_candidates(images, texts, np.arange(count), np.arange(count))
    seconds = time.perf_counter() - start
    if np.isnan(found.ranks).any():
        raise SystemExit("a query has no rank")
    return {"retrieval_100k_s": round(seconds, 1), "retrieval_100k_gb": round(peak_gb(), 2)}


def measure_adapters() -> dict[str, float]:
    """Seconds of fitting, hyper-parameters swept on 2,000 validation samples, to 10,000 features of 512."""
    from biomedclip.evaluation.adapters.features import Features, Selection
    from biomedclip.evaluation.adapters.gda import fit_gda
    from biomedclip.evaluation.adapters.linear import fit_linear
    from biomedclip.evaluation.adapters.lpp import fit_lpp
    from biomedclip.evaluation.adapters.tip import fit_tip

    random = np.random.default_rng(0)
    centres = unit(random, 10, 512)

    def make(count: int, split: str) -> Features:
        y = np.arange(count) % 10
        vectors = 0.12 * centres[y] + random.standard_normal((count, 512)) / np.sqrt(512)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return Features(vectors=vectors.astype(np.float32), y=y, num_classes=10, split=split)

    train, selection = make(int(10_000 * SCALE), "train"), Selection(features=make(int(2_000 * SCALE), "val"))
    seconds = {}
    for name, fit in (("gda", fit_gda), ("tip", fit_tip), ("linear_probe", fit_linear), ("lpp", fit_lpp)):
        start = time.perf_counter()
        fit(train, selection, text=centres)
        seconds[f"{name}_10k_s"] = round(time.perf_counter() - start, 2)
    return seconds


def measure_zero_shot() -> dict[str, float]:
    """Images per second of both sides and how far their accuracies are apart."""
    import open_clip
    import torch
    from sklearn.metrics import balanced_accuracy_score

    from biomedclip.config import check_config
    from biomedclip.evaluation.config import EvaluateConfig
    from biomedclip.evaluation.evaluate import evaluate

    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32")
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    model.eval()
    facts = {"model": "bench", "tasks": ["bccd"], "data": {"bccd": str(SAMPLE)}, "device": "cpu"}
    configs = {precision: check_config({**facts, "precision": precision}, EvaluateConfig, "bench")
               for precision in ("float32", "bfloat16")}  # fmt: skip
    peer = load_peer()
    folder = [p for label in CLASSES for p in sorted((SAMPLE / "test" / label).glob("*.jpg"))]
    number = {label: c for c, label in enumerate(CLASSES)}

    def run_ours(precision: str) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as out:
            result = evaluate(configs[precision], out, model=(model, preprocess, tokenizer))[0]
        return {name: result.metrics[name]["value"] for name in ("accuracy", "balanced_accuracy")}

    def run_peer(amp: bool) -> dict[str, float]:
        images = _Folder(folder, number, preprocess)
        loader = torch.utils.data.DataLoader(images, batch_size=64, num_workers=4, shuffle=False)
        templates = [template.replace("{}", "{c}") for template in TEMPLATES]
        with contextlib.redirect_stderr(io.StringIO()):
            weights = peer.zero_shot_classifier(model, tokenizer, list(CLASSES.values()), templates, "cpu", amp=amp)
            logits, target = peer.run_classification(model, weights, loader, "cpu", amp=amp)
        # Its own accuracy() fails with numpy 2.4; what it computes is this.
        predicted = logits.argmax(axis=1)
        return {"accuracy": float((predicted == target).float().mean()),
                "balanced_accuracy": float(balanced_accuracy_score(target, predicted))}  # fmt: skip

    runs = {
        "ours": lambda: run_ours("float32"), "peer": lambda: run_peer(False),
        "ours_amp": lambda: run_ours("bfloat16"), "peer_amp": lambda: run_peer(True),
    }  # fmt: skip
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        runs = {name: run for name, run in runs.items() if not name.endswith("_amp")}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    values: dict[str, dict[str, float]] = {}
    for round_number in range(ROUNDS + 1):  # the first round pays for imports and caches, and is not counted
        for name, run in runs.items():
            start = time.perf_counter()
            values[name] = run()
            if round_number:
                rates[name].append(len(folder) / (time.perf_counter() - start))
    rate = {name: statistics.median(each) for name, each in rates.items()}
    difference = max(abs(values["ours"][m] - values["peer"][m]) for m in values["ours"])
    pairs = {"": ("ours", "peer"), "_amp": ("ours_amp", "peer_amp")}
    return {
        **{
            f"zero_shot_vs_clip_benchmark{suffix}": round(rate[ours] / rate[theirs], 2)
            for suffix, (ours, theirs) in pairs.items()
            if ours in rate
        },
        "zero_shot_abs_diff": difference,
        **{f"zero_shot_{name}_images_per_s": round(value, 1) for name, value in rate.items()},
    }


class _Folder:
    """The peer's data set: what torchvision's ImageFolder does, with `classes` as clip_benchmark asks for."""

    def __init__(self, paths: list[Path], number: dict[str, int], preprocess) -> None:
        self.paths, self.number, self.preprocess, self.classes = paths, number, preprocess, list(number)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            return self.preprocess(image.convert("RGB")), self.number[self.paths[index].parent.name]


def load_peer():
    """clip_benchmark's zero-shot module, out of the peer's environment."""
    packages = next(Path(os.environ["PEER_PYTHON"]).parents[1].glob("lib/python*/site-packages"))
    sys.path.append(str(packages))
    from clip_benchmark.metrics import zeroshot_classification

    return zeroshot_classification


def measure_products() -> dict[str, float]:
    """GFLOP/s of the four products of a ViT-B/32 layer over 64 pictures, as torch multiplies and as packed weights do,
    and of numpy's: what the zero-shot rate (8.8 GFLOP a picture) can reach at most."""
    import torch

    from biomedclip.evaluation.packed import packing

    shapes = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
    inputs = [torch.randn(64 * 50, wide) for wide, _ in shapes]
    plain, packed = (torch.nn.ModuleList(torch.nn.Linear(*shape, bias=False) for shape in shapes) for _ in range(2))
    flops = sum(2 * len(x) * layer.weight.numel() for x, layer in zip(inputs, plain, strict=True))
    weights = [layer.weight.detach().numpy().T for layer in plain]

    def multiply(layers: torch.nn.ModuleList) -> None:
        for x, layer in zip(inputs, layers, strict=True):
            layer(x)

    runs = {
        "plain": lambda: multiply(plain), "packed": lambda: multiply(packed),
        "numpy": lambda: [x.numpy() @ weight for x, weight in zip(inputs, weights, strict=True)],
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode(), packing(packed, "cpu"):
        for _ in range(6):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    return {f"products_{name}_gflops": round(flops / min(each) / 1e9, 1) for name, each in seconds.items()}


PARTS = {
    "zero_shot": measure_zero_shot, "products": measure_products, "bootstrap": measure_bootstrap,
    "retrieval": measure_retrieval, "adapters": measure_adapters,
}  # fmt: skip


def main() -> None:
    """Each part in a process of its own; one JSON line at the end."""
    if len(sys.argv) == 2:
        print(json.dumps(PARTS[sys.argv[1]]()))
        return
    figures: dict[str, float] = {"scale": SCALE}
    for name in os.environ.get("EVAL_BENCH_PARTS", ",".join(PARTS)).split(","):
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        figures |= json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{name}: {done.stdout.strip().splitlines()[-1]}", file=sys.stderr)
    print(json.dumps({"benchmark": "eval", "figures": figures}))


if __name__ == "__main__":
    main()
