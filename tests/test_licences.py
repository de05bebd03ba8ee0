import pytest

from biomedclip.errors import ConfigError
from biomedclip.licences import LICENCE_CLASSES, PRESETS, is_allowed, licence_class

MATRIX = {
    "CC0": "commercial-derivatives",
    "CC BY": "commercial-derivatives",
    "CC BY-SA": "commercial-derivatives",
    "CC BY-ND": "commercial",
    "CC BY-NC": "noncommercial",
    "CC BY-NC-ND": "noncommercial",
    "TDM": "other",
    None: "none",
    "": "none",
}


@pytest.mark.parametrize(("code", "expected"), MATRIX.items())
def test_each_code_has_one_class(code, expected):
    assert licence_class(code) == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_admits_what_has_no_licence(preset):
    assert not is_allowed(None, preset)


def test_presets_grow_and_only_all_admits_the_unknown():
    admitted = {preset: {code for code in MATRIX if is_allowed(code, preset)} for preset in PRESETS}
    assert admitted["commercial-derivatives"] == {"CC0", "CC BY", "CC BY-SA"}
    assert admitted["commercial"] == admitted["commercial-derivatives"] | {"CC BY-ND"}
    assert admitted["noncommercial"] == admitted["commercial"] | {"CC BY-NC", "CC BY-NC-ND"}
    assert admitted["all"] == admitted["noncommercial"] | {"TDM"}


def test_no_code_is_in_two_classes():
    codes = [code for members in LICENCE_CLASSES.values() for code in members]
    assert len(codes) == len(set(codes))


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match="use one of"):
        is_allowed("CC0", "comercial")
