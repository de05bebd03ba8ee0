"""WiSE-FT: what is interpolated, that a borrowed model gets its own weights back, and the command's folder."""

import json
import math

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model
from typer.testing import CliRunner

from biomedclip.errors import CheckpointError, ConfigError
from biomedclip.models.interpolate import carrying, interpolate
from biomedclip.training.wise import interpolate_folders


def two_states():
    start = {
        "weight": torch.tensor([[1.0, -2.0], [0.5, 4.0]]),
        "logit_scale": torch.tensor(math.log(20.0)),
        "bn.running_var": torch.tensor([1.0, 9.0]),
        "bn.num_batches_tracked": torch.tensor(7),
        "half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    }
    end = {
        "weight": torch.tensor([[3.0, -2.0], [1.5, 0.0]]),
        "logit_scale": torch.tensor(math.log(100.0)),
        "bn.running_var": torch.tensor([3.0, 1.0]),
        "bn.num_batches_tracked": torch.tensor(19),
        "half": torch.tensor([3.0, 2.5], dtype=torch.bfloat16),
    }
    return start, end


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_weights_buffers_and_the_logarithm_of_the_scale_are_interpolated_and_counters_are_the_ends(alpha):
    start, end = two_states()
    mixed = interpolate(start, end, alpha)
    for name in ("weight", "bn.running_var"):
        wanted = (1 - alpha) * start[name].double().numpy() + alpha * end[name].double().numpy()
        np.testing.assert_allclose(mixed[name].numpy(), wanted, rtol=1e-6)
    # Between 20 and 100 on a logarithmic scale: the geometric mean at a half.
    assert math.exp(mixed["logit_scale"]) == pytest.approx(20 ** (1 - alpha) * 100**alpha, rel=1e-5)
    assert int(mixed["bn.num_batches_tracked"]) == 19
    assert mixed["half"].dtype == torch.bfloat16


def test_the_ends_of_the_curve_are_exact():
    start, end = two_states()
    for alpha, wanted in ((0.0, start), (1.0, end)):
        mixed = interpolate(start, end, alpha)
        floats = [name for name in wanted if wanted[name].is_floating_point()]
        assert all(torch.equal(mixed[name], wanted[name]) for name in floats)


def test_models_that_are_not_two_states_of_one_are_refused():
    start, end = two_states()
    with pytest.raises(CheckpointError, match="1 tensors are in one model only"):
        interpolate({**start, "other": torch.zeros(1)}, end, 0.5)
    with pytest.raises(CheckpointError, match=r"weight has two shapes \(found \(3,\) and \(2, 2\)\)"):
        interpolate({**start, "weight": torch.zeros(3)}, end, 0.5)


def test_a_model_carries_other_weights_for_a_block_and_gets_its_own_back_bit_by_bit(tmp_path):
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{write_tiny_model(tmp_path / 'a')}")
    other, _ = open_clip.create_model_from_pretrained(f"local-dir:{write_tiny_model(tmp_path / 'b', seed=1)}")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    image = torch.randn(2, 3, 32, 32)
    own = model.encode_image(image)

    def fail_inside():
        with carrying(model, interpolate(before, other.state_dict(), 1.0)):
            assert torch.equal(model.encode_image(image), other.encode_image(image))
            assert not torch.equal(model.encode_image(image), own)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.encode_image(image), own)


def test_a_gradient_in_flight_survives_an_interpolation(tmp_path):
    """The curve is drawn in the middle of training: parameters stay the same objects, with their gradients."""
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{write_tiny_model(tmp_path / 'a')}")
    model.encode_image(torch.randn(2, 3, 32, 32)).sum().backward()
    parameter = model.visual.proj
    gradient = parameter.grad.clone()
    with carrying(model, {"visual.proj": torch.zeros_like(parameter)}):
        assert not model.visual.proj.any()
    assert model.visual.proj is parameter
    assert torch.equal(parameter.grad, gradient)


def test_the_command_writes_a_folder_that_open_clip_loads(tmp_path):
    from biomedclip.cli import app

    run = tmp_path / "run"
    write_tiny_model(run / "start")
    write_tiny_model(run / "final", seed=1)
    done = CliRunner().invoke(app, ["wise", str(run), "--alpha", "0.3", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    first, last = (load_file(run / part / "open_clip_model.safetensors") for part in ("start", "final"))
    for name, tensor in model.state_dict().items():
        wanted = 0.7 * first[name].double() + 0.3 * last[name].double()
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-7)


def test_another_architecture_a_wild_alpha_and_missing_weights_are_refused(tmp_path):
    a, b = write_tiny_model(tmp_path / "a"), write_tiny_model(tmp_path / "b", seed=1)
    with pytest.raises(ConfigError, match=r"is not between 0 \(start\) and 1 \(end\) \(found 1.5\)"):
        interpolate_folders(a, b, 1.5, tmp_path / "out")
    config = json.loads((b / "open_clip_config.json").read_bytes())
    config["model_cfg"]["embed_dim"] = 8
    (b / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is another architecture"):
        interpolate_folders(a, b, 0.5, tmp_path / "out")
    (a / "open_clip_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        interpolate_folders(a, a, 0.5, tmp_path / "out")


def test_a_config_is_only_there_with_its_weights(tmp_path):
    """A folder with a config is complete: an interrupted interpolation leaves none."""
    a, b = write_tiny_model(tmp_path / "a"), write_tiny_model(tmp_path / "b", seed=1)
    out = interpolate_folders(a, b, 0.5, tmp_path / "out")
    weights = load_file(b / "open_clip_model.safetensors")
    save_file({**weights, "strange": torch.zeros(1)}, b / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError):
        interpolate_folders(a, b, 0.5, out)
    assert (out / "open_clip_config.json").exists()  # nothing was begun: the refusal came first
