"""Panels: captions and pictures taken apart, checked on made-up figures and on hand-checked ones of the sample."""

import hashlib
import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from biomedclip.errors import DataError
from biomedclip.schema import Pair
from data_builders.pmc.panel_boxes import read_boxes
from data_builders.pmc.panel_captions import split_caption
from data_builders.pmc.panels import PanelBox, match_panels, split_figure_pair, split_image

BENCH = Path(__file__).parent / "benchmarks" / "bench_panels.py"


@pytest.mark.parametrize(
    ("caption", "panels"),
    [
        ("Lungs. (A) CT. (B) MRI.", {"A": "CT.", "B": "MRI."}),
        ("(A) One. (B–D) The others.", {"A": "One.", "B": "The others.", "C": "The others.", "D": "The others."}),
        ("Growth of cells: a) early; b) late.", {"A": "early", "B": "late"}),
        ("A, Control. B, Treated. C, Recovered.", {"A": "Control.", "B": "Treated.", "C": "Recovered."}),
    ],
)
def test_a_caption_is_split_at_its_panel_letters(caption, panels):
    found = split_caption(caption)
    assert {letter: text.rstrip(";.") for letter, text in found.panels.items()} == {
        letter: text.rstrip(".") for letter, text in panels.items()
    }
    assert found.confidence > 0.2


@pytest.mark.parametrize(
    "caption",
    [
        "A chest X-ray of a child.", "Expression of vitamin (A) in the liver.", "Hepatitis (B) and (C) are common.",
        "Significance at P (a) < 0.05.", "", "T (A) cells",
    ],
)  # fmt: skip
def test_letters_in_prose_are_no_panels(caption):
    assert len(split_caption(caption).letters) < 2


def grid(rows, columns, size=80, gap=12, background=255):
    height, width = rows * size + (rows - 1) * gap, columns * size + (columns - 1) * gap
    picture = np.full((height, width, 3), background, np.uint8)
    random = np.random.default_rng(0)
    for row in range(rows):
        for column in range(columns):
            top, left = row * (size + gap), column * (size + gap)
            picture[top : top + size, left : left + size] = random.integers(0, 120, (size, size, 3))
    return picture


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 1), (2, 2), (2, 3), (3, 3)])
def test_a_grid_is_cut_at_its_gutters_in_reading_order(rows, columns):
    boxes = split_image(grid(rows, columns), rows * columns)
    assert len(boxes) == rows * columns
    order = [(round(box.top / 92), round(box.left / 92)) for box in boxes]
    assert order == [(row, column) for row in range(rows) for column in range(columns)]
    assert all(abs(box.width - 80) <= 12 and abs(box.height - 80) <= 12 for box in boxes)


def test_a_picture_without_gutters_stays_whole():
    picture = np.random.default_rng(1).integers(0, 255, (90, 120, 3)).astype(np.uint8)
    assert split_image(picture) == [PanelBox(0, 0, 120, 90)]
    assert [box.confidence for box in split_image(picture, 2)] == [0.0]
    with pytest.raises(ValueError, match="uint8"):
        split_image(picture.astype(float))


def test_letters_are_given_only_where_counts_agree():
    boxes = split_image(grid(1, 2), 2)
    assert [box.letter for box in match_panels(boxes, ["A", "B"])] == ["A", "B"]
    assert match_panels(boxes, ["A", "B", "C"]) == []


def pair(picture, caption="Two. (A) Left lung. (B) Right lung.", licence="CC BY"):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return Pair(
        key="pmc-1-v1-f1-p0", image=buffer.getvalue(), image_format="png", width=picture.shape[1],
        height=picture.shape[0], caption=caption, source="pmc", licence=licence, phash=0,
        sha256=hashlib.sha256(buffer.getvalue()).hexdigest(), article_id="PMC1.1", figure_id="f1",
    )  # fmt: skip


def test_a_figure_becomes_pairs_that_name_their_parent():
    picture = grid(1, 2)
    panels = split_figure_pair(pair(picture), picture)
    assert [panel.panel for panel in panels] == ["A", "B"]
    assert "Left lung" in panels[0].caption
    assert "Right lung" not in panels[0].caption
    assert all("pmc-1-v1-f1-p0" in str(panel.sidecar) for panel in panels)
    assert len({panel.key for panel in panels}) == 2
    cut = np.asarray(Image.open(io.BytesIO(panels[1].image)))
    assert cut.shape == (panels[1].height, panels[1].width, 3)


def test_a_licence_without_derivatives_is_never_cut():
    picture = grid(1, 2)
    assert split_figure_pair(pair(picture, licence="CC BY-ND"), picture) == []
    assert split_figure_pair(pair(picture, licence="TDM"), picture) == []


def test_boxes_of_a_detector_replace_our_own(tmp_path):
    path = tmp_path / "boxes.jsonl"
    path.write_text(
        '{"key": "pmc-1-v1-f1-p0", "boxes": [{"box": [0, 0, 30, 80], "letter": "a"}, '
        '{"box": [30, 0, 60, 80], "letter": "B", "confidence": 0.9}]}\n'
    )
    boxes = read_boxes(path)["pmc-1-v1-f1-p0"]
    panels = split_figure_pair(pair(grid(1, 2)), grid(1, 2), boxes=boxes)
    assert [(p.panel, p.width, p.height) for p in panels] == [("A", 30, 80), ("B", 30, 80)]
    with pytest.raises(DataError, match="outside of its picture"):
        split_figure_pair(pair(grid(1, 2)), grid(1, 2), boxes=[PanelBox(0, 0, 999, 10), PanelBox(0, 0, 9, 9)])


@pytest.mark.parametrize("line", ["{", '{"key": "a"}', '{"key": "A.b", "boxes": []}',
                                  '{"key": "a", "boxes": [{"box": [5, 0, 1, 9]}]}'])  # fmt: skip
def test_a_bad_line_of_boxes_is_named(tmp_path, line):
    path = tmp_path / "boxes.jsonl"
    path.write_text(f'{{"key": "ok", "boxes": []}}\n{line}\n')
    with pytest.raises(DataError, match=r"boxes\.jsonl:2"):
        read_boxes(path)


@pytest.mark.slow
def test_hand_checked_figures_of_the_sample_are_taken_apart_as_well_as_promised():
    spec = importlib.util.spec_from_file_location("bench_panels", BENCH)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    rates = bench.measure()
    assert rates["figures"] >= 90
    assert (rates["letter_precision"], rates["letter_recall"]) >= (0.98, 0.97)
    assert rates["panel_precision"] >= 0.8
    assert rates["panel_recall"] >= 0.8
    assert rates["cut_precision"] >= 0.9
