"""A teacher's stored embeddings: they are those of the very crops and captions that training will see."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tiny_model import write_training_folders
from typer.testing import CliRunner

from biomedclip.config import check_config
from biomedclip.errors import DataError
from biomedclip.models.load import load
from biomedclip.shards import verify
from biomedclip.training.config import TrainConfig
from biomedclip.training.continual.stored import StoredEmbeddings, teach
from biomedclip.training.data import StreamData
from biomedclip.training.train import _build, train


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_training_folders(tmp_path_factory.mktemp("data"), "teacher")


def config(folders, **changes):
    sources = [
        {"name": "colours", "path": str(folders / "colours"), "balance": True},
        {"name": "articles", "path": str(folders / "articles")},
    ]
    values = {
        "model": {"name": str(folders / "model")}, "data": {"sources": sources}, "max_steps": 6, "batch_size": 8,
        "log_every_steps": 1, "threads": 1,
    }  # fmt: skip
    return check_config(values | changes, TrainConfig, "test")


@pytest.fixture(scope="module")
def taught(folders):
    return teach(config(folders), str(folders / "teacher"), name="t", views=3)


def open_data(settings) -> StreamData:
    return _build(settings)[3]


def test_embeddings_lie_beside_the_shards_a_row_a_sample_and_view(taught, folders):
    assert {path.parent.name for path in taught} == {"colours", "articles"}
    assert all(path.name.endswith(".teacher-t.parquet") for path in taught)
    tables = [pq.read_table(path) for path in taught if path.parent.name == "colours"]
    assert sum(map(len, tables)) == 18 * 3  # 18 training pictures
    assert set(tables[0]["view"].to_pylist()) == {0, 1, 2}
    assert verify(folders / "colours") == []  # the dataset is as complete as before


def test_a_batch_finds_what_the_teacher_would_say_of_its_very_pixels(taught, folders):
    data = open_data(config(folders))
    samples = data.train_loader.samples
    stored = StoredEmbeddings(samples, ["t"])
    samples.views = stored.views
    assert stored.views == {"colours": 3, "articles": 3}
    model, _, _ = load(folders / "teacher")
    seen = set()
    for step in range(0, 24, 3):  # epochs beyond the third see the views again
        batch = samples[step]
        seen |= set(batch["epoch"].tolist())
        [(image, text, scale)] = stored.find(batch)
        pixels = (batch["image"].float() / 255 - 0.5) / 0.5
        with torch.no_grad():
            texts = _whole(batch["text"])
            wanted = model.encode_image(pixels, normalize=True), model.encode_text(texts, normalize=True)
        torch.testing.assert_close(image, wanted[0], rtol=0, atol=2e-3)
        torch.testing.assert_close(text, wanted[1], rtol=0, atol=2e-3)
        torch.testing.assert_close(image.norm(dim=1), torch.ones(8))
        assert scale == pytest.approx(model.logit_scale.exp().item())
    assert max(seen) >= 3


def _whole(tokens):
    """Token ids padded to the tower's 16."""
    return torch.nn.functional.pad(tokens.long(), (0, 16 - tokens.shape[1]))


def test_a_run_learns_from_stored_embeddings_and_resumes(taught, folders, tmp_path):
    settings = config(folders, continual={"stored": {"names": ["t"], "weight": 1}})
    run = train(settings, tmp_path / "run")
    text = (run.folder / "metrics.csv").read_text().splitlines()
    column = text[0].split(",").index("loss/stored")
    values = [float(line.split(",")[column]) for line in text[1:]]
    assert len(values) == 6
    assert all(np.isfinite(values))
    assert values[0] > 0


def test_teaching_again_keeps_what_is_there_and_a_cut_off_file_is_written_anew(taught, folders):
    before = {path: path.stat().st_mtime_ns for path in taught}
    assert teach(config(folders), str(folders / "teacher"), name="t", views=3) == taught
    assert {path: path.stat().st_mtime_ns for path in taught} == before


def test_embeddings_of_another_seed_sources_or_none_are_refused(taught, folders):
    samples = open_data(config(folders, seed=5)).train_loader.samples
    with pytest.raises(DataError, match=r"was written for another seed \(found 0, here 5\)"):
        StoredEmbeddings(samples, ["t"])
    samples = open_data(config(folders)).train_loader.samples
    with pytest.raises(DataError, match=r"is missing; run: biomedclip teach CONFIG --name other"):
        StoredEmbeddings(samples, ["other"])


def test_the_command_writes_into_a_folder(folders, tmp_path):
    from biomedclip.cli import app

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config(folders).model_dump(mode="json")))
    arguments = ["teach", str(path), "--teacher", str(folders / "teacher"), "--name", "u", "--out", str(tmp_path / "t")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["articles", "colours"]
    samples = open_data(config(folders)).train_loader.samples
    assert StoredEmbeddings(samples, ["u"], tmp_path / "t").views == {"colours": 1, "articles": 1}
