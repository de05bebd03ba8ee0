"""The peers' side of the stream benchmarks: run by their own Python, prints one JSON value, imports nothing of ours.

stream_peer.py loader TARS COUNT BATCH WORKERS WORDPIECE   open_clip_train's loader
stream_peer.py parts TARS CAPTIONS WORDPIECE               webdataset, bytes alone; open_clip's tokenizers
stream_peer.py shuffle ARTICLES BATCH                      webdataset's shuffle as open_clip_train sets it
"""

import gc
import json
import random
import resource
import sys
import time
import warnings
from argparse import Namespace

warnings.simplefilter("ignore")
SIZE_PX = 224


def parts(tars, captions, wordpiece):
    """Microseconds a sample of bytes; captions a second."""
    return {"tar": tar(tars), **tokens(captions, wordpiece)}


def loader(tars, count, batch, workers, wordpiece):
    """Samples a second over one epoch from asking for the iterator to the last batch, and seconds to the first one."""
    import torch
    from open_clip.tokenizer import HFTokenizer
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    torch.set_num_threads(1)
    args = Namespace(
        train_data=tars, train_num_samples=int(count), train_data_upsampling_factors=None, dataset_resampled=False,
        batch_size=int(batch), workers=int(workers), world_size=1, seed=0,
    )  # fmt: skip
    tokenizer = HFTokenizer(wordpiece, context_length=256)
    data = get_wds_dataset(args, image_transform(SIZE_PX, is_train=True), True, tokenizer=tokenizer)
    cpu = cpu_s()
    first, seen, start = 0.0, 0, time.perf_counter()
    for images, texts in data.dataloader:
        first = first or time.perf_counter() - start
        seen += len(images)
        assert images.shape[1:] == (3, SIZE_PX, SIZE_PX)
        assert texts.shape[1] == 256
    rate = seen / (time.perf_counter() - start)
    del data  # its reading processes would stay
    gc.collect()
    return {"samples_s": rate, "first_s": first, "cpu_ms": (cpu_s() - cpu) / seen * 1e3}


def cpu_s():
    """CPU seconds of this process and of the reading processes that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(found.ru_utime + found.ru_stime for found in used)


def tar(tars):
    """Microseconds a sample."""
    import webdataset as wds

    start = time.perf_counter()
    count = sum(1 for s in wds.WebDataset(tars, shardshuffle=False) if s["jpg"] and s["txt"])
    return (time.perf_counter() - start) / count * 1e6


def tokens(captions, wordpiece):
    """Captions a second, called for one caption as open_clip_train's loader does, and for a list."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    with open(captions) as file:
        texts = json.load(file)
    rates = {}
    for name, tokenizer in (("clip", SimpleTokenizer()), ("bert", HFTokenizer(wordpiece, context_length=256))):
        start = time.perf_counter()
        for text in texts:
            tokenizer(text)[0]
        middle = time.perf_counter()
        tokenizer(texts)
        rates[name] = len(texts) / (middle - start)
        rates[f"{name}_list"] = len(texts) / (time.perf_counter() - middle)
    return rates


def shuffle(articles, batch):
    """Per cent of samples that share their article with another sample of their batch, for one worker.

    Shards of article ids stand for tars; the buffers between them and the batch are open_clip_train's.
    """
    from open_clip_train import data
    from webdataset import filters

    with open(articles) as file:
        shards = json.load(file)
    random.Random(0).shuffle(shards)
    samples = (article for shard in shards for article in shard)
    mixed = filters.shuffle(bufsize=data._SAMPLE_SHUFFLE_SIZE, initial=data._SAMPLE_SHUFFLE_INITIAL)(samples)
    shared = seen = 0
    for rows in filters.batched(int(batch), partial=False)([a] for a in mixed):
        found = [int(a) for a in rows[0]]
        counts = {a: found.count(a) for a in set(found)}
        shared += sum(n for n in counts.values() if n > 1)
        seen += len(found)
    return 100 * shared / seen


if __name__ == "__main__":
    work = {"loader": loader, "parts": parts, "shuffle": shuffle}[sys.argv[1]]
    print(json.dumps(work(*sys.argv[2:])))
