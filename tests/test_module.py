"""A training step: gradients of parts against whole batches, towers locked, thinned and shrunk, groups of rates."""

import math

import open_clip
import pytest
import torch
from lightning.pytorch import Callback
from tiny_model import MODEL_CFG, write_tiny_model
from torch.nn import functional as F

from biomedclip.config import check_config
from biomedclip.errors import ConfigError, MissingExtra
from biomedclip.training.config import TrainConfig
from biomedclip.training.module import ContrastiveModule
from biomedclip.training.optim import parameter_groups, rate_factor
from biomedclip.training.terms import Continual
from biomedclip.training.throughput import peak_flops, sample_flops
from biomedclip.training.towers import (
    encode_image,
    encode_text,
    resize_positions,
    set_up_towers,
    split_by_length,
    text_padding,
)
from biomedclip.training.trainer import make_trainer, quiet_lightning

PREPROCESS = {"size": (32, 32), "mode": "RGB", "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.5)}


def model(**vision):
    torch.manual_seed(0)
    made = open_clip.CLIP(**{**MODEL_CFG, "vision_cfg": {**MODEL_CFG["vision_cfg"], **vision}})
    made.visual.preprocess_cfg = PREPROCESS
    return made


def config(**changes):
    values = {"model": {"name": "x"}, "data": {"sources": [{"name": "a", "path": "p"}, {"name": "b", "path": "q"}]},
              "max_steps": 1, "batch_size": 10, "device": "cpu", "optim": {"clip_norm": None}}  # fmt: skip
    return check_config(values | changes, TrainConfig, "test")


def batch(size=10, seed=3):
    random = torch.Generator().manual_seed(seed)
    text = torch.zeros(size, 16, dtype=torch.int64)
    for row in range(size):
        length = 3 + row % 9
        text[row, :length] = torch.randint(1, 400, (length,), generator=random)
        text[row, length - 1] = 49407
    return {
        "image": torch.randint(0, 256, (size, 3, 32, 32), generator=random, dtype=torch.uint8), "text": text,
        "labels": torch.arange(size)[:, None] % 4, "article": torch.arange(size) // 2,
        "source": ["a", "b"] * (size // 2),
    }  # fmt: skip


class Batches:
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class KeepGradients(Callback):
    found: dict

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found = {name: p.grad.clone() for name, p in pl_module.model.named_parameters() if p.grad is not None}


def fit(settings, *, of=None, batches=None, continual=None, tmp_path=None, double=True):
    """Gradients of the last step, and the module, after training on the batches."""
    module = ContrastiveModule(of or model(), settings, continual)
    if double:
        module.double()
    keep = KeepGradients()
    with quiet_lightning():
        trainer = make_trainer(settings, tmp_path, [keep], validates=False)
        trainer.fit(module, Batches(batches or [batch()]), val_dataloaders=[])
    return keep.found, module


def whole_gradients(module, settings):
    """The gradients of one graph over all parts of the first step, dropout drawn part by part."""
    module.zero_grad()
    parts = module._parts(batch())
    embedded = [torch.cat(rows) for rows in zip(*(module._embed_part(n, p) for n, p in enumerate(parts)), strict=True)]
    loss = module._loss(tuple(embedded), batch())
    parameters = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def relative(found, wanted):
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("loss", [{}, {"soft_targets": 0.5, "same_article": "ignore"}], ids=["plain", "facts"])
def test_gradients_of_parts_are_those_of_the_whole_batch_also_with_patch_dropout(dropout, loss):
    settings = config(
        micro_batch_size=3, towers={"patch_dropout": dropout}, loss=loss, optim={"lr": 1e-30, "clip_norm": None}
    )
    found, module = fit(settings, of=model(patch_size=8))
    module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.reset()
    module.model.load_state_dict(model(patch_size=8).state_dict())
    wanted = whole_gradients(module, settings)
    assert found.keys() == wanted.keys()
    assert float(found["logit_scale"] / wanted["logit_scale"]) == pytest.approx(1.0, abs=1e-9)
    assert relative(found, wanted) < 1e-9


@pytest.mark.parametrize("size", [0, 4])
def test_frozen_positions_stay_to_the_bit_and_count_for_nothing_in_the_norm(size):
    rows = 5
    settings = config(
        micro_batch_size=size, towers={"freeze_positions": rows}, max_steps=3,
        optim={"lr": 1e-2, "weight_decay": 0.5, "clip_norm": 1e-3},
    )  # fmt: skip
    start = model().double().positional_embedding.detach().clone()
    found, module = fit(settings, batches=[batch(seed=seed) for seed in range(3)])
    end = module.model.positional_embedding.detach()
    assert torch.equal(end[:rows], start[:rows])
    assert not torch.isclose(end[rows:], start[rows:]).all(dim=1).any()
    assert found["positional_embedding"][:rows].any()  # a callback sees gradients before the rows are left out
    found["positional_embedding"][:rows] = 0
    norm = torch.stack([gradient.norm() for gradient in found.values()]).norm()
    assert float(module.latest["grad_norm"]) == pytest.approx(float(norm), rel=1e-9)


def test_positions_that_a_tower_lacks_cannot_be_frozen():
    with pytest.raises(ConfigError, match=r"the text tower has 16 positions \(found 17\)"):
        ContrastiveModule(model(), config(towers={"freeze_positions": 17}))
    with pytest.raises(ConfigError, match="needs a text tower that trains a table of positions"):
        ContrastiveModule(model(), config(towers={"freeze_positions": 3, "lock_text": 0}))
    with pytest.raises(ConfigError, match=r"fsdp goes with none of towers\.stages, towers\.freeze_positions"):
        config(towers={"freeze_positions": 3}, strategy="fsdp")


def test_the_size_of_the_parts_does_not_change_the_gradients():
    wanted, _ = fit(config())
    for size in (1, 4, 5):
        found, _ = fit(config(micro_batch_size=size))
        assert relative(found, wanted) < 1e-9


def test_dropout_differs_from_step_to_step_and_not_from_run_to_run():
    settings = config(max_steps=2, towers={"patch_dropout": 0.5}, optim={"lr": 1e-30, "clip_norm": None})
    two = [batch(), batch()]
    second, _ = fit(settings, of=model(patch_size=8), batches=two)
    again, _ = fit(settings, of=model(patch_size=8), batches=two)
    first, _ = fit(config(towers={"patch_dropout": 0.5}), of=model(patch_size=8))
    assert relative(second, again) == 0
    assert relative(second, first) > 1e-3


class Pull:
    """A term on weights and a term on embeddings in one: half the squared norm of the projection, and a cosine."""

    name, weight, needs_teacher = "pull", 0.3, True

    def __call__(self, step):
        assert step.all_image is step.image
        assert not step.teacher_image.requires_grad
        return step.model.text_projection.square().sum() / 2 + (step.image * step.teacher_image).sum(1).mean()


class Teacher:
    """Knows the right embedding to be the first axis."""

    calls = 0

    def embed(self, pixels, texts):
        self.calls += 1
        axis = F.one_hot(torch.zeros(len(pixels), dtype=torch.int64), 16).to(pixels.dtype)
        return axis, axis


def test_terms_get_the_whole_batch_once_a_step_and_teachers_are_no_part_of_the_module():
    class Owner(torch.nn.Module, Teacher):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

    grads = []
    for size in (0, 4):
        teacher = Owner()
        found, module = fit(config(micro_batch_size=size), continual=Continual(terms=(Pull(),), teacher=teacher))
        assert teacher.calls == 1
        assert not any("teacher" in name or "continual" in name for name in module.state_dict())
        assert all(parameter is not teacher.weight for parameter in module.parameters())
        owned = {id(p) for group in module.optimizers().param_groups for p in group["params"]}
        assert id(teacher.weight) not in owned
        assert module.latest["loss/pull"] > 0
        grads.append(found)
    assert relative(*grads) < 1e-9
    plain, _ = fit(config())
    difference = grads[0]["text_projection"] - plain["text_projection"]
    torch.testing.assert_close(difference, 0.3 * model().double().text_projection.detach())


@pytest.mark.parametrize("name", ["siglip", "infoloob", "alip"])
def test_other_objectives_train_and_use_what_they_need(name):
    data = batch()
    made = model()
    if name == "siglip":
        made.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    if name == "alip":
        data["second_text"] = batch(seed=4)["text"]
    whole, module = fit(config(loss={"name": name}), of=made, batches=[data])
    assert ("logit_bias" in whole) == (name == "siglip")
    made.load_state_dict(model().state_dict(), strict=False)
    if name == "siglip":
        torch.nn.init.constant_(made.logit_bias, -10.0)
    if name == "alip":
        assert torch.isfinite(module.state_dict()["objective.means"]).all()
    parts, _ = fit(config(loss={"name": name}, micro_batch_size=4), of=made, batches=[data])
    assert relative(parts, whole) < 1e-9


def test_a_logit_bias_that_nobody_uses_and_a_fixed_scale_are_not_trained():
    made = model()
    made.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    found, _ = fit(config(loss={"learn_logit_scale": False}), of=made)
    assert not {"logit_bias", "logit_scale"} & found.keys()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_its_parts_agree_with_the_whole(precision):
    found = [fit(config(precision=precision, micro_batch_size=size), double=False)[0] for size in (0, 5)]
    wanted, _ = fit(config())
    for gradients in found:
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        flat = [torch.cat([g[name].double().flatten() for name in wanted]) for g in (gradients, wanted)]
        assert F.cosine_similarity(*flat, dim=0) > 0.98
        assert flat[0].norm() == pytest.approx(float(flat[1].norm()), rel=0.1)
    assert relative(found[1], found[0]) < 0.05


def test_fp16_gradients_are_clipped_after_the_scale_is_taken_off():
    from biomedclip.training.module import ContrastiveModule as Module

    settings = config(precision="fp16", optim={"lr": 1e-3, "clip_norm": 0.05})
    _, module = fit(settings, double=False)
    assert isinstance(module, Module)
    wanted, _ = fit(config())
    norm = math.sqrt(sum(float(g.square().sum()) for g in wanted.values()))
    assert float(module.latest["grad_norm"]) == pytest.approx(norm, rel=0.1)


def test_checkpointed_towers_have_the_same_gradients():
    wanted, _ = fit(config())
    found, _ = fit(config(towers={"gradient_checkpointing": True}))
    assert relative(found, wanted) < 1e-9


@pytest.mark.timeout(600)  # a compiler runs
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch, while it compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.slow
def test_compiled_towers_have_the_same_gradients_and_names():
    wanted, _ = fit(config(), double=False)
    found, module = fit(config(towers={"compile": True}, micro_batch_size=5), double=False)
    assert relative(found, wanted) < 1e-4
    assert module.model.state_dict().keys() == model().state_dict().keys()


def test_locked_towers_train_their_unlocked_groups_only():
    made = model(layers=3)
    found, _ = fit(config(towers={"lock_image": 1, "lock_text": 0}), of=made)
    assert {name for name in found if name.startswith("visual.")} == {"visual.proj"}
    assert "token_embedding.weight" not in found
    set_up_towers(fresh := model(layers=3), config(towers={"lock_image": 2}).towers)
    trained = {name for name, p in fresh.named_parameters() if p.requires_grad and name.startswith("visual.")}
    assert "visual.transformer.resblocks.2.attn.in_proj_weight" in trained
    assert not any(".resblocks.1." in name for name in trained)
    both = model()
    both.logit_scale.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing is trained"):
        fit(config(towers={"lock_image": 0, "lock_text": 0}, loss={"learn_logit_scale": False}), of=both)


def test_smaller_pictures_use_the_models_positions_resized_as_open_clip_does():
    made = model(patch_size=8)
    smaller = model(patch_size=8, image_size=16)
    state = {"visual.positional_embedding": made.visual.positional_embedding.detach().clone()}
    open_clip.model.resize_pos_embed(state, smaller)
    own = resize_positions(made.visual.positional_embedding.detach(), 4, 2)
    torch.testing.assert_close(own, state["visual.positional_embedding"])
    smaller.load_state_dict({**made.state_dict(), **state})
    pixels = torch.randn(2, 3, 32, 32)
    small = F.interpolate(pixels, size=(16, 16), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(encode_image(made, pixels, 16), smaller.encode_image(small))
    encode_image(made, pixels, 16).sum().backward()
    assert made.visual.positional_embedding.grad.abs().sum() > 0
    assert made.visual.positional_embedding.shape == (17, 32)


def test_smaller_pictures_through_a_timm_trunk():
    made = open_clip.CustomTextCLIP(
        16, {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "image_size": 224,
             "timm_pool": "", "timm_proj": "linear"}, MODEL_CFG["text_cfg"],
    ).eval()  # fmt: skip
    made.visual.preprocess_cfg = PREPROCESS | {"size": (224, 224)}
    set_up_towers(made, config(towers={"stages": [{"until_step": 1, "size_px": 32}], "patch_dropout": 0.5}).towers)
    assert not made.visual.trunk.patch_drop.training
    pixels = torch.randn(2, 3, 224, 224)
    assert encode_image(made, pixels, 32).shape == (2, 16)
    full = encode_image(made, pixels)
    torch.testing.assert_close(encode_image(made, pixels, 224), full)
    made.train()
    assert not torch.allclose(made.encode_image(pixels), full)
    for size, wrong in ((256, "larger than the model's 224 px"), (40, "multiple of the patch size 16")):
        with pytest.raises(ConfigError, match=wrong):
            set_up_towers(made, config(towers={"stages": [{"until_step": 1, "size_px": size}]}).towers)


def test_stages_end_at_their_steps():
    settings = config(
        max_steps=9, towers={"stages": [{"until_step": 1, "size_px": 16}, {"until_step": 4, "size_px": 24}]}
    )
    _, module = fit(
        check_config(settings.model_dump(mode="json") | {"max_steps": 1}, TrainConfig, "t"), of=model(patch_size=8)
    )
    progress = module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    sizes = []
    for step in (0, 1, 3, 4, 8):
        progress.total.completed = step
        sizes.append(module._size_px())
    assert sizes == [16, 24, 24, None, None]
    with pytest.raises(ConfigError, match="one after the other"):
        config(towers={"stages": [{"until_step": 4, "size_px": 16}, {"until_step": 4, "size_px": 24}]})


def test_texts_without_their_padding_have_the_same_embeddings():
    made = model().eval()
    texts = batch()["text"]
    assert text_padding(made) == 0
    torch.testing.assert_close(encode_text(made, texts[:, :12]), made.encode_text(texts), rtol=1e-5, atol=1e-6)
    order, parts = split_by_length(texts, 0, 2)
    assert [part.shape[1] for part in parts] == [8, 16]
    found = torch.cat([encode_text(made, part) for part in parts])[torch.argsort(order)]
    torch.testing.assert_close(found, made.encode_text(texts), rtol=1e-5, atol=1e-6)


def test_texts_of_a_bert_tower_are_cut_and_those_of_siglips_are_not():
    from transformers import BertConfig

    text = open_clip.hf_model.HFTextEncoder(
        "bert", 16, config=BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=500,
                                      intermediate_size=16, max_position_embeddings=64, hidden_dropout_prob=0.0),
        pooler_type="cls_last_hidden_state_pooler", proj_type="linear", pretrained=False,
    ).eval()  # fmt: skip
    made = torch.nn.Module()
    made.text, made.encode_text = text, text
    texts = batch()["text"] % 499
    texts[:, 0] = 7
    assert text_padding(made) == 0
    order, parts = split_by_length(texts, 0, 3)
    assert len(parts) == 2
    found = torch.cat([encode_text(made, part) for part in parts])[torch.argsort(order)]
    torch.testing.assert_close(found, text(texts), rtol=1e-5, atol=1e-6)
    siglip = open_clip.CustomTextCLIP(
        16, MODEL_CFG["vision_cfg"], MODEL_CFG["text_cfg"] | {"no_causal_mask": True, "pool_type": "last"}
    )
    assert text_padding(siglip) is None
    assert text_padding(open_clip.CustomTextCLIP(16, MODEL_CFG["vision_cfg"], MODEL_CFG["text_cfg"])) == 0


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_lengths_are_cut_where_padding_is_least(count):
    lengths = [8] * 5 + [16] * 2 + [24] + [64] * 3
    texts = torch.stack([F.pad(torch.ones(n, dtype=torch.int64), (0, 80 - n)) for n in lengths])
    order, parts = split_by_length(texts[torch.randperm(11)], 0, count)
    assert sorted(order.tolist()) == list(range(11))
    positions = sum(part.numel() for part in parts)
    assert positions == {1: 11 * 64, 2: 7 * 16 + 4 * 64, 3: 5 * 8 + 3 * 24 + 3 * 64, 50: sum(lengths)}[count]


def test_rates_fall_from_the_head_to_the_stem_and_vectors_do_not_decay():
    settings = config(optim={"layer_decay": 0.5, "weight_decay": 0.1}).optim
    made = model(layers=3)
    place = {id(p): name for name, p in made.named_parameters()}
    shares = {}
    for (share, decay), parameters in parameter_groups(made.named_parameters(), settings).items():
        for parameter in parameters:
            shares[place[id(parameter)]] = share
            assert decay == (0.1 if parameter.ndim >= 2 else 0.0)
    assert shares.keys() == dict(made.named_parameters()).keys()
    assert [shares[f"visual.transformer.resblocks.{n}.ln_1.weight"] for n in range(3)] == [0.125, 0.25, 0.5]
    assert shares["visual.conv1.weight"] == shares["visual.positional_embedding"] == 0.0625
    assert shares["visual.proj"] == shares["visual.ln_post.weight"] == shares["logit_scale"] == 1.0
    # The text tower of one block counts for itself.
    assert shares["transformer.resblocks.0.ln_1.weight"] == 0.5
    assert shares["token_embedding.weight"] == shares["positional_embedding"] == 0.25
    assert shares["text_projection"] == shares["ln_final.weight"] == 1.0
    assert {share for share, _ in parameter_groups(made.named_parameters(), config().optim)} == {1.0}


def test_bert_and_timm_blocks_are_known():
    settings = config(optim={"layer_decay": 0.5}).optim
    names = ["visual.trunk.blocks.1.attn.weight", "visual.trunk.blocks.0.attn.weight", "visual.trunk.pos_embed",
             "text.transformer.embeddings.word_embeddings.weight", "text.transformer.encoder.layer.0.x.weight",
             "text.proj.weight", "visual.head.proj.weight", "visual.layer2.0.conv.weight"]  # fmt: skip
    named = [(name, torch.nn.Parameter(torch.ones(2, 2))) for name in names]
    groups = parameter_groups(named, settings)
    found = {names[[id(p) for _, p in named].index(id(p))]: share for (share, _), ps in groups.items() for p in ps}
    assert [found[name] for name in names] == [0.25, 0.125, 0.0625, 0.25, 0.5, 1.0, 1.0, 0.5]


def test_rates_warm_up_and_end_at_the_final_ratio():
    schedule = config(max_steps=10, schedule={"warmup_steps": 2, "final_ratio": 0.1}).schedule
    rates = [rate_factor(step, 10, schedule) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[10] == pytest.approx(0.1)
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True)


def test_flops_are_three_forward_passes_and_one_of_a_locked_tower():
    made = model()
    whole = sample_flops(made, 32)
    width, tokens = 32, 5
    # Four projections of attention and two of the MLP, and the two products of attention: per token and layer.
    image = (
        2 * tokens * (4 * width**2 + 8 * width**2 + 2 * tokens * width) + 2 * 4 * width * 3 * 16 * 16 + 2 * width * 16
    )
    width, tokens = 16, 16
    text = 2 * tokens * (4 * width**2 + 8 * width**2 + 2 * tokens * width) + 2 * 16 * 16
    assert whole == pytest.approx(3 * (image + text), rel=0.02)
    made.lock_image_tower()
    assert sample_flops(made, 32) == pytest.approx(image + 3 * text, rel=0.02)
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_loggers_that_are_not_installed_are_named_with_their_pip_line(tmp_path):
    import importlib.util

    for name in [name for name in ("wandb", "mlflow") if importlib.util.find_spec(name) is None]:
        with pytest.raises(MissingExtra, match=f"run: pip install {name}, or leave it out of loggers"):
            make_trainer(config(loggers=[name]), tmp_path, [], validates=False)


def test_a_gpu_that_is_not_there_is_said(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="this machine cannot run it so"):
            make_trainer(config(device="gpu"), tmp_path, [], validates=False)


@pytest.mark.parametrize(("changes", "wrong"), [
    ({"batch_size": 9, "devices": 2}, "multiple of the 2 processes"),
    ({"strategy": "fsdp", "precision": "fp16"}, "fsdp goes with none"),
    ({"strategy": "fsdp", "micro_batch_size": 4}, "fsdp does not go with micro_batch_size: embedding a part twice"),
])  # fmt: skip
def test_configs_that_cannot_work_are_refused(changes, wrong):
    with pytest.raises(ConfigError, match=wrong):
        config(**changes)


def test_write_tiny_model_is_what_these_tests_train(tmp_path):
    loaded, _ = open_clip.create_model_from_pretrained(f"local-dir:{write_tiny_model(tmp_path)}")
    assert loaded.state_dict().keys() == model().state_dict().keys()
