import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from biomedclip.errors import ConfigError, DataError
from biomedclip.layouts import LAYOUTS, read_bytes, read_manifest, read_rgb
from biomedclip.schema import Pair
from biomedclip.shards import DatasetWriter


def picture(seed=0, size=(9, 7)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "Testing"):
        for number, label in enumerate(("cat", "dog")):
            for i in range(2):
                save(tmp_path / "set" / split / label / f"p{number}_{i}.png", seed=number)
    return tmp_path / "set"


def write_table(root, text, name="labels.csv", encoding="utf-8"):
    (root / name).write_bytes(text.encode(encoding))
    return name


# image_folder


def test_class_folders_under_split_folders(folder):
    manifest = read_manifest("image_folder", folder, splits={"Testing": "test"}, group_pattern=r"(p\d)_")
    assert manifest.kind == "single"
    assert manifest.classes == ("cat", "dog")
    assert [row.sample_id for row in manifest.rows[:2]] == ["Testing/cat/p0_0.png", "Testing/cat/p0_1.png"]
    assert {(row.split, row.labels, row.group_id) for row in manifest.rows} == {
        ("train", ("cat",), "p0"), ("test", ("cat",), "p0"), ("train", ("dog",), "p1"), ("test", ("dog",), "p1")
    }  # fmt: skip


def test_class_folders_alone_have_no_split(folder):
    manifest = read_manifest("image_folder", folder / "train")
    assert {row.split for row in manifest.rows} == {None}
    assert {row.split for row in read_manifest("image_folder", folder / "train", split="test").rows} == {"test"}


def test_masks_and_stray_files_are_counted_not_read(folder):
    save(folder / "train" / "cat" / "p0_0_mask.png")
    (folder / "train" / "notes.txt").write_text("x")
    save(folder / "train" / "loose.png")
    (folder / ".hidden").write_text("x")
    manifest = read_manifest("image_folder", folder, exclude=["*_mask.png"])
    assert {(drop.item, drop.reason) for drop in manifest.drops} == {
        ("train/cat/p0_0_mask.png", "excluded"),
        ("train/loose.png", "not_in_a_class_folder"),
        ("train/notes.txt", "not_an_image_file"),
    }
    assert len(manifest.rows) == 8


def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path):
    outside = save(tmp_path / "secret.png")
    (folder / "train" / "cat" / "link.png").symlink_to(outside)
    assert all("link" not in row.sample_id for row in read_manifest("image_folder", folder).rows)


def test_an_undeclared_class_is_named_with_the_nearest(folder):
    with pytest.raises(DataError, match=r"label that is not declared \(found 'dog'\); did you mean 'dogs'\?"):
        read_manifest("image_folder", folder, classes=["cat", "dogs"])


def test_an_empty_folder_and_a_bad_pattern_are_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no class folders"):
        read_manifest("image_folder", tmp_path / "empty")
    with pytest.raises(ConfigError, match="has no group"):
        read_manifest("image_folder", folder, group_pattern="p")
    with pytest.raises(ConfigError, match="is no regular expression"):
        read_manifest("image_folder", folder, group_pattern="(p")


def test_the_hash_names_the_data_not_the_place(folder, tmp_path):
    here = read_manifest("image_folder", folder)
    moved = folder.rename(tmp_path / "elsewhere")
    there = read_manifest("image_folder", moved)
    assert here.sha256 == there.sha256
    save(moved / "train" / "cat" / "new.png")
    assert read_manifest("image_folder", moved).sha256 != here.sha256


# csv


def test_a_table_gives_labels_groups_attributes_and_text(folder):
    table = write_table(
        folder,
        "file,label,part,patient,view,note\n"
        "train/cat/p0_0.png,0,Train,7,PA,a cat\n"
        "train/dog/p1_0.png,1,valid,,AP,a dog\n",
    )
    manifest = read_manifest(
        "csv", folder, table=table, image="file", label="label", names={"0": "cat", "1": "dog"}, split="part",
        group="patient", attributes=["view"], text="note", classes=["dog", "cat"],
    )  # fmt: skip
    first, second = manifest.rows
    assert manifest.classes == ("dog", "cat")
    assert (first.labels, first.split, first.group_id, first.attributes) == (("cat",), "train", "7", {"view": "PA"})
    assert (second.split, second.group_id, second.text) == ("val", None, "a dog")


def test_one_column_a_class_keeps_negatives_and_uncertain(folder):
    table = write_table(folder, "file,Edema,Mass,Nodule\ntrain/cat/p0_0,1.0,0.0,-1.0\ntrain/cat/p0_1,,1,\n")
    manifest = read_manifest(
        "csv", folder, table=table, image="file", suffix=".png", label_columns=["Edema", "Mass", "Nodule"]
    )
    first, second = manifest.rows
    assert manifest.kind == "multi"
    assert (first.labels, first.negatives, first.uncertain) == (("Edema",), ("Mass",), ("Nodule",))
    assert (second.labels, second.negatives, second.uncertain) == (("Mass",), (), ())


