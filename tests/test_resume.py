"""The resume contract: whoever goes on with a run, in however many processes, sees what would have come next."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from synthetic_shards import write_articles, write_colours
from test_loader import damage, equal, make_samples

from biomedclip.errors import DataError
from biomedclip.stream.ledger import Ledger, read_unreadable
from biomedclip.stream.loader import StreamLoader

STEPS, BATCH = 9, 8
RANKS, WORKERS = (1, 2, 4), (0, 1, 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    return write_colours(root / "colours"), write_articles(root / "articles")


def facts(batch):
    """Key, pixels and tokens of each sample of a batch."""
    rows = zip(batch["key"], batch["image"], batch["text"], batch["epoch"].tolist(), strict=True)
    return [
        (key, hashlib.sha256(image.numpy().tobytes()).hexdigest(), text.tolist(), epoch)
        for key, image, text, epoch in rows
    ]


def weave(parts):
    """Whole batches from those of all processes: process r has the slots r, r + W, ..."""
    whole = []
    for slices in zip(*parts, strict=True):
        rows = [None] * BATCH
        for rank, rows_of_rank in enumerate(slices):
            rows[rank :: len(parts)] = rows_of_rank
        whole.append(rows)
    return whole


@pytest.fixture(scope="module")
def uninterrupted(folders):
    return [facts(batch) for batch in StreamLoader(make_samples(folders), max_steps=STEPS)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # 3 readers on 2 cores
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("ranks", RANKS)
def test_a_run_goes_on_exactly_on_any_number_of_processes_and_readers(folders, uninterrupted, ranks, workers):
    stopped = StreamLoader(make_samples(folders, rank=1, world_size=2), max_steps=STEPS, workers=1)
    for _ in zip(range(4), stopped, strict=False):
        pass
    state = json.loads(json.dumps(stopped.state_dict()))
    assert state["delivered"] == 4
    parts = []
    for rank in range(ranks):
        loader = StreamLoader(make_samples(folders, rank=rank, world_size=ranks), max_steps=STEPS, workers=workers)
        loader.load_state_dict(state)
        parts.append([facts(batch) for batch in loader])
    assert weave(parts) == uninterrupted[4:]


def test_the_state_is_small_and_the_same_on_every_process_even_where_one_met_bad_samples(tmp_path):
    folders = write_colours(tmp_path / "colours"), write_articles(tmp_path / "articles")
    damage(folders[0], {"train-red-1"})
    states, met = [], []
    for rank in range(2):
        loader = StreamLoader(make_samples(folders, rank=rank, world_size=2, max_bad=1.0), max_steps=3)
        loader.keep_ledger(tmp_path / "run")
        list(loader)
        states.append(loader.state_dict())
        met.append(loader.bad.total())
    assert states[0] == states[1]
    assert met[0] != met[1]
    assert len(json.dumps(states[0])) < 1000


def test_bad_samples_are_noted_with_reason_step_and_substitute(tmp_path):
    folders = write_colours(tmp_path / "colours"), write_articles(tmp_path / "articles")
    damage(folders[0], {"train-red-1", "train-blue-4"})
    loader = StreamLoader(make_samples(folders, max_bad=1.0), max_steps=STEPS, workers=2)
    loader.keep_ledger(tmp_path / "run")
    batches = list(loader)
    entries = read_unreadable(tmp_path / "run")
    assert {entry.key for entry in entries} == {"train-red-1", "train-blue-4"}
    assert {entry.reason for entry in entries} == {"wrong_bytes"}
    assert loader.ledger.by_reason == {"wrong_bytes": len(entries)}
    for entry in entries:
        assert batches[entry.step]["key"][entry.slot] == entry.substitute
        assert entry.source == "colours"
        assert entry.key in entry.detail


def test_a_resumed_run_passes_over_what_it_could_not_read_though_the_disk_is_whole_again(tmp_path):
    def build(name):
        return write_colours(tmp_path / name / "colours"), write_articles(tmp_path / name / "articles")

    bad, whole = build("bad"), build("whole")
    damage(bad[0], {"train-red-1", "train-blue-4"})
    first = StreamLoader(make_samples(bad, max_bad=1.0), max_steps=STEPS)
    first.keep_ledger(tmp_path / "one")
    expected = list(first)
    stopped = StreamLoader(make_samples(bad, max_bad=1.0), max_steps=STEPS)
    stopped.keep_ledger(tmp_path / "two")
    iterator = iter(stopped)
    for _ in range(7):
        next(iterator)
    # Two steps more were seen than the checkpoint knows: their entries must not come twice.
    state = stopped.state_dict() | {"delivered": 5}
    assert {entry.key for entry in read_unreadable(tmp_path / "two")} == {"train-red-1", "train-blue-4"}
    rest = StreamLoader(make_samples(whole, max_bad=1.0), max_steps=STEPS)
    rest.load_state_dict(state)
    rest.keep_ledger(tmp_path / "two")
    assert all(equal(one, other) for one, other in zip(expected[5:], rest, strict=True))
    assert read_unreadable(tmp_path / "two") == read_unreadable(tmp_path / "one")
    assert rest.bad == first.bad


def test_the_ledger_of_more_processes_is_taken_over_by_fewer(tmp_path, folders):
    from biomedclip.stream.ledger import Unreadable

    def entry(step, slot):
        return Unreadable(step, slot, "s", f"k{slot}\u2028", "cut_off", "why", 0, slot, "other")

    for rank in range(4):
        ledger = Ledger(tmp_path, plan_sha256="p", rank=rank, world_size=4)
        ledger.add([entry(1, rank), entry(6, rank)])
    with (tmp_path / "unreadable" / "rank-2.jsonl").open("a") as file:
        file.write('{"step": 6, "sl')  # killed while writing
    other = Ledger(tmp_path, plan_sha256="another plan", rank=1, world_size=2)
    other.rewind(5)
    assert other.known == {}
    one = Ledger(tmp_path, plan_sha256="p", rank=0, world_size=2)
    one.rewind(5)
    assert one.known == {(0, slot): ("cut_off", "why") for slot in range(4)}
    assert one.own == 2
    assert [(e.step, e.slot) for e in read_unreadable(tmp_path)] == [(1, slot) for slot in range(4)]


@pytest.mark.parametrize("change", ["cut", "same size"])
def test_a_tar_of_ours_that_changes_under_the_run_is_counted_sample_by_sample(tmp_path, change):
    folders = write_colours(tmp_path / "colours", splits=("train",)), write_articles(tmp_path / "articles")
    whole = StreamLoader(make_samples(folders, max_bad=1.0), max_steps=STEPS)
    expected = [batch["key"] for batch in whole]
    loader = StreamLoader(make_samples(folders, max_bad=1.0), max_steps=STEPS)
    loader.keep_ledger(tmp_path / "run")
    batches = iter(loader)
    first = next(batches)
    tar = folders[0] / "00000.tar"
    data = tar.read_bytes()
    half = len(data) // 2
    if change == "cut":
        tar.write_bytes(data[:half])
    else:
        # The second half of the samples is moved by a block: other members at every place, the size as before.
        start = data.index(b"train-green-3.jpg")
        tar.write_bytes(data[:start] + b"\0" * 512 + data[start:-512])
    keys = [first["key"], *(batch["key"] for batch in batches)]
    entries = read_unreadable(tmp_path / "run")
    assert entries
    assert all(entry.step > 0 and entry.source == "colours" for entry in entries)
    assert {entry.reason for entry in entries} == {"cut_off" if change == "cut" else "wrong_bytes"}
    lost = {(entry.step, entry.slot): entry for entry in entries}
    for step, (before, after) in enumerate(zip(expected, keys, strict=True)):
        for slot, (old, new) in enumerate(zip(before, after, strict=True)):
            if (step, slot) in lost:
                assert lost[step, slot].substitute == new
            else:
                assert old == new
    if change == "cut":
        # The tar keeps its order: what was cut off are the samples at its end, all of them and no other.
        gone = {entry.key for entry in entries}
        assert {key for key in gone if key.startswith("train-red")} == set()
        assert any(key.startswith("train-blue") for key in gone)


def test_a_run_stops_where_more_is_unreadable_than_was_allowed_and_says_why(tmp_path):
    folders = write_colours(tmp_path / "colours", splits=("train",)), write_articles(tmp_path / "articles")
    tar = folders[0] / "00000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    loader = StreamLoader(make_samples(folders, max_bad=0.1), max_steps=50)
    with pytest.raises(DataError, match=r"more than 10% \(found \d+ cut_off; last: .*raise data.max_bad"):
        list(loader)


KILLED = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_loader import make_samples
from test_resume import facts
from biomedclip.stream.loader import StreamLoader

def main(root, rank, ranks, workers, state):
    samples = make_samples((Path(root) / "colours", Path(root) / "articles"), rank=rank, world_size=ranks)
    loader = StreamLoader(samples, max_steps=40, workers=workers)
    if state:
        loader.load_state_dict(json.loads(state))
    for batch in loader:
        print(json.dumps([loader.state_dict(), facts(batch)]), flush=True)

if __name__ == "__main__":
    root, rank, ranks, workers, state = sys.argv[1:]
    main(root, int(rank), int(ranks), int(workers), state)
"""


