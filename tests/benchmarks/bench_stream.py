"""The training stream beside open_clip_train's loader and webdataset: same tars, same machine, interleaved runs.

2,048 figures of about 600 x 450 px (JPEG quality 90, 50 kB) with real captions, article by article in eight tars, are
read by both trainers' loaders into batches of 64 at 224 px with BERT tokens of 256, in one and in two reading
processes: from asking for the iterator to the last batch, medians of interleaved rounds. Ours has its own
augmentation (`figure`), open_clip's its own. Beside that: the bytes alone in random order against webdataset in order;
captions a second against open_clip's tokenizer as its loader calls it; samples that share an article within a batch
of 1,024, for webdataset's shuffle with open_clip's buffers and for our plan; memory over 20 epochs; opening and
resuming a plan of 24 million rows; and samples lost to a host that throttles, truncates, drops or trickles.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from mock_bucket import Fault, MockBucket  # noqa: E402
from stream_data import write_figures, write_wordpiece  # noqa: E402

PEERS = (
    "torch==2.15.0", "torchvision==0.29.2", "open_clip_torch[training]==3.3.0", "webdataset<=0.2.86",
    "transformers==5.23.0", "litdata==0.2.76", "datasets==5.2.0", "lightning==2.6.6",
)  # fmt: skip
"""litdata, datasets and lightning are the peers of bench_resume.py, which shares this environment."""

COUNT, PER_SHARD, BATCH, ROUNDS = 2_048, 256, 64, 3
EPOCHS = 20
ARTICLE_SHARDS, ARTICLE_PER_SHARD, ARTICLE_BATCH = 8, 10_000, 1_024
HANG_S = 90.0

FAULTS = {
    "throttled": [Fault("too_many", match="*.tar", times=40, retry_after="0.2")],
    "truncated": [Fault("truncated", match="*.tar", times=40)],
    "dropped": [Fault("dropped", match="*.tar", times=20), Fault("no_answer", match="*.tar", times=20)],
    "slow": [Fault("trickle", match="*.tar", times=4), Fault("stall", match="*.tar", times=4)],
}
"""What befalls the first requests of a run on the loopback server."""


def run(script: str, *arguments: object, timeout_s: float = 600) -> object:
    """The JSON value that a measurement prints, run by our Python or, for the peers, by theirs."""
    python = os.environ["PEER_PYTHON"] if script == "stream_peer.py" else sys.executable
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([python, HERE / script, *map(str, arguments)], capture_output=True, text=True,
                          env=environment, timeout=timeout_s)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{script} {arguments}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_loaders(root: Path, tars: str, wordpiece: Path) -> dict[str, float]:
    """Samples a second and seconds to the first batch of both loaders, for one and two reading processes."""
    figures: dict[str, float] = {}
    for workers in (1, 2):
        ours, theirs = [], []
        for _ in range(ROUNDS):
            ours.append(run("stream_ours.py", "loader", root / "figures", BATCH, workers, wordpiece))
            theirs.append(run("stream_peer.py", "loader", tars, COUNT, BATCH, workers, wordpiece))
        for name, runs in (("ours", ours), ("open_clip", theirs)):
            for key in ("samples_s", "first_s", "cpu_ms"):
                figures[f"{name}_{workers}w_{key}"] = statistics.median(found[key] for found in runs)
        figures[f"loader_vs_open_clip_{workers}w"] = (
            figures[f"ours_{workers}w_samples_s"] / figures[f"open_clip_{workers}w_samples_s"]
        )
        figures[f"loader_cpu_vs_open_clip_{workers}w"] = (
            figures[f"open_clip_{workers}w_cpu_ms"] / figures[f"ours_{workers}w_cpu_ms"]
        )
        figures[f"first_batch_vs_open_clip_{workers}w"] = (
            figures[f"open_clip_{workers}w_first_s"] / figures[f"ours_{workers}w_first_s"]
        )
    return figures


def measure_parts(root: Path, tars: str, wordpiece: Path, captions: list[str]) -> dict[str, float]:
    """Bytes and tokens."""
    path = root / "captions.json"
    path.write_text(json.dumps(captions))
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours.append(run("stream_ours.py", "parts", root / "figures", path, wordpiece))
        theirs.append(run("stream_peer.py", "parts", tars, path, wordpiece))
    mine = {name: statistics.median(found[name] for found in ours) for name in ours[0]}
    other = {name: statistics.median(found[name] for found in theirs) for name in theirs[0]}
    tar, tar_webdataset = mine.pop("tar"), other.pop("tar")
    return {
        "tar_us": tar, "tar_webdataset_us": tar_webdataset,
        "tar_vs_webdataset": tar_webdataset / tar,
        **{f"tokens_{name}_s": rate for name, rate in mine.items()},
        **{f"tokens_{name}_open_clip_s": rate for name, rate in other.items()},
        "tokens_vs_open_clip": min(mine[name] / other[name] for name in mine),
        **{f"tokens_vs_open_clip_{name}": mine[name] / other[name] for name in mine},
        **{f"tokens_vs_open_clip_{name}_list": mine[name] / other[f"{name}_list"] for name in mine},
    }  # fmt: skip


def measure_articles(root: Path) -> dict[str, float]:
    """Per cent of samples that share their article with another sample of the batch; shards in article order."""
    from synthetic_plans import plan_source

    from biomedclip.stream.plan import Plan

    shards, article, chance = [], 0, random.Random(0)
    for _ in range(ARTICLE_SHARDS):
        shard: list[int] = []
        while len(shard) < ARTICLE_PER_SHARD:
            shard += [article] * min(chance.choice((4, 5)), ARTICLE_PER_SHARD - len(shard))
            article += 1
        shards.append(shard)
    path = root / "articles.json"
    path.write_text(json.dumps(shards))
    rows = [a for shard in shards for a in shard]
    plan = Plan([plan_source("pmc", len(rows), articles=rows, shards=len(shards))], batch_size=ARTICLE_BATCH, seed=0)
    shared = seen = 0
    for step in range(len(rows) // ARTICLE_BATCH):
        found = [rows[pick.row] for pick in plan.batch(step)]
        shared += sum(found.count(a) > 1 for a in found)
        seen += len(found)
    return {
        "same_article_pct": 100 * shared / seen,
        "same_article_pct_webdataset": float(run("stream_peer.py", "shuffle", path, ARTICLE_BATCH)),
    }


def measure_memory(folder: Path) -> dict[str, float]:
    """Megabytes an epoch that memory grows by, once the first epochs have filled what is kept on purpose."""
    marks = run("stream_ours.py", "memory", folder, EPOCHS)
    late = marks[EPOCHS // 4 :]
    middle, mean = (len(late) - 1) / 2, statistics.mean(late)
    slope = sum((x - middle) * (y - mean) for x, y in enumerate(late)) / sum(
        (x - middle) ** 2 for x in range(len(late))
    )
    return {"memory_slope_mb_epoch": slope, "memory_mb": mean}


def measure_24m() -> dict[str, float]:
    """Seconds and gigabytes of resuming on a made-up index of 24 million rows."""
    from stream_24m import measure

    return measure()


def measure_faults(root: Path, folder: Path) -> dict[str, float]:
    """Samples that differ from the local run after each kind of fault, and runs that did not end in time."""
    expected = run("stream_ours.py", "digest", folder, root / "cache")
    lost, hangs, seconds = 0, 0, {}
    for name, faults in FAULTS.items():
        with MockBucket(folder.parent, faults=[Fault(f.kind, f.match, f.times, f.retry_after) for f in faults]) as host:
            start = time.perf_counter()
            try:
                found = run("stream_ours.py", "digest", f"{host.endpoint}/{folder.name}", root / f"cache-{name}",
                            timeout_s=HANG_S)  # fmt: skip
            except subprocess.TimeoutExpired:
                hangs += 1
                lost += len(expected["samples"])
                continue
            seconds[f"fault_{name}_s"] = time.perf_counter() - start
            left = sum(fault.times for fault in host.faults)
        if left:
            raise SystemExit(f"{name}: {left} faults were never met")
        lost += sum(found["samples"].get(key) != value for key, value in expected["samples"].items()) + found["bad"]
    return {"fault_samples_lost": lost, "hangs": hangs, **seconds}


def main() -> None:
    """Measure and print one JSON line."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        dataset = write_figures(root, COUNT, PER_SHARD)
        captions = [sample.caption for sample in dataset.samples()]
        small = write_figures(root / "small", 256, 64).folder
        wordpiece = write_wordpiece(root, captions)
        tars = f"{dataset.folder}/{{00000..{COUNT // PER_SHARD - 1:05d}}}.tar"
        figures = measure_loaders(root, tars, wordpiece)
        figures |= measure_parts(root, tars, wordpiece, captions)
        figures |= measure_articles(root)
        figures |= measure_memory(small)
        figures |= measure_faults(root, small)
    figures |= measure_24m()
    figures["seconds"] = time.perf_counter() - started
    rounded = {name: round(value, 3) for name, value in figures.items()}
    print(json.dumps({"benchmark": "stream", "figures": rounded}))


if __name__ == "__main__":
    main()
