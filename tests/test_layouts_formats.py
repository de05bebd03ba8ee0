"""Pictures inside other files: HDF5, json listings, foreign tars, `datasets` folders, arrays too large to load."""

import io
import json
import multiprocessing
import pickle
import tarfile

import h5py
import numpy as np
import pyarrow as pa
import pytest
from layout_sets import coco, coop, pcam, picture, png, save, write_tar
from PIL import Image

from biomedclip.errors import ConfigError, DataError
from biomedclip.layouts import READERS, read_bytes, read_manifest, read_rgb
from biomedclip.layouts.manifest import hash_id

PCAM = {
    "classes": ["normal", "tumor"],
    "images": {s: f"camelyonpatch_level_2_split_{s}_x.h5" for s in ("train", "valid", "test")},
    "labels": {s: f"camelyonpatch_level_2_split_{s}_y.h5" for s in ("train", "valid", "test")},
}


def pixels(manifest, row):
    return np.asarray(read_rgb(manifest, row))


# hdf5


def test_patch_camelyon_is_one_row_a_patch(tmp_path):
    arrays = pcam(tmp_path)
    groups = {s: f"camelyonpatch_level_2_split_{s}_meta.csv" for s in arrays}
    manifest = read_manifest("hdf5", tmp_path, groups=groups, group_column="wsi", **PCAM)
    assert {row.split for row in manifest.rows} == {"train", "val", "test"}
    row = next(row for row in manifest.rows if row.sample_id == "val/0000001")
    assert (row.labels, row.group_id) == (("tumor",), "camelyon16_valid_0")
    assert np.array_equal(pixels(manifest, row), arrays["valid"][1])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(read_bytes(manifest, row)))), arrays["valid"][1])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_another_process_reads_the_same_pictures(tmp_path, start):
    pcam(tmp_path, counts=[("train", 3)])
    manifest = read_manifest("hdf5", tmp_path, classes=["a", "b"], images=PCAM["images"]["train"],
                             labels=PCAM["labels"]["train"])  # fmt: skip
    here = [read_bytes(manifest, row) for row in manifest.rows]  # the file is open before the other process starts
    with multiprocessing.get_context(start).Pool(1) as pool:
        there = pool.starmap(read_bytes, [(pickle.loads(pickle.dumps(manifest)), row) for row in manifest.rows])
    assert here == there


def test_an_array_that_lives_in_another_file_is_refused(tmp_path):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(3 * 4 * 4))
    pcam(tmp_path / "d", counts=[("train", 3)])
    x = tmp_path / "d" / PCAM["images"]["train"]
    options = {"classes": ["a", "b"], "images": x.name, "labels": PCAM["labels"]["train"]}
    with h5py.File(x, "w") as file:
        file.create_dataset("x", (3, 4, 4), "u1", external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
    with pytest.raises(DataError, match="is stored in other files"):
        read_manifest("hdf5", tmp_path / "d", **options)
    with h5py.File(x, "w") as file:
        file["x"] = h5py.ExternalLink(str(tmp_path / "d" / PCAM["labels"]["train"]), "y")
    with pytest.raises(DataError, match="is a link to somewhere else"):
        read_manifest("hdf5", tmp_path / "d", **options)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((3, 4, 4), np.uint8), np.array([0, 2, 1]), "row 1: is no index into 2 classes"),
        (np.zeros((3, 4, 4), np.uint8), np.array([0, 1]), "has not one label for each of 3 pictures"),
        (np.zeros((3, 4, 4), np.float32), np.array([0, 1, 1]), "holds no 8-bit"),
        (np.zeros((3, 4, 4), np.uint8), np.array([0.5, 1, 1]), "labels that are no integers"),
        (np.zeros((3, 4, 4), np.uint8), np.zeros((3, 2), int), "has several numbers a picture"),
    ],
)
def test_wrong_arrays_are_one_line(tmp_path, x, y, message):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["x"], file["y"] = x, y
    with pytest.raises(DataError, match=message):
        read_manifest("hdf5", tmp_path, classes=["a", "b"], images="s.h5")


