"""Our side of the stream benchmarks: one measurement in a process of its own, prints one JSON value.

stream_ours.py loader FOLDER BATCH WORKERS WORDPIECE   the loader, one epoch
stream_ours.py parts FOLDER CAPTIONS WORDPIECE         bytes alone, in random order; the tokenisers, batch by batch
stream_ours.py memory FOLDER EPOCHS                    memory of all processes, epoch by epoch
stream_ours.py digest BASE CACHE                       keys and pixels of every sample, wherever BASE points
"""

import hashlib
import json
import os
import random
import resource
import sys
import time
from pathlib import Path

import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from biomedclip.stream.decode import Geometry
from biomedclip.stream.fetch import FetchConfig
from biomedclip.stream.loader import Samples, StreamLoader, StreamSource
from biomedclip.stream.text import fast_tokenise

SIZE_PX = 224


def open_samples(folder, batch, tokenizer, **options):
    """The samples of one dataset folder as training reads them."""
    return Samples(
        [StreamSource(name="figures", path=folder)], batch_size=int(batch), seed=0,
        geometry=Geometry(size_px=SIZE_PX), tokenise=fast_tokenise(tokenizer), **options,
    )  # fmt: skip


def parts(folder, captions, wordpiece):
    """Microseconds a sample of bytes; captions a second."""
    return {"tar": tar(folder), **tokens(captions, wordpiece)}


def loader(folder, batch, workers, wordpiece):
    """Samples a second over one epoch from asking for the iterator to the last batch, and seconds to the first one."""
    torch.set_num_threads(1)
    samples = open_samples(folder, batch, HFTokenizer(wordpiece, context_length=256))
    steps = len(samples.rows[0]) // int(batch)
    cpu = cpu_s()
    first, seen, start = 0.0, 0, time.perf_counter()
    for rows in StreamLoader(samples, max_steps=steps, workers=int(workers)):
        first = first or time.perf_counter() - start
        seen += len(rows["image"])
        assert rows["image"].shape[1:] == (3, SIZE_PX, SIZE_PX)
        assert rows["text"].shape[1] <= 256
    rate = seen / (time.perf_counter() - start)
    return {"samples_s": rate, "first_s": first, "cpu_ms": (cpu_s() - cpu) / seen * 1e3}


def cpu_s():
    """CPU seconds of this process and of the reading processes that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(found.ru_utime + found.ru_stime for found in used)


def tar(folder):
    """Microseconds a sample: the bytes of picture and caption, in random order."""
    samples = open_samples(folder, 2, SimpleTokenizer())
    (shards,) = samples._shards
    order = list(range(len(samples.rows[0])))
    random.Random(0).shuffle(order)
    start = time.perf_counter()
    size = sum(len(shards.read(row, member)) for row in order for member in ("image", "text"))
    spent = time.perf_counter() - start
    assert size > 1000 * len(order)
    return spent / len(order) * 1e6


def tokens(captions, wordpiece):
    """Captions a second in batches of 64."""
    texts = json.loads(Path(captions).read_text())
    rates = {}
    for name, tokenizer in (("clip", SimpleTokenizer()), ("bert", HFTokenizer(wordpiece, context_length=256))):
        encode = fast_tokenise(tokenizer)
        encode(texts[:2])
        start = time.perf_counter()
        for first in range(0, len(texts), 64):
            encode(texts[first : first + 64])
        rates[name] = len(texts) / (time.perf_counter() - start)
    return rates


def memory(folder, epochs):
    """Megabytes that this process and one reading process have for themselves after each epoch."""
    samples = open_samples(folder, 32, SimpleTokenizer())
    steps = len(samples.rows[0]) // 32
    marks = []
    for number, _ in enumerate(StreamLoader(samples, max_steps=steps * int(epochs), workers=1), 1):
        if number % steps == 0:
            marks.append(sum(map(own_mb, [os.getpid(), *children()])))
    return marks


def children():
    """Process ids of the reading processes."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def own_mb(process):
    """Memory that a process shares with nobody."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000


def digest(base, cache):
    """Key -> hash of its pixels and tokens, and the requests that were made again, by cause."""
    fetch = FetchConfig(cache=cache, cache_gb=0, silence_s=1.0, max_wait_s=60.0)
    samples = open_samples(base, 32, SimpleTokenizer(), fetch=fetch)
    stream = StreamLoader(samples, max_steps=len(samples.rows[0]) // 32)
    found = {}
    for rows in stream:
        for key, image, text in zip(rows["key"], rows["image"], rows["text"], strict=True):
            found[key] = hashlib.sha256(image.numpy().tobytes() + text.numpy().tobytes()).hexdigest()
    return {"samples": found, "bad": stream.bad.total()}


if __name__ == "__main__":
    work = {"loader": loader, "parts": parts, "memory": memory, "digest": digest}[sys.argv[1]]
    print(json.dumps(work(*sys.argv[2:])))
