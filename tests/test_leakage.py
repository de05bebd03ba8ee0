"""The leakage gate: what it must find, what it must leave alone, and that the training side is what goes."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from biomedclip.errors import DataError
from biomedclip.layouts import read_manifest
from biomedclip.shards import DatasetFolder, verify
from data_builders.build import BuildConfig, build
from data_builders.contamination import write_hashes
from data_builders.labels.leakage import LeakageConfig, Print, find_matches

RECIPE: dict[str, Any] = {
    "name": "cells", "title": "Cells", "modality": "blood smear", "kind": "single",
    "layout": {"type": "csv", "table": "rows.csv", "image": "file", "label": "label", "split": "split"},
    "classes": [{"label": "RBC", "name": "erythrocyte"}, {"label": "WBC", "name": "white cell"}],
    "templates": {"single": ["A blood smear of {a_x}."]}, "captions_per_image": 1, "public_ids": True,
    "licence": {"code": "CC0", "evidence": "made up"}, "citation": "nobody",
}  # fmt: skip


def picture(seed: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """A smooth random picture, whose perceptual hash is its own."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_set(root: Path, rows: list[tuple[bytes, str, str, str]], **changes: Any) -> tuple[Path, Path]:
    """A folder of pictures with `rows.csv`, from (bytes, label, split, group), and its recipe."""
    root.mkdir()
    lines = ["file,label,split,group"]
    for number, (data, label, split, group) in enumerate(rows):
        (root / f"{number:02d}").write_bytes(data)
        lines.append(f"{number:02d},{label},{split},{group}")
    (root / "rows.csv").write_text("\n".join(lines))
    recipe = root.with_suffix(".yaml")
    recipe.write_text(json.dumps(RECIPE | changes))
    return root, recipe


def compile_set(root: Path, recipe: Path, out: Path, **source: Any) -> DatasetFolder:
    values = {"kind": "labels", "root": str(root), "recipe": str(recipe), "splits": None, **source}
    build(BuildConfig.model_validate({"name": "cells", "licence": "all", "source": values}), out)
    assert verify(out) == []
    return DatasetFolder(out)


def dropped(dataset: DatasetFolder) -> dict[str, str]:
    return {row["item"]: row["reason"] for row in dataset.ledger.to_pylist() if row["status"] == "dropped"}


def report_of(dataset: DatasetFolder) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((dataset.folder / "leakage.json").read_bytes())
    return report


LEAKY = [
    (encoded(picture(1)), "RBC", "train", ""),  # 00: as 05, in another container
    (encoded(picture(2)), "RBC", "train", ""),  # 01: as 06, smaller and worse
    (encoded(picture(3)), "WBC", "train", ""),  # 02: nowhere else
    (encoded(picture(4)), "WBC", "val", ""),  # 03: as 07: val is held out too, and test more so
    (encoded(picture(5)), "WBC", "val", ""),  # 04: nowhere else
    (encoded(picture(1), "WEBP", lossless=True), "RBC", "test", ""),  # 05
    (encoded(picture(2).resize((80, 80)), "JPEG", quality=70), "RBC", "test", ""),  # 06
    (encoded(picture(4)), "WBC", "test", ""),  # 07
]


@pytest.mark.parametrize("splits", [None, ["train", "val"]])
def test_the_training_side_of_a_shown_picture_goes_whether_or_not_the_other_is_compiled(
    splits: Any, tmp_path: Path
) -> None:
    dataset = compile_set(*make_set(tmp_path / "set", LEAKY), tmp_path / "out", splits=splits)
    assert dropped(dataset) == {"00": "leaked_pixels", "01": "leaked_near", "03": "leaked_pixels"}
    report = report_of(dataset)
    assert report["found"] == {"group": 0, "pixels": 2, "near": 1, "label_conflict": 0, "not_telling": 0}
    assert {match["rule"] for match in report["matches"]} == {"pixels", "near"}
    assert [(entry["name"], entry["images"]) for entry in report["compared_with"]] == [("val", 2), ("test", 3)]
    assert dataset.manifest["provenance"]["leakage"]["found"] == report["found"]
    assert "1 by perceptual hash" in (dataset.folder / "README.md").read_text()
    assert "leakage.json" in dataset.manifest["files"]


def test_report_keeps_all_fail_stops_and_off_does_not_look(tmp_path: Path) -> None:
    made = make_set(tmp_path / "set", LEAKY)
    kept = compile_set(*made, tmp_path / "report", leakage={"mode": "report"})
    assert len(kept) == len(LEAKY)
    assert report_of(kept)["found"]["pixels"] == 2
    off = compile_set(*made, tmp_path / "off", leakage={"mode": "off"})
    assert (len(off), report_of(off)) == (len(LEAKY), {"mode": "off", "dropped": {}})
    with pytest.raises(DataError, match=r"3 training images show held-out pictures \(found cells-.* by pixels\)"):
        compile_set(*made, tmp_path / "fail", leakage={"mode": "fail"})


