import pytest
from fresh_python import run_fresh

import biomedclip

NAMES = [
    "BiomedclipError", "CheckpointError", "ConfigError", "DataError", "DatasetFolder", "DatasetWriter", "MissingExtra",
    "evaluate", "load", "train",
]  # fmt: skip


def test_the_public_names_are_exactly_these():
    assert sorted(set(biomedclip.__all__) - {"__version__"}) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_resolves_and_has_a_docstring(name):
    assert getattr(biomedclip, name).__doc__


def test_importing_the_package_costs_nothing_heavy():
    assert run_fresh("import biomedclip")[1] & {"torch", "numpy", "PIL", "pyarrow", "yaml"} == set()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="lode"):
        _ = biomedclip.lode


def test_submodules_are_not_shadowed_by_public_functions():
    import biomedclip.evaluation.evaluate as module

    assert callable(module.evaluate)
