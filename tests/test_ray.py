"""Ray: a cluster of two nodes on this machine does the same tasks, in the same order, to the same bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from test_engines import refuse_three, square

from biomedclip.errors import DataError
from data_builders.engines import run_tasks
from data_builders.pmc.harvest import harvest
from data_builders.pmc.harvest_folder import LOCK
from data_builders.pmc.plan import plan_source
from data_builders.pmc.plan_rules import PlanConfig

# Ray's own deprecations and sockets; what is tested here are results.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]
ray = pytest.importorskip("ray", reason="an optional extra, which the dev extra brings")

SAMPLE = Path(str(resources.files("data_builders"))) / "sample" / "pmc"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each, joined; their workers can import these tests."""
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    nodes.add_node(**small)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    yield nodes
    ray.shutdown()
    nodes.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def node_of(number: int) -> str:
    time.sleep(0.5)
    return ray.get_runtime_context().get_node_id()


def kill_worker(number: int) -> int:
    if number == 2:
        os._exit(1)
    return number


def test_tasks_run_on_both_nodes_and_their_results_come_in_order(cluster):
    assert list(run_tasks(square, range(9), engine="ray", workers=4)) == [n * n for n in range(9)]
    assert len(set(run_tasks(node_of, range(8), engine="ray", workers=4))) == 2


def test_errors_mean_the_same_as_on_local_processes_and_a_joined_cluster_stays(cluster):
    with pytest.raises(DataError, match=r"^unit 3: is refused \(found a three\); leave it out$"):
        list(run_tasks(refuse_three, range(6), engine="ray", workers=2))
    with pytest.raises(DataError, match=r"^unit 2: its worker process died; if memory ran out use"):
        list(run_tasks(kill_worker, range(6), engine="ray", workers=2, name=lambda n: f"unit {n}"))
    results = run_tasks(square, range(100), engine="ray", workers=2)
    assert next(results) == 0
    results.close()
    assert ray.is_initialized()


def test_a_harvest_on_two_nodes_has_the_bytes_of_a_local_one(cluster, tmp_path):
    plan_source(str(SAMPLE), tmp_path / "plan.parquet", PlanConfig(licence="commercial", unit_size=3))
    facts = [
        harvest(tmp_path / "plan.parquet", str(SAMPLE), tmp_path / engine, engine=engine, workers=workers)
        for engine, workers in (("local", 1), ("ray", 2))
    ]
    assert facts[0] == facts[1]
    local, remote = (
        {path.name: path.read_bytes() for path in (tmp_path / engine).iterdir() if path.name != LOCK}
        for engine in ("local", "ray")
    )
    assert local == remote
