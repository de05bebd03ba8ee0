"""Calibration against loops, torch's own optimum and samples whose calibration is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomedclip.evaluation import calibration as c
from biomedclip.evaluation.metrics import softmax

rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(400, 3)) * 2
# Labels drawn from the probabilities themselves: calibrated at T = 1.
Y = np.asarray([rng.choice(3, p=p) for p in softmax(LOGITS)])


def test_bins_of_equal_mass_hold_equally_many_and_give_the_loops_error():
    p = softmax(LOGITS)
    top, right = p.max(1), p.argmax(1) == Y
    order = np.argsort(top)
    parts = np.array_split(order, 10)  # 400 samples: forty a bin
    expected = sum(len(i) / 400 * abs(right[i].mean() - top[i].mean()) for i in parts)
    assert c.calibration_error(Y, p, bins=10, by="mass") == pytest.approx(expected)
    assert c.reliability(Y, p, bins=10, by="mass").count.tolist() == [40] * 10


def test_equal_confidences_share_a_bin_whatever_their_order():
    p = np.tile([0.7, 0.3], (20, 1))
    y = np.r_[np.zeros(10, int), np.ones(10, int)]
    assert c.calibration_error(y, p, by="mass") == pytest.approx(0.2)
    assert c.calibration_error(y[::-1], p, by="mass") == pytest.approx(0.2)


def test_classwise_error_is_the_mean_over_one_against_the_rest():
    p = softmax(LOGITS)
    expected = []
    for k in range(3):
        for low in np.arange(15) / 15:
            rows = (p[:, k] > low) & (p[:, k] <= low + 1 / 15)
            expected.append(rows.mean() * abs((Y[rows] == k).mean() - p[rows, k].mean()) if rows.any() else 0)
    assert c.classwise_calibration_error(Y, p) == pytest.approx(sum(expected) / 3)


def test_a_reliability_curve_gives_the_calibration_error_back():
    p = softmax(LOGITS * 3)
    curve = c.reliability(Y, p)
    assert (curve.count * np.abs(curve.accuracy - curve.confidence)).sum() / 400 == pytest.approx(
        c.calibration_error(Y, p)
    )


def test_the_temperature_is_the_optimum_torch_finds_and_undoes_a_scale():
    torch = pytest.importorskip("torch")
    found = c.fit_temperature(Y, LOGITS * 7)
    log_t = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=200, line_search_fn="strong_wolfe")
    z, y = torch.tensor(LOGITS * 7), torch.tensor(Y)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(z / log_t.exp(), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert found == pytest.approx(float(log_t.detach().exp()), rel=1e-4)
    assert found == pytest.approx(7 * c.fit_temperature(Y, LOGITS), rel=1e-4)
    assert c.fit_temperature(Y, LOGITS) == pytest.approx(1, abs=0.25)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.floats(0.05, 50), st.integers(0, 2**32 - 1))
def test_a_temperature_changes_no_prediction_and_order_changes_nothing(temperature, seed):
    assert (softmax(LOGITS / temperature).argmax(1) == LOGITS.argmax(1)).all()
    order = np.random.default_rng(seed).permutation(400)
    first, second = c.calibrate(Y, LOGITS, temperature), c.calibrate(Y[order], LOGITS[order], temperature)
    assert first == pytest.approx(second)


def test_pitfall_04_raw_cosines_are_not_probabilities():
    cosines = np.c_[np.full(100, 0.30), np.full(100, 0.20)]
    y = np.zeros(100, int)  # always right
    assert softmax(cosines).max() < 0.53
    assert c.calibration_error(y, softmax(cosines)) > 0.47
    assert c.calibration_error(y, softmax(100 * cosines)) < 1e-4


def test_risk_coverage_is_the_mean_of_running_errors_with_ties_in_their_mean():
    right, sure = np.array([1, 0, 1, 1]), np.array([0.9, 0.5, 0.8, 0.7])
    assert c.area_under_risk_coverage(right, sure) == pytest.approx(np.mean([0, 0, 0, 1 / 4]))
    assert c.area_under_risk_coverage([1, 0], [0.5, 0.5]) == c.area_under_risk_coverage([0, 1], [0.5, 0.5]) == 0.5


def test_nothing_to_calibrate_is_undefined():
    none = np.zeros((0, 3))
    assert all(math.isnan(v) for v in c.calibrate(np.zeros(0, int), none).values())
    with pytest.raises(ValueError, match="needs samples"):
        c.fit_temperature([], none)


def test_one_sample_has_the_gap_of_its_own_confidence():
    assert c.calibration_error([0], [[0.8, 0.2]]) == pytest.approx(0.2)
    assert c.calibration_error([1], [[0.8, 0.2]], by="mass") == pytest.approx(0.8)
