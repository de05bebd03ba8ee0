import pickle

import pytest

from biomedclip.errors import BiomedclipError, CheckpointError, ConfigError, DataError, MissingExtra


def test_a_message_says_where_what_found_and_what_to_do():
    error = DataError("a.tar", "is cut off", found="3 bytes", todo="fetch it again")
    assert str(error) == "a.tar: is cut off (found 3 bytes); fetch it again"
    assert str(ConfigError("x.yaml", "is empty")) == "x.yaml: is empty"


def test_a_missing_extra_names_the_pip_line():
    assert "pip install 'biomedclip[train]'" in str(MissingExtra("train", "lightning"))


@pytest.mark.parametrize(
    "error", [ConfigError("a", "b", found=1, todo="c"), CheckpointError("a", "b"), MissingExtra("ray", "ray")]
)
def test_errors_survive_the_way_back_from_a_worker_process(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert isinstance(copy, BiomedclipError)
