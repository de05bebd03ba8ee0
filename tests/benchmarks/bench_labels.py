"""Labelled sets to shards, beside a script of the usual kind in the same run, and the leaks of two real sets.

Speed: an .npz of 8,000 grey pictures of 28 px and a folder of 3,000 JPEG files of 224 px, both made up, are compiled
from a recipe of three classes and six captions an image. That is everything the command does: layout, captions,
decoding of every picture, hashes, the leakage gate against a held-out split, shards, index, ledger, card, checksums and
fsync. The peer is a loop as caption scripts have it (bytes of the file and sentences of the class into webdataset's
TarWriter, nothing decoded or checked; the .npz rows become PNG first). Rates are samples per second of CPU time, which
is what a core does, whatever else the machine has to do; rounds are interleaved and medians printed.

Leaks: brain MRI and LC25000 of ../shared/data, compiled as their recipes say and once more without their group ids, to
see what hashes alone would have found. Left out, and said so, where that folder is missing.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from biomedclip.schema import Manifest, Pair
from data_builders.build import BuildConfig, build
from data_builders.labels.compile import compile_pairs, read_labelled_set
from data_builders.labels.leakage import LeakageConfig, check_leaks
from data_builders.labels.recipe import Recipe, SplitRule, load_recipe
from data_builders.labels.splits import audit_groups, split_of

PEERS = ("webdataset==1.0.2", "numpy", "pillow")
NUM_NPZ, NUM_JPEG, ROUNDS = 8_000, 3_000, 3
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"

RECIPE = {
    "name": "bench", "title": "Bench", "modality": "chest X-ray", "kind": "single",
    "classes": [{"label": label, "name": f"{label} finding", "synonyms": [f"{label} sign"]} for label in "abc"],
    "templates": {"single": ["Chest X-ray with {a_x}.", "{a_x} on a chest X-ray.", "A chest X-ray showing {x}.",
                             "{x}, seen on a chest X-ray.", "Chest X-ray: {x}.", "X-ray of a chest with {a_x}."]},
    "modality_synonyms": ["X-ray of a chest"], "licence": {"code": "CC0", "evidence": "made up"}, "citation": "none",
}  # fmt: skip

PEER = """
import io, json, sys, time
import numpy as np
import webdataset as wds
from pathlib import Path
from PIL import Image
kind, source, out = sys.argv[1:]
sentences = [f"Chest X-ray with a finding, in sentence {k}." for k in range(6)]
def samples():
    if kind == "npz":
        data = np.load(source)
        for split in ("train", "test"):
            for image, label in zip(data[f"{split}_images"], data[f"{split}_labels"]):
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "PNG")
                yield buffer.getvalue(), int(label[0])
    else:
        for path in sorted(Path(source).rglob("*.jpg")):
            yield path.read_bytes(), path.parent.name
start, count = time.process_time(), 0
with wds.TarWriter(out) as writer:
    for count, (image, label) in enumerate(samples(), 1):
        text = "".join(s.strip(".") + "._bench_" for s in sentences)
        writer.write({"__key__": f"{count:06d}", "jpg": image, "txt": text})
print(json.dumps(count / (time.process_time() - start)))
"""


def picture(random: np.random.Generator, size_px: int, mode: str) -> Image.Image:
    """A smooth picture with some grain, which compresses about as a radiograph does."""
    coarse = random.integers(0, 256, (7, 7, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((size_px, size_px), Image.Resampling.BICUBIC), dtype=np.float32)
    grained = smooth + random.normal(0, 6, smooth.shape)
    return Image.fromarray(np.clip(grained, 0, 255).astype(np.uint8)).convert(mode)


def make_sets(root: Path) -> None:
    """`set.npz` and the folder `jpeg`, both with a tenth held out."""
    random = np.random.default_rng(0)
    images = np.stack([np.asarray(picture(random, 28, "L")) for _ in range(NUM_NPZ)])
    labels, held_out = random.integers(0, 3, (NUM_NPZ, 1)), NUM_NPZ // 10
    arrays = {"train": slice(held_out, None), "test": slice(held_out)}
    np.savez(root / "set.npz", **{f"{split}_images": images[part] for split, part in arrays.items()},
             **{f"{split}_labels": labels[part] for split, part in arrays.items()})  # fmt: skip
    for number in range(NUM_JPEG):
        folder = root / "jpeg" / ("train" if number % 10 else "test") / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture(random, 224, "RGB").save(folder / f"{number:05d}.jpg", quality=90)
    layouts = {"npz": {"type": "medmnist_npz", "splits": ["train", "test"]}, "jpeg": {"type": "image_folder"}}
    for name, layout in layouts.items():
        (root / f"{name}.yaml").write_text(json.dumps(RECIPE | {"layout": layout}))


def compile_ours(root: Path, name: str, source: str, count: int) -> tuple[float, float]:
    """Images per second of CPU and of wall time, into a complete dataset folder."""
    config = BuildConfig.model_validate({
        "name": "bench", "licence": "all",
        "source": {"kind": "labels", "root": str(root / source), "recipe": str(root / f"{name}.yaml"), "splits": None},
    })  # fmt: skip
    with tempfile.TemporaryDirectory(dir=root) as out:
        wall, cpu = time.perf_counter(), time.process_time()
        manifest = build(config, Path(out) / "shards")
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if manifest["samples"] != count:
        raise SystemExit(f"{name}: {manifest['samples']} of {count} kept: {manifest['ledger']}")
    return count / cpu, count / wall


def run_peer(root: Path, kind: str, source: str) -> float:
    """Samples per second of CPU time of the peer's loop."""
    with tempfile.TemporaryDirectory(dir=root) as out:
        command = [os.environ["PEER_PYTHON"], "-c", PEER, kind, str(root / source), f"{out}/peer.tar"]
        return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def measure_speed() -> dict[str, float]:
    """Medians of interleaved rounds."""
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_sets(root)
        for warm in (True, *[False] * ROUNDS):  # the first round pays for imports, and is not counted
            for kind, source, count in (("npz", "set.npz", NUM_NPZ), ("jpeg", "jpeg", NUM_JPEG)):
                cpu, wall = compile_ours(root, kind, source, count)
                peer = run_peer(root, kind, source)
                if not warm:
                    for key, rate in ((f"{kind}_per_s_core", cpu), (f"{kind}_per_s_wall", wall),
                                      (f"{kind}_peer_per_s_core", peer)):  # fmt: skip
                        rates.setdefault(key, []).append(rate)
    return {key: round(statistics.median(values)) for key, values in rates.items()}


