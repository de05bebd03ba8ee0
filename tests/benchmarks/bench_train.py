"""Training beside open_clip 3.3.0, in one run: same weights, same batches, interleaved, medians.

The loss is timed by the clock on all cores, which needs an idle machine, and by CPU time of one thread; steps by CPU
time of one thread, which other programs on the machine change little.

Loss: forward and backward of B unit embeddings of width 512 at a logit scale of 100, a child process a loss, whose
memory is the peak of the resident set above what stood before. Curve: 500 steps of a small CLIP on identical
batches, our Trainer beside a loop that follows `open_clip_train.train.train_one_epoch` step by step (schedule, AdamW
groups, clamp). Step: a whole training step of a ViT and a BERT of equal depth and width, captions padded to 256 tokens
with the lengths of PMC captions (mean 78, 95 % below 196). Accumulation: gradients of one batch in four parts against
the whole batch, by us and by open_clip's `--accum-freq 4`, re-implemented from the same function.

Where a CUDA device is at hand: ViT-B/16 in bf16, samples per second and share of the peak, open_clip beside it.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
from lightning.pytorch import Callback

from biomedclip.config import check_config
from biomedclip.training.config import TrainConfig
from biomedclip.training.module import ContrastiveModule
from biomedclip.training.optim import rate_factor
from biomedclip.training.throughput import peak_flops, sample_flops
from biomedclip.training.trainer import make_trainer, quiet_lightning

PEERS = ()
SIZES = {4096: 3, 8192: 3, 16384: 2}
"""Batch sizes, and measurements of each."""
WIDTH, CURVE_STEPS, CURVE_BATCH = 512, 500, 32
PREPROCESS = {"size": 224, "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}

CHILD = """
import ctypes, json, sys, time
import torch
from torch.nn import functional as F
who = sys.argv[1]
def loss(image, text, scale, bias):
    if who == "ours":
        from biomedclip.training.objectives.softmax import clip_loss
        return clip_loss(image, text, scale)
    if who == "ours_siglip":
        from biomedclip.training.objectives.sigmoid import siglip_loss
        return siglip_loss(image, text, scale, bias)
    from open_clip.loss import ClipLoss, SigLipLoss
    return ClipLoss()(image, text, scale) if who == "open_clip" else SigLipLoss()(image, text, scale, bias)
def embeddings(size):
    return (F.normalize(torch.randn(size, 512, generator=torch.Generator().manual_seed(n)), dim=1) for n in (0, 1))
