"""Questions about images: scoring, training and ranking speeds, and VQA-RAD from end to end.

Scoring: 100,000 made-up answers about 20,000 images, with every part and 2,000 resamples; the peer is the loop that
scripts have, which normalises and counts the same answers, and draws the same number of resamples one by one with numpy
(timed over 20 and multiplied). Training: the qcr head on embedded pictures, questions per second of wall time. Ranking:
questions answered per second by the same tiny model, pictures and texts embedded in that time. VQA-RAD of
../shared/data is trained with a small encoder where it is there, and left out, and said so, where it is not; there the
freeform test questions are also counted by type against the table that MEVF's released model printed.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from biomedclip.config import check_config
from biomedclip.evaluation.vqa.datasets import read_questions
from biomedclip.evaluation.vqa.normalise import normalise
from biomedclip.evaluation.vqa.questions import Question, QuestionTable
from biomedclip.evaluation.vqa.rank import rank_answers
from biomedclip.evaluation.vqa.score import score_answers
from biomedclip.models.load import load
from biomedclip.training.vqa.config import VqaTrainConfig
from biomedclip.training.vqa.train import train_answers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_model import write_tiny_model

PEERS = ("numpy",)
NUM_ANSWERS, NUM_IMAGES, RESAMPLES = 100_000, 20_000, 2_000
RAD = Path(__file__).resolve().parents[3] / "shared" / "data" / "vqa_rad"


MEVF_COUNTS = {"COUNT": 3, "COLOR": 3, "ORGAN": 10, "PRES": 113, "PLANE": 23, "MODALITY": 29, "POS": 39, "ABN": 34,
               "SIZE": 30, "OTHER": 20, "ATTRIB": 9, "open": 123, "closed": 185}  # fmt: skip
"""Freeform test questions of VQA-RAD by type, as printed with MEVF's 43.9 open and 75.1 closed (test_vqa_score.py)."""


def count_types() -> dict[str, int]:
    """The same counts of the files at hand."""
    rows = read_questions(RAD, "vqa_rad_mevf").split("test").worded("freeform").rows
    return dict(Counter(kind for row in rows for kind in (*row.content_type.split(", "), row.answer_type)))


def made_up(count: int, images: int) -> tuple[QuestionTable, dict[str, str]]:
    """A table and answers of which about a third are right."""
    rng = np.random.default_rng(0)
    rows = tuple(
        Question(question_id=str(i), image=f"{i % images}.png", group=f"{i % images}.png", question="Is there a mass?",
                 answer=f"the finding {rng.integers(500)}", answer_type="closed" if i % 2 else "open",
                 content_type=f"type{i % 10}", modality=f"m{i % 4}", organ=f"o{i % 6}")
        for i in range(count)
    )  # fmt: skip
    said = {row.question_id: row.answer if rng.random() < 0.33 else "something else" for row in rows}
    return QuestionTable(name="made_up", root=".", rows=rows), said


def score_peer(table: QuestionTable, said: dict[str, str]) -> float:
    """Seconds of the usual loop: exact match, then resampled images one draw at a time."""
    start = time.perf_counter()
    right = np.asarray([normalise(said[row.question_id]) == normalise(row.answer) for row in table.rows], dtype=float)
    images = np.asarray([row.group for row in table.rows])
    by_image = np.split(np.argsort(images, kind="stable"), np.unique(images, return_index=True)[1][1:])
    once = time.perf_counter() - start
    rng, start = np.random.default_rng(0), time.perf_counter()
    for _ in range(20):
        right[np.concatenate([by_image[i] for i in rng.integers(0, len(by_image), len(by_image))])].mean()
    return once + (time.perf_counter() - start) * RESAMPLES / 20


def write_questions(root: Path, images: int, each: int) -> None:
    """Pictures and questions with a training and a test split."""
    rng, lines = np.random.default_rng(0), []
    for i in range(images):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / f"{i}.png")
        split = "test" if i % 5 == 0 else "train"
        lines += [{"image": f"{i}.png", "question": f"Is there finding number {k}?", "split": split,
                   "answer": "yes" if rng.random() < 0.5 else "no"} for k in range(each)]  # fmt: skip
    (root / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def train(root: Path, layout: str, model: Path, out: Path, epochs: int) -> dict:
    """results.json of a run of three seeds."""
    config = {"task": "medvqa", "data": {"root": str(root), "layout": layout}, "epochs": epochs, "device": "cpu",
              "encoders": [{"name": "tiny", "model": str(model)}], "head": {"name": "qcr", "width": 128}}  # fmt: skip
    train_answers(check_config(config, VqaTrainConfig, "bench"), out)
    return json.loads((out / "results.json").read_bytes())


def main() -> None:
    """Print what was measured, the JSON line last."""
    figures: dict[str, float] = {}
    table, said = made_up(NUM_ANSWERS, NUM_IMAGES)
    start = time.perf_counter()
    score_answers(table, said, resamples=RESAMPLES)
    figures["score_100k_s"] = time.perf_counter() - start
    normalise.cache_clear()
    figures["score_100k_loop_s"] = score_peer(table, said)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = write_tiny_model(root / "model")
        (root / "data").mkdir()
        write_questions(root / "data", 200, 10)
        results = train(root / "data", "jsonl", model, root / "run", 3)
        figures["train_questions_per_s"] = float(np.median(results["rows"][0]["questions_per_s"]))
        asked = read_questions(root / "data", "jsonl")
        start = time.perf_counter()
        rank_answers(asked, ["yes", "no"], *load(model))
        figures["rank_questions_per_s"] = len(asked.rows) / (time.perf_counter() - start)
        if RAD.exists():
            start = time.perf_counter()
            results = train(RAD, "vqa_rad_mevf", model, root / "rad", 5)
            figures["vqa_rad_s"] = time.perf_counter() - start
            for row in results["rows"]:
                figures[f"vqa_rad_closed_{row['encoder']}"] = row["metrics"]["accuracy/closed"]["value"]
            for name, entry in results["baselines"].items():
                figures[f"vqa_rad_closed_{name}"] = entry["metrics"]["accuracy/closed"]["value"]
            figures["vqa_rad_counts_as_published"] = float(count_types() == MEVF_COUNTS)
        else:
            print(f"VQA-RAD left out: {RAD} is not there")
    for name, value in figures.items():
        print(f"{name:<32} {value:,.3f}")
    print(json.dumps({"benchmark": "vqa", "figures": {name: round(value, 4) for name, value in figures.items()}}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(io.StringIO()):
        main()
