"""What each method against forgetting keeps and gains: lung histology first, then brain MRI, on real pictures.

A small CLIP (the demo's architecture, 64 px, random start) learns three classes of LC25000 lung tiles until it is good,
and is then adapted to four classes of brain MRI slices by each method with the same steps, batches and learning rate.
Scored zero-shot by prompts: balanced accuracy on lung (old) and on brain (new), on test splits that share no
augmentation group (LC25000) and no duplicate group (MRI) with training, with a bootstrap over those groups. `kept` is
old / old before, `gained` the share of the naive run's gain on brain. What is chosen (WiSE-FT's alpha) is chosen on the
validation splits. One run, one seed: differences within the intervals mean nothing.

Needs ../shared/data and says so where it is missing. The built datasets stay in .bench/continual. QUICK=1 takes a third
to a half of the steps.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from biomedclip.config import check_config
from biomedclip.evaluation.evaluate import Encoder
from biomedclip.evaluation.prompts import compile_prompts
from biomedclip.evaluation.scores import measure
from biomedclip.evaluation.splits import read_split
from biomedclip.evaluation.tasks import Task
from biomedclip.models.load import load
from biomedclip.training.config import TrainConfig
from biomedclip.training.train import train
from biomedclip.training.validation import Probe
from biomedclip.training.wise import interpolate
from data_builders.build import BuildConfig, build
from data_builders.labels.recipe import load_recipe

PEERS = ()
ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
CACHE = ROOT / ".bench" / "continual"
QUICK = bool(os.environ.get("QUICK"))
OLD_STEPS, NEW_STEPS = (100, 50) if QUICK else (200, 150)
BATCH, OLD_RATE, NEW_RATE = 64, 3e-3, 1e-3
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

SETS = {"lung": ("lc25000_lung", "lc25000_lung_128"), "brain": ("brain_tumor_mri", "brain_tumor_mri_128")}
TEMPLATES = {
    "lung": ["{}", "an H&E histopathology tile of {}", "a light micrograph of {}", "histology of {}"],
    "brain": ["{}", "a brain MRI slice showing {}", "an MRI scan of the head: {}", "a magnetic resonance image of {}"],
}
REPLAY = {"name": "lung", "path": str(CACHE / "lung"), "balance": True, "weight": 1}

METHODS: dict[str, dict[str, Any]] = {
    "naive": {},
    "replay": {"replay": 1 / 3},
    "replay_tenth": {"replay": 1 / 9},
    "modx": {"continual": {"modx": {"weight": 20}}},
    "zscl": {"continual": {"zscl": {"weight": 1, "path": str(CACHE / "lung"), "num_texts": 64}}},
    "vr_lwf": {"continual": {"vr_lwf": {"weight": 1, "num_texts": 256}}},
    "l2_sp": {"continual": {"l2_sp": {"weight": 0.1}}},
    "frozen_bn": {"continual": {"freeze_batch_norm": True}},
}
"""Changes of the naive config. `replay` is the share of old pictures added to each new one: a quarter of every batch,
or a tenth. The others see no old pair; ZSCL sees old pictures and captions, not which belong together, and the rest see
nothing old at all. Weights are the authors' where they published some, else of the size of the contrastive loss."""


def build_sets() -> None:
    """The two dataset folders, built once: groups on one side, near copies across sides dropped from training."""
    for name, (recipe, folder) in SETS.items():
        out = CACHE / name
        if (out / "manifest.json").exists():
            continue
        CACHE.mkdir(parents=True, exist_ok=True)
        values = load_recipe(recipe).model_dump(mode="json", exclude_none=True)
        if name == "brain":  # the given split leaks: 354 duplicate groups lie in both of its parts
            values.pop("expect")
            values["split"] = {"val": 0.2, "test": 0.2, "of": "all"}
        path = CACHE / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        source = {"kind": "labels", "root": str(SHARED / folder), "recipe": str(path), "splits": None}
        build(check_config({"name": name, "licence": "all", "source": source}, BuildConfig, name), out)


def make_probe(name: str, split: str) -> Probe:
    """The zero-shot task of a set on one of its splits."""
    recipe = load_recipe(SETS[name][0])
    task = check_config(
        {
            "name": name, "suite": "bench", "title": recipe.title, "modality": recipe.modality, "kind": "zero_shot",
            "layout": {"type": "dataset_folder", "kind": "single", "splits": [split]}, "split": split,
            "classes": [{"label": entry.label, "name": entry.name} for entry in recipe.classes],
            "prompt_sets": {"default": {"source": "written for this benchmark", "templates": TEMPLATES[name]}},
            "metrics": {"primary": "balanced_accuracy"}, "licence": "not stated", "citation": recipe.citation,
            "contamination": "none: the model starts from random weights",
        },
        Task, name,
    )  # fmt: skip
    manifest = read_split(task, CACHE / name)
    return Probe(name=name, role="gain", task=task, manifest=manifest, prompts=compile_prompts(task))


class Scorer:
    """Scores of a model on lung and brain; pictures are decoded once."""

    def __init__(self) -> None:
        self.probes = {split: [make_probe(name, split) for name in SETS] for split in ("val", "test")}

    def score(self, model: tuple[Any, Any, Any], split: str) -> list[dict[str, float]]:
        """Value, interval and n of balanced accuracy on (lung, brain)."""
        encoder = Encoder("", *model, "cpu")
        found = []
        for probe in self.probes[split]:
            resamples = 1000 if split == "test" else 100
            facts = measure(probe.scores(encoder), ("balanced_accuracy",), resamples=resamples)
            found.append(facts["metrics"]["balanced_accuracy"])
        return found


