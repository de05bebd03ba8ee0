"""Models from a Hub that runs on the loopback: downloads, caches, gates, missing and broken files, each in one line."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Repo, serve
from PIL import Image
from published_biomedclip import CONFIG, CONFIG_BYTES, REPO
from safetensors.torch import save
from tiny_model import write_tiny_model
from typer.testing import CliRunner

from biomedclip import cli
from biomedclip.errors import CheckpointError
from biomedclip.models.build import assemble
from biomedclip.models.hub import fetch, fetch_url, file_hash
from biomedclip.models.load import load, released_parts
from biomedclip.models.zoo import File, read_model

CLIP_MEAN_STD = CONFIG["preprocess_cfg"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with no repository yet; clients in this process ask it, with an empty cache and no token."""
    from huggingface_hub import constants

    with serve({}) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("REPO_CACHE", str(tmp_path / "own"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def outputs(model, preprocess, tokenizer):
    picture = Image.linear_gradient("L").resize((50, 40)).convert("RGB")
    with torch.no_grad():
        image = model.encode_image(preprocess(picture).unsqueeze(0), normalize=True)
        return image, model.encode_text(tokenizer(["a chest X-ray", "a blood smear"]), normalize=True)


def test_an_unknown_repository_in_open_clip_s_format_loads_once_and_then_from_the_cache(hub, tiny):
    files = {path.name: path for path in tiny.iterdir()}
    hub.repos["someone/tiny"] = Repo(files, lfs={"open_clip_model.safetensors"})
    first = outputs(*load("someone/tiny"))
    for ours, local in zip(first, outputs(*load(tiny)), strict=True):
        assert torch.equal(ours, local)
    asked = len(hub.requests)
    again = load("hf-hub:someone/tiny", local_files_only=True)
    assert len(hub.requests) == asked, "local_files_only asked the Hub"
    assert torch.equal(outputs(*again)[1], first[1])
    assert "someone/tiny" in str(again[0].load_report)


def test_a_transformers_clip_loads_by_its_repository_id(hub, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 49408, "max_position_embeddings": 16, "eos_token_id": 49407},
        vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=24,
    )  # fmt: skip
    theirs = CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps({
        "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32},
        "image_mean": CLIP_MEAN_STD["mean"], "image_std": CLIP_MEAN_STD["std"], "resample": 3,
    }))  # fmt: skip
    hub.repos["someone/hf"] = Repo({path.name: path for path in (tmp_path / "hf").iterdir()})
    model, preprocess, tokenizer = load("someone/hf")
    pixels = preprocess(Image.linear_gradient("L").resize((50, 40)))[None]
    tokens = tokenizer(["a chest X-ray"])
    with torch.no_grad():
        assert_near(model.encode_image(pixels), theirs.get_image_features(pixel_values=pixels).pooler_output)
        assert_near(model.encode_text(tokens), theirs.get_text_features(input_ids=tokens).pooler_output)


