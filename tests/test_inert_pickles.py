"""Objects beside the weights of a training checkpoint are opened as placeholders: nothing they name is run."""

import shutil
import sys
from types import ModuleType

import pytest
import torch

from biomedclip.errors import CheckpointError
from biomedclip.models.pickles import read_tensors
from biomedclip.models.zoo import read_model

INERT = read_model("cxr-clip-swin-mcc").keys.inert_globals


@pytest.fixture
def config_list(monkeypatch):
    """A class called as OmegaConf's list, gone again when the file is read."""
    module = ModuleType("omegaconf.listconfig")
    # A class that pickles under another module's name.
    exec(
        "class ListConfig:\n"
        "    def __init__(self, values): self.__dict__['values'] = values\n"
        "    def __setstate__(self, state): raise RuntimeError('was called')\n",
        module.__dict__,
    )
    monkeypatch.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.listconfig", module)
    yield module.ListConfig
    monkeypatch.undo()


def checkpoint(path, **beside):
    torch.save({"model": {"weight": torch.arange(4.0)}, **beside}, path)
    return path


def test_a_training_config_beside_the_weights_is_opened_without_its_library(tmp_path, config_list, monkeypatch):
    path = checkpoint(tmp_path / "a.tar", config={"scale": config_list([0.8, 1.1])}, epoch=3)
    monkeypatch.undo()
    assert "omegaconf.listconfig" not in sys.modules
    tensors = read_tensors(path, unwrap=["model"], inert_globals=INERT)
    assert torch.equal(tensors["weight"], torch.arange(4.0))
    with pytest.raises(CheckpointError, match=r"was not opened \(found it names omegaconf\.listconfig\.ListConfig\)"):
        read_tensors(path, unwrap=["model"])


def test_a_name_that_runs_something_stands_for_nothing(tmp_path):
    class Trap:
        def __reduce__(self):
            return shutil.copy, (__file__, f"{tmp_path}/ran")

    path = checkpoint(tmp_path / "a.tar", config=Trap())
    tensors = read_tensors(path, unwrap=["model"], inert_globals=["shutil.copy"])
    assert set(tensors) == {"weight"}
    assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointError, match=r"names shutil\.copy"):
        read_tensors(path, unwrap=["model"], inert_globals=INERT)
    assert not (tmp_path / "ran").exists()


def test_a_placeholder_among_the_weights_is_refused(tmp_path, config_list):
    path = tmp_path / "a.tar"
    torch.save({"model": {"weight": torch.zeros(1), "shape": config_list([1])}}, path)
    with pytest.raises(CheckpointError, match=r"more than tensors where the weights should be \(found shape\)"):
        read_tensors(path, unwrap=["model"], inert_globals=INERT)
