"""Loading and exporting: what `load` accepts, what it refuses and how it says so; equal outputs in open_clip."""

import json
import subprocess
import sys

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_model import write_tiny_model

import biomedclip
from biomedclip.errors import CheckpointError
from biomedclip.models.catalog import list_architectures
from biomedclip.models.export import CONFIG_FILE, WEIGHTS_FILE, export_open_clip
from biomedclip.models.load import find_export, load


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def outputs(model, preprocess, tokenizer):
    picture = Image.linear_gradient("L").resize((50, 40)).convert("RGB")
    with torch.no_grad():
        image = model.encode_image(preprocess(picture).unsqueeze(0), normalize=True)
        text = model.encode_text(tokenizer(["a chest X-ray", "a blood smear"]), normalize=True)
    return image, text


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_folder_loads_with_the_outputs_open_clip_gives(tiny, prefix):
    model, preprocess, tokenizer = load(f"{prefix}{tiny}")
    theirs, their_preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tiny}")
    ours = outputs(model, preprocess, tokenizer)
    reference = outputs(theirs.eval(), their_preprocess, open_clip.get_tokenizer(f"local-dir:{tiny}"))
    assert torch.equal(ours[0], reference[0])
    assert torch.equal(ours[1], reference[1])
    assert not model.training
    assert ours[0].norm(dim=-1).item() == pytest.approx(1, abs=1e-6)


def test_an_export_of_a_loaded_model_is_the_same_model(tiny, tmp_path):
    model, preprocess, tokenizer = load(tiny)
    model_cfg = json.loads((tiny / CONFIG_FILE).read_text())["model_cfg"]
    again = export_open_clip(model, tmp_path / "copy", model_cfg=model_cfg, metadata={"step": "3"})
    for first, second in zip(outputs(model, preprocess, tokenizer), outputs(*load(again)), strict=True):
        assert torch.equal(first, second)
    assert (again / CONFIG_FILE).read_bytes() == (tiny / CONFIG_FILE).read_bytes()


def test_nan_weights_are_never_exported(tiny, tmp_path):
    model, _, _ = load(tiny)
    with torch.no_grad():
        model.logit_scale.fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"1 tensors hold NaN or infinity \(found logit_scale\)"):
        export_open_clip(model, tmp_path / "bad", model_cfg={})
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("name", list_architectures())
def test_every_shipped_architecture_is_built_by_open_clip_and_encodes(name):
    model, preprocess, tokenizer = load(name, random_init=True)
    image, text = outputs(model, preprocess, tokenizer)
    assert image.shape[-1] == text.shape[-1] == open_clip.get_model_config(name)["embed_dim"]


def test_random_weights_come_only_when_asked_for():
    with pytest.raises(
        CheckpointError, match=r"biomedclip-demo: is an architecture, without weights.*random_init=True"
    ):
        load("biomedclip-demo")
    with pytest.raises(CheckpointError, match="name its weights: ViT-B-32/"):
        load("ViT-B-32")


def test_an_architecture_takes_its_weights_from_a_file(tmp_path):
    made, preprocess, _ = load("biomedclip-demo", random_init=True)
    save_file({key: value.contiguous() for key, value in made.state_dict().items()}, tmp_path / "w.safetensors")
    found, same, tokenizer = load("biomedclip-demo", checkpoint=tmp_path / "w.safetensors")
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in made.state_dict().items())
    assert repr(same) == repr(preprocess)
    outputs(found, same, tokenizer)
    with pytest.raises(CheckpointError, match="there is no such file"):
        load("biomedclip-demo", checkpoint=tmp_path / "gone.pt")
    save_file({"logit_scale": torch.ones(())}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="are missing"):
        load("biomedclip-demo", checkpoint=tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("biomedclip-dmo", "did you mean 'biomedclip-demo'?"),
        ("ViT-B-33/openai", "did you mean 'ViT-B-32'?"),
        ("ViT-B-32/openia", "has no weights 'openia'; did you mean 'openai'?"),
        ("zzzzzzzzz", "name a folder, an open_clip model"),
    ],
)
def test_a_wrong_name_says_what_was_meant(name, message):
    with pytest.raises(CheckpointError) as caught:
        load(name)
    assert message in str(caught.value)


def test_a_folder_that_is_no_model_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no open_clip_config\.json"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        find_export(tmp_path / "nowhere")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has saved no checkpoint yet"):
        load(tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "config", "shape"])
def test_damaged_files_are_one_clear_error(tmp_path, damage):
    folder = write_tiny_model(tmp_path / "m")
    if damage == "truncate":
        data = (folder / WEIGHTS_FILE).read_bytes()
        (folder / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])
    elif damage == "config":
        (folder / CONFIG_FILE).write_text('{"model_cfg": 3}')
    else:
        config = json.loads((folder / CONFIG_FILE).read_text())
        config["model_cfg"]["embed_dim"] = 8
        (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        load(folder)


def test_a_pickled_weights_file_does_not_run(tmp_path):
    folder = write_tiny_model(tmp_path / "m")
    (folder / WEIGHTS_FILE).unlink()

    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").write_text, ("x",))

    torch.save({"state_dict": Trap()}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(CheckpointError):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_the_package_loads_without_being_told_where_the_code_is(tiny):
    script = f"import biomedclip; print(len(biomedclip.load({str(tiny)!r})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"
    assert biomedclip.load is load
