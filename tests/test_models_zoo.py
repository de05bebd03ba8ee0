"""Zoo models of open_clip's, CLIP's and SigLIP's towers at small size: equal to open_clip and transformers, key by key.

Each small checkpoint is written in the published form (names, wrapper, prefix, numpy numbers in the pickle) by the
other library or by hand, never by our key rules.
"""

from __future__ import annotations

import argparse
import copy
import json
import re

import numpy as np
import open_clip
import pytest
import torch
from checkpoint_layouts import read_layout
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from biomedclip.errors import CheckpointError, ConfigError, DataError
from biomedclip.models.build import assemble
from biomedclip.models.catalog import list_names, plain_facts
from biomedclip.models.load import find_origin, released_parts
from biomedclip.models.preprocess import ImageTransform, open_clip_config, transform_from_open_clip
from biomedclip.models.zoo import find_model, read_model, read_zoo, require_model

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IN_MEAN, IN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPEN_CLIP_NAMES = (
    "openai-vit-b-32", "openai-vit-b-16", "openai-vit-l-14", "quiltnet-b-32", "quiltnet-b-16", "pathgen-clip",
    "pathgen-clip-l", "pathclip", "bmca-clip-cf", "pubmedclip-original", "monet-original", "chexzero", "fetalclip",
    "pmc-vit-l-14", "dermlip-vit-b-16",
)  # fmt: skip
HF_NAMES = ("plip", "pubmedclip", "monet")
UNIMED_NAMES = ("unimed-clip-b16", "unimed-clip-l14", "unimed-clip-l14-large-text")
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "chest",
    "x",
    "-",
    "\u2028",
    "ray",
    "\x85",
    "of",
    "lung",
    "##s",
]  # published vocabularies hold such signs: a line ends at \\n alone
QUICK = {"openai-vit-b-32", "openai-vit-b-16", "openai-vit-l-14", "pubmedclip", "pubmedclip-original", "plip", "monet",
         "monet-original", "chexzero", *UNIMED_NAMES}  # fmt: skip


def shrink(name):
    """A model's facts with towers of a few weights, everything else as published."""
    facts = read_model(name)
    config = copy.deepcopy(facts.architecture.config)
    config["embed_dim"] = 16
    if "layers" in config["vision_cfg"]:
        config["vision_cfg"].update(layers=2, width=32, head_width=16, image_size=32, patch_size=16)
    text_config = facts.architecture.text_config
    if text_config is None:
        config["text_cfg"].update(width=16, heads=2, layers=2)
    else:
        text_config = {**text_config, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "intermediate_size": 48, "vocab_size": len(WORDS)}  # fmt: skip
    architecture = facts.architecture.model_copy(update={"config": config, "text_config": text_config})
    return facts.model_copy(update={"architecture": architecture})


def load_small(facts, path):
    return assemble(released_parts(facts, checkpoint=path, local_files_only=True))


def write_file(facts, tensors, folder):
    """The tensors in the form the published file of this model has."""
    layout = read_layout(facts.name)[0]
    path = folder / layout.path
    prefix = "module." if next(iter(layout.keys)).startswith("module.") else ""
    tensors = {prefix + key: tensor for key, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)
    elif layout.wrapper:
        numbers = {"lr": np.float64(1e-4)} if facts.keys.safe_globals else {"lr": 1e-4}
        torch.save({"epoch": 1, layout.wrapper: tensors, "optimizer": numbers}, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("name", OPEN_CLIP_NAMES)
def test_open_clip_s_names_give_open_clip_s_outputs(name, tmp_path):
    facts = shrink(name)
    config = {**facts.architecture.config, "quick_gelu": name in QUICK}
    torch.manual_seed(1)
    theirs = open_clip.CLIP(**config).eval()
    published = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    model, _, tokenizer = load_small(facts, write_file(facts, published, tmp_path))
    images, tokens = torch.rand(2, 3, 32, 32), tokenizer(["a chest x-ray", "lung"])
    assert tokens.shape == (2, facts.tokenizer.context)
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), theirs.encode_image(images))
        assert torch.equal(model.encode_text(tokens), theirs.encode_text(tokens))
        assert torch.equal(model.logit_scale, theirs.logit_scale)
    report = model.load_report
    assert not report.missing
    assert not report.extra