def run(a, b, threads):
    torch.set_num_threads(threads)
    scale, bias = torch.tensor(100.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    clock = time.process_time if threads == 1 else time.perf_counter
    began = clock()
    value = loss(a, b, scale, bias)
    value.backward()
    return clock() - began, value.item()
def resident(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name))
run(*(rows.requires_grad_() for rows in embeddings(256)), 1)
for line in sys.stdin:
    size, threads = map(int, line.split())
    a, b = (rows.requires_grad_() for rows in embeddings(size))
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the last measurement left must not count as there
    before = resident("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    seconds, value = run(a, b, threads)
    print(json.dumps({"seconds": seconds, "mib": resident("VmHWM") - before, "loss": value}), flush=True)
    del a, b
"""


def say(line: str) -> None:
    """Progress, apart from the result."""
    print(line, file=sys.stderr, flush=True)


class Child:
    """A process that measures one loss; torch is imported once."""

    def __init__(self, who: str) -> None:
        # As the command line sets it: threads that wait busily stall both where any other program runs.
        known = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, who], env=known, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def measure(self, size: int, threads: int) -> dict[str, float]:
        """Seconds, MiB and value of one loss."""
        pipes: Any = self.process
        pipes.stdin.write(f"{size} {threads}\n")
        pipes.stdin.flush()
        return dict(json.loads(pipes.stdout.readline()))

    def end(self) -> None:
        """Let the process end."""
        self.process.communicate()


def measure_losses() -> dict[str, float]:
    """Medians of seconds and MiB, theirs over ours: by the clock on all cores, and once by CPU time of one thread."""
    cores = len(os.sched_getaffinity(0))
    figures: dict[str, float] = {}
    for name, sizes in (("loss", SIZES), ("siglip", {8192: 3})):
        suffix = "" if name == "loss" else f"_{name}"
        pair = [Child(f"ours{suffix}"), Child(f"open_clip{suffix}")]
        for size, rounds in sizes.items():
            a, b = compare(pair, size, rounds, cores)
            short = f"{size // 1024}k"
            figures |= {
                f"{name}_time_vs_open_clip_{short}": round(b["seconds"] / a["seconds"], 2),
                f"{name}_mem_vs_open_clip_{short}": round(b["mib"] / a["mib"], 1),
                f"{name}_seconds_{short}": round(a["seconds"], 2),
                f"{name}_mib_{short}": round(a["mib"]),
            }
            say(f"{name} {short}: ours {a}, open_clip {b}")
        if name == "loss":
            a, b = compare(pair, 8192, 1, 1)
            figures["loss_cpu_time_vs_open_clip_8k"] = round(b["seconds"] / a["seconds"], 2)
        for child in pair:
            child.end()
    return figures


def compare(pair: list[Child], size: int, rounds: int, threads: int) -> list[dict[str, float]]:
    """Medians of both over interleaved rounds; ends the benchmark where their losses differ."""
    found: list[list[dict[str, float]]] = [[], []]
    for _ in range(rounds):
        for child, runs in zip(pair, found, strict=True):
            runs.append(child.measure(size, threads))
    if abs(found[0][0]["loss"] / found[1][0]["loss"] - 1) > 1e-5:
        raise SystemExit(f"losses differ: {found}")
    return [{k: statistics.median(run[k] for run in runs) for k in ("seconds", "mib")} for runs in found]


class Batches:
    """A loader of given batches."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter([dict(batch) for batch in self.batches])


class Watch(Callback):
    """Loss and seconds of each step, gradients of the last."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.wall: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._began, self._wall = time.process_time(), time.perf_counter()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == trainer.max_steps - 1:
            self.gradients = {n: p.grad.clone() for n, p in pl_module.model.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(pl_module.latest["loss"]))  # waits for the device
        self.wall.append(time.perf_counter() - self._wall)
        self.seconds.append(time.process_time() - self._began)


def settings(**changes: Any) -> TrainConfig:
    """A config of ours with open_clip's defaults."""
    values = {"model": {"name": "x"}, "data": {"sources": [{"name": "made-up", "path": "x"}]}, "device": "cpu",
              "optim": {"lr": 5e-4, "clip_norm": None}}  # fmt: skip
    return check_config(values | changes, TrainConfig, "bench")


def train_ours(model: Any, config: TrainConfig, batches: list[dict[str, Any]], *, double: bool = False) -> Watch:
    """Our steps on the batches."""
    module, watch = ContrastiveModule(model.train(), config), Watch()
    if double:
        module.double()
    with tempfile.TemporaryDirectory() as folder, quiet_lightning():
        trainer = make_trainer(config, Path(folder), [watch], validates=False)
        trainer.fit(module, Batches(batches), val_dataloaders=[])
    return watch


def pixels_of(batch: dict[str, Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A batch's pictures as open_clip's transform gives them."""
    mean, std = (torch.tensor(PREPROCESS[name], dtype=dtype).view(-1, 1, 1) for name in ("mean", "std"))
    return (batch["image"].to(dtype) / 255 - mean) / std


def open_clip_optimizer(model: Any, lr: float = 5e-4) -> torch.optim.AdamW:
    """AdamW as open_clip_train.main groups it."""

    def is_excluded(name: str, p: Any) -> bool:
        return p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

    named = list(model.named_parameters())
    return torch.optim.AdamW(
        [{"params": [p for n, p in named if is_excluded(n, p)], "weight_decay": 0.0},
         {"params": [p for n, p in named if not is_excluded(n, p)], "weight_decay": 0.2}],
        lr=lr, betas=(0.9, 0.98), eps=1e-6,
    )  # fmt: skip


def train_theirs(model: Any, batches: list[dict[str, Any]], *, max_steps: int, warmup: int) -> Watch:
    """open_clip's steps on the batches: schedule, zero, forward, loss, backward, step, clamp."""
    model.train()
    model.output_dict = True
    loss, optimizer, watch = open_clip.ClipLoss(), open_clip_optimizer(model), Watch()
    for step, batch in enumerate(batches):
        began = time.process_time()
        rate = (step + 1) / warmup if step < warmup else (
            0.5 * (1 + math.cos(math.pi * (step - warmup) / (max_steps - warmup))))  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * rate
        optimizer.zero_grad()
        out = model(pixels_of(batch), batch["text"])
        total = sum(loss(**out, output_dict=True).values())
        total.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        watch.losses.append(total.item())
        watch.seconds.append(time.process_time() - began)
    return watch


def small_clip(**vision: Any) -> Any:
    """A CLIP of a few hundred thousand weights and CLIP's vocabulary."""
    torch.manual_seed(0)
    model = open_clip.CLIP(
        64, {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 32, **vision},
        {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    )  # fmt: skip
    model.visual.preprocess_cfg = PREPROCESS | {"size": 32}
    return model


def made_up_batches(count: int, size: int) -> list[dict[str, Any]]:
    """Pictures of sixteen tints with noise, captions that name the tint among words of no meaning."""
    random = torch.Generator().manual_seed(1)
    tints = torch.randint(0, 256, (16, 3, 1, 1), generator=random)
    batches = []
    for _ in range(count):
        kind = torch.randint(0, 16, (size,), generator=random)
        noise = torch.randint(-60, 60, (size, 3, 32, 32), generator=random)
        text = torch.randint(1000, 4000, (size, 32), generator=random)
        lengths = torch.randint(4, 32, (size, 1), generator=random)
        place = torch.arange(32)
        text = torch.where(place < lengths, text, torch.where(place == lengths, 49407, 0))
        text[:, 0], text[:, 1], text[:, -1] = 49406, 500 + kind, torch.where(lengths[:, 0] >= 31, 49407, text[:, -1])
        batches.append({"image": (tints[kind] + noise).clamp(0, 255).to(torch.uint8), "text": text,
                        "source": ["made-up"] * size})  # fmt: skip
    return batches


def measure_curve() -> dict[str, float]:
    """The largest difference of the losses of 500 steps, how far the loss fell, and open_clip's difference from itself.

    The samples of a batch in another order are the same batch, and only rounding tells: what open_clip differs by from
    itself then is what two right programs differ by.
    """
    batches = made_up_batches(CURVE_STEPS, CURVE_BATCH)
    config = settings(max_steps=CURVE_STEPS, batch_size=CURVE_BATCH, schedule={"warmup_steps": 50})
    if rate_factor(400, CURVE_STEPS, config.schedule) >= 1:
        raise SystemExit("the schedule does not fall")
    start = small_clip()
    first = {name: value.clone() for name, value in start.state_dict().items()}
    theirs_model = small_clip()
    theirs_model.load_state_dict(first)
    ours = train_ours(start, config, batches).losses
    theirs = train_theirs(theirs_model, batches, max_steps=CURVE_STEPS, warmup=50).losses
    order = torch.randperm(CURVE_BATCH, generator=torch.Generator().manual_seed(5))
    other_order = [{**batch, "image": batch["image"][order], "text": batch["text"][order]} for batch in batches]
    again = small_clip()
    again.load_state_dict(first)
    themselves = train_theirs(again, other_order, max_steps=CURVE_STEPS, warmup=50).losses
    apart, early, first_step, control = (
        max(abs(a - b) for a, b in zip(x[:steps], theirs[:steps], strict=True))
        for x, steps in ((ours, CURVE_STEPS), (ours, 200), (ours, 1), (themselves, CURVE_STEPS))
    )
    say(f"curve: {ours[0]:.3f} to {ours[-1]:.3f}, theirs {theirs[-1]:.3f}, apart {apart:.2e}, control {control:.2e}")
    return {
        "curve_max_abs_diff": apart, "curve_max_abs_diff_200_steps": early, "curve_abs_diff_first_step": first_step,
        "curve_open_clip_against_itself": control,
        "curve_first_loss": round(ours[0], 3), "curve_last_loss": round(ours[-1], 3),
    }  # fmt: skip


def open_clip_accumulated(model: Any, parts: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Gradients as open_clip leaves them with `--accum-freq len(parts)`."""
    model.zero_grad()
    model.output_dict, loss = True, open_clip.ClipLoss()
    cached: dict[str, list[torch.Tensor]] = {"image_features": [], "text_features": []}
    for part in parts:
        with torch.no_grad():
            out = model(pixels_of(part, torch.float64), part["text"])
        for name, rows in cached.items():
            rows.append(out[name])
    for number, part in enumerate(parts):
        out = model(pixels_of(part, torch.float64), part["text"])
        scale = out.pop("logit_scale")
        inputs = {k: torch.cat([*rows[:number], out[k], *rows[number + 1 :]]) for k, rows in cached.items()}
        loss(**inputs, logit_scale=scale).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def measure_accumulation() -> dict[str, float]:
    """Relative errors of tower gradients, and the logit scale's gradient over the exact one; float64, 4 parts of 16.

    With patch dropout the exact gradient is that of one graph over all parts, each with the patches it drew.
    """
    batch = made_up_batches(1, 64)[0]
    parts = [{name: column[first : first + 16] for name, column in batch.items()} for first in range(0, 64, 16)]
    figures = {}
    for share, suffix in ((0.0, ""), (0.5, "_patch_dropout")):
        config = settings(max_steps=1, batch_size=64, micro_batch_size=16, optim={"lr": 1e-30, "clip_norm": None},
                          towers={"patch_dropout": share})  # fmt: skip
        ours = train_ours(small_clip(), config, [batch], double=True).gradients
        exact_module = ContrastiveModule(small_clip().train(), config).double()
        exact_module.trainer = _Stopped()
        rows = [torch.cat(x) for x in zip(*(exact_module._embed_part(n, p) for n, p in enumerate(parts)), strict=True)]
        exact_module._loss(tuple(rows), batch).backward()
        exact = {n: p.grad.clone() for n, p in exact_module.model.named_parameters() if p.grad is not None}
        theirs_model = exact_module.model
        theirs = open_clip_accumulated(theirs_model, parts)
        for who, found in (("gradcache", ours), ("open_clip_accum", theirs)):
            worst = max(float((found[n] - exact[n]).norm() / exact[n].norm()) for n in exact if n != "logit_scale")
            # With patch dropout theirs draws other patches, so there is no exact gradient to compare it with.
            if who == "gradcache" or not share:
                figures[f"{who}_rel_err{suffix}"] = float(f"{worst:.3g}")
            ratio = float(found["logit_scale"] / exact["logit_scale"])
            name = "logit_scale_grad_ratio" if who == "gradcache" else "open_clip_logit_scale_grad_ratio"
            if not share:
                figures[name] = round(ratio, 9)
    say(f"accumulation: {figures}")
    return figures


class _Stopped:
    """A trainer at step 0, for embeddings outside of training."""

    global_step = 0
    precision_plugin = property(lambda self: __import__("lightning").pytorch.plugins.precision.Precision())


def bert_clip(size_px: int = 224) -> Any:
    """A ViT and a BERT of 4 layers and width 192: BiomedCLIP's proportions at a hundredth of its weights."""
    from open_clip.hf_model import HFTextEncoder
    from transformers import BertConfig

    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(
        128, {"image_size": size_px, "layers": 4, "width": 192, "patch_size": 16, "head_width": 64},
        {"context_length": 256, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1},
    )  # fmt: skip
    bert = BertConfig(hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768,
                      hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    model.text = HFTextEncoder("bert", 128, config=bert, pooler_type="cls_last_hidden_state_pooler", proj_type="mlp",
                               pretrained=False)  # fmt: skip
    # The pooler of the bare BERT, which nothing reads, would get no gradient.
    model.text.transformer.pooler = None
    model.visual.preprocess_cfg = PREPROCESS | {"size": size_px}
    return model


def caption_batches(count: int, size: int) -> list[dict[str, Any]]:
    """Noise and captions of the lengths of PMC's: log-normal, mean 78 tokens, 95 % below 196, cut at 256."""
    random = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(count):
        draws = torch.randn(size, 1, generator=random)
        lengths = torch.exp(4.05 + 0.75 * draws).clamp(4, 256).long()
        text = torch.randint(1000, 30000, (size, 256), generator=random)
        text[torch.arange(256) >= lengths] = 0
        image = torch.randint(0, 256, (size, 3, 224, 224), generator=random, dtype=torch.uint8)
        batches.append({"image": image, "text": text, "source": ["made-up"] * size})
    return batches


def measure_step() -> dict[str, float]:
    """Samples per second of a whole step, ours over theirs."""
    size, steps, rounds = 32, 3, 2
    batches = caption_batches(steps, size)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):
        config = settings(max_steps=steps, batch_size=size)
        ours += train_ours(bert_clip(), config, batches).seconds[1:]
        theirs += train_theirs(bert_clip(), batches, max_steps=steps, warmup=1).seconds[1:]
    a, b = statistics.median(ours), statistics.median(theirs)
    share = float((caption_batches(1, 512)[0]["text"] == 0).float().mean())
    say(f"step: ours {a:.2f} s, open_clip {b:.2f} s, padding {share:.0%}")
    return {"step_vs_open_clip": round(b / a, 2), "step_samples_s": round(size / a, 1),
            "step_padding_share": round(share, 2)}  # fmt: skip


def measure_gpu() -> dict[str, float | str]:
    """ViT-B/16 in bf16 at batch 512, ours compiled and not, open_clip beside it. Empty without a CUDA device."""
    if not torch.cuda.is_available():
        say("no CUDA device: the share of a GPU's peak is not measured")
        return {}
    device, size, steps = torch.device("cuda"), 512, 30
    peak = peak_flops(device, "bf16")
    figures: dict[str, float | str] = {"gpu": torch.cuda.get_device_name(), "gpu_torch": torch.__version__}
    random = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (size, 3, 224, 224), generator=random, dtype=torch.uint8)
    text = torch.randint(1000, 40000, (size, 77), generator=random)
    text[:, 40], text[:, 41:] = 49407, 0
    batch = {"image": image.pin_memory(), "text": text.pin_memory(), "source": ["made-up"] * size}

    def model() -> Any:
        made = open_clip.create_model("ViT-B-16", pretrained=None)
        return made

    flops = sample_flops(model(), 224)
    for name, compiled in (("ours", False), ("ours_compiled", True)):
        config = settings(
            max_steps=steps, batch_size=size, device="gpu", precision="bf16", towers={"compile": compiled}
        )
        watch = train_ours(model(), config, [batch] * steps)
        figures[f"gpu_{name}_samples_s"] = round(size / statistics.median(watch.wall[10:]))
    figures["gpu_open_clip_samples_s"] = round(size / _theirs_on_gpu(model().to(device), batch, steps))
    for name in ("ours", "ours_compiled", "open_clip"):
        if peak:
            figures[f"gpu_{name}_mfu"] = round(figures[f"gpu_{name}_samples_s"] * flops / peak, 3)  # type: ignore[operator]
    return figures


def _theirs_on_gpu(model: Any, batch: dict[str, Any], steps: int) -> float:
    model.output_dict, loss = True, open_clip.ClipLoss()
    optimizer, seconds = open_clip_optimizer(model), []
    for _ in range(steps):
        began = time.perf_counter()
        images = pixels_of(batch).to("cuda", non_blocking=True) if not seconds else images  # noqa: F821
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            total = sum(loss(**model(images, batch["text"].to("cuda", non_blocking=True)), output_dict=True).values())
        total.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[10:])


def main() -> None:
    """Measure and print one JSON line."""
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    parts = [measure_losses, measure_curve, measure_accumulation, measure_step, measure_gpu]
    wanted = sys.argv[1:]
    for part in parts:
        if not wanted or part.__name__.removeprefix("measure_") in wanted:
            figures |= part()
    if not wanted or "continual" in wanted:
        from bench_continual import measure_continual

        figures["continual"] = measure_continual(say)
    print(json.dumps({"benchmark": "train", "figures": figures}))


if __name__ == "__main__":
    main()