def collect(recipe: Recipe, manifest: Manifest) -> list[Pair]:
    """The pairs of all splits, with hashes of their pixels."""
    items = compile_pairs(recipe, manifest, pixels=True)
    return [item for item in items if isinstance(item, Pair)]


def find_by_hashes(recipe: Recipe, manifest: Manifest) -> tuple[set[str], Counter[str]]:
    """Sample ids that the gate drops as leaks where no group is known, and their number by rule."""
    blind = Manifest(**{
        **{name: getattr(manifest, name) for name in ("name", "root", "kind", "classes", "drops", "sha256")},
        "rows": tuple(type(row)(**{name: getattr(row, name) for name in row.__slots__} | {"group_id": None})
                      for row in manifest.rows),
    })  # fmt: skip
    gate = check_leaks(recipe, blind, collect(recipe, blind), LeakageConfig(), drop_duplicates=False)
    leaked = {drop.item: drop.reason for drop in gate.drops.values() if drop.reason.startswith("leaked")}
    return set(leaked), Counter(leaked.values())


def measure_brain() -> dict[str, float]:
    """The groups of brain MRI as its manifest gives them, and what hashes of the 128 px copies find without them."""
    recipe = load_recipe("brain_tumor_mri")
    manifest = read_labelled_set(recipe, SHARED / "brain_tumor_mri_128")
    audit = audit_groups(manifest)
    splits: dict[str, set[str]] = {}
    for row in manifest.rows:
        splits.setdefault(row.group_id or "", set()).add(split_of(row))
    crossing = {row.sample_id for row in manifest.rows
                if split_of(row) == "train" and len(splits[row.group_id or ""]) > 1}  # fmt: skip
    leaked, rules = find_by_hashes(recipe, manifest)
    return {
        "leak_groups_brain": audit.crossing_groups, "leak_images_brain": audit.crossing_images,
        "conflict_groups_brain": audit.conflict_groups, "conflict_images_brain": audit.conflict_images,
        "brain_training_images_in_leak_groups": len(crossing),
        "brain_found_by_pixels_alone": rules["leaked_pixels"], "brain_found_by_phash_alone": rules["leaked_near"],
        "brain_share_of_leak_groups_found_by_hashes": round(len(crossing & leaked) / len(crossing), 3),
        "brain_found_by_hashes_outside_leak_groups": len(leaked - crossing),
    }  # fmt: skip


def measure_lc25000() -> dict[str, float]:
    """The augmentation groups of LC25000, and what a random split by image does, with and without knowing them."""
    recipe = load_recipe("lc25000_lung")
    manifest = read_labelled_set(recipe, SHARED / "lc25000_lung_128")
    audit = audit_groups(manifest)
    by_image = recipe.model_copy(update={
        "split": SplitRule(test=0.2, of="all", by="image"), "groups_are_duplicates": False,
        "expect": None,
    })  # fmt: skip
    dealt = read_labelled_set(by_image, SHARED / "lc25000_lung_128")
    random = audit_groups(dealt)
    leaked, _ = find_by_hashes(by_image, dealt)
    return {
        "aug_groups_lc25000": audit.groups, "leak_groups_lc25000_given_split": audit.crossing_groups,
        "leak_groups_lc25000_random_split": random.crossing_groups,
        "leak_images_lc25000_random_split": random.crossing_images,
        "lc25000_random_split_found_by_hashes_alone": len(leaked),
    }  # fmt: skip


STATED = {"leak_groups_brain": 354, "leak_images_brain": 1189, "conflict_groups_brain": 15,
          "conflict_images_brain": 45, "aug_groups_lc25000": 711}  # fmt: skip
"""What the provenance of the shared copies states."""


def main() -> None:
    """Measure and print one JSON line; exit 1 where a leak is not found as stated."""
    figures: dict[str, float] = measure_speed()
    missed = {}
    if SHARED.is_dir():
        figures |= measure_brain() | measure_lc25000()
        missed = {name: figures[name] for name, value in STATED.items() if figures[name] != value}
    else:
        print(f"no {SHARED}: the leaks of brain MRI and LC25000 are left out", file=sys.stderr)
    print(json.dumps({"benchmark": "labels", "figures": figures}))
    if missed:
        raise SystemExit(f"not as stated: {missed}, stated {STATED}")


if __name__ == "__main__":
    main()