@pytest.mark.parametrize("name", HF_NAMES)
def test_transformers_clip_gives_transformers_outputs(name, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    facts = shrink(name)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "quick_gelu", "projection_dim": 16}
    text = {**sizes, "hidden_size": 16, "intermediate_size": 64, "vocab_size": 49408, "eos_token_id": 49407}
    vision = {**sizes, "hidden_size": 32, "intermediate_size": 128, "image_size": 32, "patch_size": 16}
    torch.manual_seed(1)
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    # As files of before transformers 4.31 have them.
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None],
                 "vision_model.embeddings.position_ids": torch.arange(5)[None]}  # fmt: skip
    path = tmp_path / "pytorch_model.bin"
    torch.save({**theirs.state_dict(), **positions}, path)
    model, _, tokenizer = load_small(facts, path)
    images, tokens = torch.rand(2, 3, 32, 32), tokenizer(["a chest x-ray", "lung"])
    with torch.no_grad():
        image = theirs.get_image_features(pixel_values=images).pooler_output
        sentence = theirs.get_text_features(input_ids=tokens).pooler_output
        torch.testing.assert_close(model.encode_image(images), image, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.encode_text(tokens), sentence, rtol=1e-5, atol=1e-5)
    assert set(model.load_report.dropped) == set(positions)


@pytest.fixture
def vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return tmp_path


@pytest.mark.parametrize("name", UNIMED_NAMES)
def test_unimed_s_own_names_and_numpy_pickle_give_open_clip_s_outputs(name, vocabulary):
    facts = shrink(name)
    (vocabulary / "bert").mkdir()
    (vocabulary / "bert" / "config.json").write_text(json.dumps(facts.architecture.text_config))
    config = copy.deepcopy(facts.architecture.config)
    config["text_cfg"] |= {"hf_model_name": str(vocabulary / "bert"), "hf_model_pretrained": False}
    torch.manual_seed(1)
    theirs = open_clip.CustomTextCLIP(**config, quick_gelu=True).eval()
    published = {re.sub("^text.", "text_encoder.", key): tensor for key, tensor in theirs.state_dict().items()}
    published["text_encoder.transformer.embeddings.position_ids"] = torch.arange(512)[None]
    model, _, tokenizer = load_small(facts, write_file(facts, published, vocabulary))
    images, tokens = torch.rand(2, 3, 32, 32), tokenizer(["a chest x-ray", "lungs of a of a"])
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), theirs.encode_image(images))
        torch.testing.assert_close(model.encode_text(tokens), theirs.encode_text(tokens), rtol=1e-5, atol=1e-6)


def test_a_numpy_pickle_of_a_model_that_does_not_allow_it_is_refused(tmp_path):
    facts = shrink("pathgen-clip")
    torch.save({"state_dict": {"x": torch.ones(1)}, "lr": np.float64(1.0)}, tmp_path / "pathgenclip.pt")
    with pytest.raises(CheckpointError, match=r"more than tensors.*numpy"):
        load_small(facts, tmp_path / "pathgenclip.pt")


def test_a_pickle_with_more_is_opened_only_where_the_caller_trusts_it(tmp_path):
    facts = shrink("pathgen-clip")
    torch.manual_seed(1)
    theirs = open_clip.CLIP(**facts.architecture.config)
    path = tmp_path / "pathgenclip.pt"
    torch.save({"state_dict": theirs.state_dict(), "args": argparse.Namespace(lr=1.0)}, path)
    with pytest.raises(CheckpointError, match=r"it names argparse.Namespace\); .*trust_pickle=True"):
        load_small(facts, path)
    model = assemble(released_parts(facts, checkpoint=path), trust_pickle=True)[0]
    assert torch.equal(model.ln_final.weight, theirs.ln_final.weight)


def test_the_file_of_another_model_is_told_by_its_keys_or_shapes(tmp_path):
    facts = shrink("pathgen-clip")
    torch.manual_seed(1)
    whole = open_clip.CLIP(**facts.architecture.config).state_dict()
    path = tmp_path / "pathgenclip.pt"
    torch.save(whole, path)
    with pytest.raises(
        CheckpointError, match=r"pathgenclip.pt: has no key for the rule 'concat.*OpenAI's or open_clip's"
    ):
        load_small(shrink("plip"), path)
    torch.save(
        {key: tensor for key, tensor in whole.items() if key != "ln_final.bias"} | {"extra": torch.ones(1)}, path
    )
    with pytest.raises(
        CheckpointError, match=r"1 keys are missing, 1 keys are unknown \(found no ln_final.bias; unknown"
    ):
        load_small(facts, path)
    torch.save({**whole, "visual.proj": torch.ones(3, 3)}, path)
    with pytest.raises(
        CheckpointError, match=r"1 keys have another shape \(found visual.proj is \(3, 3\), not \(32, 16"
    ):
        load_small(facts, path)


