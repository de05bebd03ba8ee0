"""Answering heads on made-up pictures whose colour is the answer: all heads learn it, the blind one cannot."""

import json

import pytest
import torch
from PIL import Image
from tiny_model import write_tiny_model

from biomedclip.config import check_config
from biomedclip.errors import ConfigError, DataError
from biomedclip.evaluation.vqa.datasets import read_questions
from biomedclip.training.vqa.config import VqaHeadConfig, VqaTrainConfig
from biomedclip.training.vqa.examples import divide, encode, learn_vocabulary
from biomedclip.training.vqa.heads import FUSIONS, AutoEncoder
from biomedclip.training.vqa.train import train_answers

COLOURS = {"red": (230, 20, 20), "blue": (20, 20, 230), "green": (20, 200, 20)}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """48 pictures of one colour, three questions each; a test answer that training never has."""
    root = tmp_path_factory.mktemp("colours")
    lines = []
    for i in range(48):
        name = list(COLOURS)[i % 3]
        shade = tuple(min(255, c + i // 3) for c in COLOURS[name])
        Image.new("RGB", (32, 32), shade).save(root / f"{i}.png")
        split = "test" if i >= 36 else "train"
        for question, answer in (("Is it red?", "yes" if name == "red" else "no"), ("What colour is shown?", name),
                                 ("Is it blue?", "yes" if name == "blue" else "no")):  # fmt: skip
            odd = i == 47 and question.startswith("What")
            lines.append({"image": f"{i}.png", "question": question, "answer": "never seen" if odd else answer,
                          "split": split})  # fmt: skip
    (root / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def config_of(root, tiny, **changes):
    values = {
        "task": "medvqa", "data": {"root": str(root), "layout": "jsonl", "validation_share": 0.2},
        "encoders": [{"name": "tiny", "model": str(tiny)}], "head": {"name": "concat", "width": 32, "dropout": 0.0},
        "seeds": [0], "allow_few_seeds": True, "epochs": 35, "batch_size": 16, "lr": 5e-3, "device": "cpu",
        "resamples": 200,
    }  # fmt: skip
    return check_config(values | changes, VqaTrainConfig, "test")


SLOW = pytest.mark.slow


@pytest.mark.parametrize("head", ["concat", pytest.param("qcr", marks=SLOW), pytest.param("transformer", marks=SLOW)])
def test_a_head_learns_what_only_the_picture_tells(colours, tiny, tmp_path, head):
    config = config_of(colours, tiny, head={"name": head, "width": 32, "dropout": 0.0, "glimpses": 2, "layers": 1})
    table = train_answers(config, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_bytes())
    rows = {row["encoder"]: row["metrics"] for row in results["rows"]}
    assert rows["tiny"]["accuracy/closed"]["value"] > 0.8
    assert rows["question_only"]["accuracy/closed"]["value"] < 0.7
    assert rows["tiny"]["accuracy/closed"]["shuffled"] < 0.7
    by = {(row["against"], row["metric"]): row for row in results["comparisons"]}
    assert by["question_only", "accuracy/closed"]["low"] > 0
    assert "| tiny |" in table
    assert "| question_only |" in table
    assert (tmp_path / "run" / "done.json").exists()


def test_three_seeds_an_auto_encoder_and_resuming(colours, tiny, tmp_path):
    head = {"name": "qcr", "width": 16, "autoencoder": True, "autoencoder_px": 16}
    config = config_of(colours, tiny, seeds=[0, 1, 2], allow_few_seeds=False, epochs=2, head=head)
    train_answers(config, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_bytes())
    row = results["rows"][0]
    assert len(row["metrics"]["accuracy"]["seeds"]) == 3
    assert row["metrics"]["accuracy"]["value"] == pytest.approx(sum(row["metrics"]["accuracy"]["seeds"]) / 3)
    kept = tmp_path / "run" / "tiny" / "seed-1" / "answers.jsonl"
    before = kept.read_bytes()
    stamp = (tmp_path / "run" / "tiny" / "seed-0" / "answers.jsonl").stat().st_mtime_ns
    kept.unlink()
    train_answers(config, tmp_path / "run", resume=True)
    assert kept.read_bytes() == before
    assert (tmp_path / "run" / "tiny" / "seed-0" / "answers.jsonl").stat().st_mtime_ns == stamp
    assert json.loads((tmp_path / "run" / "results.json").read_bytes())["comparisons"] == results["comparisons"]


def test_a_fine_tuned_tower_moves_and_a_random_one_is_named(colours, tiny, tmp_path):
    encoders = [{"name": "tuned", "model": str(tiny), "tower": "fine_tuned"},
                {"name": "random", "model": str(tiny), "init": "random"}]  # fmt: skip
    train_answers(config_of(colours, tiny, encoders=encoders, epochs=1, tower_lr=1e-3), tmp_path / "run")
    from safetensors.torch import load_file

    tuned = load_file(tmp_path / "run" / "tuned" / "seed-0" / "head.safetensors")
    start = load_file(tiny / "open_clip_model.safetensors")
    name = "visual.conv1.weight"
    assert not torch.equal(tuned[f"tower.{name}"], start[name])
    rows = json.loads((tmp_path / "run" / "results.json").read_bytes())["rows"]
    assert [row["encoder"] for row in rows] == ["tuned", "random", "question_only"]


def test_validation_is_held_out_by_image_and_the_vocabulary_is_training_s_alone(colours):
    splits = divide(read_questions(colours, "jsonl"), 0.2)
    groups = [{row.group for row in part.rows} for part in (splits.train, splits.validation, splits.test)]
    assert splits.carved
    assert not groups[0] & groups[1]
    assert len(groups[1]) == 7
    vocabulary = learn_vocabulary(splits.train.rows)
    assert vocabulary.closed == ("no", "yes")
    assert "never seen" not in vocabulary.answers
    places = {f"{i}.png": i for i in range(48)}
    test = encode(splits.test.rows, vocabulary, places, 3)
    assert (test.answer == -1).sum() == 1
    assert test.cut == sum(row.question.startswith("What") for row in splits.test.rows)


def test_padding_changes_no_answer():
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, False, False]])
    states, image = torch.randn(1, 4, 16), torch.randn(1, 8)
    other = states.clone()
    other[:, 2:] = 7
    for name, kind in FUSIONS.items():
        head = kind(VqaHeadConfig(name=name, width=16, layers=1, glimpses=2), 8, 2, 3).eval()
        assert head(image, states, states[:, 1], mask).shape == (1, 5)
        assert torch.allclose(head(image, states, states[:, 1], mask), head(image, other, other[:, 1], mask), atol=1e-5)
    features, loss = AutoEncoder(16).eval()(torch.rand(2, 1, 16, 16))
    assert features.shape == (2, 64)
    assert loss > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allow_few_seeds": False}, "name three or more"),
        ({"encoders": [{"name": "question_only", "model": "x"}]}, "names must differ"),
        ({"head": {"name": "ban"}}, "head.name"),
    ],
)
def test_mistakes_in_the_config_are_one_line(colours, tiny, changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of(colours, tiny, **changes)


def test_data_without_a_test_split_is_refused_before_anything_is_written(colours, tiny, tmp_path):
    lines = [line for line in (colours / "all.jsonl").read_text().splitlines() if '"train"' in line]
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "all.jsonl").write_text("\n".join(line for line in lines if '"0.png"' in line))
    with pytest.raises(DataError, match="no question in split test"):
        train_answers(config_of(tmp_path, tiny), tmp_path / "run")
    assert not (tmp_path / "run").exists()
