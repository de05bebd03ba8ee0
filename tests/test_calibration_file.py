"""A model's calibration: fitted on validation alone, stored small, refused where it is broken or of other weights."""

from __future__ import annotations

import json
import math
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic_shards import write_articles, write_colours
from tiny_model import write_tiny_model
from torch import nn
from typer.testing import CliRunner

from biomedclip import cli
from biomedclip.errors import CheckpointError, ConfigError, DataError
from biomedclip.evaluation import metrics, ood
from biomedclip.evaluation.calibration import fit_shared_temperature, fit_temperature, negative_log_likelihood
from biomedclip.evaluation.embed import embed_images
from biomedclip.evaluation.fit_calibration import FitOptions, choose_threshold, describe_fit, fit_calibration
from biomedclip.evaluation.splits import read_other_split
from biomedclip.evaluation.tasks import find_task
from biomedclip.models.calibration import (
    CalibrationFacts,
    Confidence,
    Domain,
    Scope,
    kth_distance,
    read_calibration,
    write_calibration,
)
from biomedclip.models.export import WEIGHTS_FILE
from biomedclip.models.hub import file_hash
from biomedclip.models.load import load

BCCD = Path(str(resources.files("data_builders"))) / "sample" / "bccd"
SURE = Confidence(target=0.9, accuracy=0.95, coverage=0.8, n=10, reached=True)


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- the file


def stored(folder: Path, *, weights: str = "0" * 64, d: int = 8, counts: tuple[int, ...] = (30, 20)) -> Any:
    domains = tuple(Domain(name=f"d{i}", references=n, validation=9) for i, n in enumerate(counts))
    facts = CalibrationFacts(
        weights_sha256=weights, temperature=1.5, uncertain_below=0.7, confidence=SURE, tasks=(),
        scope=Scope(sha256="", k=3, quantile=0.99, domains=domains),
    )  # fmt: skip
    domain_of = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    yardsticks = np.linspace(0.5, 0.9, len(counts)).astype(np.float32)
    return write_calibration(folder, facts, references=unit(sum(counts), d), domain_of=domain_of, yardsticks=yardsticks)


def test_what_is_written_is_what_is_read(tmp_path):
    written = stored(tmp_path)
    write_tiny_model(tmp_path / "final")
    for name in ("calibration.json", "scope.safetensors"):
        shutil.move(tmp_path / name, tmp_path / "final" / name)
    (tmp_path / "final" / WEIGHTS_FILE).unlink()
    read = read_calibration(tmp_path)
    assert read.facts == written.facts
    assert (read.temperature, read.uncertain_below) == (1.5, 0.7)
    vectors = unit(50, 8, seed=3)
    np.testing.assert_array_equal(read.scope_scores(vectors), written.scope_scores(vectors))
    assert read.scope_scores(vectors).dtype == np.float32
    np.testing.assert_array_equal(read.outside(vectors), read.scope_scores(vectors) < -1)


def test_each_domain_has_its_own_yardstick_and_the_nearest_domain_decides(tmp_path):
    found = stored(tmp_path)
    vectors = unit(40, 8, seed=5)
    first, second = (np.sort(np.linalg.norm(vectors[:, None] - part, axis=2), axis=1)[:, 2]
                     for part in (found.references[:30], found.references[30:]))  # fmt: skip
    np.testing.assert_allclose(found.scope_scores(vectors), -np.minimum(first / 0.5, second / 0.9), rtol=1e-4)


def test_the_distance_is_that_of_the_evaluation():
    vectors, references = unit(60, 12), unit(33, 12, seed=2)
    for k in (1, 4, 100):
        np.testing.assert_allclose(
            -kth_distance(vectors, references, k), ood.nearest_distance(vectors, references, k), atol=1e-5
        )


def test_models_without_a_calibration_have_none(tmp_path):
    assert read_calibration("plip") is None
    assert read_calibration("someone/else") is None
    assert read_calibration(write_tiny_model(tmp_path / "model")) is None


def test_a_calibration_of_other_weights_is_refused(tmp_path):
    write_tiny_model(tmp_path)
    stored(tmp_path, weights=file_hash(tmp_path / WEIGHTS_FILE))
    assert read_calibration(str(tmp_path)).temperature == 1.5
    write_tiny_model(tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="was fitted for other weights than those beside it"):
        read_calibration(tmp_path)


def change(folder: Path, **values: Any) -> None:
    path = folder / "calibration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0}, r"is no calibration .*temperature"),
        ({"temperature": "1"}, r"is no calibration .*temperature"),
        ({"surprise": 1}, r"is no calibration .*surprise"),
        ({"scope": {"sha256": "x", "k": 0, "quantile": 0.9, "domains": []}}, "is no calibration"),
    ],
)
def test_a_broken_calibration_is_one_line(tmp_path, values, message):
    write_tiny_model(tmp_path)
    stored(tmp_path, weights=file_hash(tmp_path / WEIGHTS_FILE))
    change(tmp_path, **values)
    with pytest.raises(CheckpointError, match=message):
        read_calibration(tmp_path)


