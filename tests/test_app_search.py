"""Search over a dataset: the embeddings and their order, growth, kills, damage, strangers' words in pages."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from synthetic_shards import encode
from tiny_model import write_tiny_model
from typer.testing import CliRunner

from biomedclip import cli
from biomedclip.app import search, shard_vectors
from biomedclip.app.encoder import Encoder
from biomedclip.app.gallery import write_gallery_page
from biomedclip.app.nearest import CODES, Coded, write_codes
from biomedclip.app.search import ROWS, Hit, open_index
from biomedclip.app.search_figures import print_hits, search_figures
from biomedclip.errors import BiomedclipError, ConfigError, DataError
from biomedclip.evaluation import embed as evaluation_embed
from biomedclip.files import sha256_file
from biomedclip.images import read_rgb
from biomedclip.schema import Article, Pair
from biomedclip.shards import TOMBSTONES, DatasetFolder, DatasetWriter, verify
from data_builders.purge import Withdrawal, purge

HOSTILE = "<script>alert(1)</script> \"><img src=http://evil.example/x onerror=alert(2)> & 'x' ]]> \x1b[31mred"
A_SHARD = 8


def write_figures(folder: Path, articles: int, *, figures: int = 4, caption: str = "", broken: tuple = ()) -> Path:
    """Coloured blocks as figures of made-up articles, in shards of eight: those of a smaller folder come first."""
    with DatasetWriter(folder, name="figures", max_samples=A_SHARD) as writer:
        for article in range(1, articles + 1):
            for number in range(figures):
                blocks = np.random.default_rng([article, number]).integers(0, 256, (4, 5, 3), dtype=np.uint8)
                pixels = np.kron(blocks, np.ones((10, 10, 1), np.uint8))
                key = f"pmc{article}-{number}"
                data = b"\x89PNG no picture" if key in broken else encode(pixels, "PNG")
                writer.add(
                    Pair(
                        key=key, image=data, image_format="png", width=50, height=40, source="pmc", phash=0,
                        licence="CC BY", caption=caption or f"Figure {number} of article {article}.",
                        sha256=hashlib.sha256(data).hexdigest(), article_id=f"PMC{article}.1", figure_id=f"F{number}",
                    )
                )  # fmt: skip
        facts = [
            Article(article_id=f"PMC{n}.1", pmcid=n, version=1, title=caption or f"Title {n}", licence="CC BY",
                    doi=f"10.1234/a{n}", authors=("A. First", "B. Second"), published="2021-03")
            for n in range(1, articles + 1)
        ]  # fmt: skip
        writer.finish(articles=facts, provenance={}, card=lambda manifest: "made up")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Five articles in three shards, a tiny model, and the cache of their index."""
    home = tmp_path_factory.mktemp("search")
    write_figures(home / "d", 5)
    write_tiny_model(home / "model")
    open_index(home / "d", home / "model", cache=home / "cache")
    return home


@pytest.fixture(scope="module")
def encoder(home) -> Encoder:
    return Encoder(home / "model")


