"""`task: text`: sentences out of articles, the teacher's vectors, the loss, and a whole small run."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch

from biomedclip.errors import CheckpointError, DataError
from biomedclip.files import split_lines
from data_builders.labels.recipe import load_recipe
from data_builders.sentences import article_sentences, recipe_sentences, split_sentences, write_sentences

ARTICLE = b"""<article><front><article-meta><title-group>
<article-title>Cells of the human blood in smears</article-title></title-group></article-meta></front><body>
<sec><title>Methods</title><p>Smears were stained by Dr. Giemsa et al. in
1904. Cells (Fig. 2A) were counted by hand by two readers.<fig><caption><p>A smear of blood with one leukocyte.</p>
</caption></fig></p></sec></body></article>"""


def test_sentences_end_at_points_and_not_at_abbreviations() -> None:
    assert list(article_sentences(ARTICLE)) == [
        "Cells of the human blood in smears",
        "Smears were stained by Dr. Giemsa et al. in 1904.",
        "Cells (Fig. 2A) were counted by hand by two readers.",
        "A smear of blood with one leukocyte.",
    ]
    assert list(split_sentences("Too short. This one has a usual number of words. No.")) == [
        "This one has a usual number of words."
    ]
    assert not list(split_sentences(" ".join(["word"] * 61)))


def test_recipes_give_their_names_bare_and_with_every_modality() -> None:
    found = list(recipe_sentences(load_recipe("bccd")))
    assert "leukocyte" in found
    assert "a peripheral blood film showing a red blood cell" in found
    assert "platelet: small purple cell fragment without a nucleus" in found


def test_every_sentence_is_written_once_and_bad_files_are_counted(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "articles"
    folder.mkdir()
    for name in ("a.xml", "b.nxml"):
        (folder / name).write_bytes(ARTICLE)
    (folder / "c.xml").write_bytes(b"no xml")
    (folder / "d.xml").write_bytes(b"")
    counts = write_sentences([folder], tmp_path / "words.txt")
    lines = split_lines((tmp_path / "words.txt").read_text())
    assert counts["articles"] == 2
    assert counts["sentences"] == len(lines) == len(set(lines)) == counts["repeated"]
    assert sum(counts[reason] for reason in ("xml_error", "not_an_article", "empty_file")) == 2
    with pytest.raises(DataError, match="neither a folder nor a file"):
        write_sentences([tmp_path / "gone"], tmp_path / "words.txt")
    whole = tmp_path / "whole.tar.gz"
    with tarfile.open(whole, "w:gz") as tar:
        tar.add(folder / "a.xml", "deep/a.xml")
        tar.add(folder / "b.nxml", "deep/b.nxml")
    assert write_sentences([whole], tmp_path / "words.txt")["articles"] == 2
    (tmp_path / "cut.tar.gz").write_bytes(whole.read_bytes()[:-60])
    (tmp_path / "junk.tar.gz").write_bytes(b"\x1f\x8b" + bytes(range(200)))
    for name in ("cut.tar.gz", "junk.tar.gz"):
        with pytest.raises(DataError, match="is no whole tar"):
            write_sentences([tmp_path / name], tmp_path / "words.txt")
    monkeypatch.setattr("data_builders.sentences.MAX_FILE_BYTES", len(ARTICLE) - 1)
    for place in (folder, whole):
        with pytest.raises(DataError, match="holds no sentence"):
            write_sentences([place], tmp_path / "words.txt")
    with pytest.raises(DataError, match="holds no sentence"):
        write_sentences([folder / "d.xml"], tmp_path / "words.txt")


def test_the_strongest_directions_keep_cosines_better_than_any_other() -> None:
    from biomedclip.training.text.teacher import reduce_width

    random = np.random.default_rng(0)
    vectors = (random.normal(size=(300, 12)) * np.linspace(3, 0.1, 12)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    reduced, kept = reduce_width(vectors, 6)
    left, values, _ = np.linalg.svd(vectors.astype(np.float64), full_matrices=False)
    best = left[:, :6] * values[:6]
    best /= np.linalg.norm(best, axis=1, keepdims=True)
    np.testing.assert_allclose(reduced @ reduced.T, best @ best.T, atol=1e-5)
    assert kept == pytest.approx((values[:6] ** 2).sum() / (values**2).sum())
    wider, kept = reduce_width(vectors, 20)
    assert kept == 1
    np.testing.assert_allclose(wider @ wider.T, vectors @ vectors.T, atol=1e-6)


def test_the_loss_equals_its_formula_in_float64() -> None:
    from biomedclip.training.text.config import TextLossConfig
    from biomedclip.training.text.train import distil_loss

    random = np.random.default_rng(1)
    ours, theirs = (random.normal(size=(7, 5)) for _ in range(2))
    ours, theirs = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (ours, theirs))

    def likeness(vectors):
        logits = vectors @ vectors.T / 0.1
        np.fill_diagonal(logits, -np.inf)
        shares = np.exp(logits - logits.max(1, keepdims=True))
        return shares / shares.sum(1, keepdims=True)

    p, q = likeness(theirs), likeness(ours)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.nansum(p * np.log(p / q)) / 7
    wanted = 0.5 * np.mean(1 - (ours * theirs).sum(1)) + 2 * divergence
    settings = TextLossConfig(cosine=0.5, relations=2, temperature=0.1)
    found = distil_loss(torch.from_numpy(ours), torch.from_numpy(theirs), settings)
    assert found.item() == pytest.approx(wanted, rel=1e-12)
    same = torch.from_numpy(theirs)
    assert distil_loss(same, same, settings).item() == pytest.approx(0, abs=1e-12)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A tiny BERT whose vocabulary is a handful of words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("teacher")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a the of cell lung blood bone scan with red white".split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=64)  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> str:
    random = np.random.default_rng(0)
    words = "a the of cell lung blood bone scan with red white".split()
    lines = {" ".join(random.choice(words, size=random.integers(3, 9))) for _ in range(900)}
    path = tmp_path_factory.mktemp("sentences") / "words.txt"
    path.write_text("".join(f"{line}\n" for line in sorted(lines)))
    return str(path)


@pytest.mark.slow
def test_a_tower_comes_near_its_teacher_and_starts_a_pretraining_run(teacher, sentences, tmp_path) -> None:
    from biomedclip.models.backbones import fill_text_tower
    from biomedclip.models.load import load
    from biomedclip.training.config import ScheduleConfig
    from biomedclip.training.text.config import TextTrainConfig
    from biomedclip.training.text.train import train_text

    config = TextTrainConfig(task="text", model="biomedclip-demo", teacher=teacher, sentences=(sentences,), epochs=6,
                             batch_size=32, held_out=0.1, schedule=ScheduleConfig(warmup_steps=10))  # fmt: skip
    result = train_text(config, tmp_path / "run")
    assert result.cosine > 0.8
    assert result.neighbours > 5 / result.held_out
    facts = json.loads((tmp_path / "run" / "results.json").read_text())
    assert facts["held_out"] == result.held_out
    model, _, tokenizer = load("biomedclip-demo", random_init=True)
    other, _, _ = load(tmp_path / "run")
    fill_text_tower(model, tmp_path / "run")
    tokens = tokenizer(["white blood cell", "bone scan"])
    assert torch.equal(model.encode_text(tokens), other.encode_text(tokens))
    with pytest.raises(CheckpointError, match="another text tower"):
        fill_text_tower(load("ViT-S-32-alt", random_init=True)[0], tmp_path / "run")


def test_the_teachers_vectors_are_kept_and_a_damaged_part_is_made_again(teacher, tmp_path) -> None:
    from biomedclip.training.text.teacher import embed_sentences

    said = ["a red blood cell", "lung scan", "the bone of the lung"]
    first = embed_sentences(said, teacher, tmp_path, max_tokens=16)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-3)
    (part,) = tmp_path.glob("*.npy")
    kept = part.read_bytes()
    shifted = np.load(part)[::-1].copy()
    np.save(part, shifted)
    assert not np.allclose(embed_sentences(said, teacher, tmp_path, max_tokens=16), first)  # read, not made
    huge = kept.replace(b"'shape': (3, ", b"'shape': (9999999999999, ").replace(b" " * 12 + b"\n", b"\n", 1)
    words = io.BytesIO()
    np.save(words, np.array([["a"], ["b"], ["c"]]))
    for damage in (kept[:40], kept[:-1], b"", b"PK", huge, words.getvalue()):
        part.write_bytes(damage)
        np.testing.assert_array_equal(embed_sentences(said, teacher, tmp_path, max_tokens=16), first)
        assert part.read_bytes() == kept
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"note": "another"}))
    embed_sentences(said, other, tmp_path, max_tokens=16)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_bad_teachers_and_sentences_are_one_line(teacher, sentences, tmp_path) -> None:
    from biomedclip.training.text.config import TextTrainConfig
    from biomedclip.training.text.train import train_text

    def run(**changes):
        values = {"task": "text", "model": "biomedclip-demo", "teacher": teacher, "sentences": (sentences,)} | changes
        train_text(TextTrainConfig(**values), tmp_path / str(len(list(tmp_path.iterdir()))))

    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        run(teacher=str(tmp_path / "none"))
    with pytest.raises(DataError, match="cannot be read"):
        run(sentences=("gone.txt",))
    with pytest.raises(DataError, match="gives no batch of 4096"):
        run(batch_size=4096)


def test_a_trunk_is_filled_by_name_or_by_position_and_never_in_part(tmp_path) -> None:
    from biomedclip.models.backbones import fill_image_tower
    from biomedclip.models.load import load

    model, _, _ = load("biomedclip-demo", random_init=True)
    trunk = model.visual.trunk
    torch.manual_seed(1)
    state = {name: torch.rand_like(value) if value.is_floating_point() else value
             for name, value in trunk.state_dict().items()}  # fmt: skip

    def weights():
        return {name: value.clone() for name, value in trunk.state_dict().items()}

    torch.save({**{f"module.{name}": value for name, value in state.items()}, "module.head": torch.zeros(3)},
               tmp_path / "named.pth")  # fmt: skip
    assert fill_image_tower(model, tmp_path / "named.pth") == ("module.head",)
    assert all(torch.equal(weights()[name], value) for name, value in state.items())
    other = {f"layer{place}.{name.rsplit('.', 1)[-1]}": value + 1 if value.is_floating_point() else value
             for place, (name, value) in enumerate(state.items())}  # fmt: skip
    torch.save({**other, "_fc.weight": torch.zeros(2, 2)}, tmp_path / "placed.pth")
    assert fill_image_tower(model, tmp_path / "placed.pth") == ("_fc.weight",)
    assert all(torch.equal(weights()[name], value + 1) for name, value in state.items() if value.is_floating_point())
    before = weights()
    torch.save(dict(list(other.items())[:-1]), tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match="does not fit the image tower's trunk"):
        fill_image_tower(model, tmp_path / "short.pth")
    assert all(torch.equal(before[name], value) for name, value in weights().items())
    with pytest.raises(CheckpointError, match="fits no tower"):
        fill_image_tower(load("ViT-S-32-alt", random_init=True)[0], tmp_path / "named.pth")
