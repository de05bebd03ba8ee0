"""Select and pack: pairs a second of each, on made-up units, with the growth of memory; and near hashes beside faiss.

Writes 200,000 pairs of 1 kB images in 20 units, selects them with every kind of rule (SQL, filters, captions, hash
files, near duplicates), and packs what is left with one worker and with two. The peer searches the same 200,000 random
hashes for pairs within 4 bits with faiss' exact binary index.
"""

import json
import os
import random
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from biomedclip.schema import Article, Pair
from data_builders.hamming import near_pairs
from data_builders.pack import PackConfig, pack
from data_builders.select import select
from data_builders.selection import SelectConfig
from data_builders.units import unit_name, write_unit

PEERS = ("faiss-cpu==1.13.2", "numpy")
NUM_UNITS, UNIT_PAIRS = 20, 10_000

PEER = """
import sys, time
import faiss, numpy as np
faiss.omp_set_num_threads(1)
hashes = np.load(sys.argv[1])
index = faiss.IndexBinaryFlat(64)
index.add(hashes.view(np.uint8).reshape(-1, 8))
start = time.perf_counter()
limits, _, found = index.range_search(hashes[:20000].view(np.uint8).reshape(-1, 8), 5)
print(10 * (time.perf_counter() - start))
"""

WORDS = "axial contrast enhanced section through the upper abdomen with lesion of left kidney seen in phase".split()


def make_unit(number: int) -> list[Article | Pair]:
    """Articles of ten figures each; the images differ in their first bytes."""
    chance = random.Random(number)
    filling = chance.randbytes(1000)
    items: list[Article | Pair] = []
    for row in range(UNIT_PAIRS):
        article = number * UNIT_PAIRS + row // 10
        if row % 10 == 0:
            items.append(Article(article_id=f"PMC{article}.1", pmcid=article, version=1, title="T", licence="CC BY",
                                 published="2023-05-01", language="en", journal="J"))  # fmt: skip
        items.append(
            Pair(
                key=f"pmc-{article}-v1-f{row}-p0", image=f"{number}-{row} ".encode() + filling, image_format="jpg",
                width=chance.randint(100, 2000), height=chance.randint(100, 2000), source="pmc", licence="CC BY",
                caption=" ".join(chance.choices(WORDS, k=60)), sha256=f"{number:032x}{row - row % 20 // 19:032x}",
                phash=chance.getrandbits(64), article_id=f"PMC{article}.1", figure_id=f"F{row}",
            )
        )  # fmt: skip
    return items


def peak_gb() -> float:
    """Largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    """Run each step once and print the figures as one JSON line."""
    figures: dict[str, float] = {}
    count = NUM_UNITS * UNIT_PAIRS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(NUM_UNITS):
            write_unit(folder / "raw", unit_name(number), make_unit(number), identity={})
        rows = "".join(f"exam,s{n},{random.Random(n).getrandbits(64)}\n" for n in range(10_000))
        (folder / "exam.csv").write_text("set,sample,phash\n" + rows)
        before = peak_gb()
        for step, config in {
            "select_plain": SelectConfig(),
            "select_all": SelectConfig.model_validate(
                {"where": "width > 110 and article.journal = 'J'", "filters": {"min_side_px": 120, "max_aspect": 8,
                 "min_caption_words": 5}, "against": (str(folder / "exam.csv"),), "languages": ("en",)}
            ),
        }.items():  # fmt: skip
            start = time.process_time()
            facts = select([folder / "raw"], folder / "s.parquet", config)
            figures[f"{step}_rows_per_s"] = round(count / (time.process_time() - start))
        figures["select_peak_gb"] = round(peak_gb(), 2)
        figures["select_growth_gb"] = round(peak_gb() - before, 2)
        seconds = []
        for workers in (1, 2):
            start = time.perf_counter()
            pack(folder / "s.parquet", folder / f"out{workers}", PackConfig(name="bench"), workers=workers)
            seconds.append(time.perf_counter() - start)
            figures[f"pack_{workers}w_samples_per_s"] = round(facts.selected / seconds[-1])
        figures["pack_scaling_2w"] = round(seconds[0] / seconds[1], 2)
        same = [(folder / f"out{workers}" / "SHA256SUMS").read_bytes() for workers in (1, 2)]
        figures["same_bytes"] = same[0] == same[1]
        hashes = np.random.default_rng(0).integers(0, 2**64, 200_000, dtype=np.uint64)
        start = time.perf_counter()
        pairs = sum(len(left) for left, _ in near_pairs(hashes, 4))
        ours = time.perf_counter() - start
        np.save(folder / "hashes.npy", hashes)
        command = [os.environ["PEER_PYTHON"], "-c", PEER, str(folder / "hashes.npy")]
        peer = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        figures |= {"near_200k_s": round(ours, 2), "near_pairs": pairs, "near_vs_faiss_flat": round(peer / ours, 1)}
    print(json.dumps({"benchmark": "select", "figures": figures}))


if __name__ == "__main__":
    main()