def test_dtype_and_training_s_view_of_a_released_model(tmp_path):
    facts = shrink("pathgen-clip")
    torch.manual_seed(1)
    path = write_file(facts, open_clip.CLIP(**facts.architecture.config).half().state_dict(), tmp_path)
    model = load_small(facts, path)[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "half weights run as the model's own type"
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training
    half = assemble(released_parts(facts, checkpoint=path), dtype=torch.bfloat16)[0]
    assert half.visual.proj.dtype == torch.bfloat16
    origin = find_origin("unimed-clip-b16")
    assert origin.model_cfg["quick_gelu"] is True
    assert origin.model_cfg["text_cfg"]["hf_proj_type"] == "mlp"
    with pytest.raises(CheckpointError, match="has towers that open_clip cannot express"):
        find_origin("medsiglip")


def test_weights_mapped_from_a_file_can_be_trained_and_the_file_stays(tmp_path):
    facts = shrink("pathgen-clip")
    torch.manual_seed(1)
    path = write_file(facts, open_clip.CLIP(**facts.architecture.config).state_dict(), tmp_path)
    before = path.read_bytes()
    model, _, tokenizer = load_small(facts, path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = (model.encode_image(torch.rand(2, 3, 32, 32)) * model.encode_text(tokenizer(["a", "b"]))).sum()
    loss.backward()
    optimizer.step()
    assert path.read_bytes() == before
    assert not torch.equal(model.ln_final.weight, torch.load(path)["ln_final.weight"])


def small_medsiglip(folder):
    """MedSigLIP's facts with small towers, transformers' model of the same, and the folder with its files."""
    from transformers import SiglipConfig, SiglipModel

    facts = read_model("medsiglip")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 64, "projection_size": 32}
    torch.manual_seed(1)
    ids = {"bos_token_id": None, "eos_token_id": None}
    theirs = SiglipModel(SiglipConfig(text_config={**text, **ids}, vision_config=vision)).eval()
    with torch.no_grad():
        theirs.logit_scale.fill_(3.0)
        theirs.logit_bias.fill_(-9.0)
    save_file(theirs.state_dict(), folder / "model.safetensors")
    write_siglip_tokenizer(folder / "tokenizer.json")
    architecture = facts.architecture.model_copy(update={"config": {"vision": vision, "text": text}})
    return facts.model_copy(update={"architecture": architecture}), theirs


def test_medsiglip_gives_transformers_outputs_and_its_text_is_always_padded(tmp_path):
    small, theirs = small_medsiglip(tmp_path)
    model, _, tokenizer = load_small(small, tmp_path / "model.safetensors")
    images, tokens = torch.rand(2, 3, 28, 28), tokenizer(["a lung", "a b c d e f"])
    assert tokens.shape == (2, 64)
    with torch.no_grad():
        output = theirs(input_ids=tokens, pixel_values=images)
        image, sentence = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(image, output.image_embeds, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sentence, output.text_embeds, rtol=1e-5, atol=1e-6)
        logits = model.logit_scale.exp() * image @ sentence.T + model.logit_bias
        torch.testing.assert_close(logits, output.logits_per_image, rtol=1e-4, atol=1e-4)
    assert small.scoring.kind == "sigmoid"


def write_siglip_tokenizer(path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = [f"▁{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [("<unk>", -10.0), ("<pad>", 0.0), ("</s>", 0.0), *((word, -1.0) for word in [*letters, "▁lung"])]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.save(str(path))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>",
            "unk_token": "<unk>"}  # fmt: skip
    (path.parent / "tokenizer_config.json").write_text(json.dumps(said))


@pytest.mark.parametrize("name", [*OPEN_CLIP_NAMES, *HF_NAMES])
def test_the_activation_is_the_stated_one(name):
    parts = released_parts(shrink(name), random_init=True)
    kinds = {type(module) for module in assemble(parts)[0].modules()}
    assert (QuickGELU in kinds) == (name in QUICK)


# --- preprocessing: the authors' pipelines, written with torchvision or numpy


def picture(mode="RGB", size=(317, 251)):
    rng = np.random.default_rng(5)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    return image.resize((40, 40)).resize(size, Image.Resampling.BICUBIC).convert(mode)


def open_clip_pipeline(size, mean=CLIP_MEAN, std=CLIP_STD):
    bicubic = InterpolationMode.BICUBIC
    rgb = T.Lambda(lambda image: image.convert("RGB"))
    return T.Compose([T.Resize(size, bicubic), T.CenterCrop(size), rgb, T.ToTensor(), T.Normalize(mean, std)])


def hf_clip_pipeline(image):
    """transformers' CLIPImageProcessor (PIL): RGB, shorter side, crop with floored corner, rescale, normalise."""
    image = image.convert("RGB")
    width, height = image.size
    short, long = min(width, height), max(width, height)
    other = int(224 * long / short)
    image = image.resize((224, other) if width <= height else (other, 224), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    values = np.asarray(image.crop((left, top, left + 224, top + 224))).astype(np.float32) / np.float32(255)
    values = (values - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.from_numpy(values.transpose(2, 0, 1))


def chexzero_pipeline(image):
    image = image.convert("L")
    ratio = 320.0 / max(image.size)
    size = tuple(int(side * ratio) for side in image.size)
    square = Image.new("L", (320, 320))
    square.paste(image.resize(size, Image.Resampling.LANCZOS), ((320 - size[0]) // 2, (320 - size[1]) // 2))
    tensor = torch.from_numpy(np.repeat(np.asarray(square, dtype=np.float32)[None], 3, axis=0).copy())
    tensor = T.Normalize((101.48761,) * 3, (83.43944,) * 3)(tensor)
    return T.Resize(224, InterpolationMode.BICUBIC, antialias=False)(tensor)


def medsiglip_pipeline(image):
    values = np.asarray(image.convert("RGB").resize((448, 448), Image.Resampling.BICUBIC)).astype(np.float32)
    return torch.from_numpy(((values / np.float32(255) - np.float32(0.5)) / np.float32(0.5)).transpose(2, 0, 1))


AUTHORS = {
    **dict.fromkeys(("biomedclip", *(n for n in OPEN_CLIP_NAMES if n not in ("monet-original", "chexzero"))),
                    open_clip_pipeline(224)),
    **dict.fromkeys(("monet", "monet-original"), open_clip_pipeline(224, IN_MEAN, IN_STD)),
    **dict.fromkeys(("plip", "pubmedclip"), hf_clip_pipeline),
    **dict.fromkeys(("quiltnet-b-16-pmb", "unimed-clip-b16"), open_clip_pipeline(224)),
    **dict.fromkeys(("unimed-clip-l14", "unimed-clip-l14-large-text"), open_clip_pipeline(336)),
    "chexzero": chexzero_pipeline, "medsiglip": medsiglip_pipeline,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(AUTHORS))
def test_preprocessing_is_the_authors_bit_for_bit(name):
    transform = ImageTransform(read_model(name).preprocess.steps)
    for size in ((317, 251), (200, 301), (224, 224)):
        for mode in ("RGB", "L"):
            image = picture(mode, size)
            ours, authors = transform(image), AUTHORS[name](image)
            assert ours.dtype == torch.float32
            assert torch.equal(ours, authors), f"{size} {mode}: off by {(ours - authors).abs().max()}"


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("image_mode", ["RGB", "L", "P", "RGBA", "1"])
def test_open_clip_s_own_transform_is_met_in_every_mode(mode, image_mode):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = {"size": (48, 48), "mean": IN_MEAN, "std": IN_STD, "interpolation": "bilinear", "resize_mode": mode,
              "fill_color": 7}  # fmt: skip
    image = picture(image_mode, (75, 52))
    if mode == "longest" and image_mode in ("P", "RGBA"):
        pytest.skip("open_clip pads a palette with an index and an alpha with its fill")
    theirs = image_transform_v2(PreprocessCfg(**config), is_train=False)(image)
    ours = transform_from_open_clip(config)
    assert torch.equal(ours(image), theirs)
    assert open_clip_config(ours) == {**config, "mode": "RGB"} | ({"fill_color": 0} if mode == "squash" else {})


@pytest.mark.parametrize("deep", [Image.new("I;16", (40, 40), 4000), Image.new("I", (40, 40), 4000),
                                  Image.new("F", (40, 40), 0.5), np.zeros((40, 40), dtype=np.uint16)])  # fmt: skip
def test_more_than_8_bits_need_a_window(deep):
    transform = ImageTransform(read_model("biomedclip").preprocess.steps)
    with pytest.raises(DataError, match=r"more than 8 bits and no window.*window=\(centre, width\)"):
        transform(deep)
    assert transform(deep, window=(2048, 4096)).shape == (3, 224, 224)
    with pytest.raises(DataError, match="has 8 bits and needs no window"):
        transform(picture(), window=(2048, 4096))
    with pytest.raises(DataError, match=r"is no \(H, W\)"):
        transform(np.zeros((3, 40, 40), dtype=np.uint8))


def test_what_open_clip_has_no_words_for_is_not_given_to_it():
    inexpressible = {
        name for name in list_names() if open_clip_config(ImageTransform(read_model(name).preprocess.steps)) is None
    }
    assert {"chexzero", "medclip-vit", "flair", "biovil", "biovil-t"} <= inexpressible
    assert not {"biomedclip", "plip", "unimed-clip-l14", "monet"} & inexpressible


# --- tokenisation


def test_wordpiece_ids_are_transformers_and_do_not_depend_on_the_batch(vocabulary):
    from transformers import BertTokenizer

    facts = shrink("unimed-clip-b16")
    tokenizer = released_parts(facts, checkpoint=vocabulary, random_init=True, local_files_only=True).tokenise
    texts = ["A chest X-ray of lungs", "of " * 300, "", "naïve [SEP] CHEST", "a"]
    theirs = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}, do_lower_case=True)
    expected = theirs(texts, max_length=256, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokenizer(texts), expected)
    for index, text in enumerate(texts):
        assert torch.equal(tokenizer(text)[0], expected[index])
    assert tokenizer(texts, context_length=9).shape == (5, 9)


def test_where_an_embedding_depends_on_its_batch_the_facts_say_how():
    for model in read_zoo():
        assert model.tokenizer.batch_invariant or model.tokenizer.exception, model.name


def test_a_missing_or_wrong_companion_is_named(tmp_path):
    facts = shrink("unimed-clip-b16")
    with pytest.raises(CheckpointError, match=r"unimed-clip-b16: microsoft/BiomedNLP.*vocab.txt.*models pull"):
        released_parts(facts, random_init=True, local_files_only=True)
    (tmp_path / "vocab.txt").write_text("not a vocabulary")
    with pytest.raises(CheckpointError, match=r"vocab.txt: is no WordPiece vocabulary: it lacks \[PAD\]"):
        released_parts(facts, checkpoint=tmp_path, random_init=True)


# --- the zoo itself


def test_the_plain_reader_and_the_schema_read_the_same():
    for model in read_zoo():
        plain = plain_facts(model.name)
        assert (plain["name"], plain["licence"]["id"]) == (model.name, model.licence.id)
        assert tuple(plain["domains"]) == model.domains
        assert plain["source"].get("repo") == model.source.repo
        assert bool(plain["source"].get("gated")) == model.source.gated


def test_names_aliases_and_hub_ids_are_one_model_each():
    seen = {}
    for model in read_zoo():
        own = {model.name, *model.aliases}
        own |= {model.source.repo} if model.source.repo else set()
        for name in own:
            # Several files of one repository are several models; its id then means the first by name.
            if name in seen and name == model.source.repo:
                continue
            assert name not in seen, f"{name}: {seen.get(name)} and {model.name}"
            seen[name] = model.name
            assert find_model(name).name == model.name
    assert find_model("hf-hub:vinid/plip").name == "plip"
    assert find_model("someone/else") is None
    with pytest.raises(ConfigError, match="did you mean 'biomedclip'"):
        require_model("biomedclap")


def test_nothing_unknown_is_claimed():
    for model in read_zoo():
        if model.source.kind == "bundled":
            continue  # its weights are here: tests/test_mini.py
        assert model.status != "weights-tested", "no published weights were ever loaded here"
        assert any("No published weights were loaded" in line for line in model.unverified), model.name
        if model.source.kind.startswith("hub") and model.source.revision is None:
            assert any("evision" in line for line in model.unverified), f"{model.name} does not say its revision floats"
