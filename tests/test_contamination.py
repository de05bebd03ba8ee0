"""Hash files of evaluation sets, and what they find in an index."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from synthetic_hashes import index_row, index_table, near_hashes
from synthetic_shards import write_colours

from biomedclip.errors import DataError
from biomedclip.images import check_image
from biomedclip.layouts import read_manifest
from biomedclip.shards import DatasetFolder
from data_builders.contamination import contamination, hash_pixels, read_hashes, write_hashes

RANDOM = np.random.default_rng(7)


def save(path: Path, picture: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **options)


def smooth_picture(seed: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC))


@pytest.fixture
def evaluation_set(tmp_path: Path) -> Path:
    for number in range(6):
        save(tmp_path / "eval" / ("sick" if number % 2 else "well") / f"p{number}.png", smooth_picture(number))
    return tmp_path / "eval"


def index_of(*pictures: bytes) -> pa.Table:
    facts = [check_image(data) for data in pictures]
    return index_table(
        *(
            index_row(f"k{n}", sha256=f.sha256, phash=f.phash, width=f.width, height=f.height)
            for n, f in enumerate(facts)
        )
    )


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_contamination_is_found_by_bytes_pixels_and_hash(evaluation_set: Path, tmp_path: Path, suffix: str) -> None:
    manifest = read_manifest("image_folder", evaluation_set)
    path = tmp_path / f"hashes.{suffix}"
    assert write_hashes(manifest, path, name="exam, final") == 6
    assert read_hashes(path)["set"].to_pylist() == ["exam, final"] * 6
    same = (evaluation_set / "sick" / "p1.png").read_bytes()
    jpeg, repacked = io.BytesIO(), io.BytesIO()
    Image.fromarray(smooth_picture(2)).resize((192, 192)).save(jpeg, "JPEG", quality=80)
    Image.fromarray(smooth_picture(3)).save(repacked, "PNG", compress_level=0)
    other = io.BytesIO()
    Image.fromarray(smooth_picture(99)).save(other, "PNG")
    index = index_of(same, jpeg.getvalue(), repacked.getvalue(), other.getvalue())
    pixels = [
        hash_pixels(np.asarray(Image.open(io.BytesIO(data))))
        for data in (same, jpeg.getvalue(), repacked.getvalue(), other.getvalue())
    ]
    found = contamination(index.append_column("pixels_sha256", pa.array(pixels)), [path]).to_pylist()
    assert [(f["row"], f["key"], f["sets"], f["reasons"]) for f in found] == [
        (0, "k0", ["exam, final"], ["sha256"]),
        (1, "k1", ["exam, final"], ["phash"]),
        (2, "k2", ["exam, final"], ["pixels"]),
    ]
    assert [[Path(name).name for name in f["samples"]] for f in found] == [["p1.png"], ["p2.png"], ["p3.png"]]


def test_hash_files_of_others_are_read_and_bad_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "hashes.csv"
    path.write_text("set,sha256,phash\nvqa,ABCD,0x1f\nother,,31\n")
    index = index_table(
        index_row("a", sha256="abcd", phash=2**40), index_row("b", phash=31), index_row("c", phash=2**50 - 1)
    )
    found = contamination(index, [path, path], max_distance=0).to_pylist()
    assert [(f["key"], sorted(f["sets"])) for f in found] == [("a", ["vqa"]), ("b", ["other", "vqa"])]
    bad = {
        "a,b\n1,2\n": "no hash file",
        "set,phash\nx,seven\n": "a phash that is none",
        "set,phash\nx,-1\n": "a phash that is none",
        "set,phash,width\nx,1,wide\n": "a width that is none",
    }
    for text, message in bad.items():
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_hashes(path)
    with pytest.raises(DataError, match="no such hash file"):
        read_hashes(tmp_path / "none.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="neither parquet nor csv"):
        read_hashes(tmp_path / "broken.parquet")


def test_contamination_by_hash_is_that_of_brute_force(tmp_path: Path) -> None:
    ours, theirs = near_hashes(RANDOM, 300, alike=0), near_hashes(RANDOM, 200, alike=0)
    theirs[:60] = ours[100:160] ^ (np.uint64(1) << RANDOM.integers(0, 64, 60).astype(np.uint64))
    path = tmp_path / "hashes.csv"
    path.write_text("set,sample,phash\n" + "".join(f"s,{n},{value}\n" for n, value in enumerate(theirs.tolist())))
    index = index_table(*(index_row(f"k{n}", phash=value) for n, value in enumerate(ours.tolist())))
    found = {(f["row"], int(s)) for f in contamination(index, [path], max_distance=2).to_pylist() for s in f["samples"]}
    true = {(i, j) for i in range(300) for j in range(200) if (int(ours[i]) ^ int(theirs[j])).bit_count() <= 2}
    assert found == true
    assert len(true) >= 60


def test_a_near_match_of_another_shape_counts_only_beside_a_square(tmp_path: Path) -> None:
    path = tmp_path / "hashes.csv"
    path.write_text("set,sample,phash,width,height\ns,wide,7,200,100\ns,square,7,100,100\ns,unknown,7,,\n")
    rows = [index_row("wide", phash=6, width=401, height=200), index_row("tall", phash=7, width=100, height=200)]
    found = contamination(index_table(*rows), [path]).to_pylist()
    assert [(f["key"], f["samples"]) for f in found] == [
        ("wide", ["square", "unknown", "wide"]), ("tall", ["square", "unknown"])
    ]  # fmt: skip


def test_a_dataset_folder_is_an_evaluation_set_too(tmp_path: Path) -> None:
    folder = write_colours(tmp_path / "colours", per_class=2)
    assert write_hashes(folder, tmp_path / "a.parquet") == write_hashes(folder, tmp_path / "b.parquet") == 12
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    hashes = read_hashes(tmp_path / "a.parquet")
    assert set(hashes["set"].to_pylist()) == {"colours"}
    found = contamination(DatasetFolder(folder).index, [tmp_path / "a.parquet"], max_distance=0)
    assert found["row"].to_pylist() == list(range(12))


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    save(tmp_path / "eval" / "sick" / "p.png", smooth_picture(1))
    (tmp_path / "eval" / "sick" / "q.png").write_bytes(b"not one")
    with pytest.raises(DataError, match=r"q\.png: is not a picture"):
        write_hashes(read_manifest("image_folder", tmp_path / "eval"), tmp_path / "h.parquet")
    assert not (tmp_path / "h.parquet").exists()