def test_a_scope_that_is_not_the_named_one_is_refused(tmp_path):
    write_tiny_model(tmp_path)
    facts = stored(tmp_path, weights=file_hash(tmp_path / WEIGHTS_FILE)).facts
    scope = tmp_path / "scope.safetensors"
    whole = scope.read_bytes()
    fewer = facts.scope.model_copy(update={"domains": facts.scope.domains[:1]}).model_dump(mode="json")
    change(tmp_path, scope=fewer)
    with pytest.raises(CheckpointError, match=r"does not hold what calibration.json says"):
        read_calibration(tmp_path)
    scope.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"is not the file calibration.json names"):
        read_calibration(tmp_path)
    scope.write_bytes(whole[:40])
    with pytest.raises(CheckpointError, match=r"holds no reference embeddings"):
        read_calibration(tmp_path)
    scope.unlink()
    with pytest.raises(CheckpointError, match=r"holds no reference embeddings .*No such file"):
        read_calibration(tmp_path)


def test_embeddings_of_another_length_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"another length \(found \(3, 9\)\); \(N, 8\)"):
        stored(tmp_path).scope_scores(unit(3, 9))


def test_too_many_references_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="would be larger than 500,000 bytes"):
        stored(tmp_path, d=256, counts=(1000,))
    assert not list(tmp_path.iterdir())


# --- the fit


class Colours(nn.Module):
    """A model whose embedding of a picture is its mean colour, and of a sentence the colour of the cell it names."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(20.0)))

    def encode_image(self, images: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        means = images.mean((2, 3)) - 0.6
        spread = images.std((2, 3))[:, :1]
        return nn.functional.normalize(torch.cat([means, spread], 1), dim=1)

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return nn.functional.normalize(torch.eye(4)[tokens[:, 0]], dim=1)


def tokenise(texts: list[str]) -> torch.Tensor:
    words = ("platelet", "red blood cell", "white blood cell")
    return torch.tensor([[next(i for i, word in enumerate(words) if word in text)] for text in texts])


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.resize((16, 16)), dtype=np.float32).transpose(2, 0, 1) / 255)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """The sample's blood cells without the pictures of the test split, and two domains."""
    root = tmp_path_factory.mktemp("fit")
    write_colours(root / "colours", splits=("train", "val", "test"))
    shutil.copytree(
        BCCD, root / "bccd", ignore=lambda folder, names: [n for n in names if Path(folder) == BCCD and n == "test"]
    )
    assert not (root / "bccd" / "test").exists()
    return root


def fit(root: Path, out: Path, **options: Any) -> Any:
    given = {"tasks": {"bccd": root / "bccd"}, "data": [root / "colours"], "weights_sha256": "0" * 64, **options}
    return fit_calibration((Colours(), to_tensor, tokenise), out, **given)


def test_temperature_threshold_and_scope_come_from_validation_splits_alone(folders, tmp_path):
    found = fit(folders, tmp_path)
    task = find_task("bccd")
    held = read_other_split(task, folders / "bccd", "val")
    images = embed_images(Colours(), to_tensor, held)
    logits = 20 * images.vectors @ np.eye(3, 4, dtype=np.float32).T
    labels = [entry.label for entry in task.classes]
    y = [labels.index(row.labels[0]) for row in held.rows]
    assert found.temperature == pytest.approx(fit_temperature(y, logits), rel=1e-3)
    (told,) = found.facts.tasks
    assert (told.task, told.split, told.n) == ("bccd", "val", len(y))
    assert told.nll[1] < told.nll[0]
    assert told.nll[1] == pytest.approx(negative_log_likelihood(y, logits / found.temperature), rel=1e-4)
    p = metrics.softmax(logits / found.temperature)
    threshold, sure = choose_threshold([(np.asarray(y), p)], 0.98)
    assert found.uncertain_below == pytest.approx(threshold, rel=1e-3)
    assert sure.coverage == pytest.approx((p.max(1) >= threshold).mean())
    (domain,) = found.facts.scope.domains
    assert (domain.name, domain.references, domain.validation) == ("colours", 18, 18)
    assert (tmp_path / "scope.safetensors").stat().st_size < 500_000
    assert "temperature" in describe_fit(found)
    noise = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in ((250, 250, 250), (5, 5, 5))]
    strange = Colours().encode_image(torch.stack([to_tensor(image) for image in noise])).detach().numpy()
    assert found.outside(strange).all()


