"""Rows of metrics.csv in TensorBoard, W&B and MLflow: what each stored, read back from its files."""

import json
import struct

import pytest
from test_module import Batches, batch, config, model

from biomedclip.runs import open_run, read_metrics
from biomedclip.training.callbacks import LogSteps
from biomedclip.training.module import ContrastiveModule
from biomedclip.training.trainer import make_trainer, quiet_lightning


def train(folder, logger):
    """Three steps with rows in the logger; the run folder."""
    settings = config(max_steps=3, log_every_steps=1, loggers=[logger])
    run = open_run(folder, kind="train", config=settings, seed=0, resume=False)
    log = LogSteps(run, settings, lambda *_: None, after_step=0)
    with quiet_lightning():
        trainer = make_trainer(settings, folder, [log], validates=False)
        batches = Batches([batch(seed=number) for number in range(3)])
        trainer.fit(ContrastiveModule(model(), settings), batches, val_dataloaders=[])
    return folder


def read_events(path):
    """Events of a TensorBoard file: each a length, its check sum, the bytes and their check sum."""
    from tensorboardX.proto.event_pb2 import Event

    data, place = path.read_bytes(), 0
    while place < len(data):
        (size,) = struct.unpack("<Q", data[place : place + 8])
        yield Event.FromString(data[place + 12 : place + 12 + size])
        place += 16 + size


def read_log(data):
    """Records of a W&B file: blocks of 32 KiB of pieces, each a check sum, its length and which part it is."""
    place, record = 7, b""  # behind the mark of the file
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, part = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if part in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def agree(found, folder):
    """(step, name) -> value, against the numbers of metrics.csv."""
    rows = read_metrics(folder)
    wanted = {(row["step"], name): value for row in rows for name, value in row.items()
              if name != "step" and value is not None}  # fmt: skip
    assert len(rows) == 3
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_tensorboard_holds_the_rows_and_the_config(tmp_path):
    folder = train(tmp_path / "run", "tensorboard")
    files = sorted((folder / "tensorboard").glob("events.out.tfevents.*"))
    events = [event for path in files for event in read_events(path)]
    found = {(event.step, value.tag): value.simple_value for event in events for value in event.summary.value
             if value.HasField("simple_value")}  # fmt: skip
    agree(found, folder)
    assert "batch_size: 10" in (folder / "tensorboard" / "hparams.yaml").read_text()


@pytest.mark.slow  # beside a package that development does not need
@pytest.mark.filterwarnings("ignore")
def test_mlflow_holds_the_rows_and_the_config_in_the_run_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = train(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("biomedclip").experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params["batch_size"] == "10"
    found = {(entry.step, name): entry.value for name in run.data.metrics
             for entry in client.get_metric_history(run.info.run_id, name)}  # fmt: skip
    agree(found, folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_holds_the_rows_and_the_config_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = train(tmp_path / "run", "wandb")
    wandb.finish()
    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    found, settings = {}, {}
    for record in map(Record.FromString, read_log(path.read_bytes())):
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        step = row.pop("trainer/global_step", None)
        found |= {(step, name): value for name, value in row.items() if not name.startswith("_")}
        for update in (record.config, record.run.config):
            settings |= {item.key or item.nested_key[0]: item.value_json for item in update.update}
    agree(found, folder)
    assert settings["batch_size"] == "10"
