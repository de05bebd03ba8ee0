"""Tables, folders and file names as people publish them, and what they do wrong."""

import gzip
import json
import time

import numpy as np
import openpyxl
import pytest
from layout_sets import busi, chexpert, flair, medimeta, picture, save, write_csv

from biomedclip.errors import ConfigError, DataError
from biomedclip.layouts import read_manifest, read_rgb
from biomedclip.layouts.cells import parse_list, read_cells
from biomedclip.layouts.manifest import hash_id


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b", "c"):
        save(tmp_path / "images" / f"{name}.png", ord(name))
    return tmp_path


def write_xlsx(path, rows, sheets=("Sheet1",)):
    book = openpyxl.Workbook()
    book.active.title = sheets[0]
    for sheet in sheets[1:]:
        book.create_sheet(sheet)
    for row in rows:
        book[sheets[0]].append(row)
    book.save(path)
    return path


# what a table may be


def test_an_xlsx_of_one_column_a_class_gives_single_labels(folder):
    write_xlsx(folder / "Train.xlsx", [["image_name", "NC", "G3"], ["a.png", 1, 0], ["b.png", 0, 1.0], ["c.png", 0, 0]])
    manifest = read_manifest("csv", folder, table="Train.xlsx", image="image_name", folder="images", kind="single",
                             label_columns=["NC", "G3"])  # fmt: skip
    assert [(row.labels, row.negatives) for row in manifest.rows] == [(("NC",), ("G3",)), (("G3",), ("NC",))]
    assert [(drop.item, drop.reason) for drop in manifest.drops] == [("images/c.png", "not_one_label")]


def test_an_xlsx_of_several_sheets_wants_one_named(folder):
    write_xlsx(folder / "t.xlsx", [["file", "label"], ["a.png", "x"]], sheets=("Labels", "Notes"))
    options = {"table": "t.xlsx", "image": "file", "label": "label", "folder": "images"}
    with pytest.raises(DataError, match=r"has several sheets \(found Labels, Notes\); name one with layout.sheet"):
        read_manifest("csv", folder, **options)
    assert len(read_manifest("csv", folder, sheet="Labels", **options).rows) == 1
    (folder / "bad.xlsx").write_bytes(b"PK\x03\x04not a workbook")
    with pytest.raises(DataError, match="cannot be read as xlsx"):
        read_manifest("csv", folder, **(options | {"table": "bad.xlsx"}))


def test_one_table_a_split_and_a_table_without_a_header(folder):
    (folder / "train.csv").write_text("a.png,Normal\nb.png,Benign\n")
    (folder / "test.csv").write_text("c.png,Normal\n")
    manifest = read_manifest(
        "csv", folder, table={"train": "train.csv", "test": "test.csv"}, columns=["file", "label"], image="file",
        label="label", folder={"train": "images", "test": "images"},
    )  # fmt: skip
    assert [(row.sample_id, row.split, row.labels) for row in manifest.rows] == [
        ("images/a.png", "train", ("Normal",)), ("images/b.png", "train", ("Benign",)),
        ("images/c.png", "test", ("Normal",)),
    ]  # fmt: skip


def test_gzip_json_semicolons_and_other_encodings_are_read(folder):
    (folder / "t.csv.gz").write_bytes(gzip.compress(b"file,label\na,x\n"))
    (folder / "t.json").write_text(json.dumps({"a": {"label": "x"}, "b": {"label": None}}))
    (folder / "t.csv").write_bytes("file;label\na;ménisque\n".encode("cp1252"))
    assert list(read_cells(folder / "t.csv.gz")) == [(2, {"file": "a", "label": "x"})]
    assert [cells for _, cells in read_cells(folder / "t.json")] == [
        {"key": "a", "label": "x"}, {"key": "b", "label": ""}
    ]  # fmt: skip
    assert next(iter(read_cells(folder / "t.csv", encoding="cp1252", delimiter=";")))[1]["label"] == "ménisque"
    with pytest.raises(DataError, match=r"row 2: is not UTF-8 \(found byte 0xe9\); .*or say `encoding`"):
        list(read_cells(folder / "t.csv"))
    with pytest.raises(ConfigError, match="is no encoding"):
        list(read_cells(folder / "t.csv", encoding="klingon"))
    (folder / "cut.csv.gz").write_bytes(gzip.compress(b"file,label\n" + bytes(9999))[:30])
    with pytest.raises(DataError, match="cannot be read"):
        list(read_cells(folder / "cut.csv.gz"))


def test_columns_without_a_name_are_left_alone(folder):
    (folder / "t.csv").write_text("Image name,grade,Risk ,,,\na,4,1,,,\n")
    assert list(read_cells(folder / "t.csv")) == [(2, {"Image name": "a", "grade": "4", "Risk ": "1", "": ""})]
    (folder / "t.csv").write_text("file,grade,file\na,4,1\n")
    with pytest.raises(DataError, match="names a column twice"):
        list(read_cells(folder / "t.csv"))


