"""Numbers of continual learning, against sums written out by hand, and the matrix of a chain of runs."""

import json
import math

import numpy as np
import pytest

from biomedclip.errors import DataError
from biomedclip.training.forgetting import (
    average_value,
    backward_transfer,
    forgetting_matrix,
    forgetting_measure,
    retention,
)

# Three phases: the first is half forgotten by the second and comes back a little in the third.
MATRIX = [[0.9, 0.3, 0.2], [0.5, 0.8, 0.25], [0.6, 0.7, 0.95]]


def test_backward_transfer_compares_the_end_with_the_phase_that_taught_it():
    assert backward_transfer(MATRIX) == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    assert backward_transfer([[0.9, 0], [0.95, 0.8]]) == pytest.approx(0.05)  # learning that helps backwards
    assert math.isnan(backward_transfer([[0.9]]))


def test_forgetting_is_from_the_best_there_was_and_the_average_is_what_is_left():
    assert forgetting_measure(MATRIX) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.7)) / 2)
    assert average_value(MATRIX) == pytest.approx((0.6 + 0.7 + 0.95) / 3)
    with pytest.raises(ValueError, match="square"):
        average_value([[1.0, 2.0]])


def test_retention_is_a_share_of_the_start():
    found = retention({"a": 0.4, "b": 0.9, "new": 1.0}, {"a": 0.8, "b": 0.6, "zero": 0.0})
    assert found == {"a": pytest.approx(0.5), "b": pytest.approx(1.5)}
    assert math.isnan(retention({"a": 0.1}, {"a": 0.0})["a"])


def write_run(folder, values, roles):
    folder.mkdir()
    rows = [
        {"step": 0, "values": dict.fromkeys(values, 0.1), "roles": roles},
        {"step": 9, "values": values, "roles": roles},
    ]
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_matrix_of_a_chain_has_a_row_a_run_and_a_column_for_what_each_taught(tmp_path):
    cells = write_run(tmp_path / "cells", {"bccd": 0.9}, {"bccd": "gain"})
    lungs = write_run(
        tmp_path / "lungs", {"bccd": 0.7, "xray": 0.8, "ct": 0.6}, {"bccd": "retention", "xray": "gain", "ct": "gain"}
    )
    names, matrix = forgetting_matrix([cells, lungs])
    assert names == ["cells", "lungs"]
    np.testing.assert_allclose(matrix, [[0.9, np.nan], [0.7, 0.7]])
    assert backward_transfer(matrix) == pytest.approx(-0.2)


def test_a_chain_that_stopped_asking_is_refused(tmp_path):
    cells = write_run(tmp_path / "cells", {"bccd": 0.9}, {"bccd": "gain"})
    lungs = write_run(tmp_path / "lungs", {"xray": 0.8}, {"xray": "gain"})
    with pytest.raises(DataError, match="does not probe 'bccd', which cells taught"):
        forgetting_matrix([cells, lungs])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no validation"):
        forgetting_matrix([tmp_path / "empty"])