def test_copies_with_other_labels_are_dropped_and_true_repeats_kept_once(tmp_path: Path) -> None:
    rows = [(encoded(picture(1)), "RBC", "train", ""), (encoded(picture(1)), "WBC", "train", ""),
            (encoded(picture(2)), "RBC", "train", ""), (encoded(picture(2)), "RBC", "train", ""),
            (encoded(picture(3)), "WBC", "train", "")]  # fmt: skip
    dataset = compile_set(*make_set(tmp_path / "set", rows), tmp_path / "out")
    assert dropped(dataset) == {"00": "label_conflict", "01": "label_conflict", "03": "duplicate_image"}


def test_groups_in_two_splits_and_groups_with_two_labels_are_counted_and_dropped(tmp_path: Path) -> None:
    layout = RECIPE["layout"] | {"group": "group", "hash_group": False}
    groups = [("RBC", "train", "g1"), ("RBC", "test", "g1"), ("RBC", "train", "g2"), ("WBC", "train", "g2"),
              ("WBC", "train", "g3"), ("WBC", "test", "g4"), ("RBC", "train", "g5"), ("WBC", "test", "g5")]  # fmt: skip
    rows = [(encoded(picture(n)), *entry) for n, entry in enumerate(groups)]
    made = make_set(tmp_path / "set", rows, layout=layout, groups_are_duplicates=True)
    dataset = compile_set(*made, tmp_path / "out")
    conflict = dict.fromkeys(("02", "03", "06", "07"), "label_conflict")
    assert dropped(dataset) == {"00": "group_in_two_splits"} | conflict
    assert report_of(dataset)["groups"] == {
        "groups": 5, "crossing_groups": 2, "crossing_images": 4, "conflict_groups": 2, "conflict_images": 4,
    }  # fmt: skip
    with pytest.raises(DataError, match=r"2 groups lie in two splits \(found 4 images\)"):
        compile_set(*made, tmp_path / "fail", leakage={"mode": "fail"})
    # Images of one patient may have several labels; copies of one picture may not.
    made[1].write_text(json.dumps(RECIPE | {"layout": layout}))
    patients = compile_set(*made, tmp_path / "patients")
    assert dropped(patients) == {"00": "group_in_two_splits", "06": "group_in_two_splits"}
    assert "conflict_groups" not in report_of(patients)["groups"]


def test_registered_evaluation_sets_are_hash_files_or_dataset_folders(tmp_path: Path) -> None:
    rows = [(encoded(picture(n)), "RBC", "train", f"p{n}") for n in range(6)]
    layout = RECIPE["layout"] | {"group": "group"}
    made = make_set(tmp_path / "set", rows, layout=layout)
    # The evaluation sets: picture 1 in another container, another picture of patient 2, and strangers.
    (tmp_path / "eval" / "x").mkdir(parents=True)
    (tmp_path / "eval" / "x" / "jane-doe.webp").write_bytes(encoded(picture(1), "WEBP", lossless=True))
    (tmp_path / "eval" / "x" / "b.png").write_bytes(encoded(picture(50)))
    write_hashes(read_manifest("image_folder", tmp_path / "eval", name="chest"), tmp_path / "eval.csv")
    held_out = [(encoded(picture(60)), "WBC", "test", "p2"), (encoded(picture(61)), "WBC", "train", "p3")]
    folder = compile_set(*make_set(tmp_path / "other", held_out, layout=layout), tmp_path / "folder")
    against = [str(tmp_path / "eval.csv"), str(folder.folder)]
    dataset = compile_set(*made, tmp_path / "out", leakage={"against": against})
    # The dataset folder's own training images are nobody's test.
    assert dropped(dataset) == {"01": "leaked_pixels", "02": "leaked_group"}
    report = report_of(dataset)
    assert [(e["name"], e["kind"], e["images"]) for e in report["compared_with"]] == [
        ("chest", "hash_file", 2), ("cells", "dataset", 1),
    ]  # fmt: skip
    assert "jane" not in (dataset.folder / "leakage.json").read_text() + str(dataset.ledger.to_pylist())


