"""Longer captions: the stretched table against Long-CLIP's rule, and towers that read 77, 248 and 512 tokens."""

import json

import numpy as np
import open_clip
import pytest
import torch
from tiny_model import MODEL_CFG

from biomedclip.errors import ConfigError
from biomedclip.training.long_text import set_context_length, stretch_positions


def long_clip_rule(table):
    """77 to 248 as the paper says it: 20 kept, each of the others followed by three between it and the next."""
    rows = [table[i] for i in range(20)]
    for i in range(20, 76):
        rows += [(1 - k / 4) * table[i] + k / 4 * table[i + 1] for k in range(4)]
    rows += [table[76] + k / 4 * (table[76] - table[75]) for k in range(4)]
    return np.stack(rows)


def test_77_positions_become_248_by_long_clips_rule():
    table = np.random.default_rng(0).normal(size=(77, 5))
    stretched = stretch_positions(torch.tensor(table), 248)
    assert stretched.shape == (248, 5)
    np.testing.assert_allclose(stretched.numpy(), long_clip_rule(table), rtol=1e-12)


def test_a_straight_table_stays_straight_at_any_length():
    table = torch.arange(77, dtype=torch.float64)[:, None]
    for length in (100, 256, 512):
        stretched = stretch_positions(table, length)[:, 0]
        assert torch.equal(stretched[:20], table[:20, 0])
        steps = stretched[20:].diff()
        torch.testing.assert_close(steps, torch.full_like(steps, (77 - 20) / (length - 20)))
    assert torch.equal(stretch_positions(table, 40), table[:40])


def clip_config(context=77, custom=False):
    text = {**MODEL_CFG["text_cfg"], "context_length": context}
    return {**MODEL_CFG, "text_cfg": text, **({"custom_text": True} if custom else {})}


def build(config):
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    torch.manual_seed(0)
    return kind(**config).eval()


@pytest.mark.parametrize("custom", [False, True])
def test_a_stretched_tower_reads_short_captions_as_before_and_long_ones_at_all(custom):
    config = clip_config(custom=custom)
    model = build(dict(config))
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    short = ["a chest radiograph", "a red blood cell"]
    before = model.encode_text(tokenizer(short))
    changed = set_context_length(model, config, 248)
    assert changed["text_cfg"]["context_length"] == 248
    assert config["text_cfg"]["context_length"] == 77
    longer = open_clip.SimpleTokenizer(context_length=248)
    # Captions within the 20 kept positions end there, and the tower is causal: what follows changes nothing.
    torch.testing.assert_close(model.encode_text(longer(short)), before, rtol=1e-5, atol=1e-6)
    words = " ".join(f"word{i}" for i in range(60))
    one, other = longer([words + " benign", words + " malignant"])
    assert int((one != 0).sum()) > 77
    assert not torch.allclose(*(model.encode_text(text[None]) for text in (one, other)))


def test_a_stretched_model_is_exported_and_loads_in_open_clip(tmp_path):
    from biomedclip.models.export import export_open_clip

    config = clip_config()
    model = build(dict(config))
    model.visual.preprocess_cfg = {
        "size": (32, 32), "mode": "RGB", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0,
    }  # fmt: skip
    changed = set_context_length(model, config, 248)
    export_open_clip(model, tmp_path, model_cfg=changed)
    again, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    text = tokenizer([" ".join(f"word{i}" for i in range(70))])
    assert text.shape == (1, 248)
    assert torch.equal(again.encode_text(text), model.encode_text(text))


def test_gradients_reach_the_stretched_positions():
    config = clip_config()
    model = build(dict(config)).train()
    set_context_length(model, config, 248)
    tokens = open_clip.SimpleTokenizer(context_length=248)([" ".join(f"word{i}" for i in range(70))])
    model.encode_text(tokens).sum().backward()
    assert float(model.positional_embedding.grad[100].abs().sum()) > 0


def write_bert(folder):
    """A BERT of a few thousand weights with its own vocabulary, as a Hugging Face folder."""
    from transformers import BertConfig, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]", *"abcdefgh", "cell", "chest", "radiograph"]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, model_max_length=512).save_pretrained(folder)
    BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=512,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = write_bert(tmp_path_factory.mktemp("hf") / "bert")
    text = {
        "hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_model_pretrained": False,
        "hf_pooler_type": "cls_last_hidden_state_pooler", "hf_proj_type": "mlp", "context_length": 256,
    }  # fmt: skip
    return {"embed_dim": 16, "vision_cfg": MODEL_CFG["vision_cfg"], "text_cfg": text}


@pytest.mark.parametrize("length", [77, 256, 512])
def test_a_bert_tower_reads_as_many_tokens_as_its_table_has(bert, length):
    model = open_clip.CustomTextCLIP(**json.loads(json.dumps(bert))).eval()
    changed = set_context_length(model, bert, length)
    assert changed["text_cfg"]["context_length"] == length
    tokenizer = open_clip.tokenizer.HFTokenizer(bert["text_cfg"]["hf_tokenizer_name"], context_length=length)
    text = tokenizer(["a chest radiograph " * 200])
    assert text.shape == (1, length)
    assert model.encode_text(text).shape == (1, 16)
    with pytest.raises(ConfigError, match=r"the text tower has 512 positions \(found 513\); take at most 512"):
        set_context_length(model, bert, 513)


def test_random_sentences_of_a_bert_vocabulary_hold_words_only(bert):
    from biomedclip.training.continual.vocabulary import random_sentences

    tokenizer = open_clip.tokenizer.HFTokenizer(bert["text_cfg"]["hf_tokenizer_name"], context_length=32)
    texts = random_sentences(tokenizer, num_texts=200, num_words=10, seed=0)
    inner = tokenizer.tokenizer
    assert set(texts[:, 0].tolist()) == {inner.cls_token_id}
    assert set(texts[:, 11].tolist()) == {inner.sep_token_id}
    assert set(texts[:, 12:].unique().tolist()) == {inner.pad_token_id}
    names = {inner.convert_ids_to_tokens(number) for number in texts[:, 1:11].unique().tolist()}
    assert not any(name.startswith("[") for name in names)
    assert len(names) > 8


def test_a_tower_without_positions_to_spare_is_refused():
    config = clip_config(context=16)
    model = build(dict(config))
    with pytest.raises(ConfigError, match="of 16 positions cannot be stretched"):
        set_context_length(model, config, 248)


@pytest.mark.parametrize("custom", [False, True])
def test_a_text_whose_padding_is_cut_is_embedded_as_the_whole_one(custom):
    from biomedclip.training.towers import encode_text, text_padding

    model = build(clip_config(custom=custom))
    tokens = open_clip.SimpleTokenizer(context_length=77)(["a chest radiograph", "cells"])
    assert text_padding(model) == 0
    torch.testing.assert_close(encode_text(model, tokens[:, :8]), model.encode_text(tokens), rtol=1e-5, atol=1e-6)
