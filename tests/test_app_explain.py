"""Explanations: a map lies where the evidence is, on the user's picture, and a map that means nothing says so."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_patches import PATCH_TOWERS, draw_patches, patch_model, random_copy
from test_towers import CASES, small_config
from tiny_model import write_tiny_model
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from biomedclip import cli
from biomedclip.app.evidence import find_evidence, list_blocks, record_attention
from biomedclip.app.explain import check_by_deletion, explain_picture
from biomedclip.errors import BiomedclipError, ConfigError
from biomedclip.models.build import build_architecture, parameters_on_meta, quiet
from biomedclip.models.geometry import place_input
from biomedclip.models.load import load
from biomedclip.models.preprocess import ImageTransform
from biomedclip.models.zoo import Architecture, read_model, read_zoo

TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}


def open_clip_tower(**vision) -> Architecture:
    config = {"embed_dim": 16, "custom_text": True, "vision_cfg": vision, "text_cfg": TEXT}
    return Architecture(activation="gelu", config=config)


def timm_tower(name: str, size: int = 64) -> Architecture:
    return open_clip_tower(timm_model_name=name, timm_pool="avg" if "vit" not in name else "", image_size=size)


def own_tower(name: str, config: dict | None = None) -> Architecture:
    config = config or small_config(name, **CASES[name][2])
    return read_model(name).architecture.model_copy(update={"config": config})


TOWERS = {
    "open_clip ViT": (open_clip_tower(**VIT), 32, "attention"),
    "open_clip ViT, mean": (open_clip_tower(**VIT, pool_type="avg"), 32, "attention"),
    "open_clip ViT, pooled": (open_clip_tower(**VIT, attentional_pool=True, attn_pooler_heads=2), 32, "attention"),
    "open_clip ResNet": (open_clip_tower(image_size=64, layers=[1, 1, 1, 1], width=8), 64, "LayerCAM"),
    "timm ViT": (timm_tower("test_vit", 160), 160, "attention"),
    "timm EfficientNet": (timm_tower("test_efficientnet"), 64, "LayerCAM"),
    "timm ConvNeXt": (timm_tower("test_convnext"), 64, "LayerCAM"),
    "keep": (own_tower("keep"), 32, "attention"),
    "retizero": (own_tower("retizero"), 32, "attention"),
    "flair": (own_tower("flair"), 64, "LayerCAM"),
    "biovil": (own_tower("biovil"), 64, "LayerCAM"),
    "biovil-t": (own_tower("biovil-t"), 64, "LayerCAM"),
    "medclip-vit": (own_tower("medclip-vit"), 224, "LayerCAM"),
    "cxr-clip-swin-mcc": (own_tower("cxr-clip-swin-mcc"), 224, "LayerCAM"),
    "conch": (
        own_tower("conch", {
            "embed_dim": 16,
            "vision": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 4, "pooler_heads": 2},
            "text": {"context": 9, "vocab_size": 60, "width": 32, "layers": 1, "heads": 4},
        }), 32, "attention",
    ),
    "musk": (
        own_tower("musk", {
            "width": 32, "layers": 2, "heads": 4, "image_size": 32, "patch_size": 8, "vocab_size": 60, "positions": 30,
            "context": 9,
        }), 32, "attention",
    ),
    "medsiglip": (
        own_tower("medsiglip", {
            "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "image_size": 32, "patch_size": 8},
            "text": {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                     "num_attention_heads": 4, "max_position_embeddings": 8, "projection_size": 32},
        }), 32, "attention",
    ),
}  # fmt: skip
"""Every kind of image tower in the zoo, small, with the method that must explain it."""


def build(name: str) -> nn.Module:
    torch.manual_seed(3)
    with quiet():
        return build_architecture(TOWERS[name][0]).eval()


def cosine_with(model: nn.Module, towards: torch.Tensor):
    return lambda images: F.normalize(model.encode_image(images), dim=-1) @ towards


@pytest.mark.parametrize("name", TOWERS)
def test_every_kind_of_tower_has_a_map_and_keeps_its_weights(name):
    model, size = build(name), TOWERS[name][1]
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    before = {key: value.clone() for key, value in model.visual.state_dict().items()}
    with torch.no_grad():
        embedding = model.encode_image(pixels)
    # Towards the picture's own embedding and away from another's: something must speak for it.
    other = F.normalize(torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(1)), dim=0)
    heat, method = find_evidence(model, cosine_with(model, F.normalize(embedding[0], dim=0) + other), pixels)
    assert TOWERS[name][2] in method
    assert heat.shape == (size, size)
    assert heat.min() >= 0
    assert heat.max() == pytest.approx(1)
    assert heat.std() > 1e-3, "a map that is the same everywhere"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.visual.state_dict().items())
    again, _ = find_evidence(model, cosine_with(model, F.normalize(embedding[0], dim=0) + other), pixels)
    torch.testing.assert_close(heat, again)


@pytest.mark.slow
def test_the_towers_of_the_zoo_at_full_size_have_known_blocks():
    for architecture in {str(image_config(facts)): facts.architecture for facts in read_zoo()}.values():
        with quiet(), parameters_on_meta():
            visual = build_architecture(architecture).visual
        assert len(list_blocks(visual)) >= 4, architecture


def image_config(facts) -> object:
    config = facts.architecture.config
    return config.get("vision_cfg") or config.get("vision") or config


def test_the_small_towers_stand_for_all_of_the_zoo():
    def kind(architecture: Architecture) -> tuple[str, str]:
        config = architecture.config
        vision = config.get("vision_cfg") or config.get("vision") or {}
        trunk = str(vision.get("timm_model_name") or vision.get("trunk") or "")
        family = next((name for name in ("convnext", "efficientnet", "swin", "vit", "resnet") if name in trunk), "own")
        # CLIP's ResNet is the same module whichever of the two builders asks for it.
        return ("open_clip" if trunk == "clip_resnet" else architecture.builder), family

    small = {kind(architecture) for architecture, _, _ in TOWERS.values()} | {("open_clip", "resnet")}
    assert {facts.name for facts in read_zoo() if kind(facts.architecture) not in small} == set()


@pytest.mark.parametrize("name", [name for name in TOWERS if TOWERS[name][2] == "attention"])
def test_attention_by_its_definition_gives_the_same_embedding(name):
    model, size = build(name), TOWERS[name][1]
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fused = model.encode_image(pixels)
        with record_attention() as maps:
            torch.testing.assert_close(model.encode_image(pixels), fused, rtol=1e-4, atol=1e-5)
    assert len(maps) >= 2
    for weights in maps:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


class RedDetector(nn.Module):
    """Four stages in the manner of a ResNet whose embedding is (red, one) by construction."""

    def __init__(self) -> None:
        super().__init__()
        red = nn.Conv2d(3, 1, 1)
        with torch.no_grad():
            red.weight[:] = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1)
            red.bias[:] = 0.0
        self.layer1 = nn.Sequential(red, nn.ReLU())
        self.layer2, self.layer3, self.layer4 = nn.AvgPool2d(4), nn.AvgPool2d(2), nn.AvgPool2d(2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.layer4(self.layer3(self.layer2(self.layer1(images)))).mean(dim=(1, 2, 3))
        return torch.stack([found, torch.full_like(found, 0.05)], dim=1)


class Wrapped(nn.Module):
    """A model of one tower, which `encode_image` calls."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images)


