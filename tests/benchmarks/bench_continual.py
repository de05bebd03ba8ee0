"""What each method against forgetting keeps and gains: lung histology first, then brain MRI, on real pictures.

A small CLIP (the demo's architecture, 64 px, random start) learns three classes of LC25000 lung tiles until it is good,
and is then adapted to four classes of brain MRI slices by each method with the same steps, batches and learning rate.
Three splits that share no augmentation group (LC25000) and no duplicate group (MRI): a method trains on the first, its
strength (and WiSE-FT's alpha) is chosen on the second, and only the chosen one is scored on the third, once. Scored
zero-shot by prompts: balanced accuracy on lung (old) and on brain (new), with a bootstrap over the groups. `kept` is
old / old before, `gained` the share of the naive run's gain on brain; chosen is what has the larger smaller one of the
two. One run, one seed: differences within the intervals mean nothing.

Needs ../shared/data and says so where it is missing. The built datasets stay in .bench/continual. QUICK=1 takes half of
the steps and one strength a method.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
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
from biomedclip.models.interpolate import interpolate
from biomedclip.models.load import load
from biomedclip.training.config import TrainConfig
from biomedclip.training.train import train
from biomedclip.training.validation import Probe, choose_rows
from data_builders.build import BuildConfig, build
from data_builders.labels.recipe import load_recipe

PEERS = ()
ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
CACHE = ROOT / ".bench" / "continual"
QUICK = bool(os.environ.get("QUICK"))
OLD_STEPS, NEW_STEPS = (100, 50) if QUICK else (200, 120)
BATCH, OLD_RATE, NEW_RATE = 64, 3e-3, 1e-3
ALPHAS = (0.3, 0.5, 0.7, 0.9)
CHOICE_IMAGES = 500
"""Validation images of a set that a choice is made by."""

SETS = {"lung": ("lc25000_lung", "lc25000_lung_128"), "brain": ("brain_tumor_mri", "brain_tumor_mri_128")}
TEMPLATES = {
    "lung": ["{}", "an H&E histopathology tile of {}", "a light micrograph of {}", "histology of {}"],
    "brain": ["{}", "a brain MRI slice showing {}", "an MRI scan of the head: {}", "a magnetic resonance image of {}"],
}
REPLAY = {"name": "lung", "path": str(CACHE / "lung"), "balance": True, "weight": 1}

ZSCL = {"path": str(CACHE / "lung"), "num_texts": 64}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "naive": {"": {}},
    "replay": {f"{share:.0%} of each batch": {"replay": share / (1 - share)} for share in (0.1, 0.05, 0.25)},
    "zscl": {f"weight {w}": {"continual": {"zscl": {"weight": w, **ZSCL}}} for w in (1, 0.3)},
    "modx": {f"weight {w}": {"continual": {"modx": {"weight": w}}} for w in (20, 100)},
    "vr_lwf": {f"weight {w}": {"continual": {"vr_lwf": {"weight": w, "num_texts": 256}}} for w in (1, 10)},
    "l2_sp": {f"weight {w}": {"continual": {"l2_sp": {"weight": w}}} for w in (0.1, 1)},
    "frozen_bn": {"": {"continual": {"freeze_batch_norm": True}}},
}
"""Method -> strength -> changes of the naive config; the first strength is the authors' where they published one.
`replay` is the share of old pictures for each new one. The others see no old pair: ZSCL sees old pictures and captions,
not which belong together, and the rest see nothing old at all."""


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
        self.probes["val"] = [
            replace(probe, manifest=choose_rows(probe.manifest, CHOICE_IMAGES)) for probe in self.probes["val"]
        ]

    def choose(self, model: tuple[Any, Any, Any]) -> list[float]:
        """Balanced accuracy on a part of the validation images of (lung, brain)."""
        return [probe.value(Encoder("", *model, "cpu")) for probe in self.probes["val"]]

    def report(self, model: tuple[Any, Any, Any]) -> list[dict[str, float]]:
        """Value, interval and n of balanced accuracy on the test images of (lung, brain)."""
        encoder, found = Encoder("", *model, "cpu"), []
        for probe in self.probes["test"]:
            facts = measure(probe.scores(encoder), ("balanced_accuracy",), resamples=1000)
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
    before = scorer.choose(base)
    yield _row("start", scorer.report(base), time.monotonic() - began, say)
    gain = 0.0
    chosen: dict[str, Any] = {}
    for name, strengths in METHODS.items():
        began = time.monotonic()
        tried: dict[str, tuple[Any, float, float]] = {}
        for number, (strength, method) in enumerate(list(strengths.items())[: 1 if QUICK else None]):
            model = load(adapt(method, start, folder / f"{name}-{number}"))
            values = scorer.choose(model)
            gain = gain or values[1] - before[1]
            tried[strength] = (model, values[0] / before[0], (values[1] - before[1]) / gain)
            say(f"{name} {strength}: validation {tried[strength][1:]}")
        yield _chosen(name, tried, scorer, time.monotonic() - began, say)
        chosen[name] = tried[_best(tried)][0]
    for name in ("naive", "replay", "zscl"):
        tried = {}
        began = time.monotonic()
        for alpha in ALPHAS:
            mixed = _between(base, chosen[name], alpha)
            values = scorer.choose(mixed)
            tried[f"alpha {alpha}"] = (mixed, values[0] / before[0], (values[1] - before[1]) / gain)
        label = "wise_ft" if name == "naive" else f"{name}+wise_ft"
        yield _chosen(label, tried, scorer, time.monotonic() - began, say)


def _best(tried: dict[str, tuple[Any, float, float]]) -> str:
    """The strength whose smaller one of kept and gained is largest."""
    return max(tried, key=lambda strength: min(tried[strength][1:]))


def _chosen(
    name: str, tried: dict[str, tuple[Any, float, float]], scorer: Scorer, seconds: float, say: Any
) -> dict[str, Any]:
    best = _best(tried)
    model, kept, gained = tried[best]
    row = _row(name, scorer.report(model), seconds, say)
    return row | {"strength": best, "tried": len(tried), "val_kept": round(kept, 3), "val_gained": round(gained, 3)}


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
        choice = f"{row.get('strength', '')} ({row.get('val_kept', 1)}, {row.get('val_gained', 0)} on validation)"
        print(f"{row['method']:<16} old {row['old']:.3f} {row['old_interval']}"
              f"  new {row['new']:.3f} {row['new_interval']}"
              f"  kept {row['kept']:.3f}  gained {row['gained']:.3f}"
              f"  {choice}")  # fmt: skip
    print(json.dumps({"benchmark": "continual", "figures": {"continual": rows}}))


if __name__ == "__main__":
    main()