@pytest.fixture
def work(home, tmp_path) -> Path:
    """A copy of all that, to be changed."""
    shutil.copytree(home, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many pictures each call of the image tower was given."""
    calls: list[int] = []
    encode_images = evaluation_embed._encode_images

    def counting(model, images, device):
        calls.append(len(images))
        return encode_images(model, images, device)

    monkeypatch.setattr(evaluation_embed, "_encode_images", counting)
    return calls


def embed_all(folder: Path, encoder: Encoder) -> tuple[list[str], np.ndarray]:
    """Keys and embeddings, one picture at a time, with nothing of the search."""
    dataset = DatasetFolder(folder)
    keys, vectors = [], []
    for sample in dataset.samples():
        with torch.inference_mode():
            tensor = encoder.preprocess(read_rgb(sample.image))[None]
            vectors.append(encoder.model.encode_image(tensor, normalize=True)[0].numpy())
        keys.append(sample.key)
    return keys, np.stack(vectors)


def same(found: list[Hit], expected: list[Hit]) -> bool:
    """Whether all figures were found with the same scores; the order of two that are nearly alike may differ."""
    scores = {hit.key: hit.score for hit in expected}
    return len(found) == len(scores) and all(abs(hit.score - scores.get(hit.key, 9)) < 1e-3 for hit in found)


def test_figures_come_in_the_order_of_their_cosines_with_what_is_known_of_them(home, encoder):
    index = open_index(home / "d", encoder, cache=home / "cache")
    keys, vectors = embed_all(home / "d", encoder)
    query = encoder.embed_texts(["a noisy figure"])[0]
    cosines = vectors @ query
    hits = index.search_text("a noisy figure", 5)
    assert (len(index), index.is_exact, index.unreadable) == (20, True, {})
    assert np.allclose([hit.score for hit in hits], np.sort(cosines)[::-1][:5], atol=1e-3)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    rows = {row["key"]: row for row in DatasetFolder(home / "d").index.to_pylist()}
    for hit in hits:
        assert hit.score == pytest.approx(cosines[keys.index(hit.key)], abs=1e-3)
        row = rows[hit.key]
        facts = (row["article_id"], row["figure_id"], row["licence"], row["split"], row["shard"], row["source"])
        assert (hit.article, hit.figure, hit.licence, hit.split, hit.shard, hit.source) == facts
        article, number = re.fullmatch(r"pmc(\d)-(\d)", hit.key).groups()
        assert hit.caption == f"Figure {number} of article {article}."
    assert len(index.search_text("all of them", 100)) == 20


def test_a_picture_finds_itself_and_its_bytes_are_those_of_the_shard(home, encoder):
    index = open_index(home / "d", encoder, cache=home / "cache")
    for sample in list(DatasetFolder(home / "d").samples())[::7]:
        best = index.search_image(read_rgb(sample.image), 1)[0]
        assert (best.key, best.score) == (sample.key, pytest.approx(1, abs=1e-3))
        assert index.read_picture(best) == sample.image
        figure = index.describe([best])[0]
        assert (figure.image, figure.title, figure.year) == (sample.image, f"Title {best.article[3]}", "2021")
        assert figure.link == f"https://doi.org/10.1234/a{best.article[3]}"


def test_codes_find_what_comparing_everything_finds(work, encoder, monkeypatch):
    exact = open_index(work / "d", encoder, cache=work / "cache")
    monkeypatch.setattr(search, "EXACT_BYTES", 0)
    coded = open_index(work / "d", encoder, cache=work / "cache")
    assert (exact.is_exact, coded.is_exact) == (True, False)
    for words in ("one", "two words", "three more words"):
        expected, found = exact.search_text(words), coded.search_text(words)
        assert [hit.key for hit in found] == [hit.key for hit in expected]
        assert np.allclose([hit.score for hit in found], [hit.score for hit in expected], atol=1e-6)
    picture = read_rgb(coded.read_picture(found[3]))
    assert coded.search_image(picture, 1)[0].key == found[3].key


@pytest.mark.parametrize("dim", [64, 33])
def test_codes_reach_their_recall_even_on_vectors_without_any_structure(tmp_path, dim):
    random = np.random.default_rng(0)
    vectors = random.standard_normal((20_000, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    write_codes(tmp_path, dim, len(vectors), vectors[:2000], [vectors[:500], vectors[500:]])
    index = Coded(tmp_path, dim, len(vectors), lambda places: vectors[places])
    queries = random.standard_normal((30, dim), dtype=np.float32)
    recalls = []
    for query in queries:
        scores, places = index.search(query, 10)
        best = np.argsort(-(vectors @ query))[:10]
        assert np.allclose(scores, vectors[places] @ query, atol=1e-5)
        recalls.append(len(set(places) & set(best)) / 10)
    assert np.mean(recalls) >= 0.95


def test_a_grown_dataset_embeds_its_new_shards_alone_and_a_moved_one_none(work, encoder, encoded):
    shutil.rmtree(work / "d")
    write_figures(work / "d", 8)
    index = open_index(work / "d", encoder, cache=work / "cache")
    assert len(index) == 32
    assert sum(encoded) == 16  # the first two shards were full before, and kept their bytes
    keys, vectors = embed_all(work / "d", encoder)
    hits = index.search_text("a noisy figure", 32)
    cosines = dict(zip(keys, vectors @ encoder.embed_texts(["a noisy figure"])[0], strict=True))
    assert {hit.key for hit in hits} == set(keys)
    assert all(hit.score == pytest.approx(cosines[hit.key], abs=1e-3) for hit in hits)
    shutil.copytree(work / "d", work / "moved")
    assert len(open_index(work / "moved", encoder, cache=work / "cache")) == 32
    assert sum(encoded) == 16


def test_an_interrupted_run_goes_on_where_it_was(home, tmp_path, encoder, monkeypatch, encoded):
    monkeypatch.setattr(shard_vectors, "_BATCH", 2)
    monkeypatch.setattr(evaluation_embed, "PART_ROWS", 2)
    counting = evaluation_embed._encode_images

    def dying(model, images, device):
        if len(encoded) == 7:
            raise KeyboardInterrupt
        return counting(model, images, device)

    monkeypatch.setattr(evaluation_embed, "_encode_images", dying)
    with pytest.raises(KeyboardInterrupt):
        open_index(home / "d", encoder, cache=tmp_path)
    assert sum(encoded) == 14
    monkeypatch.setattr(evaluation_embed, "_encode_images", counting)
    index = open_index(home / "d", encoder, cache=tmp_path)
    assert sum(encoded) == 20
    expected = open_index(home / "d", encoder, cache=home / "cache").search_text("words", 20)
    assert same(index.search_text("words", 20), expected)
    assert not list(tmp_path.rglob("parts"))


def test_samples_taken_back_are_not_found_and_come_back_with_their_tombstone_gone(work, encoder, encoded):
    first = open_index(work / "d", encoder, cache=work / "cache").search_text("words", 1)[0]
    purge(work / "d", [Withdrawal(what=first.key, reason="retracted")])
    index = open_index(work / "d", encoder, cache=work / "cache")
    assert first.key not in {hit.key for hit in index.search_text("words", 100)}
    assert (len(index), sum(encoded)) == (19, 0)
    other = open_index(work / "d", encoder, cache=work / "other")
    assert (len(other), sum(encoded)) == (19, 19)  # what was taken back is never embedded
    (work / "d" / TOMBSTONES).unlink()
    for cache, more in (("cache", 0), ("other", 8)):
        before = sum(encoded)
        back = open_index(work / "d", encoder, cache=work / cache)
        assert back.search_text("words", 1)[0].key == first.key
        assert sum(encoded) - before in (more, more - 4)


def test_another_model_has_embeddings_of_its_own_and_its_name_does_not_matter(work, encoder, encoded, tmp_path):
    other = Encoder(write_tiny_model(tmp_path / "other", seed=1))
    found = open_index(work / "d", other, cache=work / "cache").search_text("words", 20)
    assert sum(encoded) == 20
    mine = open_index(work / "d", encoder, cache=work / "cache").search_text("words", 20)
    assert [hit.score for hit in found] != [hit.score for hit in mine]
    shutil.copytree(work / "model", tmp_path / "renamed")
    open_index(work / "d", tmp_path / "renamed", cache=work / "cache")
    assert sum(encoded) == 20


def test_files_of_the_cache_that_changed_are_made_again(work, encoder, monkeypatch, encoded):
    monkeypatch.setattr(search, "EXACT_BYTES", 0)
    expected = open_index(work / "d", encoder, cache=work / "cache").search_text("words", 20)
    for name in (ROWS, CODES, "index.json"):
        path = next(work.rglob(name))
        path.write_bytes(path.read_bytes()[:-3] + b"xyz")
        found = open_index(work / "d", encoder, cache=work / "cache")
        assert same(found.search_text("words", 20), expected), name
    assert not encoded
    vectors = sorted((work / "cache").rglob("*.f16"))
    vectors[0].write_bytes(b"\0" * vectors[0].stat().st_size)
    vectors[1].write_bytes(b"short")
    next(work.rglob("index.json")).unlink()
    found = open_index(work / "d", encoder, cache=work / "cache")
    assert same(found.search_text("words", 20), expected)
    assert sum(encoded) in (12, 16)


def test_the_dataset_folder_is_left_as_it_was(work, encoder, tmp_path):
    before = {path.name: sha256_file(path) for path in (work / "d").iterdir()}
    open_index(work / "d", encoder, cache=tmp_path).search_text("words")
    assert {path.name: sha256_file(path) for path in (work / "d").iterdir()} == before
    assert verify(work / "d") == []


def test_pictures_that_cannot_be_read_are_told_and_the_others_found(tmp_path, encoder):
    broken = (*(f"pmc{article}-{number}" for article in (1, 2) for number in range(4)), "pmc3-1")
    write_figures(tmp_path / "d", 3, broken=broken)  # the whole of the first shard
    index = open_index(tmp_path / "d", encoder, cache=tmp_path / "cache")
    assert sorted(index.unreadable) == sorted(broken)
    assert sorted(hit.key for hit in index.search_text("words")) == ["pmc3-0", "pmc3-2", "pmc3-3"]
    write_figures(tmp_path / "none", 2, broken=broken)
    with pytest.raises(DataError, match="has no picture that can be read"):
        open_index(tmp_path / "none", encoder, cache=tmp_path / "cache")


def test_a_shard_that_is_gone_or_changed_is_one_line(work, encoder):
    index = open_index(work / "d", encoder, cache=work / "cache")
    hit = index.search_text("words", 1)[0]
    path = work / "d" / hit.shard
    data = path.read_bytes()
    row = next(row for row in index.dataset.index.to_pylist() if row["key"] == hit.key)
    path.write_bytes(data[: row["image_offset"] + 40] + b"\0\0\0\0" + data[row["image_offset"] + 44 :])
    with pytest.raises(DataError, match="has other bytes than its index says"):
        index.read_picture(hit)
    path.unlink()
    for ask in (lambda: index.search_text("words", 1), lambda: index.read_picture(hit)):
        with pytest.raises(DataError, match=r"cannot be read \(found No such file"):
            ask()


def test_threads_may_ask_at_once(home, encoder):
    index = open_index(home / "d", encoder, cache=home / "cache")
    words = [f"words {n}" for n in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda word: [hit.key for hit in index.search_text(word)], words))
    assert found == [[hit.key for hit in index.search_text(word)] for word in words]


def test_bad_input_is_one_clear_line(home, tmp_path, monkeypatch):
    monkeypatch.setenv("BIOMEDCLIP_CACHE", str(tmp_path / "cache"))
    with DatasetWriter(tmp_path / "empty", name="empty") as writer:
        writer.finish(provenance={}, card=lambda manifest: "nothing")
    (tmp_path / "page.html").write_text("mine")
    (tmp_path / "text.jpg").write_text("no picture")
    model = str(home / "model")
    for expected, arguments in {
        "holds no finished dataset": (tmp_path, "words"),
        "there is no such folder": (tmp_path / "nowhere", "words"),
        "has no samples to search": (tmp_path / "empty", "words"),
        "must be words or a picture, one of the two": (home / "d", None),
        "(found an empty one)": (home / "d", "  \n"),
        "(found 'words' and text.jpg)": (home / "d", "words", "text.jpg"),
        "is no picture, whatever its name says": (home / "d", None, str(tmp_path / "text.jpg")),
        "No such file": (home / "d", None, str(tmp_path / "nothing.png")),
    }.items():
        with pytest.raises(BiomedclipError, match=re.escape(expected) + "|" + re.escape(expected.lower())) as caught:
            search_figures(*arguments, model=model)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="exists already"):
        search_figures(home / "d", "words", model=model, html=tmp_path / "page.html")
    assert not (tmp_path / "cache").exists()  # nothing of this needed the model
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot be written.*BIOMEDCLIP_CACHE"):
        search_figures(home / "d", "words", model=model)
    with pytest.raises(ConfigError, match="at least 1"):
        open_index(home / "d", model, cache=home / "cache").search_text("words", 0)


def test_the_command_answers_in_a_table_in_json_and_in_a_page(work, tmp_path, monkeypatch):
    monkeypatch.setenv("BIOMEDCLIP_CACHE", str(tmp_path / "cache"))
    options = ["--model", str(work / "model"), "--top", "3"]

    def run(*arguments):
        done = CliRunner().invoke(cli.app, ["search", str(work / "d"), *arguments, *options], catch_exceptions=False)
        assert done.exit_code == 0
        return done

    table = run("a noisy figure").stdout
    rows = [json.loads(line) for line in run("a noisy figure", "--json").stdout.split("\n") if line]
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    fields = {"key", "score", "caption", "article", "figure", "licence", "split", "shard", "source"}
    assert (len(rows), set(rows[0])) == (3, fields)
    for row in rows:
        assert re.search(rf"{row['score']:.3f} +{row['figure']} +{row['article']} +CC BY +{row['caption']}", table)
    assert "3 of 20 figures" in table
    sample = next(DatasetFolder(work / "d").samples())
    (tmp_path / "query.jpg").write_bytes(sample.image)
    found = run("--image", str(tmp_path / "query.jpg"), "--json", "--html", str(tmp_path / "page.html"))
    assert json.loads(found.stdout.split("\n")[0])["key"] == sample.key
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg") == 4  # the question and three answers
    assert f"{sample.key}" in page
    assert "https://doi.org/10.1234/a1" in page


def test_strangers_words_are_shown_and_never_run(tmp_path, encoder, capsys):
    write_figures(tmp_path / "d", 1, caption=HOSTILE + " long" * 100)
    index = open_index(tmp_path / "d", encoder, cache=tmp_path / "cache")
    hits = index.search_text(HOSTILE)
    page = write_gallery_page(tmp_path / "page.html", index, hits, HOSTILE).read_text()
    assert "<script" not in page
    assert not re.search(r"<img(?! alt=\"\" src=\"data:image/jpeg;base64,)", page)
    assert "&lt;script&gt;alert(1)" in page
    assert "Content-Security-Policy" in page
    assert page.count("<details>") == 4
    print_hits(hits, Console(width=120))
    assert "\x1b" not in capsys.readouterr().out
    assert "\x1b" not in json.dumps(hits[0].to_json())


def test_a_picture_that_no_longer_decodes_keeps_its_place(home, encoder, tmp_path):
    index = open_index(home / "d", encoder, cache=home / "cache")
    hits = index.search_text("words", 2)
    figures = index.describe(hits)
    object.__setattr__(figures[0], "image", b"nothing")

    class Describing:
        dataset, encoder = index.dataset, index.encoder

        def describe(self, hits):
            return figures

        def __len__(self):
            return len(index)

    page = write_gallery_page(tmp_path / "page.html", Describing(), hits, "words").read_text()
    assert "does not decode" in page
    assert all(f'id="{hit.key}"' in page for hit in hits)


def test_a_hit_in_json_has_no_place_of_the_index():
    hit = Hit(key="k", score=0.25, caption="c", article=None, figure=None, licence="CC0", split="train", shard="0",
              source="s", row=7)  # fmt: skip
    assert "row" not in hit.to_json()
    assert "row=" not in repr(hit)


SLOW = """
import sys, time
from pathlib import Path
from biomedclip.app import shard_vectors
from biomedclip.app.search import open_index
from biomedclip.evaluation import embed
shard_vectors._BATCH = embed.PART_ROWS = 2
encode = embed._encode_images
def slowly(model, images, device):
    time.sleep(0.2)
    print(len(images), flush=True)
    return encode(model, images, device)
embed._encode_images = slowly
open_index(Path(sys.argv[1]), Path(sys.argv[2]), cache=Path(sys.argv[3]))
print("done", flush=True)
"""


@pytest.mark.fault
def test_kill_9_loses_at_most_one_part_and_ends_in_the_same_answers(home, encoder, tmp_path):
    total, kills = 0, 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, str(home / "d"), str(home / "model"), str(tmp_path)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        seen = 0
        for line in process.stdout:
            if line.strip() == "done":
                break
            seen += int(line)
            if kills < 3 and seen >= 4 + kills:
                time.sleep(0.05 * kills)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        process.stdout.close()
        code = process.wait()
        total += seen
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert kills == 3
    assert 20 <= total <= 20 + 3 * 4  # the part that was being embedded, and the one whose file was being written
    found = open_index(home / "d", encoder, cache=tmp_path).search_text("words", 20)
    expected = open_index(home / "d", encoder, cache=home / "cache").search_text("words", 20)
    assert same(found, expected)
