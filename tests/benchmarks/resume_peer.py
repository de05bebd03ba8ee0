"""What other loaders do when a run is killed after some batches and goes on: run by the peers' Python, one at a time.

    resume_peer.py lightning|lightning_unsized|datasets|datasets_interleaved|litdata|litdata_combined TARS ROOT WORKERS

Prints the batches (lists of keys) of an uninterrupted epoch, those before the state was taken, and those after a new
process's objects were given that state, with WORKERS reading processes instead of two. `TARS` are our own tars.
"""

import contextlib
import glob
import json
import logging
import sys
import tarfile
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
BATCH, STOP = 8, 5


def read_keys(tars):
    """Keys of all samples of the tars, in their order."""
    keys = []
    for path in sorted(glob.glob(tars)):
        with tarfile.open(path) as tar:
            keys += [name.removesuffix(".jpg") for name in tar.getnames() if name.endswith(".jpg")]
    return keys


def lightning(tars, root, workers, sized=True):
    """Trainer and a shuffled DataLoader, nothing added; or a stream without a length that says where it is."""
    import torch
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from torch.utils.data import DataLoader, IterableDataset

    keys = read_keys(tars)

    class Stream(IterableDataset):
        """Batches in a fixed order; its state is what Lightning asks for."""

        def __init__(self):
            self.place = 0

        def __iter__(self):
            while self.place < len(keys) // BATCH:
                self.place += 1
                yield keys[(self.place - 1) * BATCH : self.place * BATCH]

        def state_dict(self):
            return {"place": self.place}

        def load_state_dict(self, state):
            self.place = state["place"]

    class Module(LightningModule):
        """Sees keys and trains one weight."""

        def __init__(self, path=None):
            super().__init__()
            self.weight, self.path, self.seen = torch.nn.Parameter(torch.ones(1)), path, []

        def training_step(self, batch, index):
            self.seen.append(list(batch))
            return self.weight.square().sum()

        def on_train_batch_end(self, *_):
            if self.path and self.trainer.global_step == STOP:
                self.trainer.save_checkpoint(self.path)
                raise KeyboardInterrupt

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(number, path=None, checkpoint=None):
        seed_everything(0)
        if sized:
            loader = DataLoader(keys, batch_size=BATCH, shuffle=True, num_workers=number, collate_fn=list)
        else:
            loader = Stream()
        module = Module(path)
        trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
                          enable_progress_bar=False, enable_model_summary=False, default_root_dir=root)  # fmt: skip
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=False)
        return module.seen

    path = Path(root) / f"lightning-{sized}.ckpt"
    return run(2), run(2, path=path), run(workers, checkpoint=path)


def datasets(tars, root, workers, interleaved=False):
    """Streamed, shuffled tars with their own state_dict, read in this process; one set, or two interleaved 3 to 1."""
    from datasets import interleave_datasets, load_dataset

    files = sorted(glob.glob(tars))

    def make():
        def read(names):
            return load_dataset("webdataset", data_files={"train": names}, split="train", streaming=True)

        if not interleaved:
            return read(files).shuffle(seed=0, buffer_size=64)
        half = len(files) // 2
        parts = [read(files[:half]).shuffle(seed=0, buffer_size=64), read(files[half:]).shuffle(seed=1, buffer_size=64)]
        return interleave_datasets(parts, probabilities=[0.75, 0.25], seed=0, stopping_strategy="all_exhausted")

    def batches(dataset):
        rows = []
        for row in dataset:
            rows.append(row["__key__"])
            if len(rows) == BATCH:
                yield rows
                rows = []

    whole = list(batches(make()))
    stopped = make()
    before = []
    for batch in batches(stopped):
        before.append(batch)
        if len(before) == STOP:
            break
    state = json.loads(json.dumps(stopped.state_dict(), default=str))
    again = make()
    again.load_state_dict(state)
    return whole, before, list(batches(again))


def litdata(tars, root, workers, combined=False):
    """Chunks written by `optimize`, read by StreamingDataLoader with its state; one set, or two combined 3 to 1."""
    import os

    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = f"{root}/litdata-cache"
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = f"{root}/litdata-data"
    from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset, optimize

    keys = read_keys(tars)
    halves = [keys[: len(keys) // 2], keys[len(keys) // 2 :]] if combined else [keys]
    for number, part in enumerate(halves):
        folder = f"{root}/litdata-{combined}-{number}"
        if not Path(folder).exists():
            optimize(fn=keep, inputs=part, output_dir=folder, chunk_size=16, num_workers=1)

    def make(number):
        parts = [StreamingDataset(f"{root}/litdata-{combined}-{n}", shuffle=True, seed=0) for n in range(len(halves))]
        dataset = (
            CombinedStreamingDataset(parts, weights=(0.75, 0.25), seed=0, iterate_over_all=False)
            if combined
            else parts[0]
        )
        return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=number, shuffle=True)

    whole = [list(batch) for batch in make(2)]
    stopped, before = make(2), []
    for batch in stopped:
        before.append(list(batch))
        if len(before) == STOP:
            break
    state = stopped.state_dict()
    again = make(workers)
    again.load_state_dict(state)
    return whole, before, [list(batch) for batch in again]


def keep(key):
    """What `optimize` stores of a key: the key."""
    return key


if __name__ == "__main__":
    name, tars, root, workers = sys.argv[1:]
    work = {
        "lightning": lightning, "lightning_unsized": lambda *a: lightning(*a, sized=False), "datasets": datasets,
        "datasets_interleaved": lambda *a: datasets(*a, interleaved=True), "litdata": litdata,
        "litdata_combined": lambda *a: litdata(*a, combined=True),
    }  # fmt: skip
    try:
        whole, before, after = work[name](tars, root, int(workers))
        answer = {"whole": whole, "before": before, "after": after}
    except Exception as error:  # a refusal is a result too
        answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    print("\n" + json.dumps(answer))
