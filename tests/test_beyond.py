"""Sections of a config run through whole evaluations, each number beside one computed by hand from the pictures."""

import csv

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from scipy.special import logsumexp
from scipy.special import softmax as scipy_softmax
from sklearn import metrics as sk
from tiny_model import MODEL_CFG

from biomedclip.config import check_config
from biomedclip.errors import ConfigError
from biomedclip.evaluation.config import EvaluateConfig
from biomedclip.evaluation.evaluate import evaluate
from biomedclip.evaluation.overview import write_overview
from biomedclip.evaluation.tasks import parse_suite
from tests.test_evaluate import painter, preprocess

RED, BLUE = np.array([200.0, 40, 40]), np.array([40.0, 40, 200])
SUITE = """
suite: own
tasks:
  home:
    title: Red and blue
    modality: m
    kind: zero_shot
    layout:
      {type: csv, table: t.csv, image: file, label: label, split: split, text: caption, attributes: [site, ground]}
    split: test
    select_split: val
    classes: [{label: R, name: platelet}, {label: B, name: white blood cell}]
    prompt_sets: {default: {source: here, templates: ["{}", "a {}"]}}
    metrics: {primary: balanced_accuracy, also: [accuracy]}
    bootstrap: {by: class}
    licence: MIT
    citation: none
    contamination: none
  near: &outside
    title: Near
    modality: m
    kind: zero_shot
    layout: {type: csv, table: t.csv, image: file, label: label, split: split}
    split: test
    classes: [{label: R, name: platelet}, {label: B, name: white blood cell}]
    prompt_sets: {default: {source: here, templates: ["{}"]}}
    metrics: {primary: balanced_accuracy}
    bootstrap: {by: class}
    licence: MIT
    citation: none
    contamination: none
  far: *outside
"""
TASKS = parse_suite(SUITE, "own.yaml")