def run_config(
    start: str | Path, sources: list[dict[str, Any]], steps: int, rate: float, **changes: Any
) -> TrainConfig:
    """The config of one run; all runs share everything but what is said here."""
    values = {
        "model": {"name": str(start), "init": "pretrained", "preprocess": {"resize_mode": "squash"}},
        "data": {"sources": sources},
        "max_steps": steps,
        "batch_size": BATCH,
        "optim": {"lr": rate, "weight_decay": 0.05},
        "schedule": {"warmup_steps": steps // 10},
        "loss": {"soft_targets": 1.0},
        "channels_last": True,
        "log_every_steps": steps,
        "checkpoints": {"every_minutes": 0, "keep_last": 1},
    }
    return check_config(values | changes, TrainConfig, "bench")


def adapt(method: dict[str, Any], start: Path, out: Path) -> Path:
    """Train one method from the old model on brain MRI; the folder of its weights."""
    sources = [{"name": "brain", "path": str(CACHE / "brain"), "balance": True}]
    if share := method.get("replay"):
        sources.append(REPLAY | {"weight": share})
    changes = {"continual": method["continual"]} if "continual" in method else {}
    folder = train(run_config(start, sources, NEW_STEPS, NEW_RATE, **changes), out).folder
    return folder / "ensemble" if "ensemble" in method.get("continual", {}) else folder / "final"


def measure_continual(say: Any = lambda line: None) -> list[dict[str, Any]]:
    """One row a method: old and new score with intervals, what was kept and what was gained. Empty without the data."""
    if not SHARED.is_dir():
        say(f"no {SHARED}: the methods against forgetting are not measured")
        return []
    build_sets()
    scorer = Scorer()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(_measure(Path(folder), scorer, say))
    start, naive = rows[0], next(row for row in rows if row["method"] == "naive")
    for row in rows:
        row["kept"] = row["old"] / start["old"]
        row["gained"] = (row["new"] - start["new"]) / (naive["new"] - start["new"])
    return rows


def _measure(folder: Path, scorer: Scorer, say: Any) -> Iterator[dict[str, Any]]:
    lung = [{"name": "lung", "path": str(CACHE / "lung"), "balance": True}]
    old = run_config("biomedclip-demo", lung, OLD_STEPS, OLD_RATE)
    old = old.model_copy(update={"model": old.model.model_copy(update={"init": "random"})})
    began = time.monotonic()
    start = train(old, folder / "old").final
    base = load(start)
    yield _row("start", scorer.score(base, "test"), time.monotonic() - began, say)
    before = scorer.score(base, "val")
    ends: dict[str, Path] = {}
    for name, method in METHODS.items():
        began = time.monotonic()
        ends[name] = adapt(method, start, folder / name)
        seconds = time.monotonic() - began
        yield _row(name, scorer.score(load(ends[name]), "test"), seconds, say)
    gain = scorer.score(load(ends["naive"]), "val")[1]["value"] - before[1]["value"]
    for name in ("naive", "replay", "zscl"):
        alpha = _choose_alpha(base, load(ends[name]), scorer, before, gain)
        mixed = _between(base, load(ends[name]), alpha)
        label = "wise_ft" if name == "naive" else f"{name}+wise_ft"
        yield _row(label, scorer.score(mixed, "test"), 0.0, say) | {"alpha": alpha}


def _choose_alpha(base: Any, end: Any, scorer: Scorer, before: list[dict[str, float]], gain: float) -> float:
    """The alpha whose smaller one of kept and gained is largest on the validation splits."""

    def worth(alpha: float) -> float:
        old, new = (entry["value"] for entry in scorer.score(_between(base, end, alpha), "val"))
        return min(old / before[0]["value"], (new - before[1]["value"]) / gain)

    return max(ALPHAS, key=worth)


def _between(base: Any, end: Any, alpha: float) -> tuple[Any, Any, Any]:
    import copy

    model = copy.deepcopy(end[0])
    model.load_state_dict(interpolate(base[0].state_dict(), end[0].state_dict(), alpha))
    return model, end[1], end[2]


def _row(method: str, scores: list[dict[str, Any]], seconds: float, say: Any) -> dict[str, Any]:
    old, new = scores
    row = {
        "method": method, "old": round(old["value"], 4), "new": round(new["value"], 4),
        "old_interval": [round(old[end], 3) for end in ("ci_low", "ci_high")],
        "new_interval": [round(new[end], 3) for end in ("ci_low", "ci_high")],
        "n_old": old["n"], "n_new": new["n"], "seconds": round(seconds, 1),
    }  # fmt: skip
    say(json.dumps(row))
    return row


def main() -> None:
    """Measure and print the table and the line of JSON."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = measure_continual(lambda line: print(line, file=sys.stderr, flush=True))
    for row in rows:
        print(f"{row['method']:<16} old {row['old']:.3f} {row['old_interval']}"
              f"  new {row['new']:.3f} {row['new_interval']}"
              f"  kept {row['kept']:.3f}  gained {row['gained']:.3f}")  # fmt: skip
    print(json.dumps({"benchmark": "continual", "figures": {"continual": rows}}))


if __name__ == "__main__":
    main()