class Unknown(nn.Module):
    """A tower without any block that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = RedDetector()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.inner(images)


@pytest.mark.parametrize(("tower", "method"), [(RedDetector, "LayerCAM"), (Unknown, "occlusion")])
def test_a_planted_patch_is_found_where_the_tower_is_known_to_look_for_it(tower, method):
    model = Wrapped(tower())
    pictures = draw_patches(12, 64, seed=5)
    for picture in pictures:
        towards = torch.tensor([1.0, 0.0])
        heat, said = find_evidence(model, cosine_with(model, towards), picture.red[None])
        assert method in said
        assert picture.holds_peak(heat)
        assert check_by_deletion(cosine_with(model, towards), picture.red[None], heat).holds


@pytest.mark.slow
@pytest.mark.parametrize("name", PATCH_TOWERS)
def test_a_planted_patch_is_found_by_a_trained_tower_and_not_by_a_random_one(name):
    model, texts = patch_model(name)
    size = PATCH_TOWERS[name].size
    pictures = draw_patches(40, size, seed=9)
    found, held, chosen, chosen_by_chance = 0, 0, 0, 0
    for number, picture in enumerate(pictures):
        asked, other = (texts[0], texts[1]) if number % 2 else (texts[1], texts[0])
        pixels = picture.red if number % 2 else picture.green
        heat, _ = find_evidence(model, cosine_with(model, asked), pixels[None])
        found += picture.holds_peak(heat)
        held += check_by_deletion(cosine_with(model, asked), pixels[None], heat).holds
        # Of two squares that stand out alike, only what was learnt tells which one is asked for.
        heat, _ = find_evidence(model, cosine_with(model, asked - other), picture.both[None])
        chosen += picture.prefers_red(heat) == bool(number % 2)
        # A stranger for each picture: random weights have a taste of their own, the same in all pictures.
        stranger = random_copy(model, seed=number)
        heat, _ = find_evidence(stranger, cosine_with(stranger, asked - other), picture.both[None])
        chosen_by_chance += picture.prefers_red(heat) == bool(number % 2)
    assert found >= 36, "the patch is found in at least 90 % of the pictures"
    assert held >= 36, "hiding the map's hottest tenth matters"
    assert chosen >= 36, "the map is another one for another label"
    # Adebayo et al. 2018: a map that stays when the weights go shows the picture and not the model. 30 of 40 heads of a
    # fair coin are 1 in 1,000.
    assert 10 <= chosen_by_chance <= 30


def test_a_model_that_others_use_meanwhile_gives_the_same_map():
    model = build("timm EfficientNet")
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    score = cosine_with(model, torch.eye(16)[0])
    alone, _ = find_evidence(model, score, pixels)

    def disturbed(images: torch.Tensor) -> torch.Tensor:
        other = threading.Thread(target=model.encode_image, args=(torch.randn(2, 3, 64, 64),))
        other.start()
        other.join()
        return score(images)

    beside, _ = find_evidence(model, disturbed, pixels)
    torch.testing.assert_close(alone, beside)


def test_a_check_tells_a_map_that_means_something_from_one_that_does_not():
    pixels = torch.zeros(1, 3, 40, 40)
    pixels[:, :, 4:16, 20:32] = 1.0

    def score(images: torch.Tensor) -> torch.Tensor:
        return images[:, :, 4:16, 20:32].mean(dim=(1, 2, 3))

    right, wrong, flat = torch.zeros(40, 40), torch.zeros(40, 40), torch.zeros(40, 40)
    right[4:16, 20:32] = 1.0
    wrong[25:37, 2:14] = 1.0
    good = check_by_deletion(score, pixels, right)
    assert good.holds
    assert good.drop > 3 * good.drop_elsewhere > 0
    assert "rests on" in good.describe()
    for heat in (wrong, flat):
        bad = check_by_deletion(score, pixels, heat)
        assert not bad.holds
        assert "do not rely" in bad.describe()
    assert check_by_deletion(score, pixels, wrong, seed=1) == check_by_deletion(score, pixels, wrong, seed=1)


TRANSFORMS = {repr(facts.preprocess.steps): facts.preprocess.steps for facts in read_zoo()}


@pytest.mark.parametrize("steps", TRANSFORMS.values(), ids=range(len(TRANSFORMS)))
@pytest.mark.parametrize("size", [(201, 333), (28, 28), (1000, 90)])
def test_what_every_preprocessing_moves_is_put_back_where_it_was(steps, size):
    """A picture whose grey is its coordinate, through the transform and back, is itself."""
    width, height = size
    transform = ImageTransform(tuple(step for step in steps if step.verb not in ("normalize", "minmax")))
    placement = place_input(transform, height, width)
    left, top, right, bottom = placement.seen_box()
    for axis, length in enumerate((height, width)):
        ramp = np.arange(length) / length * 200 + 30
        grey = np.broadcast_to(ramp[:, None] if axis == 0 else ramp, (height, width)).round().astype(np.uint8)
        moved = transform(Image.fromarray(grey).convert("RGB")).numpy()[0]
        assert moved.shape == placement.input_size
        back = placement.to_picture(moved * (255 if moved.max() <= 1.01 else 1))
        assert back.shape == (height, width)
        # Not at the edges, which resizing mixes with what is beside them.
        edge_y, edge_x = (2 + 2 * max(1, round(scale)) for scale in placement.scale)
        rows = slice(int(top) + edge_y, int(bottom) - edge_y)
        columns = slice(int(left) + edge_x, int(right) - edge_x)
        error = np.abs(back - grey)[rows, columns]
        # Half a pixel of the smaller grid, and half a level for each of two roundings.
        assert error.max() <= 1.0 + 200 / length * max(1.0, placement.scale[axis]) * 0.5


def test_a_centre_crop_leaves_out_the_sides_and_the_map_says_nothing_there():
    transform = ImageTransform(read_model("biomedclip").preprocess.steps)
    placement = place_input(transform, 200, 400)
    assert placement.seen_box() == (100, 0, 300, 200)
    assert placement.seen_share() == 0.5
    heat = placement.to_picture(np.ones((224, 224), np.float32))
    assert np.array_equal(heat[:, 100:300], np.ones((200, 200), np.float32))
    assert heat[:, :100].max() == heat[:, 300:].max() == 0
    assert placement.to_picture(np.ones((224, 224), np.float32), (50, 100)).sum() == 50 * 50


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(path)
    return path


def test_an_explanation_lies_on_the_user_s_picture(tiny, photograph):
    model, preprocess, tokenizer = load(tiny)
    picture = Image.open(photograph)
    found = explain_picture(model, preprocess, tokenizer, picture, " a red cell ", "a $blue$ cell 细胞")
    assert found.heat.shape == (60, 90)
    assert found.heat.dtype == np.float32
    assert found.heat[:, :14].max() == 0, "cut off by the crop"
    with torch.no_grad():
        image = model.encode_image(preprocess(picture)[None], normalize=True)
        text = model.encode_text(tokenizer(["a red cell", "a $blue$ cell 细胞"]), normalize=True)
    torch.testing.assert_close(torch.tensor([[found.cosine, found.cosine_against]]), image @ text.T)
    assert found.score == pytest.approx(found.cosine - found.cosine_against)
    assert found.overlay.mode == "RGB"
    assert found.overlay.width > 900
    assert any("67%" in line for line in found.describe())


def test_the_picture_shows_the_heat_in_colour_where_it_lies_and_darkens_what_is_cut_off(tiny):
    model, preprocess, tokenizer = load(tiny)
    found = explain_picture(model, preprocess, tokenizer, Image.new("RGB", (400, 400), "white"), "a cell")
    heat = np.zeros_like(found.input_heat)
    heat[:16, :16] = 1.0
    object.__setattr__(found, "input_heat", heat)
    drawn = np.asarray(found.overlay).astype(int)
    coloured = (drawn.max(axis=2) - drawn.min(axis=2)) > 60
    coloured[:, int(found.overlay.width * 0.9) :] = False  # the colour bar
    rows, columns = np.nonzero(coloured)
    assert len(rows) > 1000
    # The upper left quarter of the right panel, and nothing of the left one.
    assert columns.min() > found.overlay.width * 0.45
    assert columns.max() < found.overlay.width * 0.75
    assert rows.max() < found.overlay.height * 0.5


def explain(*arguments: object):
    return CliRunner().invoke(cli.app, ["explain", *map(str, arguments)])


def test_the_command_writes_a_picture_and_says_its_numbers(tiny, photograph, tmp_path):
    out = tmp_path / "why.png"
    done = explain(photograph, "--label", "a cell", "--model", tiny, "--out", out)
    assert done.exit_code == 0, done.output
    assert "Check: hiding the hottest tenth" in done.stdout
    assert "not for clinical use" in done.stdout
    Image.open(out).load()
    again = explain(photograph, "--label", "a cell", "--model", tiny, "--out", out)
    assert isinstance(again.exception, ConfigError)
    assert "exists already" in str(again.exception)
    done = explain(photograph, "--label", "a cell", "--model", tiny, "--out", out, "--overwrite", "--json")
    row = json.loads(done.stdout)
    assert row["label"] == "a cell"
    assert -1 <= row["cosine"] <= 1
    assert row["holds"] in (True, False)
    assert row["seen_share"] == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--label", " "], "label: is empty"),
        (["--label", "a", "--against", ""], "against: is empty"),
        (["--label", "a", "--against", " a "], "is the label itself"),
        (["--label", "a", "--out", "why.jpg"], "does not end in .png"),
        (["--label", "a", "--frame", "3"], "has no frame 3"),
        (["--label", "a", "--model", "no-such-model"], "is no model, folder or architecture"),
    ],
)
def test_what_cannot_be_explained_is_one_clear_line(arguments, said, tiny, photograph, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = explain(photograph, "--model", tiny, *arguments)
    assert isinstance(done.exception, BiomedclipError)
    assert said in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_picture_is_one_clear_line(tmp_path, tiny):
    text = tmp_path / "notes.jpg"
    text.write_text("not a picture")
    done = explain(text, "--label", "a", "--model", tiny, "--out", tmp_path / "why.png")
    assert isinstance(done.exception, BiomedclipError)
    assert "notes.jpg" in str(done.exception)
    folder = tmp_path / "several"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    done = explain(folder, "--label", "a", "--model", tiny, "--out", tmp_path / "why.png")
    assert "stands for several files (found 2)" in str(done.exception)
    assert not (tmp_path / "why.png").exists()
