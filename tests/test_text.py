"""Texts by hash-driven shares, ids equal to open_clip's, buckets that leave embeddings as they are."""

import itertools
import json
from collections import Counter
from pathlib import Path

import ftfy
import pytest
import torch

from biomedclip.config import check_config
from biomedclip.errors import ConfigError
from biomedclip.stream.captions import CaptionMix, choose_caption, find_texts, sample_caption
from biomedclip.stream.text import (
    ClipIds,
    HuggingFaceIds,
    TokenizerIds,
    bucket_by_length,
    fast_tokenise,
    token_lengths,
)
from biomedclip.tokens import _UNTOUCHED, mend_text

CAPTIONS = [
    "", " ", "a", "Chest X-ray.", "  Two   spaces,\ttabs\nand lines ", "&lt;b&gt; &amp;amp; p &lt; 0.05",
    "5 µm ± 2 °C × 3", "“curly” ‘quotes’ and it’s – here — now…", "Röntgenaufnahme der Lunge: Zustand nach Übernähung",
    "胸部X線写真、右肺に陰影", "КТ грудной клетки, стрелка", "أشعة الصدر", "ﬁbrosis and ﬂow", "sÃ³ mojibake â€™",
    "e\u0301 combining, A\u030a", "emoji 🫁 and 𝕍 astral", "nul\x00bell\x07esc\x1b[31m", "IL-6/TNF-α (p<0.001)",
    "[MASK] [SEP] tokens <end_of_text>", "x" * 150, "word " * 300, "한국어 흉부 방사선", "हृदय की तस्वीर",
    "thin\u2009space nbsp\u00a0here", "ＦＵＬＬＷＩＤＴＨ",
]  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    """A BERT tokenizer's folder with a small WordPiece vocabulary."""
    folder = tmp_path_factory.mktemp("vocabulary")
    letters = sorted({letter for caption in CAPTIONS for letter in caption.lower() if not letter.isspace()})
    words = ["chest", "x", "ray", "lung", "word", "the", "Chest", "mojibake", "tokens", "##ray", "##ing", "##brosis"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*special, *words, *letters[::2], *(f"##{letter}" for letter in letters[::3])])
    (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder


def hf_tokenizer(folder: Path, *, settings: dict | None = None, **options):
    from open_clip.tokenizer import HFTokenizer

    stored = {"tokenizer_class": "BertTokenizer", "do_lower_case": True} | (settings or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(stored))
    return HFTokenizer(str(folder), **options)


@pytest.mark.parametrize("context", [8, 77, 256, 512])
@pytest.mark.parametrize("lower", [True, False])
def test_bert_ids_are_those_of_open_clips_tokenizer(vocabulary, context, lower):
    theirs = hf_tokenizer(vocabulary, settings={"do_lower_case": lower}, context_length=context)
    ours = fast_tokenise(theirs)
    assert type(ours) is HuggingFaceIds
    expected = theirs(CAPTIONS)
    found = ours(CAPTIONS)
    assert found.dtype == torch.int64
    assert found.shape == (len(CAPTIONS), context)
    assert torch.equal(found, expected)
    assert torch.equal(theirs(CAPTIONS), expected), "the copy has changed nothing of the tokenizer"
    for caption, row in zip(CAPTIONS, expected, strict=True):
        assert torch.equal(ours([caption])[0], row), "a row does not depend on its neighbours"


@pytest.mark.parametrize(
    "options",
    [{"clean": "lower"}, {"clean": "canonicalize"}, {"strip_sep_token": True},
     {"settings": {"padding_side": "left"}}, {"settings": {"truncation_side": "left"}}],
    ids=str,
)  # fmt: skip
def test_bert_ids_follow_the_tokenizers_options(vocabulary, options):
    theirs = hf_tokenizer(vocabulary, context_length=24, **options)
    ours = fast_tokenise(theirs)
    assert type(ours) is HuggingFaceIds
    assert torch.equal(ours(CAPTIONS), theirs(CAPTIONS))


def test_what_is_not_known_to_be_equal_is_left_to_the_tokenizer(vocabulary):
    clips = hf_tokenizer(vocabulary, context_length=24, tokenizer_mode="clips")
    assert type(fast_tokenise(clips)) is TokenizerIds
    assert type(fast_tokenise(lambda texts: torch.zeros(len(texts), 4))) is TokenizerIds
    split = hf_tokenizer(vocabulary, context_length=24)
    split.tokenizer.split_special_tokens = True
    assert type(fast_tokenise(split)) is TokenizerIds
    assert fast_tokenise(lambda texts: torch.zeros(len(texts), 4))(["a", "b"]).shape == (2, 4)


def test_clip_ids_are_those_of_open_clips_tokenizer():
    from open_clip import get_tokenizer

    for context in (16, 77, 248):
        theirs = get_tokenizer("ViT-B-32", context_length=context)
        ours = fast_tokenise(theirs)
        assert type(ours) is ClipIds
        # open_clip takes the end token for text where a caption spells it; there it is no caption of ours.
        captions = [caption for caption in CAPTIONS if "<end_of_text>" not in caption]
        assert torch.equal(ours(captions), theirs(captions))


def test_tokenisers_can_be_sent_to_other_processes(vocabulary):
    import pickle

    for ours in (fast_tokenise(hf_tokenizer(vocabulary, context_length=16)), ClipIds(16)):
        assert torch.equal(pickle.loads(pickle.dumps(ours))(CAPTIONS[:5]), ours(CAPTIONS[:5]))


def test_words_that_were_looked_up_give_the_same_ids_as_whole_texts(monkeypatch):
    import random

    import biomedclip.tokens as tokens

    monkeypatch.setattr(tokens, "_WORDS_KEPT", 40)
    draw = random.Random(0)
    whole = tokens.clip_tokenizer()
    words = tokens.WordIds(whole, r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")
    for _ in range(20):
        texts = ["".join(draw.choices("abct'sd 12.,%-\x1f_é", k=draw.randint(0, 150))) for _ in range(30)]
        assert [ids.tolist() for ids in words(texts, 12)] == [
            whole.encode(text, add_special_tokens=False).ids[:12] for text in texts
        ]


def test_mending_gives_what_ftfy_and_html_give():
    import html
    import random

    def slowly(text: str) -> str:
        return html.unescape(html.unescape(ftfy.fix_text(text)))

    draw = random.Random(0)
    odd = "Ââ€™ÃÅµ×±°–—·«»¿’“”‘‚„é\u00a0\u2009\u2028\u0301\ufb01Å\u212b½α≤→あ肺Я\x85\x9d&<>;\r\n\f\x0b\x7f"
    made = ["".join(draw.choice(odd if draw.random() < 0.3 else "abc XY,.") for _ in range(draw.randint(1, 30)))
            for _ in range(3000)]  # fmt: skip
    entities = ["H&E", "H&amp;E", "a &lt b", "&EACUTE;", "R&D; b", "&#181;", "&#x3bc", "&&;", "&nosuch;", "&notin x"]
    single = [f"a{sign}b {sign}{sign}" for sign in sorted(_UNTOUCHED)[::7]]
    for text in (*CAPTIONS, *made, *entities, *single):
        assert mend_text(text) == slowly(text), repr(text)


def test_signs_of_wrong_decoding_are_found_wherever_ftfy_finds_them():
    import random
    import re._parser

    from ftfy.badness import BADNESS_RE, is_bad

    from biomedclip.tokens import _REACH, _looks_misread

    assert re._parser.parse(BADNESS_RE.pattern, BADNESS_RE.flags & ~re.UNICODE).getwidth()[1] <= _REACH
    draw = random.Random(0)
    odd = "Ââ€™ÃÅµ×±°–—·«»¿’“„é\u00a0œŒØÙà²√≈‚Äó∂вЂГўВβ€ā€Â Ã \x85\ufffd²¡"
    signs = needless = 0
    for _ in range(5_000):
        text = "".join(draw.choice(odd if draw.random() < 0.15 else "abc XY,.") for _ in range(draw.randint(1, 40)))
        assert _looks_misread(text) >= is_bad(text), repr(text)
        signs, needless = signs + is_bad(text), needless + (_looks_misread(text) > is_bad(text))
    assert 500 < signs < 4_500
    assert needless < 100


SIDECAR = {
    "captions": ["a cell here", "one more cell"], "rewrites": ["rewritten once so", "rewritten twice so"],
    "mentions": [{"text": "Figure 2 shows a cell", "panels": ["A"]}, {"section": "Results"}],
    "panel_captions": {"B": "panel b shows", "A": "panel a shows"},
}  # fmt: skip


def test_the_kinds_of_a_sidecar_are_found_and_rubbish_is_passed_over():
    texts = find_texts("the caption itself", SIDECAR)
    assert texts == {
        "original": ["the caption itself"], "compiled": SIDECAR["captions"], "rewrite": SIDECAR["rewrites"],
        "mention": ["Figure 2 shows a cell"], "panel": ["panel a shows", "panel b shows"],
    }  # fmt: skip
    for rubbish in ({}, {"rewrites": "one string", "mentions": 3, "captions": [1, None], "panel_captions": {"A": 2}}):
        assert find_texts("x", rubbish) == {"original": ["x"]}
    assert find_texts("x", {"mentions": ["a sentence as it is"]})["mention"] == ["a sentence as it is"]


def shares(mix: CaptionMix, sidecar: dict, draws: int = 4000) -> dict[str, float]:
    texts = find_texts("the caption itself", sidecar)
    kinds = {text: kind for kind, listed in texts.items() for text in listed}
    counts = Counter(kinds[sample_caption(texts, mix, 0, "key", epoch)] for epoch in range(draws))
    return {kind: count / draws for kind, count in counts.items()}


def test_texts_come_in_the_shares_that_the_mix_asks_for():
    mix = CaptionMix(original=0.5, rewrite=0.3, mention=0.1, panel=0.1)
    found = shares(mix, SIDECAR)
    for kind, share in {"original": 0.5, "rewrite": 0.3, "mention": 0.1, "panel": 0.1}.items():
        assert found[kind] == pytest.approx(share, abs=0.03)
    # Without mentions and panels their fifth goes to the others, in proportion.
    fewer = shares(mix, {"rewrites": ["rewritten once so"]})
    assert fewer == pytest.approx({"original": 0.625, "rewrite": 0.375}, abs=0.03)
    assert shares(CaptionMix(rewrite=1), {}) == {"original": 1.0}
    laclip = shares(CaptionMix(original=1, rewrite=1, weigh="texts"), SIDECAR)
    assert laclip == pytest.approx({"original": 1 / 3, "rewrite": 2 / 3}, abs=0.03)


def test_a_drawn_text_depends_on_the_facts_alone_and_one_word_is_none():
    mix, texts = CaptionMix(original=1, rewrite=3), find_texts("the caption itself", SIDECAR)
    first = [sample_caption(texts, mix, 0, "key", epoch) for epoch in range(50)]
    assert first == [sample_caption(texts, mix, 0, "key", epoch) for epoch in range(50)]
    assert first != [sample_caption(texts, mix, 1, "key", epoch) for epoch in range(50)]
    assert first != [sample_caption(texts, mix, 0, "other", epoch) for epoch in range(50)]
    short = find_texts("the caption itself", {"rewrites": ["Sorry.", " "]})
    assert {sample_caption(short, mix, 0, "key", epoch) for epoch in range(50)} == {"the caption itself"}
    assert {choose_caption(["a", "b"], 0, "key", epoch) for epoch in range(20)} == {"a", "b"}


def test_a_source_reads_the_texts_of_its_mix(tmp_path):
    from mock_bucket import MockBucket
    from synthetic_shards import write_captions

    from biomedclip.stream.decode import Geometry
    from biomedclip.stream.fetch import FetchConfig
    from biomedclip.stream.loader import Samples, StreamSource

    captions = [f"caption number {i}" for i in range(6)]
    folder = write_captions(tmp_path / "set", captions, [SIDECAR if i % 2 else {} for i in range(6)])
    mix = CaptionMix(original=1, rewrite=1, mention=1)

    def texts(captions: CaptionMix | None, path: object = folder) -> list[list[str]]:
        source = StreamSource(name="a", path=path, captions=captions)
        seen: list[list[str]] = []
        samples = Samples([source], batch_size=6, seed=0, geometry=Geometry(size_px=8),
                          fetch=FetchConfig(cache=str(tmp_path / "cache")),
                          tokenise=lambda batch: seen.append(list(batch)) or torch.zeros(len(batch), 2))  # fmt: skip
        for step in range(20):
            samples[step]
        samples.close()
        return seen

    found = texts(mix)
    assert found == texts(mix)
    with MockBucket(tmp_path) as bucket:
        assert texts(mix, f"{bucket.endpoint}/set") == found
        assert len(bucket.requests("*.tar")) < 6, "the json comes with its picture and caption"
    said = Counter(text for batch in found for text in batch)
    assert {text for text in said if not text.startswith("caption")} == {*SIDECAR["rewrites"], "Figure 2 shows a cell"}
    assert 25 <= said["Figure 2 shows a cell"] / 60 * 100 <= 42
    assert said[captions[0]] == 20, "a sample without others keeps its caption"
    assert {text for batch in texts(CaptionMix(original=1)) for text in batch} == set(captions)


@pytest.mark.parametrize(
    ("mix", "match"),
    [({"original": 0}, "above zero"), ({"orginal": 1}, "did you mean 'original'"), ({"rewrite": -1}, "greater than")],
)
def test_a_wrong_mix_is_refused(mix, match):
    with pytest.raises(ConfigError, match=match):
        check_config(mix, CaptionMix, "run.yaml")


def test_lengths_reach_to_the_last_token_that_is_not_padding():
    ids = torch.tensor([[5, 0, 7, 0, 0], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5], [0, 0, 0, 8, 9]])
    assert token_lengths(ids, 0).tolist() == [3, 1, 5, 5]
    assert token_lengths(ids, 9).tolist() == [5, 5, 5, 4]


def test_buckets_compute_as_few_tokens_as_any_division():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        lengths = torch.randint(1, 12, (8,), generator=generator)
        for buckets in (1, 2, 3):
            groups = bucket_by_length(lengths, buckets)
            assert 1 <= len(groups) <= buckets
            assert sorted(torch.cat([index for index, _ in groups]).tolist()) == list(range(8))
            for index, width in groups:
                assert width == lengths[index].max()
            found = sum(len(index) * width for index, width in groups)
            widths = sorted(set(lengths.tolist()))
            best = min(
                sum(next(w for w in ends if w >= length) for length in lengths.tolist())
                for some in range(buckets)
                for cuts in itertools.combinations(widths[:-1], some)
                for ends in [(*cuts, widths[-1])]
            )
            assert found == best


def test_buckets_at_their_edges():
    assert bucket_by_length([]) == []
    ((index, width),) = bucket_by_length([7, 7, 7], 3)
    assert (index.tolist(), width) == ([0, 1, 2], 7)
    groups = bucket_by_length([3, 190, 5, 9, 200], 2, multiple_of=8)
    assert [(index.tolist(), width) for index, width in groups] == [([0, 2, 3], 16), ([1, 4], 200)]
    assert [width for _, width in bucket_by_length([3, 70, 200], 9)] == [3, 70, 200]


def embed_in_buckets(tower, ids, pad_id):
    groups = bucket_by_length(token_lengths(ids, pad_id), 3)
    assert len(groups) == 3
    parts = torch.cat([tower(ids[index, :length]) for index, length in groups])
    return parts[torch.cat([index for index, _ in groups]).argsort()]


def test_a_bert_tower_gives_the_same_embeddings_in_buckets(vocabulary):
    from open_clip.hf_model import HFTextEncoder
    from transformers import BertConfig

    ids = fast_tokenise(hf_tokenizer(vocabulary, context_length=64))(CAPTIONS)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=int(ids.max()) + 1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=64, pad_token_id=0)  # fmt: skip
    for pooler in ("mean_pooler", "cls_last_hidden_state_pooler"):
        tower = HFTextEncoder("", 16, config=config, pooler_type=pooler, proj_type="linear", pretrained=False).eval()
        with torch.no_grad():
            assert torch.allclose(embed_in_buckets(tower, ids, 0), tower(ids), atol=1e-5)


