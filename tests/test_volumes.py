"""Volumes to slices: the same phantom in every orientation and format gives the same pictures, right on the left."""

import nibabel
import numpy as np
import pytest
from fresh_python import run_fresh
from layout_sets import write_csv, write_dicom
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from biomedclip.errors import ConfigError, DataError
from biomedclip.layouts import read_bytes, read_manifest, read_rgb
from biomedclip.layouts.manifest import hash_id

RIGHT, FRONT, TOP = 300, 200, 100


def phantom(shape=(10, 8, 6)):
    """Values in R-A-S order: brighter to the patient's right, front and top, by amounts that tell them apart."""
    values = np.zeros(shape, np.int16)
    values[shape[0] // 2 :] += RIGHT
    values[:, shape[1] // 2 :] += FRONT
    values[:, :, shape[2] // 2 :] += TOP
    return values


def write_nifti(path, values=None, *, codes="RAS", spacing_mm=(1.0, 1.0, 1.0), suffix=".nii.gz"):
    """The R-A-S array written with its axes in the order and direction of `codes`."""
    values = phantom() if values is None else values
    affine = np.diag([*spacing_mm, 1.0])
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    turned = nibabel.orientations.apply_orientation(values, turn)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(turned, affine @ inv_ornt_aff(turn, values.shape[:3])), f"{path}{suffix}")
    return path


def write_series(folder, values=None, *, patient="4711", skip=(), backwards=False, uid="1.9.1", **facts):
    """The same array as axial DICOM slices: rows to the back, columns to the left."""
    values = (phantom() if values is None else values)[::-1, ::-1]  # L, P, S
    for number in range(values.shape[2]):
        if number in skip:
            continue
        write_dicom(
            folder / f"{number:03d}.dcm", (values[:, :, number].T + 1024).astype(np.uint16), RescaleSlope=1,
            RescaleIntercept=-1024, PatientID=patient, SeriesInstanceUID=uid, SOPInstanceUID=f"{uid}.{number + 1}",
            InstanceNumber=values.shape[2] - number if backwards else number + 1, PixelSpacing=[1, 1],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=[0, 0, float(number)], **facts,
        )  # fmt: skip


def halves(picture):
    """Mean of left, right, upper and lower half."""
    grey = np.asarray(picture)[..., 0].astype(float)
    height, width = grey.shape
    return (
        grey[:, : width // 2].mean(),
        grey[:, width // 2 :].mean(),
        grey[: height // 2].mean(),
        grey[height // 2 :].mean(),
    )


BY_NAME = {"pattern": r"(?P<label>tumor|healthy)", "window_hu": [300, 600]}

# by headers alone


def test_slices_of_a_volume_are_rows_of_one_group(tmp_path):
    write_nifti(tmp_path / "tumor_01")
    write_nifti(tmp_path / "healthy_02", codes="PSR", suffix=".nii")
    manifest = read_manifest("volumes", tmp_path, name="v", **BY_NAME)
    assert len(manifest.rows) == 12
    first = manifest.rows[6]
    assert (first.sample_id, first.labels, first.group_id) == (
        "tumor_01/axial/0000",
        ("tumor",),
        hash_id("v", "tumor_01"),
    )
    assert first.image.part == "volume:axial/0;window=300,600"
    counts = {
        axis: len(read_manifest("volumes", tmp_path, axis=axis, **BY_NAME).rows) for axis in ("coronal", "sagittal")
    }
    assert counts == {"coronal": 16, "sagittal": 20}


def test_which_slices_are_taken(tmp_path):
    write_nifti(tmp_path / "tumor_01", phantom((10, 8, 40)))

    def taken(**options):
        manifest = read_manifest("volumes", tmp_path, **BY_NAME, **options)
        return [int(row.image.part.split("/")[1].split(";")[0]) for row in manifest.rows]

    assert taken(slices=4) == [5, 15, 25, 35]
    assert taken(slices=2, range=[0.25, 0.75]) == [15, 25]
    assert taken(step=10) == [0, 10, 20, 30]
    assert taken(range=[0.5, 0.55]) == [20, 21]
    assert len(taken(slices=100)) == 40
    sheet = read_manifest("volumes", tmp_path, montage=[2, 2], **BY_NAME).rows
    assert [row.image.part for row in sheet] == ["volume:axial/5,15,25,35@2x2;window=300,600"]


def test_a_table_names_volumes_by_stem(tmp_path):
    write_nifti(tmp_path / "data" / "BraTS_001")
    write_nifti(tmp_path / "data" / "BraTS_002")
    write_csv(
        tmp_path / "grades.csv", ["id", "grade", "set"], [["BraTS_001", "HGG", "train"], ["BraTS_003", "LGG", "test"]]
    )
    manifest = read_manifest("volumes", tmp_path, name="b", folder="data", table="grades.csv", key="id", label="grade",
                             split="set", percentile=[1, 99], slices=1, group_pattern=r"BraTS_(\d+)")  # fmt: skip
    assert [(row.labels, row.split, row.group_id) for row in manifest.rows] == [
        (("HGG",), "train", hash_id("b", "001"))
    ]
    assert {(drop.item, drop.reason) for drop in manifest.drops} == {
        ("BraTS_002", "not_in_table"), (hash_id("b", "BraTS_003"), "missing_file")
    }  # fmt: skip


def test_a_segmentation_is_an_error_until_excluded(tmp_path):
    write_nifti(tmp_path / "tumor_01")
    write_nifti(tmp_path / "tumor_01_seg")
    with pytest.raises(
        DataError, match=r"tumor_01_seg.nii.gz: seems to be a segmentation.*exclude: \['\*_seg.nii\*'\]"
    ):
        read_manifest("volumes", tmp_path, **BY_NAME)
    manifest = read_manifest("volumes", tmp_path, exclude=["*_seg.nii*"], **BY_NAME)
    assert [drop.reason for drop in manifest.drops] == ["excluded"]


def test_what_is_no_volume_is_counted(tmp_path):
    write_nifti(tmp_path / "tumor_good")
    write_nifti(tmp_path / "tumor_single", phantom()[..., None])
    write_nifti(tmp_path / "tumor_time", np.stack([phantom()] * 2, -1))
    (tmp_path / "tumor_bad.nii.gz").write_bytes(b"\x1f\x8bnot gzip")
    header = nibabel.Nifti1Header()
    header.set_data_shape((30_000, 30_000, 30_000))
    header["vox_offset"] = 352
    (tmp_path / "tumor_bomb.nii").write_bytes(header.binaryblock + bytes(4))
    header.set_data_shape((10, 8, 6))
    header["sform_code"], header["srow_x"], header["srow_y"] = 1, [1, 0, 0, 0], [0, 1, 0, 0]  # and no third axis
    (tmp_path / "tumor_flat.nii").write_bytes(header.binaryblock + bytes(4 + 2 * 480))
    (tmp_path / "notes.txt").write_text("x")
    manifest = read_manifest("volumes", tmp_path, name="v", slices=1, **BY_NAME)
    assert [row.sample_id for row in manifest.rows] == ["tumor_good/axial/0003", "tumor_single/axial/0003"]
    assert {(drop.item, drop.reason) for drop in manifest.drops} == {
        ("tumor_time", "not_three_dimensional"), ("tumor_bad", "broken_volume"), ("tumor_bomb", "volume_bomb"),
        ("tumor_flat", "broken_volume"), (hash_id("v", "notes.txt"), "not_dicom"),
    }  # fmt: skip


def test_series_are_checked_slice_by_slice(tmp_path):
    write_series(tmp_path / "tumor a")
    write_series(tmp_path / "tumor gap", skip=[3])
    write_series(tmp_path / "tumor two", uid="1.9.2")
    write_dicom(tmp_path / "tumor two" / "other.dcm", np.zeros((8, 10), np.uint16), SeriesInstanceUID="1.9.3",
                RescaleSlope=1, RescaleIntercept=0)  # fmt: skip
    write_series(tmp_path / "tumor one", phantom((10, 8, 1)))
    write_dicom(tmp_path / "tumor lost" / "1.dcm", np.zeros((8, 10), np.uint16), RescaleSlope=1, RescaleIntercept=0)
    manifest = read_manifest("volumes", tmp_path, name="v", **BY_NAME)
    item = hash_id("v", "tumor a")
    assert [row.sample_id for row in manifest.rows] == [f"{item}/axial/{i:04d}" for i in range(6)]
    assert {row.group_id for row in manifest.rows} == {hash_id("v", "patient 4711")}
    assert {(drop.item, drop.reason) for drop in manifest.drops} == {
        (hash_id("v", "tumor gap"), "missing_slices"), (hash_id("v", "tumor two"), "several_series"),
        (hash_id("v", "tumor one"), "single_slice"), (hash_id("v", "tumor lost"), "no_geometry"),
    }  # fmt: skip
    write_series(tmp_path / "tumor mr", Modality="MR")
    again = read_manifest("volumes", tmp_path, name="v", **BY_NAME)
    assert [drop.reason for drop in again.drops if drop.item == hash_id("v", "tumor mr")] == ["window_hu_needs_ct"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_hu": None}, "or else percentile says how a volume becomes 8 bits"),
        ({"percentile": [1, 99]}, "or else percentile says"),
        ({"window_hu": "longs"}, "use one of abdomen"),
        ({"range": [0.5, 0.2]}, r"layout\.range"),
        ({"slices": 2, "step": 2}, "exclude each other"),
        ({"slices": 0}, "is out of range"),
        ({"montage": [2]}, "is out of range"),
        ({"pattern": None}, r"layout\.table"),
    ],
)
def test_options_that_contradict_are_config_errors(tmp_path, options, message):
    write_nifti(tmp_path / "tumor_01")
    with pytest.raises(ConfigError, match=message):
        read_manifest("volumes", tmp_path, **(BY_NAME | options))


def test_scanning_imports_no_torch(tmp_path):
    write_nifti(tmp_path / "tumor_01")
    write_series(tmp_path / "tumor a")
    script = (
        "from biomedclip.layouts import read_manifest\n"
        f"print(len(read_manifest('volumes', {str(tmp_path)!r}, pattern='(?P<label>tumor)', window_hu='lung').rows))"
    )
    said, loaded = run_fresh(script)
    assert said == "12\n"
    assert loaded & {"torch", "monai"} == set()


# by values, which imports MONAI: ten seconds


@pytest.mark.slow
@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PSR", "SLA", "IRP"])
def test_every_orientation_gives_the_same_pictures_with_right_on_the_left(tmp_path, codes):
    write_nifti(tmp_path / "tumor_01", codes=codes)
    for axis in ("axial", "coronal", "sagittal"):
        manifest = read_manifest("volumes", tmp_path, axis=axis, **BY_NAME)
        middle = manifest.rows[len(manifest.rows) // 2]
        left, right, upper, lower = halves(read_rgb(manifest, middle))
        assert left > right, axis  # patient's right, or front in a sagittal slice
        assert upper > lower, axis  # front in an axial slice, top in the others
    axial = read_manifest("volumes", tmp_path, axis="axial", **BY_NAME)
    shown = np.asarray(read_rgb(axial, axial.rows[5]))[..., 0]
    assert shown.shape == (8, 10)
    assert (shown[0, 0], shown[-1, 0]) == (255, round((400 - 299.5) / 599 * 255 + 127.5))


@pytest.mark.slow
@pytest.mark.parametrize("backwards", [False, True])
def test_a_dicom_series_gives_what_the_same_nifti_gives(tmp_path, backwards):
    write_nifti(tmp_path / "n" / "tumor_01")
    write_series(tmp_path / "d" / "tumor_01", backwards=backwards)
    for axis in ("axial", "coronal", "sagittal"):
        nifti = read_manifest("volumes", tmp_path / "n", axis=axis, **BY_NAME)
        series = read_manifest("volumes", tmp_path / "d", axis=axis, **BY_NAME)
        assert len(nifti.rows) == len(series.rows)
        for one, two in zip(nifti.rows, series.rows, strict=True):
            assert np.array_equal(np.asarray(read_rgb(nifti, one)), np.asarray(read_rgb(series, two))), axis


@pytest.mark.slow
def test_pixels_are_square_and_montages_hold_their_slices(tmp_path):
    write_nifti(tmp_path / "tumor_01", spacing_mm=(1.0, 1.0, 5.0))
    coronal = read_manifest("volumes", tmp_path, axis="coronal", **BY_NAME)
    assert read_rgb(coronal, coronal.rows[0]).size == (10, 30)
    axial = read_manifest("volumes", tmp_path, **BY_NAME)
    sheet = read_manifest("volumes", tmp_path, montage=[2, 3], **BY_NAME)
    picture = np.asarray(read_rgb(sheet, sheet.rows[0]))
    assert picture.shape == (16, 30, 3)
    assert np.array_equal(picture[8:, 20:], np.asarray(read_rgb(axial, axial.rows[5])))
    assert read_bytes(sheet, sheet.rows[0]).startswith(b"\x89PNG")


@pytest.mark.slow
def test_percentiles_are_those_of_the_volume(tmp_path):
    write_nifti(tmp_path / "tumor_01", phantom().astype(np.float64) * 7 + 3)
    manifest = read_manifest("volumes", tmp_path, pattern="(?P<label>tumor)", percentile=[0, 100])
    low, high = (np.asarray(read_rgb(manifest, manifest.rows[i])) for i in (0, 5))
    assert (low.min(), low.max()) == (0, round(500 / 600 * 255))
    assert (high.min(), high.max()) == (round(100 / 600 * 255), 255)


@pytest.mark.slow
def test_a_volume_cut_short_or_gone_is_one_line(tmp_path):
    write_nifti(tmp_path / "tumor_01", np.random.default_rng(0).integers(0, 999, (20, 20, 20)).astype(np.int16))
    write_series(tmp_path / "tumor_02")
    manifest = read_manifest("volumes", tmp_path, **BY_NAME)
    path = tmp_path / "tumor_01.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    row = next(row for row in manifest.rows if row.image.path == path.name)
    with pytest.raises(DataError, match=r"tumor_01/axial/\d+: cannot be read as a volume"):
        read_rgb(manifest, row)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_rgb(manifest, row)