def test_an_array_that_only_states_its_size_is_refused(tmp_path):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file.create_dataset("x", (10**12, 4, 4), "u1", chunks=(1, 4, 4))
        file.create_dataset("y", (10**12,), "u1", chunks=(1024,))
    with pytest.raises(DataError, match="states a size that no data set has"):
        read_manifest("hdf5", tmp_path, classes=["a", "b"], images="s.h5")


def test_a_damaged_hdf5_is_one_line(tmp_path):
    (tmp_path / "s.h5").write_bytes(b"\x89HDF\r\n\x1a\nnot really")
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        read_manifest("hdf5", tmp_path, classes=["a"], images="s.h5")
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file["other"] = np.zeros(3)
    with pytest.raises(DataError, match=r"has no array 'x' \(found other\)"):
        read_manifest("hdf5", tmp_path, classes=["a"], images="t.h5")


# json listings


def test_a_coop_split_file_gives_classes_in_id_order(tmp_path):
    manifest = read_manifest("coop_json", coop(tmp_path), file="split_Kvasir.json", folder="Kvasir")
    assert manifest.classes == ("ulcer", "polyp")
    assert [(row.sample_id, row.split) for row in manifest.rows] == [
        ("Kvasir/polyp/test.jpg", "test"), ("Kvasir/polyp/train.jpg", "train"), ("Kvasir/ulcer/val.jpg", "val")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"train": [["a.jpg", 0, "x"], ["b.jpg", 0, "y"]]}, r"train\[1\]: calls label 0 'y', and an earlier row 'x'"),
        ({"train": [["a.jpg", "0", "x"]]}, r"train\[0\]: is not \[path, label id, class name\]"),
        ({"train": [["../a.jpg", 0, "x"]]}, "outside the data folder"),
        ({"holdout": []}, "names no split"),
        ([], "is no CoOp split file"),
    ],
)
def test_a_wrong_coop_file_is_one_line(tmp_path, found, message):
    (tmp_path / "s.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match=message):
        read_manifest("coop_json", tmp_path, file="s.json")


def test_coco_annotations_are_labels_of_the_picture(tmp_path):
    manifest = read_manifest("coco_json", coco(tmp_path), files={"train": "train.json"}, folder="images",
                             exhaustive=True)  # fmt: skip
    assert [(row.labels, row.negatives, row.split) for row in manifest.rows] == [
        (("Ascaris", "Hookworm egg"), (), "train"), (("Hookworm egg",), ("Ascaris",), "train")
    ]  # fmt: skip
    assert [(drop.item, drop.reason) for drop in manifest.drops] == [("images/2.jpg", "no_annotation")]
    everything = read_manifest("coco_json", tmp_path, files="train.json", folder="images", empty="nothing")
    assert everything.rows[2].labels == ("nothing",)


def test_coco_boxes_are_pictures_of_their_own(tmp_path):
    manifest = read_manifest("coco_json", coco(tmp_path), files="train.json", folder="images", crops=True)
    assert [(row.sample_id, row.labels, row.group_id) for row in manifest.rows] == [
        ("images/0.jpg/000", ("Ascaris",), "images/0.jpg"), ("images/0.jpg/001", ("Hookworm egg",), "images/0.jpg"),
        ("images/1.jpg/001", ("Hookworm egg",), "images/1.jpg"),
    ]  # fmt: skip
    assert [drop.reason for drop in manifest.drops] == ["crop_too_small", "no_annotation"]
    whole = np.asarray(Image.open(tmp_path / "images" / "0.jpg"))
    assert np.array_equal(pixels(manifest, manifest.rows[0]), whole[3:15, 2:12])
    assert np.array_equal(pixels(manifest, manifest.rows[1]), whole[20:30, 30:40])


def test_coco_that_contradicts_itself_is_one_line(tmp_path):
    coco(tmp_path)
    found = json.loads((tmp_path / "train.json").read_text())
    found["annotations"][0]["category_id"] = 99
    (tmp_path / "train.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match=r"is not COCO json .*that is not listed"):
        read_manifest("coco_json", tmp_path, files="train.json", folder="images")


# foreign tars


def sample(key, label=0, seed=0):
    record = {"label": ["b", "a"][label], "patient": f"p{seed}", "caption": f"caption {seed}"}
    texts = {"cls": str(label), "json": json.dumps(record), "txt": f"text {seed}"}
    return [(f"{key}.png", png(seed)), *((f"{key}.{suffix}", text.encode()) for suffix, text in texts.items())]


def test_a_folder_of_tars_is_read_without_extracting(tmp_path):
    write_tar(tmp_path / "train-000.tar", [*sample("x/0001", 1, 1), *sample("x/0002", 0, 2)])
    write_tar(tmp_path / "test-000.tar", sample("0001", 0, 3))
    options = {"splits": {"train-*.tar": "train", "test-*.tar": "test"}, "classes": ["b", "a"]}
    manifest = read_manifest("webdataset", tmp_path, name="w", label="cls", text="txt", group_key="patient",
                             hash_group=True, attributes=["caption"], **options)  # fmt: skip
    assert [(row.sample_id, row.labels, row.split, row.text) for row in manifest.rows] == [
        ("test-000.tar/0001", ("b",), "test", "text 3"), ("train-000.tar/x/0001", ("a",), "train", "text 1"),
        ("train-000.tar/x/0002", ("b",), "train", "text 2"),
    ]  # fmt: skip
    assert manifest.rows[0].group_id == hash_id("w", "p3")
    assert [read_bytes(manifest, row) for row in manifest.rows] == [png(3), png(1), png(2)]
    by_json = read_manifest("webdataset", tmp_path, label="json", text="json", **options)
    assert [(row.labels, row.text) for row in by_json.rows] == [(("b",), "caption 3"), (("a",), "caption 1"),
                                                                (("b",), "caption 2")]  # fmt: skip
    alone = read_manifest("webdataset", tmp_path / "test-000.tar", text="txt", split="test")
    assert (alone.kind, len(alone.rows)) == ("caption", 1)


def test_hostile_members_are_counted_and_name_no_path(tmp_path):
    link = tarfile.TarInfo("evil.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("dev.png")
    device.type = tarfile.CHRTYPE
    members = [link, device, *sample("../../up", 0, 1), *sample("/etc/abs", 0, 2), ("lonely.txt", b"x"),
               ("nolabel.png", png(1)), ("._ghost.png", b"mac"), ("big.png", png()),
               ("big.cls", bytes(2 << 20))]  # fmt: skip
    write_tar(tmp_path / "t.tar", members)
    manifest = read_manifest("webdataset", tmp_path, label="cls", classes=["b", "a"])
    assert {(drop.item, drop.reason) for drop in manifest.drops} == {
        ("t.tar/evil", "not_a_plain_member"), ("t.tar/dev", "not_a_plain_member"), ("t.tar/lonely", "no_image"),
        ("t.tar/nolabel", "no_label"), ("t.tar/big", "text_too_long"),
    }  # fmt: skip
    assert {row.image.path for row in manifest.rows} == {"t.tar"}
    assert [read_bytes(manifest, row) for row in manifest.rows] == [png(1), png(2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.tar"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", png()), ("a.cls", b"7")], r"a\.cls: is no index into 2 classes \(found '7'\)"),
        ([("a.png", png()), ("a.cls", b"0"), ("a.png", png())], "a: occurs twice"),
        ([("a.png", png()), ("a.cls", b"0"), ("a.json", b"{")], r"a\.json: is not JSON"),
        ([("a.png", png()), ("a.cls", b"\xff")], r"a\.cls: is not UTF-8"),
    ],
)
def test_a_wrong_tar_is_one_line(tmp_path, members, message):
    write_tar(tmp_path / "t.tar", members)
    with pytest.raises(DataError, match=message):
        read_manifest("webdataset", tmp_path, label="cls", classes=["b", "a"])