def write(folder, splits, centres, spread, seed, extra=False):
    """Plain pictures around two colours; returns {split: (colours (N, 3), labels, sites, grounds)}."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows, found = [["file", "label", "split", "caption", "site", "ground"]], {}
    for split, count in splits.items():
        y = np.arange(count) % 2
        colours = np.clip(np.asarray(centres)[y] + rng.normal(0, spread, (count, 3)), 0, 255).astype(np.uint8)
        sites, grounds = rng.choice(["north", "south"], count), rng.choice(["dark", "light"], count)
        for i in range(count):
            name = f"{split}{i}.png"
            Image.new("RGB", (4, 4), tuple(int(v) for v in colours[i])).save(folder / name)
            caption = f"colour {colours[i][0]} {colours[i][1]} {colours[i][2]}"
            rows.append([name, "RB"[y[i]], split, caption, sites[i], grounds[i]])
        found[split] = (colours, y, sites, grounds)
    with (folder / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("beyond")
    splits = {"test": 80, "val": 30, "train": 40}
    return root, {
        "home": write(root / "home", splits, [RED, BLUE], 60, 0),
        "near": write(root / "near", {"test": 40}, [[150, 130, 40], [40, 130, 150]], 30, 1),
        "far": write(root / "far", {"test": 40}, [[30, 200, 30], [60, 220, 60]], 20, 2),
    }


def run(data, out, *names, model=None, **extra):
    facts = {"model": "m", "tasks": list(names), "data": {n: str(data[0] / n) for n in names}, "device": "cpu",
             "bootstrap": {"n": 100}, **extra}  # fmt: skip
    config = check_config(facts, EvaluateConfig, "test")
    return evaluate(config, out, model=model or painter(), tasks=TASKS)[0].record


def unit(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def embed(colours):
    return unit(np.asarray(colours, dtype=np.float64) / 255 + 1e-3)


TEXT = unit(np.array([[1.0, 0, 0], [0, 0, 1]]))
SCALE = 10.0


def test_outsiders_near_and_far_have_the_aurocs_of_scores_computed_apart(data, tmp_path):
    templates = ["colour 1 1 0 {}", "colour 0 1 1 {}"]  # both deny every class alike to the painter
    record = run(data, tmp_path, "home", "near", "far",
                 ood={"near": ["near"], "far": ["far"], "no_templates": templates})  # fmt: skip
    found = record["beyond"]["ood"]
    sets = {name: embed(splits["test"][0]) for name, splits in data[1].items()}
    train, y = embed(data[1]["home"]["train"][0]), data[1]["home"]["train"][1]
    means = np.stack([train[y == c].mean(0) for c in (0, 1)])
    centred = train - means[y]
    inverse = np.linalg.inv(centred.T @ centred / len(train))
    rest = np.linalg.svd(train)[2][1:].T  # half of three dimensions, rounded down, is one main direction
    alpha = SCALE * (train @ TEXT.T).max(1).mean() / np.linalg.norm(train @ rest, axis=1).mean()
    no = unit(unit(np.array([[1.0, 1, 0], [0, 1, 1]])).mean(0))

    def scores(v):
        logits = SCALE * v @ TEXT.T
        p = scipy_softmax(logits, axis=1)
        yes = 1 / (1 + np.exp(SCALE * (v @ no)[:, None] - logits))
        gaps = v[:, None] - means
        return {
            "msp": p.max(1), "max_logit": logits.max(1), "energy": logsumexp(logits, axis=1),
            "mcm": scipy_softmax(v @ TEXT.T, axis=1).max(1), "entropy": (p * np.log(p)).sum(1),
            "no_ctw": yes[np.arange(len(v)), p.argmax(1)], "no_atd": (p * yes).sum(1),
            "knn": -np.sort(np.linalg.norm(v[:, None] - train, axis=2), axis=1)[:, 39],
            "mahalanobis": -np.einsum("ncd,de,nce->nc", gaps, inverse, gaps).min(1),
            "vim": logsumexp(logits, axis=1) - alpha * np.linalg.norm(v @ rest, axis=1),
        }  # fmt: skip

    own = {name: scores(v) for name, v in sets.items()}
    assert set(found) == set(own["home"])
    for rule, inside in own["home"].items():
        for name in ("near", "far"):
            both = np.r_[inside, own[name][rule]]
            expected = sk.roc_auc_score(np.arange(len(both)) < len(inside), both)
            assert found[rule][name]["sets"][name]["auroc"] == pytest.approx(expected, abs=2e-3), (rule, name)
    assert found["energy"]["far"]["mean"]["auroc"] > found["energy"]["near"]["mean"]["auroc"]


def test_corruptions_score_the_corrupted_pictures_and_not_the_cached_clean_ones(data, tmp_path):
    record = run(data, tmp_path, "home", corruptions=["contrast", "gamma", "occlusion"], cache=str(tmp_path / "cache"))
    found = record["beyond"]["corruptions"]
    colours, y, *_ = data[1]["home"]["test"]

    def value(pictures):
        cosines = embed(pictures) @ TEXT.T
        return sk.balanced_accuracy_score(y, cosines.argmax(1))

    wide = colours.astype(np.float64)
    assert found["clean"] == pytest.approx(value(wide))
    for severity, share in ((1, 0.75), (3, 0.45), (5, 0.2)):
        mean = wide.mean(1, keepdims=True)
        assert found["values"]["contrast"][str(severity)] == pytest.approx(
            value(np.round(mean + (wide - mean) * share))
        )
    # Occlusion blackens whole pixels: it takes light and no colour, so a painter that sees colour keeps its score.
    assert found["values"]["occlusion"]["5"] == pytest.approx(found["clean"], abs=0.03)
    means = {name: np.mean(list(by.values())) for name, by in found["values"].items()}
    assert found["mean"] == pytest.approx(np.mean(list(means.values())))
    assert found["kept"] == pytest.approx((found["mean"] - 0.5) / (found["clean"] - 0.5))


def test_subgroups_and_backgrounds_are_the_accuracies_of_their_rows(data, tmp_path):
    record = run(data, tmp_path, "home", subgroups={"home": "site"}, backgrounds={"home": "ground"})
    colours, y, sites, grounds = data[1]["home"]["test"]
    right = (embed(colours) @ TEXT.T).argmax(1) == y
    groups = {g["name"]: g for g in record["beyond"]["subgroups"]["groups"]}
    for site in ("north", "south"):
        rows = sites == site
        recalls = [right[rows & (y == c)].mean() for c in (0, 1)]
        assert groups[site]["value"] == pytest.approx(np.mean(recalls))
        assert groups[site]["n"] == rows.sum()
        assert groups[site]["ci_low"] <= groups[site]["value"] <= groups[site]["ci_high"]
    found = record["beyond"]["backgrounds"]
    cells = {f"{'RB'[c]}/{g}": right[(y == c) & (grounds == g)] for c in (0, 1) for g in ("dark", "light")}
    expected = {name: part.mean() for name, part in cells.items() if part.size >= 20}
    assert found["groups"] == pytest.approx(expected)
    assert found["gap"] == pytest.approx(np.mean(list(expected.values())) - min(expected.values()))


def test_the_prior_is_the_mean_probability_on_validation_and_is_taken_out(data, tmp_path):
    found = run(data, tmp_path, "home", prior_correction=True)["beyond"]["prior_correction"]
    held, (test, y, *_) = data[1]["home"]["val"][0], data[1]["home"]["test"]
    shares = scipy_softmax(SCALE * embed(held) @ TEXT.T, axis=1).mean(0)
    assert list(found["shares"].values()) == pytest.approx(shares, abs=1e-5)
    p = scipy_softmax(SCALE * embed(test) @ TEXT.T, axis=1) / shares
    assert found["after"]["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, p.argmax(1)))
    assert found["before"]["accuracy"] == pytest.approx(((embed(test) @ TEXT.T).argmax(1) == y).mean())


def test_perception_sums_over_the_values_of_the_attribute(data, tmp_path):
    asked = {"values": ["0.0", "0.5"], "join": "colour 1 0 {value} {prompt}", "temperature": 2}
    found = run(data, tmp_path, "home", perception={"home": asked})["beyond"]["perception"]
    colours, y, *_ = data[1]["home"]["test"]
    prompts = unit(np.array([[[1, 0, 0.0]] * 2, [[1, 0, 0.5]] * 2]))  # the painter reads the join before the class
    cosines = np.einsum("nd,zcd->nzc", embed(colours), prompts)
    weights = scipy_softmax(logsumexp(SCALE / 2 * cosines, axis=2), axis=1)
    p = (weights[:, :, None] * scipy_softmax(SCALE * cosines, axis=2)).sum(1)
    assert list(found["perceived"].values()) == pytest.approx(weights.mean(0), abs=1e-5)
    assert p == pytest.approx(0.5)  # what the join hides cannot be told, and ties go to the first class
    assert found["accuracy"] == pytest.approx((y == 0).mean())
    assert found["zero_shot"]["accuracy"] > 0.7


def test_caps_reads_the_captions_of_the_training_split(data, tmp_path):
    found = run(data, tmp_path, "home", adapters=["caps", "tip"])["beyond"]["adapters"]
    assert found["caps"]["selection"]["split"] == "val"
    assert set(found["caps"]["selection"]["hparams"]) == {"alpha", "beta", "gamma", "delta"}
    assert found["caps"]["n_train"] == 40
    assert found["caps"]["balanced_accuracy"] > 0.8


def tiny():
    torch.manual_seed(0)
    model = open_clip.CLIP(**MODEL_CFG)

    def resize(image):
        return preprocess(image.resize((32, 32))) - 0.5

    return model, resize, open_clip.SimpleTokenizer(context_length=16)


def test_learnt_prompts_and_pseudo_labels_choose_their_epoch_and_leave_the_model_alone(data, tmp_path):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model[0].state_dict().items()}
    found = run(data, tmp_path, "home", model=model, adapters=["coop", "upl"],
                prompt_learning={"epochs": 2, "per_class": 8, "learning_rate": 0.05})["beyond"]["adapters"]  # fmt: skip
    assert found["coop"]["n_train"] == 16
    assert found["upl"]["n_train"] == 40
    assert all(entry["selection"]["hparams"]["epoch"] in (0, 1, 2) for entry in found.values())
    assert all((before[name] == tensor).all() for name, tensor in model[0].state_dict().items())


def test_the_points_between_two_models_are_measured_and_one_is_chosen_on_validation(data, tmp_path, monkeypatch):
    end, start = tiny(), open_clip.CLIP(**MODEL_CFG)
    monkeypatch.setattr("biomedclip.models.load.load", lambda name: (start, None, None))
    record = run(data, tmp_path, "home", model=end, wise={"start": "before", "alphas": [0, 0.5, 1]},
                 cache=str(tmp_path / "cache"))  # fmt: skip
    found = record["beyond"]["wise"]
    assert [point["alpha"] for point in found["curve"]] == [0, 0.5, 1]
    assert found["curve"][2]["test"] == record["metrics"]["balanced_accuracy"]["value"]
    alone = run(data, tmp_path / "alone", "home", model=(start, *end[1:]))
    assert found["curve"][0]["test"] == alone["metrics"]["balanced_accuracy"]["value"]
    best = max(point["val"] for point in found["curve"])
    assert found["chosen"]["score"] == best
    assert found["chosen"]["split"] == "val"
    chosen = found["chosen"]["hparams"]["alpha"]
    assert chosen == next(point["alpha"] for point in found["curve"] if point["val"] == best)
    again = run(data, tmp_path / "again", "home", model=end)
    assert again["model"]["fingerprint"] == record["model"]["fingerprint"]
    write_overview(tmp_path, tmp_path / "report")
    assert "Points between two models" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize("section", ["backgrounds", "perception"])
def test_a_section_for_a_task_that_is_not_run_is_refused(data, tmp_path, section):
    value = {"values": ["a", "b"]} if section == "perception" else "ground"
    with pytest.raises(ConfigError, match=rf"{section}.away: is not among the tasks"):
        run(data, tmp_path, "home", **{section: {"away": value}})


RETRIEVAL = """
suite: own
tasks:
  told:
    title: Told
    modality: m
    kind: retrieval
    layout: {type: csv, table: t.csv, image: file, text: caption}
    split: test
    metrics: {primary: image_to_text/recall@1, also: [image_to_text/full_recall@5]}
    bootstrap: {by: sample}
    licence: MIT
    citation: none
    contamination: none
