"""Exports re-load in the other library with equal outputs; cards say what files say and refuse holes."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from hub_server import Repo
from PIL import Image
from safetensors.torch import load_file
from test_models_hub import VOCABULARY, hub, tiny_biomedclip  # noqa: F401  (a fixture)
from test_models_zoo import shrink, small_medsiglip, write_file
from tiny_model import write_tiny_model
from typer.testing import CliRunner

from biomedclip import cli
from biomedclip.errors import CheckpointError, ConfigError
from biomedclip.models.build import assemble, build_architecture
from biomedclip.models.cards import released_card
from biomedclip.models.catalog import list_names
from biomedclip.models.export import export_released
from biomedclip.models.load import load, load_parts, released_parts
from biomedclip.models.push import check_may_push
from biomedclip.models.transformers_export import export_transformers
from biomedclip.models.zoo import read_model, read_zoo

ROOT = Path(__file__).parent.parent
TEXTS = ["a chest x-ray", "of lung of a"]


def small_clip(tmp_path, name="pathgen-clip"):
    facts = shrink(name)
    torch.manual_seed(1)
    theirs = open_clip.CLIP(**facts.architecture.config, quick_gelu=facts.architecture.activation == "quick_gelu")
    path = write_file(facts, theirs.state_dict(), tmp_path)
    parts = released_parts(facts, checkpoint=path)
    return parts, assemble(parts)


def small_dual(tmp_path, facts=None):
    facts = facts or tiny_biomedclip()
    torch.manual_seed(2)
    torch.save(build_architecture(facts.architecture).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "vocab.txt").write_text(VOCABULARY)
    parts = released_parts(facts, checkpoint=tmp_path / "open_clip_pytorch_model.bin")
    return parts, assemble(parts)


def encode(loaded, size):
    model, preprocess, tokenizer = loaded
    pixels = preprocess(Image.linear_gradient("L").resize((size + 9, size + 3)))[None]
    with torch.no_grad():
        return pixels, model.encode_image(pixels, normalize=True), model.encode_text(tokenizer(TEXTS), normalize=True)


def test_a_clip_becomes_transformers_clip_with_its_processor_and_pipeline(tmp_path):
    from transformers import AutoModel, AutoProcessor, pipeline

    parts, loaded = small_clip(tmp_path)
    folder = export_transformers(loaded[0], parts, tmp_path / "hf")
    theirs = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert type(theirs).__name__ == "CLIPModel"
    # The small model sees 32 pixels; the published processor makes 224.
    pixels, tokens = torch.rand(2, 3, 32, 32), processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    model, _, tokenizer = loaded
    with torch.no_grad():
        output = theirs(pixel_values=pixels, **tokens)
        torch.testing.assert_close(output.image_embeds, model.encode_image(pixels, normalize=True), rtol=0, atol=2e-6)
        torch.testing.assert_close(
            output.text_embeds, model.encode_text(tokenizer(TEXTS), normalize=True), rtol=0, atol=2e-6
        )
    config = json.loads((folder / "preprocessor_config.json").read_text())
    config |= {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    found = classify(
        Image.linear_gradient("L").convert("RGB"), candidate_labels=["lung", "heart"], hypothesis_template="a {}"
    )
    assert {entry["label"] for entry in found} == {"lung", "heart"}
    assert sum(entry["score"] for entry in found) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["biomedclip", "unimed"])
def test_a_vit_beside_a_bert_brings_its_own_code_and_gives_equal_outputs(tmp_path, kind):
    from transformers import AutoModel, AutoProcessor, AutoTokenizer, pipeline

    facts = None
    if kind == "unimed":
        facts = shrink("unimed-clip-b16")
        text = {**facts.architecture.text_config, "vocab_size": 40}
        architecture = facts.architecture.model_copy(update={"text_config": text})
        facts = facts.model_copy(update={"architecture": architecture, "keys": tiny_biomedclip().keys})
    parts, loaded = small_dual(tmp_path, facts)
    folder = export_transformers(loaded[0], parts, tmp_path / "hf")
    theirs = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    model, _, tokenizer = loaded
    size = theirs.config.vision["image_size"]
    pixels = torch.rand(2, 3, size, size)
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = theirs(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
        torch.testing.assert_close(output.image_embeds, model.encode_image(pixels, normalize=True), rtol=0, atol=2e-6)
        torch.testing.assert_close(
            output.text_embeds, model.encode_text(tokenizer(TEXTS), normalize=True), rtol=0, atol=2e-6
        )
    processor = AutoProcessor.from_pretrained(folder)
    assert processor(images=Image.new("RGB", (300, 260)), return_tensors="pt").pixel_values.shape[-1] == (
        160 if kind == "biomedclip" else 224
    )
    config = json.loads((folder / "preprocessor_config.json").read_text())
    config |= {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    classify = pipeline("zero-shot-image-classification", model=str(folder), trust_remote_code=True)
    found = classify(
        Image.linear_gradient("L").convert("RGB"), candidate_labels=["lung", "chest"], hypothesis_template="a {}"
    )
    assert sum(entry["score"] for entry in found) == pytest.approx(1, abs=1e-5)


def test_a_siglip_becomes_transformers_siglip(tmp_path):
    from transformers import AutoModel, AutoProcessor

    facts, published = small_medsiglip(tmp_path)
    parts = released_parts(facts, checkpoint=tmp_path / "model.safetensors", local_files_only=True)
    loaded = assemble(parts)
    folder = export_transformers(loaded[0], parts, tmp_path / "hf")
    theirs = AutoModel.from_pretrained(folder).eval()
    for key, tensor in published.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], tensor), key
    processor = AutoProcessor.from_pretrained(folder)
    ids = processor.tokenizer(TEXTS, padding="max_length", max_length=64, return_tensors="pt").input_ids
    assert torch.equal(ids, loaded[2](TEXTS))


def test_what_transformers_cannot_say_is_refused_with_the_reason(tmp_path):
    parts, loaded = small_clip(tmp_path, "chexzero")
    with pytest.raises(CheckpointError, match="has image steps that no processor of transformers can do"):
        export_transformers(loaded[0], parts, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_an_export_in_open_clip_s_format_reloads_there_and_here_alike(tmp_path):
    parts, loaded = small_clip(tmp_path)
    folder = export_released(loaded[0], parts, tmp_path / "oc")
    theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    again = load(folder)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(theirs.eval().encode_image(pixels), loaded[0].encode_image(pixels))
        assert torch.equal(again[0].encode_image(pixels), loaded[0].encode_image(pixels))
    assert again[0].facts.name == "pathgen-clip"
    assert again[1] == loaded[1]


def test_an_export_with_a_bert_loads_offline_here_and_through_a_hub_in_open_clip(tmp_path, hub):  # noqa: F811
    parts, loaded = small_dual(tmp_path)
    folder = export_released(loaded[0], parts, tmp_path / "oc")
    assert {"vocab.txt", "tokenizer_config.json", "hf_text_config.json", "biomedclip_model.json"} <= {
        path.name for path in folder.iterdir()
    }
    wanted = encode(loaded, 160)
    for name in ("biomedclip_model.json", None):
        for ours, first in zip(encode(load(folder, local_files_only=True), 160), wanted, strict=True):
            assert torch.equal(ours, first)
        if name:
            (folder / name).unlink()
    assert hub.requests == []
    companion = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
    hub.repos[companion] = Repo({"config.json": (folder / "hf_text_config.json").read_bytes()})
    theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert torch.equal(ids, loaded[2](TEXTS))
    with torch.no_grad():
        assert torch.equal(theirs.eval().encode_text(ids, normalize=True), wanted[2])


def test_a_model_open_clip_cannot_express_keeps_its_facts_beside_its_weights(tmp_path):
    parts, loaded = small_clip(tmp_path, "chexzero")
    folder = export_released(loaded[0], parts, tmp_path / "out")
    assert not (folder / "open_clip_config.json").exists()
    again = load(folder)
    assert again[1] == loaded[1]
    assert again[0].facts.scoring.kind == "pairs"
    assert set(load_file(folder / "model.safetensors")) == set(loaded[0].state_dict())


def test_convert_and_export_work_from_the_command_line(tmp_path):
    tiny = write_tiny_model(tmp_path / "tiny")
    run = CliRunner().invoke
    done = run(cli.app, ["models", "export", str(tiny), "--format", "transformers", "--out", str(tmp_path / "hf")])
    assert done.exit_code == 0, done.exception
    from transformers import CLIPModel

    assert CLIPModel.from_pretrained(tmp_path / "hf").config.projection_dim == 16
    again, preprocess, _ = load(tmp_path / "hf")
    first = load(tiny)[0]
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again.encode_image(pixels), first.encode_image(pixels), rtol=1e-5, atol=1e-6)
    assert "half" in repr(preprocess) or "0.5" in repr(preprocess)
    done = run(cli.app, ["models", "verify", str(tiny)])
    assert done.exit_code == 0
    assert "tensors fit" in done.output


def test_pushing_asks_the_licence_first(tmp_path):
    facts = read_model("pathgen-clip")
    parts, _ = small_clip(tmp_path)
    with pytest.raises(ConfigError, match=r"pathgen-clip: may not be pushed.*--private"):
        check_may_push(parts, private=False)
    check_may_push(parts, private=True)
    mit = facts.model_copy(update={"licence": read_model("biomedclip").licence})
    parts.facts = mit
    check_may_push(parts, private=False)


def test_an_export_is_pushed_in_one_commit(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, repo, *, private, exist_ok):
            calls.append((repo, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            return huggingface_hub.CommitInfo(
                commit_url="https://huggingface.co/me/x/commit/1", commit_message="m", commit_description="", oid="1"
            )

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    tiny = write_tiny_model(tmp_path / "tiny")
    arguments = ["models", "export", str(tiny), "--format", "open_clip", "--out", str(tmp_path / "oc")]
    done = CliRunner().invoke(cli.app, [*arguments, "--push", "me/x", "--private"])
    assert done.output.splitlines()[-1] == "https://huggingface.co/me/x/commit/1"
    assert calls == [("me/x", True, True), ("me/x", ["open_clip_config.json", "open_clip_model.safetensors"])]


def test_a_push_without_a_token_says_how_to_log_in(tmp_path):
    from biomedclip.models.push import push_folder

    with pytest.raises(CheckpointError, match=r"me/x: could not be written.*hf auth login"):
        push_folder(tmp_path, "me/x", private=True)
    with pytest.raises(CheckpointError, match="is no name of a Hub repository"):
        push_folder(tmp_path, "a/b/c", private=True)


@pytest.mark.parametrize("name", list_names())
def test_the_card_of_every_zoo_model_is_its_facts(name):
    path = ROOT / "model_cards" / f"{name}.md"
    assert path.exists(), f"run: biomedclip models card {name} --out model_cards/{name}.md"
    text = path.read_text(encoding="utf-8")
    assert text == released_card(read_model(name)), f"run: biomedclip models card {name} --out model_cards/{name}.md"
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == read_model(name).licence.id
    assert "not a medical device" in text


def test_there_is_no_card_without_a_model():
    assert {path.stem for path in (ROOT / "model_cards").glob("*.md")} == set(list_names())


def test_the_table_of_models_is_current():
    from tables import models_page

    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert text == models_page(text), "run: .venv/bin/python tests/tables.py"
    for model in read_zoo():
        assert f"[{model.name}](../model_cards/{model.name}.md)" in text


def test_a_model_of_open_clip_without_weights_is_not_exported():
    with pytest.raises(CheckpointError, match="without weights"):
        load_parts("ViT-B-32")