def test_several_labels_in_one_cell_and_a_row_filter(folder):
    table = write_table(folder, "file\tlabels\tview\np0_0.png\tA|B\tF\np0_1.png\tB\tL\n", name="t.tsv")
    manifest = read_manifest(
        "csv", folder, table=table, image="file", label="labels", label_separator="|", folder="train/cat",
        filter={"view": "F"},
    )  # fmt: skip
    assert [row.labels for row in manifest.rows] == [("A", "B")]


def test_json_lines_are_read_alike(folder):
    rows = [{"file": "train/cat/p0_0.png", "label": 3}, {"file": "train/cat/p0_1.png", "label": "x"}]
    table = write_table(folder, "\n".join(map(json.dumps, rows)) + "\n\n", name="t.jsonl")
    manifest = read_manifest("csv", folder, table=table, image="file", label="label")
    assert [row.labels for row in manifest.rows] == [("3",), ("x",)]


def test_a_missing_picture_is_a_drop_and_all_missing_an_error(folder):
    table = write_table(folder, "file,label\ntrain/cat/p0_0.png,a\nlost.png,a\n")
    manifest = read_manifest("csv", folder, table=table, image="file", label="label")
    assert [(drop.item, drop.reason, drop.detail) for drop in manifest.drops] == [("lost.png", "missing_file", "row 3")]
    table = write_table(folder, "file,label\nlost.png,a\n")
    with pytest.raises(DataError, match="none of its 1 images is there"):
        read_manifest("csv", folder, table=table, image="file", label="label")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("file,label\ntrain/cat/p0_0.png,\n", {}, r"row 2: has no label in column 'label'"),
        ("file,label\n../x.png,a\n", {}, r"row 2: names a file outside the data folder \(found '\.\./x\.png'\)"),
        ("file,label\n/etc/passwd,a\n", {}, "outside the data folder"),
        ("file,lable\ntrain/cat/p0_0.png,a\n", {}, "has no column 'label'"),
        ("file,label\ntrain/cat/p0_0.png\n", {}, "row 2: has not 2 cells"),
        ("file,label,file\na,b,c\n", {}, "names a column twice"),
        (
            "file,label\ntrain/cat/p0_0.png,a\ntrain/cat/p0_0.png,a\n",
            {},
            "row 3: lists train/cat/p0_0.png twice; remove the row",
        ),
        ("file,label,s\ntrain/cat/p0_0.png,a,holdout\n", {"split": "s"}, r"names no split \(found 'holdout'\)"),
        ("file,label\ntrain/cat/p0_0.png,a\n", {"classes": ["b"]}, "not declared"),
        ("file,label\ntrain/cat/p0_0.png,2\n", {"label": None, "label_columns": ["label"]}, "values does not explain"),
    ],
)
def test_a_bad_table_is_one_line_with_its_row(folder, text, options, message):
    table = write_table(folder, text)
    with pytest.raises(DataError, match=message):
        read_manifest("csv", folder, **({"table": table, "image": "file", "label": "label"} | options))


def test_a_table_that_is_not_utf_8_names_the_row(folder):
    table = write_table(folder, "file,label\ntrain/cat/p0_0.png,a\ntrain/cat/p0_1.png,ménisque\n", encoding="latin-1")
    with pytest.raises(DataError, match=r"row 3: is not UTF-8 \(found byte 0xe9\); save the table as UTF-8"):
        read_manifest("csv", folder, table=table, image="file", label="label")
    with pytest.raises(DataError, match="there is no such table"):
        read_manifest("csv", folder, table="no.csv", image="file", label="label")


# medmnist_npz


def write_npz(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 4), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (n, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n) % 2).reshape(n, 1).astype(np.uint8)
    np.savez_compressed(path, **(arrays | changes))
    return arrays | changes


def test_an_npz_is_one_row_a_picture(tmp_path):
    arrays = write_npz(tmp_path / "toy.npz")
    manifest = read_manifest("medmnist_npz", tmp_path, name="toy", classes=["no", "yes"])
    assert len(manifest.rows) == 9
    row = next(row for row in manifest.rows if row.sample_id == "test/000001")
    assert (row.split, row.labels) == ("test", ("yes",))
    assert np.array_equal(np.asarray(read_rgb(manifest, row))[..., 1], arrays["test_images"][1])
    stored = Image.open(io.BytesIO(read_bytes(manifest, row)))
    assert stored.mode == "L"
    assert np.array_equal(np.asarray(stored), arrays["test_images"][1])
    assert read_manifest("medmnist_npz", tmp_path / "toy.npz", classes=["no", "yes"]).sha256 == manifest.sha256


