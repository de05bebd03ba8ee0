"""The model that comes with the package: its files, its size, its facts, and that open_clip reads the same from them.

The first half uses a stand-in with random weights; the second half is about the files that are shipped, and fails where
they are missing.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from small_mini import stand_in
from tables import bundled_names, pinned_text
from typer.testing import CliRunner

import biomedclip
from biomedclip import cli
from biomedclip.errors import CheckpointError
from biomedclip.models.build import assemble
from biomedclip.models.catalog import architecture_folder, bundled_folder, models_table, zoo_folder
from biomedclip.models.export import WEIGHTS_FILE, export_open_clip, export_released
from biomedclip.models.folders import CONFIG_FILE
from biomedclip.models.hub import fetch
from biomedclip.models.load import load, released_parts
from biomedclip.models.preprocess import ImageTransform, open_clip_config
from biomedclip.models.verify import verify_parts
from biomedclip.models.zoo import ReleasedModel, Source, read_model

MINI = "biomedclip-mini"
TEXTS = ["a chest x-ray with pneumonia", "a platelet", "of " * 200]


def picture() -> Image.Image:
    rng = np.random.default_rng(3)
    small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    return small.resize((150, 130), Image.Resampling.BICUBIC)


def outputs(model, preprocess, tokenizer):
    with torch.inference_mode():
        image = model.encode_image(preprocess(picture())[None], normalize=True)
        return image, model.encode_text(tokenizer(TEXTS), normalize=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> ReleasedModel:
    return stand_in(tmp_path_factory.mktemp("mini"))


def folder_of(model: ReleasedModel) -> Path:
    return bundled_folder(str(model.source.folder))


# --- the way a bundled model is found and checked


def test_bundled_weights_load_as_float32_without_asking_anybody(small, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("a request"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: pytest.fail("a request"))
    model, preprocess, tokenizer = assemble(released_parts(small, local_files_only=True))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    image, text = outputs(model, preprocess, tokenizer)
    assert image.shape == (1, 16)
    assert text.shape == (3, 16)
    assert [Path(name).name for name in model.load_report.hashes()] == [WEIGHTS_FILE]


def test_open_clip_reads_the_same_model_from_the_folder(small):
    ours = outputs(*assemble(released_parts(small)))
    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder_of(small)}")
    assert torch.equal(preprocess(picture()), ImageTransform(small.preprocess.steps)(picture()))
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder_of(small)}")
    for own, other in zip(ours, outputs(theirs.eval(), preprocess, tokenizer), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def test_an_export_of_it_is_a_model_like_any_other(small, tmp_path):
    parts = released_parts(small)
    model, preprocess, tokenizer = assemble(parts)
    export_released(model, parts, tmp_path / "export")
    for own, other in zip(outputs(model, preprocess, tokenizer), outputs(*load(tmp_path / "export")), strict=True):
        assert torch.equal(own, other)


def test_matrices_are_stored_in_half_precision_and_vectors_are_not(small):
    for name, tensor in load_file(folder_of(small) / WEIGHTS_FILE).items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float16 if tensor.dim() > 1 else torch.float32), name


def test_weights_that_half_precision_cannot_hold_are_refused(small, tmp_path):
    parts = released_parts(small)
    model = assemble(parts)[0]
    with torch.no_grad():
        model.text.text_projection.fill_(1e6)
    with pytest.raises(CheckpointError, match=r"1 tensors hold values beyond half precision \(found text.text_proj"):
        export_open_clip(model, tmp_path, model_cfg=small.architecture.config, half=True)
    assert not list(tmp_path.iterdir())


def test_changed_cut_and_missing_files_are_one_line(small, tmp_path):
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        (tmp_path / file).write_bytes((folder_of(small) / file).read_bytes())
    moved = small.model_copy(update={"source": Source(kind="bundled", folder=str(tmp_path))})
    assert verify_parts(released_parts(moved))[0].passed
    data = bytearray((tmp_path / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"sha256 \w+ is expected .*; install biomedclip again"):
        released_parts(moved)
    (tmp_path / WEIGHTS_FILE).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"bytes are expected .*; install biomedclip again"):
        released_parts(moved)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"this installation lacks open_clip_model.safetensors .*install biomedc"):
        released_parts(moved)
    with pytest.raises(CheckpointError, match=r"comes with the package and has no revisions \(found main\)"):
        fetch(small, small.files[0], revision="main")


def test_a_bundled_source_names_its_folder_and_no_other_does():
    with pytest.raises(ValueError, match="folder belongs to what is bundled"):
        ReleasedModel.model_validate({**read_model(MINI).model_dump(), "source": {"kind": "bundled", "folder": None}})
    other = read_model("plip").model_dump()
    with pytest.raises(ValueError, match="folder belongs to what is bundled"):
        ReleasedModel.model_validate({**other, "source": {**other["source"], "folder": "mini"}})


# --- the files that are shipped


@pytest.fixture(scope="module")
def shipped() -> Path:
    folder = bundled_folder(str(read_model(MINI).source.folder))
    missing = [name for name in SHIPPED if not (folder / name).is_file()]
    assert not missing, f"{folder} lacks {', '.join(missing)}: docs/mini.md says how they are made"
    return folder


SHIPPED = (WEIGHTS_FILE, CONFIG_FILE, "calibration.json", "scope.safetensors", "results.json")


def test_the_folder_holds_what_is_shipped_and_nothing_else(shipped):
    assert {path.name for path in shipped.iterdir()} == set(SHIPPED)
    assert (shipped / WEIGHTS_FILE).stat().st_size <= 25_000_000
    assert (shipped / "calibration.json").stat().st_size + (shipped / "scope.safetensors").stat().st_size <= 500_000
    with safe_open(shipped / WEIGHTS_FILE, "pt") as file:
        kinds = {
            str(file.get_slice(name).get_dtype())
            for name in list(file.keys())
            if len(file.get_slice(name).get_shape()) > 1
        }
    assert kinds == {"F16"}


@pytest.mark.parametrize("name", bundled_names())
def test_sizes_and_hashes_in_the_zoo_are_those_of_the_shipped_files(shipped, name):
    text = (zoo_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    assert text == pinned_text(name), "run: .venv/bin/python tests/tables.py"


def test_the_facts_are_those_of_the_shipped_config_and_of_the_architecture(shipped):
    facts, config = read_model(MINI), json.loads((shipped / CONFIG_FILE).read_bytes())
    architecture = json.loads((architecture_folder() / f"{MINI}.json").read_bytes())
    assert facts.architecture.config == architecture
    assert config["model_cfg"] == architecture
    said = open_clip_config(ImageTransform(facts.preprocess.steps))
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in said.items()} == config[
        "preprocess_cfg"
    ]


def test_the_shipped_model_loads_by_name_and_alias_and_equals_open_clip_s(shipped):
    model, preprocess, tokenizer = biomedclip.load(MINI, local_files_only=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ours = outputs(model, preprocess, tokenizer)
    theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{shipped}")
    assert torch.equal(preprocess(picture()), transform(picture()))
    for own, other in zip(ours, outputs(theirs.eval(), transform, tokenizer), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)
    assert load("mini")[0].load_report.name == MINI


def test_it_can_be_verified_listed_described_copied_and_exported(shipped, tmp_path):
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli.app, ["models", *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    assert run("verify", MINI).startswith("ok         open_clip_model.safetensors sha256")
    assert "not for clinical use" in run("info", MINI).lower()
    assert "sha256 as pinned" in run("pull", MINI, "--out", str(tmp_path / "copy"))
    run("export", MINI, "--format", "open_clip", "--out", str(tmp_path / "export"))
    run("convert", MINI, str(shipped), "--out", str(tmp_path / "converted"))
    wanted = outputs(*load(MINI))
    for folder in ("copy", "export", "converted"):
        for own, other in zip(outputs(*load(tmp_path / folder)), wanted, strict=True):
            assert torch.equal(own, other), folder
    assert any(MINI in line and "bundled" in line for line in models_table().split("\n"))


def test_the_licence_names_that_of_every_data_set_and_of_the_starting_weights():
    facts = read_model(MINI)
    assert facts.licence.id == "apache-2.0"
    for word in ("BCCD", "MIT", "PneumoniaMNIST", "CC BY 4.0", "CC0", "EfficientNet", "LICENSE"):
        assert word in facts.licence.evidence, word


def test_the_shipped_record_is_of_the_shipped_weights_and_says_what_was_asked_of_it(shipped):
    from biomedclip.models.training_record import read_record

    record = read_record(shipped / "results.json")
    assert record.weights.sha256 == read_model(MINI).files_of("weights")[0].sha256
    assert {"bccd", "pneumoniamnist"} <= {task.task for task in record.tasks}
    for task in record.tasks:
        assert task.start is not None, f"{task.task} was not scored at the starting point"
    assert sum(run.hours or 0 for run in record.runs) > 0
    assert all(run.seed is not None for run in record.runs)
    assert not {name for source in record.sources for name in source.licences} - {"CC BY", "CC BY 4.0", "CC0", "MIT"}
    front = yaml.safe_load((Path(__file__).parent.parent / "model_cards" / f"{MINI}.md").read_text().split("---\n")[1])
    assert len(front["model-index"][0]["results"]) == len(record.tasks)


def test_the_page_of_the_model_that_is_not_shipped_is_written_from_its_record():
    from biomedclip.models.own_cards import record_card
    from biomedclip.models.training_record import read_record

    docs = Path(__file__).parent.parent / "docs"
    record = read_record(docs / "mini_research.json")
    again = "run: biomedclip models card docs/mini_research.json --out docs/mini_research.md"
    assert (docs / "mini_research.md").read_text(encoding="utf-8") == record_card(record), again
    assert record.notes.weights is not None
    assert {"bccd", "pneumoniamnist"} < {task.task for task in record.tasks}
