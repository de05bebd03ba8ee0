"""Every model of the zoo against the hand-written list of its published tensors: names, shapes, rules, report."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from checkpoint_layouts import LayoutFile, layout_names, published_names, read_layout, safetensors_size
from safetensors.torch import save_file

from biomedclip.errors import CheckpointError
from biomedclip.models.build import build_architecture, check_keys
from biomedclip.models.convert import Changes, convert, expand
from biomedclip.models.zoo import ReleasedModel, read_model


def published(model: ReleasedModel) -> dict[str, torch.Tensor]:
    """The tensors of all files of a model under their published keys, each file's with its prefix."""
    files = model.files_of("weights")
    layouts = read_layout(model.name)
    assert len(layouts) == len(files)
    tensors: dict[str, torch.Tensor] = {}
    for file, layout in zip(files, layouts, strict=True):
        assert file.member or layout.path in file.paths, f"{layout.path} is not {file.paths}"
        if layout.wrapper not in (None, "-"):
            assert layout.wrapper in model.keys.unwrap
        held = layout.tensors("meta")
        if layout.wrapper == "-":
            held = {"": next(iter(held.values()))}
        tensors |= {file.prefix + key: tensor for key, tensor in held.items()}
    return tensors


@cache
def published_on_meta(name: str) -> dict[str, torch.Tensor]:
    return published(read_model(name))


BUILT: dict[str, dict[str, torch.Tensor]] = {}


def expected_on_meta(name: str) -> dict[str, torch.Tensor]:
    """The model's own tensors; models that differ in activation only are built once."""
    architecture = read_model(name).architecture
    key = architecture.model_copy(update={"activation": "gelu", "quick_gelu_doubt": None}).model_dump_json()
    if key not in BUILT:
        with torch.device("meta"):
            BUILT[key] = build_architecture(architecture).state_dict()
    return BUILT[key]


def fit(model: ReleasedModel, tensors: dict[str, torch.Tensor], where: str) -> tuple[dict, dict, Changes, list[str]]:
    """The model's tensors, what was expected, what the rules did, and which keys may be missing; raises as `load`."""
    ready, changes = convert(tensors, model.keys.rules, where)
    expected = expected_on_meta(model.name)
    missing, extra = check_keys(expected, ready, model.keys, where=where, name=model.name)
    assert not extra
    return ready, expected, changes, missing


@pytest.mark.parametrize("name", published_names())
def test_the_published_tensors_become_exactly_the_model_s(name):
    model = read_model(name)
    tensors, expected, changes, missing = fit(model, published_on_meta(name), name)
    assert len(tensors) == len(expected) - len(missing)
    # A pattern that nothing needs is a leftover of another model's facts.
    for pattern in model.keys.allow_missing:
        assert any(re.search(pattern, key) for key in missing), f"allow_missing {pattern} is of no use"
    for rule in model.keys.rules:
        if rule.drop and not rule.optional:
            assert any(re.search(rule.drop, key) for key in changes.dropped), f"drop {rule.drop} dropped nothing"
    assert {rule.fill for rule in model.keys.rules if rule.fill} == set(changes.filled)


@pytest.mark.parametrize("name", published_names())
def test_each_rule_is_needed(name):
    model = read_model(name)
    tensors = published_on_meta(name)
    whole = convert(tensors, model.keys.rules, name)[0]
    for index, rule in enumerate(model.keys.rules):
        rest = [r for number, r in enumerate(model.keys.rules) if number != index]
        if rule.optional or len(expand([rule])) > 1:
            continue
        try:
            without = convert(tensors, rest, name)[0]
        except CheckpointError:
            continue
        same = {k: tuple(v.shape) for k, v in without.items()} == {k: tuple(v.shape) for k, v in whole.items()}
        square = rule.verb == "transpose" and all(v.shape[0] == v.shape[1] for k, v in whole.items()
                                                  if re.search(rule.transpose, k))  # fmt: skip
        assert not same or square, f"rule {index} ({rule.verb}) changes nothing"


@pytest.mark.parametrize("name", published_names())
def test_another_model_s_file_is_refused_by_name(name):
    own, names = published_on_meta(name).keys(), published_names()
    start = names.index(name)
    other = next(other for other in (names * 2)[start:] if published_on_meta(other).keys() != own)
    with pytest.raises(CheckpointError, match=r"their\.file"):
        fit(read_model(name), published_on_meta(other), "their.file")


def test_safetensors_layouts_weigh_what_was_published():
    """Names, shapes and dtypes together decide the size, so that an equal size to the byte confirms them all."""
    for name in published_names():
        for file, layout in zip(read_model(name).files_of("weights"), read_layout(name), strict=True):
            if file.size is not None and layout.path.endswith(".safetensors"):
                assert safetensors_size(layout) == file.size, layout.path
    assert safetensors_size(read_layout("medsiglip")[0]) == 3_513_309_984
    assert round(safetensors_size(read_layout("flair")[0]) / 1e6, 2) == 533.32


def test_the_size_formula_is_that_of_the_library(tmp_path):
    layout = LayoutFile("a.safetensors", keys=dict(list(read_layout("medclip-resnet")[0].keys.items())[:60]))
    save_file(layout.tensors(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "a.safetensors").stat().st_size == safetensors_size(layout)


def test_every_layout_has_a_model_and_every_model_a_layout():
    assert set(layout_names()) == set(published_names())
