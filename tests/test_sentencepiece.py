"""SentencePiece files read without the SentencePiece library give its ids."""

import json
from pathlib import Path

import pytest

from biomedclip.errors import CheckpointError
from biomedclip.models.sentencepiece import read_sentencepiece
from biomedclip.models.tokenise import make_tokenizer
from biomedclip.models.zoo import Tokenizer, read_model

FOLDER = Path(__file__).parent / "data" / "sentencepiece"
ROWS = json.loads((FOLDER / "tiny.json").read_text())["rows"]


@pytest.mark.parametrize(("text", "ids"), ROWS)
def test_the_ids_are_those_of_the_sentencepiece_library(text, ids):
    assert read_sentencepiece(FOLDER / "tiny.spm").encode(text).ids == ids


def test_rows_are_cut_padded_and_keep_their_end():
    facts = read_model("musk").tokenizer.model_copy(update={"context": 12})
    assert facts.kind == "sentencepiece"
    tokenise = make_tokenizer(facts, {"tokenizer.spm": FOLDER / "tiny.spm"}, "musk")
    rows = tokenise([ROWS[0][0], "", "grade"])
    assert rows.shape == (3, 12)
    assert rows[0].tolist() == [*ROWS[0][1][:11], 2]
    assert rows[1].tolist() == [0, 2, *[1] * 10]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: b"<html>", lambda data: data[:30], lambda data: b""]
)
def test_a_broken_file_says_so(tmp_path, damage):
    path = tmp_path / "tokenizer.spm"
    path.write_bytes(damage((FOLDER / "tiny.spm").read_bytes()))
    with pytest.raises(CheckpointError, match=r"tokenizer\.spm: is no .*SentencePiece model.*download it again"):
        read_sentencepiece(path)


def test_a_broken_table_of_normalisation_says_so(tmp_path):
    path = tmp_path / "tokenizer.spm"
    table = bytes([3 << 3 | 2, 5, 2 << 3 | 2, 3]) + b"\xff" * 3
    path.write_bytes((FOLDER / "tiny.spm").read_bytes() + table)
    with pytest.raises(CheckpointError, match=r"tokenizer\.spm: holds a broken table of normalisation"):
        read_sentencepiece(path)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_sentencepiece(tmp_path / "tokenizer.spm")
    with pytest.raises(CheckpointError, match=r"musk: needs a \.spm file"):
        make_tokenizer(Tokenizer(kind="sentencepiece", context=5, pad_id=1), {}, "musk")