def test_a_table_that_unpacks_without_end_is_refused(folder, monkeypatch):
    monkeypatch.setattr("biomedclip.layouts.cells.MAX_TABLE_BYTES", 1000)
    (folder / "bomb.csv.gz").write_bytes(gzip.compress(bytes(100_000)))
    write_xlsx(folder / "bomb.xlsx", [["file"], ["a" * 30_000]])
    for table in ("bomb.csv.gz", "bomb.xlsx"):
        with pytest.raises(DataError, match="unpacks to more than"):
            list(read_cells(folder / table))


# what its cells may say


def test_a_list_in_a_cell_is_read_and_never_run(folder):
    write_csv(folder / "t.csv", ["file", "Labels"], [["a", "['normal', 'copd signs']"], ["b", "[]"]])
    manifest = read_manifest("csv", folder, table="t.csv", image="file", suffix=".png", folder="images", label="Labels",
                             label_list=True)  # fmt: skip
    assert [row.labels for row in manifest.rows] == [("normal", "copd signs"), ()]
    assert manifest.kind == "multi"
    for text in ("__import__('os').remove('a')", "[" * 9999, "{'a': 1}", "[['a']]", "normal"):
        with pytest.raises(DataError, match=r"row 2.*is not a list of words"):
            parse_list(text, "t.csv: row 2")


def test_several_fields_keep_their_names(folder):
    write_csv(folder / "t.csv", ["file", "organ", "finding"], [["a.png", "colon", "normal"], ["b.png", "normal", ""]])
    manifest = read_manifest("csv", folder, table="t.csv", image="file", folder="images",
                             label_fields=["organ", "finding"])  # fmt: skip
    assert [row.labels for row in manifest.rows] == [("organ=colon", "finding=normal"), ("organ=normal",)]
    assert manifest.rows[0].attributes == {"organ": "colon", "finding": "normal"}
    assert manifest.kind == "multi"


def test_repeated_rows_are_counted_only_where_asked_and_contradictions_never(folder):
    rows = [["a.png", "x"], ["a.png", "x"], ["b.png", "y"]]
    write_csv(folder / "t.csv", ["file", "label"], rows)
    options = {"table": "t.csv", "image": "file", "label": "label", "folder": "images"}
    with pytest.raises(DataError, match=r"row 3: lists images/a\.png twice"):
        read_manifest("csv", folder, **options)
    manifest = read_manifest("csv", folder, duplicates="drop", **options)
    assert [(drop.item, drop.reason, drop.detail) for drop in manifest.drops] == [
        ("images/a.png", "duplicate_row", "row 3")
    ]
    write_csv(folder / "t.csv", ["file", "label"], [*rows, ["b.png", "x"]])
    with pytest.raises(DataError, match=r"row 5: says something else of images/b.png .*\(found x and y\)"):
        read_manifest("csv", folder, duplicates="drop", **options)


def test_a_filter_takes_several_values_and_compares_only(folder):
    write_csv(
        folder / "t.csv", ["file", "label", "set"], [["a.png", "x", "1"], ["b.png", "x", "2"], ["c.png", "x", "3"]]
    )
    options = {"table": "t.csv", "image": "file", "label": "label", "folder": "images"}
    manifest = read_manifest("csv", folder, filter={"set": ["1", "3"]}, **options)
    assert [row.sample_id for row in manifest.rows] == ["images/a.png", "images/c.png"]
    with pytest.raises(DataError, match="has no column 'sets'"):
        read_manifest("csv", folder, filter={"sets": "1"}, **options)


def test_pictures_are_found_by_name_in_folders_below(tmp_path):
    save(tmp_path / "HAM10000_images_part_1" / "ISIC_1.jpg")
    save(tmp_path / "HAM10000_images_part_2" / "ISIC_2.jpg")
    write_csv(
        tmp_path / "meta.csv", ["lesion_id", "image_id", "dx"], [["HAM_0", "ISIC_1", "nv"], ["HAM_0", "ISIC_2", "nv"]]
    )
    options = {"table": "meta.csv", "image": "image_id", "label": "dx", "suffix": ".jpg", "find_by_name": True}
    manifest = read_manifest("csv", tmp_path, group="lesion_id", hash_group=True, name="ham", **options)
    assert [row.image.path for row in manifest.rows] == [
        "HAM10000_images_part_1/ISIC_1.jpg", "HAM10000_images_part_2/ISIC_2.jpg"
    ]  # fmt: skip
    assert {row.group_id for row in manifest.rows} == {hash_id("ham", "HAM_0")}
    save(tmp_path / "other" / "ISIC_1.jpg")
    with pytest.raises(DataError, match="row 2: names a file that is in several folders"):
        read_manifest("csv", tmp_path, **options)