def assert_near(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_published_biomedclip_config_has_the_pinned_hash_and_a_changed_one_is_refused(hub):
    from huggingface_hub import constants

    facts = read_model("biomedclip")
    config = next(file for file in facts.files if file.role == "config")
    hub.repos[REPO] = Repo({"open_clip_config.json": CONFIG_BYTES}, commit=facts.source.revision)
    path = fetch(facts, config)
    assert file_hash(path) == "9a41f334a8c444678772c0ebb9ab854c97ab350bced3a17b803e258d39c23dc0"
    changed = {"sha256 9a41f": CONFIG_BYTES.replace(b"224", b"225"), r"707 bytes are expected \(found 2": b"{}"}
    for message, content in changed.items():
        shutil.rmtree(constants.HF_HUB_CACHE)
        hub.repos[REPO].files["open_clip_config.json"] = content
        with pytest.raises(CheckpointError, match=rf"is not the published file of biomedclip: .*{message}.*; "):
            fetch(facts, config)


@pytest.mark.parametrize(
    ("name", "repo", "message"),
    [
        ("medsiglip", Repo({}, gated=True), r"medsiglip: google/medsiglip-448 is gated.*HTTP 401.*accept the terms at"),
        ("plip", None, r"plip: the Hub has no repository 'vinid/plip'.*HTTP 404.*check the name"),
        ("plip", Repo({}, commit="f" * 40), r"plip: vinid/plip has no revision '67ade53.*name a commit"),
        ("plip", Repo({"a.bin": b""}, commit="67ade53ddd32195868f422585f72698ef5d15094"),
         r"plip: vinid/plip has no file pytorch_model.bin at 67ade53.*checkpoint=PATH"),
        ("plip", Repo({"pytorch_model.bin": b"x" * 4096}, commit="67ade53ddd32195868f422585f72698ef5d15094",
                      broken={"pytorch_model.bin"}), r"pytorch_model.bin could not be downloaded whole.*run the same"),
        ("plip", Repo({"pytorch_model.bin": b"<!DOCTYPE html><html>log in</html>" * 40},
                      commit="67ade53ddd32195868f422585f72698ef5d15094"), r"is no weights file \(found a web page\)"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(hub, name, repo, message, monkeypatch):
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 2)
    # It waits a second before each of its five retries.
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    source = read_model(name).source.repo
    if repo is not None:
        hub.repos[source] = repo
    with pytest.raises(CheckpointError, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_a_gate_opens_for_the_right_token_only(hub, monkeypatch):
    facts = read_model("medsiglip")
    file = File(paths=("model.safetensors",))
    content = save({"x": torch.ones(1)})
    hub.repos["google/medsiglip-448"] = Repo(
        {"model.safetensors": content}, commit=facts.source.revision, gated=True, token="right"
    )
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(CheckpointError, match="HTTP 403"):
        fetch(facts, file)
    monkeypatch.setenv("HF_TOKEN", "right")
    assert fetch(facts, file).read_bytes() == content


def test_a_file_of_a_dataset_repository_with_brackets_in_its_name(hub):
    facts = read_model("pmc-clip")
    content = save({"x": torch.ones(1)})
    hub.repos["datasets/axiong/pmc_oa"] = Repo({"image_encoder(resnet50).pth": content})
    file = next(file for file in facts.files if "resnet50" in file.paths[0])
    unpinned = facts.model_copy(update={"source": facts.source.model_copy(update={"revision": None})})
    assert fetch(unpinned, file).read_bytes() == content


def test_offline_says_that_and_how_to_get_it(hub, monkeypatch):
    from huggingface_hub import constants

    with pytest.raises(CheckpointError, match=r"not in the local cache, and nothing may be.*models pull plip"):
        load("plip", local_files_only=True)
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"not in the local cache, and nothing may be.*models pull plip"):
        load("plip")


def test_a_model_behind_a_page_says_which_page_and_what_to_do():
    with pytest.raises(CheckpointError, match=r"chexzero: .*github.com/rajpurkarlab/CheXzero.*checkpoint=PATH"):
        load("chexzero")


def test_a_plain_download_goes_on_where_it_stopped_and_is_kept(hub):
    content = bytes(range(256)) * 64
    hub.pages["weights/w.pt"] = content
    url = f"{hub.url}/weights/w.pt"
    part = Path(fetch_url(url, "w.pt", "x"))
    part.rename(part.with_name("w.pt.part"))
    with part.with_name("w.pt.part").open("r+b") as file:
        file.truncate(1000)
    assert fetch_url(url, "w.pt", "x").read_bytes() == content
    seen = len(hub.requests)
    fetch_url(url, "w.pt", "x")
    assert len(hub.requests) == seen
    part.rename(part.with_name("w.pt.part"))  # killed between the last byte and the rename
    assert fetch_url(url, "w.pt", "x").read_bytes() == content
    with pytest.raises(CheckpointError, match=r"w2\.pt came with 16,384 of 99 bytes"):
        fetch_url(url, "w2.pt", "x", expected=99)
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        fetch_url(f"{hub.url}/nothing", "w3.pt", "x")


def tiny_biomedclip():
    """BiomedCLIP's facts with a BERT and a timm ViT of a few weights."""
    facts = read_model("biomedclip")
    config = json.loads(json.dumps(facts.architecture.config))
    config["embed_dim"] = 16
    config["vision_cfg"]["timm_model_name"] = "test_vit"
    config["vision_cfg"]["image_size"] = 160
    text = {**facts.architecture.text_config, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 64, "vocab_size": 40}  # fmt: skip
    architecture = facts.architecture.model_copy(update={"config": config, "text_config": text})
    files = tuple(
        file.model_copy(update={"size": None, "sha256": None}) for file in facts.files if file.role != "config"
    )
    steps = tuple(step.model_copy(update={"size": 160}) if step.size else step for step in facts.preprocess.steps)
    preprocess = facts.preprocess.model_copy(update={"steps": steps})
    return facts.model_copy(update={"architecture": architecture, "files": files, "preprocess": preprocess})


VOCABULARY = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "chest", "x", "-", "ray", "of", "lung",
                        *(f"[unused{i}]" for i in range(28))])  # fmt: skip


def test_pull_makes_a_model_loadable_with_no_request_at_all(hub, monkeypatch):
    from huggingface_hub import constants

    from biomedclip.models.build import build_architecture

    facts = tiny_biomedclip()
    torch.manual_seed(0)
    weights = build_architecture(facts.architecture).state_dict()
    weights["text.transformer.embeddings.position_ids"] = torch.arange(512)[None]
    buffer = pickle_bytes(weights)
    hub.repos[REPO] = Repo(
        {"open_clip_pytorch_model.bin": buffer, "vocab.txt": VOCABULARY.encode()}, commit=facts.source.revision
    )
    model, _, tokenizer = assemble(released_parts(facts))
    report = model.load_report
    assert report.dropped == ("text.transformer.embeddings.position_ids",)
    assert tokenizer(["a chest x-ray"])[0, :7].tolist() == [2, 5, 6, 7, 8, 9, 3]
    seen = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again, _, _ = assemble(released_parts(facts, local_files_only=True))
    assert len(hub.requests) == seen
    for first, second in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)