@pytest.mark.fault
@pytest.mark.timeout(400)  # 21 processes that import torch
def test_killed_anywhere_a_run_goes_on_with_the_same_samples_in_every_topology(tmp_path):
    write_colours(tmp_path / "colours")
    write_articles(tmp_path / "articles")
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent)))

    def start(rank, ranks, workers, state=""):
        command = [sys.executable, str(script), str(tmp_path), *map(str, (rank, ranks, workers)), state]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

    folders = tmp_path / "colours", tmp_path / "articles"
    whole = [facts(batch) for batch in StreamLoader(make_samples(folders), max_steps=40)]
    seen, state = [], ""
    topologies = [(ranks, workers) for ranks in RANKS for workers in WORKERS]
    for number, (ranks, workers) in enumerate(topologies):
        runs = [start(rank, ranks, workers, state) for rank in range(ranks)]
        wanted = 4 if number < len(topologies) - 1 else 40 - len(seen)
        parts = []
        for run in runs:
            lines = [json.loads(run.stdout.readline()) for _ in range(wanted)]
            parts.append([[tuple(row) for row in rows] for _, rows in lines])
            state = json.dumps(lines[-1][0])
        for run in runs:  # between any two batches, with readers ahead
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            run.stdout.close()
        seen += weave(parts)
    assert [[list(row) for row in rows] for rows in seen] == [[list(row) for row in rows] for rows in whole]


