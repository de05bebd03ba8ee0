"""Mean curves of several classes, ranks of several models, and their drawings in the overview."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from biomedclip.evaluation import metrics
from biomedclip.evaluation.answer_scores import LabelScores
from biomedclip.evaluation.macro_curves import mean_precision, mean_roc, pairs_of
from biomedclip.evaluation.overview import arrange, rank_rows, write_overview
from biomedclip.evaluation.overview_charts import rank_models
from biomedclip.evaluation.plots import draw_ranks, draw_square
from biomedclip.evaluation.results import write_result
from biomedclip.evaluation.scores import ClassScores, measure


def scores(n, classes, seed, digits=2):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    cosines = np.round(rng.normal(size=(n, classes)) + 0.8 * np.eye(classes)[y], digits).astype(np.float32)
    return ClassScores(sample_ids=tuple(map(str, range(n))), group_ids=None, classes=tuple("abcdefg"[:classes]), y=y,
                       cosines=cosines, logit_scale=1.0)  # fmt: skip


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(6, 60), st.integers(2, 5), st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_the_areas_under_the_mean_curves_are_the_macro_figures(n, classes, digits, seed):
    made = scores(n, classes, seed, digits)
    pairs = pairs_of(made)
    if not pairs:
        return
    x, y = mean_roc(pairs)
    areas = [sk.roc_auc_score(positive, values) for positive, values in pairs]
    assert np.trapezoid(y, x) == pytest.approx(np.mean(areas))
    assert (np.diff(x) >= 0).all()
    assert (np.diff(y) >= -1e-12).all()
    assert (x[0], x[-1], y[-1]) == (0, 1, 1)
    recall, precision = mean_precision(pairs)
    expected = np.mean([sk.average_precision_score(positive, values) for positive, values in pairs])
    assert (np.diff(np.r_[0, recall]) * precision).sum() == pytest.approx(expected)
    if classes > 2 and len(pairs) == classes:
        assert np.trapezoid(y, x) == pytest.approx(metrics.macro_auroc(made.y, made.cosines))


def test_labels_side_by_side_leave_out_what_is_not_stated():
    truth = np.array([[1, -1], [0, 1], [1, 0], [0, 1]], dtype=np.int8)
    margins = np.array([[0.9, 5], [0.1, 0.2], [0.4, 0.3], [0.5, 0.7]], dtype=np.float32)
    made = LabelScores(sample_ids=tuple("wxyz"), group_ids=None, labels=("p", "q"), truth=truth, cosines=margins,
                       logit_scale=1.0)  # fmt: skip
    x, y = mean_roc(pairs_of(made))
    assert np.trapezoid(y, x) == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_a_curve_of_one_class_is_its_own_mean_with_its_jumps():
    pairs = [(np.array([True, False, True]), np.array([3.0, 2.0, 1.0]))]
    x, y = mean_roc(pairs)
    assert list(zip(x.tolist(), y.tolist(), strict=True)) == [(0, 0), (0, 0.5), (1, 0.5), (1, 1)]


def test_bands_are_drawn_behind_their_lines_at_the_heights_of_one_deviation():
    drawn = draw_square({"a": [(0, 0.5), (1, 0.6)]}, x_label="x", y_label="y",
                        bands={"a": [(0, 0.4, 0.6), (1, 0.5, 0.7)]})  # fmt: skip
    corners = drawn.split('<polygon points="')[1].split('"')[0].split()
    heights = [float(corner.split(",")[1]) for corner in corners]
    assert heights == pytest.approx([10 + 220 * (1 - v) for v in (0.6, 0.7, 0.5, 0.4)])
    assert drawn.index("<polygon") < drawn.index("<polyline")


@pytest.fixture
def results(tmp_path):
    """Three models on three tasks: `best` wins each, the others change places."""
    for t in range(3):
        for name, lift in (("best", 1.5), ("other", 0.2 + 0.3 * (t % 2)), ("third", 0.35)):
            rng = np.random.default_rng(t)
            y = rng.integers(0, 3, 120)
            cosines = (rng.normal(size=(120, 3)) + lift * np.eye(3)[y]).astype(np.float32)
            made = ClassScores(sample_ids=tuple(map(str, range(120))), group_ids=None, classes=("a", "b", "c"), y=y,
                               cosines=cosines, logit_scale=1.0)  # fmt: skip
            record = {
                "task": f"t{t}", "suite": "own", "title": f"Task {t}", "kind": "zero_shot", "primary": "accuracy",
                "model": {"name": name, "fingerprint": name, "logit_scale": 1.0, "preprocess": "none"},
                "prompts": {}, "published": [], "warnings": [],
                "dataset": {"n": 120, "excluded": {"n": 0, "by_reason": {}, "listed": []}, "manifest_sha256": "x",
                            "split": "test", "contamination": "none", "classes": ["a", "b", "c"], "licence": "MIT",
                            "citation": "none", "n_groups": None, "group": None, "class_counts": [40, 40, 40]},
                "versions": {}, "seed": 0, "ensemble": None, "prompt_source": None, "prompt_set": None,
                "selection": {"split": None, "hparams": {}}, "code": {"git": None},
            }  # fmt: skip
            write_result(tmp_path / "out", record | measure(made, ("accuracy", "auroc"), resamples=100), made)
    from biomedclip.evaluation.results import read_results

    return tmp_path, read_results(tmp_path / "out")


def test_ranks_over_tasks_are_in_the_report_as_numbers_and_as_a_drawing(results):
    folder, found = results
    compared, tasks = rank_models(arrange(found))
    assert tasks == ["t0", "t1", "t2"]
    assert compared.mean_ranks["best"] == 1.0
    # Demsar 2006, section 3.2.2: q of .05 for three models is 2.343.
    assert compared.critical_difference == pytest.approx(2.343 * np.sqrt(3 * 4 / (6 * 3)), abs=1e-3)
    rows = rank_rows(arrange(found))
    assert rows[1][:2] == ("best", "1.00")
    write_overview(folder / "out", folder / "report")
    page = (folder / "report" / "report.html").read_text()
    assert "critical difference 1.91" in page
    assert "one against the rest, mean of 3" in page
    assert "## Ranks" in (folder / "report" / "report.md").read_text()
    two = {task: {m: r for m, r in by.items() if m != "third"} for task, by in arrange(found).items()}
    assert rank_rows(two) == []


def test_bars_join_models_that_are_not_told_apart():
    drawn = draw_ranks({"a": 1.0, "b": 1.5, "c": 3.0}, 0.8, [("a", "b")])
    assert drawn.count("stroke-width:4") == 1
    assert "a, 1.00" in drawn
    assert "critical difference 0.80" in drawn
    assert "more than the line" in draw_ranks({"a": 1.0, "b": 2.0, "c": 3.0}, 5, [("a", "b", "c")])
