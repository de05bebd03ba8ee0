"""The loader: batches of the plan, whatever the workers; resumable; bad samples counted and replaced."""

from collections import Counter

import numpy as np
import pytest
import torch
from synthetic_shards import write_articles, write_colours

from biomedclip.errors import ConfigError, DataError
from biomedclip.shards import DatasetFolder
from biomedclip.stream.captions import choose_caption
from biomedclip.stream.decode import Geometry, decode_exact
from biomedclip.stream.loader import Samples, StreamLoader, StreamSource
from biomedclip.tokens import encode_captions


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    return write_colours(root / "colours"), write_articles(root / "articles")


def tokenise(captions):
    return torch.tensor(encode_captions(captions, 16), dtype=torch.int64)


def make_samples(folders, batch_size=8, seed=0, balance=False, **options):
    colours, articles = folders
    sources = [
        StreamSource(name="colours", path=colours, weight=3, balance=balance),
        StreamSource(name="articles", path=articles, weight=1),
    ]
    geometry = Geometry(size_px=20, resize_mode="squash")
    return Samples(sources, batch_size=batch_size, seed=seed, geometry=geometry, tokenise=tokenise, **options)


def equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name
    return True


def test_a_batch_has_the_contracts_names_types_and_shapes(folders):
    loader = StreamLoader(make_samples(folders), max_steps=3)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    for batch in batches:
        assert batch["image"].shape == (8, 3, 20, 20)
        assert batch["image"].dtype == torch.uint8
        assert batch["text"].shape == (8, 16)
        assert batch["text"].dtype == torch.int64
        assert Counter(batch["source"]) == {"colours": 6, "articles": 2}
        assert len(set(batch["key"])) == 8
        articles = [a for a in batch["article"].tolist() if a >= 0]
        assert len(articles) == len(set(articles)) == 2


def test_labels_belong_to_their_sample(folders):
    samples = make_samples(folders)
    assert samples.label_names == ["colours: blue", "colours: green", "colours: red"]
    batch = samples[0]
    for key, labels in zip(batch["key"], batch["labels"].tolist(), strict=True):
        assert labels == (
            [-1] if key.startswith("pmc") else [samples.label_names.index(f"colours: {key.split('-')[1]}")]
        )


def test_the_caption_of_a_sample_changes_with_the_epoch_and_is_one_of_its_own(folders):
    samples = make_samples(folders)
    seen = {}
    for step in range(40):
        batch = samples[step]
        for key, text in zip(batch["key"], batch["text"].tolist(), strict=True):
            seen.setdefault(key, set()).add(tuple(text))
    for key, texts in seen.items():
        if key.startswith("train"):
            name = key.split("-")[1]
            assert texts == {
                tuple(row) for row in encode_captions([f"a {name} square", f"square of {name} colour"], 16)
            }
        else:
            assert len(texts) == 1
    assert Counter(choose_caption("abc", "k", n) for n in range(3000)).most_common()[-1][1] > 850


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_come_with_any_number_of_workers_and_after_a_resume(folders, workers):
    whole = list(StreamLoader(make_samples(folders), max_steps=6))
    loader = StreamLoader(make_samples(folders), max_steps=6, workers=workers)
    taken = []
    for batch in loader:
        taken.append(batch)
        if len(taken) == 4:
            state = loader.state_dict()
            break
    assert state["delivered"] == 4
    rest = StreamLoader(make_samples(folders), max_steps=6)
    rest.load_state_dict(state)
    taken += list(rest)
    assert len(taken) == 6
    assert all(equal(one, other) for one, other in zip(whole, taken, strict=True))


def test_two_processes_share_the_batch_of_one(folders):
    whole = make_samples(folders)[2]
    halves = [make_samples(folders, rank=rank, world_size=2)[2] for rank in range(2)]
    assert [*halves[0]["key"], *halves[1]["key"]] == whole["key"][0::2] + whole["key"][1::2]
    assert torch.equal(halves[1]["image"], whole["image"][1::2])
    with pytest.raises(ConfigError, match="batch_size"):
        make_samples(folders, world_size=3)


def test_a_balanced_source_gives_every_class_the_same_share(tmp_path, folders):
    from synthetic_shards import COLOURS, colour_pair

    from biomedclip.shards import DatasetWriter

    with DatasetWriter(tmp_path / "skewed", name="skewed") as writer:
        for label, (name, number) in enumerate({"red": 12, "green": 2, "blue": 4}.items()):
            for i in range(number):
                writer.add(colour_pair(f"{name}-{i}", name, COLOURS[name], "train", label, i, source="skewed"))
        writer.finish(provenance={}, card=lambda manifest: "skewed")
    batch = make_samples((tmp_path / "skewed", folders[1]), balance=True)[0]
    assert Counter(key.split("-")[0] for key in batch["key"] if "pmc" not in key) == {"red": 2, "green": 2, "blue": 2}


