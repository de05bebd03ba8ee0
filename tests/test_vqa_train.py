"""Answering heads on made-up pictures whose colour is the answer: all heads learn it, the blind one cannot."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_model import write_tiny_model

from biomedclip.config import check_config
from biomedclip.errors import CheckpointError, ConfigError, DataError
from biomedclip.evaluation.vqa.datasets import read_questions
from biomedclip.training.vqa.config import VqaEncoderConfig, VqaHeadConfig, VqaTrainConfig
from biomedclip.training.vqa.encoders import load_encoder
from biomedclip.training.vqa.examples import divide, encode, learn_vocabulary, stage
from biomedclip.training.vqa.heads import FUSIONS, AutoEncoder, silence
from biomedclip.training.vqa.pictures import Pixels, RegionReader, cut_region, region_manifest
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
    assert set(results["baselines"]) == {"majority", "question_words", "words_first"}
    assert (tmp_path / "run" / "done.json").exists()


@pytest.mark.slow
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
    # A head without word scores begins with nothing, so that an epoch of training is better than none.
    head = {"name": "concat", "width": 32, "dropout": 0.0, "words_first": False}
    train_answers(config_of(colours, tiny, encoders=encoders, head=head, epochs=2, tower_lr=1e-3), tmp_path / "run")
    from safetensors.torch import load_file

    tuned = load_file(tmp_path / "run" / "tuned" / "seed-0" / "head.safetensors")
    start = load_file(tiny / "open_clip_model.safetensors")
    name = "visual.conv1.weight"
    assert not torch.equal(tuned[f"tower.{name}"], start[name])
    rows = json.loads((tmp_path / "run" / "results.json").read_bytes())["rows"]
    assert [row["encoder"] for row in rows] == ["tuned", "random", "question_only"]


def test_settings_are_chosen_without_the_test_questions(colours, tiny, tmp_path):
    config = config_of(colours, tiny, epochs=1, scored="validation", regions=2, answer_type="told")
    text = train_answers(config, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_bytes())
    held = divide(read_questions(colours, "jsonl"), 0.2).validation
    assert results["data"]["test"] == len(held.rows)
    assert results["data"]["test_images_seen_in_training"] == 0
    answered = (tmp_path / "run" / "tiny" / "seed-0" / "answers.jsonl").read_text()
    assert {json.loads(line)["question_id"] for line in answered.splitlines()} == {r.question_id for r in held.rows}
    assert "too good to report" in text
    assert {row["knows"] for row in results["rows"]} == {"the data's type"}


def test_refit_learns_from_the_held_out_images_too_and_patience_ends_a_fit(colours, tiny, tmp_path):
    config = config_of(colours, tiny, epochs=30, patience=2, refit=True, lr=1e-9)
    train_answers(config, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_bytes())
    assert results["data"]["fitted"] == results["data"]["train"] + results["data"]["validation"]
    fit = json.loads((tmp_path / "run" / "tiny" / "seed-0" / "fit.json").read_bytes())
    # Nothing is learnt at this rate: the head before training is the best, and two epochs later it is over.
    assert (fit["epoch"], fit["epochs_trained"]) == (0, 2)
    rows = {row["encoder"]: row["metrics"]["accuracy"]["value"] for row in results["rows"]}
    assert rows["tiny"] == rows["question_only"] == results["baselines"]["words_first"]["metrics"]["accuracy"]["value"]


def test_word_scores_say_what_words_say_and_never_of_a_question_from_itself(colours):
    rows = read_questions(colours, "jsonl").split("train").rows
    train, other = rows[:60], rows[60:]
    places = {f"{i}.png": i for i in range(48)}
    found = stage(train, (other,), places, 8, words_first=True)
    assert found.train.start.shape == (60, len(found.vocabulary.answers) + 1)
    opened = found.answered[0].start[:, -1] > 0.5
    assert opened.tolist() == [row.answer_type == "open" for row in other]
    # An answer that one image alone has cannot be said about that image.
    alone = [*train[:59], replace(train[59], answer="unheard of", answer_type="open")]
    again = stage(alone, (other,), places, 8, words_first=True)
    column = again.vocabulary.answers.index("unheard of")
    assert again.train.start[59, column] == 0
    assert stage(train, (other,), places, 8, words_first=False).train.start.shape == (60, 0)


def test_an_untrained_head_adds_nothing_to_what_words_say():
    mask = torch.ones(2, 3, dtype=torch.bool)
    for name, kind in FUSIONS.items():
        head = kind(VqaHeadConfig(name=name, width=16, layers=1, glimpses=2), 8, 5, 2, 3).eval()
        silence(head)
        assert not head(torch.randn(2, 5, 8), torch.randn(2, 3, 16), torch.randn(2, 16), mask).any()


def test_an_encoder_is_an_architecture_of_timm_with_its_file(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    made = timm.create_model("test_efficientnet", pretrained=False)
    # As another implementation saves it: other names in the same order, and its classifier behind them.
    renamed = {f"_layer{i}.{name.rsplit('.', 1)[-1]}": value for i, (name, value) in
               enumerate((n, v) for n, v in made.state_dict().items() if not n.startswith("classifier."))}  # fmt: skip
    torch.save(renamed | {"_fc.weight": torch.zeros(3, 2)}, tmp_path / "weights.pth")
    encoder = VqaEncoderConfig(name="bare", model="timm/test_efficientnet", checkpoint=str(tmp_path / "weights.pth"))
    tower, preprocess = load_encoder(encoder)
    picture = preprocess(Image.new("RGB", (50, 40), (200, 10, 10)))[None]
    made.reset_classifier(0)
    with torch.no_grad():
        assert torch.equal(tower.encode_image(picture), made.eval()(picture))
        assert tower.encode_image(picture, normalize=True).norm() == pytest.approx(1)
    small = VqaEncoderConfig(name="small", model="timm/test_efficientnet", init="random", size_px=64)
    assert load_encoder(small)[1](Image.new("RGB", (50, 40))).shape == (3, 64, 64)
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(print))
    with pytest.raises(CheckpointError):
        load_encoder(encoder)
    with pytest.raises(ConfigError, match=r"no architecture of timm .*timm/resnet_unknown"):
        load_encoder(VqaEncoderConfig(name="no", model="timm/resnet_unknown", init="random"))


def test_an_encoder_s_checkpoint_replaces_the_named_model_s_weights(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny / "open_clip_model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, tmp_path / "other.safetensors")
    encoder = VqaEncoderConfig(name="other", model=str(tiny), checkpoint=str(tmp_path / "other.safetensors"))
    assert torch.equal(load_encoder(encoder)[0].visual.conv1.weight, weights["visual.conv1.weight"] + 1)


def test_regions_are_the_whole_and_its_tiles(tmp_path):
    picture = Image.new("RGB", (5, 3))
    picture.putpixel((4, 2), (9, 9, 9))
    picture.save(tmp_path / "a.png")
    assert cut_region(picture, 0, 2) is picture
    assert [cut_region(picture, n, 2).size for n in (1, 2, 3, 4)] == [(2, 1), (3, 1), (2, 2), (3, 2)]
    assert cut_region(picture, 4, 2).getpixel((2, 1)) == (9, 9, 9)
    assert cut_region(Image.new("RGB", (1, 1)), 1, 3).size == (1, 1)
    line = {"image": "a.png", "question": "Is it?", "answer": "yes"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    manifest = region_manifest(read_questions(tmp_path, "jsonl").manifest(), 2)
    reader = RegionReader(2)
    assert [reader(manifest, row).size for row in manifest.rows] == [(5, 3), (2, 1), (3, 1), (2, 2), (3, 2)]


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_beyond_the_budget_are_read_again(colours, workers):
    manifest = read_questions(colours, "jsonl").manifest()
    read = []

    def preprocess(picture):
        read.append(picture)
        return torch.full((3, 256, 512), float(picture.getpixel((0, 0))[0]))

    # 1.5 MiB a picture: three fit into 5.
    pixels = Pixels(manifest, preprocess, 1, budget_mb=5, workers=workers)
    first = pixels(torch.tensor([0, 1, 2, 3, 3]))
    assert first.shape == (5, 1, 3, 256, 512)
    assert len(read) == 4
    assert len(pixels.kept) == 3
    assert torch.equal(pixels(torch.tensor([3, 2, 1, 0])), first[[3, 2, 1, 0]])
    assert len(read) == 5


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


def test_folds_of_validation_hold_every_image_out_once(colours):
    table = read_questions(colours, "jsonl")
    held = [{row.group for row in divide(table, 0.25, fold).validation.rows} for fold in range(4)]
    assert sum(map(len, held)) == len(set.union(*held)) == 36
    with pytest.raises(ConfigError, match=r"validation_fold: lies beyond the last image .*0 to 3"):
        divide(table, 0.25, 4)


@pytest.mark.parametrize("regions", [1, 5])
def test_padding_changes_no_answer(regions):
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, False, False]])
    states, image = torch.randn(1, 4, 16), torch.randn(1, regions, 8)
    other = states.clone()
    other[:, 2:] = 7
    for name, kind in FUSIONS.items():
        head = kind(VqaHeadConfig(name=name, width=16, layers=1, glimpses=2), 8, regions, 2, 3).eval()
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
        ({"encoders": [{"name": "a", "model": "x", "init": "random", "checkpoint": "y"}]}, "goes with init: weights"),
        ({"encoders": [{"name": "a", "model": "timm/resnet18"}]}, "name the file of the architecture's weights"),
        ({"encoders": [{"name": "a", "model": "x", "size_px": 64}]}, "goes with timm/ARCHITECTURE"),
        ({"refit": True, "scored": "validation"}, "would train on the held-out images"),
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