def test_split_lists_name_the_pictures_of_each_split(folder):
    write_csv(folder / "Data_Entry.csv", ["Image Index", "Finding Labels"],
              [["a.png", "Mass|Edema"], ["b.png", "No Finding"], ["c.png", "Mass"]])  # fmt: skip
    (folder / "train_val_list.txt").write_text("a.png\n")
    (folder / "test_list.txt").write_text("b.png\n")
    options = {"table": "Data_Entry.csv", "image": "Image Index", "label": "Finding Labels", "label_separator": "|",
               "folder": "images", "split_lists": {"train": "train_val_list.txt", "test": "test_list.txt"}}  # fmt: skip
    manifest = read_manifest("csv", folder, **options)
    assert [row.split for row in manifest.rows] == ["train", "test", None]
    (folder / "test_list.txt").write_text("b.png\na.png\n")
    with pytest.raises(DataError, match=r"row 2: is in two splits \(found a.png\)"):
        read_manifest("csv", folder, **options)


# folders and names


def test_masks_beside_their_pictures_are_an_error_until_excluded(tmp_path):
    root = busi(tmp_path / "Dataset_BUSI_with_GT")
    with pytest.raises(DataError, match=r"benign \(1\)_mask.png: seems to be a mask.*exclude: \['\*_mask\*'\]"):
        read_manifest("image_folder", tmp_path, folder="Dataset_BUSI_with_GT")
    manifest = read_manifest("image_folder", root, exclude=["*_mask*.png"])
    assert len(manifest.rows) == 6
    assert [drop.reason for drop in manifest.drops] == ["excluded"] * 7
    with pytest.raises(DataError, match="seems to be a mask"):
        read_manifest("filename_pattern", root, pattern=r"(?P<label>\w+) \(")


def test_a_folder_of_masks_is_no_class(tmp_path):
    for label in ("cat", "dog", "Masks"):
        save(tmp_path / label / "x.png")
    with pytest.raises(DataError, match=r"Masks/x.png: seems to be a mask .*exclude: \['Masks/\*'\]"):
        read_manifest("image_folder", tmp_path)
    assert read_manifest("image_folder", tmp_path, exclude=["Masks/*"]).classes == ("cat", "dog")
    save(tmp_path / "Masks.bak" / "ground_truth" / "x.png")
    with pytest.raises(DataError, match=r"exclude: \['\*/ground_truth/\*'\]"):
        read_manifest("image_folder", tmp_path, exclude=["Masks/*"])


def test_a_name_ending_like_a_mask_is_a_picture_where_no_other_is_beside_it(tmp_path):
    save(tmp_path / "cat" / "black_mask.png")
    assert len(read_manifest("image_folder", tmp_path).rows) == 1


def test_folders_may_be_renamed_and_pictures_lie_deeper(tmp_path):
    save(tmp_path / "train" / "lung_aca" / "patient 7" / "x.jpeg")
    manifest = read_manifest("image_folder", tmp_path, names={"lung_aca": "lung adenocarcinoma"}, kind="ordinal",
                             group_pattern=r"patient (\d+)", hash_group=True, name="n")  # fmt: skip
    row = manifest.rows[0]
    assert (row.labels, row.split, row.group_id) == (("lung adenocarcinoma",), "train", hash_id("n", "7"))
    assert manifest.kind == "ordinal"


def test_labels_groups_and_splits_are_read_from_names(tmp_path):
    for name in ("train/C33P1thin_1.png", "train/C33P1thin_0.png", "test/C34P2thin_1.png", "test/readme.png"):
        save(tmp_path / name)
    pattern = r"^(?P<split>\w+)/(?P<group>C\d+P\d+)(?P<stain>thin)_(?P<label>[01])\.png$"
    names = {"0": "normal", "1": "parasitized"}
    manifest = read_manifest("filename_pattern", tmp_path, pattern=pattern, names=names)
    assert [(row.split, row.labels, row.group_id, row.attributes) for row in manifest.rows] == [
        ("test", ("parasitized",), "C34P2", {"stain": "thin"}), ("train", ("normal",), "C33P1", {"stain": "thin"}),
        ("train", ("parasitized",), "C33P1", {"stain": "thin"}),
    ]  # fmt: skip
    assert [(drop.item, drop.reason) for drop in manifest.drops] == [("test/readme.png", "no_pattern_match")]
    with pytest.raises(ConfigError, match=r"layout.pattern: has no group 'label'"):
        read_manifest("filename_pattern", tmp_path, pattern=r"(\d)")