def test_no_damaged_byte_of_a_tar_escapes_as_another_error(tmp_path):
    data = write_tar(tmp_path / "good.tar", sample("a", 0, 1) + sample("b", 1, 2)).read_bytes()
    refused = 0
    for position in range(0, len(data), 41):
        path = tmp_path / "bad.tar"
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        try:
            manifest = read_manifest("webdataset", path, label="cls", classes=["b", "a"])
            for row in manifest.rows:
                read_rgb(manifest, row)
        except DataError:
            refused += 1
    assert refused > 10
    (tmp_path / "cut.tar").write_bytes(data[:700])
    with pytest.raises(DataError, match="cannot be read as tar"):
        read_manifest("webdataset", tmp_path / "cut.tar", label="cls", classes=["b", "a"])
    (tmp_path / "t.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="is compressed"):
        read_manifest("webdataset", tmp_path / "t.tar.gz")


# datasets


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"]),
                                  "tags": datasets.List(datasets.ClassLabel(names=["a", "b"])),
                                  "patient": datasets.Value("string")})  # fmt: skip
    rows = {"image": [picture(i) for i in range(4)], "label": [0, 1, 1, 0], "tags": [[0], [0, 1], [], [1]],
            "patient": ["p", "q", None, "p"]}  # fmt: skip
    whole = datasets.Dataset.from_dict(rows, features=features)
    folder = tmp_path_factory.mktemp("hf")
    datasets.DatasetDict({"train": whole.select([3, 1]), "validation": whole}).save_to_disk(folder / "set")
    whole.save_to_disk(folder / "linked")
    # The library itself would follow the path and embed what is there, so the file is written by hand.
    path = folder / "linked" / "data-00000-of-00001.arrow"
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    cells = [{"bytes": None, "path": "/etc/passwd"}, {"bytes": png(), "path": None}] * 2
    table = table.set_column(0, table.field(0), pa.array(cells, table.field(0).type))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return folder


