"""Shards: writing and reading samples, beside webdataset on the same pairs in the same run.

Makes 4,000 pairs (12 kB random JPEG-sized payloads and 300-character captions), writes them with DatasetWriter (tar,
index, ledger, checksums) and with webdataset's TarWriter (tar alone), and reads them back in order and at random.
Rounds are interleaved and medians are printed, because machines are noisy; the ratios are what to quote.
"""

import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from biomedclip.schema import Pair
from biomedclip.shards import DatasetFolder, DatasetWriter, read_member

PEERS = ("webdataset==1.0.2", "numpy")
NUM_SAMPLES, ROUNDS = 4_000, 5

PEER = """
import json, sys, time
import webdataset as wds
folder, n = sys.argv[1], int(sys.argv[2])
payload, caption = open(folder + "/payload", "rb").read(), open(folder + "/caption").read()
start = time.perf_counter()
with wds.TarWriter(folder + "/peer.tar") as writer:
    for i in range(n):
        writer.write({"__key__": f"s{i:06d}", "jpg": payload, "txt": caption, "json": {"key": i}})
written = time.perf_counter() - start
start = time.perf_counter()
count = sum(1 for s in wds.WebDataset(folder + "/peer.tar", shardshuffle=False) if s["jpg"])
assert count == n
print(json.dumps({"write": n / written, "read": n / (time.perf_counter() - start)}))
"""


def make_pairs(payload: bytes, caption: str) -> list[Pair]:
    """Pairs that differ in key alone."""
    return [
        Pair(
            key=f"s{i:06d}", image=payload, image_format="jpg", width=1, height=1, caption=caption, source="bench",
            licence="CC0", sha256="0" * 64, phash=i,
        )
        for i in range(NUM_SAMPLES)
    ]  # fmt: skip


def write_ours(folder: Path, pairs: list[Pair]) -> float:
    """Samples a second into a complete dataset folder."""
    start = time.perf_counter()
    with DatasetWriter(folder, name="bench") as writer:
        for pair in pairs:
            writer.add(pair)
        writer.finish(provenance={}, card=lambda manifest: "# bench\n")
    return NUM_SAMPLES / (time.perf_counter() - start)


def read_ours(folder: Path, rows: list[dict]) -> float:
    """Samples a second by position, with all three members."""
    path = folder / rows[0]["shard"]
    start = time.perf_counter()
    with path.open("rb") as file:
        for row in rows:
            for column in ("image", "text", "json"):
                read_member(file, row[f"{column}_offset"], row[f"{column}_size"], path, row["key"])
    return NUM_SAMPLES / (time.perf_counter() - start)


def main() -> None:
    """Run the rounds and print the medians as one JSON line."""
    rates: dict[str, list[float]] = {k: [] for k in ("write", "read", "shuffled", "peer_write", "peer_read")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        payload, caption = random.Random(0).randbytes(12_000), "chest x-ray of a lung " * 14
        (folder / "payload").write_bytes(payload)
        (folder / "caption").write_text(caption)
        pairs = make_pairs(payload, caption)
        for _ in range(ROUNDS):
            rates["write"].append(write_ours(folder / "ours", pairs))
            rows = DatasetFolder(folder / "ours").index.to_pylist()
            rates["read"].append(read_ours(folder / "ours", rows))
            random.Random(1).shuffle(rows)
            rates["shuffled"].append(read_ours(folder / "ours", rows))
            command = [os.environ["PEER_PYTHON"], "-c", PEER, name, str(NUM_SAMPLES)]
            peer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            rates["peer_write"].append(peer["write"])
            rates["peer_read"].append(peer["read"])
    median = {key: statistics.median(values) for key, values in rates.items()}
    figures = {
        "write_per_s": round(median["write"]),
        "read_per_s": round(median["read"]),
        "read_shuffled_per_s": round(median["shuffled"]),
        "webdataset_write_per_s": round(median["peer_write"]),
        "webdataset_read_per_s": round(median["peer_read"]),
        "write_vs_webdataset": round(median["write"] / median["peer_write"], 2),
        "read_vs_webdataset": round(median["read"] / median["peer_read"], 2),
        "read_shuffled_vs_webdataset": round(median["shuffled"] / median["peer_read"], 2),
    }
    print(json.dumps({"benchmark": "shards", "figures": figures}))


if __name__ == "__main__":
    main()