def test_bits_in_a_name_are_labels_that_hold_and_do_not(tmp_path):
    save(tmp_path / "1001-[1 0 1].png")
    options = {"pattern": r"\[(?P<label>[01 ]+)\]", "bits": True}
    manifest = read_manifest("filename_pattern", tmp_path, classes=["tumor", "stroma", "normal"], **options)
    assert (manifest.kind, manifest.rows[0].labels, manifest.rows[0].negatives) == (
        "multi", ("tumor", "normal"), ("stroma",)
    )  # fmt: skip
    with pytest.raises(DataError, match="has not one bit for each of 2 classes"):
        read_manifest("filename_pattern", tmp_path, classes=["tumor", "stroma"], **options)
    with pytest.raises(ConfigError, match=r"layout\.classes"):
        read_manifest("filename_pattern", tmp_path, **options)


# tables in the words of those who published them


def test_chexpert_keeps_uncertainty_and_hides_the_patient(tmp_path):
    root = chexpert(tmp_path / "CheXpert-v1.0-small")
    manifest = read_manifest(
        "chexpert_csv", root, name="chexpert", table={"train": "train.csv", "val": "valid.csv"},
        prefix="CheXpert-v1.0-small/",
    )  # fmt: skip
    assert len(manifest.classes) == 14
    assert {row.attributes["Frontal/Lateral"] for row in manifest.rows} == {"Frontal"}
    row = manifest.rows[0]
    assert (row.labels, row.negatives, row.uncertain) == (("Edema",), ("Fracture",), ("Cardiomegaly",))
    assert (row.split, row.group_id) == ("train", hash_id("chexpert", "patient00001"))
    assert [row.split for row in manifest.rows] == ["train", "train", "val"]
    few = read_manifest("chexpert_csv", root, view="all", classes=["Edema"], kind="single",
                        prefix="CheXpert-v1.0-small/")  # fmt: skip
    assert len(few.rows) == 4
    assert {row.labels for row in few.rows} == {("Edema",)}


def test_flair_lists_are_parsed(tmp_path):
    root = flair(tmp_path / "flair")
    manifest = read_manifest("flair_csv", root, table="set.csv", split="test")
    assert [(row.labels, row.attributes, row.split) for row in manifest.rows] == [
        (("normal",), {}, "test"), (("mild diabetic retinopathy",), {"atributes": "noisy"}, "test")
    ]  # fmt: skip
    assert [drop.reason for drop in manifest.drops] == ["not_one_label"]
    assert len(read_manifest("flair_csv", root, table="set.csv", kind="multi").rows) == 3


def test_medimeta_ids_get_the_names_of_info_yaml(tmp_path):
    root = medimeta(tmp_path / "oct")
    with pytest.raises(DataError, match=r"has several tasks \(found disease, urgent\); name one with layout.task"):
        read_manifest("medimeta", root)
    manifest = read_manifest("medimeta", root, task="disease", names={"DME": "diabetic macular edema"})
    assert manifest.classes == ("CNV", "diabetic macular edema", "drusen")
    assert [(row.labels[0], row.split) for row in manifest.rows] == [
        ("CNV", "train"), ("diabetic macular edema", "val"), ("drusen", "test")
    ]  # fmt: skip
    assert manifest.rows[0].group_id == manifest.rows[1].group_id == hash_id("oct", "p0")
    assert np.array_equal(np.asarray(read_rgb(manifest, manifest.rows[1])), np.asarray(picture(1)))
    many = read_manifest("medimeta", root, task="urgent")
    assert (many.kind, many.rows[0].labels, many.rows[0].negatives) == ("multi", ("now",), ("soon",))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("info.yaml", "name: x\n", "is no info.yaml of MedIMeta"),
        ("info.yaml", "tasks: [{task_name: a, labels: }]\n", "has a task without labels"),
        ("info.yaml", "[" * 5000, "is no info.yaml of MedIMeta"),
        (
            "annotations.csv",
            "filepath,tasks/disease\nimages/000000.tiff,7\n",
            "row 2, column 'tasks/disease': is no label",
        ),
        ("annotations.csv", "filepath,disease2\nimages/000000.tiff,7\n", "row 2: has no column of task 'disease'"),
    ],
)
def test_a_wrong_medimeta_set_is_one_line(tmp_path, file, text, message):
    root = medimeta(tmp_path / "oct")
    (root / file).write_text(text)
    with pytest.raises(DataError, match=message):
        read_manifest("medimeta", root, task="disease")


def test_fifty_thousand_files_are_scanned_in_seconds(tmp_path):
    for label in range(10):
        (tmp_path / f"c{label}").mkdir()
        for number in range(500):
            (tmp_path / f"c{label}" / f"{number}.png").touch()
    start = time.process_time()
    assert len(read_manifest("image_folder", tmp_path).rows) == 5000
    assert time.process_time() - start < 1  # a tenth of the files; measured .1 s
