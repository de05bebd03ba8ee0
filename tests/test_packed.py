"""Packed weights give what plain ones give, for towers of every kind, and leave the model as it was."""

import open_clip
import pytest
import torch

from biomedclip.evaluation import packed

SIZES = {
    "embed_dim": 64, "vision_cfg": {"image_size": 32, "layers": 2, "width": 256, "patch_size": 16, "head_width": 64},
    "text_cfg": {"context_length": 12, "vocab_size": 600, "width": 256, "heads": 4, "layers": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return open_clip.CLIP(**SIZES).eval()


def outputs(model):
    images = torch.linspace(-1, 1, 3 * 3 * 32 * 32).view(3, 3, 32, 32)
    tokens = torch.arange(24).view(2, 12) % 600
    with torch.inference_mode():
        return model.encode_image(images), model.encode_text(tokens)


@pytest.mark.skipif(not packed._can_pack(), reason="this build of torch has no packed kernels")
def test_towers_say_the_same_and_are_given_back(model):
    plain = outputs(model)
    linear = next(m for m in model.modules() if type(m) is torch.nn.Linear)
    with packed.packing(model, "cpu"):
        assert "forward" in linear.__dict__
        for found, expected in zip(outputs(model), plain, strict=True):
            assert torch.allclose(found, expected, atol=2e-6 * float(expected.abs().max()), rtol=2e-5)
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), plain, strict=True))


def test_gradients_other_devices_and_half_precision_are_left_alone(model):
    with packed.packing(model, "cpu"):
        loss = model.encode_image(torch.ones(1, 3, 32, 32)).sum()
        loss.backward()
    grads = [p.grad for p in model.visual.transformer.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in grads[:4])
    model.zero_grad(set_to_none=True)
    for device, precision in (("cuda", "float32"), ("cpu", "bfloat16")):
        with packed.packing(model, device, precision):
            assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_torch_without_the_kernels_changes_nothing(model, monkeypatch):
    def missing(weight):
        raise AttributeError("no such operator")

    packed._can_pack.cache_clear()
    monkeypatch.setattr(packed, "_reorder", missing)
    try:
        with packed.packing(model, "cpu"):
            assert not any("forward" in m.__dict__ for m in model.modules())
    finally:
        packed._can_pack.cache_clear()


def test_attention_with_masks_weights_or_other_keys_is_torchs_own():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(256, 4, batch_first=True).eval()
    x, other = torch.randn(2, 5, 256), torch.randn(2, 5, 256)
    hidden = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    asked = [
        ((x, x, x), {"need_weights": False}), ((x, x, x), {"need_weights": False, "attn_mask": hidden}),
        ((x, x, x), {"need_weights": False, "attn_mask": torch.where(hidden, -torch.inf, 0.0)}),
        ((x, other, other), {"need_weights": False}), ((x, x, x), {}),
        ((x, x, x), {"need_weights": False, "key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}),
    ]  # fmt: skip
    with torch.inference_mode():
        expected = [attention(*args, **extra) for args, extra in asked]
        with packed.packing(attention, "cpu"):
            found = [attention(*args, **extra) for args, extra in asked]
    for (out, weights), (out_expected, weights_expected) in zip(found, expected, strict=True):
        assert torch.allclose(out, out_expected, atol=1e-5)
        assert (weights is None) == (weights_expected is None)