def test_the_state_of_another_plan_is_refused(folders):
    state = StreamLoader(make_samples(folders, seed=1), max_steps=6).state_dict()
    with pytest.raises(ConfigError, match="interrupted run"):
        StreamLoader(make_samples(folders), max_steps=6).load_state_dict(state)


def damage(folder, keys):
    """Overwrite the pictures of some samples inside their tar, as a bad disk or a half-replaced file would."""
    for row in DatasetFolder(folder).index.to_pylist():
        if row["key"] in keys:
            with (folder / row["shard"]).open("r+b") as file:
                file.seek(row["image_offset"])
                file.write(b"\0" * row["image_size"])


def test_an_unreadable_sample_is_counted_and_replaced_by_the_same_one_every_time(tmp_path):
    folders = write_colours(tmp_path / "colours"), write_articles(tmp_path / "articles")
    clean = [make_samples(folders)[step] for step in range(3)]
    damage(folders[0], {"train-red-1", "train-blue-4"})
    loader = StreamLoader(make_samples(folders, max_bad=0.5), max_steps=3)
    batches = list(loader)
    again = StreamLoader(make_samples(folders, max_bad=0.5), max_steps=3, workers=1)
    assert all(equal(one, other) for one, other in zip(batches, again, strict=True))
    replaced = 0
    for before, after in zip(clean, batches, strict=True):
        for old, new in zip(before["key"], after["key"], strict=True):
            if old in ("train-red-1", "train-blue-4"):
                replaced += 1
                assert new.startswith("train-")
                assert new not in ("train-red-1", "train-blue-4")
            else:
                assert new == old
    assert replaced > 0
    assert replaced <= loader.bad["colours"] == again.bad["colours"]
    assert "index" in loader.last_bad


def test_too_many_unreadable_samples_stop_the_run(tmp_path):
    folders = write_colours(tmp_path / "colours"), write_articles(tmp_path / "articles")
    damage(folders[0], {f"train-{name}-{i}" for name in ("red", "green", "blue") for i in range(5)})
    with pytest.raises(DataError, match="cannot be read"):
        list(StreamLoader(make_samples(folders), max_steps=20))


def test_a_truncated_tar_is_noticed(tmp_path):
    folders = write_colours(tmp_path / "colours", splits=("train",)), write_articles(tmp_path / "articles")
    tar = folders[0] / "00000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    loader = StreamLoader(make_samples(folders, max_bad=1.0), max_steps=4)
    list(loader)
    assert loader.bad["colours"] > 0
    assert "cut off" in loader.last_bad


def test_exact_reading_gives_evaluation_pixels_and_the_first_caption(folders):
    samples = make_samples(folders)
    for row, sample in enumerate(DatasetFolder(folders[0]).samples("train")):
        pixels, caption = samples.read_exact(0, row)
        assert np.array_equal(pixels, decode_exact(sample.image, Geometry(size_px=20, resize_mode="squash")))
        assert caption == sample.caption


def test_a_split_without_samples_and_a_name_used_twice_are_refused(folders):
    geometry = Geometry(size_px=20)
    for sources, error, word in (
        ([StreamSource(name="a", path=folders[1], split="test")], DataError, "no samples of split 'test'"),
        ([StreamSource(name="a", path=p) for p in folders], ConfigError, "one name"),
        ([StreamSource(name="a", path=folders[0] / "nowhere")], DataError, "no such folder"),
    ):
        with pytest.raises(error, match=word):
            Samples(sources, batch_size=4, seed=0, geometry=geometry, tokenise=tokenise)


def test_the_fast_tokeniser_gives_open_clips_ids_and_is_bypassed_where_it_would_not():
    from open_clip.tokenizer import SimpleTokenizer

    from biomedclip.stream.text import fast_tokenise

    captions = ["Chest X-ray, clear lungs.", "µ-opioid receptor at 37 °C &amp; pH 7.4", "a " * 60]
    for tokenizer in (SimpleTokenizer(context_length=24), SimpleTokenizer(context_length=24, clean="whitespace")):
        assert torch.equal(fast_tokenise(tokenizer)(captions), tokenizer(captions))
