"""Files as users have them, good and bad, to pictures or one clear line each."""

import gzip
import os
import struct
import zlib

import numpy as np
import pytest
from layout_sets import write_dicom
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from pydicom.data import get_testdata_file

from biomedclip.app import pictures, slides
from biomedclip.app.pictures import Source, find_sources, list_samples, parse_window, show_deep, spread
from biomedclip.app.slides import find_levels, read_large_tiff
from biomedclip.errors import ConfigError
from biomedclip.images import BadImage
from biomedclip.windows import Grey

RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8))


def read(path, grey=None, **kw):
    return list(Source(name=path.name, path=path, grey=grey or Grey()).read(**kw))


def read_one(path, grey=None, **kw):
    found = read(path, grey, **kw)
    assert len(found) == 1
    return found[0]


def reason(path, grey=None):
    picture = read_one(path, grey)
    assert picture.image is None
    assert "\n" not in picture.refused
    return picture.refused


def values(picture):
    assert picture.refused == ""
    assert picture.image.mode == "RGB"
    return np.asarray(picture.image).astype(int)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.webp", "no-ending"])
def test_a_picture_is_read_by_its_bytes_whatever_its_name(tmp_path, name):
    NOISE.save(tmp_path / name, {"a.tif": "TIFF", "a.bmp": "BMP", "a.webp": "WEBP"}.get(name, "PNG"), lossless=True)
    assert (values(read_one(tmp_path / name)) == np.asarray(NOISE)).all()


def test_text_called_jpg_an_empty_file_and_a_cut_one_are_one_line_each(tmp_path):
    (tmp_path / "text.jpg").write_text("not a picture at all")
    (tmp_path / "empty.jpg").write_bytes(b"")
    NOISE.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    assert reason(tmp_path / "text.jpg").startswith("is no picture, whatever its name says (begins with b'not a pictur")
    assert reason(tmp_path / "empty.jpg") == "is empty"
    assert reason(tmp_path / "cut.png").startswith("is damaged")
    assert reason(tmp_path / "gone.jpg") == "cannot be opened: no such file or directory"
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "no regular file" in reason(tmp_path / "pipe.jpg")


def test_sixteen_bits_need_a_window_and_get_it(tmp_path):
    deep = np.linspace(0, 4095, 600).reshape(20, 30).astype(np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert "say which values are black and white with --window" in reason(tmp_path / name)
        shown = values(read_one(tmp_path / name, parse_window("1024,2048")))
        assert shown[0, 0, 0] == 0
        assert shown[-1, -1, 0] == 255
        assert 120 < shown[deep == deep[5, 0]][0, 0] < 130
        cut = values(read_one(tmp_path / name, parse_window("percentile")))
        assert cut.min() == 0
        assert cut.max() == 255


def test_grey_of_floats_with_nan_is_shown_by_percentiles():
    deep = np.full((8, 8), np.nan, np.float32)
    deep[0] = np.arange(8)
    assert np.asarray(show_deep(deep, parse_window("percentile"))).max() == 255


@pytest.mark.parametrize("text", ["lungs", "40", "40,0", "a,b", "1,2,3", "nan,nan", ""])
def test_a_window_that_is_none_is_a_config_error(text):
    with pytest.raises(ConfigError, match=r"--window: is no window .* give CENTRE,WIDTH, percentile, or one of"):
        parse_window(text)


def test_windows_by_name_and_number():
    assert parse_window("lung").window == (-600, 1500)
    assert parse_window("40,80").window == (40, 80)
    assert parse_window(None) == Grey()


def test_cmyk_palettes_alpha_and_orientation_become_plain_rgb(tmp_path):
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    red = values(read_one(tmp_path / "cmyk.jpg"))[10, 10]
    assert red[0] > 200
    assert max(red[1:]) < 60
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    clear.save(tmp_path / "alpha.png")
    assert (values(read_one(tmp_path / "alpha.png")) == 255).all()
    NOISE.quantize(8).save(tmp_path / "palette.gif")
    assert values(read_one(tmp_path / "palette.gif")).shape == (30, 40, 3)
    turned = Image.new("RGB", (40, 20))
    turned.paste((255, 255, 255), (0, 0, 40, 5))  # the upper edge is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise, which brings the upper edge to the right
    turned.save(tmp_path / "turned.jpg", exif=exif)
    shown = values(read_one(tmp_path / "turned.jpg"))
    assert shown.shape[:2] == (40, 20)
    assert shown[:, -3:].mean() > 200
    assert shown[:, :10].mean() < 60


def test_of_animations_and_pages_the_first_is_shown_and_said(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    for name in ("moving.gif", "pages.tif"):
        picture = read_one(tmp_path / name)
        assert values(picture)[8, 8].tolist() == [255, 0, 0]
        assert picture.note == "the first of several pictures in it"


def test_a_dicom_file_of_several_frames_gives_rows_by_number(tmp_path, monkeypatch):
    stack = np.zeros((5, 8, 8), np.uint8)
    for number in range(5):
        stack[number] = number * 50
    write_dicom(tmp_path / "loop.dcm", stack, NumberOfFrames=5)
    found = read(tmp_path / "loop.dcm")
    assert [picture.frame for picture in found] == [0, 1, 2, 3, 4]
    assert [int(values(picture).mean()) for picture in found] == [0, 50, 100, 150, 200]
    monkeypatch.setattr(pictures, "MAX_FRAMES", 2)
    found = read(tmp_path / "loop.dcm")
    assert [(picture.frame, picture.note) for picture in found] == [(1, "2 of 5 frames"), (3, "2 of 5 frames")]


def test_dicom_without_a_window_or_without_pixels_says_so(tmp_path):
    write_dicom(tmp_path / "deep.dcm", np.arange(64, dtype=np.uint16).reshape(8, 8) * 60, BitsStored=12)
    assert "no window: say which values are black and white with --window" in reason(tmp_path / "deep.dcm")
    assert values(read_one(tmp_path / "deep.dcm", parse_window("percentile"))).max() == 255
    assert "in HU applies" in reason(tmp_path / "deep.dcm", parse_window("lung"))
    small = pictures.Path(get_testdata_file("CT_small.dcm"))
    assert values(read_one(small, parse_window("lung"))).shape == (128, 128, 3)
    whole = (tmp_path / "deep.dcm").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:-20])
    assert reason(tmp_path / "cut.dcm", parse_window("percentile")).startswith("is a damaged DICOM file")
    (tmp_path / "head.dcm").write_bytes(whole[:140])
    assert "DICOM" in reason(tmp_path / "head.dcm")


