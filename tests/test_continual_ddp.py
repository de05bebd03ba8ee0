"""Terms against forgetting in two processes: the weights, the averages and the probes' answers of one."""

import pytest
from test_continual_run import ALL_TERMS, PROBES
from test_ddp import folders as folders  # a fixture
from test_ddp import largest_difference, run, settings

from biomedclip.config import check_config
from biomedclip.errors import ConfigError
from biomedclip.training.config import TrainConfig
from biomedclip.training.forgetting import read_validation


@pytest.mark.slow
@pytest.mark.timeout(300)  # three starts of torch, on a machine that may be busy
def test_two_processes_end_with_the_weights_averages_and_answers_of_one(folders, tmp_path):
    continual = ALL_TERMS | {"zscl": {"path": str(folders / "colours"), "batch_size": 4, "num_texts": 4}}
    changes = {"continual": continual, "validation": PROBES, "guard": {"window": 2}}
    alone = run(tmp_path / "one", settings(folders, **changes))
    two = run(tmp_path / "two", settings(folders, devices=2, strategy="ddp", **changes))
    assert largest_difference(alone / "start", alone / "final") > 1e-4
    for name in ("final", "ema", "ensemble"):
        assert largest_difference(alone / name, two / name) <= 2e-6
    assert [row["values"] for row in read_validation(two)] == [row["values"] for row in read_validation(alone)]


def test_sharded_weights_are_refused_where_a_method_needs_them_whole():
    values = {
        "model": {"name": "x"}, "data": {"sources": [{"name": "a", "path": "b"}]}, "max_steps": 9, "strategy": "fsdp",
        "devices": 2,
    }  # fmt: skip
    for changes in (
        {"continual": {"ema": {}}},
        {"guard": {}},
        {"validation": {"probes": [{"task": "t", "data": "d"}]}},
    ):
        with pytest.raises(ConfigError, match="fsdp leaves no process with all weights"):
            check_config(values | changes, TrainConfig, "test")
    assert check_config(values | {"continual": {"modx": {}}}, TrainConfig, "test").continual.modx.weight == 20
