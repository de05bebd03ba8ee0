"""What is asked while a model trains: each kind of task scored as the evaluator scores it, on a fixed budget."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tiny_model import MODEL_CFG

from biomedclip.config import check_config
from biomedclip.evaluation.answer_scores import OptionScores
from biomedclip.evaluation.scoring import Encoder
from biomedclip.evaluation.splits import read_split
from biomedclip.evaluation.tasks import Task
from biomedclip.layouts import read_rgb
from biomedclip.training.validation import Probe, choose_rows

OPTIONS = [["a red cell", "a blue cell", "no cell"], ["benign", "malignant"], ["left", "right", "both", "none"]]


def options_task():
    return check_config(
        {
            "name": "asked", "suite": "test", "title": "Asked", "modality": "microscopy", "kind": "options",
            "layout": {
                "type": "csv", "table": {"test": "questions.jsonl"}, "image": "image", "text": "answer",
                "attributes": ["options"],
            },
            "split": "test", "metrics": {"primary": "accuracy"}, "licence": "none", "citation": "none",
            "contamination": "none",
        },
        Task, "test",
    )  # fmt: skip


def write_questions(folder, count=12):
    lines = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        options = OPTIONS[number % 3]
        answer = options[number % len(options)]
        lines.append({"image": f"{number}.png", "options": json.dumps(options), "answer": answer})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    model = open_clip.CLIP(**MODEL_CFG).eval()

    def preprocess(picture):
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255

    return Encoder("", model, preprocess, open_clip.SimpleTokenizer(context_length=16), "cpu")


def test_a_task_of_options_is_scored_by_each_images_own_options(tmp_path, encoder):
    task = options_task()
    manifest = read_split(task, write_questions(tmp_path))
    probe = Probe(name="asked", role="gain", task=task, manifest=manifest, prompts={})
    right = []
    for row in manifest.rows:
        options = json.loads(row.attributes["options"])
        image = encoder.model.encode_image(encoder.preprocess(read_rgb(manifest, row))[None], normalize=True)
        text = encoder.model.encode_text(encoder.tokenizer(options), normalize=True)
        right.append(options[int((image @ text.T).argmax())] == row.text)
    assert 0 < sum(right) < len(right)
    assert isinstance(probe.scores(encoder), OptionScores)
    assert probe.metric == "accuracy"
    assert probe.value(encoder) == pytest.approx(np.mean(right))


def test_a_budget_is_always_the_same_rows(tmp_path):
    manifest = read_split(options_task(), write_questions(tmp_path))
    few = choose_rows(manifest, 5)
    assert len(few.rows) == 5
    assert few == choose_rows(manifest, 5)
    assert choose_rows(manifest, 99) is manifest