def test_another_evaluation_set_under_the_same_name_is_another_dataset(tmp_path: Path) -> None:
    made = make_set(tmp_path / "set", [(encoded(picture(n)), "RBC", "train", "") for n in range(2)])
    (tmp_path / "eval" / "x").mkdir(parents=True)
    for number in (7, 8):
        (tmp_path / "eval" / "x" / "a.png").write_bytes(encoded(picture(number)))
        write_hashes(read_manifest("image_folder", tmp_path / "eval", name="e"), tmp_path / "eval.csv")
        if number == 7:
            compile_set(*made, tmp_path / "out", leakage={"against": [str(tmp_path / "eval.csv")]})
    with pytest.raises(Exception, match="holds a finished dataset of another input"):
        compile_set(*made, tmp_path / "out", leakage={"against": [str(tmp_path / "eval.csv")]})
    with pytest.raises(DataError, match="neither a hash file nor a finished dataset folder"):
        compile_set(*made, tmp_path / "new", leakage={"against": [str(tmp_path / "no.parquet")]})


# What a perceptual hash may say


def print_of(name: str, phash: int, size: tuple[int, int] = (96, 96)) -> Print:
    return Print(home="test", name=name, phash=phash, width=size[0], height=size[1])


def near(ours: list[Print], theirs: list[Print], **config: Any) -> tuple[dict[str, tuple[str, int | None]], int]:
    found, crowded = find_matches(ours, theirs, LeakageConfig(**config))
    return {ours[row].name: (match.other.name, match.distance) for row, match in found.items()}, crowded


def test_the_nearest_within_the_distance_is_named() -> None:
    theirs = [print_of("two", 0b11), print_of("one", 0b1), print_of("far", 2**40 - 1)]
    assert near([print_of("a", 0), print_of("b", 2**60 - 1)], theirs, max_distance=2) == ({"a": ("one", 1)}, 0)
    assert near([print_of("a", 0)], theirs[:1], max_distance=1) == ({}, 0)


def test_small_pictures_and_other_shapes_are_not_compared_by_perceptual_hash() -> None:
    assert near([print_of("a", 5, (28, 28))], [print_of("b", 5, (28, 28))]) == ({}, 0)
    assert near([print_of("a", 5, (28, 28))], [print_of("b", 5, (28, 28))], min_side_px=28)[0] == {"a": ("b", 0)}
    strip, square = print_of("strip", 5, (400, 100)), print_of("square", 5, (100, 100))
    assert near([strip], [square]) == ({}, 0)
    assert near([strip], [square, print_of("other strip", 5, (302, 75))])[0] == {"strip": ("other strip", 0)}
    unknown = Print(home="e", name="unknown", phash=5)
    assert near([strip], [unknown])[0] == {"strip": ("unknown", 0)}


def test_a_picture_that_is_near_very_many_tells_nothing() -> None:
    ours = [print_of(f"blank {n}", n % 3) for n in range(30)] + [print_of("a", 2**50 - 1)]
    theirs = [print_of("blank", 0), print_of("b", 2**50 - 1)]
    assert near(ours, theirs, max_matches=29) == ({"a": ("b", 0)}, 1)
    assert len(near(ours, theirs, max_matches=30)[0]) == 31


def test_equal_hashes_of_many_pictures_find_each_other_all() -> None:
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**63, 40, dtype=np.uint64).tolist()
    ours = [print_of(f"o{n}", hashes[n % 40] ^ (1 << n % 64)) for n in range(80)]
    theirs = [print_of(f"t{n}", h) for n, h in enumerate(hashes)]
    found, _ = near(ours, theirs, max_distance=1)
    assert found == {f"o{n}": (f"t{n % 40}", 1) for n in range(80)}


# The shapes of two real sets, made up: copies that cross the splits, and augmentations that no hash recognises.


def test_only_a_group_id_knows_turned_copies(tmp_path: Path) -> None:
    turns = [Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_LEFT_RIGHT]
    rows = []
    for group in range(5):
        for number, turn in enumerate([None, *turns]):
            image = picture(group) if turn is None else picture(group).transpose(turn)
            rows.append((encoded(image), "RBC", "train" if number else "test", f"g{group}"))
    blind = compile_set(*make_set(tmp_path / "blind", rows), tmp_path / "out")
    assert dropped(blind) == {}
    seeing = make_set(tmp_path / "seeing", rows, layout=RECIPE["layout"] | {"group": "group"})
    found = compile_set(*seeing, tmp_path / "groups")
    assert Counter(dropped(found).values()) == {"group_in_two_splits": 15}
    assert report_of(found)["groups"] == {"groups": 5, "crossing_groups": 5, "crossing_images": 20}
    # Dealt anew by group, nothing crosses and nothing is lost.
    dealt = RECIPE["layout"] | {"group": "group"}
    split = {"val": 0.3, "test": 0.3, "of": "all", "seed": 1}
    whole = compile_set(*make_set(tmp_path / "dealt", rows, layout=dealt, split=split), tmp_path / "all")
    assert dropped(whole) == {}
    assert report_of(whole)["groups"]["crossing_groups"] == 0
    assert len(whole.manifest["splits"]) > 1