def pickle_bytes(value):
    import io

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_the_commands_pull_and_verify_say_what_they_found(hub, tmp_path):
    from biomedclip.models.build import build_architecture

    facts = read_model("flair")
    run = CliRunner().invoke
    hub.repos[facts.source.repo] = Repo({}, commit=facts.source.revision)
    assert isinstance(run(cli.app, ["models", "pull", "flair"]).exception, CheckpointError)
    bad = tmp_path / "model.safetensors"
    bad.write_bytes(save({"x": torch.ones(1)}))
    (tmp_path / "vocab.txt").write_text(VOCABULARY)
    done = run(cli.app, ["models", "verify", str(bad), "--model", "flair", "--offline"])
    assert done.exit_code == 2
    assert "not pinned sha256" in " ".join(done.output.split()) or "FAILED" in done.output
    assert "FAILED" in done.output
    tiny_facts = tiny_biomedclip()
    weights = build_architecture(tiny_facts.architecture).state_dict()
    torch.save({**weights, "more": torch.ones(2)}, tmp_path / "w.bin")
    parts = released_parts(tiny_facts, checkpoint=tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match=r"w.bin: does not fit biomedclip.*1 keys are unknown.*unknown more"):
        assemble(parts)


class Trap:
    """Runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_does_not_run_and_is_named(tmp_path, legacy):
    path = tmp_path / "pathgenclip.pt"
    if legacy:
        path.write_bytes(pickle.dumps({"state_dict": Trap(tmp_path / "ran")}))
    else:
        torch.save({"state_dict": Trap(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError, match=r"pathgenclip.pt: is a pickle of more than tensors and was not opened"):
        load("pathgen-clip", checkpoint=path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is no weights file \(found 0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid", r"a Git LFS pointer\); fetch the file itself"),
        (b"hello there, this is text", r"first bytes 68656c6c"),
        (b"PK\x03\x04 cut", "is a cut short or broken PyTorch file"),
        ((2**20).to_bytes(8, "little") + b'{"x":', "broken or cut short safetensors"),
    ],
)
def test_a_file_that_is_no_checkpoint_says_what_it_is(tmp_path, content, message):
    path = tmp_path / "pathgenclip.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load(path)
    with pytest.raises(CheckpointError, match="there is no such file"):
        load("pathgen-clip", checkpoint=tmp_path / "no.pt")


def test_a_bare_file_of_an_unknown_model_asks_for_its_name(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"nothing beside it says of which model .*name it: load\("):
        load(path)


@pytest.mark.slow
def test_open_clip_and_biomedclip_read_one_endpoint_alike(tiny, tmp_path):
    """In a process of its own, with nothing but the environment set."""
    script = (
        "import torch, open_clip, biomedclip\n"
        "m, _, t = biomedclip.load('someone/tiny')\n"
        "n, _ = open_clip.create_model_from_pretrained('hf-hub:someone/tiny')\n"
        "x = torch.rand(2, 3, 32, 32)\n"
        "assert torch.equal(m.encode_image(x), n.eval().encode_image(x))\n"
        "ids = open_clip.get_tokenizer('hf-hub:someone/tiny')(['a chest x-ray'])\n"
        "assert torch.equal(ids, t(['a chest x-ray']))\n"
        "print('equal')"
    )
    with serve({"someone/tiny": Repo({path.name: path for path in tiny.iterdir()})}) as server:
        env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "PATH": "/usr/bin:/bin",
               "HOME": str(tmp_path), "OMP_WAIT_POLICY": "PASSIVE"}  # fmt: skip
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
