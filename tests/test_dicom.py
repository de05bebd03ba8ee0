"""DICOM to pictures: pydicom's own files against pydicom's own pipeline, and made-up ones for what those lack."""

import io
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest
from layout_sets import write_dicom
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, JPEGBaseline8Bit

from biomedclip.dicom import read_facts, render_frame
from biomedclip.errors import ConfigError, DataError
from biomedclip.images import BadImage
from biomedclip.layouts import read_bytes, read_manifest, read_rgb
from biomedclip.layouts.manifest import hash_id
from biomedclip.windows import WINDOWS, Grey, apply_window, parse_grey, scale

SHIPPED = Path(pydicom.data.__file__).parent / "test_files"
FILES = sorted(path for path in SHIPPED.rglob("*") if path.is_file())
IDENTIFIERS = ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "StudyInstanceUID",
               "SeriesInstanceUID", "SOPInstanceUID", "StudyDate")  # fmt: skip
REFUSED = {
    "CT_small.dcm": "needs_window", "JPEG-lossy.dcm": "needs_window", "JPEG2000.dcm": "needs_window",
    "JPEG2000-embedded-sequence-delimiter.dcm": "needs_window", "JPEGLSNearLossless_16.dcm": "needs_window",
    "JPGExtended.dcm": "needs_window", "MR_truncated.dcm": "broken_dicom",
    "badVR.dcm": "not_a_picture", "liver_1frame.dcm": "not_a_picture", "liver_expb_1frame.dcm": "not_a_picture",
    "UN_sequence.dcm": "no_pixels", "meta_missing_tsyntax.dcm": "no_pixels", "nested_priv_SQ.dcm": "no_pixels",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    """pydicom warns of what its files do wrong on purpose; ours must be quiet by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def expect(path, frame):
    """The frame by pydicom's own functions, scaled to 8 bits by the range they document."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(path)
        stored = ds.pixel_array
        stored = stored[frame] if int(ds.get("NumberOfFrames") or 1) > 1 else stored
        if ds.PhotometricInterpretation == "PALETTE COLOR":
            coloured = apply_color_lut(stored, ds)
            return coloured if coloured.dtype == np.uint8 else (coloured >> 8).astype(np.uint8)
        if stored.ndim == 3:
            return (stored >> (ds.BitsStored - 8)).astype(np.uint8)
        low, high = (-(2 ** (ds.BitsStored - 1)), 2 ** (ds.BitsStored - 1) - 1) if ds.PixelRepresentation else (
            0, 2**ds.BitsStored - 1)  # fmt: skip
        slope, intercept = ds.get("RescaleSlope"), ds.get("RescaleIntercept")
        if slope is not None and intercept is not None:
            low, high = low * slope + intercept, high * slope + intercept
        shown = apply_voi_lut(apply_modality_lut(stored, ds), ds).astype(np.float64)
    grey = np.rint((shown - low) / (high - low) * 255).astype(np.uint8)
    return np.stack([255 - grey if ds.PhotometricInterpretation == "MONOCHROME1" else grey] * 3, -1)


def outcome(path):
    """The first frames as pictures, or the reason why there are none."""
    try:
        return [np.asarray(render_frame(path, frame)) for frame in range(min(read_facts(path).frames, 3) or 1)], None
    except BadImage as error:
        return [], error.reason


def has_picture(path):
    """Whether pydicom itself finds one; doses are arrays, and no pictures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ds = pydicom.dcmread(path)
            return ds.pixel_array.size > 0 and ds.get("Modality") != "RTDOSE"
        except Exception:
            return False


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SHIPPED).as_posix())
def test_every_file_that_ships_with_pydicom_is_shown_as_it_shows_it_or_refused(path):
    frames, reason = outcome(path)
    if path.name in REFUSED:
        assert reason == REFUSED[path.name]
    elif reason:
        assert reason in ("not_dicom", "no_pixels", "not_a_picture")
        assert not has_picture(path)
    for number, frame in enumerate(frames):
        difference = np.abs(frame.astype(int) - expect(path, number))
        assert difference.max() <= 1  # of rounding
        assert (difference > 0).mean() < 0.01


def test_enough_of_the_shipped_files_are_shown():
    shown = 0
    for path in FILES:
        try:
            render_frame(path)
            shown += 1
        except BadImage:
            pass
    assert shown >= 65


# made-up files


def grey(path, frame=0, **options):
    return np.asarray(render_frame(path, frame, Grey(**options)))[..., 0]


RAMP = np.arange(64, dtype=np.int16).reshape(8, 8)


def test_a_window_in_hu_follows_the_rescale(tmp_path):
    stored = (RAMP * 32).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", stored, RescaleSlope=1, RescaleIntercept=-1024)
    shown = grey(path, window=WINDOWS["lung"])
    hu = stored.astype(float) - 1024
    assert np.array_equal(shown, np.rint(np.clip((hu - -600.5) / 1499 + 0.5, 0, 1) * 255).astype(np.uint8))
    assert grey(path, window=(40, 400)).max() == 255


def test_grey_without_a_window_is_refused_unless_a_percentile_is_asked(tmp_path):
    stored = np.concatenate([RAMP.ravel() * 10, np.full(8, 30_000)]).astype(np.int16).reshape(9, 8)
    path = write_dicom(tmp_path / "a.dcm", stored, Modality="DX", PixelPaddingValue=None)
    with pytest.raises(BadImage, match="needs_window"):
        render_frame(path)
    assert read_facts(path).refused == "needs_window"
    assert read_facts(path, Grey(percentile=(0, 88))).refused is None
    shown = grey(path, percentile=(0, 88))
    assert (shown[0, 0], shown[-1, -1]) == (0, 255)
    assert len(np.unique(shown)) > 50
    padded = write_dicom(tmp_path / "b.dcm", stored, Modality="DX", PixelPaddingValue=30_000)
    assert grey(padded, percentile=(0, 100))[7, 7] == 255  # what only pads does not count


def test_a_window_in_hu_is_for_ct_alone(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", RAMP, Modality="MR", WindowCenter=30, WindowWidth=60)
    with pytest.raises(BadImage, match="window_hu_needs_ct"):
        render_frame(path, 0, Grey(window=WINDOWS["brain"]))
    unscaled = write_dicom(tmp_path / "b.dcm", RAMP)
    assert read_facts(unscaled, Grey(window=(40, 80))).refused == "window_hu_needs_ct"


def test_monochrome1_is_turned_over(tmp_path):
    values = {"WindowCenter": 32, "WindowWidth": 64, "Modality": "CR"}
    white = grey(write_dicom(tmp_path / "a.dcm", RAMP, **values))
    black = grey(write_dicom(tmp_path / "b.dcm", RAMP, PhotometricInterpretation="MONOCHROME1", **values))
    assert np.array_equal(white, 255 - black)


@pytest.mark.parametrize(("function", "middle"), [("LINEAR", 129), ("LINEAR_EXACT", 128), ("SIGMOID", 128)])
def test_windows_of_every_function_and_the_first_of_several(tmp_path, function, middle):
    path = write_dicom(tmp_path / "a.dcm", RAMP, Modality="MR", WindowCenter=[32, 900], WindowWidth=[64, 10],
                       VOILUTFunction=function)  # fmt: skip
    shown = grey(path)
    assert abs(int(shown[4, 0]) - middle) <= 2
    assert shown[0, 0] < 32  # a sigmoid never quite gets there
    assert shown[7, 7] > 222


@pytest.mark.parametrize("values", [{"WindowWidth": 0}, {"WindowWidth": 0.5}, {"VOILUTFunction": "CUBIC"}])
def test_a_window_that_is_none_is_refused(tmp_path, values):
    path = write_dicom(tmp_path / "a.dcm", RAMP, **({"WindowCenter": 5, "WindowWidth": 9} | values))
    with pytest.raises(BadImage, match="bad_window"):
        render_frame(path)


def lut(entries, first, bits, vr="US"):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", vr, list(entries) if vr == "US" else struct.pack(f"<{len(entries)}H", *entries))
    return [item]


@pytest.mark.parametrize("vr", ["US", "OW"])
def test_voi_and_modality_tables_are_looked_up(tmp_path, vr):
    stored = (RAMP * 40).astype(np.uint16)
    table = lut([i * i // 16 % 256 for i in range(64)], 100, 8, vr)
    path = write_dicom(tmp_path / "a.dcm", stored, Modality="MG", BitsStored=12, VOILUTSequence=table)
    # 8-bit entries and 12-bit pixels: pydicom's own lookup wraps around here.
    expected = np.array([i * i // 16 % 256 for i in range(64)])[np.clip(stored.astype(int) - 100, 0, 63)]
    assert np.array_equal(grey(path), expected)
    table = lut([i // 2 for i in range(64)], 0, 16, vr)
    halved = write_dicom(tmp_path / "b.dcm", RAMP.astype(np.uint16), ModalityLUTSequence=table, WindowCenter=16.5,
                         WindowWidth=32)  # fmt: skip
    plain = write_dicom(tmp_path / "c.dcm", (RAMP // 2).astype(np.uint16), WindowCenter=16.5, WindowWidth=32)
    assert np.array_equal(grey(halved), grey(plain))


def test_frames_of_an_enhanced_file_have_windows_of_their_own(tmp_path):
    def group(centre):
        item, voi, rescale = Dataset(), Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = centre, 64
        rescale.RescaleSlope, rescale.RescaleIntercept = 1, 0
        item.FrameVOILUTSequence, item.PixelValueTransformationSequence = [voi], [rescale]
        return item

    path = write_dicom(
        tmp_path / "a.dcm", np.stack([RAMP, RAMP]), PerFrameFunctionalGroupsSequence=[group(32), group(96)]
    )
    assert read_facts(path).frames == 2
    assert grey(path, 0).mean() > 100
    assert grey(path, 1).mean() < 20
    assert read_facts(path, Grey(window=(40, 80))).refused is None  # the rescale stands in the groups
    with pytest.raises(BadImage, match="no_such_frame: 2 of 2"):
        render_frame(path, 2)


@pytest.mark.parametrize(("bits", "signed"), [(8, 0), (6, 0), (8, 1)])
def test_shallow_grey_needs_no_window(tmp_path, bits, signed):
    low = -(1 << bits - 1) if signed else 0
    stored = np.arange(low, low + 64).reshape(8, 8).astype(np.int8 if signed else np.uint8)
    shown = grey(write_dicom(tmp_path / "a.dcm", stored, BitsStored=bits, Modality="US"))
    assert np.array_equal(shown, np.rint((stored.astype(int) - low) / ((1 << bits) - 1) * 255))


def test_colour_planes_depths_and_byte_orders_come_out_alike(tmp_path):
    colour = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    plain = write_dicom(tmp_path / "a.dcm", colour)
    planes = tmp_path / "b.dcm"
    ds = pydicom.dcmread(plain)
    ds.PlanarConfiguration, ds.PixelData = 1, colour.transpose(2, 0, 1).tobytes()
    ds.save_as(planes)
    deep = write_dicom(tmp_path / "c.dcm", colour.astype(np.uint16) << 4, BitsStored=12)
    big = write_dicom(tmp_path / "d.dcm", colour, syntax=ExplicitVRBigEndian)
    for path in (plain, planes, deep, big):
        assert np.array_equal(np.asarray(render_frame(path)), colour), path.name


# bombs and damage


def test_sizes_that_only_a_header_states_are_refused_before_decoding(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8))
    for values, reason in [
        ({"Rows": 60_000, "Columns": 60_000}, "image_bomb"), ({"NumberOfFrames": 2_000_000_000}, "image_bomb"),
        ({"NumberOfFrames": 50}, "cut_short"), ({"Rows": 0}, "no_pixels"),
        ({"PhotometricInterpretation": "CMYK"}, "unsupported_photometric"),
    ]:  # fmt: skip
        ds = pydicom.dcmread(path)
        for key, value in values.items():
            setattr(ds, key, value)
        ds.save_as(tmp_path / "b.dcm")
        assert read_facts(tmp_path / "b.dcm").refused == reason
        with pytest.raises(BadImage, match=reason):
            render_frame(tmp_path / "b.dcm")


def test_a_jpeg_larger_than_its_header_says_is_no_way_in(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (4000, 3000)).save(buffer, "JPEG")
    path = write_dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), syntax=JPEGBaseline8Bit,
                       encapsulated=encapsulate([buffer.getvalue()]))  # fmt: skip
    with pytest.raises(BadImage, match="broken_dicom"):
        render_frame(path)


def test_a_deflated_file_that_never_ends_is_refused(tmp_path, monkeypatch):
    path = write_dicom(tmp_path / "a.dcm", RAMP.astype(np.uint8), syntax=DeflatedExplicitVRLittleEndian)
    assert np.array_equal(grey(path), RAMP)
    data = path.read_bytes()
    start = 132 + 12 + struct.unpack("<I", data[140:144])[0]
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    (tmp_path / "bomb.dcm").write_bytes(data[:start] + bomb)
    monkeypatch.setattr("biomedclip.dicom.MAX_INFLATED_BYTES", 8 << 20)
    with pytest.raises(BadImage, match="deflate_bomb"):
        read_facts(tmp_path / "bomb.dcm")


@pytest.mark.parametrize(
    "name", ["MR_small.dcm", "examples_palette.dcm", "SC_rgb_jpeg_dcmtk.dcm", "MR_small_RLE.dcm", "image_dfl.dcm"]
)
def test_no_damaged_byte_escapes_as_another_error(tmp_path, name):
    data, path = (SHIPPED / name).read_bytes(), tmp_path / "x.dcm"
    random = np.random.default_rng(1)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(data)
        for position in random.integers(128, min(len(data), 3000), 3):
            damaged[position] = random.integers(0, 256)
        path.write_bytes(damaged[: None if random.random() < 0.7 else random.integers(200, len(data))])
        try:
            read_facts(path, Grey(percentile=(1, 99)))
            render_frame(path, 0, Grey(percentile=(1, 99)))
            outcomes.add("shown")
        except BadImage as error:
            outcomes.add(error.reason)
    assert len(outcomes) > 1


# options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_hu": "longs"}, r"layout.window_hu: is no window \(found 'longs'\); use one of abdomen"),
        ({"window_hu": [40]}, r"is no \[centre, width\]"),
        ({"window_hu": [40, 0]}, r"is no \[centre, width\]"),
        ({"window_hu": [40, float("nan")]}, r"is no \[centre, width\]"),
        ({"percentile": [99, 1]}, "is no pair of percentiles"),
    ],
)
def test_windows_that_are_none_are_config_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        parse_grey(**({"window_hu": None, "percentile": None} | options))


def test_windows_and_percentiles_of_arrays():
    values = np.array([-1000.0, 40.0, np.nan, 1e9])
    assert apply_window(values, 40, 400).tolist() == [0, 128, 102, 255]
    assert scale(np.arange(101.0), 0, 100)[[0, 50, 100]].tolist() == [0, 128, 255]
    assert scale(np.full(4, 7.0), 7, 7).tolist() == [0, 0, 0, 0]
    assert scale(np.array([np.nan, -9.0, 9.0]), -1, 1).tolist() == [128, 0, 255]


# the layout


def write_study(root):
    """Two patients in folders called like them; a table names files by their stem, a box a row as RSNA has it."""
    for number, (patient, name) in enumerate((("4711", "Doe^Jane"), ("4711", "Doe^Jane"), ("0815", "Roe^Richard"))):
        path, stored = root / name.split("^")[0] / f"img{number}.dcm", (RAMP * 30 + number).astype(np.int16)
        write_dicom(path, stored, PatientID=patient, PatientName=name,
                    RescaleSlope=1, RescaleIntercept=-1024, SOPInstanceUID=f"1.2.{number + 1}",
                    PatientBirthDate="19500102", PatientAge="093Y", PatientSex="F", BodyPartExamined="CHEST",
                    AccessionNumber="ACC77")  # fmt: skip
    (root / "labels.csv").write_text("patientId,x,Target\nimg0,1,1\nimg0,1,1\nimg1,,0\nimg2,,1\nimg9,,1\n")
    return root


def test_a_folder_and_its_table_become_rows_without_names(tmp_path):
    root = write_study(tmp_path / "rsna")
    options = {"table": "labels.csv", "key": "patientId", "label": "Target", "names": {"0": "normal", "1": "pneumonia"},
               "window_hu": "lung", "name": "rsna"}  # fmt: skip
    with pytest.raises(DataError, match=r"labels.csv: row 3: repeats an earlier row; .*duplicates: drop"):
        read_manifest("dicom_folder", root, **options)
    manifest = read_manifest("dicom_folder", root, duplicates="drop", **options)
    rows = {row.image.path: row for row in manifest.rows}
    assert {path: row.labels for path, row in rows.items()} == {
        "Doe/img0.dcm": ("pneumonia",), "Doe/img1.dcm": ("normal",), "Roe/img2.dcm": ("pneumonia",)
    }  # fmt: skip
    first = rows["Doe/img0.dcm"]
    assert first.sample_id == hash_id("rsna", "Doe/img0.dcm")
    assert first.group_id == rows["Doe/img1.dcm"].group_id == hash_id("rsna", "patient 4711")
    assert first.attributes == {"modality": "CT", "body_part": "CHEST", "sex": "F", "age": "090Y"}
    assert sorted((drop.reason, drop.item) for drop in manifest.drops) == sorted(
        [("duplicate_row", hash_id("rsna", "img0")), ("missing_file", hash_id("rsna", "img9")),
         ("not_dicom", hash_id("rsna", "labels.csv"))]
    )  # fmt: skip
    assert np.array_equal(
        np.asarray(read_rgb(manifest, first))[..., 0], grey(root / "Doe/img0.dcm", window=WINDOWS["lung"])
    )
    assert read_bytes(manifest, first).startswith(b"\x89PNG")
    moved = root.rename(tmp_path / "elsewhere")
    assert read_manifest("dicom_folder", moved, duplicates="drop", **options).sha256 == manifest.sha256
    wider = read_manifest("dicom_folder", moved, duplicates="drop", **(options | {"window_hu": [0, 2000]}))
    assert wider.sha256 != manifest.sha256


def test_labels_from_folders_and_one_row_a_frame(tmp_path):
    stored = np.stack([RAMP, RAMP + 1, RAMP + 2]).astype(np.uint8)
    write_dicom(tmp_path / "train" / "cyst" / "a.dcm", stored, Modality="US")
    write_dicom(tmp_path / "train" / "cyst" / "b.dcm", stored, Modality="US", BurnedInAnnotation="YES")
    write_dicom(tmp_path / "train" / "cyst" / "c.dcm", stored, Modality="US", BurnedInAnnotation="NO")
    options = {"pattern": r"^(?P<split>\w+)/(?P<label>\w+)/", "name": "us"}
    manifest = read_manifest("dicom_folder", tmp_path, **options)
    assert {(row.labels, row.split) for row in manifest.rows} == {(("cyst",), "train")}
    assert len(manifest.rows) == 6
    assert [drop.reason for drop in manifest.drops] == ["burned_in_annotation"]
    possible = [row for row in manifest.rows if row.image.path.endswith("a.dcm")]
    assert {row.attributes["burned_in"] for row in possible} == {"possible"}
    assert sorted(row.sample_id[-5:] for row in possible) == ["/0000", "/0001", "/0002"]
    assert np.asarray(read_rgb(manifest, possible[2]))[0, 0, 0] in (0, 1, 2)
    strict = read_manifest("dicom_folder", tmp_path, burned_in="drop_possible", frames="middle", **options)
    assert [row.image.part for row in strict.rows] == ["dicom:1"]


def test_files_that_give_no_picture_are_counted_with_their_reason(tmp_path):
    write_dicom(tmp_path / "a" / "deep.dcm", RAMP, Modality="DX")
    (tmp_path / "a" / "note.txt").write_text("x")
    options = {"pattern": "^(?P<label>a)/"}
    with pytest.raises(DataError, match=r"holds no labelled image .*\(found 1 needs_window, 1 not_dicom\)"):
        read_manifest("dicom_folder", tmp_path, **options)
    assert len(read_manifest("dicom_folder", tmp_path, percentile=[0.5, 99.5], **options).rows) == 1
    with pytest.raises(ConfigError, match=r"layout.table: with key, or else pattern"):
        read_manifest("dicom_folder", tmp_path)


def test_no_identifier_of_any_shipped_file_reaches_a_manifest():
    manifest = read_manifest("dicom_folder", SHIPPED, name="shipped", pattern="(?P<label>[^/]*)$", names={},
                             percentile=[0, 100], burned_in="keep", frames="first")  # fmt: skip
    assert len(manifest.rows) > 60
    told = {row.image.path: " ".join([row.sample_id, row.group_id or "", *row.attributes.values(), row.text or ""])
            for row in manifest.rows}  # fmt: skip
    drops = " ".join(f"{drop.item} {drop.detail}" for drop in manifest.drops)
    checked = 0
    for path in FILES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ds = pydicom.dcmread(path, stop_before_pixels=True)
            except (pydicom.errors.InvalidDicomError, OSError):
                continue
            secrets = [str(ds.get(key) or "") for key in IDENTIFIERS]
        said = told.get(path.relative_to(SHIPPED).as_posix(), "")
        for secret in secrets:
            for word in [secret, *re.split(r"[\^ =]", secret)]:
                if len(word) > 2:
                    checked += 1
                    # Short ones as words, because three digits in a row are found in any hash.
                    assert word not in (f"{said} {drops}" if len(word) > 5 else f"{said} {drops}".split())
    assert checked > 300


def test_a_told_value_that_is_part_of_a_name_is_not_told(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", RAMP, PatientName="CHEST^HARRY", BodyPartExamined="CHEST", WindowCenter=1,
                       WindowWidth=9, ViewPosition="PA", Laterality="L")  # fmt: skip
    assert read_facts(path).attributes == {"modality": "CT", "view": "PA", "laterality": "L"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write_dicom(tmp_path / "b.dcm", RAMP, BodyPartExamined="MR HARRY CHEST 1950", PatientAge="old")
    assert read_facts(path).attributes == {"modality": "CT"}