def test_batches_are_shared_memory_in_readers_and_ordinary_tensors_here(folders):
    here = next(iter(StreamLoader(make_samples(folders), max_steps=1)))
    there = next(iter(StreamLoader(make_samples(folders), max_steps=1, workers=1)))
    assert not here["image"].is_shared()
    assert there["image"].is_shared()
    assert there["image"].is_contiguous()
    assert torch.equal(here["image"], there["image"])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_reading_process_is_the_error_a_user_reads(tmp_path, workers):
    folders = write_colours(tmp_path / "colours"), write_articles(tmp_path / "articles")
    loader = StreamLoader(make_samples(folders), max_steps=3, workers=workers)
    (folders[1] / "00000.tar").unlink()
    with pytest.raises(DataError, match="8 samples in a row cannot be read"):
        list(loader)


DEAD_READER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_loader import make_samples
from biomedclip.errors import DataError
from biomedclip.stream.loader import StreamLoader

root = Path({root!r})
batches = iter(StreamLoader(make_samples((root / "colours", root / "articles")), max_steps=4000, workers=1))
next(batches)
children = Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()
try:
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    list(batches)
except DataError as error:
    print(error)
"""


@pytest.mark.fault
def test_a_reading_process_that_is_killed_ends_the_run_with_advice(tmp_path, folders):
    script = DEAD_READER.format(tests=str(Path(__file__).parent), root=str(folders[0].parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    # torch raises in whatever runs when the signal comes; within our code a user reads what to do.
    assert "a reading process died" in done.stdout or "is killed by signal" in done.stderr
