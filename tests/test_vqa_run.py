"""The commands about questions, on a data set of coloured pictures and a tiny model."""

import json

import pytest
from PIL import Image
from tiny_model import write_tiny_model
from typer.testing import CliRunner

from biomedclip import cli
from biomedclip.config import config_file, load_config
from biomedclip.evaluation.vqa.config import VqaEvaluateConfig
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


@pytest.mark.parametrize("name", ["qcr", "concat", "transformer"])
def test_a_recipe_of_heads_loads_and_opens_with_its_four_lines(name):
    path = config_file(f"train/medvqa_{name}.yaml")
    config = load_config(path, VqaTrainConfig)
    assert config.head.name == name
    assert len(config.seeds) >= 3
    assert config.scored == "test"
    # Random weights, the project's own, and weights that were given.
    assert [(one.init, one.checkpoint is not None) for one in config.encoders] == [
        ("random", False), ("weights", False), ("weights", True)
    ]  # fmt: skip
    assert headers(path) == ["# command", "# hardware", "# time", "# expected"]


def test_the_recipes_of_heads_differ_in_the_head_alone():
    found = [load_config(config_file(f"train/medvqa_{name}.yaml"), VqaTrainConfig).model_dump(exclude={"head"})
             for name in ("qcr", "concat", "transformer")]  # fmt: skip
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", ["medvqa", "medvqa_slake"])
def test_a_recipe_of_ranking_loads_and_opens_with_its_four_lines(name):
    path = config_file(f"evaluate/{name}.yaml")
    config = load_config(path, VqaEvaluateConfig)
    assert any(model.startswith("random:") for model in config.models)
    assert headers(path) == ["# command", "# hardware", "# time", "# expected"]


def headers(path):
    return [line.partition(":")[0] for line in path.read_text().splitlines() if line.startswith("# ")][:4]


def test_evaluate_with_a_medvqa_config_ranks_answers(data, tmp_path):
    model = write_tiny_model(tmp_path / "model")
    path = tmp_path / "rank.yaml"
    path.write_text(f"task: medvqa\nmodels: [{model}]\nroot: {data}\nlayout: jsonl\nresamples: 100\n")
    assert "task: medvqa" in run("evaluate", path, "--out", tmp_path / "none", "--print-config")
    table = run("evaluate", path, "--out", tmp_path / "results", "--set", "split=train")
    assert f"| {model} |" in table
    assert "| majority |" not in table
    assert not (tmp_path / "none").exists()


def test_answers_to_a_whole_split_are_scored_on_one_wording(tmp_path):
    root = tmp_path / "rad"
    (root / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "images" / "a.jpg")
    row = {"image_name": "a.jpg", "image_organ": "HEAD", "answer": "Yes", "answer_type": "CLOSED",
           "question_type": "PRES", "question": "Is there a mass?"}  # fmt: skip
    (root / "trainset.json").write_text(json.dumps([row | {"qid": 1, "phrase_type": "freeform"}]))
    asked = [row | {"qid": 2, "phrase_type": "freeform"}, row | {"qid": 3, "phrase_type": "para"}]
    (root / "testset.json").write_text(json.dumps(asked))
    said = tmp_path / "said.jsonl"
    said.write_text('{"question_id": "test-2", "answer": "yes"}\n{"question_id": "test-3", "answer": "no"}\n')
    options = ("--layout", "vqa_rad_mevf", "--resamples", "100")
    both = json.loads(run("vqa", "score", root, said, *options))
    assert (both["metrics"]["accuracy"]["value"], both["n"]) == (0.5, 2)
    one = json.loads(run("vqa", "score", root, said, *options, "--phrase-type", "freeform"))
    assert (one["metrics"]["accuracy"]["value"], one["n"]) == (1.0, 1)
