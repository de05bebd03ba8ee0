"""`biomedclip classify`: the same numbers as by hand, flags, labels that cannot be answered, and what is printed."""

import csv
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import run_command
from PIL import Image
from tiny_model import write_tiny_model
from torch import nn

from biomedclip.app import classify as module
from biomedclip.app.classify import BATCH, Classified, Classifier
from biomedclip.app.encoder import Encoder, fold_norms, tune
from biomedclip.app.pictures import Picture, find_sources
from biomedclip.app.questions import TEMPLATES, Question, ask_labels, ask_prompts, ask_task, read_question
from biomedclip.app.tables import json_row, printable
from biomedclip.errors import ConfigError
from biomedclip.models.load import load

RNG = np.random.default_rng(0)
LABELS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoder(model):
    return Encoder(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """More pictures than one group, of several sizes, and a text between them."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(2 * BATCH + 5):
        height, width = RNG.integers(20, 90, 2)
        pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:03d}.{'jpg' if number % 2 else 'png'}")
    (root / "007.jpg").write_text("this is no picture")
    return root


def by_hand(model, paths, prompts):
    """Probabilities as open_clip's readme has them: one picture after the other, softmax over scaled cosines."""
    network, preprocess, tokenizer = load(model)
    with torch.no_grad():
        weights = []
        for sentences in prompts.values():
            vectors = nn.functional.normalize(network.encode_text(tokenizer(list(sentences))), dim=-1)
            weights.append(nn.functional.normalize(vectors.mean(0), dim=-1))
        rows = []
        for path in paths:
            image = network.encode_image(preprocess(Image.open(path).convert("RGB"))[None])
            cosines = nn.functional.normalize(image, dim=-1) @ torch.stack(weights).T
            rows.append((network.logit_scale.exp() * cosines).softmax(-1)[0].numpy())
    return np.asarray(rows)


def test_probabilities_are_those_by_hand_in_the_order_of_the_files(model, encoder, folder):
    question = ask_labels(",".join(LABELS))
    files = find_sources([str(folder)]).files
    found = list(Classifier(encoder, question).classify(files))
    assert [row.name for row in found] == [source.name for source in files]
    refused = [row for row in found if row.refused]
    assert [row.name for row in refused] == [str(folder / "007.jpg")]
    read = [row for row in found if not row.refused]
    expected = by_hand(model, [row.name for row in read], question.prompts)
    np.testing.assert_allclose([row.probabilities for row in read], expected, atol=2e-6)
    assert np.ptp(expected, axis=0).max() > 0.01, "all pictures look alike to this model, so nothing was tested"


def test_fast_differs_little(model, encoder, folder):
    question, files = ask_labels(list(LABELS)), find_sources([str(folder)]).files
    exact = [row.probabilities for row in Classifier(encoder, question).classify(files) if not row.refused]
    quick = [row.probabilities for row in Classifier(model, question, fast=True).classify(files) if not row.refused]
    assert np.abs(np.asarray(exact) - np.asarray(quick)).max() < 0.02


def test_threads_of_torch_are_left_as_they_were(encoder, folder):
    before = torch.get_num_threads()
    found = Classifier(encoder, ask_labels(list(LABELS))).classify(find_sources([str(folder)]).files)
    next(found)
    found.close()
    assert torch.get_num_threads() == before


def test_folding_norms_changes_nothing_but_the_number_of_modules():
    network = load("biomedclip-demo", random_init=True)[0]
    generator = torch.Generator().manual_seed(1)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) * 0.1)
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
    tuned = tune(network, 64)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in tuned.visual.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.visual.modules()) > 20
    images = torch.randn(3, 3, 64, 64, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(tuned.encode_image(images), network.encode_image(images), rtol=1e-3, atol=1e-4)


class Misleading(nn.Module):
    """A norm that is registered behind a convolution and used before it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.norm.running_var.fill_(4.0)
        self.norm.bias.data.fill_(1.0)

    def encode_image(self, x, normalize=False):
        return nn.functional.normalize(self.conv(self.norm(x).relu()).mean((2, 3)), dim=-1)


def test_a_fold_that_changes_the_answer_is_taken_back():
    network = Misleading().eval()
    assert fold_norms(Misleading().eval()) == 1
    tuned = tune(network, 16)
    assert isinstance(tuned.norm, nn.BatchNorm2d)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(tuned.encode_image(images), network.encode_image(images))


def calibrated(encoder, *, temperature=1.0, uncertain_below=0.0, outside=lambda vectors: np.zeros(len(vectors), bool)):
    """The encoder with a calibration of these numbers, and the rest its own."""
    twin = object.__new__(Encoder)
    twin.__dict__.update(encoder.__dict__)
    facts = SimpleNamespace(scope=object())
    twin.calibration = SimpleNamespace(
        temperature=temperature, uncertain_below=uncertain_below, outside=outside, facts=facts
    )
    return twin


def pictures(count=4):
    for number in range(count):
        pixels = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        yield Picture(name=f"{number}", image=Image.fromarray(pixels))


def test_a_temperature_flattens_and_flags_come_from_the_calibration(encoder):
    shown, question = list(pictures()), ask_labels(list(LABELS))
    plain = [row.probabilities for row in Classifier(encoder, question).classify(shown)]
    warm = Classifier(calibrated(encoder, temperature=2.0), question)
    flat = np.asarray([row.probabilities for row in warm.classify(shown)])
    roots = np.sqrt(plain)
    np.testing.assert_allclose(flat, roots / roots.sum(1, keepdims=True), atol=1e-6)
    tops = flat.max(1)
    floor = float(np.median(tops))
    outside = lambda vectors: np.arange(len(vectors)) == 0  # noqa: E731
    rows = list(Classifier(calibrated(encoder, temperature=2.0, uncertain_below=floor, outside=outside), question)
                .classify(shown))  # fmt: skip
    assert [row.flag for row in rows] == ["out of scope", *("uncertain" if top < floor else "" for top in tops[1:])]
    assert "unlike" in rows[0].reason
    assert "temperature 2" in Classifier(calibrated(encoder, temperature=2.0), question).describe()


def test_without_a_calibration_close_labels_are_uncertain(encoder):
    classifier = Classifier(encoder, ask_labels(list(LABELS)))
    assert "not calibrated" in classifier.describe()
    flags, reasons = classifier._flag(np.zeros((2, 16), np.float32), np.asarray([[0.5, 0.35, 0.15], [0.6, 0.35, 0.05]]))
    assert flags == ["uncertain", ""]
    assert reasons == ["the two best labels are 0.15 apart", ""]


def test_labels_that_hold_side_by_side_do_not_add_up_to_one(encoder):
    question = ask_task("chestmnist")
    rows = list(Classifier(encoder, question).classify(pictures(3)))
    probabilities = np.asarray([row.probabilities for row in rows])
    assert probabilities.shape == (3, 14)
    assert ((probabilities > 0) & (probabilities < 1)).all()
    assert not np.allclose(probabilities.sum(1), 1)
    yes, no = (
        encoder.embed_texts([sentences["pneumonia"][0]])[0] for sentences in (question.prompts, question.negatives)
    )
    first = next(pictures(1))
    row = next(Classifier(encoder, question).classify([first]))
    margin = encoder.encode([encoder.prepare(first.image)])[0] @ (yes - no) * encoder.logit_scale
    assert row.probabilities[question.labels.index("pneumonia")] == pytest.approx(1 / (1 + np.exp(-margin)), abs=1e-4)
    near = np.full((1, 14), 0.99)
    near[0, 3] = 0.45
    assert Classifier(encoder, question)._flag(np.zeros((1, 16), np.float32), near)[0] == ["uncertain"]


def test_pictures_without_pixels_pass_through_and_nothing_is_no_call(encoder):
    classifier = Classifier(encoder, ask_labels(list(LABELS)))
    (row,) = classifier.classify([Picture(name="a", refused="is empty")])
    assert row.refused == "is empty"
    assert list(classifier.classify([])) == []


NOTHING_ASKED = {
    "": "names no label",
    " , ": "names no label",
    "a,,b": "label 2 of 3 is empty",
    "a,b,": "label 3 of 3 is empty",
    "normal": "is one label",
    "a,b,a": "names a label twice (found 'a')",
    "Pneumonia, pneumonia": "names a label twice (found 'Pneumonia' and 'pneumonia')",
    "ﬁbrosis,fibrosis": "names a label twice",
    "a {},b": "unfilled placeholder",
    "no no finding,b": "double negation",
}


@pytest.mark.parametrize(("labels", "said"), NOTHING_ASKED.items())
def test_labels_that_ask_nothing_are_one_line(labels, said):
    with pytest.raises(ConfigError) as error:
        ask_labels(labels)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_labels_with_commas_are_quoted_and_fill_the_templates():
    question = ask_labels('"mass, left", normal  lung')
    assert question.labels == ("mass, left", "normal lung")
    assert list(question.prompts["normal lung"]) == [template.format("normal lung") for template in TEMPLATES]
    assert ask_labels("a,b", ["an {} here"]).prompts["a"] == ["an a here"]
    with pytest.raises(ConfigError, match="must hold \\{\\} once"):
        ask_labels("a,b", ["nothing"])


def test_labels_that_are_the_same_to_the_tokenizer_are_refused(encoder):
    long = "a finding of the lung that is seen on many films of the chest and goes on and on for longer than is read"
    with pytest.raises(ConfigError, match="are the same to the tokenizer"):
        Classifier(encoder, ask_labels([f"{long} one", f"{long} two"]))
    with pytest.raises(ConfigError, match="are the same to the tokenizer"):
        Classifier(encoder, {"A": ["nevus"], "B": ["Nevus"]})


def test_a_task_says_its_own_prompts_and_a_question_needs_one_source(tmp_path):
    assert ask_task("bccd").labels == ("Platelets", "RBC", "WBC")
    with pytest.raises(ConfigError, match="did you mean 'bccd'"):
        ask_task("bcd")
    for given in ((None, None, None), ("a,b", "bccd", None)):
        with pytest.raises(ConfigError, match="must come from one of --labels, --task and --prompts"):
            read_question(*given, None)
    with pytest.raises(ConfigError, match="--template: goes with --labels"):
        read_question(None, "bccd", None, ["{}"])


def test_a_file_of_prompts(tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text("normal: clear lungs\npneumonia:\n  - pneumonia\n  - an opacity of the lung\n")
    assert ask_prompts(path).prompts == {
        "normal": ["clear lungs"],
        "pneumonia": ["pneumonia", "an opacity of the lung"],
    }
    wrong = {
        "- a\n- b\n": "must hold `label: prompt` lines",
        "a: 1\nb: c\n": "no text or list of texts",
        "a: x\n": "is one label",
        "a: []\nb: y\n": "has no prompt",
        "a: [x\n": "prompts.yaml",
    }
    for text, said in wrong.items():
        path.write_text(text)
        with pytest.raises(ConfigError) as error:
            ask_prompts(path)
        assert said in str(error.value)


def run(*arguments):
    """Exit code, standard output and standard error of the command."""
    done = run_command("classify", *arguments)
    return done.returncode, done.stdout, done.stderr


def test_a_folder_with_a_bad_file_gives_a_table_a_csv_and_the_reason(model, folder, tmp_path):
    table = tmp_path / "out.csv"
    code, out, err = run(folder, tmp_path / "gone.png", "-m", model, "-l", "red,green,blue",
                         "--top", 2, "--csv", table)  # fmt: skip
    assert code == 0
    assert "not read: " in err
    assert "007.jpg is no picture, whatever its name says" in err
    assert "gone.png cannot be opened: no such file or directory" in err
    assert "Not for clinical use".lower() in out.lower()
    assert "not calibrated" in out
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert len(rows) == 2 * BATCH + 6
    assert len([line for line in out.splitlines() if line.rstrip().endswith(("uncertain",)) or ".png" in line]) > BATCH
    good = [row for row in rows if not row["error"]]
    assert len(good) == 2 * BATCH + 4
    for row in good:
        numbers = {label: float(row[f"p:{label}"]) for label in LABELS}
        assert sum(numbers.values()) == pytest.approx(1, abs=1e-5)
        assert row["best"] == max(numbers, key=numbers.get)
    code, _, err = run(folder, "-m", model, "-l", "red,green", "--csv", table)
    assert code == 2
    assert "exists already; name another file, or give --overwrite" in err


def test_json_lines_hold_one_object_a_picture_and_errors_too(model, folder):
    code, out, err = run(folder / "006.png", folder / "007.jpg", "-m", model, "-t", "bccd",
                         "--json", "--top", 2, "--fast")  # fmt: skip
    first, second = map(json.loads, out.strip().split("\n"))
    assert code == 0
    assert [set(first), first["frame"], len(first["labels"])] == [
        {"image", "frame", "labels", "flag", "reason", "note"},
        None,
        2,
    ]
    assert first["labels"][0]["probability"] >= first["labels"][1]["probability"]
    assert second["error"].startswith("is no picture")
    assert "not read" in err


def test_where_nothing_can_be_read_the_code_is_two(model, folder):
    code, out, err = run(folder / "007.jpg", "-m", model, "-l", "a,b")
    assert (code, out) == (2, "")
    assert "error: images: none could be classified (found 1 not read); see the reasons above" in err


def test_bad_labels_are_said_before_the_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(module, "Classifier", None)
    for labels, said in (("normal", "is one label"), ("a,A", "names a label twice"), ("", "names no label")):
        code, _, err = run(folder, "-l", labels)
        assert code == 2
        assert said in err
        assert err.count("\n") == 1


def test_names_cannot_write_to_the_terminal():
    assert (
        printable("a\x1b[31mb\udcff\n.png")
        == "a\N{REPLACEMENT CHARACTER}[31mb" + "\N{REPLACEMENT CHARACTER}" * 2 + ".png"
    )
    row = Classified(name="a\udcff.png", probabilities=np.asarray([0.2, 0.8]))
    assert json.loads(json.dumps(json_row(row, ("x", "y"), 1)))["labels"] == [{"label": "y", "probability": 0.8}]


def test_equal_probabilities_keep_the_order_of_the_labels():
    assert Classified(name="", probabilities=np.asarray([0.25, 0.5, 0.25])).best(3) == [1, 0, 2]
    assert Question(prompts={"b": ["x"], "a": ["y"]}).labels == ("b", "a")