def test_multi_label_npz_keeps_its_zeros(tmp_path):
    bits = np.array([[1, 0], [0, 0], [1, 1], [0, 1]], dtype=np.uint8)
    write_npz(tmp_path / "m.npz", train_labels=bits)
    manifest = read_manifest("medmnist_npz", tmp_path, classes=["a", "b"], kind="multi", splits=["train"])
    assert [row.labels for row in manifest.rows] == [("a",), (), ("a", "b"), ("b",)]
    assert manifest.rows[0].negatives == ("b",)


def test_a_pickled_array_is_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").write_text, ("x",))

    labels = np.array([Trap(), Trap(), Trap(), Trap()], dtype=object)
    write_npz(tmp_path / "evil.npz", train_labels=labels)
    with pytest.raises(DataError, match="a pickled array is never loaded"):
        read_manifest("medmnist_npz", tmp_path / "evil.npz", classes=["a", "b"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.array([[0], [1], [2], [0]], dtype=np.uint8)}, r"train row 2: is no index into 2 classes"),
        ({"test_labels": np.zeros((2, 1), dtype=np.uint8)}, "other numbers of images and labels"),
    ],
)
def test_a_wrong_npz_is_one_line(tmp_path, changes, message):
    write_npz(tmp_path / "toy.npz", **changes)
    with pytest.raises(DataError, match=message):
        read_manifest("medmnist_npz", tmp_path, classes=["a", "b"])


def test_a_corrupt_or_missing_npz_is_one_line(tmp_path):
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(DataError, match="cannot be read as"):
        read_manifest("medmnist_npz", tmp_path / "cut.npz", classes=["a"])
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(DataError, match="has no array 'train_images'"):
        read_manifest("medmnist_npz", tmp_path / "other.npz", classes=["a"])
    with pytest.raises(DataError, match=r"holds no toy\.npz \(found 2 other"):
        read_manifest("medmnist_npz", tmp_path, name="toy", classes=["a"])


# dataset_folder


def test_our_own_shards_are_a_manifest(tmp_path):
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    with DatasetWriter(tmp_path / "d", name="d") as writer:
        for i, split in enumerate(("train", "test", "test")):
            writer.add(
                Pair(
                    key=f"k{i}", image=buffer.getvalue(), image_format="png", width=7, height=9, caption=f"caption {i}",
                    source="pmc", licence="CC0", sha256="0" * 64, phash=i, split=split, article_id=f"PMC{i}.1",
                )
            )  # fmt: skip
        writer.finish(provenance={}, card=lambda manifest: "# d\n")
    manifest = read_manifest("dataset_folder", tmp_path / "d", splits=["test"])
    assert [(row.sample_id, row.text, row.group_id) for row in manifest.rows] == [
        ("k1", "caption 1", "PMC1.1"), ("k2", "caption 2", "PMC2.1")
    ]  # fmt: skip
    assert manifest.kind == "caption"
    assert np.array_equal(np.asarray(read_rgb(manifest, manifest.rows[0])), np.asarray(picture()))
    assert read_bytes(manifest, manifest.rows[1]) == buffer.getvalue()


# all


def test_an_unknown_layout_option_or_folder_is_named(folder):
    with pytest.raises(ConfigError, match=r"did you mean 'image_folder'\?"):
        read_manifest("imagefolder", folder)
    with pytest.raises(
        ConfigError, match=r"layout.exlude: is no option of layout 'image_folder'; did you mean 'exclude'"
    ):
        read_manifest("image_folder", folder, exlude=["*"])
    with pytest.raises(ConfigError, match=r"layout.table: is missing; layout 'csv' needs it"):
        read_manifest("csv", folder, image="file")
    with pytest.raises(DataError, match="there is no such file or folder"):
        read_manifest("image_folder", folder / "nowhere")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_options_with_a_docstring(layout):
    assert LAYOUTS[layout].__doc__.startswith("The manifest of")


def test_a_broken_picture_names_its_sample(folder):
    (folder / "train" / "cat" / "p0_0.png").write_bytes(b"text")
    manifest = read_manifest("image_folder", folder)
    row = next(row for row in manifest.rows if row.sample_id == "train/cat/p0_0.png")
    with pytest.raises(DataError, match=r"train/cat/p0_0\.png: is not a picture"):
        read_rgb(manifest, row)
    (folder / "train" / "cat" / "p0_0.png").unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_rgb(manifest, row)


# what a data set may do wrong without meaning harm, and with


def test_a_stray_folder_does_not_turn_splits_into_classes(folder):
    save(folder / "masks" / "cat" / "m.png")
    with pytest.raises(DataError, match=r"Testing, train beside masks.*exclude: \['masks/\*'\]"):
        read_manifest("image_folder", folder)
    manifest = read_manifest("image_folder", folder, exclude=["masks/*"])
    assert {row.split for row in manifest.rows} == {"train", "test"}
    assert [drop.reason for drop in manifest.drops] == ["excluded"]


