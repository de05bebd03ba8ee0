"""The embedding job: resumed where it was, keyed by all that matters, shared by processes without repeats."""

import numpy as np
import pytest
import torch
from PIL import Image

from biomedclip.errors import DataError
from biomedclip.evaluation import embed, embedding_parts
from biomedclip.evaluation.embed import embed_images
from biomedclip.evaluation.embedding_parts import Part, read_parts, write_part
from biomedclip.layouts import read_manifest

NUM_IMAGES = 23


class Mean(torch.nn.Module):
    """An image is its mean colour through one matrix."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(scale * torch.eye(3))
        self.seen = 0

    def encode_image(self, x, normalize=False):
        self.seen += len(x)
        return torch.nn.functional.normalize((x.mean((2, 3)) + 1e-3) @ self.weight, dim=-1)


class Interrupted(Mean):
    """Stops as a killed process would, after so many images."""

    def encode_image(self, x, normalize=False):
        if self.seen >= 12:
            raise KeyboardInterrupt
        return super().encode_image(x, normalize)


def preprocess(image):
    return torch.from_numpy(np.asarray(image, dtype=np.float32).copy()).permute(2, 0, 1) / 255


@pytest.fixture
def manifest(tmp_path):
    random = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        folder = tmp_path / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        colour = random.integers(0, 255, 3)
        Image.fromarray(np.broadcast_to(colour.astype(np.uint8), (8, 8, 3)).copy()).save(folder / f"{number:02d}.png")
    return read_manifest("image_folder", tmp_path / "images")


def broken(manifest):
    """One image that cannot be read."""
    from pathlib import Path

    row = manifest.rows[5]
    (Path(manifest.root) / row.image.path).write_bytes(b"no picture")
    return row.sample_id


def test_an_interrupted_job_goes_on_where_it_was(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "PART_ROWS", 4)
    bad = broken(manifest)
    cache = tmp_path / "cache"
    facts = dict(batch_size=4, cache=cache, max_excluded=0.1, model_hash="same weights")
    with pytest.raises(KeyboardInterrupt):
        embed_images(Interrupted(), preprocess, manifest, **facts)
    finished = sum(len(part.rows) for part in read_parts(next(cache.glob("*.parts"))))
    assert 8 <= finished < NUM_IMAGES
    model = Mean()
    found = embed_images(model, preprocess, manifest, **facts)
    assert model.seen == NUM_IMAGES - finished
    whole = embed_images(Mean(), preprocess, manifest, max_excluded=0.1)
    assert found.sample_ids == whole.sample_ids
    assert (found.vectors == whole.vectors).all()
    assert [drop.item for drop in found.drops] == [drop.item for drop in whole.drops] == [bad]
    assert not list(cache.glob("*.parts"))  # joined, and then not needed


def test_broken_and_repeated_parts_are_made_again(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "PART_ROWS", 4)
    cache = tmp_path / "cache"
    facts = dict(batch_size=4, cache=cache, model_hash="same weights")
    with pytest.raises(KeyboardInterrupt):
        embed_images(Interrupted(), preprocess, manifest, **facts)
    folder = next(cache.glob("*.parts"))
    files = sorted(folder.glob("*.npz"))
    files[0].write_bytes(files[0].read_bytes()[:50])
    (folder / ".tmp-0000-left.npz").write_bytes(b"half")
    again = read_parts(folder)[0]
    write_part(folder, Part(again.rows[1:], again.vectors[1:], ()))  # two runs wrote these rows
    found = embed_images(Mean(), preprocess, manifest, **facts)
    assert (found.vectors == embed_images(Mean(), preprocess, manifest).vectors).all()


def test_pitfall_25_the_key_is_weights_preprocessing_manifest_files_and_precision(manifest, tmp_path):
    cache = tmp_path / "cache"
    first = embed_images(Mean(), preprocess, manifest, cache=cache)
    assert embed_images(Mean(), preprocess, manifest, cache=cache).cached
    assert not first.cached
    half = embed_images(Mean(), preprocess, manifest, cache=cache, precision="bfloat16")
    assert not half.cached
    assert half.vectors.dtype == np.float32
    assert np.linalg.norm(half.vectors, axis=1) == pytest.approx(1, abs=1e-6)
    assert half.vectors == pytest.approx(first.vectors, abs=0.02)
    assert (half.vectors != first.vectors).any()
    assert not embed_images(Mean(2.0), preprocess, manifest, cache=cache).cached
    assert not embed_images(Mean(), lambda image: preprocess(image), manifest, cache=cache).cached


def test_pitfall_24_unreadable_images_are_counted_and_too_many_are_an_error(manifest):
    bad = broken(manifest)
    found = embed_images(Mean(), preprocess, manifest, max_excluded=0.1)
    assert [(drop.item, drop.reason) for drop in found.drops] == [(bad, "unreadable_image")]
    assert len(found.sample_ids) == NUM_IMAGES - 1
    with pytest.raises(DataError, match=r"1 of 23 images cannot be read, more than 1\.00%"):
        embed_images(Mean(), preprocess, manifest)


def test_pitfall_12_embeddings_that_are_not_finite_name_their_samples(manifest):
    with pytest.raises(DataError, match=manifest.rows[0].sample_id):
        embed_images(Mean(float("nan")), preprocess, manifest)


def test_a_job_that_lacks_rows_is_no_result(manifest):
    part = Part(np.arange(3), np.eye(3, dtype=np.float32), ())
    with pytest.raises(DataError, match="not embedded once each"):
        embed._assemble([part], manifest, 0.01)
    with pytest.raises(DataError, match="not embedded once each"):
        embed._assemble([part, part], manifest, 0.01)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_processes_share_the_rows_without_repeats(manifest, tmp_path, monkeypatch):
    bad = broken(manifest)
    alone = embed_images(Mean(), preprocess, manifest, max_excluded=0.1)
    parts = []
    monkeypatch.setattr(embed, "read_parts", lambda folder: parts.append(read_parts(folder)) or parts[-1])
    shared = embed_images(Mean(), preprocess, manifest, processes=2, batch_size=4, max_excluded=0.1,
                          cache=tmp_path / "cache")  # fmt: skip
    assert shared.sample_ids == alone.sample_ids
    assert shared.vectors == pytest.approx(alone.vectors, abs=1e-6)
    assert [drop.item for drop in shared.drops] == [bad]
    rows = np.concatenate([part.rows for part in parts[-1]])
    assert len(parts[-1]) == 2  # one from each process
    assert sorted(rows.tolist()) == list(range(NUM_IMAGES))  # 23 rows on 2 processes: nothing repeated to make 24
    assert embed_images(Mean(), preprocess, manifest, cache=tmp_path / "cache", max_excluded=0.1).cached


def test_parts_survive_the_disk(tmp_path):
    part = Part(np.array([3, 1]), np.ones((2, 4), np.float32), ())
    write_part(tmp_path, part)
    back = read_parts(tmp_path)[0]
    assert (back.rows == part.rows).all()
    assert (back.vectors == part.vectors).all()
    assert embedding_parts.read_parts(tmp_path / "nothing") == []
