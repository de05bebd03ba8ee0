"""Sources that nothing can seek in: read by webdataset, joined to the planned part of a batch, promised less."""

import shlex
from collections import Counter

import pytest
import torch
from foreign_tars import write_foreign
from synthetic_shards import write_articles, write_colours
from test_loader import make_samples, tokenise

from biomedclip.errors import ConfigError, DataError
from biomedclip.stream.decode import Geometry
from biomedclip.stream.loader import StreamLoader
from biomedclip.stream.pipes import UnindexedSource, is_unindexed
from biomedclip.stream.unindexed import UnindexedSamples

GEOMETRY = Geometry(size_px=20, resize_mode="squash")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("unindexed")
    write_colours(root / "colours")
    write_articles(root / "articles")
    write_foreign(root / "tars")
    return root


def piped(root, *, numbers=range(3), **options):
    addresses = tuple(f"pipe:cat {shlex.quote(str(root / 'tars' / f'{n:05d}.tar'))}" for n in numbers)
    settings = {"name": "piped", "addresses": addresses, "allow_pipe": True} | options
    return UnindexedSource(**settings)


def make_loader(root, sources, *, workers=0, steps=6, rank=0, world_size=1, count=4, **options):
    samples = make_samples((root / "colours", root / "articles"), rank=rank, world_size=world_size, **options)
    unindexed = UnindexedSamples(
        sources, count=count, seed=0, geometry=GEOMETRY, tokenise=tokenise, rank=rank, world_size=world_size
    )
    return StreamLoader(samples, max_steps=steps, workers=workers, unindexed=unindexed)


