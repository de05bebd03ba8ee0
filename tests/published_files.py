"""The files of a released model as they are published, with random numbers in them: what `load` is given in tests."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from checkpoint_layouts import LayoutFile, read_layout
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from biomedclip.models.zoo import ReleasedModel

DATA = Path(__file__).parent / "data"


def write_published(model: ReleasedModel, folder: Path, *, seed: int = 0) -> Path:
    """All weights and tokenizer files of a model under their published names, in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, layout in zip(model.files_of("weights"), read_layout(model.name), strict=True):
        path = folder / Path(file.paths[0]).name
        if Path(layout.path).suffix == ".safetensors":
            path = folder / layout.path
        _write_weights(path, layout, model, seed)
        if file.member is not None and path.name != Path(layout.path).name:
            _zip(path, file.member)
    for file in model.files_of("tokenizer"):
        _write_tokenizer(folder / Path(file.paths[0]).name, model)
    return folder


def _write_weights(path: Path, layout: LayoutFile, model: ReleasedModel, seed: int) -> None:
    tensors = layout.tensors(seed=seed)
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
        return
    value: object = tensors
    if layout.wrapper == "-":
        value = next(iter(tensors.values()))
    elif layout.wrapper is not None:
        # Training checkpoints keep numpy numbers beside the weights, which a safe unpickler must be told of.
        rate = np.float64(1e-4) if "numpy.dtype" in model.keys.safe_globals else 1e-4
        value = {"epoch": 3, "name": "a run", layout.wrapper: tensors, "optimizer": {"lr": rate}}
    torch.save(value, path)


def _zip(path: Path, member: str) -> None:
    plain = path.rename(path.with_suffix(".plain"))
    with zipfile.ZipFile(path, "w") as box:
        box.write(plain, f"pretrained/{member}")
    plain.unlink()


def _write_tokenizer(path: Path, model: ReleasedModel) -> None:
    if path.name == "vocab.txt":
        text = model.architecture.config.get("text") or model.architecture.text_config
        count = 30522 if text is None else text["vocab_size"]
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "chest", "x", "-", "ray", "of", "a", "the", "tumour"]
        letters = [f"{mark}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "##")]
        rest = [word for word in [*words, *letters] if word not in words[:0]]
        rest = list(dict.fromkeys(rest))
        path.write_text("\n".join([*rest, *(f"[unused{i}]" for i in range(count - len(rest)))]))
    elif path.suffix in (".spm", ".model"):
        shutil.copy(DATA / "sentencepiece" / "tiny.spm", path)
    elif path.name == "tokenizer.json":
        path.write_text(_byte_level().to_str())
    else:
        path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}))


def _byte_level() -> Tokenizer:
    specials = ["<pad>", "<start_of_text>", "<end_of_text>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start_of_text> $A <end_of_text>", special_tokens=[("<start_of_text>", 1), ("<end_of_text>", 2)]
    )
    return tokenizer
