"""The forecast of a run agrees with the batches that the run then reads, and needs neither torch nor weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from fresh_python import run_fresh
from mock_bucket import MockBucket
from synthetic_shards import write_articles, write_colours
from typer.testing import CliRunner

from biomedclip import cli
from biomedclip.config import check_config
from biomedclip.errors import ConfigError
from biomedclip.stream.plan import Plan
from biomedclip.stream.rows import read_rows
from biomedclip.stream.source import open_shards
from biomedclip.stream.tars import FetcherHere
from biomedclip.training import preflight as preflight_module
from biomedclip.training.config import TrainConfig
from biomedclip.training.plans import stream_sources
from biomedclip.training.preflight import forecast_run
from biomedclip.training.preflight_table import forecast_text


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_colours(root / "colours")
    write_articles(root / "articles")
    return root


def values(root: Path | str, cache: Path, **changes) -> dict:
    return {
        "model": {"name": "no-such-model"},
        "data": {
            "sources": [
                {"name": "colours", "path": f"{root}/colours", "balance": True, "weight": {0: 1, 30: 3}},
                {"name": "articles", "path": f"{root}/articles"},
            ],
            "fetch": {"cache": str(cache)},
        },
        "max_steps": 40,
        "batch_size": 12,
    } | changes


def config(root: Path | str, cache: Path, **changes) -> TrainConfig:
    return check_config(values(root, cache, **changes), TrainConfig, "test")


def test_the_forecast_is_what_the_batches_hold(root, tmp_path):
    settings = config(root, tmp_path, devices=2, num_nodes=3)
    found = forecast_run(settings, samples_s=100)
    fetcher = FetcherHere(settings.data.fetch)
    rows, sources, _ = read_rows(stream_sources(settings.data), 0.0, fetcher)
    plan = Plan(sources, batch_size=12, seed=0)
    shown: Counter[str] = Counter()
    keys: dict[str, Counter[str]] = {"colours": Counter(), "articles": Counter()}
    labels: Counter[str] = Counter()
    same = size = 0
    for step in range(40):
        picks = plan.batch(step)
        for pick in picks:
            part = rows[pick.source]
            shown[part.source.name] += 1
            keys[part.source.name][part.columns["key"][pick.row]] += 1
            labels.update(f"{part.source.name}: {label}" for label in part.columns["labels"][pick.row])
            members = ("image", "text", "json") if part.columns["num_captions"][pick.row] > 1 else ("image", "text")
            size += sum(part.columns[f"{member}_size"][pick.row] for member in members)
        articles = Counter(a for pick in picks if (a := rows[pick.source].articles[pick.row]) >= 0)
        same += sum(number for number in articles.values() if number > 1)
    assert (found.steps, found.processes, found.per_process, found.shown, found.walked_steps) == (40, 6, 2, 480, 40)
    for source in found.sources:
        assert source.shown == shown[source.name]
        assert source.distinct == len(keys[source.name])
        assert source.epochs == pytest.approx(source.shown / source.samples)
        assert not source.remote
        assert source.requests == 0
    assert found.sources[0].share_first == pytest.approx(0.5)
    assert found.sources[0].share_last == pytest.approx(0.75)
    assert found.same_article_pct == pytest.approx(100 * same / 480)
    assert found.labels_pct == pytest.approx({name: 100 * n / 480 for name, n in labels.items()})
    assert found.licences_pct["CC0"] == pytest.approx(100 * shown["colours"] / 480)
    assert found.hours == pytest.approx(480 / 100 / 3600)
    assert sum(source.bytes_read for source in found.sources) >= size
    assert found.plan_sha256 == plan.sha256


def test_a_long_run_is_walked_in_stretches_and_counted_whole(root, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight_module, "WALKED_SLOTS", 600)
    found = forecast_run(config(root, tmp_path, max_steps=50_000))
    assert found.walked_steps == 48
    assert sum(source.shown for source in found.sources) == found.shown == 600_000
    assert found.hours is None
    text = forecast_text(found)
    assert "48 of the steps" in text
    assert "--samples-s" in text
    assert [source.distinct for source in found.sources] == [18, 20]


def test_caps_show_in_coverage(root, tmp_path):
    sources = [{"name": "colours", "path": f"{root}/colours", "caps": {"label": 2}}]
    short = values(root, tmp_path)["data"] | {"sources": sources}
    found = forecast_run(config(root, tmp_path, data=short, max_steps=2, batch_size=4))
    assert found.sources[0].samples == 18
    assert found.sources[0].distinct == 8  # an epoch has 6: two of the next one are others
    assert forecast_run(config(root, tmp_path, data=short, max_steps=9, batch_size=4)).sources[0].distinct == 18


def test_processes_that_would_not_share_a_batch_evenly_are_refused(root, tmp_path):
    with pytest.raises(ConfigError, match="batch_size"):
        forecast_run(config(root, tmp_path, devices=5))


def test_requests_of_a_remote_source_are_those_that_reading_makes(root, tmp_path):
    with MockBucket(root) as bucket:
        data = values(root, tmp_path)["data"]
        data["sources"] = [{"name": "far", "path": f"{bucket.endpoint}/articles"}]
        settings = config(root, tmp_path, data=data, max_steps=5, batch_size=4)
        found = forecast_run(settings)
        assert bucket.requests("*.tar") == []
        fetcher = FetcherHere(settings.data.fetch)
        rows, sources, _ = read_rows(stream_sources(settings.data), 0.0, fetcher)
        plan = Plan(sources, batch_size=4, seed=0)
        shards = open_shards(rows[0].place, rows[0].columns, fetcher)
        for step in range(5):
            wanted = [pick.row for pick in plan.batch(step)]
            shards.prepare(wanted)
            assert all(shards.read(row, "image") for row in wanted)
        fetcher.close()
        assert found.sources[0].remote
        assert found.sources[0].requests == len(bucket.requests("*.tar"))


def test_the_command_prints_a_table_or_json_without_torch_or_weights(root, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(values(root, tmp_path)))))
    script = (
        "from biomedclip.cli import app\n"
        f"app(['train', {str(path)!r}, '--dry-run', '--samples-s', '50', '--json'], standalone_mode=False)"
    )
    said, loaded = run_fresh(script)
    assert loaded & {"torch", "open_clip", "lightning"} == set()
    found = json.loads(said)
    assert found["shown"] == 480
    assert {source["name"] for source in found["sources"]} == {"colours", "articles"}
    table = CliRunner().invoke(cli.app, ["train", str(path), "--dry-run", "--samples-s", "50"]).stdout
    assert "colours" in table
    assert "40, the same in each of 1 processes" in table
    assert "0.2 min at 50 samples/s" in table
    missing = CliRunner().invoke(cli.app, ["train", str(path)])
    assert "--out: is missing" in str(missing.exception)


def test_shared_ids_are_counted_with_all_who_share():
    assert preflight_module._num_shared(np.array([3, 3, 3, 4, -1, -1, 5, 5])) == 5
