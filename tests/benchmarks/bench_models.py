"""BiomedCLIP from a warm cache beside open_clip in the same run: seconds, peak memory, embeddings a second.

A checkpoint of the full published size (352 tensors, 784 MB, random numbers) lies in a Hub on the loopback. Each
library fetches it once; then rounds are interleaved, each in a process of its own that has imported torch and both
libraries before the clock starts. Time is from the name to model, preprocess and tokenizer; memory is the process's
peak after one image and one sentence were encoded, file pages included. Embeddings a second are of images of batches
of 4 on one core, both models in one process in turn, the best of nine CPU times of each: other programs on the machine
slow a core down by a tenth and more, and never speed it up. Ratios are ours / open_clip, medians of the rounds. The
peer is the open_clip this project depends on, so nothing is installed for it.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hub_server import serve
from published_biomedclip import make_repos

from biomedclip.models.zoo import read_zoo

PEERS = ()
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))

COMMON = """
import json, resource, sys, time
import torch, open_clip, numpy, PIL.Image, tokenizers, transformers
import biomedclip.models.build, biomedclip.models.load, biomedclip.models.hub
from biomedclip.models.load import released_parts
from biomedclip.models.build import assemble
from biomedclip.models.zoo import ReleasedModel
from transformers import BertModel, AutoTokenizer
import huggingface_hub.file_download
torch.set_num_threads(1)
facts = ReleasedModel.model_validate_json(sys.argv[1])
def ours():
    return assemble(released_parts(facts))
def theirs():
    name = "hf-hub:" + facts.source.repo
    model, preprocess = open_clip.create_model_from_pretrained(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)
"""
LOAD = (
    COMMON
    + """
start, cpu = time.perf_counter(), time.process_time()
model, preprocess, tokenizer = {"ours": ours, "theirs": theirs}[sys.argv[2]]()
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
with torch.inference_mode():
    model.encode_image(preprocess(PIL.Image.new("RGB", (300, 260)))[None])
    model.encode_text(tokenizer(["a chest x-ray"]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([seconds, cpu, peak]))
"""
)
ENCODE = (
    COMMON
    + """
first, second = ours()[0], theirs()[0]
images = torch.rand(4, 3, 224, 224)
seconds = {"ours": [], "theirs": []}
with torch.inference_mode():
    for name, model in (("ours", first), ("theirs", second)) * 10:
        cpu = time.process_time()
        model.encode_image(images)
        seconds[name].append(time.process_time() - cpu)
print(json.dumps({name: 4 / min(values[1:]) for name, values in seconds.items()}))
"""
)


def run(script: str, environment: dict[str, str], *arguments: str) -> object:
    """The JSON value a child prints last."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(folder: Path) -> dict[str, float]:
    """Ratios of loading and encoding."""
    os.environ["BIOMEDCLIP_CACHE"] = str(folder / "own")
    repos, facts = make_repos(folder / "files")
    text = facts.model_dump_json()
    with serve(repos) as server:
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(folder / "home"),
                       "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "OMP_WAIT_POLICY": "PASSIVE"}  # fmt: skip
        rounds: dict[str, list] = {"ours": [], "theirs": []}
        for number in range(ROUNDS + 1):
            for name in ("ours", "theirs"):
                seconds = run(LOAD, environment, text, name)
                if number:  # the first fills the cache
                    rounds[name].append(seconds)
        rates = run(ENCODE, environment, text)
    middle = {
        name: [statistics.median(column) for column in zip(*values, strict=True)] for name, values in rounds.items()
    }
    for name, (seconds, cpu, peak) in middle.items():
        print(f"{name:<7} load {seconds:6.2f} s ({cpu:.2f} s CPU), peak {peak:,.0f} MB, {rates[name]:.2f} images/s")
    return {
        "load_time_vs_open_clip": round(middle["ours"][0] / middle["theirs"][0], 3),
        "load_cpu_vs_open_clip": round(middle["ours"][1] / middle["theirs"][1], 3),
        "load_mem_vs_open_clip": round(middle["ours"][2] / middle["theirs"][2], 3),
        "encode_vs_open_clip": round(rates["ours"] / rates["theirs"], 3),
        "load_s": round(middle["ours"][0], 2),
    }


def list_seconds() -> float:
    """The best of five times of `biomedclip models`: what it costs, not what else the machine does."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "biomedclip", "models"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    return round(min(seconds), 3)


def main() -> None:
    """Measure and print."""
    folder = Path(tempfile.mkdtemp(prefix="bench-models-"))
    try:
        figures = measure(folder)
    finally:
        shutil.rmtree(folder)
    zoo = read_zoo()
    figures |= {
        "zoo_models": len(zoo), "zoo_layout_tested": sum(model.status != "documented" for model in zoo),
        "models_list_s": list_seconds(),
    }  # fmt: skip
    print(json.dumps({"benchmark": "models", "figures": figures}))


if __name__ == "__main__":
    main()