def test_a_link_is_counted(folder):
    (folder / "train" / "cat" / "link.png").symlink_to(folder / "train" / "cat" / "p0_0.png")
    drops = read_manifest("image_folder", folder).drops
    assert [(drop.item, drop.reason) for drop in drops] == [("train/cat/link.png", "symbolic_link")]


@pytest.mark.parametrize(
    ("layout", "options"),
    [("image_folder", {"exclude": "*_mask.png"}), ("csv", {"table": 5, "image": "file"}),
     ("csv", {"table": "labels.csv", "image": "file", "label_columns": ["cat"], "values": {"1": "postive"}})],
)  # fmt: skip
def test_an_option_of_the_wrong_type_is_refused_before_it_is_misread(folder, layout, options):
    with pytest.raises(ConfigError, match=r"^layout\."):
        read_manifest(layout, folder, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('file,label\ntrain/cat/p0_0.png,"cat\ntrain/dog/p1_0.png,dog\n', "is not csv: unexpected end of data"),
        ("file,label\ntrain/cat/p0_0.png," + "x" * 140_000 + "\n", "is not csv: field larger than field limit"),
        ("file,label\ntrain/cat/p0_0.png,c\0t\n", "(NUL|line contains)"),
    ],
)
def test_a_table_that_would_be_misread_is_one_line(folder, text, message):
    table = write_table(folder, text)
    with pytest.raises(DataError, match=message):
        read_manifest("csv", folder, table=table, image="file", label="label")


def test_json_lines_may_hold_a_line_separator_and_cannot_exhaust_the_stack(folder):
    good = json.dumps({"file": "train/cat/p0_0.png", "label": "a\u2028b"}, ensure_ascii=False)
    table = write_table(folder, good + "\n", "good.jsonl")
    assert read_manifest("csv", folder, table=table, image="file", label="label").classes == ("a\u2028b",)
    table = write_table(folder, "[" * 100_000 + "\n", "deep.jsonl")
    with pytest.raises(DataError, match=r"row 1: is not JSON"):
        read_manifest("csv", folder, table=table, image="file", label="label")


def test_a_row_without_a_picture_is_counted(folder):
    table = write_table(folder, "file,label\n,cat\ntrain/dog/p1_0,dog\n")
    manifest = read_manifest("csv", folder, table=table, image="file", label="label", suffix=".png")
    assert [drop.reason for drop in manifest.drops] == ["no_image_named"]


def plain_npz(path, **changes):
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = np.tile(np.arange(28, dtype=np.uint8), (40, 28, 1))
        arrays[f"{split}_labels"] = (np.arange(40) % 2).astype(np.uint8)[:, None]
    np.savez_compressed(path, **(arrays | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_labels": np.full((40, 1), 0.5)}, "labels that are no integers"),
        ({"val_labels": np.full((40, 1), "x")}, "labels that are no integers"),
        ({"val_images": np.zeros((40, 28, 28, 28), np.uint8)}, r"has volumes, which are no pictures .*layout\.slices"),
        ({"val_images": np.zeros((40, 28, 28), np.float32)}, "8-bit"),
    ],
)
def test_arrays_of_another_kind_are_refused_at_once(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read_manifest("medmnist_npz", plain_npz(tmp_path / "set.npz", **changes), classes=["a", "b"])


def test_no_damaged_byte_of_an_npz_escapes_as_another_error(tmp_path):
    data = plain_npz(tmp_path / "good.npz").read_bytes()
    refused = 0
    for position in range(0, len(data), 13):
        path = tmp_path / f"{position}.npz"
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        try:
            read_manifest("medmnist_npz", path, classes=["a", "b"])
        except DataError:
            refused += 1
    assert refused > 30


def test_an_npy_called_npz_and_an_absurd_size_are_one_line(tmp_path):
    path = tmp_path / "a.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        read_manifest("medmnist_npz", path, classes=["a", "b"])
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**13, 28, 28)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_images.npy", header.getvalue())
    with pytest.raises(DataError, match="does not fit into memory"):
        read_manifest("medmnist_npz", path, classes=["a", "b"])


def test_a_replaced_npz_is_read_anew_and_has_another_hash(tmp_path):
    path = plain_npz(tmp_path / "set.npz")
    before = read_manifest("medmnist_npz", path, classes=["a", "b"])
    seen = np.asarray(read_rgb(before, before.rows[0]))
    plain_npz(path, test_images=np.full((40, 28, 28), 7, np.uint8))
    after = read_manifest("medmnist_npz", path, classes=["a", "b"])
    assert after.rows == before.rows
    assert after.sha256 != before.sha256
    assert not np.array_equal(seen, np.asarray(read_rgb(after, after.rows[0])))