@pytest.mark.slow  # MONAI takes seconds to import
def test_a_volume_gives_slices_of_its_middle(tmp_path):
    import nibabel

    block = np.zeros((10, 12, 20), np.int16)
    block[:] = np.arange(20) * 10
    nibabel.save(nibabel.Nifti1Image(block, np.diag([-1.0, -1.0, 1.0, 1.0])), tmp_path / "scan.nii.gz")
    found = read(tmp_path / "scan.nii.gz")
    assert [picture.frame for picture in found] == [4, 6, 7, 9, 10, 12, 13, 15]
    assert found[0].note == "8 of 20 axial slices, grey by percentiles of the volume"
    means = [values(picture).mean() for picture in found]
    assert means == sorted(means)
    assert means[0] < 60 < 180 < means[-1]
    windowed = read(tmp_path / "scan.nii.gz", parse_window("100,10"))
    assert values(windowed[0]).max() == 0
    assert values(windowed[-1]).min() == 255


def test_what_is_no_volume_is_one_line(tmp_path):
    import nibabel

    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), np.eye(4)), tmp_path / "time.nii")
    assert "more or fewer than three dimensions" in reason(tmp_path / "time.nii")
    (tmp_path / "broken.nii.gz").write_bytes(gzip.compress(b"no volume" * 9))
    assert reason(tmp_path / "broken.nii.gz") == "is a damaged volume"
    header = nibabel.Nifti1Header()
    header.set_data_shape((4000, 4000, 4000))
    header["magic"], header["vox_offset"] = b"n+1", 352
    (tmp_path / "bomb.nii").write_bytes(header.binaryblock + bytes(4))
    assert reason(tmp_path / "bomb.nii") == "is a volume larger than is read at once"