def cut_tower(tower, ids):
    """open_clip's TextTransformer on shorter texts: its positions and its mask up to there."""
    from open_clip.transformer import text_global_pool

    length = ids.shape[1]
    hidden = tower.token_embedding(ids) + tower.positional_embedding[:length]
    hidden = tower.ln_final(tower.transformer(hidden, attn_mask=tower.attn_mask[:length, :length]))
    return text_global_pool(hidden, ids, tower.pool_type) @ tower.text_projection


def test_a_clip_tower_gives_the_same_embeddings_and_gradients_in_buckets():
    from open_clip.transformer import TextTransformer

    ids = ClipIds(77)(CAPTIONS)
    torch.manual_seed(0)
    tower = TextTransformer(vocab_size=49408, width=32, heads=2, layers=2, output_dim=16).double().eval()
    weight, gradients, embeddings = torch.randn(16, dtype=torch.float64), [], []
    for embed in (tower, lambda ids: embed_in_buckets(lambda part: cut_tower(tower, part), ids, 0)):
        tower.zero_grad()
        embeddings.append(embed(ids))
        (embeddings[-1] @ weight).square().mean().backward()
        gradients.append(tower.positional_embedding.grad.clone())
    assert torch.allclose(*embeddings)
    assert torch.allclose(*gradients)
