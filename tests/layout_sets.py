"""Small data sets on disk in the layouts they are published in."""

import csv
import io
import json
import tarfile

import h5py
import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian


def picture(seed=0, size=(12, 10)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def png(seed=0, size=(12, 10)):
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, "PNG")
    return buffer.getvalue()


def save(path, seed=0, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path)
    return path


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def busi(root):
    """`Dataset_BUSI_with_GT`: pictures and, beside them, their masks."""
    for label in ("benign", "malignant", "normal"):
        for number in (1, 2):
            save(root / label / f"{label} ({number}).png", number)
            save(root / label / f"{label} ({number})_mask.png", number)
    save(root / "benign" / "benign (1)_mask_1.png")
    return root


def pcam(root, counts=(("train", 6), ("valid", 3), ("test", 4))):
    """PatchCamelyon: x and y files of each split, and the table that names the slide."""
    root.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for split, n in counts:
        x = np.random.default_rng(n).integers(0, 255, (n, 96, 96, 3), dtype=np.uint8)
        y = (np.arange(n) % 2).astype(np.uint8).reshape(n, 1, 1, 1)
        for letter, array in (("x", x), ("y", y)):
            with h5py.File(root / f"camelyonpatch_level_2_split_{split}_{letter}.h5", "w") as file:
                file.create_dataset(letter, data=array, chunks=(1, *array.shape[1:]), compression="gzip")
        header = ["", "coord_y", "coord_x", "tumor_patch", "center_tumor_patch", "wsi"]
        rows = [[i, 0, 0, "True", "True", f"camelyon16_{split}_{i // 2}"] for i in range(n)]
        write_csv(root / f"camelyonpatch_level_2_split_{split}_meta.csv", header, rows)
        arrays[split] = x
    return arrays


def chexpert(root):
    """`CheXpert-v1.0-small`: train.csv and valid.csv with 14 findings."""
    findings = ["No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
                "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
                "Fracture", "Support Devices"]  # fmt: skip
    header = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *findings]
    for split, patients in (("train", (1, 2)), ("valid", (64541,))):
        rows = []
        for patient in patients:
            for view in ("frontal", "lateral"):
                path = f"{split}/patient{patient:05d}/study1/view1_{view}.jpg"
                save(root / path, patient)
                marks = dict.fromkeys(findings, "") | {"Edema": "1.0", "Cardiomegaly": "-1.0", "Fracture": "0.0"}
                rows.append([f"CheXpert-v1.0-small/{path}", "Female", 68, view.capitalize(),
                             "AP" if view == "frontal" else "", *marks.values()])  # fmt: skip
        write_csv(root / f"{split}.csv", header, rows)
    return root


def flair(root):
    """A FLAIR table: lists written into cells, and `atributes` spelt as there."""
    rows = []
    for number, (attributes, categories) in enumerate([([], ["normal"]), (["noisy"], ["mild diabetic retinopathy"]),
                                                       ([], ["normal", "cataract"])]):  # fmt: skip
        save(root / "DEEPDRID" / f"{number}.jpg", number)
        rows.append([number, f"DEEPDRID/{number}.jpg", str(attributes), str(categories)])
    write_csv(root / "set.csv", ["", "image", "atributes", "categories"], rows)
    return root


def medimeta(root):
    """A MedIMeta set: info.yaml, annotations.csv with the path first, images as tiff."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "info.yaml").write_text(
        "id: oct\nname: OCT\ntasks:\n- task_name: disease\n  task_target: MULTICLASS_CLASSIFICATION\n"
        "  labels:\n    0: CNV\n    1: DME\n    2: drusen\n"
        "- task_name: urgent\n  task_target: MULTILABEL_CLASSIFICATION\n"
        "  labels: {0: now, 1: soon}\ninput_size: [1, 224, 224]\n"
    )
    rows = []
    for number, split in enumerate(("train", "val", "test")):
        save(root / "images" / f"{number:06d}.tiff", number)
        rows.append([f"images/{number:06d}.tiff", number, "[1, 0]", f"raw/{number}.jpeg", split, f"p{number // 2}"])
    header = ["filepath", "tasks/disease", "tasks/urgent", "original_filepath", "original_split", "patient_id"]
    write_csv(root / "annotations.csv", header, rows)
    return root


def coop(root):
    """`split_<set>.json` of CoOp: [path, label id, class name] of each picture."""
    entries = {}
    for split, label_id, word in (("train", 1, "polyp"), ("val", 0, "ulcer"), ("test", 1, "polyp")):
        save(root / "Kvasir" / word / f"{split}.jpg")
        entries[split] = [[f"{word}/{split}.jpg", label_id, word]]
    (root / "split_Kvasir.json").write_text(json.dumps(entries))
    return root


def coco(root):
    """COCO json with two categories, one picture without an annotation, one box at the edge."""
    for number in range(3):
        save(root / "images" / f"{number}.jpg", number, size=(40, 30))
    found = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(3)],
        "categories": [{"id": 7, "name": "Ascaris"}, {"id": 9, "name": "Hookworm egg"}],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 7, "bbox": [2.0, 3.0, 10.0, 12.0]},
            {"id": 2, "image_id": 0, "category_id": 9, "bbox": [30, 20, 15, 15]},
            {"id": 3, "image_id": 1, "category_id": 9, "bbox": [0, 0, 2, 2]},
            {"id": 4, "image_id": 1, "category_id": 9, "bbox": [5, 5, 20, 20]},
        ],
    }
    (root / "train.json").write_text(json.dumps(found))
    return root


def write_tar(path, members):
    """A tar of (name, bytes), or of TarInfo objects as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return path


def write_dicom(path, pixels, *, syntax=ExplicitVRLittleEndian, encapsulated=None, **values):
    """A file of stored values: (rows, columns), (rows, columns, 3) or (frames, rows, columns)."""
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = values.pop("SOPClassUID", "1.2.840.10008.5.1.4.1.1.2")
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = values.pop("SOPInstanceUID", "1.2.3")
    defaults = {
        "Modality": "CT", "PatientName": "Doe^Jane", "PatientID": "4711", "StudyInstanceUID": "1.9",
        "SeriesInstanceUID": "1.9.1", "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
        "SamplesPerPixel": 3 if colour else 1, "Rows": pixels.shape[0 if pixels.ndim == 2 or colour else 1],
        "Columns": pixels.shape[1 if pixels.ndim == 2 or colour else 2], "BitsAllocated": 8 * pixels.dtype.itemsize,
        "BitsStored": 8 * pixels.dtype.itemsize, "PixelRepresentation": int(pixels.dtype.kind == "i"),
    }  # fmt: skip
    if pixels.ndim == 3 and not colour:
        defaults["NumberOfFrames"] = len(pixels)
    if colour:
        defaults["PlanarConfiguration"] = 0
    for key, value in (defaults | values).items():
        if value is not None:
            setattr(ds, key, value)
    ds.HighBit = ds.BitsStored - 1
    data = (
        encapsulated
        or pixels.astype(pixels.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")).tobytes()
    )
    ds.add_new(0x7FE00010, "OW" if ds.BitsAllocated > 8 and not encapsulated else "OB", data + bytes(len(data) % 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path