def test_two_fits_give_the_same_bytes(folders, tmp_path):
    for name in ("first", "second"):
        fit(folders, tmp_path / name)
    for name in ("calibration.json", "scope.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_the_share_of_validation_images_inside_is_the_stated_quantile(folders, tmp_path):
    found = fit(folders, tmp_path, options=FitOptions(quantile=0.5))
    read = found.facts.scope
    from biomedclip.layouts import read_manifest

    rows = [row for row in read_manifest("dataset_folder", folders / "colours").rows if row.split == "val"]
    manifest = read_manifest("dataset_folder", folders / "colours", splits=["val"])
    vectors = embed_images(Colours(), to_tensor, manifest).vectors
    assert len(vectors) == len(rows) == 18
    assert read.quantile == 0.5
    assert found.outside(vectors).mean() == pytest.approx(0.5, abs=1 / 18)


def test_references_are_shared_out_over_domains_and_labels(folders, tmp_path):
    write_articles(tmp_path / "articles")
    with pytest.raises(DataError, match=r"has nothing in split 'val' \(found train\); build it with"):
        fit(folders, tmp_path / "out", data=[folders / "colours", tmp_path / "articles"])
    found = fit(folders, tmp_path / "out", options=FitOptions(references=6))
    assert found.facts.scope.domains[0].references == 6
    assert len(np.unique(found.references.round(1), axis=0)) >= 3, "two of each colour"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": {}}, "--task: is missing"),
        ({"data": []}, "--data: is missing"),
        ({"tasks": {"bcc": "x"}}, "bccd"),
        ({"tasks": {"article_retrieval": "x"}}, "is no task with one class an image"),
    ],
)
def test_what_cannot_be_fitted_is_told_before_anything_is_read(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, tmp_path / "out", **options)


def test_a_task_without_a_validation_split_is_refused(tmp_path, monkeypatch):
    import biomedclip.evaluation.fit_calibration as module

    alone = find_task("bccd").model_copy(update={"select_split": None})
    monkeypatch.setattr(module, "find_task", lambda name: alone)
    with pytest.raises(ConfigError, match="has no split but 'test', which is scored: nothing is fitted on it"):
        fit(tmp_path, tmp_path / "out", tasks={"bccd": tmp_path}, data=[tmp_path])


def test_a_shared_temperature_lets_each_set_count_alike():
    rng = np.random.default_rng(0)
    y, z = np.asarray([0, 0, 1, 1, 0]), rng.normal(size=(5, 2)) + np.asarray([[2, 0], [2, 0], [0, 2], [0, 2], [0, 1]])
    once = fit_shared_temperature([(y, z), (y, 4 * z)])
    many = fit_shared_temperature([(np.tile(y, 50), np.tile(z, (50, 1))), (y, 4 * z)])
    assert once == pytest.approx(many, rel=1e-4)
    losses = [
        np.mean([negative_log_likelihood(y, s * z / t) for s in (1, 4)]) for t in (0.97 * once, once, 1.03 * once)
    ]
    assert losses[1] == min(losses)
    assert fit_shared_temperature([(y, z)]) == fit_temperature(y, z)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.floats(0.5, 1), st.booleans()), min_size=1, max_size=40), st.floats(0.5, 1))
def test_the_threshold_is_the_lowest_that_keeps_the_accuracy(answers, target):
    top = np.asarray([p for p, _ in answers])
    y = np.asarray([0 if right else 1 for _, right in answers])
    threshold, found = choose_threshold([(y, np.stack([top, 1 - top], 1))], target)
    predicted = np.stack([top, 1 - top], 1).argmax(1)
    kept = top >= threshold
    assert found.coverage == pytest.approx(kept.mean())
    assert found.accuracy == pytest.approx((predicted == y)[kept].mean())
    assert found.coverage >= 0.5
    assert not found.reached or found.accuracy >= target - 1e-9
    for other in np.unique(top[top < threshold]):
        more = top >= other
        assert not found.reached or (predicted == y)[more].mean() < target + 1e-9


def test_the_command_writes_beside_the_weights_and_says_what_it_found(folders, tmp_path, monkeypatch):
    model = write_tiny_model(tmp_path / "model")
    arguments = ["models", "calibrate", str(model), "--task", f"bccd={folders / 'bccd'}"]
    done = CliRunner().invoke(cli.app, ["models", "calibrate", str(model), "--task", "bccd"])
    assert "does not say where its data lies" in str(done.exception)
    arguments += ["--data", str(folders / "colours"), "--accuracy", "0.6"]
    done = CliRunner().invoke(cli.app, arguments)
    assert "bccd: give no temperature" in str(done.exception), "random weights mean nothing"
    assert not (model / "calibration.json").exists()
    colours: Any = Colours()
    colours.load_report = load(model)[0].load_report
    monkeypatch.setattr("biomedclip.models.load.load", lambda name: (colours, to_tensor, tokenise))
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.exception
    assert "uncertain below" in done.output
    found = read_calibration(model)
    assert found.facts.weights_sha256 == file_hash(model / WEIGHTS_FILE)
    assert found.facts.confidence.target == 0.6
