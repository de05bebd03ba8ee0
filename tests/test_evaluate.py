"""Whole evaluations of an encoder whose right and wrong answers are planted, on data in its real layouts."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from biomedclip.config import check_config
from biomedclip.errors import CheckpointError, ConfigError, DataError
from biomedclip.evaluation import embed
from biomedclip.evaluation.config import EvaluateConfig
from biomedclip.evaluation.embed import describe_preprocess, embed_images, fingerprint
from biomedclip.evaluation.evaluate import evaluate
from biomedclip.evaluation.results import read_result, read_results, slug, write_result
from biomedclip.evaluation.scores import ClassScores, RankScores, hash_scores, measure, read_scores, write_scores
from biomedclip.images import check_image
from biomedclip.layouts import read_manifest
from biomedclip.schema import Article, Pair
from biomedclip.shards import DatasetWriter

COLOURS = {"Platelets": (255, 0, 0), "RBC": (0, 255, 0), "WBC": (0, 0, 255)}
WORDS = {"platelet": (1, 0, 0), "red blood cell": (0, 1, 0), "white blood cell": (0, 0, 1),
         "normal lungs": (1, 1, 1), "pneumonia": (1, 0.2, 0.2)}  # fmt: skip


class Painter(torch.nn.Module):
    """An image is its mean colour, a text the colour its words name: what it gets right is known beforehand."""

    def __init__(self, logit_scale=10.0):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(np.log(logit_scale)))
        self.calls = 0

    def encode_image(self, x, normalize=False):
        self.calls += 1
        assert not self.training
        return torch.nn.functional.normalize(x.mean((2, 3)) + 1e-3, dim=-1)

    def encode_text(self, tokens, normalize=False):
        texts = ["".join(chr(c) for c in row if c) for row in tokens.tolist()]
        return torch.nn.functional.normalize(torch.tensor([self.colour(t) for t in texts]), dim=-1)

    def colour(self, text):
        if text.startswith("colour "):
            return [float(v) for v in text.split()[1:4]]
        return [float(v) for v in next(c for word, c in WORDS.items() if word in text)]


def tokenizer(texts):
    return torch.tensor([[ord(c) for c in text[:80]] + [0] * (80 - len(text[:80])) for text in texts])


def preprocess(image):
    return torch.from_numpy(np.asarray(image, dtype=np.float32).copy()).permute(2, 0, 1) / 255


def painter():
    return Painter(), preprocess, tokenizer


def picture(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def cells(tmp_path):
    """Twelve test images a class in fields of three; two platelets look like white cells: recalls 10/12, 1, 1."""
    root = tmp_path / "bccd"
    root.mkdir()
    with (root / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "label", "split", "source_image"])
        for label, colour in COLOURS.items():
            for number in range(12):
                looks = COLOURS["WBC"] if label == "Platelets" and number < 2 else colour
                name = f"{label}_{number}.png"
                (root / name).write_bytes(picture(looks))
                table.writerow([name, label, "test", f"field{number // 3}_{label}"])
        table.writerow(["Platelets_0.png", "RBC", "train", "elsewhere"])
    text = (root / "manifest.csv").read_text().replace("Platelets_0.png,RBC,train", "train.png,RBC,train")
    (root / "manifest.csv").write_text(text)
    (root / "train.png").write_bytes(picture((0, 255, 0)))
    return root


@pytest.fixture
def articles(tmp_path):
    """Eight figures of four articles in the test split; figures 0 and 1 share a caption; 6 and 7 are swapped."""
    colours = [(200, 10, 10), (190, 30, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10), (10, 200, 200),
               (200, 10, 200), (90, 30, 160)]  # fmt: skip
    said = [colours[0], colours[0], *colours[2:6], colours[7], colours[6]]
    folder = tmp_path / "pmc"
    with DatasetWriter(folder, name="pmc") as writer:
        for number, (colour, words) in enumerate(zip(colours, said, strict=True)):
            checked = check_image(picture(colour))
            for split in ("train", "test"):
                writer.add(
                    Pair(
                        key=f"{split}-{number}",
                        image=checked.data,
                        image_format="png",
                        width=4,
                        height=4,
                        caption=f"colour {words[0]} {words[1]} {words[2]}",
                        source="pmc",
                        licence="CC BY",
                        sha256=checked.sha256,
                        phash=checked.phash,
                        split=split,
                        article_id=f"PMC{number // 2 + (10 if split == 'test' else 20)}.1",
                    )
                )
        facts = [Article(article_id=f"PMC{i}.1", pmcid=i, version=1, title="t", licence="CC BY") for i in (10, 11)]
        writer.finish(articles=facts, provenance={}, card=lambda manifest: "card")
    return folder


def config(**values):
    base = {"model": "painter", "bootstrap": {"n": 200}, "tasks": list(values.get("data", {}))}
    return check_config({**base, **values}, EvaluateConfig, "test")


def test_planted_accuracy_comes_out_with_interval_groups_and_baselines(cells, tmp_path):
    (result,) = evaluate(config(data={"bccd": str(cells)}), tmp_path / "out", model=painter())
    record, metrics = result.record, result.metrics
    assert metrics["balanced_accuracy"]["value"] == pytest.approx((10 / 12 + 2) / 3)
    assert metrics["accuracy"]["value"] == pytest.approx(34 / 36)
    assert metrics["accuracy"]["n"] == 36
    entry = metrics["balanced_accuracy"]
    assert entry["ci_low"] < entry["value"] < entry["ci_high"] <= 1
    assert entry["ci_method"] == "bootstrap-percentile-group"
    assert record["confusion"] == [[10, 0, 2], [0, 12, 0], [0, 0, 12]]
    assert record["baselines"]["random"]["balanced_accuracy"] == pytest.approx(1 / 3)
    assert record["baselines"]["majority"]["accuracy"] == pytest.approx(1 / 3)
    assert record["dataset"]["n_groups"] == 12
    assert record["dataset"]["class_counts"] == [12, 12, 12]
    assert record["model"]["logit_scale"] == pytest.approx(10)
    assert record["model"]["fingerprint"].startswith("sha256:")
    assert record["prompts"]["RBC"][0] == "red blood cell"
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert any("a part of the split" in warning for warning in record["warnings"])


def test_files_hold_what_is_returned_and_scores_give_the_same_numbers(cells, tmp_path):
    (result,) = evaluate(config(data={"bccd": str(cells)}), tmp_path / "out", model=painter())
    assert result.path == tmp_path / "out" / "results" / "painter" / "bccd.json"
    assert json.loads(result.path.read_text()) == result.record
    (found,) = read_results(tmp_path / "out")
    assert found == result
    scores = read_scores(result.scores_path)
    assert isinstance(scores, ClassScores)
    assert scores.cosines.dtype == np.float32
    assert scores.cosines.max() <= 1 + 1e-6
    assert hash_scores(scores) == result.record["scores_sha256"]
    again = measure(scores, tuple(result.metrics), resamples=200)
    assert again["metrics"] == result.metrics


def test_a_repetition_changes_nothing_and_another_result_is_put_beside(cells, tmp_path):
    settings, out = config(data={"bccd": str(cells)}), tmp_path / "out"
    (first,) = evaluate(settings, out, model=painter())
    before = first.path.read_bytes()
    (second,) = evaluate(settings, out, model=painter())
    assert second.path == first.path
    (other,) = evaluate(settings, out, model=(Painter(logit_scale=50.0), preprocess, tokenizer))
    assert other.path != first.path
    assert other.scores_path != first.scores_path
    assert first.path.read_bytes() == before
    assert len(read_results(out)) == 2
    assert read_result(other.path).record["model"]["logit_scale"] == pytest.approx(50)


def test_two_classes_of_an_npz_are_scored_by_the_difference(tmp_path):
    root = tmp_path / "pneumoniamnist"
    root.mkdir()
    pixels = np.zeros((20, 4, 4, 3), np.uint8)
    labels = np.arange(20) % 2
    pixels[labels == 0] = 200
    pixels[labels == 1, ..., 0] = 200
    pixels[:2] = pixels[[1, 0]]  # one of each is wrong
    np.savez(root / "pneumoniamnist.npz", test_images=pixels, test_labels=labels[:, None].astype(np.uint8))
    (result,) = evaluate(config(data={"pneumoniamnist": str(root)}), tmp_path / "out", model=painter())
    assert result.metrics["balanced_accuracy"]["value"] == pytest.approx(0.9)
    assert result.metrics["auroc"]["value"] == pytest.approx(0.9)  # of 100 pairs 81 right, 18 tied: .81 + .09
    assert result.metrics["auroc"]["ci_method"] == "bootstrap-percentile-stratified"


def test_retrieval_on_shards_finds_planted_ranks_both_ways(articles, tmp_path):
    (result,) = evaluate(config(data={"article_retrieval": str(articles)}), tmp_path / "out", model=painter())
    metrics = result.metrics
    assert result.record["dataset"]["n"] == 8  # the test split alone
    assert result.record["dataset"]["n_groups"] == 4
    # Six of eight first: equal captions are right for each other, the two swapped ones are wrong.
    assert metrics["image_to_text/recall@1"]["value"] == 0.75
    assert metrics["text_to_image/recall@1"]["value"] == 0.75
    assert metrics["image_to_text/recall@10"]["value"] == 1
    scores = read_scores(result.scores_path)
    assert isinstance(scores, RankScores)
    assert scores.image_to_text[:6].tolist() == [1] * 6
    chance = (6 * (1 / 8) + 2 * (2 / 8)) / 8
    assert result.record["baselines"]["random"]["image_to_text/recall@1"] == pytest.approx(chance)
    examples = result.record["examples"]
    assert [example["hit"] for example in examples] == [True] * 6 + [False] * 2
    assert examples[0]["caption"] == "colour 200 10 10"


def test_a_flawless_result_gets_an_exact_interval_and_not_a_point(cells, tmp_path):
    for number in range(2):
        (cells / f"Platelets_{number}.png").write_bytes(picture(COLOURS["Platelets"]))
    (result,) = evaluate(config(data={"bccd": str(cells)}), tmp_path / "out", model=painter())
    entry = result.metrics["accuracy"]
    assert (entry["value"], entry["ci_high"], entry["ci_method"]) == (1.0, 1.0, "exact-all-right")
    assert entry["ci_low"] == pytest.approx(0.025 ** (1 / 12))  # twelve fields
    assert result.metrics["balanced_accuracy"]["ci_low"] == pytest.approx(0.025 ** (1 / 12), abs=1e-6)
    assert result.metrics["auroc"]["ci_method"].endswith("-degenerate")


def test_unreadable_images_are_counted_listed_and_limited(cells, tmp_path):
    (cells / "RBC_3.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"1 of 36 images cannot be read.*RBC_3"):
        evaluate(config(data={"bccd": str(cells)}), tmp_path / "out", model=painter())
    settings = config(data={"bccd": str(cells)}, max_excluded=0.1)
    (result,) = evaluate(settings, tmp_path / "out", model=painter())
    excluded = result.record["dataset"]["excluded"]
    assert excluded["by_reason"] == {"unreadable_image": 1}
    assert excluded["listed"][0]["item"] == "RBC_3.png"
    assert result.metrics["accuracy"]["n"] == 35


def test_embeddings_that_are_not_finite_are_named_by_sample(cells, tmp_path):
    class Broken(Painter):
        def encode_image(self, x, normalize=False):
            out = super().encode_image(x)
            out[x.mean((2, 3))[:, 1] > 0.9] = torch.nan
            return out

    with pytest.raises(DataError, match=r"not finite \(found RBC_0.png, RBC_1.png"):
        evaluate(config(data={"bccd": str(cells)}), tmp_path / "out", model=(Broken(), preprocess, tokenizer))


def test_finished_tasks_stay_when_a_later_one_fails(cells, articles, tmp_path):
    class Late(Painter):
        def colour(self, text):
            return [float("nan")] * 3 if text.startswith("colour") else super().colour(text)

    settings = config(data={"bccd": str(cells), "article_retrieval": str(articles)})
    with pytest.raises(DataError, match="colour 200"):
        evaluate(settings, tmp_path / "out", model=(Late(), preprocess, tokenizer))
    assert [result.task for result in read_results(tmp_path / "out")] == ["bccd"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",test,", ",val,", "nothing in split 'test'"),
        ("WBC,test", "RBC,test", "no image of WBC"),
        ("WBC,test", "basophil,test", "needs one label of"),
    ],
)
def test_data_that_is_not_what_the_task_asks_is_refused_before_the_model(cells, tmp_path, old, new, message):
    table = cells / "manifest.csv"
    table.write_text(table.read_text().replace(old, new))
    model = painter()
    with pytest.raises(DataError, match=message):
        evaluate(config(data={"bccd": str(cells)}), tmp_path / "out", model=model)
    assert model[0].calls == 0


def test_more_samples_than_the_task_counts_are_refused(cells, tmp_path):
    rows = "".join(f"extra{i}.png,Platelets,test,x{i}\n" for i in range(30))
    for i in range(30):
        (cells / f"extra{i}.png").write_bytes(picture((255, 0, 0)))
    with (cells / "manifest.csv").open("a") as file:
        file.write(rows)
    with pytest.raises(DataError, match=r"other counts than expected.*Platelets 42 of 39"):
        evaluate(config(data={"bccd": str(cells)}), tmp_path / "out", model=painter())


def test_a_missing_or_wrong_folder_and_an_unknown_prompt_set_are_config_errors(cells, tmp_path):
    with pytest.raises(ConfigError, match=r"data.bccd: is missing"):
        evaluate(config(tasks=["bccd"]), tmp_path, model=painter())
    with pytest.raises(ConfigError, match="no such file or folder"):
        evaluate(config(data={"bccd": str(tmp_path / "nowhere")}), tmp_path, model=painter())
    with pytest.raises(ConfigError, match="did you mean 'single'"):
        evaluate(config(data={"bccd": str(cells)}, prompt_sets={"bccd": "singel"}), tmp_path, model=painter())


def test_a_model_that_training_uses_goes_on_in_training_mode(cells, tmp_path):
    model = painter()
    model[0].train()
    evaluate(config(data={"bccd": str(cells)}), tmp_path / "out", model=model)
    assert model[0].training


def test_embeddings_are_cached_by_weights_data_and_preprocessing(cells, tmp_path):
    cache, model = tmp_path / "cache", Painter()
    manifest = read_manifest("csv", cells, table="manifest.csv", image="file", label="label")
    first = embed_images(model, preprocess, manifest, cache=cache)
    calls = model.calls
    second = embed_images(model, preprocess, manifest, cache=cache)
    assert (second.cached, first.cached, model.calls) == (True, False, calls)
    assert (first.vectors == second.vectors).all()
    assert first.sample_ids == second.sample_ids
    assert not embed_images(Painter(logit_scale=3.0), preprocess, manifest, cache=cache).cached
    (cells / "RBC_0.png").write_bytes(picture((1, 2, 3)))  # other pixels under the same name
    assert not embed_images(model, preprocess, manifest, cache=cache).cached
    for file in cache.iterdir():
        file.write_bytes(b"broken")
    assert not embed_images(model, preprocess, manifest, cache=cache).cached


def test_workers_and_batch_sizes_give_the_same_embeddings(cells):
    manifest = read_manifest("csv", cells, table="manifest.csv", image="file", label="label")
    one = embed_images(Painter(), preprocess, manifest, batch_size=1)
    many = embed_images(Painter(), preprocess, manifest, batch_size=16, workers=1)
    assert one.sample_ids == many.sample_ids == tuple(row.sample_id for row in manifest.rows)
    assert one.vectors == pytest.approx(many.vectors, abs=1e-6)
    assert np.linalg.norm(one.vectors, axis=1) == pytest.approx(1, abs=1e-6)


def test_the_fingerprint_is_of_the_weights():
    assert fingerprint(Painter()) == fingerprint(Painter())
    assert fingerprint(Painter()) != fingerprint(Painter(logit_scale=11.0))
    half = Painter().to(torch.bfloat16)
    assert fingerprint(half) != fingerprint(Painter())
    assert "0x" not in describe_preprocess(preprocess)


def test_a_model_without_a_finite_logit_scale_is_refused():
    with pytest.raises(CheckpointError, match="no logit_scale"):
        embed.logit_scale_of(torch.nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="not finite"):
        embed.logit_scale_of(Painter(logit_scale=float("inf")))


def test_scores_survive_the_disk_and_strangers_files_do_not(tmp_path):
    scores = ClassScores(
        sample_ids=("a", "ü"), group_ids=None, classes=("x", "y"), y=np.array([0, 1]),
        cosines=np.array([[0.1, 0.2], [0.3, 0.4]], np.float32), logit_scale=2.5,
    )  # fmt: skip
    digest = write_scores(tmp_path / "s.npz", scores)
    back = read_scores(tmp_path / "s.npz")
    assert hash_scores(back) == digest
    assert back.sample_ids == ("a", "ü")
    assert back.group_ids is None
    np.savez(tmp_path / "evil.npz", format=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("no zip")
    for name in ("evil.npz", "text.npz", "nothing.npz"):
        with pytest.raises(DataError, match="holds no scores"):
            read_scores(tmp_path / name)


def test_undefined_metrics_are_null_with_a_reason(tmp_path):
    one = ClassScores(
        sample_ids=("a",), group_ids=None, classes=("x", "y"), y=np.array([0]),
        cosines=np.array([[0.1, 0.2]], np.float32), logit_scale=2.5,
    )  # fmt: skip
    facts = measure(one, ("auroc", "accuracy"), resamples=100)
    assert facts["metrics"]["auroc"]["value"] is None
    assert facts["metrics"]["auroc"]["reason"] == "all samples are of class 0"
    assert facts["metrics"]["accuracy"]["value"] == 0
    assert "1 independent" in facts["metrics"]["accuracy"]["reason"]
    record = {"task": "t", "model": {"name": "hf-hub:a/b"}, **facts}
    assert write_result(tmp_path, record, one).path.parent.name == "hf-hub-a-b"
    assert slug("../../x") == "x"


def test_no_split_but_the_tasks_own_is_ever_read(cells, tmp_path):
    """Selection on test data cannot happen where nothing is selected: the record says so, and val stays unread."""
    (result,) = evaluate(config(data={"bccd": str(cells)}), tmp_path / "out", model=painter())
    assert result.record["selection"] == {"split": "val", "hparams": {}}
    assert "train.png" not in read_scores(result.scores_path).sample_ids
