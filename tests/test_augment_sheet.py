"""The contact sheet shows what training would see, and says what it could not show."""

import numpy as np
import pytest
from PIL import Image
from synthetic_shards import write_captions, write_colours
from typer.testing import CliRunner

from biomedclip.cli import app
from biomedclip.errors import ConfigError, DataError
from biomedclip.shards import DatasetFolder
from biomedclip.stream.augment import augment
from biomedclip.stream.augment_sheet import find_originals, write_sheet
from biomedclip.stream.decode import Geometry, decode_exact, read_reduced
from biomedclip.stream.presets import find_preset


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("sheet") / "colours")


def test_the_picture_holds_the_pixels_of_evaluation_and_of_training(colours, tmp_path):
    sheet = write_sheet(colours, tmp_path / "sheet.png", samples=2, views=3, size_px=32, seed=5)
    assert (sheet.rows, sheet.unreadable) == (2, ())
    with Image.open(sheet.path) as image:
        pixels = np.asarray(image.convert("RGB"))
    (first, _), geometry, change = find_originals(colours, 2, 5), Geometry(size_px=32), find_preset("photograph")
    picture = read_reduced(first.data, "png", geometry, change)
    views = [
        augment(picture, geometry, change, facts=(5, "sheet", first.name, epoch), caption=first.caption)
        for epoch in range(3)
    ]
    tops = {
        (y, x)
        for wanted in (decode_exact(first.data, geometry), *views)
        for y in range(80)
        for x in range(6, pixels.shape[1] - 32, 38)
        if np.array_equal(pixels[y : y + 32, x : x + 32], wanted)
    }
    assert {x for _, x in tops} == {6, 44, 82, 120}
    assert len({y for y, _ in tops}) == 1


def test_the_page_shows_captions_as_text_and_says_what_is_not_mirrored(tmp_path):
    folder = write_captions(tmp_path / "set", ["<b>Left</b> lung & heart", "A cell"])
    page = write_sheet(folder, tmp_path / "sheet.html", preset="photograph", views=2).path.read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * 3
    assert "&lt;b&gt;Left&lt;/b&gt; lung &amp; heart" in page
    assert "<b>Left" not in page
    assert page.count("not mirrored") == 1
    assert "http" not in page.replace("http-equiv", "")


def test_pictures_are_of_different_labels_and_chosen_by_seed(colours):
    labels = {row["key"]: row["labels"][0] for row in DatasetFolder(colours).index.to_pylist()}
    found = find_originals(colours, 3, 0)
    assert {labels[original.name] for original in found} == {"red", "green", "blue"}
    assert found == find_originals(colours, 3, 0)
    assert found != find_originals(colours, 3, 1)


def test_files_are_shown_too_and_those_that_are_none_are_named(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes(b"nothing")
    (tmp_path / "notes.txt").write_text("no picture")
    sheet = write_sheet(tmp_path, tmp_path / "out" / "s.png", preset="radiology", size_px=32)
    assert sheet.rows == 1
    assert len(sheet.unreadable) == 1
    assert "b.png" in sheet.unreadable[0]
    assert write_sheet(tmp_path / "a.jpg", tmp_path / "out" / "one.html").rows == 1
    with pytest.raises(DataError, match="no picture that can be read"):
        write_sheet(tmp_path / "b.png", tmp_path / "s.png")


def test_what_cannot_be_shown_is_refused(colours, tmp_path):
    with pytest.raises(ConfigError, match=r"neither \.html nor \.png"):
        write_sheet(colours, tmp_path / "sheet.jpg")
    with pytest.raises(ConfigError, match="is no preset"):
        write_sheet(colours, tmp_path / "sheet.png", preset="radiolgy")
    with pytest.raises(DataError, match="no such"):
        write_sheet(tmp_path / "none", tmp_path / "sheet.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither a dataset nor pictures"):
        write_sheet(tmp_path / "empty", tmp_path / "sheet.png")


def test_the_commands_show_presets_sheets_and_entries(colours, tmp_path):
    runner = CliRunner()
    listed = runner.invoke(app, ["data", "augmentations"]).stdout
    assert "radiology" in listed
    assert "bias_field" in listed
    out = tmp_path / "sheet.html"
    shown = runner.invoke(app, ["data", "augmentations", str(colours), "--out", str(out), "--samples", "2"])
    assert shown.stdout == f"{out}: 2 pictures, 6 views of each\n"
    (tmp_path / "terms.txt").write_text("red\nsquare\nviolet\n")
    table = tmp_path / "entries.parquet"
    counted = runner.invoke(
        app, ["data", "entries", str(colours), "--terms", str(tmp_path / "terms.txt"), "--out", str(table)]
    )
    assert "3 entries, 2 of them said; tail 0.06 is t = 6" in counted.stdout
    # Of 18 captions 6 say red (kept surely) and all say square (a third of them kept): 6 + 12 / 3.
    assert "an epoch keeps 10 of 18 captions (55.6%); 0.0% say no entry" in counted.stdout
    assert f"keep: {{metaclip: {{entries: {table}, tail: 0.06}}}}" in counted.stdout