def test_what_can_only_be_read_from_its_beginning():
    assert all(map(is_unindexed, ("-", "pipe:cat a.tar", "sftp://host/a.tar", "gs://bucket/a.tar", "ais://b/a.tar")))
    assert not any(
        map(is_unindexed, ("a.tar", "/data/*.tar", "https://h/a.tar", "s3://b/a.tar", "hf://datasets/a/b/c"))
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_the_samples_of_commands_are_joined_to_the_planned_ones(root, workers):
    loader = make_loader(root, [piped(root)], workers=workers)
    batches = list(loader)
    planned = list(StreamLoader(make_samples((root / "colours", root / "articles")), max_steps=6))
    assert len(batches) == 6
    for whole, part in zip(batches, planned, strict=True):
        assert whole["image"].shape == (12, 3, 20, 20)
        assert whole["text"].shape == (12, 16)
        assert Counter(whole["source"])["piped"] == 4
        assert torch.equal(whole["image"][:8], part["image"])
        assert whole["key"][:8] == part["key"]
        assert whole["labels"][8:].eq(-1).all()
        assert len({row.sum().item() for row in whole["image"][8:].flatten(1).long()}) > 1
    assert "no exact resume" in loader.notices[0]
    assert len({key for batch in batches for key in batch["key"][8:]}) > 12


def test_processes_and_readers_share_the_tars_and_few_tars_by_sample(root):
    for numbers in (range(3), range(1)):  # more tars than the two processes, and fewer
        keys = []
        for rank in range(2):
            batches = list(make_loader(root, [piped(root, numbers=numbers)], rank=rank, world_size=2, steps=1))
            assert len(batches[0]["key"]) == 4 + 2
            keys.append(set(batches[0]["key"][4:]))
        assert keys[0]
        assert not keys[0] & keys[1]


def test_a_resumed_run_keeps_the_planned_part_and_says_what_it_cannot_keep(root):
    whole = list(make_loader(root, [piped(root)]))
    rest = make_loader(root, [piped(root)])
    state = make_loader(root, [piped(root)]).state_dict() | {"delivered": 4}
    rest.load_state_dict(state)
    for before, after in zip(whole[4:], rest, strict=True):
        assert before["key"][:8] == after["key"][:8]
    other = make_loader(root, [piped(root, weight=2.0), piped(root, name="second")])
    with pytest.raises(ConfigError, match="interrupted run"):
        other.load_state_dict(state)


def test_a_command_runs_only_where_it_is_allowed(root, tmp_path):
    mark = tmp_path / "ran"
    source = piped(root, addresses=(f"pipe:touch {mark}",), allow_pipe=False)
    with pytest.raises(ConfigError, match=r"command for the shell .*allow_pipe: true"):
        make_loader(root, [source])
    assert not mark.exists()


def test_a_secure_webdataset_runs_no_command(root, monkeypatch):
    monkeypatch.setattr("webdataset.utils.enforce_security", True)  # what WDS_SECURE=1 sets
    with pytest.raises(DataError, match="gives no samples"):
        list(make_loader(root, [piped(root)]))


def test_commands_that_fail_are_noted_and_those_that_all_fail_end_the_run(root, tmp_path):
    good = piped(root).addresses[0]
    cut = tmp_path / "cut.tar"
    cut.write_bytes((root / "tars" / "00001.tar").read_bytes()[:3000])
    # Tars this small are gone through many times at once, with all their faults.
    loader = make_loader(root, [piped(root, addresses=(good, "pipe:exit 3", f"pipe:cat {cut}"))], steps=4, max_bad=10.0)
    loader.keep_ledger(tmp_path / "run")
    assert len(list(loader)) == 4
    assert loader.ledger.by_reason["tar_unreadable"] >= 2
    with pytest.raises(DataError, match=r"piped: gives no samples \(found .*exit 3"):
        list(make_loader(root, [piped(root, addresses=("pipe:exit 3",))]))


def test_standard_input_belongs_to_one_process(root):
    source = UnindexedSource(name="in", addresses=("-",))
    with pytest.raises(ConfigError, match="belongs to one process"):
        make_loader(root, [source], world_size=2)
    with pytest.raises(ConfigError, match="no standard input"):
        list(make_loader(root, [source], workers=1))


def run_config(root, model, **source):
    addresses = [f"pipe:cat {shlex.quote(str(root / 'tars'))}/{{00000..00002}}.tar"]
    sources = [{"name": "colours", "path": str(root / "colours"), "weight": 3},
               {"name": "piped", "shards": addresses, "allow_pipe": True} | source]  # fmt: skip
    return {"model": {"name": str(model)}, "data": {"sources": sources}, "max_steps": 3, "batch_size": 8, "threads": 1}


def test_a_run_trains_on_commands_too_and_says_so_before_and_after(root, tmp_path):
    from tiny_model import write_tiny_model

    from biomedclip.config import check_config
    from biomedclip.training.config import TrainConfig
    from biomedclip.training.preflight import forecast_run
    from biomedclip.training.preflight_table import forecast_text
    from biomedclip.training.train import train

    write_tiny_model(tmp_path / "model")
    config = check_config(run_config(root, tmp_path / "model"), TrainConfig, "test")
    assert config.data.planned(8) == 6
    found = forecast_run(config)
    assert found.batch_size == 8
    assert "piped: cannot be indexed" in forecast_text(found)
    assert train(config, tmp_path / "run").steps == 3
    assert "piped: cannot be indexed" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ({"where": "modality = 'CT'"}, "where cannot be asked of it"),
        ({"weight": {0: 1, 5: 2}}, "its weight is one number"),
    ],
)
def test_a_config_asks_of_commands_only_what_they_can_give(root, tmp_path, source, word):
    from biomedclip.config import check_config
    from biomedclip.training.config import TrainConfig

    with pytest.raises(ConfigError, match=word):
        check_config(run_config(root, tmp_path, **source), TrainConfig, "test")


def test_commands_alone_are_no_data(root, tmp_path):
    from biomedclip.config import check_config
    from biomedclip.training.config import TrainConfig

    values = run_config(root, tmp_path)
    values["data"]["sources"] = values["data"]["sources"][1:]
    with pytest.raises(ConfigError, match="needs one source that can be indexed"):
        check_config(values, TrainConfig, "test")
