"""The commands about questions, on a data set of coloured pictures and a tiny model."""

import json

import pytest
from PIL import Image
from tiny_model import write_tiny_model
from typer.testing import CliRunner

from biomedclip import cli
from biomedclip.config import config_file, load_config
from biomedclip.training.vqa.config import VqaTrainConfig


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "root" / "jsonl"
    root.mkdir(parents=True)
    lines = []
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 10, 10)).save(root / f"{i}.png")
        for question, answer in (("Is there a mass?", "yes" if i % 2 else "no"), ("Where is it?", "left lung")):
            lines.append({"image": f"{i}.png", "question": question, "answer": answer, "question_id": f"{len(lines)}",
                          "split": "test" if i > 7 else "train"})  # fmt: skip
    (root / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def run(*arguments):
    done = CliRunner().invoke(cli.app, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_check_says_what_a_data_set_holds(data):
    text = run("vqa", "check", data)
    assert "24 rows = 24 kept + 0 dropped" in text
    assert "12 images" in text
    assert "answer_type_inferred" in text


def test_ranking_gathers_models_in_one_table_and_its_answers_score_alike(data, tmp_path):
    out = tmp_path / "results"
    for seed in (0, 1):
        model = write_tiny_model(tmp_path / f"model{seed}", seed=seed)
        table = run("eval", "run", "--suite", "medvqa", "--data-root", data.parent, "-m", model, "-o", out)
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 5
    assert sum("model0" in row or "model1" in row for row in rows) == 2
    folder = next((out / "medvqa" / "jsonl").glob("*model0"))
    results = json.loads((folder / "results.json").read_bytes())
    assert {row["against"] for row in results["comparisons"]} == {"shuffled_image", "majority", "question_words"}
    again = json.loads(run("vqa", "score", data, folder / "answers.jsonl"))
    assert again["metrics"] == results["metrics"]
    # The majority knows no picture: always `no`, and the one open answer.
    assert again["baselines"]["majority"]["accuracy"]["value"] == 0.75


def test_train_with_a_medvqa_config_trains_heads(data, tmp_path):
    model = write_tiny_model(tmp_path / "model")
    path = tmp_path / "heads.yaml"
    path.write_text(
        f"task: medvqa\ndata: {{root: {data}, layout: jsonl}}\nencoders: [{{name: tiny, model: {model}}}]\n"
        "head: {name: concat, width: 8}\nepochs: 1\ndevice: cpu\nresamples: 100\n"
    )
    assert "task: medvqa" in run("train", path, "--print-config")
    assert "| tiny |" in run("train", path, "--out", tmp_path / "run")


def test_the_recipe_loads_and_opens_with_its_four_lines():
    path = config_file("train/medvqa_qcr.yaml")
    config = load_config(path, VqaTrainConfig)
    assert len(config.seeds) >= 3
    assert [line.partition(":")[0] for line in path.read_text().splitlines() if line.startswith("# ")][:4] == [
        "# command", "# hardware", "# time", "# expected",
    ]  # fmt: skip