"""


def test_foils_of_finding_side_and_negation_are_counted_beside_each_other(tmp_path):
    """The painter knows findings by their colour, and neither sides nor negations: 3 of 4 right, and two coins."""
    rows = [["file", "caption"]]
    for i, seen in enumerate(["pneumonia", "pneumonia", "pneumonia", "red blood cell"]):
        colour = (0, 255, 0) if i in (2, 3) else (255, 51, 51)  # the third shows what its caption does not say
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{i}.png")
        place = "on the left" if i < 2 else "below"
        rows.append([f"{i}.png", f"Picture {i} showing a {seen} {place}."])
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    facts = {"model": "m", "tasks": ["told"], "data": {"told": str(tmp_path)}, "device": "cpu", "composition": True,
             "bootstrap": {"n": 100}, "findings": ["pneumonia", "red blood cell"]}  # fmt: skip
    config = check_config(facts, EvaluateConfig, "test")
    (result,) = evaluate(config, tmp_path / "out", model=painter(), tasks=parse_suite(RETRIEVAL, "r.yaml"))
    found = result.record["beyond"]["composition"]
    assert found["finding"] == {"accuracy": 0.75, "chance": 0.5, "n": 4, "without_foil": 0}
    assert found["side"] == {"accuracy": 0.5, "chance": 0.5, "n": 2, "without_foil": 2}
    assert found["negation"] == {"accuracy": 0.5, "chance": 0.5, "n": 4, "without_foil": 0}