def test_a_datasets_folder_is_read_from_its_arrow_files(saved):
    manifest = read_manifest("hf_dataset", saved / "set", name="hf", label="label", group="patient", hash_group=True)
    assert [(row.sample_id, row.labels[0], row.split) for row in manifest.rows] == [
        ("train/0000000", "no", "train"), ("train/0000001", "yes", "train"), ("validation/0000000", "no", "val"),
        ("validation/0000001", "yes", "val"), ("validation/0000002", "yes", "val"), ("validation/0000003", "no", "val"),
    ]  # fmt: skip
    assert (manifest.rows[0].group_id, manifest.rows[4].group_id) == (hash_id("hf", "p"), None)
    assert np.array_equal(pixels(manifest, manifest.rows[0]), np.asarray(picture(3)))
    many = read_manifest("hf_dataset", saved / "set", label="tags", names={"a": "alpha"})
    assert (many.kind, many.classes, many.rows[1].labels) == ("multi", ("alpha", "b"), ("alpha", "b"))


def test_parquet_files_of_the_hub_are_read_row_group_by_row_group(saved):
    datasets = pytest.importorskip("datasets")
    train = datasets.load_from_disk(str(saved / "set"))["validation"]
    (saved / "pq" / "data").mkdir(parents=True)
    for shard in range(2):
        rows = train.select(range(2 * shard, 2 * shard + 2))
        rows.to_parquet(saved / "pq" / "data" / f"train-{shard:05d}-of-00002.parquet", batch_size=1)
    options = {"parquet": {"train": "data/train-*.parquet"}, "label": "label", "name": "pq"}
    manifest = read_manifest("hf_dataset", saved / "pq", **options)
    assert [row.labels[0] for row in manifest.rows] == ["no", "yes", "yes", "no"]
    assert manifest.rows[3].image.path == "data/train-00001-of-00002.parquet"
    for number, row in enumerate(manifest.rows):
        assert np.array_equal(pixels(manifest, row), np.asarray(picture(number)))
    moved = (saved / "pq").rename(saved / "pq2")
    assert read_manifest("hf_dataset", moved, **options).sha256 == manifest.sha256
    with pytest.raises(DataError, match="holds no file of split 'test'"):
        read_manifest("hf_dataset", moved, parquet={"test": "data/test-*"})
    (moved / "data" / "train-00000-of-00002.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(DataError, match="cannot be read as Arrow or parquet"):
        read_manifest("hf_dataset", moved, **options)


def test_a_picture_that_is_a_path_of_somebodys_disk_is_not_read(saved):
    manifest = read_manifest("hf_dataset", saved / "linked", label="label")
    assert [(drop.item, drop.reason) for drop in manifest.drops] == [
        ("rows/0000000", "image_not_embedded"), ("rows/0000002", "image_not_embedded")
    ]  # fmt: skip
    assert [row.sample_id for row in manifest.rows] == ["rows/0000001", "rows/0000003"]


def test_what_is_no_data_set_or_no_column_is_one_line(saved, tmp_path):
    with pytest.raises(DataError, match=r"cannot be opened as a data set.*save_to_disk"):
        read_manifest("hf_dataset", tmp_path)
    with pytest.raises(ConfigError, match="has no column 'lable'"):
        read_manifest("hf_dataset", saved / "set", label="lable")
    with pytest.raises(ConfigError, match="column 'label' holds no images"):
        read_manifest("hf_dataset", saved / "set", image="label")


def test_a_hub_set_wants_a_revision_and_offline_is_offline(tmp_path):
    with pytest.raises(ConfigError, match=r"layout.revision: is missing"):
        read_manifest("hf_dataset", tmp_path, hub="owner/name")
    with pytest.raises(ConfigError, match="is no name of a Hub data set"):
        read_manifest("hf_dataset", tmp_path, hub="../name", revision="0")
    with pytest.raises(DataError, match="owner/name: cannot be opened"):
        read_manifest("hf_dataset", tmp_path, hub="owner/name", revision="0" * 40)


# npz


def write_npz(path, **arrays):
    for split, n in (("train", 3), ("val", 2), ("test", 2)):
        arrays.setdefault(f"{split}_images", np.random.default_rng(n).integers(0, 255, (n, 28, 28, 28), dtype=np.uint8))
        arrays.setdefault(f"{split}_labels", (np.arange(n) % 2).reshape(n, 1).astype(np.uint8))
    np.savez_compressed(path, **arrays)
    return arrays


def test_cubes_become_slices_of_one_group(tmp_path):
    arrays = write_npz(tmp_path / "organmnist3d.npz")
    manifest = read_manifest("medmnist_npz", tmp_path, classes=["a", "b"], slices=2, axis=1, splits=["train"])
    assert [row.sample_id for row in manifest.rows[:2]] == ["train/000000/007", "train/000000/021"]
    assert {row.group_id for row in manifest.rows[:2]} == {"train/000000"}
    assert np.array_equal(pixels(manifest, manifest.rows[1])[..., 0], arrays["train_images"][0][:, 21])
    middle = read_manifest("medmnist_npz", tmp_path, classes=["a", "b"], slices=1)
    assert middle.rows[0].image.part == "npz:test_images/0/0/14"
    with pytest.raises(ConfigError, match=r"layout.slices"):
        read_manifest("medmnist_npz", tmp_path, classes=["a", "b"], slices=0)


def test_pictures_have_no_slices(tmp_path):
    write_npz(tmp_path / "a.npz", **{f"{s}_images": np.zeros((n, 28, 28), np.uint8)
                                     for s, n in (("train", 3), ("val", 2), ("test", 2))})  # fmt: skip
    with pytest.raises(DataError, match="has pictures, and no volumes to slice"):
        read_manifest("medmnist_npz", tmp_path, classes=["a", "b"], slices=3)


def test_an_array_too_large_to_load_is_read_row_by_row(tmp_path, monkeypatch):
    arrays = write_npz(tmp_path / "big.npz")
    monkeypatch.setattr("biomedclip.layouts.npz.MAX_LOADED_BYTES", 10_000)
    monkeypatch.setattr("biomedclip.layouts.medmnist.MAX_LOADED_BYTES", 10_000)
    manifest = read_manifest("medmnist_npz", tmp_path, classes=["a", "b"], slices=1, splits=["train"])
    rows = manifest.rows
    for row in (rows[0], rows[2], rows[1]):  # forward, and a step back
        number = int(row.sample_id[6:12])
        assert np.array_equal(pixels(manifest, row)[..., 0], arrays["train_images"][number][14])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        there = pool.starmap(read_bytes, [(manifest, row) for row in rows] * 4)
    assert there == [read_bytes(manifest, row) for row in rows] * 4


# all


def test_every_reader_says_which_sample_it_could_not_read(tmp_path):
    assert {"file", "npz", "hdf5", "tar", "arrow", "crop", "shard"} <= set(READERS)
    save(tmp_path / "s" / "c" / "x.png")
    manifest = read_manifest("image_folder", tmp_path / "s")
    (tmp_path / "s" / "c" / "x.png").unlink()
    with pytest.raises(DataError, match=r"s: c/x\.png: cannot be read"):
        read_bytes(manifest, manifest.rows[0])