def fake_png(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_a_bomb_says_the_limit_and_how_to_go_on(tmp_path):
    (tmp_path / "bomb.png").write_bytes(fake_png(30_000, 30_000))
    said = reason(tmp_path / "bomb.png")
    assert "more than the 80 million pixels that are decoded at once" in said
    assert "vips tiffsave" in said


def test_a_large_jpeg_is_scaled_while_it_is_decoded(tmp_path, monkeypatch):
    picture = NOISE.resize((2400, 1800), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "large.jpg", quality=90)
    monkeypatch.setattr("biomedclip.images.MAX_PIXELS", 2_000_000)
    monkeypatch.setattr(pictures, "LARGE_SIDE_PX", 400)
    found = read_one(tmp_path / "large.jpg")
    assert found.image.size == (600, 450)
    assert found.note == "read at a reduced size, 600 x 450 px"
    assert np.abs(values(found) - np.asarray(picture.reduce(4)).astype(int)).mean() < 3
    picture.save(tmp_path / "stages.jpg", progressive=True)
    # libjpeg holds all of a progressive picture however small it comes out.
    assert "million pixels" in reason(tmp_path / "stages.jpg")


def test_fast_reading_keeps_what_the_model_needs(tmp_path):
    picture = NOISE.resize((800, 600), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "a.jpg", quality=95)
    picture.save(tmp_path / "a.png")
    assert read_one(tmp_path / "a.jpg", at_least_px=128).image.size == (200, 150)
    assert read_one(tmp_path / "a.jpg", at_least_px=600).image.size == (800, 600)
    assert read_one(tmp_path / "a.png", at_least_px=128).image.size == (800, 600)


def save_tiled(path, picture, side):
    """A TIFF of deflated tiles, as slide scanners write them, which Pillow does not."""
    across, down = -(-picture.width // side), -(-picture.height // side)
    tiles = []
    for number in range(across * down):
        left, top = number % across * side, number // across * side
        tiles.append(zlib.compress(picture.crop((left, top, left + side, top + side)).tobytes()))
    ends = 8 + np.cumsum([0, *map(len, tiles)])
    directory = ImageFileDirectory_v2()
    facts = {256: picture.width, 257: picture.height, 258: (8, 8, 8), 259: 8, 262: 2, 277: 3, 322: side, 323: side}
    for tag, value in (facts | {324: tuple(map(int, ends[:-1])), 325: tuple(map(len, tiles))}).items():
        directory.tagtype[tag] = 4 if tag >= 324 else 3
        directory[tag] = value
    path.write_bytes(
        struct.pack("<2sHI", b"II", 42, int(ends[-1])) + b"".join(tiles) + directory.tobytes(int(ends[-1]))
    )


WAYS = {
    "raw": {}, "one strip": {"strip_size": 1 << 30}, "lzw": {"compression": "tiff_lzw"},
    "jpeg": {"compression": "jpeg", "quality": 95}, "packbits": {"compression": "packbits"},
}  # fmt: skip


@pytest.mark.parametrize("way", [*WAYS, "tiled"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_flat_slide_is_averaged_band_by_band(tmp_path, monkeypatch, way, mode):
    picture = NOISE.resize((1234, 857), Image.Resampling.BICUBIC).convert(mode)
    if way == "tiled":
        picture = picture.convert("RGB")
        save_tiled(tmp_path / "slide.tif", picture, 96)
        with Image.open(tmp_path / "slide.tif") as check:
            assert (np.asarray(check) == np.asarray(picture)).all()
    else:
        picture.save(tmp_path / "slide.tif", **WAYS[way])
    monkeypatch.setattr(slides, "_BAND_PIXELS", 40_000)
    monkeypatch.setattr(slides, "MAX_PIXELS", 300_000)  # the whole would be a million
    shown, note = read_large_tiff(tmp_path / "slide.tif", 200)
    assert note == "1234 x 857 px read at 1/4"
    wanted = np.asarray(picture.convert("RGB").reduce(4)).astype(int)
    assert np.abs(np.asarray(shown).astype(int) - wanted).max() <= (3 if way == "jpeg" else 0)


def test_of_a_pyramid_the_smallest_level_that_is_large_enough_is_read(tmp_path, monkeypatch):
    picture = NOISE.resize((1600, 1200), Image.Resampling.BICUBIC)
    levels = [picture.reduce(factor) for factor in (2, 4, 8)]
    label = Image.new("RGB", (300, 300), "red")
    picture.save(tmp_path / "slide.tif", save_all=True, append_images=[*levels, label], compression="tiff_lzw")
    with (tmp_path / "slide.tif").open("rb") as file:
        assert [int(level[256]) for level in find_levels(file)] == [1600, 800, 400, 200]
    shown, note = read_large_tiff(tmp_path / "slide.tif", 250)
    assert (np.asarray(shown) == np.asarray(levels[1])).all()
    assert note == "1600 x 1200 px read at 1/4"
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1_000_000)
    monkeypatch.setattr(pictures, "LARGE_SIDE_PX", 250)
    assert read_one(tmp_path / "slide.tif").note == note


def test_a_slide_that_lies_about_itself_is_one_line(tmp_path):
    NOISE.save(tmp_path / "slide.tif")
    whole = (tmp_path / "slide.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[:-200])
    with pytest.raises(BadImage, match="broken_image"):
        read_large_tiff(tmp_path / "cut.tif", 10)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in RNG.integers(0, 200, 4):
            damaged[place] = RNG.integers(256)
        (tmp_path / "damaged.tif").write_bytes(damaged)
        for picture in read(tmp_path / "damaged.tif"):
            assert (picture.image is None) == bool(picture.refused)


@pytest.mark.slow
def test_a_slide_of_thirty_thousand_pixels_stays_within_half_a_gigabyte(tmp_path):
    import subprocess
    import sys

    row = np.tile(np.arange(30_000, dtype=np.uint8)[None, :, None], (100, 1, 3))
    strip = zlib.compress(row.tobytes(), 1)
    starts = [8 + number * len(strip) for number in range(300)]
    at = 8 + 300 * len(strip)  # arrays first, then the directory
    arrays = struct.pack("<3H", 8, 8, 8), struct.pack("<300I", *starts), struct.pack("<300I", *[len(strip)] * 300)
    places = [at, at + 6, at + 1206]
    entries = [
        (256, 4, 1, 30_000), (257, 4, 1, 30_000), (258, 3, 3, places[0]), (259, 3, 1, 8), (262, 3, 1, 2),
        (273, 4, 300, places[1]), (277, 3, 1, 3), (278, 4, 1, 100), (279, 4, 300, places[2]),
    ]  # fmt: skip
    with (tmp_path / "slide.tif").open("wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, at + 2406) + strip * 300 + b"".join(arrays))
        file.write(struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries))
        file.write(bytes(4))
    # VmHWM, not ru_maxrss, which begins with what the parent held when it started this process.
    script = (
        "from pathlib import Path; from biomedclip.app.pictures import Source\n"
        f"p = next(Source(name='s', path=Path({str(tmp_path / 'slide.tif')!r})).read())\n"
        "peak = Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]\n"
        "print(p.image and p.image.size, p.refused, int(peak) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    size, rest = done.stdout.rsplit(")", 1)
    assert size == "(1035, 1035"
    assert int(rest) < 512


def test_folders_patterns_and_samples_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.jpg", "deep/c.tif"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        NOISE.save(path)
    write_dicom(tmp_path / "deep" / "IM0001", np.zeros((8, 8), np.uint8))
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "other.csv").write_text("a,b")
    (tmp_path / "link.png").symlink_to(tmp_path / "b.png")
    (tmp_path / ".hidden.png").write_text("")
    found = find_sources([".", "sample://xray", "a.jpg"])
    assert [source.name for source in found.files] == ["a.jpg", "b.png", "deep/IM0001", "deep/c.tif", "sample://xray"]
    assert found.passed_over == {".csv": 2, "link": 1, ".txt": 1}
    assert [source.name for source in find_sources(["**/*.tif", "[ab].*"]).files] == ["deep/c.tif", "a.jpg", "b.png"]
    (tmp_path / "odd[1].png").write_bytes((tmp_path / "b.png").read_bytes())
    assert [source.name for source in find_sources(["odd[1].png"]).files] == ["odd[1].png"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("*.nothing", "fits no file"), ("empty", "holds no pictures"), ("sample://xrai", "did you mean sample://xray"),
     ("sample://q", "use one of sample://blood_cell"), ("https://example.org/a.png", "nothing is downloaded here")],
)  # fmt: skip
def test_names_that_lead_nowhere_are_config_errors(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=said):
        find_sources([name])


def test_the_bundled_pictures_are_small_attributed_and_readable():
    samples = list_samples()
    assert set(samples) == {"blood_cell", "xray", "xray_normal", "figure"}
    attribution = (samples["xray"].parent / "ATTRIBUTION.md").read_text()
    for name, path in samples.items():
        assert f"`{name}`" in attribution
        assert path.stat().st_size < 30_000
        assert read_one(path).image is not None


def test_spread_takes_the_middles_of_equal_parts():
    assert spread(0, 3, 5) == [0, 1, 2]
    assert spread(0, 100, 4) == [12, 37, 62, 87]
    assert spread(10, 20, 1) == [15]
