"""What loaders see after a run was killed: ours beside Lightning's default, `datasets`, and litdata, on the same tars.

256 figures in four tars, batches of 8, one epoch with two reading processes. After five batches the state is taken;
new objects get it and go on, once with two reading processes, once with one (ours also in two processes of a run with
three readers each). Wrong are samples at another place than in the uninterrupted run; lost are those that the epoch
then shows less often than it would have, repeated those that it shows more often. `mixture` is two sources at 3 to 1.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from bench_stream import PEERS as STREAM_PEERS
from stream_data import write_figures

from biomedclip.stream.decode import Geometry
from biomedclip.stream.loader import Samples, StreamLoader, StreamSource

PEERS = (
    "torch==2.15.0", "torchvision==0.29.2", "open_clip_torch[training]==3.3.0", "webdataset<=0.2.86",
    "transformers==5.23.0", "litdata==0.2.76", "datasets==5.2.0", "lightning==2.6.6",
)  # fmt: skip
"""Those of bench_stream.py, whose environment is used."""

HERE = Path(__file__).parent
BATCH, STOP, COUNT = 8, 5, 256

RUNS = (
    ("Lightning's Trainer, shuffled DataLoader", "lightning"),
    ("Lightning's Trainer, stateful stream without a length", "lightning_unsized"),
    ("datasets, streaming, shuffled", "datasets"),
    ("datasets, streaming, shuffled, mixture", "datasets_interleaved"),
    ("litdata", "litdata"),
    ("litdata, mixture", "litdata_combined"),
)


def run_peer(name: str, tars: str, root: Path, workers: int) -> dict[str, object]:
    """What a peer saw, or its error."""
    command = [os.environ["PEER_PYTHON"], HERE / "resume_peer.py", name, tars, root, str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else {"error": done.stderr[-300:]}


def run_ours(folder: Path, ranks: int, workers: int, mixture: bool) -> dict[str, object]:
    """The same of our loader; after the state is given, `ranks` processes of a run share every batch."""

    def make(rank: int = 0, size: int = 1) -> Samples:
        sources = [StreamSource(name="one", path=folder, weight=3, where="hash(key) % 2 = 0"),
                   StreamSource(name="two", path=folder, where="hash(key) % 2 = 1")]  # fmt: skip
        return Samples(
            sources if mixture else [StreamSource(name="one", path=folder)], batch_size=BATCH, seed=0, rank=rank,
            world_size=size, geometry=Geometry(size_px=32), tokenise=lambda texts: torch.zeros(len(texts), 1),
        )  # fmt: skip

    steps = COUNT // BATCH
    whole = [batch["key"] for batch in StreamLoader(make(), max_steps=steps, workers=2)]
    stopped, before = StreamLoader(make(), max_steps=steps, workers=2), []
    for batch in stopped:
        before.append(batch["key"])
        if len(before) == STOP:
            break
    parts = []
    for rank in range(ranks):
        loader = StreamLoader(make(rank, ranks), max_steps=steps, workers=workers)
        loader.load_state_dict(stopped.state_dict())
        parts.append([batch["key"] for batch in loader])
    after = [[key for keys in zip(*slices, strict=True) for key in keys] for slices in zip(*parts, strict=True)]
    return {"whole": whole, "before": before, "after": after}


def judge(found: dict[str, object]) -> dict[str, object]:
    """Samples that are wrong, lost and repeated, of those that were to come."""
    if "error" in found:
        return {"error": str(found["error"]).strip().splitlines()[-1][:160]}
    whole, before, after = ([key for batch in found[name] for key in batch] for name in ("whole", "before", "after"))
    wanted = whole[len(before) :]
    wrong = sum(one != other for one, other in zip(wanted, after, strict=False)) + abs(len(wanted) - len(after))
    all_of, seen = Counter(whole), Counter(before + after)
    return {"wrong": min(wrong, len(wanted)), "of": len(wanted), "lost": (all_of - seen).total(),
            "repeated": (seen - all_of).total()}  # fmt: skip


def show(result: dict[str, object]) -> str:
    """A cell of the table."""
    if "error" in result:
        return f"refused: {result['error']}"
    if not result["wrong"]:
        return "exact"
    return f"{result['wrong']} of {result['of']} wrong, {result['lost']} lost, {result['repeated']} repeated"


def main() -> None:
    """Print the table and one JSON line."""
    if PEERS != STREAM_PEERS:
        raise SystemExit("bench_resume.py and bench_stream.py must have the same PEERS")
    figures: dict[str, object] = {}
    print("| loader | goes on with 2 readers | with 1 reader |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = write_figures(root, COUNT, COUNT // 4).folder
        for title, peer in RUNS:
            cells = []
            for workers in (2, 1):
                result = judge(run_peer(peer, f"{folder}/*.tar", root, workers))
                figures |= {f"{peer}_{workers}_{key}": value for key, value in result.items()}
                cells.append(show(result))
            print(f"| {title} | {' | '.join(cells)} |", flush=True)
        for title, mixture in (("ours", False), ("ours, mixture", True)):
            cells = []
            for ranks, workers in ((1, 2), (1, 1), (2, 3)):
                result = judge(run_ours(folder, ranks, workers, mixture))
                figures |= {f"ours_{'mixture_' * mixture}{ranks}x{workers}_{k}": v for k, v in result.items()}
                cells.append(show(result))
            print(f"| {title} | {cells[0]} | {cells[1]}; in 2 processes with 3 readers each: {cells[2]} |", flush=True)
    print(json.dumps({"benchmark": "resume", "figures": figures}))


if __name__ == "__main__":
    sys.exit(main())
